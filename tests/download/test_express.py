"""Links and public files that are answered where the request is read: the same answers, counted and logged alike, on every connection."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_network
from typing import Any

import httpx
import pytest

from server.api import express, sendfile
from tests.download.here import Stage, connected, is_same, reply, request, serving_here, settings_of, told_of_requests
from tests.linking import link, stored
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, SharedServer
from tests.waiting import until

SMALL, LARGE = image(20_000), image(2**21 - 1, seed=1)
DIFFERING = {"date", "x-request-id"}


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> Iterator[RunningServer]:
    """One for all tests: what they look at is in this process."""
    with shared_server() as server:
        yield server


@pytest.fixture
def stage(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """What was answered is remembered for as long as the test takes."""
    monkeypatch.setattr("server.delivery.recent.KEPT_SECONDS", 1_000.0)
    told = told_of_requests(monkeypatch)
    with server.client("ada") as ada:
        small, large = (stored(ada, body) for body in (SMALL, LARGE))
        paths = {"small": link(ada, small), "saved": link(ada, small, disposition="attachment"), "large": link(ada, large)}
        paths["public"] = ada.put(f"/api/files/{small}/public", json={"is_public": True}).json()["url"]
        settings = settings_of(
            server, trusted_proxies=(ip_network("127.0.0.1"),), accel_redirect_prefix="/files", cors_origins=("https://a.example",)
        )
        with serving_here(settings) as here:
            yield Stage(server, here, told, paths)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections take 100,000 bytes at once."""
    real = os.sendfile
    monkeypatch.setattr(os, "sendfile", lambda out, file, offset, count: real(out, file, offset, min(count, 100_000)))


@pytest.mark.parametrize("name", ["small", "saved", "public", "large"])
@pytest.mark.parametrize("headers", [(), ("X-Forwarded-For: 192.0.2.7",), ("Origin: https://a.example",)], ids=["", "nginx", "page"])
@pytest.mark.usefixtures("narrow")
def test_the_same_answer(stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str, headers: tuple[str, ...]) -> None:
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)  # max-age counts down
    body = b"" if headers and "Forwarded" in headers[0] else LARGE if name == "large" else SMALL
    one = stage.ask(name, *headers)
    assert (one.status, one.body, stage.passed_on) == (200, body, 1)
    other = stage.ask(name, "X-Request-Id: mine", *headers)
    assert other.body == body and is_same(one, other, DIFFERING) and other.headers["x-request-id"] == "mine"
    assert ("x-accel-redirect" in other.headers) == (not body)
    assert stage.passed_on == (2 if name == "large" and body else 1)  # its client does not take all of it at once
    assert stage.ask(name, *headers).headers["x-request-id"] not in ("mine", one.headers["x-request-id"])


def test_it_is_told_alike(stage: Stage) -> None:
    for name in ("small", "public"):
        for headers in ((), ("X-Forwarded-For: 192.0.2.7",)):
            del stage.told[:]
            before = stage.passed_on
            for _ in range(2):
                assert ("x-accel-redirect" in stage.ask(name, "X-Request-Id: mine", *headers).headers) == bool(headers)
            assert stage.passed_on == before + (0 if headers else 1)
            until(lambda: len(stage.told) == 2)
            facts = [{key: value for key, value in each.items() if key != "began"} for each in stage.told]
            facts = [{"principal": None, "user_id": None} | each | {"client": each["client"][0]} for each in facts]
            assert facts[0] == facts[1]
            assert facts[0]["bytes_out"] == (0 if headers else len(SMALL))
            assert facts[0]["client"] == ("192.0.2.7" if headers else "127.0.0.1") and facts[0]["path"] is None


def test_what_asks_for_more_goes_the_ordinary_way(stage: Stage) -> None:
    stage.ask("small")
    host, target = "Host: x\r\n", stage.paths["small"]
    for asked, status in (
        (f"HEAD {target} HTTP/1.1\r\n{host}\r\n", 200),
        (f"GET {target}?x HTTP/1.1\r\n{host}\r\n", 403),
        (f"GET {target}%20 HTTP/1.1\r\n{host}\r\n", 403),
        (f"GET /p{target[2:]} HTTP/1.1\r\n{host}\r\n", 404),
        (f"GET {target} HTTP/1.0\r\n{host}Connection: keep-alive\r\n\r\n", 200),
        (f"GET {target} HTTP/1.1\r\n{host}Connection: close\r\n\r\n", 200),
        (f"GET {target} HTTP/1.1\r\n{host}Range: bytes=0-0\r\n\r\n", 206),
        (f"GET {target} HTTP/1.1\r\n{host}If-None-Match: *\r\n\r\n", 304),
        (f"GET {target} HTTP/1.1\r\n{host}Content-Length: 3\r\n\r\nabc", 200),
        (f"GET {target} HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200),
    ):
        before = stage.passed_on
        with closing(stage.connect()) as client, client.makefile("rb") as stream:
            client.sendall(asked.encode())
            assert (reply(stream, to_head=asked.startswith("HEAD")).status, stage.passed_on) == (status, before + 1)
            client.sendall(request(stage.server, "/health/live"))
            assert "Connection: close" in asked or "HTTP/1.0" in asked or reply(stream).status == 200
    with closing(stage.connect()) as client, client.makefile("rb") as stream:
        client.sendall(f"GET {target}#x HTTP/1.1\r\n{host}\r\n".encode())
        assert reply(stream).status == 400


@pytest.mark.usefixtures("narrow")
def test_answers_come_in_the_order_of_their_requests(stage: Stage) -> None:
    """To a client that reads late, and far less than was sent."""
    for name in stage.paths:
        stage.ask(name)
    names = ["small", "large", "public", "small", "large", "large", "saved", "small"] * 3
    with closing(stage.connect(receive_buffer_bytes=16_384)) as client, client.makefile("rb") as stream:
        client.sendall(b"".join(request(stage.server, stage.paths[name]) + request(stage.server, "/health/live") for name in names))
        until(lambda: any(each["route"] == "/f/{token}/{name}" for each in stage.told))
        for name in names:
            assert reply(stream).body == (LARGE if name == "large" else SMALL)
            assert reply(stream).status == 200
    sizes = [each["bytes_out"] for each in stage.told if each["route"] != "/health/live"]
    assert sizes[len(stage.paths) :] == [len(LARGE) if name == "large" else len(SMALL) for name in names]


def test_one_connection_may_ask_often(stage: Stage) -> None:
    """Its heads are many times longer together than one may be."""
    with closing(stage.connect()) as client, client.makefile("rb") as stream:
        for _ in range(40):
            client.sendall(request(stage.server, stage.paths["small"], f"X-Pad: {'x' * 4_000}"))
            assert reply(stream).body == SMALL
    assert stage.passed_on == 1


def test_a_file_waits_for_the_answers_before_it(stage: Stage) -> None:
    """Which lie in memory, for a client that reads late."""
    stage.ask("small")
    with closing(stage.connect(receive_buffer_bytes=16_384)) as client, client.makefile("rb") as stream:
        client.sendall(request(stage.server, "/schema/openapi.json") * 40 + request(stage.server, stage.paths["small"]))
        described = [reply(stream).body for _ in range(40)]
        assert len(described[0]) > 50_000 and set(described) == {described[0]}
        assert reply(stream).body == SMALL


@pytest.mark.parametrize(
    ("fails", "status"),
    [(OSError(5, "I/O error"), 200), (None, 200), (ConnectionResetError(104, "reset"), 499)],
    ids=["disk", "end", "client"],
)
@pytest.mark.parametrize("sent_bytes", [0, 1_000])
def test_an_answer_that_cannot_go_on_is_cut(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, fails: OSError | None, status: int, sent_bytes: int
) -> None:
    stage.ask("small")
    until(lambda: stage.told)
    del stage.told[:]
    calls: list[int] = []
    real = os.sendfile

    def failing(out: int, file: int, offset: int, count: int) -> int:
        calls.append(count)
        if len(calls) == 1 and sent_bytes:
            return real(out, file, offset, sent_bytes)
        if fails is not None:
            raise fails
        return 0

    monkeypatch.setattr(os, "sendfile", failing)
    with closing(stage.connect()) as client, client.makefile("rb") as stream:
        client.sendall(request(stage.server, stage.paths["small"], "X-Request-Id: mine") * 2)
        assert stream.read().partition(b"\r\n\r\n")[2] == SMALL[:sent_bytes]
    assert calls[0] == len(SMALL) and calls[-1] == len(SMALL) - sent_bytes
    (facts,) = until(lambda: list(stage.told))
    assert (facts["status"], facts["bytes_out"], facts["request_id"], facts["path"]) == (status, sent_bytes, "mine", None)
    assert facts["route"] == "/f/{token}/{name}"


def test_a_head_that_does_not_fit_is_sent_in_parts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stage.ask("small")
    make = express.ExpressProtocol._own_socket

    class Narrow:
        """A socket that takes 100 bytes at once, and nothing every other time."""

        def __init__(self, real: socket.socket) -> None:
            self.real, self.turn = real, 0
            self.fileno = real.fileno

        def send(self, data: bytes, flags: int) -> int:
            self.turn += 1
            if self.turn % 2 == 0:
                raise BlockingIOError
            return self.real.send(data[:100], flags)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    narrow: list[Narrow] = []

    def own_socket(protocol: sendfile.SendfileProtocol) -> Any:
        narrow[:] = narrow or [Narrow(make(protocol))]
        return narrow[0]

    monkeypatch.setattr(sendfile.SendfileProtocol, "_own_socket", own_socket)
    other = stage.ask("small")
    assert other.body == SMALL and other.headers.keys() == one.headers.keys() and narrow[0].turn > 5
    until(lambda: len(stage.told) == 2)
    assert [(each["status"], each["bytes_out"]) for each in stage.told] == [(200, len(SMALL))] * 2


def test_a_file_that_is_not_in_memory_goes_the_ordinary_way(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.ask("small")
    monkeypatch.setattr(express, "is_resident", lambda *_: False)
    assert stage.ask("small").body == SMALL and stage.passed_on == 2


def test_what_cannot_be_answered_at_once_goes_the_ordinary_way(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The parser would take an error of ours for one of the client's."""
    stage.ask("small")
    monkeypatch.setattr(express, "is_resident", lambda *_: 1 / 0)
    assert stage.ask("small").body == SMALL and stage.passed_on == 2
    assert "ZeroDivisionError" in caplog.text


def test_a_server_that_stops_says_so(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    protocols = connected(monkeypatch)
    with closing(stage.connect()) as client, client.makefile("rb") as stream:
        for _ in range(2):
            client.sendall(request(stage.server, stage.paths["small"]))
            assert "connection" not in reply(stream).headers
        (protocol,) = protocols
        protocol.loop.call_soon_threadsafe(protocol.shutdown)
        until(lambda: protocol._is_stopping)
        client.sendall(request(stage.server, stage.paths["small"]))
        answer = reply(stream)
        assert (answer.body, answer.headers["connection"], stream.read(), stage.passed_on) == (SMALL, "close", b"", 2)


def test_it_is_counted(start_server: ServerFactory) -> None:
    server = start_server()
    with server.client("ada") as ada, server.client() as admin, httpx.Client(base_url=server.url) as browser:
        url = link(ada, stored(ada, SMALL))
        for _ in range(20):
            assert browser.get(url).content == SMALL
        lines = admin.get("/metrics").text.splitlines()
        (sent,) = [float(each.split()[1]) for each in lines if each.startswith("coffer_http_sent_bytes_total ")]
        logged = [each for each in server.logged().splitlines() if '"/f/{token}/{name}"' in each]
    assert 'coffer_http_requests_total{method="GET",route="/f/{token}/{name}",status="200"} 20.0' in lines
    assert 20 * len(SMALL) < sent < 21 * len(SMALL)
    assert 'coffer_http_request_duration_seconds_count{method="GET",route="/f/{token}/{name}"} 20.0' in lines
    assert len(logged) == 20 and all('"client":"127.0.0.1"' in each and "/f/ey" not in each for each in logged)
