"""Each rule of the quota, through direct SQL."""

import json
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.quota.rows import SHA256, VOLUME, Connection, add_user, drift, insert_file, insert_upload, path_of, used

pytestmark = pytest.mark.anyio


async def refused(sql: Connection, statement: str, *arguments: Any, state: str = "CF001") -> asyncpg.PostgresError:
    """The error with which PostgreSQL refuses a statement."""
    with pytest.raises(asyncpg.PostgresError) as caught:
        await sql.execute(statement, *arguments)
    assert caught.value.sqlstate == state
    return caught.value


async def test_a_refusal_says_what_is_used_allowed_and_needed(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    await insert_file(sql, "ada", 30)
    await insert_upload(sql, "ada", 20)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await insert_file(sql, "ada", 51)
    assert caught.value.sqlstate == "CF001"
    assert json.loads(caught.value.detail or "") == {"used_bytes": 50, "limit_bytes": 100, "needed_bytes": 51}
    assert "max_bytes" in (caught.value.hint or "")
    await insert_file(sql, "ada", 50)
    assert await used(sql, "ada") == (80, 20, 2)
    assert await drift(sql) == []


async def test_every_way_to_grow_is_refused_at_the_same_byte(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    await add_user(sql, "bob", 1000)
    file, upload, other = await insert_file(sql, "ada", 40), await insert_upload(sql, "ada", 20), await insert_file(sql, "bob", 41)
    other_upload = await insert_upload(sql, "bob", 41)
    await refused(sql, "update user_files set file_size = 81 where id = $1", file)
    await refused(sql, "update uploads set reserved_bytes = 61 where id = $1", upload)
    await refused(sql, "update user_files set user_id = 'ada' where id = $1", other)
    await refused(sql, "update uploads set user_id = 'ada' where id = $1", other_upload)
    copy = "insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path) "
    copy += "select id, 'ada', 'n', 'image', 'image/png', 21, $1, $2, '/' || id || '.1.' from (values ($3::uuid), ($4)) ids (id)"
    await refused(sql, copy, SHA256, VOLUME, uuid4(), uuid4())
    record = (uuid4(), "ada", "n", "image", "image/png", 41, SHA256, VOLUME, "")
    columns = ["id", "user_id", "file_name", "file_type", "mime_type", "file_size", "sha256", "volume_id", "file_path"]
    with pytest.raises(asyncpg.PostgresError) as caught:
        await sql.copy_records_to_table("user_files", records=[(*record[:8], path_of(record[0]))], columns=columns)
    assert caught.value.sqlstate == "CF001"
    upsert = "insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at) values ($1, 'ada', $2, 1, now()) "
    await refused(sql, upsert + "on conflict (id) do update set reserved_bytes = 61", upload, VOLUME)
    assert await used(sql, "ada") == (40, 20, 1) and await used(sql, "bob") == (41, 41, 1)
    assert await drift(sql) == []


async def test_null_is_unlimited_and_sizes_beyond_32_bits_count(sql: Connection) -> None:
    await add_user(sql, "ada", None)
    await insert_file(sql, "ada", 2**50)
    await insert_upload(sql, "ada", 2**50)
    assert await used(sql, "ada") == (2**50, 2**50, 1)
    with pytest.raises(asyncpg.NumericValueOutOfRangeError):
        await insert_file(sql, "ada", 2**63 - 1)
    assert await used(sql, "ada") == (2**50, 2**50, 1)


async def test_a_lowered_quota_blocks_only_new_bytes(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    file, upload = await insert_file(sql, "ada", 40), await insert_upload(sql, "ada", 50)
    await sql.execute("update user_storage set max_bytes = 10")
    with pytest.raises(asyncpg.PostgresError):
        await insert_file(sql, "ada", 1)
    await insert_file(sql, "ada", 0)
    await sql.execute("update user_files set file_size = 39, file_name = 'shrunk' where id = $1", file)
    async with sql.transaction():  # what publishing does: the reservation that held the room becomes a file
        await sql.execute("delete from uploads where id = $1", upload)
        await insert_file(sql, "ada", 50)
    assert await used(sql, "ada") == (89, 0, 3)
    assert await drift(sql) == []


async def test_released_reservations_let_no_transaction_grow(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    upload, file = await insert_upload(sql, "ada", 50), await insert_file(sql, "ada", 40)
    await sql.execute("update user_storage set max_bytes = 10")

    async def attempt(size: int, *, twice: bool = False, reserve: bool = False, deleted: bool = False) -> bool:
        transaction = sql.transaction()
        await transaction.start()
        try:
            if deleted:
                await sql.execute("delete from user_files where id = $1", file)
            else:
                await sql.execute("delete from uploads where id = $1", upload)
            for _ in range(1 + twice):
                await (insert_upload if reserve else insert_file)(sql, "ada", size)
        except asyncpg.PostgresError as problem:
            assert problem.sqlstate == "CF001"
            return False
        finally:
            await transaction.rollback()
        return True

    assert await attempt(50) and await attempt(25, twice=True)
    assert not await attempt(51) and not await attempt(26, twice=True)
    assert not await attempt(50, reserve=True)  # a reservation is new bytes, even where another has just ended
    assert not await attempt(40, deleted=True)  # and so is a file, where a file has been deleted
    # Released in one transaction, wanted in the next: the room is gone.
    await sql.execute("delete from uploads where id = $1", upload)
    with pytest.raises(asyncpg.PostgresError):
        await insert_file(sql, "ada", 50)


async def test_a_user_being_erased_takes_nothing_and_gives_everything(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    file, upload = await insert_file(sql, "ada", 40), await insert_upload(sql, "ada", 20)
    await sql.execute("update user_storage set erasing_at = now()")
    for insert in (insert_file, insert_upload):
        with pytest.raises(asyncpg.PostgresError) as caught:
            await insert(sql, "ada", 0)
        assert caught.value.sqlstate == "CF003" and caught.value.hint
    await refused(sql, "update user_files set file_size = 41", state="CF003")
    with pytest.raises(asyncpg.PostgresError) as caught:
        async with sql.transaction():  # not even what a reservation holds room for
            await sql.execute("delete from uploads where id = $1", upload)
            await insert_file(sql, "ada", 20)
    assert caught.value.sqlstate == "CF003"
    await sql.execute("update user_files set file_size = 39, file_name = 'renamed'")
    await sql.execute("delete from uploads")
    await sql.execute("delete from user_files where id = $1", file)
    assert await used(sql, "ada") == (0, 0, 0)


async def test_truncate_is_refused(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    await insert_file(sql, "ada", 10)
    for table in ("user_files", "uploads", "user_storage", "user_storage_by_type", "volumes"):
        problem = await refused(sql, f"truncate {table} cascade", state="CF002")
        assert "DELETE" in (problem.hint or "")


async def test_counters_cannot_be_set_by_hand_or_driven_below_zero(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    await insert_file(sql, "ada", 10)
    for change in ("total_bytes = 0", "reserved_bytes = 1", "file_count = 0", "credit_bytes = 1", "credit_xid = pg_current_xact_id()"):
        await refused(sql, f"update user_storage set {change}", state="CF004")
    for column in ("total_bytes", "reserved_bytes", "file_count", "credit_bytes"):
        await refused(sql, f"insert into user_storage (user_id, {column}) values ('eve', 1)", state="CF004")
    for change in ("update user_storage_by_type set file_count = 0", "delete from user_storage_by_type"):
        await refused(sql, change, state="CF004")
    await sql.execute("alter table user_storage disable trigger user")
    for change in ("total_bytes = -1", "reserved_bytes = -1", "file_count = -1", "credit_bytes = -1", "max_bytes = -1"):
        await refused(sql, f"update user_storage set {change}", state="23514")
    for statement in ("update user_files set file_size = -1", "update uploads set reserved_bytes = -1"):
        if "uploads" in statement:
            await insert_upload(sql, "ada", 0)
        await refused(sql, statement, state="23514")


async def test_what_goes_by_a_cascade_leaves_tombstones_and_needs_no_owner(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    await add_user(sql, "bob", 100)
    files = [await insert_file(sql, "ada", 10), await insert_file(sql, "ada", 20)]
    await insert_upload(sql, "ada", 5)
    await insert_file(sql, "bob", 7)
    await sql.execute("delete from user_storage where user_id = 'ada'")
    left = await sql.fetch("select file_path from tombstones order by file_path")
    assert [row["file_path"] for row in left] == sorted(map(path_of, files))
    assert await used(sql, "bob") == (7, 0, 1)
    assert await drift(sql) == []


async def test_every_path_that_no_row_names_any_more_gets_a_tombstone(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    file = await insert_file(sql, "ada", 10)
    await sql.execute("update user_files set file_name = 'renamed', file_size = 11")
    assert await sql.fetchval("select count(*) from tombstones") == 0
    await sql.execute("update user_files set file_path = $1, generation = 2", path_of(file, 2))
    row = await sql.fetchrow("select file_path, file_id, generation from tombstones")
    assert row is not None and tuple(row) == (path_of(file), file, 1)


async def test_two_rows_cannot_name_one_stored_file(sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    file = await insert_file(sql, "ada", 10)
    await insert_file(sql, "ada", 10)
    await refused(sql, "update user_files set file_path = $1", path_of(file), state="23514")


async def test_usage_history_is_exact(sql: Connection) -> None:
    """Byte-hours: each change has a row with the time, the difference and the total after it."""
    await add_user(sql, "ada", 100)
    await insert_upload(sql, "ada", 5)  # reserved bytes are not stored bytes
    file = await insert_file(sql, "ada", 10)
    await sql.execute("update user_files set file_name = 'renamed'")
    await sql.execute("update user_files set file_size = 30")
    await sql.execute("delete from user_files where id = $1", file)
    rows = await sql.fetch("select delta_bytes, total_bytes, changed_at from usage_ledger order by id")
    assert [(row["delta_bytes"], row["total_bytes"]) for row in rows] == [(10, 10), (20, 30), (-30, 0)]
    assert sorted(rows, key=lambda row: row["changed_at"]) == rows


async def test_lists_stay_true_after_direct_sql(sql: Connection) -> None:
    await add_user(sql, "ada", 1000)
    await add_user(sql, "bob", 1000)
    files = [await insert_file(sql, "ada", size) for size in (10, 20, 30)]
    await sql.execute("update user_files set tags = array['a', 'b', 'a'], file_name = file_size || ' Sunset-Beach beach.PNG'")
    assert await drift(sql) == []
    await sql.execute("update user_files set tags = tags || 'c'::text, file_size = file_size + 1 where id = $1", files[0])
    await sql.execute("update user_files set user_id = 'bob', upload_date = now() + interval '1 day' where id = $1", files[1])
    await sql.execute("update user_files set file_type = 'project', mime_type = 'application/zip' where id = $1", files[2])
    assert await drift(sql) == []
    assert await sql.fetchval("select count(*) from user_file_tags") == 7
    await sql.execute("delete from user_files")
    assert await drift(sql) == [] and await sql.fetchval("select count(*) from user_file_tags") == 0
    assert await sql.fetchval("select count(*) from user_file_words") == 0
