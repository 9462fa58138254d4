"""Ends a process at any step of an upload: before or after any statement that changes rows, and any call that changes the volume."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from server.intake import Housekeeping, Intake, ResumableUploads
from server.ledger import Database, Notices, list_volumes
from server.settings import Settings
from server.vault import Vault

_CALLS = ("fdatasync", "fsync", "link", "unlink", "rename", "ftruncate", "writev", "mkdir", "copy_file_range")


Tell = Callable[[object], None]


class Service:
    """All of a server that uploads need, without HTTP."""

    def __init__(self, settings: Settings, db: Database, vault: Vault, notices: Notices) -> None:
        self.db = db
        self.vault = vault
        self.intake = Intake(settings, db, vault)
        self.uploads = ResumableUploads(self.intake, notices, asyncio.Event())
        self.housekeeping = Housekeeping(settings, db, vault, self.intake)


Work = Callable[[Service, Tell], Awaitable[None]]


@asynccontextmanager
async def serving(database_url: str) -> AsyncIterator[Service]:
    settings = Settings(database_url=database_url, volume_reserve_bytes=0, tus_sync_bytes=2**20, leftover_age_seconds=60)
    db, vault, notices = Database(settings), Vault(0), Notices(settings)
    await db.open()
    try:
        await vault.refresh(await list_volumes(db))
        yield Service(settings, db, vault, notices)
    finally:
        await notices.close()
        vault.close()
        await db.close()


def run_until(
    database_url: str, work: Callable[[Service, Callable[[object], None]], Awaitable[None]], step: int | None
) -> tuple[bool, list[str]]:
    """Does the work in a process of its own, which is killed at the step of that number.

    `work` is given a function for what its client is told. Returns whether it came to its end, and what was told. AssertionError when it
    failed by itself.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            asyncio.run(_work(database_url, work, step, writing))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as told:
        lines = told.read().splitlines()
    _, status = os.waitpid(child, 0)
    is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert is_killed or status == 0, f"the work failed by itself; it told {lines}"
    return not is_killed, lines


async def _work(database_url: str, work: Any, step: int | None, told: int) -> None:
    async with serving(database_url) as service:
        if step is not None:
            _Steps(step).watch()
        await work(service, lambda what: os.write(told, f"{what}\n".encode()))


class _Steps:
    """Counts: an even step is before a call, and the odd one after it."""

    def __init__(self, fatal: int) -> None:
        self._fatal = fatal
        self._count = 0

    def watch(self) -> None:
        """Only in a process that may be killed."""
        for name in _CALLS:
            setattr(os, name, self._around(getattr(os, name)))
        fetch = asyncpg.Connection.fetch

        async def counted(connection: Any, query: str, *args: Any, **named: Any) -> Any:
            self._step()
            rows = await fetch(connection, query, *args, **named)
            self._step()
            return rows

        setattr(asyncpg.Connection, "fetch", counted)  # noqa: B010 - it is a method

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self._step()
            result = call(*args, **named)
            self._step()
            return result

        return counted

    def _step(self) -> None:
        self._count += 1
        if self._count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
