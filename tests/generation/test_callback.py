"""Callbacks: the app is told of one job's end, by a secret that its pipeline does not hear of."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from standardwebhooks import Webhook

from server import ledger
from server.ledger import Database
from server.ledger import generation as rows
from tests.fetching.peer import Answering, Asked, Peer, Say, always
from tests.generation.speaking import NEW_SECRET, OLD_SECRET, ask, code, status
from tests.generation.test_rows import new_job, publish
from tests.quota.rows import Connection, add_user, add_volume
from tests.serving import RunningServer, execute
from tests.webhooks.test_sender import OUTSIDE, Telling, deliveries, told

pytestmark = pytest.mark.anyio


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    await add_volume(connection)
    await add_user(connection, "ada", 1_000_000)
    yield connection
    await connection.close()


async def callback(sql: Connection, job_id: Any) -> tuple[str | None, str | None]:
    row = await sql.fetchrow("select callback_state, callback_secret from generation_jobs where id = $1", job_id)
    assert row is not None
    return row["callback_state"], row["callback_secret"]


async def test_the_end_of_a_job_is_told_once_to_whom_it_names(db: Database, sql: Connection) -> None:
    async with Peer(always(204), OUTSIDE) as peer, Telling(db) as telling:
        job_id, (file_id,) = await new_job(db, callback_url=f"{peer.url}/mine", callback_secret=NEW_SECRET)
        other_id, (other_file,) = await new_job(db)
        assert await callback(sql, job_id) == ("waiting", NEW_SECRET)
        await publish(sql, other_file)
        assert (await rows.get_job(db, "ada", other_id)).callback_state is None and await deliveries(db) == 0
        await publish(sql, file_id)
        await telling.until_told()
        (asked,) = peer.asked
        event = Webhook(NEW_SECRET).verify(asked.body, asked.headers)
        assert (asked.path, event["type"], event["data"]["job_id"]) == ("/mine", "job.completed", str(job_id))
        assert event["data"]["file_ids"] == [str(file_id)]
        assert await callback(sql, job_id) == ("told", None)


async def test_cancelling_and_expiring_are_ends_too(db: Database, sql: Connection) -> None:
    async with Peer(always(204), OUTSIDE) as peer, Telling(db) as telling:
        cancelled, _ = await new_job(db, callback_url=peer.url, callback_secret=NEW_SECRET)
        expired, _ = await new_job(db, callback_url=peer.url, callback_secret=NEW_SECRET, ttl_seconds=-61)
        await rows.cancel_job(db, "ada", cancelled)
        assert len(await ledger.release_expired(db, 10)) == 1
        await telling.until_told()
        assert {(each["type"], each["data"]["job_id"]) for each in told(peer)} == {
            ("job.cancelled", str(cancelled)),
            ("job.failed", str(expired)),
        }


async def test_who_does_not_answer_is_given_up_and_told_again_when_somebody_says_so(db: Database, sql: Connection) -> None:
    answering: Answering = always(500)

    async def changing(asked: Asked, say: Say) -> None:
        await answering(asked, say)

    async with Peer(changing, OUTSIDE) as peer, Telling(db) as telling:
        job_id, (file_id,) = await new_job(db, callback_url=peer.url, callback_secret=NEW_SECRET)
        await publish(sql, file_id)
        assert await callback(sql, job_id) == ("due", NEW_SECRET)
        await sql.execute("update webhook_deliveries set give_up_at = clock_timestamp()")
        await telling.until_told()
        assert await callback(sql, job_id) == ("failed", NEW_SECRET)
        await sql.execute("insert into webhook_endpoints (id, url, description, secret) values ($1, 'https://b/', '', 'x')", uuid4())
        _, (of_another,) = await new_job(db)
        await publish(sql, of_another)
        await sql.execute("update webhook_deliveries set state = 'dead' where endpoint_id in (select id from webhook_endpoints)")
        (letter,) = await ledger.list_dead_callbacks(db, 0, 10)
        assert (letter.payload["job_id"], letter.last_failure) == (str(job_id), "status_500")
        assert await ledger.list_dead_callbacks(db, letter.id, 10) == []
        await ledger.purge_deliveries(db, 30, 10)
        answering = always(200)
        for ids, count in (([letter.id + 1], 0), ([letter.id], 1), (None, 0)):
            assert await ledger.redeliver_callbacks(db, ids, 10) == count
        await telling.until_told()
        assert await callback(sql, job_id) == ("told", None)
        assert Webhook(NEW_SECRET).verify(peer.asked[-1].body, peer.asked[-1].headers)["data"]["job_id"] == str(job_id)


async def test_the_secret_goes_with_the_dead_letter(db: Database, sql: Connection) -> None:
    jobs = []
    for _ in range(2):
        job_id, (file_id,) = await new_job(db, callback_url="https://app.example.com/", callback_secret=NEW_SECRET)
        await publish(sql, file_id)
        jobs.append(job_id)
    await sql.execute("update webhook_deliveries set state = 'dead', give_up_at = now() - interval '29 days'")
    await sql.execute("update generation_jobs set callback_state = 'failed'")
    await sql.execute("delete from events where (payload ->> 'job_id')::uuid = $1", jobs[0])  # beyond their time
    for days, left in ((30, 1), (28, 0)):
        for _ in range(2):
            await ledger.purge_deliveries(db, days, 10)
        assert await deliveries(db, "dead") == left
        assert [await callback(sql, each) for each in jobs] == [("failed", None), ("failed", NEW_SECRET if left else None)]
    await sql.execute(
        "insert into webhook_deliveries (endpoint_id, event_id, order_key, state) select $1, max(id), $2, 'dead' from events",
        jobs[1],
        str(jobs[1]),
    )
    assert await ledger.list_dead_callbacks(db, 0, 10) == [] and await ledger.redeliver_callbacks(db, None, 10) == 0  # nothing to sign with


async def test_what_is_due_is_not_purged(db: Database, sql: Connection) -> None:
    _, (file_id,) = await new_job(db, callback_url="https://app.example.com/", callback_secret=NEW_SECRET)
    await publish(sql, file_id)
    await ledger.purge_deliveries(db, 0, 10)
    assert await deliveries(db) == 1


async def test_nobody_hears_of_what_is_undone(db: Database, sql: Connection) -> None:
    job_id, (file_id,) = await new_job(db, callback_url="https://app.example.com/", callback_secret=NEW_SECRET)
    undone = sql.transaction()
    await undone.start()
    await publish(sql, file_id)
    await undone.rollback()
    assert await callback(sql, job_id) == ("waiting", NEW_SECRET) and await deliveries(db) == 0


def test_a_callback_is_judged_and_its_secret_told_to_nobody(api: RunningServer) -> None:
    with api.client("cora") as cora, httpx.Client(base_url=api.url):
        made = ask(cora, callback={"url": "https://app.example.com/jobs?a=b", "secret": OLD_SECRET})
        assert made["job"]["callback_state"] == status(cora, made["job_id"])["callback_state"] == "waiting"
        assert OLD_SECRET not in str(made) and "app.example.com" not in str(made)
        (row,) = execute(api.database_url, "select callback_url from generation_jobs where user_id = 'cora'")
        assert row["callback_url"] == "https://app.example.com/jobs?a=b"
        for wrong, expected in (
            ({"url": "https://127.0.0.1/", "secret": OLD_SECRET}, (400, "url_refused")),
            ({"url": "http://app.example.com/", "secret": OLD_SECRET}, (400, "url_refused")),
            ({"url": "https://app.example.com/", "secret": "whsec_short"}, (400, "invalid_request")),
            ({"url": "https://app.example.com/"}, (400, "invalid_request")),
        ):
            assert code(cora.post("/api/generate", json={"outputs": [{"max_bytes": 1}], "callback": wrong})) == expected
        preset = cora.post(
            "/api/generate/character", json={"entity_id": "1", "callback": {"url": "https://app.example.com/", "secret": OLD_SECRET}}
        )
        assert preset.json()["job"]["callback_state"] == "waiting"
