"""The quota from outside: 64 uploads at once at its edge, through every way in, some lying about their length."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.samples import image
from tests.serving import RunningServer
from tests.waiting import until

MIB = 2**20


def raw(server: RunningServer, body: bytes) -> int:
    with server.client("ada", timeout=60) as client:
        return client.post("/api/files/upload", content=body).status_code


def chunked(server: RunningServer, body: bytes) -> int:
    def pieces() -> Iterator[bytes]:
        yield from (body[at : at + 50_000] for at in range(0, len(body), 50_000))

    with server.client("ada", timeout=60) as client:
        return client.post("/api/files/upload", content=pieces()).status_code


def form(server: RunningServer, body: bytes) -> int:
    with server.client("ada", timeout=60) as client:
        return client.post("/api/files/upload", files={"file": ("a.png", body)}).status_code


def liar(server: RunningServer, body: bytes) -> int:
    """Declares 500 bytes and sends more: HTTP takes the rest for another request, which is none, and the server hangs up."""
    with socket.create_connection((server.host, server.port), timeout=60) as connection:
        who = f"Authorization: Bearer {server.api_key}\r\nX-User-Id: ada"
        with suppress(ConnectionError):
            connection.sendall(f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\n{who}\r\nContent-Length: 500\r\n\r\n".encode() + body)
            return int(connection.recv(4096).split(b" ", 2)[1])
        return 0


@pytest.mark.parametrize("size", [10_000, 2 * MIB], ids=["small", "large"])
def test_no_way_in_overshoots(server: RunningServer, size: int) -> None:
    room = size + size // 2  # one file fits, two do not
    server.set_quota("ada", room)
    ways: list[Callable[[RunningServer, bytes], int]] = [raw, chunked, form, liar]
    with ThreadPoolExecutor(32) as threads:
        statuses = list(threads.map(lambda n: (ways[n % 4].__name__, ways[n % 4](server, image(size, n))), range(64)))
    until(lambda: server.in_flight() == 0)  # who lies may be gone before the answer
    with server.client("ada") as client:
        usage = client.get("/api/storage/usage").json()
        files = client.get("/api/files", params={"limit": 100}).json()["files"]
    honest = [status for way, status in statuses if way != "liar"]
    assert usage["used_bytes"] == sum(file["file_size"] for file in files) <= room and usage["reserved_bytes"] == 0
    assert {file["file_size"] for file in files} <= {500, size}
    assert set(honest) <= {201, 413} and sum(file["file_size"] == size for file in files) == honest.count(201)
    assert len(server.stored_files()) == len(files) and server.incoming() == []


@pytest.mark.parametrize("way", [raw, chunked, form])
@pytest.mark.parametrize("size", [10_000, 2 * MIB])
def test_a_file_that_fits_exactly_is_taken_and_one_byte_more_is_not(server: RunningServer, way: Callable[..., int], size: int) -> None:
    server.set_quota("ada", size - 1)
    assert way(server, image(size)) == 413
    server.set_quota("ada", size)
    assert way(server, image(size)) == 201
    with server.client("ada") as client:
        refused = client.post("/api/files/upload", content=image(100))
        problem = refused.json()
        assert (problem["code"], problem["used_bytes"], problem["limit_bytes"], problem["needed_bytes"]) == (
            "quota_exceeded",
            size,
            size,
            100,
        )
        (file,) = client.get("/api/files").json()["files"]
        client.delete(f"/api/files/{file['id']}")
        assert client.get("/api/storage/usage").json()["available_bytes"] == size
