"""A dump out of the repository into an empty database, in one transaction with what makes of it a restored store."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress

from ops import postgres_tools
from ops.children import Pipe, child, pipe
from ops.restic import Repository
from ops.sets import DUMP
from server.commands.failures import CommandFailed

Source = AbstractAsyncContextManager[tuple[Pipe, Callable[[], Awaitable[None]]]]
"""Within it, a pipe gives a dump. The function waits for its end, and raises `CommandFailed` unless it came whole."""


@asynccontextmanager
async def dump_in(repository: Repository, snapshot_id: str) -> AsyncIterator[tuple[Pipe, Callable[[], Awaitable[None]]]]:
    """The dump of a repository's snapshot."""
    async with repository.piped(snapshot_id, f"/{DUMP}") as (stream, running):
        yield stream, lambda: repository.check(running)


async def load_dump(source: Source, database_url: str, server_version: int, then: str = "") -> None:
    """Restores a dump and runs `then`, SQL of our own. All or nothing: what breaks off leaves the database empty.

    `server_version` is that of the younger of the two servers. Raises `CommandFailed`.
    """
    pg_restore = await postgres_tools.program("pg_restore", server_version)
    psql = pg_restore.with_name("psql")
    url, environment = postgres_tools.connection(database_url)
    options_of_psql = ("-X", "-q", "-o", os.devnull, "-v", "ON_ERROR_STOP=1", f"--dbname={url}")
    async with AsyncExitStack() as stack:
        script = stack.enter_context(pipe())
        loading = await stack.enter_async_context(child(psql, *options_of_psql, environment=environment, stdin=script.read))
        script.close_read()
        script.say("begin;\n")
        dump, check = await stack.enter_async_context(source)
        options = ("--no-owner", "--no-privileges", "--file=-")
        restoring = await stack.enter_async_context(
            child(pg_restore, *options, environment=environment, stdin=dump.read, stdout=script.write)
        )
        problems = []
        if await restoring.ended() == 0:
            await asyncio.to_thread(dump.drain)  # it does not read what it does not need, and whoever writes would wait for ever
        else:
            dump.close_read()  # whoever still writes it ends now
            problems.append(f"pg_restore: {' '.join(restoring.complaints[-2:])}")
        try:
            await check()
        except CommandFailed as problem:  # then that is why
            problems.insert(0, str(problem))
        if not problems:
            # Without this, psql's end of file is the end of its session, and of the transaction.
            with suppress(BrokenPipeError):
                script.say(f"\nset search_path = public;\n{then}\ncommit;\n")
        script.close_write()
        if await loading.ended() != 0:
            problems.insert(0, f"psql: {' '.join(loading.complaints[-2:])}")
        if problems:
            raise CommandFailed(f"the dump could not be restored: {problems[0]}")
