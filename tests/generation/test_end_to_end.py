"""An app, a server, a worker and a pipeline, each on its own: from the wish to the media, also when the worker is killed."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from standardwebhooks import Webhook

from tests.generation.fakes import Asked, Reply, Site, as_json, site
from tests.generation.impatient_worker import impatient_worker
from tests.generation.speaking import NEW_SECRET, message, signed, status, usage
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until
from tests.working import BackgroundWorker

Start = Callable[[], BackgroundWorker]


@pytest.fixture
def gpu() -> Iterator[Site]:
    with site() as found:
        yield found


@pytest.fixture
def settings(gpu: Site) -> dict[str, Any]:
    pipelines = [{"name": "gpu", "adapter": "dispatch", "url": f"{gpu.url}/run", "secrets": [NEW_SECRET], "presets": ["character"]}]
    return {"COFFER_PIPELINES": msgspec.json.encode(pipelines).decode(), "COFFER_FETCH_PRIVATE_NETWORKS": "127.0.0.1/32"}


@pytest.fixture
def running(start_server: ServerFactory, settings: dict[str, Any]) -> RunningServer:
    return start_server(**settings)


@pytest.fixture
def start_worker(running: RunningServer, settings: dict[str, Any], tmp_path: Path) -> Iterator[Start]:
    started: list[BackgroundWorker] = []

    def start() -> BackgroundWorker:
        started.append(impatient_worker(running, tmp_path / "worker.log", settings))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_from_the_wish_to_the_media(running: RunningServer, gpu: Site, start_worker: Start) -> None:
    read: list[bytes] = []

    def run(asked: Asked) -> Reply:
        """The function on a GPU: reads the reference, uploads a picture, names a URL for the other."""
        ticket = Webhook(NEW_SECRET).verify(asked.body, asked.headers)["data"]
        with httpx.Client(timeout=30) as client:
            read.append(client.get(ticket["references"][0]["url"]).content)
            client.put(ticket["uploads"][0]["url"], content=image(50_000)).raise_for_status()
            outputs = [{"index": 1, "url": f"{gpu.url}/1.png"}]
            body = message("job.completed", ticket["job_id"], outputs=outputs, credits_used=2)
            url, secret = ticket["webhook"]["url"], ticket["webhook"]["secret"]
            client.post(url, content=body, headers=signed(secret, body)).raise_for_status()
        return as_json(202, id="run-1")

    gpu.routes |= {"/run": run, "/1.png": (200, image(2_000_000, seed=1))}
    start_worker()
    with running.client("ada") as ada:
        reference = ada.post("/api/files/upload", content=image(700, seed=2)).json()["id"]
        wish = {"entity_id": "mira", "name": "Mira", "count": 2, "max_bytes": 3_000_000, "references": [reference]}
        made = ada.post("/api/generate/character", json=wish)
        assert made.status_code == 201, made.text
        job_id = made.json()["job_id"]
        until(lambda: status(ada, job_id)["finished_at"])
        job = status(ada, job_id)
        assert (job["state"], job["progress_percent"], job["credits_used"]) == ("completed", 100, 2)
        assert read == [image(700, seed=2)]
        first, second = (output["file_id"] for output in job["outputs"])
        assert ada.get(f"/api/files/{second}/download").content == image(2_000_000, seed=1)
        found = ada.get("/api/media", params={"entity_type": "character", "entity_id": "mira", "type": "image"}).json()["media"]
        assert {media["id"] for media in found} == {first, second}
        assert {media["original_url"] for media in found} == {None, f"{gpu.url}/1.png"}
        assert {media["credits_used"] for media in found} == {1}
        assert usage(ada) == (700 + 50_000 + 2_000_000, 0)
    assert [asked.path for asked in gpu.asked] == ["/run", "/1.png"]
    (event,) = execute(running.database_url, "select payload::text from events where type = 'job.completed'")
    assert "whsec" not in event["payload"] and "Mira" not in event["payload"]


def test_a_worker_that_is_killed_while_it_fetches_leaves_the_rest_to_the_next(
    running: RunningServer, gpu: Site, start_worker: Start
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slow(_: Asked) -> Reply:
        reached.set()
        go_on.wait(60)
        return 200, video(3_000_000)

    gpu.routes["/film"] = slow
    worker = start_worker()
    with running.client("bob") as bob, httpx.Client(base_url=running.url) as pipeline:
        made: dict[str, Any] = bob.post("/api/generate", json={"outputs": [{"type": "video", "max_bytes": 3_000_000}]}).json()
        body = message("job.completed", made["job_id"], outputs=[{"index": 0, "url": f"{gpu.url}/film"}])
        secret = made["webhook"]["secret"]
        pipeline.post(made["webhook"]["url"], content=body, headers=signed(secret, body)).raise_for_status()
        assert reached.wait(60)
        worker.kill()
        go_on.set()
        start_worker()
        until(lambda: status(bob, made["job_id"])["finished_at"], timeout_seconds=120)
        assert (status(bob, made["job_id"])["state"], usage(bob)) == ("completed", (3_000_000, 0))
        assert len(bob.get("/api/files").json()["files"]) == 1
