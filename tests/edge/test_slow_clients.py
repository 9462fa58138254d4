"""Clients in front of nginx that take for ever: those that are slow live, those that hold on to what they do not use are cut off."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.access.test_slow_clients import HUNG_UP_SECONDS, dripped_upon, until_hung_up
from tests.conftest import PostgresServer
from tests.edge.conftest import running_edge
from tests.edge.nginx import Edge
from tests.linking import link, stored
from tests.samples import image
from tests.waiting import until

MIB = 2**20
LARGE = image(32 * MIB)  # fits into no socket's buffers


@pytest.fixture(scope="module")
def edge(postgres_servers: Callable[[bool], PostgresServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    impatient = {
        "COFFER_REQUEST_HEAD_SECONDS": "1",
        "COFFER_SLOW_UPLOAD_BYTES_PER_SECOND": "1000",
        "COFFER_SLOW_UPLOAD_GRACE_SECONDS": "1",
        "COFFER_SLOW_DOWNLOAD_GRACE_SECONDS": "2",
        "COFFER_MAX_FILE_BYTES": str(64 * MIB),
    }
    with running_edge(postgres_servers(False), tmp_path_factory.mktemp("slow"), impatient) as running:
        yield running


@pytest.fixture(scope="module")
def large(edge: Edge) -> str:
    """Its link."""
    with edge.client("reader") as client:
        return link(client, stored(client, LARGE))


def connect(edge: Edge, *, receive_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(HUNG_UP_SECONDS)
    connection.connect(("127.0.0.1", edge.nginx.port))
    return connection


def head(edge: Edge, target: str, user_id: str, *more: str) -> bytes:
    lines = [f"{target} HTTP/1.1", "Host: x", f"Authorization: Bearer {edge.server.api_key}", f"X-User-Id: {user_id}", *more]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def logged(edge: Edge, request_id: str) -> dict[str, Any]:
    """What nginx's access log says of a request. It is written once a second."""
    log = edge.nginx.directory / "coffer.log"
    (found,) = until(lambda: [line for line in log.read_text().splitlines() if f'"{request_id}"' in line])
    parsed: dict[str, Any] = json.loads(found)
    return parsed


def open_connections(edge: Edge, connection: socket.socket) -> int:
    """How many sockets nginx still has for this one of ours."""
    ours, theirs = f":{connection.getsockname()[1]:04X}", f":{edge.nginx.port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(theirs) and row[2].endswith(ours) and row[3] in ("01", "04", "08", "09", "0B") for row in rows)


@pytest.mark.parametrize("start", [b"GET /f/x HTTP/1.1\r\nHost: x\r\nX-A: ", b"G"], ids=["headers", "method"])
@pytest.mark.parametrize("kept", [False, True], ids=["first", "kept"])
def test_a_head_that_does_not_end_is_cut_off_however_it_drips(edge: Edge, start: bytes, kept: bool) -> None:
    with closing(connect(edge)) as connection:
        if kept:
            connection.sendall(b"HEAD /f/x HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 403 ")
        connection.sendall(start)
        try:
            said = dripped_upon(connection, b"a")
        except OSError:
            said = b""
        assert b" 200 " not in said
        until(lambda: open_connections(edge, connection) == 0)


@pytest.mark.parametrize("rhythm", ["silent", "dripping"])
def test_a_body_that_does_not_come_is_told_and_frees_its_quota(edge: Edge, rhythm: str) -> None:
    """nginx hands each byte to the server, which watches the pace and says so in its own words."""
    with closing(connect(edge)) as connection, edge.client(rhythm) as client:
        connection.sendall(head(edge, "POST /api/files/upload", rhythm, f"Content-Length: {3 * MIB}", "Connection: close") + image(2 * MIB))
        said = (dripped_upon(connection, b"x") if rhythm == "dripping" else b"") + until_hung_up(connection)
        top, _, body = said.partition(b"\r\n\r\n")
        assert top.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["code"] == "too_slow"
        usage = client.get("/api/storage/usage").json()
    assert (usage["used_bytes"], usage["reserved_bytes"]) == (0, 0)
    assert edge.server.incoming() == []


def test_a_slow_upload_is_stored(edge: Edge) -> None:
    """It takes several graces, of the server and of nginx."""
    body = image(12_000)
    with closing(connect(edge)) as connection:
        connection.sendall(head(edge, "POST /api/files/upload", "steady", f"Content-Length: {len(body)}"))
        for start in range(0, len(body), 1_000):
            time.sleep(0.3)
            connection.sendall(body[start : start + 1_000])
        assert connection.recv(100).startswith(b"HTTP/1.1 201 ")


def ways_to(edge: Edge, url: str) -> dict[str, tuple[str, str]]:
    """The same bytes from nginx itself, and from the server through nginx: it is asked where it is not sure. Target and header."""
    etag = httpx.head(f"{edge.nginx.url}{url}").headers["etag"]
    return {"nginx": (f"GET {url}", "X-A: b"), "server": (f"GET {url}", f"If-Match: {etag}")}


@pytest.mark.parametrize("sender", ["nginx", "server"])
def test_who_reads_nothing_is_cut_off(edge: Edge, large: str, sender: str) -> None:
    target, header = ways_to(edge, large)[sender]
    with closing(connect(edge, receive_bytes=4_096)) as connection:
        connection.sendall(head(edge, target, "reader", header, f"X-Request-Id: nothing-{sender}"))
        line = logged(edge, f"nothing-{sender}")  # the connection is still open on our side
        assert line["bytes_out"] < len(LARGE) and bool(line["server_status"]) == (sender == "server")
        with pytest.raises(ConnectionResetError):
            until_hung_up(connection)
    if sender == "server":  # and it heard of it
        until(lambda: f'"nothing-{sender}"' in edge.server.logged())


@pytest.mark.parametrize("sender", ["nginx", "server"])
def test_who_reads_slowly_gets_everything(edge: Edge, large: str, sender: str) -> None:
    """For several graces it takes little at a time."""
    target, header = ways_to(edge, large)[sender]
    with closing(connect(edge, receive_bytes=65_536)) as connection:
        connection.sendall(head(edge, target, "reader", header, "Connection: close"))
        received = bytearray()
        for step in range(1, 21):
            time.sleep(0.3)
            while len(received) < step * 300_000:
                received += connection.recv(65_536)
        with connection.makefile("rb") as stream:
            received += stream.read()
    assert received.partition(b"\r\n\r\n")[2] == LARGE
