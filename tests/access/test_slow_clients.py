"""Clients that take for ever, with a request's head, its body, or its answer."""

import asyncio
import itertools
import json
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from server.api.pace import Message, Pace, PacedBody
from server.errors import TooSlow
from server.settings import Settings
from tests.samples import image
from tests.serving import RunningServer, SharedServer
from tests.waiting import until

MIB = 2**20
HUNG_UP_SECONDS = 20  # far more than any grace below: a socket that blocks so long fails the test

# The arithmetic, without waiting for anything


def judge(bytes_per_second: float, seconds: float, *, hours: float) -> bool:
    """Whether a client lives that long which sends every so many seconds, at this rate."""
    pace = Pace(1_000, 30)
    pieces = int(hours * 3600 / seconds)
    return all(pace.suffices(seconds, int(bytes_per_second * seconds)) for _ in range(pieces))


@pytest.mark.parametrize("seconds", [0.01, 1, 7, 29])
def test_a_slow_and_steady_client_lives_for_hours(seconds: float) -> None:
    assert judge(1_100, seconds, hours=10)
    assert not judge(900, seconds, hours=0.1)


def test_a_client_that_stops_after_a_good_beginning_is_slow_within_two_graces() -> None:
    pace = Pace(1_000, 30)
    assert pace.suffices(29, 10**9)
    waited = list(itertools.takewhile(lambda _: pace.suffices(1, 0), range(100)))
    assert len(waited) == 30


def test_what_is_left_of_a_stretch() -> None:
    pace = Pace(1_000, 30)
    assert pace.suffices(10, 0) and pace.left_seconds == 20
    assert pace.suffices(20, 30_000) and pace.left_seconds == 30


def test_jitter_costs_nobody_the_connection() -> None:
    """Ten hours of 2,000 bytes a second on average, in bursts that are up to 15 seconds apart."""
    chance = random.Random(7)
    pace = Pace(1_000, 30)
    for _ in range(4_800):
        gap = chance.uniform(0, 15)
        assert pace.suffices(gap, int(2_000 * gap))


class Client:
    """Stands for the server below `PacedBody`: hands out what it is given, and then says nothing."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)

    async def receive(self) -> Message:
        if self.messages:
            return self.messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")


def piece(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.anyio
async def test_waiting_for_the_client_alone_counts() -> None:
    """However long the handler itself takes: by the clock it was busy for hours between two pieces."""
    now = iter(range(0, 10**9, 3_600))
    at = [0.0]

    def clock() -> float:
        return at[0]

    client = Client(*[piece(b"x")] * 5)
    body = PacedBody(Settings(slow_upload_bytes_per_second=1_000, slow_upload_grace_seconds=30), client.receive, clock)
    for _ in range(5):
        assert await body.receive() == piece(b"x")
        at[0] = float(next(now))
    body.close()


@pytest.mark.anyio
async def test_a_cancelled_request_is_not_a_slow_one() -> None:
    loop = asyncio.get_running_loop()
    body = PacedBody(Settings(slow_upload_grace_seconds=3_600), Client().receive, loop.time)
    waiting = asyncio.create_task(body.receive())
    loop.call_soon(waiting.cancel)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    body.close()


@pytest.mark.anyio
async def test_slow_ends_the_wait_and_nothing_else() -> None:
    """The handler that is told goes on in peace: what it does about it is not cancelled again."""
    loop = asyncio.get_running_loop()
    body = PacedBody(Settings(slow_upload_grace_seconds=1), Client(piece(b"x")).receive, loop.time)
    assert await body.receive() == piece(b"x")
    with pytest.raises(TooSlow):
        await body.receive()
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    body.close()


@pytest.mark.anyio
async def test_after_the_bodys_end_one_may_wait_for_ever() -> None:
    """As a long download does, to hear of the client's leaving."""
    loop = asyncio.get_running_loop()
    body = PacedBody(Settings(slow_upload_grace_seconds=1), Client(piece(b"x", more=False)).receive, loop.time)
    assert await body.receive() == piece(b"x", more=False)
    waiting = asyncio.create_task(body.receive())
    done, _ = await asyncio.wait([waiting], timeout=2.5)
    assert not done
    waiting.cancel()


# Over real sockets, with short settings. The tests wait for the server; where they sleep, that is the client's own slowness


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> Iterator[RunningServer]:
    with shared_server(
        COFFER_REQUEST_HEAD_SECONDS="1",
        COFFER_SLOW_UPLOAD_BYTES_PER_SECOND="1000",
        COFFER_SLOW_UPLOAD_GRACE_SECONDS="1",
        COFFER_SLOW_DOWNLOAD_GRACE_SECONDS="1",
        COFFER_MAX_FILE_BYTES=str(64 * MIB),
    ) as server:
        yield server


def connect(server: RunningServer, *, receive_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(HUNG_UP_SECONDS)
    connection.connect((server.host, server.port))
    return connection


def head(server: RunningServer, target: str, user_id: str, *more: str) -> bytes:
    lines = [f"{target} HTTP/1.1", "Host: x", f"Authorization: Bearer {server.api_key}", f"X-User-Id: {user_id}", *more]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def until_hung_up(connection: socket.socket) -> bytes:
    """All that was sent before the server closed the connection."""
    received = b""
    while data := connection.recv(65_536):
        received += data
    return received


def one_answer(connection: socket.socket) -> bytes:
    """The next answer to its last byte, and nothing of what follows."""
    received = b""
    while not received.endswith(b"\r\n\r\n"):
        data = connection.recv(1)
        assert data, "the server has hung up"
        received += data
    length = re.search(rb"content-length: (\d+)", received)
    assert length is not None
    missing = int(length[1])
    while missing:
        data = connection.recv(missing)
        assert data, "the server has hung up"
        received, missing = received + data, missing - len(data)
    return received


def is_alive(connection: socket.socket) -> bool:
    connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    return one_answer(connection).startswith(b"HTTP/1.1 200 ")


def dripped_upon(connection: socket.socket, drop: bytes) -> bytes:
    """Sends a drop every now and then, until the server has something to say; returns the beginning of that."""
    connection.settimeout(0.05)
    for _ in range(HUNG_UP_SECONDS * 20):
        connection.sendall(drop)
        try:
            received = connection.recv(65_536)
        except TimeoutError:
            continue
        connection.settimeout(HUNG_UP_SECONDS)
        return received
    raise AssertionError("the server lets it drip")


def check_told(answer: bytes) -> None:
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 408 ") and b"\r\nconnection: close" in top
    assert json.loads(body)["code"] == "too_slow"


@pytest.mark.parametrize("sent", [100, 3 * MIB], ids=["little", "much"])
@pytest.mark.parametrize("framing", ["Content-Length: 5000000", "Transfer-Encoding: chunked"])
def test_an_upload_that_stops_is_told_and_leaves_nothing(server: RunningServer, sent: int, framing: str) -> None:
    user = f"{framing[0]}{sent}"
    body = image(sent)
    with closing(connect(server)) as connection, server.client(user) as client:
        connection.sendall(head(server, "POST /api/files/upload", user, framing))
        connection.sendall(body if framing.startswith("C") else f"{sent + 9:x}\r\n".encode() + body)
        check_told(until_hung_up(connection))
        # At once, not when the lease runs out: this was the next thing that the server was asked.
        usage = client.get("/api/storage/usage").json()
    assert (usage["used_bytes"], usage["reserved_bytes"]) == (0, 0)
    assert server.incoming() == []


@pytest.mark.parametrize("rhythm", ["silent", "dripping"])
def test_every_route_that_takes_a_body_is_watched(server: RunningServer, rhythm: str) -> None:
    with server.client("routes") as client:
        file_id = client.post("/api/files/upload", content=image()).json()["id"]
        url = client.post("/api/uploads/links", json={"max_bytes": 10_000}).json()["url"]
    for target in ("POST /api/files/upload", f"PUT /api/files/{file_id}/content", f"PUT {url}", f"PATCH /api/files/{file_id}"):
        with closing(connect(server)) as connection:
            connection.sendall(head(server, target, "routes", "Content-Length: 9000", "Content-Type: application/json"))
            check_told((dripped_upon(connection, b"{") if rhythm == "dripping" else b"") + until_hung_up(connection))


def test_who_is_told_to_continue_and_does_not_is_slow(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(head(server, "POST /api/files/upload", "expects", "Content-Length: 9000", "Expect: 100-continue"))
        told = until_hung_up(connection)
    start, _, rest = told.partition(b"\r\n\r\n")
    assert start == b"HTTP/1.1 100 Continue"
    check_told(rest)


def test_a_slow_upload_above_the_rate_is_stored(server: RunningServer) -> None:
    """It takes several graces."""
    body = image(12_000)
    with closing(connect(server)) as connection:
        connection.sendall(head(server, "POST /api/files/upload", "steady", f"Content-Length: {len(body)}"))
        for start in range(0, len(body), 1_000):
            time.sleep(0.3)
            connection.sendall(body[start : start + 1_000])
        assert connection.recv(100).startswith(b"HTTP/1.1 201 ")


@pytest.mark.parametrize("start", [b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-A: ", b"G"], ids=["headers", "method"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_head_that_does_not_end_is_told(server: RunningServer, kept: bool, start: bytes) -> None:
    with closing(connect(server)) as connection:
        assert not kept or is_alive(connection)
        connection.sendall(start)
        check_told(until_hung_up(connection))


@pytest.mark.parametrize("start", [b"", b"\r\n"], ids=["silence", "an empty line"])
def test_who_says_nothing_is_hung_up_on(server: RunningServer, start: bytes) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(start)
        assert until_hung_up(connection) == b""


def test_an_empty_line_between_requests_buys_no_time(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        assert is_alive(connection)
        connection.sendall(b"\r\n")
        assert until_hung_up(connection) == b""


def test_an_idle_connection_is_kept(server: RunningServer) -> None:
    """The time for a head begins with its first byte: a proxy keeps its connections for a minute."""
    with closing(connect(server)) as connection:
        assert is_alive(connection)
        time.sleep(2.5)
        assert is_alive(connection)


def test_the_rest_of_a_refused_body_is_not_waited_for_for_ever(server: RunningServer) -> None:
    """The refusal is seen; then the rest may come for a while, or the connection ends, however it drips."""
    with closing(connect(server)) as connection:
        connection.sendall(b"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert one_answer(connection).startswith(b"HTTP/1.1 401 ")
        with suppress(OSError):  # it may be gone when the next drop comes
            assert dripped_upon(connection, b"x") == b""


def test_a_pipelined_upload_has_its_own_time(server: RunningServer) -> None:
    """Its beginning waits in the socket while the request before it is served. The rest of it is not that of a refused one."""
    body = image(200_000)
    with closing(connect(server)) as connection:
        first = head(server, "GET /api/files", "pipelined")
        second = head(server, "POST /api/files/upload", "pipelined", "Content-Length: 200000", "Connection: close")
        connection.sendall(first + second + body[:100_000])
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        for start in range(100_000, 200_000, 10_000):
            time.sleep(0.3)
            connection.sendall(body[start : start + 10_000])
        assert until_hung_up(connection).startswith(b"HTTP/1.1 201 ")


def download(server: RunningServer, connection: socket.socket, file_id: str, request_id: str) -> None:
    connection.sendall(head(server, f"GET /api/files/{file_id}/download", "reader", f"X-Request-Id: {request_id}"))


@pytest.fixture(scope="module")
def large(server: RunningServer) -> str:
    """A file that fits into no socket's buffers."""
    with server.client("reader", timeout=60) as client:
        file_id: str = client.post("/api/files/upload", content=image(32 * MIB)).json()["id"]
    return file_id


def access_line(server: RunningServer, request_id: str) -> dict[str, object]:
    (line,) = until(lambda: [json.loads(line) for line in server.logged().splitlines() if f'"{request_id}"' in line])
    found: dict[str, object] = line
    return found


def test_who_reads_nothing_is_cut_off(server: RunningServer, large: str) -> None:
    with closing(connect(server, receive_bytes=4_096)) as connection:
        download(server, connection, large, "reads-nothing")
        assert access_line(server, "reads-nothing")["status"] == 499  # the connection is still open on our side
        with pytest.raises(ConnectionResetError):
            until_hung_up(connection)


def test_who_comes_after_those_that_were_cut_off_is_served(server: RunningServer, large: str) -> None:
    """On descriptors with the numbers of theirs, which nobody may still be waiting for."""
    stalled = [connect(server, receive_bytes=4_096) for _ in range(4)]
    for connection in stalled:
        download(server, connection, large, "stalled")
    for connection in stalled:
        until(lambda connection=connection: open_connections(server, connection) == 0)  # type: ignore[misc]
        connection.close()
    expected = image(32 * MIB)
    for _ in range(4):
        with closing(connect(server)) as connection, connection.makefile("rb") as stream:
            download(server, connection, large, "comes-after")
            while stream.readline().strip():
                pass
            assert stream.read(32 * MIB) == expected


def test_an_answer_that_was_complete_for_the_handler_is_cut_off_too(server: RunningServer) -> None:
    """Its last bytes wait in memory for a client that never takes them, also once the connection is to be closed."""
    with server.client("reader") as client:
        file_id = client.post("/api/files/upload", content=image(250_000)).json()["id"]
    many = 30
    with closing(connect(server, receive_bytes=4_096)) as connection:
        for number in range(many):
            last = number == many - 1
            target = f"GET /api/files/{file_id}/download"
            connection.sendall(head(server, target, "reader", f"Connection: {'close' if last else 'keep-alive'}"))
        until(lambda: open_connections(server, connection) == 0)


def open_connections(server: RunningServer, connection: socket.socket) -> int:
    """How many sockets the server's process still has for this one of ours."""
    ours = f"{connection.getsockname()[1]:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    server_port = f"{server.port:04X}"
    established, closing_with_data = "01", ("04", "08", "09", "0B")
    return sum(
        row[1].endswith(f":{server_port}") and row[2].endswith(f":{ours}") and row[3] in (established, *closing_with_data) for row in rows
    )


def test_who_reads_slowly_gets_everything(server: RunningServer, large: str) -> None:
    """For several graces it takes little at a time; as long as it takes something it is served."""
    with closing(connect(server, receive_bytes=65_536)) as connection:
        download(server, connection, large, "reads-slowly")
        received = bytearray()
        for step in range(1, 16):
            time.sleep(0.3)
            while len(received) < step * 300_000:
                received += connection.recv(65_536)
        received += connection.makefile("rb").read(32 * MIB + received.index(b"\r\n\r\n") + 4 - len(received))
    assert received.endswith(image(32 * MIB))
