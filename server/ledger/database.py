"""The connection pool, and what PostgreSQL's failures mean to the rest of the house.

Every statement runs alone, in its own transaction: a write is one round trip, and either happened or did not.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from server.errors import (
    CofferError,
    CommitUnknown,
    Conflict,
    DatabaseUnavailable,
    IdempotencyInProgress,
    InvalidRequest,
    LegalHold,
    NotFound,
    QuotaExceeded,
    TooManyUploads,
    UploadsStopped,
    UserErasing,
    VolumeUnavailable,
)
from server.settings import Settings

Row = asyncpg.Record

CONNECT_SECONDS = 2.0
"""How long a call waits for a connection: it must be answered within 3 s when the database is gone."""
PATIENCE_SECONDS = 2.8
"""How long a call waits in all, for what a request does."""
COMMIT_PATIENCE_SECONDS = 30.0
"""The same for what commits an upload: on a busy disk a commit takes seconds, and giving up on it leaves its outcome unknown."""
LONG_PATIENCE_SECONDS = 60.0
"""The same for what touches up to thousands of rows."""
QUEUE_CONNECTIONS = 4
"""How many connections a worker keeps at most for each of its two queues, beside those of its pool."""
TRIES = 3
"""How often a statement is tried that PostgreSQL undid because of a deadlock, a lost race or an error of its own."""

SESSION = {
    "application_name": "coffer",
    # Whoever waits longer for a lock is told that nothing happened, instead of leaving a statement behind that happens later.
    "lock_timeout": "2s",
    # Every statement of ours reads an index range in its order. These make PostgreSQL keep the one plan that says so, whatever it believes
    # about a table that was small a moment ago or about an average user; tests/ledger/test_listing.py guards that plan.
    # What is not written for them goes wrong: `$1 is null or id > $1` is no condition on an index, and a join in the order of ids reads a
    # whole index rather than sort some rows (`id = any (...)` does not). tests/ledger/test_audit_plans.py looks for both.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
    # The settings above make estimated costs huge, which would have every plan compiled.
    "jit": "off",
}

_CONSTRAINTS: dict[str, Callable[[], CofferError]] = {
    "user_files_pkey": Conflict,
    "user_files_idempotency_key": Conflict,
    "user_files_owner": NotFound,
    "uploads_pkey": Conflict,
    "uploads_idempotency_key": IdempotencyInProgress,
    "uploads_owner": NotFound,
    "volumes_reserved_for": Conflict,
    # Retired since whoever wrote looked; or, for whoever retires it, in use.
    "user_storage_volume": VolumeUnavailable,
    "user_files_volume": VolumeUnavailable,
    "uploads_volume": VolumeUnavailable,
    "generation_jobs_owner": NotFound,
    "generated_media_primary": Conflict,
}

_LOST = ("08", "57P01", "57P02", "57P03")
"""The connection ended, so the answer to a write is lost."""
_REFUSED = ("25006", "53", "55P03", "57014", "58")
"""Read-only, out of some resource, waited too long for a lock, cancelled, I/O error: the statement did not happen."""
_RACES = ("40001", "40P01")
_INTERNAL = "XX000"
_INTERNAL_PAUSE_SECONDS = 0.1
"""Before a statement is tried again that an internal error of PostgreSQL undid. One is known to pass (PostgreSQL 18): "new multixact has
more than one updating member". Where one transaction has changed a user's row and is refused, and the next one has locked that row for its
foreign key, the second meets it in the moment in which the first is known to have failed and not yet known to have ended. On a busy machine
this may be some time slices: once in some ten thousand uploads that are begun, and refused, side by side.
"""


def connections_wanted(settings: Settings) -> int:
    """How many connections the servers of a machine and its worker open at most: a server those of its pool and one for notices."""
    return (settings.processes + 1) * settings.database_connections + settings.processes + 2 * QUEUE_CONNECTIONS


class _Connection(asyncpg.Connection):
    def get_reset_query(self) -> str:
        # We leave nothing behind in a session that needs resetting, and the reset costs as much as a lookup.
        return ""


class Database:
    """PostgreSQL, as this process reaches it. Opening never fails because PostgreSQL is down, and a restart of it heals by itself."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool: asyncpg.Pool[Row] | None = None

    async def open(self) -> None:
        """Prepares the pool; the first statement connects."""
        self._pool = await asyncpg.create_pool(
            self._settings.database_url,
            min_size=0,
            max_size=self._settings.database_connections,
            connection_class=_Connection,
            timeout=CONNECT_SECONDS,
            statement_cache_size=256,
            max_cached_statement_lifetime=0,
            server_settings=SESSION,
        )

    async def close(self) -> None:
        """Waits a moment for statements under way, then closes every connection."""
        if self._pool is not None:
            try:
                await asyncio.wait_for(self._pool.close(), PATIENCE_SECONDS)
            except TimeoutError:
                self._pool.terminate()
            self._pool = None

    async def check(self) -> None:
        """One cheap round trip. Raises `DatabaseUnavailable`."""
        await self.read("select 1")

    async def read(self, sql: str, *args: Any, patience: float = PATIENCE_SECONDS) -> list[Row]:
        """Runs a statement that changes nothing. Raises `DatabaseUnavailable`; a lost connection is tried once more."""
        return await self._run(sql, args, writes=False, patience=patience)

    async def write(self, sql: str, *args: Any, patience: float = PATIENCE_SECONDS) -> list[Row]:
        """Runs a statement that changes rows and commits.

        Raises the domain error that a trigger or a constraint stands for, `DatabaseUnavailable` when nothing happened,
        and `CommitUnknown` when the connection was lost, or `patience` (seconds) ran out, after the statement was sent.
        """
        return await self._run(sql, args, writes=True, patience=patience)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Callable[..., Awaitable[list[Row]]]]:
        """Statements in one transaction, for the rare case where a lock must outlast one. Gives the function that runs them.

        Commits at the end of the block, rolls back when it raises. Raises as `write`; nothing is tried again.
        """
        connection = await self._acquire()
        try:
            async with connection.transaction():

                async def run(sql: str, *args: Any) -> list[Row]:
                    return await connection.fetch(sql, *args, timeout=LONG_PATIENCE_SECONDS)

                yield run
        except asyncpg.PostgresError as problem:
            meaning = _meaning(problem, problem.sqlstate or "")
            if meaning is None:
                raise
            raise meaning from problem
        except (TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError, ConnectionError) as problem:
            await self._discard(connection)
            raise CommitUnknown from problem
        finally:
            await self._release(connection)

    async def _run(self, sql: str, args: tuple[Any, ...], *, writes: bool, patience: float) -> list[Row]:
        clock = asyncio.get_running_loop().time
        deadline = clock() + patience
        tries = 0
        while True:
            tries += 1
            connection = await self._acquire()
            try:
                return await connection.fetch(sql, *args, timeout=max(0.1, deadline - clock()))
            except asyncpg.PostgresError as problem:
                state = problem.sqlstate or ""
                if state in (*_RACES, _INTERNAL) and tries < TRIES:
                    if state == _INTERNAL:
                        await asyncio.sleep(_INTERNAL_PAUSE_SECONDS)
                    continue
                if state.startswith(_LOST):
                    await self._discard(connection)
                    if writes:
                        raise CommitUnknown from problem
                    if tries == 1:
                        continue
                meaning = _meaning(problem, state)
                if meaning is None:
                    raise
                raise meaning from problem
            except (TimeoutError, OSError) as problem:
                # Do not wait for the cancellation of a statement that a frozen server may never answer.
                await self._discard(connection)
                raise (CommitUnknown if writes else DatabaseUnavailable) from problem
            except (asyncpg.InterfaceError, asyncpg.InternalClientError) as problem:
                if isinstance(problem, ValueError):
                    raise unstorable() from problem
                # asyncpg found, before it sent anything, that the connection is closed or about to be (it had read PostgreSQL's farewell).
                await self._discard(connection)
                if tries == TRIES:
                    raise DatabaseUnavailable from problem
            finally:
                await self._release(connection)

    async def _acquire(self) -> "asyncpg.pool.PoolConnectionProxy[Row]":
        if self._pool is None:
            raise DatabaseUnavailable
        try:
            return await self._pool.acquire(timeout=CONNECT_SECONDS)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as problem:
            raise DatabaseUnavailable from problem

    async def _discard(self, connection: "asyncpg.pool.PoolConnectionProxy[Row]") -> None:
        """Closes a lost connection, and has the pool look afresh at the others: they were probably lost with it."""
        with suppress(asyncpg.InterfaceError):  # the pool has let go of it already
            connection.terminate()
        if self._pool is not None:
            await self._pool.expire_connections()

    async def _release(self, connection: "asyncpg.pool.PoolConnectionProxy[Row]") -> None:
        """Gives a connection back, or ends it. However that goes, the statement's outcome stands: an error here must not stand for it.

        asyncpg closes an expired connection by asking the server, and on a machine that is busy raises that it took too long. Once that
        hid a commit, the upload was published again, that failed, and the bytes of a row were removed.
        """
        if self._pool is not None:
            try:
                await self._pool.release(connection)
            except Exception:  # noqa: BLE001 - whatever it is
                with suppress(asyncpg.InterfaceError):  # the pool has let go of it already
                    connection.terminate()


def _meaning(problem: asyncpg.PostgresError, state: str) -> CofferError | None:
    """The domain error for PostgreSQL's, or None for a defect of ours."""
    if state == "CF001":
        return QuotaExceeded(**json.loads(problem.detail or "{}"))
    if state == "CF003":
        return UserErasing()
    if state == "CF010":
        return LegalHold()
    if state == "CF005":
        return TooManyUploads(int(problem.detail or 0))
    if state == "CF017":
        return UploadsStopped()
    if state.startswith((*_LOST, *_REFUSED)) or state in _RACES:
        return DatabaseUnavailable()
    if state.startswith("22"):
        return unstorable()
    constraint = _CONSTRAINTS.get(getattr(problem, "constraint_name", None) or "")
    return constraint() if constraint else None


def unstorable() -> InvalidRequest:
    """For text and numbers that PostgreSQL has no place for."""
    return InvalidRequest(field="text", reason="a value is too long, too large or holds characters that cannot be stored")
