"""What the worker does for jobs: outputs that lie elsewhere, pipelines that Coffer calls."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from standardwebhooks import Webhook

from server.delivery import Links
from server.fetching import Fetcher, Rules
from server.generation import Generation, JobWish, OutputWish
from server.generation.adapters import adapter_of, new_client
from server.generation.marking import Marker
from server.generation.worker import ENTRYPOINT, MOST_TRIES, GenerationWorker
from server.intake import Intake
from server.ledger import Database, WorkCounts, get_user, list_files, list_volumes
from server.ledger import generation as rows
from server.ledger.backups import clear_upload_stops, stop_uploads
from server.ledger.media import get_media
from server.ledger.models import FileQuery, Job, OutputState
from server.ledger.queue import Retry, run_text_jobs
from server.setting_values import Pipeline
from server.settings import Settings
from server.vault import Vault
from tests.generation.fakes import Asked, Reply, Site, as_json, site
from tests.generation.speaking import NEW_SECRET
from tests.samples import image, video
from tests.waiting import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
def elsewhere() -> Iterator[Site]:
    with site() as found:
        yield found


@pytest.fixture
def settings(database_url: str, elsewhere: Site) -> Settings:
    return Settings(
        database_url=database_url,
        link_keys=("k" * 32,),
        public_url="https://media.example.com",
        volume_reserve_bytes=2**20,
        fetch_private_networks=(ip_network("127.0.0.1/32"),),
        pipelines=(
            Pipeline(name="gpu", adapter="dispatch", url=f"{elsewhere.url}/run", secrets=(NEW_SECRET,)),
            Pipeline(name="model", adapter="polling", url=f"{elsewhere.url}/predictions", token="t0ken", poll_seconds=1),
        ),
    )


class Coffer:
    """What a worker process is made of."""

    def __init__(self, settings: Settings, db: Database, vault: Vault) -> None:
        self.settings, self.db = settings, db
        self.intake = Intake(settings, db, vault)
        self.generation = Generation(settings, db, self.intake, Links(settings.link_keys))
        self.client = new_client()
        fetcher = Fetcher(Rules.from_settings(settings))
        adapters = {each.name: adapter for each in settings.pipelines if (adapter := adapter_of(each, self.client))}
        self.counts = WorkCounts()
        marker = Marker(db, self.intake, None)
        self.worker = GenerationWorker(db, self.intake, self.generation, fetcher, adapters, marker, self.counts)

    async def job(self, outputs: int = 1, pipeline: str | None = None, max_bytes: int = 3_000_000) -> Job:
        wish = JobWish(
            outputs=[OutputWish(media_type="image", max_bytes=max_bytes)] * outputs,
            pipeline=pipeline,
            model="m",
            prompt="p",
            parameters={"steps": 3},
            ttl_seconds=600,
        )
        return await self.generation.create("ada", wish)

    async def file_ids(self, job: Job) -> list[UUID]:
        return [output.file_id for output in (await rows.get_outputs(self.db, [job.id]))[job.id]]

    async def states(self, job: Job) -> list[tuple[OutputState, str | None]]:
        return [(output.state, output.reason) for output in (await rows.get_outputs(self.db, [job.id]))[job.id]]

    async def state(self, job: Job) -> str:
        return (await rows.get_job(self.db, "ada", job.id)).state

    async def used(self) -> tuple[int, int]:
        user = await get_user(self.db, "ada")
        return user.total_bytes, user.reserved_bytes


@pytest.fixture
async def coffer(settings: Settings, db: Database, volume: Path) -> AsyncIterator[Coffer]:
    vault = Vault(settings.volume_reserve_bytes)
    await vault.refresh(await list_volumes(db))
    made = Coffer(settings, db, vault)
    yield made
    await made.client.aclose()
    vault.close()


async def test_an_output_that_lies_elsewhere_is_fetched_once(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/a.png"] = (200, image(2_000_000))
    job = await coffer.job(2)
    (first, _) = await coffer.file_ids(job)
    assert await rows.fetch_output(coffer.db, job.id, 0, f"{elsewhere.url}/a.png") == "fetching"
    for _ in range(2):
        await coffer.worker.handle(f"fetch {first}", 0)
    assert len(elsewhere.asked) == 1
    assert await coffer.states(job) == [("stored", None), ("awaited", None)]
    assert await coffer.used() == (2_000_000, 3_000_000)
    assert coffer.counts.take() == {("output_fetch", "stored"): 1}
    media = await get_media(coffer.db, "ada", first)
    assert (media.original_url, media.source_type) == (f"{elsewhere.url}/a.png", "generated")


async def test_what_is_refused_for_good_gives_the_output_up(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/film"] = (200, video(5_000))
    elsewhere.routes["/large"] = (200, image(10_001))
    job = await coffer.job(3, max_bytes=10_000)
    ids = await coffer.file_ids(job)
    for index, path in enumerate(("film", "large", "gone")):
        await rows.fetch_output(coffer.db, job.id, index, f"{elsewhere.url}/{path}")
        await coffer.worker.handle(f"fetch {ids[index]}", 0)
    assert await coffer.states(job) == [("failed", "type_mismatch"), ("failed", "too_large"), ("failed", "status_404")]
    assert (await coffer.state(job), await coffer.used()) == ("failed", (0, 0))
    assert coffer.counts.take() == {("output_fetch", "failed"): 3}


async def test_what_leads_to_an_internal_address_is_never_asked_for(coffer: Coffer, elsewhere: Site) -> None:
    port = elsewhere.url.rpartition(":")[2]
    job = await coffer.job(2)
    for index, file_id in enumerate(await coffer.file_ids(job)):
        await rows.fetch_output(coffer.db, job.id, index, (f"http://[::1]:{port}/a.png", f"http://127.0.0.2:{port}/a.png")[index])
        await coffer.worker.handle(f"fetch {file_id}", 0)
    assert await coffer.states(job) == [("failed", "url_refused")] * 2
    assert elsewhere.asked == [] and await coffer.used() == (0, 0)


async def test_what_may_pass_is_tried_again_until_the_end_of_the_job(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/busy"] = (503, b"")
    job = await coffer.job()
    (file_id,) = await coffer.file_ids(job)
    await rows.fetch_output(coffer.db, job.id, 0, f"{elsewhere.url}/busy")
    delays = []
    for tries in (*range(9), 2_000):
        with pytest.raises(Retry) as later:
            await coffer.worker.handle(f"fetch {file_id}", tries)
        delays.append(later.value.delay_seconds)
    assert delays == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert await coffer.states(job) == [("fetching", None)]
    await coffer.db.write("update generation_jobs set expires_at = clock_timestamp() + interval '200 seconds'")
    with pytest.raises(Retry):
        await coffer.worker.handle(f"fetch {file_id}", 5)
    await coffer.worker.handle(f"fetch {file_id}", 8)
    assert (await coffer.states(job), await coffer.used()) == ([("failed", "status_503")], (0, 0))


async def test_nothing_is_fetched_for_a_cancelled_job(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/a.png"] = (200, image())
    job = await coffer.job()
    (file_id,) = await coffer.file_ids(job)
    await rows.fetch_output(coffer.db, job.id, 0, f"{elsewhere.url}/a.png")
    await rows.cancel_job(coffer.db, "ada", job.id)
    await coffer.worker.handle(f"fetch {file_id}", 0)
    assert elsewhere.asked == [] and await coffer.used() == (0, 0)


async def test_an_output_that_is_cancelled_while_it_is_fetched_is_not_stored(coffer: Coffer, elsewhere: Site) -> None:
    job = await coffer.job()
    (file_id,) = await coffer.file_ids(job)
    loop = asyncio.get_running_loop()

    def cancel_and_reply(_: Asked) -> Reply:
        asyncio.run_coroutine_threadsafe(rows.cancel_job(coffer.db, "ada", job.id), loop).result(30)
        return 200, image(5_000)

    elsewhere.routes["/a.png"] = cancel_and_reply
    await rows.fetch_output(coffer.db, job.id, 0, f"{elsewhere.url}/a.png")
    with pytest.raises(Retry):
        await coffer.worker.handle(f"fetch {file_id}", 0)
    await coffer.worker.handle(f"fetch {file_id}", 1)
    assert (await coffer.state(job), await coffer.used()) == ("cancelled", (0, 0))
    assert (await list_files(coffer.db, "ada", FileQuery(limit=10))).files == []


async def test_a_worker_that_stops_lets_go_of_what_it_fetches(coffer: Coffer, elsewhere: Site) -> None:
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hang(_: Asked) -> Reply:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait(60)
        return 200, image(5_000)

    elsewhere.routes["/a.png"] = hang
    job = await coffer.job()
    (file_id,) = await coffer.file_ids(job)
    await rows.fetch_output(coffer.db, job.id, 0, f"{elsewhere.url}/a.png")
    handling = asyncio.create_task(coffer.worker.handle(f"fetch {file_id}", 3))
    await asyncio.wait_for(reached.wait(), 30)
    coffer.worker.stop()
    with pytest.raises(Retry) as later:
        await handling
    go_on.set()
    assert (later.value.delay_seconds, await coffer.states(job)) == (0, [("fetching", None)])
    claimed = await coffer.db.read("select claimed_until from uploads where id = $1", file_id)
    assert claimed[0]["claimed_until"] is None


async def test_the_queue_brings_it_and_what_was_lost_is_derived(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/a.png"] = (200, image(5_000))
    job = await coffer.job()
    await rows.fetch_output(coffer.db, job.id, 0, f"{elsewhere.url}/a.png")
    await coffer.db.write("delete from pgqueuer")
    assert (await coffer.worker.derive(), await coffer.worker.derive()) == (1, 0)
    stopping = asyncio.Event()

    running = asyncio.create_task(
        run_text_jobs(coffer.settings.database_url, ENTRYPOINT, coffer.worker.handle, stopping, heartbeat_seconds=20)
    )
    await eventually(lambda: coffer.state(job), lambda state: state == "completed")
    stopping.set()
    await running
    assert await coffer.used() == (5_000, 0)


async def test_a_restored_store_calls_nobody_before_it_counts(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes |= {"/a.png": (200, image(5_000)), "/run": as_json(202, id="call-7")}
    job, dispatched = await coffer.job(), await coffer.job(pipeline="gpu")
    (file_id,) = await coffer.file_ids(job)
    await rows.fetch_output(coffer.db, job.id, 0, f"{elsewhere.url}/a.png")
    await stop_uploads(coffer.db, "restored")
    payloads = {f"fetch {file_id}", f"dispatch {dispatched.id}"}
    for payload in payloads:
        await coffer.worker.handle(payload, 0)
    await coffer.db.write("delete from pgqueuer")  # as of jobs that are done
    assert elsewhere.asked == [] and await coffer.worker.derive() == 0
    await clear_upload_stops(coffer.db)
    assert await coffer.worker.derive() == 2
    queued = await coffer.db.read("select convert_from(payload, 'UTF8') as payload, attempts from pgqueuer where entrypoint = 'generation'")
    assert {(row["payload"], row["attempts"]) for row in queued} == {(payload, 0) for payload in payloads}
    for payload in payloads:
        await coffer.worker.handle(payload, 0)
    assert {asked.path for asked in elsewhere.asked} == {"/a.png", "/run"}


# Pipelines that Coffer calls


async def test_a_job_is_dispatched_signed_and_once(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/run"] = as_json(202, id="call-7")
    job = await coffer.job(2, pipeline="gpu")
    for _ in range(2):
        await coffer.worker.handle(f"dispatch {job.id}", 0)
    (asked,) = elsewhere.asked
    told = Webhook(NEW_SECRET).verify(asked.body, asked.headers)
    assert told["type"] == "job.created"
    data = told["data"]
    assert (data["job_id"], data["model"], data["prompt"], data["parameters"]) == (str(job.id), "m", "p", {"steps": 3})
    assert [place["url"].startswith("https://media.example.com/u/") for place in data["uploads"]] == [True, True]
    assert data["webhook"]["url"] == f"https://media.example.com/api/generate/webhook?job={job.id}"
    found = await rows.get_job(coffer.db, "ada", job.id)
    assert (found.state, found.remote_id) == ("running", "call-7")
    assert await coffer.worker.derive() == 0


async def test_a_dispatch_that_fails_is_repeated_as_one_message_and_then_fails_the_job(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/run"] = (500, b"")
    job = await coffer.job(pipeline="gpu")
    for tries in range(MOST_TRIES - 1):
        with pytest.raises(Retry):
            await coffer.worker.handle(f"dispatch {job.id}", tries)
    assert len({asked.headers["webhook-id"] for asked in elsewhere.asked}) == 1
    await coffer.worker.handle(f"dispatch {job.id}", MOST_TRIES - 1)
    found = await rows.get_job(coffer.db, "ada", job.id)
    assert (found.state, found.error, await coffer.used()) == ("failed", "the pipeline answered 500", (0, 0))


async def test_a_refused_job_fails_at_once(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/run"] = (422, b"secret words")
    job = await coffer.job(pipeline="gpu")
    await coffer.worker.handle(f"dispatch {job.id}", 0)
    found = await rows.get_job(coffer.db, "ada", job.id)
    assert (found.state, found.error) == ("failed", "the pipeline answered 422")


async def test_a_model_api_is_asked_until_it_has_finished(coffer: Coffer, elsewhere: Site) -> None:
    elsewhere.routes["/predictions"] = as_json(201, id="p1", status="starting", urls={"get": f"{elsewhere.url}/predictions/p1"})
    elsewhere.routes["/predictions/p1"] = as_json(200, id="p1", status="processing", progress=40)
    elsewhere.routes["/0.png"], elsewhere.routes["/1.png"] = (200, image(5_000)), (200, image(6_000))
    job = await coffer.job(2, pipeline="model")
    with pytest.raises(Retry) as later:
        await coffer.worker.handle(f"dispatch {job.id}", 0)
    assert later.value.delay_seconds == 1
    submitted = elsewhere.asked[0]
    assert (submitted.headers["authorization"], submitted.headers["idempotency-key"]) == ("Bearer t0ken", str(job.id))
    assert json.loads(submitted.body) == {"model": "m", "prompt": "p", "parameters": {"steps": 3}, "references": [], "outputs": 2}
    with pytest.raises(Retry):
        await coffer.worker.handle(f"dispatch {job.id}", 100)
    assert (await rows.get_job(coffer.db, "ada", job.id)).progress_percent == 40
    elsewhere.routes["/predictions/p1"] = (500, b"")
    with pytest.raises(Retry):
        await coffer.worker.handle(f"dispatch {job.id}", 100)
    output = [f"{elsewhere.url}/0.png", f"{elsewhere.url}/1.png"]
    elsewhere.routes["/predictions/p1"] = as_json(200, id="p1", status="succeeded", output=output)
    await coffer.worker.handle(f"dispatch {job.id}", 101)
    assert await coffer.states(job) == [("fetching", None)] * 2
    for file_id in await coffer.file_ids(job):
        await coffer.worker.handle(f"fetch {file_id}", 0)
    assert (await coffer.state(job), await coffer.used()) == ("completed", (11_000, 0))


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ({"status": "failed", "error": "NSFW"}, "NSFW"),
        ({"status": "canceled"}, "canceled"),
        ({"status": "succeeded"}, "the pipeline named no output that can be fetched"),
        ({"status": "succeeded", "output": ["file:///etc/passwd"]}, "the pipeline named no output that can be fetched"),
    ],
)
async def test_a_model_api_that_fails_fails_the_job(coffer: Coffer, elsewhere: Site, reply: dict[str, Any], error: str) -> None:
    elsewhere.routes["/predictions"] = as_json(201, id="p 1")
    elsewhere.routes["/predictions/p%201"] = as_json(200, **reply)
    job = await coffer.job(pipeline="model")
    with pytest.raises(Retry):
        await coffer.worker.handle(f"dispatch {job.id}", 0)
    await coffer.worker.handle(f"dispatch {job.id}", 1)
    found = await rows.get_job(coffer.db, "ada", job.id)
    assert (found.state, found.error) == ("failed", error)


@pytest.mark.parametrize("where", ["http://127.0.0.1:1/steal", "https://example.com/x", "/predictions/1", "nonsense"])
async def test_the_token_goes_nowhere_else(coffer: Coffer, elsewhere: Site, where: str) -> None:
    elsewhere.routes["/predictions"] = as_json(201, urls={"get": where})
    job = await coffer.job(pipeline="model")
    await coffer.worker.handle(f"dispatch {job.id}", 0)
    assert (await coffer.state(job), len(elsewhere.asked)) == ("failed", 1)


async def test_redirects_and_proxies_lead_nowhere(coffer: Coffer, elsewhere: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    elsewhere.routes["/run"] = (302, b"")
    job = await coffer.job(pipeline="gpu")
    await coffer.worker.handle(f"dispatch {job.id}", 0)
    assert (await coffer.state(job), len(elsewhere.asked)) == ("failed", 1)
