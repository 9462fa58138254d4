"""The triggers of generation: their order, their races, and how lists are read. Plain connections: they must hold without our Python."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from server.errors import NotFound
from server.ledger import Database
from server.ledger import generation as rows
from server.ledger import media as media_rows
from server.ledger.database import SESSION
from server.ledger.models import JobQuery, MediaQuery, NewJob, NewOutput, UploadLink
from tests.quota.rows import SHA256, VOLUME, Connection, add_user, add_volume, path_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    await add_volume(connection)
    await add_user(connection, "ada", 1_000_000)
    yield connection
    await connection.close()


async def new_job(db: Database, outputs: int = 1, ttl_seconds: int = 600, **fields: Any) -> tuple[UUID, list[UUID]]:
    """A job of ada's whose outputs hold 1,000 bytes each."""
    ids = sorted(uuid4() for _ in range(outputs))
    awaited = [NewOutput(file_id=each, media_type="image", max_bytes=1_000, link=UploadLink()) for each in ids]
    new = NewJob(id=uuid4(), user_id="ada", outputs=awaited, **fields)
    made = await rows.create_job(db, new, volume_id=VOLUME, ttl_seconds=ttl_seconds, lease_seconds=60, most_links=1_000)
    return made, ids


PUBLISH = """
with released as (delete from uploads where id = $1 returning id)
insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path)
select $1, 'ada', 'a file.png', 'image', 'image/png', 700, $2, $3, $4 from (select count(*) from released) r (released) where r.released = 1
"""
"""As `publish_file` does it for a link: in one statement, and no file without the reservation."""


async def publish(sql: Connection, file_id: UUID) -> None:
    await sql.execute(PUBLISH, file_id, SHA256, VOLUME, path_of(file_id))


async def state(sql: Connection, job_id: UUID) -> str:
    return str(await sql.fetchval("select state from generation_jobs where id = $1", job_id))


async def quota(sql: Connection) -> tuple[int, int]:
    row = await sql.fetchrow("select total_bytes, reserved_bytes from user_storage where user_id = 'ada'")
    assert row is not None
    return row["total_bytes"], row["reserved_bytes"]


async def events(sql: Connection) -> list[str]:
    return [row["type"] for row in await sql.fetch("select type from events where type like 'job.%' order by id")]


async def blocked(connection: Connection, sql: Connection) -> None:
    """Returns when the connection waits for a lock."""
    async with asyncio.timeout(20):
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = $1"
        while not await sql.fetchval(waits, connection.get_server_pid()):
            pass


async def test_a_rolled_back_file_settles_nothing(db: Database, sql: Connection) -> None:
    job_id, (file_id,) = await new_job(db)
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with sql.transaction():
            await publish(sql, file_id)
            assert await state(sql, job_id) == "completed"
            await sql.execute("select 1 / 0")
    assert (await state(sql, job_id), await events(sql), await quota(sql)) == ("queued", [], (0, 1_000))
    await publish(sql, file_id)
    assert (await state(sql, job_id), await events(sql), await quota(sql)) == ("completed", ["job.completed"], (700, 0))


async def test_the_event_is_raised_in_the_transaction_that_ends_the_job(db: Database, sql: Connection) -> None:
    job_id, (file_id,) = await new_job(db)
    await sql.execute("create function explode() returns trigger language plpgsql as $$ begin raise 'no'; end $$")
    await sql.execute(
        "create trigger explode before insert on events for each row when (new.type = 'job.completed') execute function explode()"
    )
    with pytest.raises(asyncpg.RaiseError):
        await publish(sql, file_id)
    assert (await state(sql, job_id), await quota(sql)) == ("queued", (0, 1_000))
    await sql.execute("drop trigger explode on events")
    await publish(sql, file_id)
    payload = json.loads(await sql.fetchval("select payload from events where type = 'job.completed'"))
    assert (payload["job_id"], payload["state"], payload["file_ids"]) == (str(job_id), "completed", [str(file_id)])


async def test_the_last_two_outputs_at_once_end_the_job_once(database_url: str, db: Database, sql: Connection) -> None:
    job_id, (first, second) = await new_job(db, 2)
    other = await asyncpg.connect(database_url)
    watcher = await asyncpg.connect(database_url)
    try:
        async with sql.transaction():
            await publish(sql, first)
            late = asyncio.create_task(publish(other, second))
            await blocked(other, watcher)
        await late
    finally:
        await other.close()
        await watcher.close()
    assert (await state(sql, job_id), await events(sql), await quota(sql)) == ("completed", ["job.completed"], (1_400, 0))


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_cancelling_while_an_output_is_published(database_url: str, db: Database, sql: Connection, cancel_first: bool) -> None:
    job_id, (file_id, _) = await new_job(db, 2)
    other = await asyncpg.connect(database_url)
    watcher = await asyncpg.connect(database_url)

    async def cancel(connection: Connection) -> None:
        await connection.fetchval("select cancel_job_v1('ada', $1, '{\"kind\": \"system\"}')", job_id)

    async def bring(connection: Connection) -> None:
        await publish(connection, file_id)

    begin, late = (cancel, bring) if cancel_first else (bring, cancel)
    try:
        async with sql.transaction():
            await begin(sql)
            waiting = asyncio.create_task(late(other))
            await blocked(other, watcher)
        await waiting
    finally:
        await other.close()
        await watcher.close()
    assert (await state(sql, job_id), await events(sql)) == ("cancelled", ["job.cancelled"])
    assert await quota(sql) == ((0, 0) if cancel_first else (700, 0))
    states = [row["state"] for row in await sql.fetch("select state from generation_outputs order by file_id")]
    assert states == (["failed", "failed"] if cancel_first else ["stored", "failed"])


async def test_many_ends_at_once_agree(database_url: str, db: Database, sql: Connection) -> None:
    jobs = [await new_job(db, 3) for _ in range(20)]
    connections = [await asyncpg.connect(database_url) for _ in range(8)]

    async def work(number: int, connection: Connection) -> None:
        for place, (job_id, ids) in enumerate(jobs):
            match (number + place) % 4:
                case 0 | 1:
                    await publish(connection, ids[number % 3])
                case 2:
                    await rows.report_job(db, job_id, sender="s", message_id=None, outcome="failed", error="no")
                case _:
                    await rows.cancel_job(db, "ada", job_id)

    try:
        await asyncio.gather(*(work(number, connection) for number, connection in enumerate(connections)))
    finally:
        for connection in connections:
            await connection.close()
    ended = await sql.fetch("select id, state, finished_at from generation_jobs")
    assert all(row["finished_at"] for row in ended) and len(await events(sql)) == 20
    files = await sql.fetchval("select count(*) from user_files")
    assert await quota(sql) == (700 * files, 0)
    assert await sql.fetchval("select count(*) from generation_outputs where state = 'stored'") == files
    assert await sql.fetchval("select count(*) from generated_media") == files
    assert await sql.fetchval("select count(*) from uploads") == 0


@pytest.mark.parametrize(
    ("start", "end"),
    [("completed", "running"), ("cancelled", "completed"), ("expired", "failed"), ("running", "queued"), ("failed", "queued")],
)
async def test_an_end_is_final_for_psql_too(db: Database, sql: Connection, start: str, end: str) -> None:
    job_id, _ = await new_job(db)
    finished = "null" if start == "running" else "now()"
    await sql.execute(f"update generation_jobs set state = '{start}', finished_at = {finished} where id = $1", job_id)
    with pytest.raises(asyncpg.PostgresError) as refused:
        await sql.execute(f"update generation_jobs set state = '{end}', finished_at = null where id = $1", job_id)
    assert refused.value.sqlstate == "CF007"
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(
            "insert into generation_outputs (job_id, output_index, file_id, media_type, max_bytes, state) "
            "values ($1, 5, gen_random_uuid(), 'image', 1, 'fetching')",
            job_id,
        )


async def test_a_settled_output_stays_so(db: Database, sql: Connection) -> None:
    job_id, (first, _) = await new_job(db, 2)
    await publish(sql, first)
    await rows.fail_output(db, first, "late")
    assert await rows.fetch_output(db, job_id, 0, "https://example.com/") == "stored"
    with pytest.raises(asyncpg.PostgresError) as refused:
        await sql.execute("update generation_outputs set state = 'failed' where file_id = $1", first)
    assert refused.value.sqlstate == "CF007"


async def test_progress_and_messages(db: Database, sql: Connection) -> None:
    job_id, _ = await new_job(db)
    for message_id, progress, answer in (("m1", 50, "accepted"), ("m1", 90, "repeated"), ("m2", 20, "accepted")):
        said = await rows.report_job(db, job_id, sender="s", message_id=message_id, outcome="running", progress_percent=progress)
        assert said == answer
    assert await sql.fetchval("select progress_percent from generation_jobs") == 50
    assert await rows.message_is_known(db, "s", "m1") and not await rows.message_is_known(db, "t", "m1")
    await sql.execute("update generation_messages set received_at = now() - interval '1 hour' where message_id = 'm1'")
    await rows.purge_messages(db, 60)
    assert not await rows.message_is_known(db, "s", "m1") and await rows.message_is_known(db, "s", "m2")


async def test_past_its_end_a_job_takes_nothing(db: Database, sql: Connection) -> None:
    job_id, _ = await new_job(db)
    await sql.execute("update generation_jobs set expires_at = now() - interval '1 second'")
    assert await rows.report_job(db, job_id, sender="s", message_id=None, outcome="completed") == "late"
    assert await rows.fetch_output(db, job_id, 0, "https://example.com/") == "awaited"


async def test_giving_a_link_up_fails_its_output(db: Database, sql: Connection) -> None:
    job_id, (file_id,) = await new_job(db)
    await sql.execute("delete from uploads where id = $1", file_id)
    row = await sql.fetchrow("select state, reason from generation_outputs")
    assert row is not None and tuple(row) == ("failed", "closed") and await state(sql, job_id) == "failed"


async def test_what_lies_in_the_trash_is_not_remembered_until_it_is_back(db: Database, sql: Connection) -> None:
    _, (file_id,) = await new_job(db, entity_type="character", entity_id="mira")
    await publish(sql, file_id)
    _, (child_id,) = await new_job(db, parent_id=file_id, entity_type="character", entity_id="mira")
    await publish(sql, child_id)
    await media_rows.set_primary(db, "ada", file_id, is_primary=True)
    everything = MediaQuery(entity_type="character", entity_id="mira")

    async def found() -> list[UUID]:
        return [media.id for media in (await media_rows.list_media(db, "ada", everything)).media]

    await sql.execute("update user_files set deleted_at = now() where id = $1", file_id)
    assert await found() == [child_id] and await media_rows.media_ancestors(db, "ada", child_id) == []
    for refused in (media_rows.get_media(db, "ada", file_id), media_rows.set_primary(db, "ada", file_id, is_primary=False)):
        with pytest.raises(NotFound):
            await refused
    assert (await media_rows.set_primary(db, "ada", child_id, is_primary=True)).is_primary
    await sql.execute("update user_files set deleted_at = null where id = $1", file_id)
    assert await found() == [child_id, file_id] and not (await media_rows.get_media(db, "ada", file_id)).is_primary
    assert [media.id for media in await media_rows.media_ancestors(db, "ada", child_id)] == [file_id]
    await sql.execute("delete from user_files where id = $1", file_id)
    assert await found() == [child_id]


# How lists are read


async def _fill(sql: Connection) -> None:
    await sql.execute("insert into user_storage (user_id) select 'user ' || n from generate_series(1, 50) n")
    await sql.execute("""
        insert into generation_jobs (id, user_id, entity_type, entity_id, media_types, output_count, created_at, expires_at)
        select gen_random_uuid(), 'user ' || 1 + n % 50, 'character', (n % 7)::text, '{image}', 1, now() - n * interval '1 second', now()
          from generate_series(1, 10000) n""")
    await sql.execute("""
        insert into generated_media (id, user_id, entity_type, entity_id, project_id, media_type, source_type, model_used, prompt_used,
                                     root_id, created_at)
        select gen_random_uuid(), 'user ' || 1 + n % 50, 'character', (n % 7)::text, (n % 5)::text, 'image', 'generated', 'm' || n % 3,
               'word' || n % 100, gen_random_uuid(), now() - n * interval '1 second'
          from generate_series(1, 10000) n""")
    await sql.execute(
        """
        insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, deleted_at)
        select m.id, m.user_id, 'a', 'image', 'image/png', 1, $1, $2,
               'users/u/images/' || m.id || '.1.png', case when random() < 0.05 then now() end
          from generated_media m""",
        SHA256,
        VOLUME,
    )
    await sql.execute("update generated_media set file_id = id")
    await sql.execute("analyze generation_jobs, generated_media, user_files")


async def test_lists_read_one_range_in_its_order(database_url: str, sql: Connection) -> None:
    await _fill(sql)
    session = await asyncpg.connect(database_url, server_settings=SESSION)
    after = (await sql.fetchval("select now()"), uuid4())
    jobs = [JobQuery(), JobQuery(entity_type="character", entity_id="1"), JobQuery(state="queued", project_id="p")]
    media = [
        MediaQuery(),
        MediaQuery(entity_type="character", entity_id="1", media_type="image", is_primary=True),
        MediaQuery(project_id="1", model="m1"),
        MediaQuery(model="m1", prompt="word1"),
        MediaQuery(root_id=uuid4()),
    ]
    composed = [rows.compose_jobs("user 1", query, place, 10_000) for query in jobs for place in (None, after)]
    composed += [media_rows.compose("user 1", query, place, 10_000) for query in media for place in (None, after)]
    try:
        for statement, values in composed:
            plan = "\n".join(row[0] for row in await session.fetch(f"explain (costs off) {statement}", *values))
            assert "Sort" not in plan and "Seq Scan" not in plan and "Bitmap" not in plan, plan
            reading = [line for line in plan.splitlines() if "Index" in line and "Scan" in line and "user_files" not in line]
            assert len(reading) == 1, plan  # and what lies in the trash, by an index too
    finally:
        await session.close()
