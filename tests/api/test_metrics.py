"""Metrics: what they count, and that several processes count together."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from server.metrics import VOLUME_STATES, Metrics, VolumeFacts
from tests.processes import command_of
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until


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
