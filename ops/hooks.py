"""A sysadmin's own commands, before and after, and when something has failed."""

import asyncio
import os
import signal
import sys
from contextlib import suppress

from server.commands.failures import CommandFailed
from server.commands.output import say

_LONGEST_SECONDS = 6 * 3_600.0
"""For a hook may copy a whole repository; but what hangs must not keep the backup of the next night from beginning."""
_LONGEST_LAST_RESORT_SECONDS = 600.0


async def run_hook(command: str, what: str, *, limit_seconds: float = _LONGEST_SECONDS, **facts: str) -> None:
    """Runs a shell command, if there is one, with the facts in its environment. Raises `CommandFailed` when it fails, or takes too long.

    On leaving, however that is, it and what it has started in its session have ended.
    """
    if not command:
        return
    # What it says is no result of ours.
    process = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", command, env=os.environ | facts, stdout=sys.stderr.fileno(), start_new_session=True
    )
    try:
        status = await asyncio.wait_for(process.wait(), limit_seconds)
    except TimeoutError:
        raise CommandFailed(f"{what} had not ended after {limit_seconds:g} s, and was killed") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if status:
        raise CommandFailed(f"{what} failed with {status}")


async def tell_failure(command: str, what: str, failure: str) -> None:
    """The last resort: never raises."""
    try:
        await run_hook(command, what, limit_seconds=_LONGEST_LAST_RESORT_SECONDS, COFFER_FAILURE=failure)
    except (CommandFailed, OSError) as problem:
        say(str(problem))
