"""Files that the kernel sends: the same answers as those that are read and sent, on every kind of connection."""

import asyncio
import json
import os
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.api import sendfile
from server.api.sendfile import EXTENSION, TURN_BYTES
from server.vault import cached, volume
from tests.download.here import reply, request, serving_here, settings_of
from tests.samples import image
from tests.serving import RunningServer, SharedServer
from tests.waiting import until

MIB = 2**20
SMALL, LARGE = image(200_000), image(3 * TURN_BYTES + 5, seed=1)


class Shared(NamedTuple):
    """A server with two files of ada's, and where they are downloaded: by their owner, and by links."""

    server: RunningServer
    owner: dict[str, str]
    links: dict[str, str]


def made(server: RunningServer) -> Shared:
    owner, links = {}, {}
    with server.client("ada", timeout=60) as client:
        for name, body in (("small", SMALL), ("large", LARGE)):
            file_id = client.post("/api/files/upload", content=body).json()["id"]
            owner[name] = f"/api/files/{file_id}/download"
            links[name] = client.post(f"/api/files/{file_id}/link").json()["url"]
    return Shared(server, owner, links)


@pytest.fixture(scope="module", params=["true", "false"], ids=["sendfile", "reading"])
def shared(request: pytest.FixtureRequest, shared_server: SharedServer) -> Iterator[Shared]:
    """The same with and without."""
    with shared_server(COFFER_SENDFILE=request.param, COFFER_MAX_FILE_BYTES=str(64 * MIB)) as server:
        yield made(server)


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=20)


def test_pipelined_requests_are_answered_in_their_order(shared: Shared) -> None:
    """All sent at once, by owner and by link, so a byte too many or too few, or in another's place, spoils the rest."""
    server = shared.server
    tag = httpx.get(server.url + shared.links["small"]).headers["etag"]
    both = [where[name] for name in ("small", "large") for where in (shared.owner, shared.links)]
    asked = b""
    for target in both:
        asked += request(server, target)
        asked += request(server, target, method="HEAD")
        asked += request(server, target, "Range: bytes=5-100004")
        asked += request(server, target, "Range: bytes=99999999-")
        asked += request(server, target, f"If-None-Match: {tag}")
        asked += request(server, "/health/live")
        asked += request(server, target)
    asked += request(server, "/health/live", "Connection: close")
    with closing(connect(server)) as connection, connection.makefile("rb") as stream:
        sending = threading.Thread(target=connection.sendall, args=(asked,))
        sending.start()
        for target in both:
            body = LARGE if target in (shared.owner["large"], shared.links["large"]) else SMALL
            whole = reply(stream)
            assert (whole.status, whole.headers["content-length"], whole.body) == (200, str(len(body)), body)
            head = reply(stream, to_head=True)
            assert (head.status, head.headers["content-length"]) == (200, str(len(body)))
            assert head.headers.keys() == whole.headers.keys()
            part = reply(stream)
            assert (part.status, part.headers["content-range"], part.body) == (206, f"bytes 5-100004/{len(body)}", body[5:100_005])
            assert reply(stream).status == 416
            conditional = reply(stream)
            assert (conditional.status, conditional.body) == ((304, b"") if body is SMALL else (200, LARGE))
            assert reply(stream).status == 200
            assert reply(stream).body == body
        assert reply(stream).status == 200
        assert stream.read() == b""
        sending.join()


def test_a_file_waits_for_the_answers_before_it(shared: Shared) -> None:
    """Which lie in memory for a client that reads late, and are far more than its socket takes."""
    server = shared.server
    before = 40
    with closing(socket.socket()) as client, client.makefile("rb") as stream:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.settimeout(20)
        client.connect((server.host, server.port))
        client.sendall(request(server, "/schema/openapi.json") * before + request(server, shared.links["small"]))
        described = reply(stream).body
        assert len(described) > 50_000
        for _ in range(before - 1):
            assert reply(stream).body == described
        assert reply(stream).body == SMALL


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_connection_that_is_not_kept(shared: Shared, name: str) -> None:
    for asked in (
        request(shared.server, shared.links[name], version="1.0"),
        request(shared.server, shared.links[name], "Connection: keep-alive", version="1.0"),
        request(shared.server, shared.links[name], "Connection: close"),
    ):
        with closing(connect(shared.server)) as connection, connection.makefile("rb") as stream:
            connection.sendall(asked)
            answer = reply(stream)
            assert (answer.headers["connection"], answer.body) == ("close", SMALL if name == "small" else LARGE)
            assert stream.read() == b""


def test_many_at_once(shared: Shared) -> None:
    """Each its own part of the same file, through few descriptors."""

    def fetch(number: int) -> bool:
        start, end = number * 50_000, len(LARGE) - number * 1_000
        where = shared.links if number % 2 else shared.owner
        with closing(connect(shared.server)) as connection, connection.makefile("rb") as stream:
            for _ in range(3):
                connection.sendall(request(shared.server, where["large"], f"Range: bytes={start}-{end - 1}"))
                if reply(stream).body != LARGE[start:end]:
                    return False
        return True

    with ThreadPoolExecutor(24) as threads:
        assert all(threads.map(fetch, range(48)))


def descriptors(server: RunningServer) -> list[str]:
    found = []
    for entry in Path(f"/proc/{server.pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return [each for each in found if each.startswith(("socket:", str(server.volume)))]


def test_who_goes_away_leaves_nothing_open(shared: Shared) -> None:
    """In mid-answer, by closing and by a reset, and between two answers. Sockets have two descriptors where files are sent."""
    server = shared.server
    with closing(connect(server)) as witness:  # the server's own sockets, and this one
        witness.sendall(request(server, "/health/live"))
        assert witness.recv(1)
        until(lambda: not [each for each in descriptors(server) if each.startswith(f"{server.volume}/users")])
        sockets_at_rest = len(descriptors(server))
        for number in range(24):
            with closing(socket.socket()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
                client.connect((server.host, server.port))
                where = (shared.owner, shared.links)[number % 2]
                client.sendall(request(server, where["large" if number % 3 else "small"], f"X-Request-Id: leaver-{number}"))
                assert client.recv(15) == b"HTTP/1.1 200 OK"
                if number % 4 == 1:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The pool of database connections may have grown by as many as it holds.
        until(lambda: not [each for each in descriptors(server) if each.startswith(f"{server.volume}/users")])
        until(lambda: len(descriptors(server)) <= sockets_at_rest + 10)
        # Descriptors that are used again are watched again: these, too, have to be waited for.
        with ExitStack() as stack:
            slow = [stack.enter_context(closing(socket.socket())) for _ in range(24)]
            for client in slow:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
                client.connect((server.host, server.port))
                client.sendall(request(server, shared.links["large"], "Connection: close"))
                assert client.recv(15) == b"HTTP/1.1 200 OK"
            for client in slow:
                with client.makefile("rb") as stream:
                    assert stream.read().endswith(LARGE)


def test_nothing_is_said_within_a_file(shared: Shared) -> None:
    """To a client that sends what is no request while it is served."""
    server = shared.server
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.settimeout(20)
        client.connect((server.host, server.port))
        client.sendall(request(server, shared.links["large"]))
        received = client.recv(1_000)
        client.sendall(b"\0 no request\r\n\r\n")
        try:
            while data := client.recv(65_536):
                received += data
        except ConnectionResetError:
            pass
    body = received.partition(b"\r\n\r\n")[2]
    assert len(body) < len(LARGE) and LARGE.startswith(body)


def test_the_log_tells_how_much_was_sent(shared: Shared) -> None:
    server = shared.server

    def line(request_id: str) -> dict[str, Any]:
        (found,) = until(lambda: [each for each in server.logged().splitlines() if f'"{request_id}"' in each])
        parsed: dict[str, Any] = json.loads(found)
        return parsed

    for name, body in (("small", SMALL), ("large", LARGE)):
        for number, where in enumerate((shared.owner, shared.links, shared.links)):
            with closing(connect(server)) as connection, connection.makefile("rb") as stream:
                connection.sendall(request(server, where[name], f"X-Request-Id: logged-{name}-{number}"))
                assert reply(stream).body == body
            logged = line(f"logged-{name}-{number}")
            assert (logged["status"], logged["bytes_out"]) == (200, len(body))
            assert logged["route"] == ("/api/files/{file_id}/download" if number == 0 else "/f/{token}/{name}")
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.connect((server.host, server.port))
        client.sendall(request(server, shared.links["large"], "X-Request-Id: logged-gone"))
        assert client.recv(15) == b"HTTP/1.1 200 OK"
    gone = line("logged-gone")
    assert gone["status"] in (499, 200)  # what fits into the kernel's buffers has been sent
    assert (gone["status"] == 200) == (gone["bytes_out"] == len(LARGE))


# In a thread of the test's own, for what no setting can bring about


@pytest.fixture
def stored(server: RunningServer) -> Shared:
    """A server whose files are served by another one, below."""
    with server.client("ada", timeout=60) as client:
        owner, links = {}, {}
        for name, body in (("small", SMALL),):
            file_id = client.post("/api/files/upload", content=body).json()["id"]
            owner[name], links[name] = f"/api/files/{file_id}/download", client.post(f"/api/files/{file_id}/link").json()["url"]
    return Shared(server, owner, links)


def test_over_tls_files_are_read_and_sent(stored: Shared, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with serving_here(settings_of(stored.server), ssl_certfile=certificate, ssl_keyfile=key) as here:
        trusting = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=f"https://127.0.0.1:{here.port}", verify=trusting) as browser:
            for _ in range(2):
                assert browser.get(stored.links["small"]).content == SMALL
                assert browser.get(stored.links["small"], headers={"Range": "bytes=7-9"}).content == SMALL[7:10]
                assert browser.get(stored.links["small"]).headers["strict-transport-security"]
    assert here.extensions == [None] * 6
    with serving_here(settings_of(stored.server)) as here:
        assert httpx.get(f"http://127.0.0.1:{here.port}{stored.links['small']}").content == SMALL
    assert here.extensions == [{EXTENSION: {}}]


def test_a_file_that_is_not_in_memory_is_read_in_a_thread_first(stored: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one waited for in the event loop where the file system cannot tell."""
    readers = []
    read_ahead = sendfile._read_ahead

    def watched(*arguments: Any) -> None:
        readers.append((threading.current_thread(), arguments[1:]))
        read_ahead(*arguments)

    def refuses(*_: Any) -> int:
        raise BlockingIOError

    monkeypatch.setattr(sendfile, "_read_ahead", watched)
    with serving_here(settings_of(stored.server)) as here:
        url = f"http://127.0.0.1:{here.port}{stored.links['small']}"
        assert httpx.get(url).content == SMALL
        readers.clear()
        assert httpx.get(url).content == SMALL
        assert readers == []  # its pages have just been sent
        loop_thread = next(each for each in threading.enumerate() if each.name.endswith("(run)"))
        monkeypatch.setattr(os, "preadv", refuses)
        assert httpx.get(url).content == SMALL
    ((reader, what),) = readers
    assert reader is not loop_thread and what == (0, len(SMALL))


def test_where_nothing_can_be_opened_at_once_a_thread_opens_it(
    stored: Shared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a sysadmin is told of it."""
    with serving_here(settings_of(stored.server)):
        assert "openat2" not in caplog.text
    monkeypatch.setattr(cached, "open_cached", lambda *_: None)
    monkeypatch.setattr(volume, "open_cached", lambda *_: None)
    with (
        serving_here(settings_of(stored.server)) as here,
        httpx.Client(base_url=f"http://127.0.0.1:{here.port}", headers=stored.server.client("ada").headers) as client,
    ):
        assert "openat2" in caplog.text
        assert client.get(stored.owner["small"]).content == SMALL
        assert client.get(stored.links["small"]).content == SMALL


@pytest.mark.parametrize(
    ("fails", "told"),
    [(ConnectionResetError(104, "reset"), "client went away"), (OSError(5, "I/O error"), "request failed"), (None, "request failed")],
    ids=["client", "disk", "end"],
)
def test_an_answer_that_cannot_go_on_is_cut(
    stored: Shared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: OSError | None, told: str
) -> None:
    """So that nobody takes it for whole: after its first bytes, the connection ends."""
    sent: list[int] = []
    real = os.sendfile

    def failing(out: int, file: int, offset: int, count: int) -> int:
        if sent:
            if fails is not None:
                raise fails
            return 0
        sent.append(count)
        return real(out, file, offset, 1_000)

    monkeypatch.setattr(os, "sendfile", failing)
    caplog.set_level("DEBUG", logger="coffer.api")
    with (
        serving_here(settings_of(stored.server)) as here,
        closing(socket.create_connection(("127.0.0.1", here.port), timeout=20)) as client,
        client.makefile("rb") as stream,
    ):
        client.sendall(request(stored.server, stored.owner["small"]) * 2)
        assert stream.read().partition(b"\r\n\r\n")[2] == SMALL[:1_000]
    assert told in caplog.text


def test_a_header_of_two_lines_is_refused() -> None:
    cycle = sendfile.FileCycle.__new__(sendfile.FileCycle)
    cycle.keep_alive = True
    assert cycle.encoded(206, [(b"a", b"b")]) == b"HTTP/1.1 206 Partial Content\r\na: b\r\n\r\n"
    for value in (b"x\r\ny: z", b"x\ny", b"x\ry", b"x\0"):
        with pytest.raises(RuntimeError):
            cycle.encoded(200, [(b"a", value)])


@pytest.mark.anyio
@pytest.mark.parametrize("says_its_length", [True, False])
async def test_an_answer_that_says_so_ends_its_connection(says_its_length: bool) -> None:
    transport = Mock()
    named = {"transport": transport, "flow": Mock(write_paused=False), "logger": Mock(), "access_logger": Mock(), "access_log": False}
    named |= {"default_headers": [(b"a", b"b")], "message_event": asyncio.Event(), "on_response": Mock()}
    cycle = sendfile.FileCycle({"method": "GET"}, expect_100_continue=False, keep_alive=True, **named)  # type: ignore[typeddict-item,arg-type]
    length = [(b"content-length", b"2")] if says_its_length else [(b"transfer-encoding", b"chunked")]
    await cycle.send({"type": "http.response.start", "status": 408, "headers": [(b"connection", b"close"), *length]})
    transport.close.assert_not_called()
    await cycle.send({"type": "http.response.body", "body": b"ok"})
    transport.close.assert_called_once()
    assert b"".join(call.args[0] for call in transport.write.mock_calls).count(b"connection") == 1


def self_signed(directory: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "coffer")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = directory / "certificate.pem", directory / "key.pem"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return certificate_path, key_path
