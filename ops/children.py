"""Programs that a tool runs: they end with it, however it ends, and what they complain of is kept."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.commands.failures import CommandFailed

_LONGEST_LINE_BYTES = 2**20
_KEPT_COMPLAINTS = 10_000
_TO_END_SECONDS = 30.0


@dataclass
class Child:
    """A program under way. `complaints` are the last lines of its standard error."""

    process: asyncio.subprocess.Process
    complaints: list[str] = field(default_factory=list)
    _listening: "asyncio.Task[None] | None" = None

    @property
    def stdout(self) -> asyncio.StreamReader:
        """What it says."""
        assert self.process.stdout is not None  # noqa: S101
        return self.process.stdout

    async def ended(self) -> int:
        """Waits for its end and returns its exit status."""
        status = await self.process.wait()
        if self._listening is not None:
            await self._listening
        return status

    async def _listen(self) -> None:
        assert self.process.stderr is not None  # noqa: S101
        async for line in self.process.stderr:
            self.complaints.append(line.decode(errors="replace").strip())
            del self.complaints[:-_KEPT_COMPLAINTS]


@contextlib.asynccontextmanager
async def child(
    *command: str | Path, environment: Mapping[str, str], directory: Path | None = None, stdin: int | None = None, stdout: int | None = None
) -> AsyncIterator[Child]:
    """Runs a program while it is entered; on leaving, one that still runs is interrupted. `stdout` is a pipe unless it is given.

    Raises `CommandFailed` when there is no such program.
    """
    if shutil.which(command[0]) is None:
        raise CommandFailed(f"{command[0]} is not installed")
    # Tied to the thread that starts it, which is the main one. SIGINT has restic remove its lock.
    process = await asyncio.create_subprocess_exec(
        "setpriv",
        "--pdeathsig",
        "INT",
        *map(str, command),
        env=dict(environment),
        cwd=directory,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
        stdout=asyncio.subprocess.PIPE if stdout is None else stdout,
        stderr=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE_BYTES,
    )
    running = Child(process)
    running._listening = asyncio.create_task(running._listen())
    try:
        yield running
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), _TO_END_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        await running._listening


class Pipe:
    """Two descriptors. Either end closes once, however often it is told to: its number may soon be another file's."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()

    def close_read(self) -> None:
        """Whoever writes is told."""
        if self.read >= 0:
            os.close(self.read)
        self.read = -1

    def close_write(self) -> None:
        """Whoever reads comes to the end, if nobody else has this end open."""
        if self.write >= 0:
            os.close(self.write)
        self.write = -1

    def drain(self) -> None:
        """Reads to the end. Blocks."""
        while os.read(self.read, _LONGEST_LINE_BYTES):
            pass

    def say(self, text: str) -> None:
        """Writes all of it. Raises `BrokenPipeError`."""
        data = text.encode()
        while data:
            data = data[os.write(self.write, data) :]


@contextlib.contextmanager
def pipe() -> Iterator[Pipe]:
    """Closed on leaving."""
    both = Pipe()
    try:
        yield both
    finally:
        both.close_read()
        both.close_write()
