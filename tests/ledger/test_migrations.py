"""The migration runner: each file once, in order, all of it or nothing, never an edited one, however many start at once."""

import asyncio
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import asyncpg
import pytest

from server.ledger import Database, MigrationError, migrate, pending
from server.ledger.migrations import MIGRATIONS
from server.settings import Settings
from tests.ledger.races import waiting_for_lock

pytestmark = pytest.mark.anyio

ALL = sorted(path.stem for path in MIGRATIONS.glob("*.sql"))

MIGRATE = """
import asyncio, sys
from pathlib import Path
from server.ledger import migrate
asyncio.run(migrate(sys.argv[1], Path(sys.argv[2])))
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory of migrations to add to and to edit."""
    return Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))


async def test_twenty_starters_apply_each_file_once(empty_database_url: str) -> None:
    applied = await asyncio.gather(*(migrate(empty_database_url) for _ in range(20)))
    assert Counter(map(tuple, applied)) == {tuple(ALL): 1, (): 19}


async def test_pending_is_what_migrate_would_apply(empty_database_url: str, directory: Path) -> None:
    db = Database(Settings(database_url=empty_database_url))
    await db.open()
    try:
        assert await pending(db) == ALL
        await migrate(empty_database_url)
        assert await pending(db) == []
        (directory / "0900_create_more.sql").write_text("create table more ();")
        assert await pending(db, directory) == ["0900_create_more"]
        assert await migrate(empty_database_url, directory) == ["0900_create_more"]
        assert await pending(db) == []  # the database is ahead of these files: a newer release is being rolled out
    finally:
        await db.close()


async def test_an_edited_file_is_refused(database_url: str, directory: Path) -> None:
    with (directory / f"{ALL[0]}.sql").open("a") as file:
        file.write("-- a change")
    with pytest.raises(MigrationError, match=ALL[0]):
        await migrate(database_url, directory)


async def test_a_failing_file_leaves_nothing_and_stops_the_rest(database_url: str, directory: Path) -> None:
    (directory / "0900_fail.sql").write_text("create table half (); select 1 / 0;")
    (directory / "0901_more.sql").write_text("create table more ();")
    with pytest.raises(MigrationError, match="0900_fail failed"):
        await migrate(database_url, directory)
    assert await tables(database_url, "half", "more") == []


async def test_a_kill_in_mid_file_leaves_nothing(database_url: str, directory: Path) -> None:
    """The file waits for a lock that we hold, half-way; there its process is killed. Another starter then applies it."""
    (directory / "0900_wait.sql").write_text(
        "create table half (); lock table events in access exclusive mode; create table other_half ();"
    )
    gate = await asyncpg.connect(database_url)
    try:
        transaction = gate.transaction()
        await transaction.start()
        await gate.execute("lock table events in access share mode")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", MIGRATE, database_url, str(directory))
        await waiting_for_lock(gate)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await transaction.rollback()
        assert await migrate(database_url, directory) == ["0900_wait"]  # after PostgreSQL has undone the first half
        assert await tables(database_url, "half", "other_half") == ["half", "other_half"]
    finally:
        await gate.close()


async def test_a_file_that_must_wait_gives_up_and_lets_others_pass(database_url: str, directory: Path) -> None:
    (directory / "0900_wait.sql").write_text("set local lock_timeout = '50ms'; lock table events;")
    (directory / "0901_show.sql").write_text(
        "create table shown as select current_setting('lock_timeout') l, current_setting('statement_timeout') s;"
    )
    gate = await asyncpg.connect(database_url)
    try:
        async with gate.transaction():
            await gate.execute("lock table events in access share mode")
            with pytest.raises(MigrationError, match="lock timeout"):
                await migrate(database_url, directory)
        assert await migrate(database_url, directory) == ["0900_wait", "0901_show"]
        assert tuple((await gate.fetch("select l, s from shown"))[0]) == ("4s", "5s")
    finally:
        await gate.close()


async def tables(database_url: str, *names: str) -> list[str]:
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch("select relname::text from pg_class where relkind = 'r' and relname = any ($1) order by 1", names)
        return [row["relname"] for row in rows]
    finally:
        await connection.close()
