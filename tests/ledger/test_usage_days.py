"""A page of usage reads what it needs and no more, and none is written of a user who has been erased."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import date
from typing import Any

import asyncpg
import pytest

from server import ledger
from server.ledger import Database, usage_days
from server.ledger.database import SESSION
from server.ledger.statements import statement
from tests.ledger.races import waiting_for_lock
from tests.ledger.test_audit_plans import generic_plan

pytestmark = pytest.mark.anyio

DAY = date(2026, 3, 1)
USERS, DAYS, CHANGES = 50, 100, 3
IDLE = f"""
with idle as (insert into user_storage (user_id) values ('idle') returning user_id)
insert into usage_ledger (user_id, changed_at, delta_bytes, total_bytes)
select user_id, timestamptz '2026-01-31 00:00Z', 1, number from generate_series(1, {DAYS}) number cross join idle
"""
FILL = f"""
with users as (insert into user_storage (user_id) select 'user ' || n from generate_series(1, {USERS}) n returning user_id)
insert into usage_ledger (user_id, changed_at, delta_bytes, total_bytes)
select user_id, timestamptz '2026-02-01 00:00Z' + interval '1 day' * (number / {CHANGES}.0), 1, number
  from generate_series(1, {DAYS * CHANGES}) number cross join users order by number
"""
_PLANS = {
    "sum_usage_day": (DAY, 4_201, "user 1", 5_000),
    "first_change_of": (4_000, DAY),
    "page_of_usage": ("user 1", 5_000, DAY, DAY),
    "usage_of_user": ("user 1", DAY, DAY),
    "erase_usage_days": ("user 1", 5_000),
}


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """As a tool's, to a history of a hundred days, of which it knows, and two of which are summed. One more user stopped before."""
    connection = await asyncpg.connect(database_url, server_settings=SESSION)
    await connection.execute(IDLE)
    await connection.execute(FILL)
    first_id = await connection.fetchval(statement("first_change_of"), 0, DAY)
    await connection.execute(f"insert into usage_summed values ('{DAY}', {first_id}, now()), ('{DAY}'::date + 1, {first_id}, now())")
    await connection.execute("vacuum analyze")
    yield connection
    await connection.close()


@pytest.mark.parametrize("name", _PLANS)
async def test_nothing_is_read_from_its_beginning(connection: asyncpg.Connection, name: str) -> None:
    lines = (await generic_plan(connection, statement(name, sums=usage_days._SUMS), _PLANS[name])).splitlines()
    scans = [number for number, line in enumerate(lines) if re.search(r"Scan .*on (usage_ledger|usage_days)\b", line)]
    assert scans and all("Index" in lines[number] and "Index Cond:" in lines[number + 1] for number in scans), "\n".join(lines)
    if name == "sum_usage_day":
        bounds = [lines[number + 1] for number in scans if "usage_ledger_by_user" in lines[number]]
        assert len(bounds) == 4 and all(re.search(r"ROW\(.*user_id.*id\) [<>]|\(id <", each) for each in bounds), "\n".join(lines)


async def read(connection: asyncpg.Connection, name: str, *arguments: Any) -> tuple[asyncpg.Record, int]:
    """What a statement answers, and how many rows of the history it reads for that."""
    counted = "select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = 'usage_ledger'"
    before = await connection.fetchval(counted)
    (row,) = await connection.fetch(statement(name), *arguments)
    return row, await connection.fetchval(counted) - before


async def test_of_each_user_the_day_is_read_and_one_change_before_and_after(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        row, count = await read(connection, "first_day_to_sum")
        assert (row["day"], count) == (DAY, 0)
        first_id = row["first_id"]
        row, count = await read(connection, "sum_usage_day", DAY, first_id, "idle", USERS)
        assert (row["users"], row["used"]) == (USERS, USERS)
        # Its first change; from there to the one after the day; the one before it; and all of it.
        assert count == USERS * (1 + (CHANGES + 1) + 1 + CHANGES)
        row, count = await read(connection, "sum_usage_day", DAY, first_id, "", 1)
        assert (row["last"], row["used"], count) == ("idle", 1, 1)


async def test_the_next_day_is_found_from_this_one(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        first_id = await connection.fetchval("select first_id from usage_summed where day = $1", DAY)
        row, count = await read(connection, "first_change_of", first_id, date(2026, 3, 2))
        assert (row["id"], count) == (first_id + USERS * CHANGES, USERS * CHANGES + 1)
        row, _ = await read(connection, "first_change_of", row["id"], date(2027, 1, 1))
        assert row["id"] == first_id + USERS * CHANGES  # there is none


# Erasing, beside a sum


async def test_an_erasure_waits_for_a_page_that_has_not_seen_it(db: Database, connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await connection.execute(statement("begin_usage_page"), usage_days._PAGES_LOCK)
        await connection.execute(statement("sum_usage_day"), DAY, 0, "", USERS + 1)
        await ledger.begin_erasing(db, "user 1")
        observer = await asyncpg.connect(db._settings.database_url)
        erasing = asyncio.create_task(ledger.finish_erasing(db, "user 1", _nothing))
        await waiting_for_lock(observer)
        await observer.close()
    await erasing
    left = await db.read("select distinct user_id from usage_days union select user_id from user_storage")
    assert len(left) == USERS and "user 1" not in {row["user_id"] for row in left}


async def _nothing() -> None:
    pass


async def test_a_page_that_waited_leaves_out_who_is_being_erased(db: Database, connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await connection.execute(statement("await_usage_pages"), usage_days._PAGES_LOCK)
        summing = asyncio.create_task(usage_days.sum_day(db, DAY, 0, None, USERS + 1))
        observer = await asyncpg.connect(db._settings.database_url)
        await waiting_for_lock(observer)
        await observer.close()
        await ledger.begin_erasing(db, "user 1")
    page = await summing
    assert (page.users, page.used) == (USERS, USERS)  # one of them is idle
    assert not await db.read("select from usage_days where user_id = 'user 1'")


async def test_a_page_waits_for_no_upload(db: Database, connection: asyncpg.Connection) -> None:
    """Nor does an upload wait for it: it locks no row of a user."""
    async with connection.transaction():
        await connection.execute("select from user_storage for update")
        page = await usage_days.sum_day(db, DAY, 0, None, USERS + 1)
    assert page.used == USERS + 1
