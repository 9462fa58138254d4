"""Callbacks: the app is told of one job's end, by a secret that its pipeline does not hear of."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
from standardwebhooks import Webhook

from server import ledger
from server.ledger import Database
from server.ledger import generation as rows
from tests.fetching.peer import Peer, always
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
