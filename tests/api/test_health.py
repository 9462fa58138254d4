"""Liveness, readiness and start-up when something is missing."""

import json
import os
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

from tests.conftest import PostgresServer
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.waiting import until


def test_ready_tells_of_each_check(server: RunningServer) -> None:
    with server.client() as client:
        answer = client.get("/health/ready")
        body = answer.json()
        (volume,) = body["volumes"]
        assert (answer.status_code, body["status"], body["database"]["ok"], volume["ok"], volume["state"]) == (
            200,
            "ready",
            True,
            True,
            "open",
        )
        assert volume["free_bytes"] > 0 and str(server.volume) not in answer.text

        sentinel = server.volume / ".coffer-volume"
        kept = sentinel.read_bytes()
        sentinel.unlink()
        until(lambda: client.get("/health/ready").status_code == 503, timeout_seconds=20)
        (volume,) = client.get("/health/ready").json()["volumes"]
        assert (volume["ok"], volume["state"], volume["free_bytes"]) == (False, "unavailable", None)
        assert client.get("/health/live").json() == {"status": "alive"}
        sentinel.write_bytes(kept)
        until(lambda: client.get("/health/ready").status_code == 200, timeout_seconds=20)

        execute(server.database_url, "delete from schema_migrations where name = (select max(name) from schema_migrations)")
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json()["database"]["ok"]) == (503, False) and "coffer migrate" in answer.text


def test_a_server_without_a_volume_is_not_ready(server: RunningServer) -> None:
    server.stop()
    execute(server.database_url, "delete from volumes")
    server.start(wait_ready=False)
    with server.client() as client:
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json()["status"], answer.json()["volumes"]) == (503, "not_ready", [])


def test_it_starts_while_the_database_is_away_and_is_ready_once_it_is_back(
    server: RunningServer, postgres_server: PostgresServer, database_url: str
) -> None:
    server.stop()
    name, maintenance = urlsplit(database_url).path[1:], postgres_server.url_of("postgres")
    execute(maintenance, f"alter database {name} rename to {name}_away")
    try:
        server.start(wait_ready=False)
        with server.client("ada") as client:
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()["database"]["ok"]) == (503, False)
            for answer in (client.get("/api/files"), client.post("/api/files/upload", content=image())):
                assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
                assert int(answer.headers["retry-after"]) > 0
            execute(maintenance, f"alter database {name}_away rename to {name}")
            until(lambda: client.get("/health/ready").status_code == 200)
            assert client.post("/api/files/upload", content=image()).status_code == 201
    finally:
        server.stop()
        if execute(maintenance, "select 1 from pg_database where datname = $1", f"{name}_away"):
            execute(maintenance, f"alter database {name}_away rename to {name}")


def test_it_stops_cleanly_and_lets_a_running_request_finish(server: RunningServer) -> None:
    body = image(3_000_000)
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: ada\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:2_000_000])
        until(server.incoming)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        until(lambda: "Shutting down" in server.logged())
        connection.sendall(body[2_000_000:])
        assert connection.recv(100).split(b" ", 2)[1] == b"201"
    stopping.join()
    lines = [json.loads(line) for line in server.logged().splitlines()]
    assert lines[-1]["message"].startswith("Finished") and not [line for line in lines if line["level"] in ("warning", "error")]
    assert {line["message"] for line in lines if line["logger"] == "coffer"} == {"started", "stopped"}


def test_the_worker_waits_for_its_end(database_url: str) -> None:
    environment = {"COFFER_DATABASE_URL": database_url, "PATH": os.environ["PATH"]}
    with subprocess.Popen([sys.executable, "-m", "server.cli", "worker"], env=environment, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stderr
        assert json.loads(worker.stderr.readline())["message"].startswith("ready")
        worker.terminate()
        assert worker.wait(10) == 0 and json.loads(worker.stderr.readline())["message"] == "stopped"
