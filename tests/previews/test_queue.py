"""From the upload to the finished preview: jobs, rows, files on the volume, and what a killed worker leaves."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import httpx

from tests.previews.conftest import WorkerFactory
from tests.samples import PNG_START, image, video
from tests.serving import RunningServer, execute
from tests.waiting import until

STATES = "select preview_state as state, count(*)::integer as files from user_files group by 1"


def states(server: RunningServer) -> dict[str | None, int]:
    return {row["state"]: row["files"] for row in execute(server.database_url, STATES)}


def upload(client: httpx.Client, content: bytes) -> str:
    answer = client.post("/api/files/upload", content=content, params={"name": "a.png"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def previews_of(server: RunningServer, user_id: str, file_id: str) -> list[Path]:
    return sorted((server.volume / "users" / user_id / "previews" / file_id).glob("*"))


def test_an_upload_gets_its_previews(server: RunningServer, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada", timeout=40) as client:
        file_id = upload(client, image(5_000))
        before = client.get(f"/api/files/{file_id}").json()
        file = client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()
        assert (file["preview_state"], file["resolution"], file["width"], file["height"]) == ("ready", "1920x1080", 1920, 1080)
        assert (file["thumbhash"], file["average_color"], file["duration"]) == ("aGFzaA==", "#102030", None)
        assert before["updated_at"] == file["updated_at"]
        assert [path.name for path in previews_of(server, "ada", file_id)] == ["320.webp", "640.webp"]
        assert all(path.read_bytes() == image(5_000)[:1000] for path in previews_of(server, "ada", file_id))
        assert client.get("/api/storage/usage").json()["preview_bytes"] == 2_000
        assert client.get("/api/storage/usage").json()["used_bytes"] == 5_000
        moving = upload(client, video(5_000))
        file = client.get(f"/api/files/{moving}", params={"wait": "preview"}).json()
        assert (file["duration"], file["duration_seconds"]) == ("00:02:30", 150.2)
    assert execute(server.database_url, "select status from pgqueuer where status <> 'picked'") == []


def test_deleting_a_file_deletes_its_previews(server: RunningServer, start_worker: WorkerFactory) -> None:
    worker = start_worker()
    with server.client("ada", timeout=40) as client:
        file_id, kept = upload(client, image(5_000)), upload(client, image(6_000))
        for each in (file_id, kept):
            client.get(f"/api/files/{each}", params={"wait": "preview"})
        worker.stop()
        waiting = upload(client, image(7_000))
        for each in (file_id, waiting):
            assert client.delete(f"/api/files/{each}").status_code == 204
        assert client.get("/api/storage/usage").json()["preview_bytes"] == 2_000
    assert not (server.volume / "users" / "ada" / "previews" / file_id).exists()
    assert len(previews_of(server, "ada", kept)) == 2
    left = """select (select count(*) from tombstones) as tombstones, (select count(*) from previews) as previews,
                     (select count(*) from pgqueuer) as jobs"""
    assert dict(execute(server.database_url, left)[0]) == {"tombstones": 0, "previews": 2, "jobs": 0}


def test_replaced_bytes_get_new_previews(server: RunningServer, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada", timeout=40) as client:
        file_id = upload(client, image(5_000, 1))
        client.get(f"/api/files/{file_id}", params={"wait": "preview"})
        file = client.put(f"/api/files/{file_id}/content", content=image(6_000, 2)).json()
        assert (file["preview_state"], file["width"], file["thumbhash"]) == ("pending", None, None)
        assert client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()["preview_state"] == "ready"
        assert {path.read_bytes() for path in previews_of(server, "ada", file_id)} == {image(6_000, 2)[:1000]}
        client.put(f"/api/files/{file_id}/content", content=PNG_START + b"never").raise_for_status()
        file = client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()
        assert (file["preview_state"], file["preview_reason"]) == ("failed", "damaged")
        until(lambda: previews_of(server, "ada", file_id) == [])
        assert client.get("/api/storage/usage").json()["preview_bytes"] == 0


def test_bytes_replaced_while_their_preview_is_made(server: RunningServer, start_worker: WorkerFactory) -> None:
    start_worker(0.5)
    with server.client("ada", timeout=40) as client:
        file_id = upload(client, image(5_000, 1))
        until(lambda: execute(server.database_url, "select from pgqueuer where status = 'picked'"))
        client.put(f"/api/files/{file_id}/content", content=image(6_000, 2)).raise_for_status()
        assert client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()["preview_state"] == "ready"
        assert {path.read_bytes() for path in previews_of(server, "ada", file_id)} == {image(6_000, 2)[:1000]}


def test_what_cannot_be_made_says_why(server: RunningServer, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada", timeout=40) as client:
        found = {}
        for word in ("never", "unknown"):
            file_id = upload(client, PNG_START + word.encode())
            file = client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()
            found[word] = (file["preview_state"], file["preview_reason"])
    assert found == {"never": ("failed", "damaged"), "unknown": ("unsupported", "unsupported")}


def test_what_fails_is_tried_three_times_and_held(server: RunningServer, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada", timeout=40) as client:
        file_id = upload(client, PNG_START + b"broken")
        file = client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()
        assert (file["preview_state"], file["preview_reason"]) == ("failed", "error")
    until(lambda: execute(server.database_url, "select from pgqueuer where status = 'failed' and attempts = 2"))


def test_every_file_ends_with_its_preview_however_often_the_worker_is_killed(server: RunningServer, start_worker: WorkerFactory) -> None:
    chance = random.Random(12)
    with server.client("ada") as ada, server.client("bob") as bob:
        ids = {client: [upload(client, image(2_000, seed)) for seed in range(100)] for client in (ada, bob)}
    for _ in range(8):
        worker = start_worker(0.05)
        done = states(server).get("ready", 0)
        wanted = min(200, done + chance.randrange(1, 15))
        # Whoever is at work thrice when the worker is killed is not innocent: see test_faults.py.
        hit_twice = "select from user_files where preview_state = 'pending' and preview_tries > 1"
        until(
            lambda: states(server).get("ready", 0) >= wanted and not execute(server.database_url, hit_twice),  # noqa: B023 - called at once
            timeout_seconds=30,
        )
        worker.kill()
    assert states(server)["pending"] > 0
    start_worker()
    until(lambda: states(server) == {"ready": 200})
    for user_id, user_ids in zip(("ada", "bob"), ids.values(), strict=True):
        assert all(len(previews_of(server, user_id, file_id)) == 2 for file_id in user_ids)
    rows = execute(
        server.database_url,
        "select sum(preview_bytes)::integer as counted, (select sum(size_bytes) from previews)::integer as there from user_storage",
    )
    assert dict(rows[0]) == {"counted": 400_000, "there": 400_000}


def test_rows_without_jobs_get_them_back(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        for seed in range(3):
            upload(client, image(2_000, seed))
    assert len(execute(server.database_url, "delete from pgqueuer returning id")) == 3
    start_worker()
    until(lambda: states(server) == {"ready": 3})


def test_users_take_turns(server: RunningServer, start_worker: WorkerFactory) -> None:
    """A user's import of 300 is under way when another uploads one file: that one does not wait for the import."""
    with server.client("ada") as ada, server.client("bob", timeout=40) as bob:
        for seed in range(300):
            upload(ada, image(600, seed))
        # No import, however large, makes the queue long.
        assert len(execute(server.database_url, "select from pgqueuer")) == 255
        start_worker(0.02)
        until(lambda: states(server).get("ready", 0) >= 1)
        file_id = upload(bob, image(600))
        assert bob.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()["preview_state"] == "ready"
        assert states(server)["pending"] > 200
        until(lambda: states(server) == {"ready": 301})


def test_what_the_workers_did_is_told_to_metrics(server: RunningServer, start_worker: WorkerFactory) -> None:
    """Across workers, and of one that is stopped to the last."""
    for seed in range(2):
        worker = start_worker(0.3)
        with server.client("ada", timeout=40) as client:
            for content in (image(5_000, seed), PNG_START + b"never", video(5_000)):
                upload(client, content)
        until(lambda: states(server).get("pending") is None)
        worker.stop()
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("coffer_preview_duration"))}
    name = "coffer_preview_duration_seconds"
    counts = {key: value for key, value in values.items() if key.startswith(f"{name}_count")}
    assert counts == {
        f'{name}_count{{state="ready",type="image"}}': 2,
        f'{name}_count{{state="failed",type="image"}}': 2,
        f'{name}_count{{state="ready",type="video"}}': 2,
    }
    ready = 'state="ready",type="image"'
    buckets = [values[f'{name}_bucket{{le="{bound}",{ready}}}'] for bound in ("0.05", "0.25", "30.0", "180.0", "+Inf")]
    assert buckets == [0, 0, 2, 2, 2]
    assert values[f"{name}_sum{{{ready}}}"] >= 0.6


def test_waiting_ends_with_the_file_and_refuses_other_wishes(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada", timeout=40) as client:
        assert client.get(f"/api/files/{upload(client, image())}", params={"wait": "sunset"}).status_code == 400
        assert client.get(f"/api/files/{upload(client, image())}", params={"weight": "preview"}).status_code == 400


def test_an_admin_lists_retries_and_rebuilds(server: RunningServer, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada", timeout=40) as client:
        good, bad = upload(client, image(5_000)), upload(client, PNG_START + b"never")
        for each in (good, bad):
            client.get(f"/api/files/{each}", params={"wait": "preview"})
        (failed,) = [json.loads(line) for line in coffer(server, "previews", "list-failed", "--json").stdout.splitlines()]
        assert failed == {"id": bad, "user_id": "ada", "mime_type": "image/png", "reason": "damaged"}
        assert coffer(server, "previews", "retry", good).returncode == 3
        assert coffer(server, "previews", "retry", bad).stdout == "1 previews will be made again\n"
        assert client.get(f"/api/files/{bad}", params={"wait": "preview"}).json()["preview_state"] == "failed"
        assert coffer(server, "previews", "retry", "--all").stdout == "1 previews will be made again\n"
        shutil.rmtree(server.volume / "users" / "ada" / "previews")
        assert coffer(server, "previews", "rebuild").stdout == ""
        assert previews_of(server, "ada", good) == []
        assert coffer(server, "previews", "rebuild", "--user", "ada", "--for-real").stdout in {
            f"{n} previews will be made\n" for n in (1, 2)
        }
        until(lambda: client.get(f"/api/files/{good}").json()["preview_state"] == "ready" and len(previews_of(server, "ada", good)) == 2)
        assert client.get("/api/storage/usage").json()["preview_bytes"] == 2_000


def coffer(server: RunningServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "COFFER_DATABASE_URL": server.database_url, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
