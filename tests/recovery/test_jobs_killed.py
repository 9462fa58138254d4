"""Server and worker are killed while pipelines bring the outputs of jobs: every job ends as it should, each output is stored once.

`COFFER_TEST_JOBS=200 COFFER_TEST_KILLS=40` is its whole length.
"""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.fetching.peer import Asked, Peer, Say, always, in_thread
from tests.generation.impatient_worker import impatient_worker
from tests.generation.speaking import inline, tell
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until
from tests.working import BackgroundWorker

KILLS = int(os.environ.get("COFFER_TEST_KILLS", "6"))
JOBS = int(os.environ.get("COFFER_TEST_JOBS", "40"))
SIZES = (2_000, 40_000, 1_500_000)  # in memory, and on the disk
PATIENCE_SECONDS = 180
OUTSIDE = "127.0.0.2"
WAYS = ("inline", "upload and inline", "upload and url", "url and nowhere", "cancelled")
"""How a job's two outputs come."""


class Done(NamedTuple):
    """A job's way, its id and those of its outputs, and whether whoever sent the first one was told that it is stored."""

    number: int
    way: str
    job_id: str
    file_ids: list[str]
    first_is_stored: bool


def test_every_job_ends_with_each_output_stored_once(start_server: ServerFactory, tmp_path: Path) -> None:
    settings = {"COFFER_FETCH_PRIVATE_NETWORKS": f"{OUTSIDE}/32"}
    server = start_server(COFFER_FETCH_PRIVATE_NETWORKS=f"{OUTSIDE}/32")
    chance = random.Random(3)
    ended = threading.Semaphore(0)

    async def give(asked: Asked, say: Say) -> None:
        number, index = asked.path.split("/")[1:]
        body = b"" if number == "nowhere" else _content(int(number), int(index))
        await always(404 if number == "nowhere" else 200, body)(asked, say)

    def work(number: int, elsewhere: str) -> Done:
        made = _run_job(server, number, elsewhere)
        ended.release()
        return made

    def start_worker() -> BackgroundWorker:
        return impatient_worker(server, tmp_path / "worker.log", settings)

    worker = start_worker()
    try:
        with in_thread(Peer(give, OUTSIDE)) as peer, ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(work, number, peer.url) for number in range(JOBS)]
            for _ in range(KILLS):
                for _ in range(chance.randrange(1, JOBS // KILLS)):
                    assert ended.acquire(timeout=PATIENCE_SECONDS)
                victims = chance.choice([("server",), ("worker",), ("server", "worker")])
                if "worker" in victims:
                    worker.kill()
                    worker = start_worker()
                if "server" in victims:
                    server.kill()
                    server.start()
            done = [job.result(PATIENCE_SECONDS) for job in jobs]
            open_jobs = "select count(*) as n from generation_jobs where finished_at is null"
            until(lambda: execute(server.database_url, open_jobs)[0]["n"] == 0, timeout_seconds=PATIENCE_SECONDS)
            server.settle()
    finally:
        worker.kill()
    _check(server, done)


def _check(server: RunningServer, done: list[Done]) -> None:
    jobs = execute(server.database_url, "select id::text, state from generation_jobs")
    ends = {"url and nowhere": "partly_completed", "cancelled": "cancelled"}
    assert {row["id"]: row["state"] for row in jobs} == {each.job_id: ends.get(each.way, "completed") for each in done}
    outputs = execute(server.database_url, "select file_id::text as id, state, reason from generation_outputs")
    stored = {row["id"] for row in outputs if row["state"] == "stored"}
    expected = {file_id: (each.number, index) for each in done for index, file_id in enumerate(each.file_ids)}
    for each in done:
        first, second = (file_id in stored for file_id in each.file_ids)
        match each.way:
            case "url and nowhere":
                assert (first, second) == (True, False)
            case "cancelled":
                assert not second and (first or not each.first_is_stored)
            case _:
                assert first and second
    files = execute(server.database_url, "select id::text, encode(sha256, 'hex') as sha256, file_size, file_path from user_files")
    assert {row["id"]: row["sha256"] for row in files} == {
        file_id: hashlib.sha256(_content(*expected[file_id])).hexdigest() for file_id in stored
    }
    for row in files:  # what a kill left without a row is garbage for the audit, and harms nobody
        assert hashlib.sha256((server.volume / row["file_path"]).read_bytes()).hexdigest() == row["sha256"]
    assert {row["id"] for row in execute(server.database_url, "select id::text from generated_media")} == stored
    told = execute(server.database_url, "select payload ->> 'job_id' as id from events where type like 'job.%'")
    assert sorted(row["id"] for row in told) == sorted(each.job_id for each in done)
    (used,) = execute(server.database_url, "select sum(total_bytes) as total, sum(reserved_bytes) as reserved from user_storage")
    assert (used["total"], used["reserved"]) == (sum(row["file_size"] for row in files), 0)


def _size(number: int, index: int) -> int:
    return SIZES[(number + index) % len(SIZES)] + number


def _content(number: int, index: int) -> bytes:
    return image(_size(number, index), seed=number)


def _run_job(server: RunningServer, number: int, elsewhere: str) -> Done:
    """One job from its creation until all is said, by somebody who does not give up."""
    way = WAYS[number % len(WAYS)]
    outputs = [{"type": "image", "max_bytes": _size(number, index)} for index in range(2)]
    with server.client(f"user {number % 3}", timeout=40) as app, httpx.Client(base_url=server.url, timeout=40) as pipeline:
        job: dict[str, Any] = _until_answered(
            lambda: app.post("/api/generate", json={"outputs": outputs}, headers={"Idempotency-Key": str(number)}), 201
        ).json()

        def put() -> httpx.Response:
            return pipeline.put(job["uploads"][0]["url"], content=_content(number, 0))

        first, second = inline(_content(number, 0)), inline(_content(number, 1), 1)
        first_is_stored = False
        if way == "cancelled":
            with suppress(httpx.TransportError):
                first_is_stored = put().status_code == 201
            _until_answered(lambda: app.post(f"/api/generate/{job['job_id']}/cancel"), 200)
            brought = [second]  # too late
        elif way == "inline":
            brought = [first, second]
        elif way == "url and nowhere":
            brought = [{"index": 0, "url": f"{elsewhere}/{number}/0"}, {"index": 1, "url": f"{elsewhere}/nowhere/1"}]
        else:
            _until_stored(app, job, put)
            brought = [second] if way == "upload and inline" else [{"index": 1, "url": f"{elsewhere}/{number}/1"}]
        _until_answered(lambda: tell(pipeline, job, "job.completed", message_id=f"m{number}", outputs=brought), 200)
    return Done(number, way, job["job_id"], [place["file_id"] for place in job["uploads"]], first_is_stored)


def _until_answered(ask: Callable[[], httpx.Response], status: int) -> httpx.Response:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            answer = ask()
            if answer.status_code == status:
                return answer
            assert answer.status_code in {409, 429, 503}, answer.text
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _until_stored(app: httpx.Client, job: dict[str, Any], put: Callable[[], httpx.Response]) -> None:
    def stored() -> bool:
        try:
            put()
            found = app.get(f"/api/generate/status/{job['job_id']}").json()
        except (httpx.TransportError, ValueError):
            return False
        return "outputs" in found and found["outputs"][0]["state"] == "stored"

    until(stored, timeout_seconds=PATIENCE_SECONDS)
