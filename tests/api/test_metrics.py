"""Metrics: what they count, and that several processes count together."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from server.ledger import Database, RememberedFigures, StoreFigures
from server.ledger.queue import run_jobs
from server.metrics import VOLUME_STATES, Metrics, VolumeFacts
from server.settings import Settings
from tests.processes import command_of
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

BURY = """
insert into tombstones (volume_id, file_path, file_id, generation, created_at) values ($1, $2, $3, 1, now() - make_interval(secs => $4))
"""
HOLD = """
insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at) values ($1, 'ada', $2, 70, now() + make_interval(secs => $3))
"""


def scraped(server: RunningServer) -> dict[str, float]:
    """Every sample by its name and labels, from a process that happens to answer."""
    answer = httpx.get(f"{server.url}/metrics", timeout=20)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(answer.text)


def samples(text: str) -> dict[str, float]:
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    assert len({name for name, _ in pairs}) == len(pairs), "a sample is given twice"
    return {name: float(value) for name, value in pairs}


def requests(found: dict[str, float], route: str, method: str, status: int) -> float:
    return found.get(f'coffer_http_requests_total{{method="{method}",route="{route}",status="{status}"}}', 0)


def test_previews_that_wait_and_that_failed_are_told(server: RunningServer) -> None:
    with server.client("ada") as client:
        for seed in range(5):
            client.post("/api/files/upload", content=image(600, seed)).raise_for_status()
    fail = "update user_files set preview_state = 'failed' where id in (select id from user_files limit 2)"
    execute(server.database_url, fail)
    found = scraped(server)
    assert {name: value for name, value in found.items() if name.startswith("coffer_previews_")} == {
        "coffer_previews_waiting": 3,
        'coffer_previews_failed{type="audio"}': 0,
        'coffer_previews_failed{type="image"}': 2,
        'coffer_previews_failed{type="project"}': 0,
        'coffer_previews_failed{type="scene"}': 0,
        'coffer_previews_failed{type="video"}': 0,
    }


def test_volumes_are_told_as_they_are() -> None:
    found = samples(Metrics().expose([VolumeFacts("a", "open", 7), VolumeFacts("b", "unavailable", None)]).decode())
    assert found['coffer_volume_free_bytes{volume="a"}'] == 7 and 'coffer_volume_free_bytes{volume="b"}' not in found
    for volume, state in (("a", "open"), ("b", "unavailable")):
        told = {each: found[f'coffer_volume_state{{state="{each}",volume="{volume}"}}'] for each in VOLUME_STATES}
        assert told == {each: float(each == state) for each in VOLUME_STATES}


def test_what_is_stored_is_told_without_users(server: RunningServer) -> None:
    for user_id, max_bytes in (("ada", 10_000), ("bob", 1_000), ("eve", None)):
        server.set_quota(user_id, max_bytes)
        with server.client(user_id) as client:
            client.post("/api/files/upload", content=image(900)).raise_for_status()
    execute(server.database_url, "update user_files set damaged_at = now() where user_id = 'eve'")
    server.restart()  # figures are remembered for some seconds
    found = scraped(server)
    assert {
        name.removeprefix("coffer_"): found[name] for name in found if name.startswith(("coffer_users", "coffer_stored", "coffer_quota"))
    } == {
        "users": 3,
        "users_unlimited": 1,
        "stored_files": 3,
        "stored_bytes": 2_700,
        "quota_bytes": 11_000,
        'users_warned{percent="80"}': 0,
        'users_warned{percent="90"}': 1,
        'users_warned{percent="100"}': 0,
    }
    assert (found["coffer_database_up"], found["coffer_damaged_files"], found["coffer_worker_connections"]) == (1, 1, 0)
    facts = os.statvfs(server.volume)
    (size,) = (value for name, value in found.items() if name.startswith("coffer_volume_size_bytes"))
    (inodes,) = (value for name, value in found.items() if name.startswith("coffer_volume_inodes"))
    (free_inodes,) = (value for name, value in found.items() if name.startswith("coffer_volume_free_inodes"))
    assert (size, inodes) == (facts.f_blocks * facts.f_frsize, facts.f_files) and 0 < free_inodes <= inodes
    assert not [name for name in found if "ada" in name or "bob" in name]


def test_what_housekeeping_should_have_done_is_told(server: RunningServer) -> None:
    with server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=image(900)).json()["id"]
    server.stop()
    volume_id = execute(server.database_url, "select id from volumes")[0]["id"]
    away = uuid4()
    execute(server.database_url, "insert into volumes (id, mount_path) values ($1, '/nowhere')", away)
    for age, path in ((7_200, "users/ada/images/a.1.png"), (60, "users/ada/images/b.1.png")):
        execute(server.database_url, BURY, away, path, file_id, age)
    server.start(wait_ready=False)  # the other volume is away, so nothing can be buried there
    found = scraped(server)
    assert 7_200 <= found["coffer_tombstone_age_seconds"] < 7_500 and found["coffer_reservation_overdue_seconds"] == 0
    server.stop()
    execute(server.database_url, HOLD, uuid4(), volume_id, 5_000)
    assert figures_of(server.database_url).reservation_overdue_seconds == 0
    execute(server.database_url, HOLD, uuid4(), volume_id, -5_000)
    figures = figures_of(server.database_url)
    assert 5_000 <= figures.reservation_overdue_seconds < 5_300 and figures.reserved_bytes == 140


def test_generation_and_events_out_are_told(server: RunningServer) -> None:
    with server.client("ada") as ada, server.client() as admin:
        admin.post("/api/webhooks", json={"url": "https://app.example.com/"}).raise_for_status()
        jobs = [ada.post("/api/generate", json={"outputs": [{"max_bytes": 9_000}] * 2}).json() for _ in range(5)]
        for upload in (*jobs[0]["uploads"], jobs[1]["uploads"][0], jobs[2]["uploads"][0]):
            assert ada.put(upload["url"], content=image(900)).status_code == 201
        for job in jobs[2:4]:
            ada.post(f"/api/generate/{job['job_id']}/cancel").raise_for_status()
    sql = "update generation_jobs set created_at = now() - interval '500 seconds' where id = any ($1)"
    execute(server.database_url, sql, [jobs[1]["job_id"], jobs[4]["job_id"]])
    execute(server.database_url, "update generation_jobs set finished_at = now() - interval '61 minutes' where id = $1", jobs[3]["job_id"])
    first = "(select id from webhook_deliveries order by id limit 1)"
    execute(server.database_url, f"update webhook_deliveries set state = 'dead' where id = {first}")
    second = "(select id from webhook_deliveries where state = 'pending' order by id limit 1)"
    execute(server.database_url, f"update webhook_deliveries set give_up_at = give_up_at - interval '100 seconds' where id = {second}")
    for result, count in (("told", 7), ("failed", 2)):
        execute(server.database_url, "insert into work_counts values ('delivery', $1, $2)", result, count)
    execute(server.database_url, "insert into work_counts values ('output_fetch', 'stored', 3)")
    found = scraped(server)
    told = {
        name.removeprefix("coffer_"): found[name]
        for name in found
        if name.startswith(("coffer_generation", "coffer_webhook", "coffer_fetch"))
    }
    oldest = told.pop("generation_oldest_queued_seconds"), told.pop("webhook_oldest_pending_seconds")
    assert 500 <= oldest[0] < 800 and 100 <= oldest[1] < 400
    assert told == {
        'generation_jobs{state="queued"}': 1,
        'generation_jobs{state="running"}': 1,
        'generation_jobs_ended{state="completed"}': 1,
        'generation_jobs_ended{state="partly_completed"}': 0,
        'generation_jobs_ended{state="failed"}': 0,
        'generation_jobs_ended{state="cancelled"}': 1,
        'generation_jobs_ended{state="expired"}': 0,
        'generation_outputs_ended{state="stored"}': 3,
        'generation_outputs_ended{state="failed"}': 0,
        "generation_outputs_fetching": 0,
        "webhook_pending": 6,  # of four files and three ends, without the dead one
        "webhook_dead_letters": 1,
        'webhook_deliveries_total{result="failed"}': 2,
        'webhook_deliveries_total{result="told"}': 7,
        'fetches_total{purpose="output_fetch",result="stored"}': 3,
    }


def figures_of(database_url: str) -> StoreFigures:
    async def look() -> StoreFigures:
        db = Database(Settings(database_url=database_url))
        await db.open()
        try:
            return await RememberedFigures(db).get()
        finally:
            await db.close()

    return asyncio.run(look())


def test_workers_are_seen_by_their_connections(database_url: str) -> None:
    connected = asyncio.Event()
    seen: list[int] = []

    async def nothing(*_: object) -> None: ...

    async def look(db: Database) -> None:
        while not seen:
            if found := (await RememberedFigures(db).get()).worker_connections:
                seen.append(found)
                connected.set()

    async def work() -> None:
        db = Database(Settings(database_url=database_url))
        await db.open()
        try:
            await asyncio.wait_for(asyncio.gather(look(db), run_jobs(database_url, nothing, connected, heartbeat_seconds=20)), 60)
        finally:
            await db.close()

    asyncio.run(work())
    assert seen[0] > 0 and figures_of(database_url).worker_connections == 0


def test_figures_are_looked_up_once_in_a_while(server: RunningServer) -> None:
    server.set_quota("ada", 1_000)
    assert scraped(server)["coffer_users"] == 1
    server.set_quota("bob", 1_000)
    assert scraped(server)["coffer_users"] == 1


def test_without_its_database_the_rest_is_told() -> None:
    found = samples(Metrics().expose([VolumeFacts("a", "open", 7)]).decode())
    assert found["coffer_database_up"] == 0 and "coffer_users" not in found and found['coffer_volume_free_bytes{volume="a"}'] == 7


def test_requests_are_counted_by_template(api: RunningServer) -> None:
    before = scraped(api)
    with api.client("ada") as client:
        file_id = client.post("/api/files/upload", content=image()).json()["id"]
        client.get(f"/api/files/{file_id}/download")
        client.get(f"/api/files/{file_id}")
        client.get(f"/api/files/{uuid4()}/download")
        client.get("/api/files/nonsense/download")
        for number in range(20):
            client.get(f"/nowhere/{number}")
            client.get(f"/api/users/nobody%2F{number}")
        client.request("TRACE", "/api/files")
    after = scraped(api)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert requests(grown, "/api/files/upload", "POST", 201) == 1
    assert requests(grown, "/api/files/{file_id}/download", "GET", 200) == 1
    assert requests(grown, "/api/files/{file_id}/download", "GET", 404) == 1
    assert requests(grown, "/api/files/{file_id}", "GET", 200) == 1
    assert requests(grown, "unmatched", "GET", 404) == 21
    assert requests(grown, "/api/users/{user_id}", "GET", 404) == 20
    assert requests(grown, "unmatched", "OTHER", 405) == 1
    assert grown["coffer_http_received_bytes_total"] == 1_000 and grown["coffer_http_sent_bytes_total"] > 1_000
    assert after["coffer_http_requests_in_flight"] == 1  # the scrape itself
    assert not [name for name in after if "nobody" in name or "nowhere" in name or file_id in name or "cof_" in name]
    (volume_free,) = [value for name, value in after.items() if name.startswith("coffer_volume_free_bytes")]
    assert volume_free > 0


@pytest.fixture
def two_processes(start_server: ServerFactory) -> Iterator[RunningServer]:
    server = start_server(COFFER_PROCESSES="2")
    until(lambda: server.logged().count('"message":"started"') == 2)
    yield server
    server.stop()
    assert "Traceback" not in server.logged()


def serving(server: RunningServer) -> set[int]:
    """The processes that answer requests, below the one that was started."""
    pids = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return {int(pid) for pid in pids if "spawn_main" in command_of(int(pid))}


def test_two_processes_count_together_and_a_killed_one_is_forgotten(two_processes: RunningServer) -> None:
    server = two_processes
    for _ in range(40):
        httpx.get(f"{server.url}/health/live")  # each on a connection of its own, so both processes get some
    assert {requests(scraped(server), "/health/live", "GET", 200) for _ in range(10)} == {40}
    # A process that is killed in mid-request leaves a gauge of 1 behind, which must not be counted for ever.
    victim = next(iter(serving(server)))
    held = []
    for _ in range(16):
        connection = socket.create_connection((server.host, server.port))
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: ada\r\n"
        connection.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + image(1_000))
        held.append(connection)
    until(lambda: scraped(server)["coffer_http_requests_in_flight"] >= 17)
    os.kill(victim, signal.SIGKILL)
    for connection in held:
        connection.close()
    until(lambda: victim not in serving(server) and len(serving(server)) == 2)
    until(lambda: scraped(server)["coffer_http_requests_in_flight"] == 1)
    assert requests(scraped(server), "/health/live", "GET", 200) >= 40  # what the dead one had counted stays counted
