"""Events leave: signed, at least once, in the order of each file, whoever else is dead or slow."""

import asyncio
import json
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from server import ledger
from server.fetching import Fetcher, Rules
from server.ledger import Database, PreviewFacts, WorkCounts
from server.ledger.backups import clear_upload_stops, stop_uploads
from server.webhooks import Sender, register, rotate
from tests.fetching.peer import Answering, Asked, Peer, Say, always, listening
from tests.quota.rows import VOLUME, new_file
from tests.waiting import eventually, until

pytestmark = pytest.mark.anyio

OUTSIDE = "127.0.0.2"
RULES = Rules(private_networks=(ip_network(f"{OUTSIDE}/32"),))


@pytest.fixture(autouse=True)
async def ada(db: Database) -> None:
    await ledger.add_volume(db, VOLUME, "/mnt/one")
    await ledger.set_quota(db, "ada", None)


class Telling:
    """A sender that looks for what is due again and again, until the end."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.counts = WorkCounts()
        self.sender = Sender(db, Fetcher(RULES), self.counts, first_delay_seconds=0.01)

    async def __aenter__(self) -> "Telling":
        self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._looking.cancel()
        await self.sender.stop()

    async def _look(self) -> None:
        while True:
            await self.sender.look()
            await asyncio.sleep(0.01)

    async def until_told(self, left: int = 0) -> None:
        await eventually(lambda: deliveries(self.db), lambda count: count <= left)


async def deliveries(db: Database, state: str = "pending") -> int:
    count: int = (await db.read("select count(*) from webhook_deliveries where state = $1", state))[0]["count"]
    return count


async def uploaded(db: Database, size: int = 1) -> UUID:
    return (await ledger.publish_file(db, new_file("ada", size))).id


async def changed(db: Database, file_id: UUID, *, times: int) -> None:
    """Further events of a file."""
    for number in range(times):
        await db.write("select raise_event_v1('ada', 'file.replaced', $1, $2::jsonb)", file_id, json.dumps({"number": number}))


def told(peer: Peer) -> list[dict[str, Any]]:
    return [json.loads(asked.body) for asked in peer.asked]


async def test_events_are_told_and_signed(db: Database) -> None:
    async with Peer(always(204), OUTSIDE) as peer, Telling(db) as telling:
        endpoint_id, secret = await register(db, RULES, url=f"{peer.url}/hook?a=b", types=None, description="")
        file_id = await uploaded(db, 5)
        await telling.until_told()
        (asked,) = peer.asked
        assert (asked.method, asked.path, asked.headers["content-type"]) == ("POST", "/hook?a=b", "application/json")
        event = Webhook(secret).verify(asked.body, asked.headers)
        assert (event["type"], event["data"]["user_id"], event["data"]["file_id"]) == ("file.created", "ada", str(file_id))
        assert event["data"]["file_size"] == 5 and event["timestamp"].endswith("Z")
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(asked.body.replace(b"ada", b"bob"), asked.headers)
        assert secret.removeprefix("whsec_").encode() not in asked.body
        endpoint = await ledger.get_webhook_endpoint(db, endpoint_id)
        assert endpoint.last_sent_at is not None and (endpoint.pending, endpoint.dead) == (0, 0)


async def test_only_the_types_that_are_wanted(db: Database) -> None:
    async with Peer(always(200), OUTSIDE) as peer, Telling(db) as telling:
        await uploaded(db)  # before anybody wanted to know
        await register(db, RULES, url=peer.url, types=["file.deleted", "preview.ready", "preview.failed"], description="")
        files = [await ledger.publish_file(db, new_file("ada", 1)) for _ in range(3)]
        await ledger.finish_preview(db, files[0], "ready", facts=PreviewFacts(width=1, height=1))
        await ledger.finish_preview(db, files[1], "failed", reason="damaged")
        await ledger.delete_files(db, "ada", [files[2].id])
        await telling.until_told()
        found = {event["type"]: event["data"] for event in told(peer)}
        assert found.keys() == {"preview.ready", "preview.failed", "file.deleted"} and len(peer.asked) == 3
        assert (found["preview.failed"]["preview_reason"], found["preview.ready"]["file_id"]) == ("damaged", str(files[0].id))


async def test_nobody_listens_and_nothing_is_kept(db: Database) -> None:
    file = await ledger.publish_file(db, new_file("ada", 1))
    await ledger.finish_preview(db, file, "ready", facts=PreviewFacts(width=1, height=1))
    assert await deliveries(db) == 0
    assert (await db.read("select count(*) from events where type like 'preview.%'"))[0]["count"] == 0


async def test_an_old_event_that_is_still_to_be_told_is_not_purged(db: Database) -> None:
    await register(db, RULES, url=f"http://{OUTSIDE}:8000/", types=["file.created"], description="")
    await uploaded(db)
    await db.write("update events set created_at = now() - interval '2 days'")
    assert await ledger.purge_events(db, 1, 10) == 0 and await deliveries(db) == 1
    await db.write("update webhook_deliveries set state = 'dead'")
    assert await ledger.purge_events(db, 1, 10) == 1 and await deliveries(db, "dead") == 0


async def test_a_restored_store_tells_nobody_before_it_counts(db: Database) -> None:
    async with Peer(always(200), OUTSIDE) as peer, Telling(db) as telling:
        await stop_uploads(db, "restored")
        await register(db, RULES, url=peer.url, types=None, description="")
        await db.write("select raise_event_v1('ada', 'job.completed', null, '{\"job_id\": \"7\"}')")
        assert await ledger.due_webhooks(db) == [] and await deliveries(db) == 1
        await clear_upload_stops(db)
        await telling.until_told()
        assert len(peer.asked) == 1


async def test_what_is_undone_is_not_told(db: Database) -> None:
    await register(db, RULES, url=f"http://{OUTSIDE}:8000/", types=None, description="")
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as run:
            await run("select raise_event_v1('ada', 'job.completed', null, '{\"job_id\": \"7\"}')")
            raise ZeroDivisionError
    assert await deliveries(db) == 0
    await db.write("select raise_event_v1('ada', 'job.completed', null, '{\"job_id\": \"7\"}')")
    await db.write("select raise_event_v1('nobody', 'job.completed', null, '{\"job_id\": \"8\"}')")
    rows = await db.read("select order_key from webhook_deliveries")
    assert [row["order_key"] for row in rows] == ["7"]


async def test_each_files_events_come_in_order_through_failures(db: Database) -> None:
    turns = iter(range(40))

    async def moody(asked: Asked, say: Say) -> None:
        good = next(turns, 40) % 3 != 0
        if good:
            heard.append(json.loads(asked.body))
        await always(200 if good else 503)(asked, say)

    heard: list[dict[str, Any]] = []
    async with Peer(moody, OUTSIDE) as peer, Telling(db) as telling:
        await register(db, RULES, url=peer.url, types=["file.replaced"], description="")
        files = [await uploaded(db) for _ in range(3)]
        for file_id in files:
            await changed(db, file_id, times=8)
        await telling.until_told()
    for file_id in files:
        assert [event["data"]["number"] for event in heard if event["data"]["file_id"] == str(file_id)] == list(range(8))
    assert len(peer.asked) > 24


async def test_a_repetition_can_be_told_by_its_id(db: Database) -> None:
    async def late(asked: Asked, say: Say) -> None:
        await always(200 if len(peer.asked) > 2 else 500)(asked, say)

    async with Peer(late, OUTSIDE) as peer, Telling(db) as telling:
        _, secret = await register(db, RULES, url=peer.url, types=None, description="")
        await uploaded(db)
        await telling.until_told()
        ids = [asked.headers["webhook-id"] for asked in peer.asked]
        assert len(ids) == 3 and len(set(ids)) == 1
        assert telling.counts.take() == {("delivery", "failed"): 2, ("delivery", "told"): 1}
        for asked in peer.asked:
            Webhook(secret).verify(asked.body, asked.headers)
        await uploaded(db)
        await telling.until_told()
        assert peer.asked[-1].headers["webhook-id"] != ids[0]


async def test_a_dead_endpoint_and_a_slow_one_hold_up_nobody(db: Database) -> None:
    released = asyncio.Event()

    async def hanging(asked: Asked, say: Say) -> None:
        await released.wait()
        await always(200)(asked, say)

    async with Peer(always(200), OUTSIDE) as good, Peer(hanging, OUTSIDE) as slow, Telling(db) as telling:
        for url in (f"http://{OUTSIDE}:1024/", slow.url, good.url):
            await register(db, RULES, url=url, types=["file.created"], description="")
        for _ in range(20):
            await uploaded(db)
        await asyncio.to_thread(until, lambda: len(good.asked) >= 20)
        assert len(slow.asked) <= 8
        released.set()
        await telling.until_told(20)  # those of the dead one
    endpoints = await ledger.list_webhook_endpoints(db)
    assert [each.pending for each in endpoints] == [20, 0, 0]
    assert endpoints[0].last_failure == "connect"


async def test_what_is_given_up_is_listed_and_sent_again(db: Database) -> None:
    answering: Answering = always(500)

    async def changing(asked: Asked, say: Say) -> None:
        await answering(asked, say)

    async with Peer(changing, OUTSIDE) as peer, Telling(db) as telling:
        endpoint_id, _ = await register(db, RULES, url=peer.url, types=["file.created"], description="")
        file_id = await uploaded(db)
        await db.write("update webhook_deliveries set give_up_at = clock_timestamp()")
        await telling.until_told()
        (dead,) = await ledger.list_dead_deliveries(db, endpoint_id, 0, 10)
        assert (dead.file_id, dead.last_failure) == (file_id, "status_500")
        assert telling.counts.take() == {("delivery", "dead"): 1}
        assert await ledger.list_dead_deliveries(db, endpoint_id, dead.id, 10) == []
        answering = always(200)
        assert await ledger.redeliver(db, endpoint_id, [dead.id + 1], 10) == 0
        assert await ledger.redeliver(db, endpoint_id, [dead.id], 10) == 1
        await telling.until_told()
        assert await deliveries(db, "dead") == 0
        assert json.loads(peer.asked[-1].body)["data"]["file_id"] == str(file_id)


async def test_the_last_try_is_after_three_days(db: Database) -> None:
    endpoint_id, _ = await register(db, RULES, url=f"http://{OUTSIDE}:8000/", types=None, description="")
    await uploaded(db)
    (row,) = await db.read("select give_up_at - e.created_at as kept from webhook_deliveries d join events e on e.id = d.event_id")
    assert abs(row["kept"].total_seconds() - 3 * 86_400) < 60
    seconds, tries = 0.0, 0
    while await deliveries(db):
        # As the sender does, with the clock moved on by what it would have waited.
        (claimed,) = await ledger.claim_deliveries(db, endpoint_id, 8, 30)
        tries += 1
        delay = min(5 * 4.0 ** (claimed.tries - 1), 6 * 3_600)
        await ledger.put_off_delivery(db, claimed, delay, "connect")
        seconds += delay
        await db.write(
            "update webhook_deliveries set due_at = clock_timestamp(), give_up_at = give_up_at - make_interval(secs => $1)", delay
        )
    assert tries == 18 and 2 * 86_400 < seconds < 3.5 * 86_400


async def test_secrets_rotate_without_a_gap(db: Database) -> None:
    async with Peer(always(200), OUTSIDE) as peer, Telling(db) as telling:
        endpoint_id, old = await register(db, RULES, url=peer.url, types=["file.created"], description="")
        new, _ = await rotate(db, endpoint_id, 3_600)
        await uploaded(db)
        await telling.until_told()
        for secret in (old, new):
            Webhook(secret).verify(peer.asked[0].body, peer.asked[0].headers)
        newest, _ = await rotate(db, endpoint_id, 0)
        await uploaded(db)
        await telling.until_told()
        Webhook(newest).verify(peer.asked[1].body, peer.asked[1].headers)
        for secret in (old, new):
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(peer.asked[1].body, peer.asked[1].headers)


async def test_no_internal_address_is_told_anything(db: Database) -> None:
    async with listening("127.0.0.1", "::1") as (port, internal), Peer(always(307, location=f"http://127.0.0.1:{port}/"), OUTSIDE) as peer:
        async with Telling(db):
            for url in (f"http://localhost:{port}/", peer.url):
                await register(db, RULES, url=url, types=None, description="")
            await uploaded(db)
            await eventually(lambda: ledger.list_webhook_endpoints(db), lambda endpoints: all(each.last_failure for each in endpoints))
        assert [each.last_failure for each in await ledger.list_webhook_endpoints(db)] == ["refused", "status_307"]
        assert [each.connections for each in internal] == [0, 0]


async def test_two_workers_do_not_overtake_each_other(db: Database) -> None:
    async with Peer(always(200), OUTSIDE) as peer, Telling(db) as first, Telling(db):
        await register(db, RULES, url=peer.url, types=["file.replaced"], description="")
        files = [await uploaded(db) for _ in range(4)]
        for file_id in files:
            await changed(db, file_id, times=10)
        await first.until_told()
        for file_id in files:
            heard = [event["data"]["number"] for event in told(peer) if event["data"]["file_id"] == str(file_id)]
            assert heard == list(range(10))


async def test_what_a_dead_worker_had_in_hand_comes_back(db: Database) -> None:
    async with Peer(always(200), OUTSIDE) as peer:
        endpoint_id, _ = await register(db, RULES, url=peer.url, types=["file.replaced"], description="")
        file_id = await uploaded(db)
        await changed(db, file_id, times=2)
        (held,) = await ledger.claim_deliveries(db, endpoint_id, 8, 30)  # and dies
        assert await ledger.claim_deliveries(db, endpoint_id, 8, 30) == []  # neither it nor what follows it
        await db.write("update webhook_deliveries set due_at = clock_timestamp() where id = $1", held.id)  # half a minute later
        async with Telling(db) as telling:
            await telling.until_told()
        assert [event["data"]["number"] for event in told(peer)] == [0, 1]
        await ledger.put_off_delivery(db, held, 1, "late")  # it was not dead after all: nothing happens
        assert await deliveries(db) == 0


async def test_what_is_left_of_a_deleted_endpoint_goes(db: Database) -> None:
    endpoint_id, _ = await register(db, RULES, url=f"http://{OUTSIDE}:8000/", types=None, description="")
    await uploaded(db)
    await db.write("delete from webhook_endpoints")  # by hand
    await ledger.purge_deliveries(db, 30, 100)
    assert await deliveries(db) == 0
    endpoint_id, _ = await register(db, RULES, url=f"http://{OUTSIDE}:8000/", types=None, description="")
    await uploaded(db)
    await db.write("update webhook_deliveries set state = 'dead', give_up_at = clock_timestamp() - interval '29 days'")
    await ledger.purge_deliveries(db, 30, 100)
    assert await deliveries(db, "dead") == 1
    await ledger.purge_deliveries(db, 28, 100)
    assert await deliveries(db, "dead") == 0
    await uploaded(db)
    await ledger.delete_webhook_endpoint(db, endpoint_id)
    assert await deliveries(db) == 0


async def test_erasing_a_user_takes_what_was_still_to_be_told(db: Database, tmp_path: Path) -> None:
    async def nothing() -> None:
        return None

    await register(db, RULES, url=f"http://{OUTSIDE}:8000/", types=None, description="")
    await uploaded(db)
    await ledger.begin_erasing(db, "ada")
    while await ledger.erase_batch(db, "ada"):
        pass
    await ledger.finish_erasing(db, "ada", nothing)
    assert await deliveries(db) == 0
