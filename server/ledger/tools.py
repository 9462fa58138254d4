"""Locks of operational tools: of each kind one is at work on a database, on whatever machine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from server.errors import DatabaseUnavailable
from server.ledger.database import CONNECT_SECONDS, LONG_PATIENCE_SECONDS
from server.settings import Settings

_FAMILY = 0x636F6666
"""`coff` in ASCII: the first half of the keys of these advisory locks. Other programs on the same database must not use it."""

_LOST = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class ToolIsRunning(Exception):
    """Another process holds the lock."""


class ToolLock:
    """Held for as long as its connection lives: a process that dies, or that the network loses, holds it no more."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection

    async def check(self) -> None:
        """Raises `DatabaseUnavailable` when the lock has been lost: somebody else may be at work.

        Call it before changing anything.
        """
        try:
            await self._connection.execute("select 1", timeout=LONG_PATIENCE_SECONDS)
        except _LOST as problem:
            raise DatabaseUnavailable from problem


@asynccontextmanager
async def tool_lock(settings: Settings, tool: str) -> AsyncIterator[ToolLock]:
    """Within it this process alone is the tool of that name. Raises `ToolIsRunning` at once when another is, and `DatabaseUnavailable`."""
    try:
        connection = await asyncpg.connect(
            settings.database_url, timeout=CONNECT_SECONDS, server_settings={"application_name": f"coffer {tool}"}
        )
    except _LOST as problem:
        raise DatabaseUnavailable from problem
    try:
        try:
            is_ours = await connection.fetchval("select pg_try_advisory_lock($1::integer, hashtext($2))", _FAMILY, tool)
        except _LOST as problem:
            raise DatabaseUnavailable from problem
        if not is_ours:
            raise ToolIsRunning
        try:
            yield ToolLock(connection)
        finally:
            with suppress(*_LOST):  # the server ends the session some time later, and the next command must not find the lock held
                await connection.execute("select pg_advisory_unlock_all()", timeout=CONNECT_SECONDS)
    finally:
        connection.terminate()
