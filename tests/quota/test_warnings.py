"""Users whose storage is nearly full are told once per crossing, by the database itself."""

import json
from uuid import UUID

import pytest

from server import ledger
from server.ledger import Database
from tests.quota.rows import Connection, add_user, insert_file, insert_upload
from tests.samples import image
from tests.serving import RunningServer, execute

pytestmark = pytest.mark.anyio

ADD_PREVIEW = """
insert into previews (file_id, variant, user_id, file_name, mime_type, size_bytes) values ($1, '320', 'ada', '320.webp', 'image/webp', 850)
"""
RESIZE = "update user_files set file_size = $2 where id = $1"


async def warnings(sql: Connection, user_id: str = "ada") -> list[int]:
    rows = await sql.fetch("select payload from events where user_id = $1 and type = 'quota.warning' order by id", user_id)
    return [json.loads(row["payload"])["percent"] for row in rows]


async def warned(sql: Connection, user_id: str = "ada") -> int:
    return int(await sql.fetchval("select warned_percent from user_storage where user_id = $1", user_id))


@pytest.fixture
async def ada(sql: Connection) -> UUID:
    """A file of one byte, of a user with 1000."""
    await add_user(sql, "ada", 1_000)
    return await insert_file(sql, "ada", 1)


async def test_each_mark_is_told_once_on_the_way_up(sql: Connection, ada: UUID) -> None:
    told = []
    for size in (799, 800, 801, 899, 900, 950, 999, 1_000):
        await sql.execute(RESIZE, ada, size)
        told.append(len(await warnings(sql)))
    assert told == [0, 1, 1, 1, 2, 2, 2, 3]
    assert await warnings(sql) == [80, 90, 100]
    row = await sql.fetchrow("select user_id, file_id, payload from events where type = 'quota.warning' order by id desc limit 1")
    assert row is not None and (row["user_id"], row["file_id"]) == ("ada", None)
    assert json.loads(row["payload"]) == {"percent": 100, "used_bytes": 1_000, "limit_bytes": 1_000}


async def test_a_leap_tells_the_highest_mark_alone(sql: Connection, ada: UUID) -> None:
    await sql.execute(RESIZE, ada, 950)
    assert await warnings(sql) == [90]


async def test_a_mark_is_armed_again_well_below_it(sql: Connection, ada: UUID) -> None:
    for size, level in ((1_000, 100), (899, 90), (1_000, 100), (900, 100), (800, 90), (799, 80), (700, 80), (850, 80), (699, 0), (800, 80)):
        await sql.execute(RESIZE, ada, size)
        assert await warned(sql) == level, size
    assert await warnings(sql) == [100, 100, 80]


async def test_files_that_come_and_go_around_a_mark_tell_once(sql: Connection, ada: UUID) -> None:
    await sql.execute(RESIZE, ada, 750)
    for _ in range(5):
        file_id = await insert_file(sql, "ada", 60)
        await sql.execute("delete from user_files where id = $1", file_id)
    assert await warnings(sql) == [80]


async def test_the_quota_moves_and_the_mark_with_it(db: Database, sql: Connection, ada: UUID) -> None:
    await sql.execute(RESIZE, ada, 500)
    await ledger.set_quota(db, "ada", 600)
    assert (await warnings(sql), await warned(sql)) == ([80], 80)
    await ledger.set_quota(db, "ada", 400)
    assert (await warnings(sql), await warned(sql)) == ([80, 100], 100)
    await ledger.set_quota(db, "ada", 0)
    assert (await warnings(sql), await warned(sql)) == ([80, 100], 100)
    await ledger.set_quota(db, "ada", None)
    assert (await warnings(sql), await warned(sql)) == ([80, 100], 0)


async def test_reservations_do_not_count_and_what_is_undone_is_not_told(sql: Connection, ada: UUID) -> None:
    await insert_upload(sql, "ada", 900)
    assert await warnings(sql) == []
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute(RESIZE, ada, 90)
    await transaction.rollback()
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("delete from uploads")
    await sql.execute(RESIZE, ada, 900)
    assert await warnings(sql) == [90]
    await transaction.rollback()
    assert (await warnings(sql), await warned(sql)) == ([], 0)


@pytest.mark.parametrize("counts", [True, False])
async def test_previews_count_where_the_rule_says_so(db: Database, sql: Connection, ada: UUID, counts: bool) -> None:
    await ledger.set_quota_rules(db, counts_previews=counts)
    await sql.execute(ADD_PREVIEW, ada)
    assert await warnings(sql) == ([80] if counts else [])
    await sql.execute(RESIZE, ada, 100)
    assert await warnings(sql) == ([80, 90] if counts else [])


async def test_users_without_a_quota_or_a_byte_are_not_told(db: Database, sql: Connection) -> None:
    await add_user(sql, "eve", None)
    await insert_file(sql, "eve", 10**12)
    await ledger.set_quota(db, "bob", 0)
    await ledger.set_quota(db, "bob", 0)
    assert await warnings(sql, "eve") + await warnings(sql, "bob") == []


async def test_nobody_who_is_being_erased_is_told(db: Database, sql: Connection, ada: UUID) -> None:
    await sql.execute(RESIZE, ada, 500)
    await ledger.begin_erasing(db, "ada")
    await sql.execute("update user_storage set max_bytes = 500 where user_id = 'ada'")
    assert await warnings(sql) == []


def test_the_api_shows_who_was_warned(server: RunningServer) -> None:
    server.set_quota("ada", 1_000)
    with server.client("ada") as client:
        for size, expected in ((700, 0), (250, 90)):
            client.post("/api/files/upload", content=image(size)).raise_for_status()
            assert client.get("/api/users/ada").json()["warned_percent"] == expected
    (event,) = execute(server.database_url, "select payload from events where type = 'quota.warning'")
    assert json.loads(event["payload"]) == {"percent": 90, "used_bytes": 950, "limit_bytes": 1_000}
