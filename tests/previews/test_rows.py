"""Jobs, counts and notices, as the database makes them whatever Python does."""

import asyncio
import re
from collections.abc import AsyncIterator

import asyncpg
import pytest

from server import ledger
from server.ledger import Database, File, Notices, PreviewRow, Publisher, Waker
from server.ledger.database import SESSION
from server.ledger.files import FILE_COLUMNS
from server.ledger.statements import statement
from server.previews.worker import Room, Turns
from server.settings import Settings
from tests.quota.rows import Connection, add_user, add_volume, new_file, replacement

pytestmark = pytest.mark.anyio


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    await add_volume(connection)
    for user_id in ("ada", "bob"):
        await add_user(connection, user_id, None)
    yield connection
    await connection.close()


def made(variant: str, size_bytes: int) -> PreviewRow:
    return PreviewRow(variant=variant, file_name=f"{variant}.webp", mime_type="image/webp", width=1, height=1, size_bytes=size_bytes)


async def preview_bytes(sql: Connection) -> tuple[int, int]:
    """As counted, and as they are."""
    counted = await sql.fetchval("select sum(preview_bytes)::bigint from user_storage")
    return counted, await sql.fetchval("select coalesce(sum(size_bytes), 0)::bigint from previews")


async def test_the_nth_waiting_file_of_a_user_is_the_nth_to_be_served(db: Database, sql: Connection) -> None:
    publisher = Publisher(db)
    files: list[File] = list(await asyncio.gather(*(publisher.publish(new_file("ada", 1)) for _ in range(5))))
    files.append(await ledger.publish_file(db, new_file("bob", 1)))
    files.append(await ledger.publish_file(db, new_file("ada", 1)))
    files.append(await ledger.publish_file(db, new_file("ada", 1, file_type="scene")))
    jobs = {row["payload"].decode(): row["priority"] for row in await sql.fetch("select payload, priority from pgqueuer")}
    assert jobs.keys() == {str(file.id) for file in files}
    by_user = [sorted(jobs[str(file.id)] for file in files if file.user_id == user_id) for user_id in ("ada", "bob")]
    assert by_user == [[-6, -5, -4, -3, -2, -1, 0], [0]]


async def test_what_is_made_on_demand_starves_nobody(db: Database, sql: Connection) -> None:
    """It comes before the rest of an import, and takes its turn with the first uploads of others."""
    for _ in range(2):
        await ledger.publish_file(db, new_file("ada", 1))
    bobs = await ledger.publish_file(db, new_file("bob", 1))
    await ledger.request_variant(db, bobs.id, "240x-contain-q80.webp")
    await ledger.request_variant(db, bobs.id, "240x-contain-q80.webp")
    carols = await sql.fetchval("insert into user_storage (user_id) values ('carol') returning user_id")
    last = await ledger.publish_file(db, new_file(carols, 1))
    order = [row["payload"].decode() for row in await sql.fetch("select payload from pgqueuer order by priority desc, id")]
    assert order[1:4] == [str(bobs.id), f"{bobs.id} 240x-contain-q80.webp", str(last.id)] and len(order) == 5


async def test_lost_jobs_are_derived_once(db: Database, sql: Connection) -> None:
    for user_id in ("ada", "bob", "ada"):
        await ledger.publish_file(db, new_file(user_id, 1))
    await sql.execute("delete from pgqueuer")
    assert [await ledger.derive_preview_jobs(db) for _ in range(2)] == [3, 0]
    assert sorted(row["priority"] for row in await sql.fetch("select priority from pgqueuer")) == [-1, 0, 0]


@pytest.mark.parametrize("name", ["purge_job_log", "retry_failed_previews", "get_linked_preview", "add_variant", "derive_preview_jobs"])
async def test_no_statement_reads_all_jobs_or_files(database_url: str, name: str) -> None:
    sql = statement(name, **({"file": FILE_COLUMNS} if name == "get_linked_preview" else {}))
    parameters = max(int(each) for each in re.findall(r"\$(\d+)", sql))
    connection = await asyncpg.connect(database_url, server_settings=SESSION)
    try:
        await connection.execute(f"prepare this as {sql}")
        plan = await connection.fetch(f"explain execute this({', '.join(['null'] * parameters)})")
    finally:
        await connection.close()
    assert not [row[0] for row in plan if "Seq Scan" in row[0]]


async def test_preview_bytes_are_counted_whatever_changes_them(db: Database, sql: Connection) -> None:
    file = await ledger.publish_file(db, new_file("ada", 1))
    assert await ledger.finish_preview(db, file, "ready", made=[made("320", 10), made("640", 20)])
    assert await preview_bytes(sql) == (30, 30)
    assert not await ledger.finish_preview(db, file, "ready", made=[made("320", 99)])  # it no longer waits
    await ledger.rebuild_previews(db, None, None, 10)
    assert await preview_bytes(sql) == (30, 30)
    assert await ledger.finish_preview(db, file, "ready", made=[made("320", 11), made("1280", 40)])
    assert [each.variant for each in await ledger.get_previews(db, "ada", file.id)] == ["1280", "320"]
    assert await ledger.get_previews(db, "bob", file.id) == []
    assert await preview_bytes(sql) == (51, 51)
    await sql.execute("update previews set size_bytes = size_bytes + 1")
    assert await preview_bytes(sql) == (53, 53)
    with pytest.raises(asyncpg.PostgresError, match="counters"):
        await sql.execute("update user_storage set preview_bytes = 0")
    ((_, first), (_, second)) = await ledger.delete_files(db, "ada", [file.id])
    assert {first.file_path, second.file_path} == {file.file_path, f"users/someone/previews/{file.id}"}
    assert await preview_bytes(sql) == (0, 0)


async def test_two_files_of_a_user_finished_at_once_are_both_counted(db: Database, sql: Connection) -> None:
    files = [await ledger.publish_file(db, new_file("ada", 1)) for _ in range(16)]
    await asyncio.gather(*(ledger.finish_preview(db, file, "ready", made=[made("320", 10)]) for file in files))
    assert await preview_bytes(sql) == (160, 160)


async def test_other_bytes_than_those_looked_at_get_no_preview(db: Database, sql: Connection) -> None:
    file = await ledger.publish_file(db, new_file("ada", 1))
    await sql.execute("update user_files set sha256 = $1", bytes(31) + b"1")
    assert not await ledger.finish_preview(db, file, "ready", made=[made("320", 10)])
    assert await preview_bytes(sql) == (0, 0)


async def test_those_who_wait_are_told(db: Database, sql: Connection, settings: Settings) -> None:
    notices = Notices(settings)
    mine, other = [await ledger.publish_file(db, new_file("ada", 1)) for _ in range(2)]
    try:
        with notices.of(mine.id) as told, notices.of(other.id) as not_told:
            await asyncio.wait_for(told.wait(), 10)  # it listens now: look at the row
            not_told.clear()
            told.clear()
            await ledger.finish_preview(db, mine, "failed", reason="damaged")
            await asyncio.wait_for(told.wait(), 10)
            assert not not_told.is_set()
            told.clear()
            await sql.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'coffer notices'")
            await asyncio.wait_for(told.wait(), 10)  # it listens again
    finally:
        await notices.close()


async def test_workers_are_woken_after_the_commit(db: Database, sql: Connection) -> None:
    heard = asyncio.Event()
    await sql.add_listener("ch_pgqueuer", lambda *_: heard.set())
    await ledger.publish_file(db, new_file("ada", 1))
    await sql.fetch("select 1")
    assert not heard.is_set()  # not by the transaction itself, which would make commits queue
    Waker(db).wake()
    await asyncio.wait_for(heard.wait(), 10)


async def test_who_is_to_be_alone_is() -> None:
    room, inside, order = Room(), set[int](), list[int]()
    may_go = asyncio.Event()

    async def enter(number: int, *, alone: bool) -> None:
        async with room.entered(alone=alone):
            inside.add(number)
            order.append(number)
            await may_go.wait()
            await asyncio.sleep(0)
            assert inside == {number} if alone else not inside & {3, 4}
            inside.remove(number)

    tasks = [asyncio.create_task(enter(number, alone=number in {3, 4})) for number in (1, 2, 3, 4, 5, 6)]
    for _ in range(10):  # all have come as far as they can
        await asyncio.sleep(0)
    assert inside == {1, 2}
    may_go.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert order[:2] == [1, 2] and set(order[2:4]) == {3, 4}


async def test_a_file_deleted_after_making_its_preview_began_leaves_a_tombstone_for_it(db: Database, sql: Connection) -> None:
    """The worker may have stored what it had made, and died; its try was taken back, or forgotten when the file was replaced since."""
    begun, replaced, without = [await ledger.publish_file(db, new_file("ada", 1)) for _ in range(3)]
    assert [await ledger.begin_preview(db, begun) for _ in range(2)] == [1, 2]
    for _ in range(3):
        await ledger.uncount_preview_try(db, begun)
    assert await ledger.finish_preview(db, replaced, "ready", made=[made("320", 10)])
    new = replacement(replaced.id, 1, 2)
    await ledger.replace_content(db, user_id="ada", file_id=replaced.id, expected_generation=1, new=new)
    await sql.execute("update user_files set preview_state = null where id = $1", without.id)
    paths = {tombstone.file_path for _, tombstone in await ledger.delete_files(db, "ada", [begun.id, replaced.id, without.id])}
    assert {path for path in paths if "previews" in path} == {f"users/someone/previews/{each.id}" for each in (begun, replaced)}
    assert await ledger.begin_preview(db, begun) is None


async def test_turns_are_taken_in_the_order_of_places_and_end_when_closed() -> None:
    turns, order = Turns(1), []
    first_may_end = asyncio.Event()

    async def take(place: int, until: asyncio.Event | None = None) -> None:
        async with turns.taken((place, 0)) as may_go_on:
            order.append((place, may_go_on))
            if until is not None:
                await until.wait()
                if place == 2:
                    turns.close()

    tasks = [asyncio.create_task(take(place, first_may_end if place in {5, 2} else None)) for place in (5, 3, 1, 2, 4)]
    await asyncio.sleep(0)
    first_may_end.set()
    await asyncio.gather(*tasks)
    assert order == [(5, True), (1, True), (2, True), (3, False), (4, False)]
