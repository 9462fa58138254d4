"""Clients that vanish, dawdle, or send garbage (FAULTS 17, in short form)."""

import socket
from contextlib import ExitStack

from tests.samples import image
from tests.serving import RunningServer
from tests.waiting import until

MIB = 2**20


def head(server: RunningServer, length: int | None, user_id: str = "ada") -> bytes:
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: {user_id}\r\n{framing}\r\n\r\n"
    ).encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_a_client_that_is_cut_off_leaves_nothing(server: RunningServer) -> None:
    with server.client("ada") as client:
        for declared, sent in ((5 * MIB, 3 * MIB), (5 * MIB, 100), (50_000, 10_000), (None, 3 * MIB)):
            with socket.create_connection((server.host, server.port)) as connection:
                body = image(sent)
                connection.sendall(head(server, declared) + (body if declared else chunk(body)))
            until(lambda: client.get("/api/storage/usage").json()["reserved_bytes"] == 0 and server.incoming() == [])
        assert client.get("/api/storage/usage").json()["used_bytes"] == 0
    assert server.stored_files() == set()


def test_slow_clients_hold_up_nobody(server: RunningServer) -> None:
    """A hundred uploads dawdle in mid-body; another client's are stored meanwhile, and the slow ones end well."""
    body = image(2 * MIB)
    with ExitStack() as stack, server.client("bob") as bob:
        slow = [stack.enter_context(socket.create_connection((server.host, server.port), timeout=30)) for _ in range(100)]
        for connection in slow:
            connection.sendall(head(server, len(body)) + body[:-1000])
        for seed in range(20):
            assert bob.post("/api/files/upload", content=image(10_000, seed)).status_code == 201
        for connection in slow:
            connection.sendall(body[-1000:])
        assert {connection.recv(100).split(b" ", 2)[1] for connection in slow} == {b"201"}
    with server.client("ada") as client:
        usage = client.get("/api/storage/usage").json()
        assert (usage["file_count"], usage["used_bytes"], usage["reserved_bytes"]) == (100, 100 * len(body), 0)


def test_an_early_refusal_reaches_a_client_that_goes_on_sending(server: RunningServer) -> None:
    server.set_quota("ada", 1_000)
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        body = image(5 * MIB)
        connection.sendall(head(server, len(body)) + body)
        answer = bytearray()
        while b"quota_exceeded" not in answer and (piece := connection.recv(65_536)):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 413") and b"quota_exceeded" in answer


def test_credentials_are_judged_before_the_body(server: RunningServer) -> None:
    """The answer comes although not one byte of the announced body was sent."""
    for header, status in ((b"Authorization: Bearer nonsense\r\n", b"401"), (b"", b"401")):
        with socket.create_connection((server.host, server.port), timeout=30) as connection:
            connection.sendall(
                b"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n" + header + b"X-User-Id: ada\r\n\r\n"
            )
            assert connection.recv(100).split(b" ", 2)[1] == status


def test_memory_does_not_grow_with_the_upload(start_server) -> None:  # type: ignore[no-untyped-def]
    """200 MiB, in short form; the 10 GiB run is in `make bench`."""
    server = start_server(COFFER_MAX_FILE_BYTES=str(256 * MIB))
    piece = image(MIB)
    with server.client("ada", timeout=120) as client:
        client.post("/api/files/upload", content=iter([piece] * 8))
        before = server.peak_memory_bytes()
        answer = client.post("/api/files/upload", content=iter([piece] * 200))
        assert answer.status_code == 201, answer.text
    assert server.peak_memory_bytes() - before < 32 * MIB
