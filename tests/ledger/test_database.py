"""What PostgreSQL's failures become: nothing happened, or nobody knows; and how the pool heals."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import pytest

from server import ledger
from server.errors import CommitUnknown, DatabaseUnavailable, InvalidRequest, NotFound
from server.ledger import Database, database
from server.settings import Settings
from tests.ledger.races import waiting_for_lock
from tests.quota.rows import Connection, add_user, add_volume, insert_file, new_file
from tests.waiting import eventually

pytestmark = pytest.mark.anyio

CUT_OTHERS = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = 'coffer'"


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Connection]:
    """A plain connection; Ada has room."""
    connection = await asyncpg.connect(database_url)
    await add_volume(connection)
    await add_user(connection, "ada", None)
    yield connection
    await connection.close()


async def nobody_left(sql: Connection) -> None:
    """Waits until PostgreSQL has ended the sessions that it was told to end."""
    left = "select count(*) from pg_stat_activity where application_name = 'coffer'"
    await eventually(lambda: sql.fetchval(left), lambda count: count == 0)


class Gate:
    """A way to PostgreSQL that can be closed: bytes then go nowhere, as with a frozen server or a broken network."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    await self.open.wait()
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def to(self, url: str) -> AsyncIterator[str]:
        target = urlsplit(url)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(target.hostname, target.port)
            self._tasks |= {asyncio.create_task(self._pass(reader, far_writer)), asyncio.create_task(self._pass(far_reader, writer))}

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield urlunsplit(target._replace(netloc=f"{target.username}:{target.password or ''}@127.0.0.1:{port}"))
        finally:
            self.open.set()
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_opening_never_fails_and_calls_fail_fast_when_there_is_no_database() -> None:
    db = Database(Settings(database_url="postgresql://nobody@127.0.0.1:1/nothing"))
    await db.open()
    try:
        began = time.monotonic()
        file = new_file("ada", 1)
        for call in (db.check(), db.write("select 1"), ledger.publish_file(db, file), ledger.Publisher(db).publish(file)):
            with pytest.raises(DatabaseUnavailable):
                await call
        assert time.monotonic() - began < 3
    finally:
        await db.close()


async def test_cut_connections_are_replaced_unnoticed(db: Database, sql: Connection) -> None:
    for _ in range(3):
        await asyncio.gather(*(db.check() for _ in range(10)))
        await sql.execute(CUT_OTHERS)
        await asyncio.gather(*(db.check() for _ in range(10)))
        await sql.execute(CUT_OTHERS)
        await nobody_left(sql)
        await ledger.publish_file(db, new_file("ada", 1))
    assert (await ledger.get_user(db, "ada")).file_count == 3


async def test_a_write_that_lost_its_connection_is_unknown(db: Database, sql: Connection) -> None:
    """Cut while it waits, so here nothing happened; but it looks the same to us as a cut just after the commit."""
    file = await insert_file(sql, "ada", 10)
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("delete from user_files where id = $1", file)
    writing = asyncio.ensure_future(ledger.set_favorite(db, "ada", file, True))
    await waiting_for_lock(sql)
    await sql.execute(CUT_OTHERS)
    with pytest.raises(CommitUnknown):
        await writing
    await transaction.rollback()
    assert not (await ledger.get_file(db, "ada", file)).is_favorite


async def test_a_read_that_lost_its_connection_is_read_again(db: Database, sql: Connection) -> None:
    await sql.execute("select pg_advisory_lock(1)")
    reading = asyncio.ensure_future(db.read("select pg_advisory_xact_lock(1), 'read' as done"))
    await waiting_for_lock(sql)
    await sql.execute(CUT_OTHERS)
    await waiting_for_lock(sql)
    await sql.execute("select pg_advisory_unlock(1)")
    assert (await reading)[0]["done"] == "read"


@pytest.mark.parametrize("writes", [False, True])
async def test_a_frozen_database_is_given_up_and_found_again(
    sql: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    for name in ("CONNECT_SECONDS", "PATIENCE_SECONDS", "COMMIT_PATIENCE_SECONDS"):
        monkeypatch.setattr(database, name, 1.5)
    monkeypatch.setattr("server.ledger.files.COMMIT_PATIENCE_SECONDS", 1.5)
    gate = Gate()
    async with gate.to(database_url) as url:
        db = Database(Settings(database_url=url, database_connections=2))
        await db.open()

        async def call() -> object:
            return await (ledger.publish_file(db, new_file("ada", 1)) if writes else ledger.get_user(db, "ada"))

        try:
            await call()
            gate.open.clear()
            with pytest.raises(CommitUnknown if writes else DatabaseUnavailable):
                await call()
            for _ in range(3):  # not even connecting works, and no connection leaks from the pool of two
                with pytest.raises(DatabaseUnavailable):
                    await call()
            gate.open.set()
            await call()
        finally:
            gate.open.set()
            await db.close()


async def test_a_deadlock_is_tried_again(db: Database, sql: Connection) -> None:
    """Ours is the one that PostgreSQL ends: the other looks for deadlocks only after longer than the test takes."""
    one, two = await insert_file(sql, "ada", 1), await insert_file(sql, "ada", 1)
    cross = """
        with first as (update user_files set width = 1 where id = $1 returning 1)
        update user_files set width = 1 where id = $2 and (select count(*) from first) = 1 returning id
    """
    await sql.execute("set deadlock_timeout = '100s'")
    async with sql.transaction():
        await sql.execute("update user_files set height = 1 where id = $1", two)
        crossing = asyncio.ensure_future(db.write(cross, one, two))
        await waiting_for_lock(sql)
        await sql.execute("update user_files set height = 1 where id = $1", one)  # waits until ours is ended
    assert await crossing
    assert await sql.fetchval("select min(width + height) from user_files") == 2


async def test_an_internal_error_of_postgresql_is_tried_again_and_told_when_it_stays(db: Database, sql: Connection) -> None:
    await sql.execute("""
        create sequence tries;
        create function stumble(times bigint) returns bigint language plpgsql as $$
        declare try bigint := nextval('tries');  -- which no rollback takes back
        begin
            if try <= times then
                raise exception 'new multixact has more than one updating member' using errcode = 'internal_error';
            end if;
            return try;
        end $$
    """)
    assert (await db.write("select stumble(2)"))[0]["stumble"] == 3
    await sql.execute("alter sequence tries restart")
    with pytest.raises(asyncpg.InternalServerError):
        await db.write("select stumble(100)")
    assert await sql.fetchval("select last_value from tries") == database.TRIES


async def test_who_waits_too_long_for_a_lock_has_not_written(sql: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(database.SESSION, "lock_timeout", "50ms")
    db = Database(settings)
    await db.open()
    try:
        async with sql.transaction():
            await sql.execute("update user_storage set tier = 'held'")
            with pytest.raises(DatabaseUnavailable):
                await ledger.publish_file(db, new_file("ada", 1))
        await ledger.publish_file(db, new_file("ada", 1))
        assert (await ledger.get_user(db, "ada")).file_count == 1
    finally:
        await db.close()


async def test_a_read_only_database_reads_and_refuses_to_write(db: Database, sql: Connection, database_url: str) -> None:
    await sql.execute(f"alter database {urlsplit(database_url).path[1:]} set default_transaction_read_only = on")
    assert (await ledger.get_user(db, "ada")).user_id == "ada"
    with pytest.raises(DatabaseUnavailable):
        await ledger.publish_file(db, new_file("ada", 1))


async def test_a_cancelled_call_gives_its_connection_back(sql: Connection, settings: Settings) -> None:
    db = Database(Settings(database_url=settings.database_url, database_connections=2))
    await db.open()
    try:
        async with sql.transaction():
            await sql.execute("update user_storage set tier = 'held'")
            for _ in range(4):
                call = asyncio.ensure_future(ledger.publish_file(db, new_file("ada", 1)))
                await waiting_for_lock(sql)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
        await asyncio.gather(db.check(), db.check())
        assert (await ledger.get_user(db, "ada")).file_count == 0
    finally:
        await db.close()


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "x" * 501])
async def test_text_that_cannot_be_stored_is_the_callers_fault(db: Database, sql: Connection, text: str) -> None:
    with pytest.raises(InvalidRequest):
        await ledger.publish_file(db, new_file("ada", 1, file_name=text))
    if len(text) < 500:
        with pytest.raises(InvalidRequest):
            await ledger.publish_file(db, new_file("ada", 1, metadata={"key": text}))
        with pytest.raises((InvalidRequest, NotFound)):
            await ledger.get_user(db, text)


async def test_what_is_stored_comes_back_as_it_was(db: Database, sql: Connection) -> None:
    metadata = {"big": 2**60, "real": 0.1, "deep": {"list": [1, None, True, "é\\u0041\U0001f3d6"]}, "": ""}
    new = new_file("ada", 2**40, file_name="\\ \"'%;é\U0001f3d6", metadata=metadata, tags=["", "é", "{,}"], package_name="")
    file = await ledger.publish_file(db, new)
    assert (file.file_name, file.metadata, file.tags, file.package_name, file.file_size) == (
        new.file_name,
        metadata,
        ["", "é", "{,}"],
        "",
        2**40,
    )
    assert await ledger.get_file(db, "ada", file.id) == file
    changed = await ledger.update_file(db, "ada", file.id, package_name=None)
    assert (changed.package_name, changed.file_name, changed.metadata) == (None, file.file_name, metadata)
    with pytest.raises(NotFound):
        await ledger.get_file(db, "bob", file.id)
    with pytest.raises(NotFound):
        await ledger.set_tags(db, "ada", UUID(int=0), [])


async def test_a_connection_that_cannot_be_given_back_does_not_hide_what_was_committed(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(connection: object) -> None:
        raise TimeoutError

    assert db._pool is not None
    with monkeypatch.context() as patched:
        patched.setattr(type(db._pool), "release", lambda self, connection, timeout=None: fail(connection))
        assert (await db.write("select 7 as number"))[0]["number"] == 7
    await db.check()
