"""`GET /api/files/events`, with real streams from a real server."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest

from server.api.streams import MOST_STREAMS_PER_USER
from server.auth import Scope
from server.ledger import Finished
from server.ledger.notices import MOST_FINISHED_REMEMBERED
from tests.previews.conftest import WorkerFactory
from tests.previews.test_queue import upload
from tests.samples import PNG_START, image, video
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

LONGEST_USER_ID = "\N{ROCKET}" * 255


@contextmanager
def stream(client: httpx.Client) -> Iterator[tuple[httpx.Response, Iterator[str]]]:
    with client.stream("GET", "/api/files/events") as answer:
        assert answer.status_code == 200, answer.read()
        yield answer, answer.iter_lines()


def next_event(lines: Iterator[str]) -> dict[str, Any]:
    """The next event's file; comments and `retry` are passed over."""
    for line in lines:
        if line == "event: preview":
            event: dict[str, Any] = json.loads(next(lines).removeprefix("data: "))
            assert next(lines) == ""
            return event
        assert line in {"", ":", "retry: 2000"}
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize("user_id", ["ada", LONGEST_USER_ID])
def test_each_finished_preview_is_told_to_its_user_alone(server: RunningServer, start_worker: WorkerFactory, user_id: str) -> None:
    with server.client(user_id, timeout=40) as client, server.client("bob") as bob, stream(client) as (answer, lines):
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
        assert "ratelimit" in answer.headers
        upload(bob, image(4_000))
        good, bad = upload(client, image(5_000)), upload(client, PNG_START + b"never")
        start_worker()
        told = {event["id"]: event for event in (next_event(lines), next_event(lines))}
        assert told.keys() == {good, bad}
        assert [told[each]["preview_state"] for each in (good, bad)] == ["ready", "failed"]
        assert told[good] == client.get(f"/api/files/{good}").json()


def test_what_is_finished_once_the_answer_has_begun_is_told(server: RunningServer) -> None:
    """Even when nobody has listened before: the head comes when notices are heard."""
    with server.client("ada", timeout=20) as client:
        file_id = upload(client, image(5_000))
        with stream(client) as (_, lines):
            execute(
                server.database_url,
                "with done as (update user_files set preview_state = 'ready' returning id, user_id) "
                "select pg_notify('coffer_notice', id || ' ' || user_id) from done",
            )
            assert next_event(lines)["id"] == file_id


def test_a_stream_that_may_have_missed_something_ends(server: RunningServer) -> None:
    with server.client("ada", timeout=20) as client, stream(client) as (_, lines):
        execute(server.database_url, "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'coffer notices'")
        assert list(lines) == ["retry: 2000", ""]


def test_a_key_restricted_to_kinds_is_told_of_these_alone(server: RunningServer, start_worker: WorkerFactory) -> None:
    restricted = server.new_key(Scope.FILES_READ)
    execute(server.database_url, "update api_keys set kinds = '{video}' where key_id = split_part($1, '_', 2)", restricted)
    with server.client("ada") as client, server.client("ada", api_key=restricted, timeout=40) as watching, stream(watching) as (_, lines):
        upload(client, image(5_000))
        start_worker()
        until(lambda: execute(server.database_url, "select from user_files where preview_state = 'ready'"))
        moving = upload(client, video(5_000))
        assert next_event(lines)["id"] == moving


def test_it_needs_a_user_and_the_right_to_read(server: RunningServer) -> None:
    with server.client() as nobody, server.client("ada", api_key=server.new_key(Scope.FILES_WRITE)) as writer:
        assert [each.get("/api/files/events").status_code for each in (nobody, writer)] == [400, 403]
        refused = nobody.post("/api/files/events")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, OPTIONS")


def test_a_user_may_have_ten_streams(server: RunningServer) -> None:
    limits = httpx.Limits(max_connections=None)
    with ExitStack() as stack:
        client = stack.enter_context(server.client("ada"))
        bob = stack.enter_context(server.client("bob"))
        many = stack.enter_context(httpx.Client(base_url=server.url, headers=client.headers, limits=limits, timeout=10))
        streams = [stack.enter_context(ExitStack()) for _ in range(MOST_STREAMS_PER_USER)]
        for each in streams:
            each.enter_context(stream(many))
        refused = many.get("/api/files/events")
        assert (refused.status_code, refused.json()["code"], refused.json()["limit"]) == (429, "too_many_streams", MOST_STREAMS_PER_USER)
        assert refused.headers["retry-after"] == "30"
        stack.enter_context(stream(bob))
        streams[0].close()

        def another() -> bool:
            with many.stream("GET", "/api/files/events") as answer:
                return answer.status_code == 200

        until(another)


def test_a_server_that_stops_ends_streams_and_waits(server: RunningServer) -> None:
    def follow() -> list[str]:
        with server.client("ada", timeout=60) as client, stream(client) as (_, lines):
            return list(lines)

    with server.client("ada") as client:
        file_id = upload(client, image(5_000))

    def wait() -> str:
        with server.client("ada", timeout=60) as client:
            state: str = client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()["preview_state"]
            return state

    with ThreadPoolExecutor(2) as threads:
        following, waiting = threads.submit(follow), threads.submit(wait)
        until(lambda: "coffer_http_requests_in_flight 3.0" in metrics(server))
        server.stop()
        assert following.result() == ["retry: 2000", ""]  # its end, and no broken connection
        assert waiting.result() == "pending"
    assert "timeout graceful shutdown exceeded" not in server.logged()


def metrics(server: RunningServer) -> str:
    with server.client() as admin:
        return admin.get("/metrics").text


def test_who_does_not_read_costs_little_and_is_cut_off(start_server: ServerFactory) -> None:
    """Event after event of 16 KiB, while a client reads nothing: it is hung up on, and the server has not grown by what it missed."""
    server = start_server(COFFER_SLOW_DOWNLOAD_GRACE_SECONDS="2")
    with server.client("ada") as client:
        file_id = upload(client, image(600))
        client.patch(f"/api/files/{file_id}", json={"metadata": {"text": "x" * 15_000}}).raise_for_status()
        execute(server.database_url, "update user_files set preview_state = 'ready'")
        before = server.peak_memory_bytes()
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect((server.host, server.port))
            lines = ["GET /api/files/events HTTP/1.1", "Host: x", f"Authorization: Bearer {server.api_key}", "X-User-Id: ada", "", ""]
            lazy.sendall("\r\n".join(lines).encode())
            assert lazy.recv(12) == b"HTTP/1.1 200"

            def gone() -> bool:
                for _ in range(20):  # each is told by itself; the kernel's buffers take some
                    execute(server.database_url, "select pg_notify('coffer_notice', $1 || ' ada')", file_id)
                return "coffer_http_requests_in_flight 1.0" in metrics(server)

            until(gone)
        assert server.peak_memory_bytes() - before < 16 * 2**20


@pytest.mark.anyio
async def test_so_many_are_remembered_and_each_once() -> None:
    finished = Finished()
    ids = [uuid4() for _ in range(MOST_FINISHED_REMEMBERED)]
    for file_id in (*ids, *ids):
        finished.add(file_id)
    assert finished.take(2) == ids[:2]
    assert finished.take(5_000) == ids[2:]
    assert not finished.is_incomplete


@pytest.mark.anyio
async def test_more_than_is_remembered_is_told_as_such() -> None:
    finished = Finished()
    for _ in range(MOST_FINISHED_REMEMBERED + 1):
        finished.add(uuid4())
    await finished.wait()
    assert finished.is_incomplete
    assert finished.take(5_000) == []
