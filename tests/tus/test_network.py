"""Connections that hang, break and dawdle, servers that stop: the bytes that came are kept, and whoever resumes has the upload soon."""

import hashlib
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.launching import Forked
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, SharedServer, execute
from tests.tus.persistent import ENDPOINT, PIECE, VERSION, PersistentUpload
from tests.tus.proxy import Proxy
from tests.waiting import until

BODY = image(3_000_000)
HALF = 1_500_000
MOST = HALF - 700_000  # of it: the rest of a batch waits in memory
TAKEOVER_SECONDS = 10
"""A generous bound; what is promised is 5."""

_numbers = itertools.count()

log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def pair(shared_server: SharedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Two servers on one database and volume. Tests keep apart by acting for users of their own."""
    with shared_server(COFFER_SLOW_UPLOAD_GRACE_SECONDS="3") as one:
        two = beside(one, tmp_path_factory.mktemp("pair") / "log")
        try:
            two.start()
            yield one, two
        finally:
            two.kill()


def beside(server: RunningServer, log: Path) -> RunningServer:
    """Another one on its database and volume, to be started."""
    other = RunningServer(server.database_url, server.volume, log, server.api_key, {})
    other.launch = Forked
    return other


@pytest.fixture
def here(pair: tuple[RunningServer, RunningServer], user_id: str) -> Iterator[httpx.Client]:
    with pair[0].client(user_id, timeout=30) as client:
        yield client


@pytest.fixture
def there(pair: tuple[RunningServer, RunningServer], user_id: str) -> Iterator[httpx.Client]:
    with pair[1].client(user_id, timeout=30) as client:
        yield client


@pytest.fixture
def user_id() -> str:
    return f"user-{next(_numbers)}"


def told(what: str, seconds: float, most: float = TAKEOVER_SECONDS) -> None:
    """Says how long it took (pytest --log-cli-level=info), and that it was not far too long."""
    log.info("%s after %.2f s", what, seconds)
    assert seconds < most


def created(client: httpx.Client, length: int = len(BODY), **headers: str) -> str:
    answer = client.post(ENDPOINT, headers=VERSION | {"Upload-Length": str(length)} | headers)
    assert answer.status_code == 201, answer.text
    return httpx.URL(answer.headers["location"]).path


def offset(client: httpx.Client, path: str) -> int:
    answer = client.head(path, headers=VERSION)
    assert answer.status_code == 200, answer.headers
    return int(answer.headers["upload-offset"])


def patch(client: httpx.Client, path: str, at: int, content: bytes) -> httpx.Response:
    return client.patch(path, headers=PIECE | {"Upload-Offset": str(at)}, content=content)


def finish(client: httpx.Client, path: str, body: bytes = BODY) -> None:
    """Goes on from wherever it is, and looks at what has been stored; nothing is left of the upload."""
    answer = patch(client, path, at := offset(client, path), body[at:])
    assert answer.status_code == 204, answer.text
    stored = client.get(f"/api/files/{answer.headers['coffer-file-id']}/download").content
    assert hashlib.sha256(stored).digest() == hashlib.sha256(body).digest()
    file = client.get(f"/api/files/{answer.headers['coffer-file-id']}").json()
    assert file["sha256"] == hashlib.sha256(body).hexdigest()


def usage(client: httpx.Client) -> tuple[int, int]:
    answer = client.get("/api/storage/usage").json()
    return answer["used_bytes"], answer["reserved_bytes"]


class HalfSent:
    """A client that announces all of a piece, sends some of it, and then nothing."""

    def __init__(self, server: RunningServer, user_id: str, path: str, at: int, sent: bytes, *, is_chunked: bool = False) -> None:
        self._socket = socket.create_connection((server.host, server.port), timeout=20)
        framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(BODY) - at}"
        who = f"Authorization: Bearer {server.api_key}\r\nX-User-Id: {user_id}\r\nTus-Resumable: 1.0.0"
        what = f"Content-Type: application/offset+octet-stream\r\nUpload-Offset: {at}\r\n{framing}"
        self._socket.sendall(f"PATCH {path} HTTP/1.1\r\nHost: x\r\n{who}\r\n{what}\r\n\r\n".encode())
        self._socket.sendall(sent)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answered(self) -> bytes:
        """The status that comes, or nothing where the connection is closed without one; a time-out is an error."""
        try:
            return self._socket.recv(65_536)[9:12]
        except ConnectionResetError:
            return b""

    def end(self, *, reset: bool = False) -> None:
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(4, "little") + bytes(4))
        self._socket.close()


def arrived(server: RunningServer, path: str, at_least_bytes: int) -> int:
    """Waits until the server has written so much of an upload. Returns how much that is."""
    file = server.volume / "incoming" / path.rpartition("/")[2]
    return until(lambda: size if file.exists() and (size := file.stat().st_size) >= at_least_bytes else 0)


def is_held(server: RunningServer, path: str) -> bool:
    (row,) = execute(server.database_url, "select held_by from resumable_uploads where id = $1", path.rpartition("/")[2])
    return row["held_by"] is not None


def test_an_upload_moves_between_servers(pair: tuple[RunningServer, RunningServer], here: httpx.Client, there: httpx.Client) -> None:
    path = created(here)
    answer = httpx.Response(404)
    for number, at in enumerate(range(0, len(BODY), 500_000)):
        one, two = (here, there) if number % 2 else (there, here)
        assert offset(two, path) == at
        answer = patch(one, path, at, BODY[at : at + 500_000])
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(at + 500_000))
    assert offset(here, path) == offset(there, path) == len(BODY)
    assert here.get(f"/api/files/{answer.headers['coffer-file-id']}").json()["sha256"] == hashlib.sha256(BODY).hexdigest()
    assert usage(there) == (len(BODY), 0) and path.rpartition("/")[2] not in pair[0].incoming()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("verb", ["HEAD", "PATCH", "DELETE"])
def test_a_hanging_connection_is_taken_over(
    pair: tuple[RunningServer, RunningServer], here: httpx.Client, there: httpx.Client, user_id: str, where: str, verb: str
) -> None:
    client = here if where == "here" else there
    path = created(here)
    hanging = HalfSent(pair[0], user_id, path, 0, BODY[:HALF])
    written = arrived(pair[0], path, MOST)
    began = time.monotonic()
    match verb:
        case "HEAD":
            assert written <= offset(client, path) <= HALF
        case "PATCH":  # by a client that does not ask first
            answer = patch(client, path, 0, BODY)
            assert answer.status_code == 409 and written <= answer.json()["offset_bytes"] <= HALF
        case "DELETE":
            assert client.delete(path, headers=VERSION).status_code == 204
    told(f"taken over by {verb} {where}", time.monotonic() - began)
    assert hanging.answered() in (b"423", b"")
    hanging.end()
    if verb == "DELETE":
        assert client.head(path, headers=VERSION).status_code == 404 and usage(client) == (0, 0)
    else:
        finish(client, path)
        assert usage(client) == (len(BODY), 0)
    assert path.rpartition("/")[2] not in pair[0].incoming()


def test_two_who_write_take_turns(pair: tuple[RunningServer, RunningServer], here: httpx.Client, there: httpx.Client, user_id: str) -> None:
    """Whoever comes last has it, and each time all that had been written is there."""
    path = created(here)
    at = 0
    for number in range(6):
        hanging = HalfSent(pair[number % 2], user_id, path, at, BODY[at : at + 400_000])
        written = arrived(pair[0], path, at + 1)
        began, at = at, offset((here, there, there, here)[number % 4], path)
        assert written <= at <= began + 400_000
        assert hanging.answered() in (b"423", b"")
        hanging.end()
    finish(here, path)
    assert usage(there) == (len(BODY), 0)


def test_two_who_ask_at_once_get_the_same_answer(
    pair: tuple[RunningServer, RunningServer], here: httpx.Client, there: httpx.Client, user_id: str
) -> None:
    path = created(here)
    hanging = HalfSent(pair[0], user_id, path, 0, BODY[:HALF])
    arrived(pair[0], path, MOST)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda client: offset(client, path), [here, there] * 4))) == 1
    hanging.end()
    finish(there, path)


def test_a_killed_server_leaves_the_upload_to_another(start_server: ServerFactory, tmp_path: Path) -> None:
    server = start_server()
    other = beside(server, tmp_path / "other.log")
    other.start()
    try:
        with other.client("ada", timeout=30) as there:
            path = created(there)
            hanging = HalfSent(server, "ada", path, 0, BODY[:HALF])
            written = arrived(server, path, MOST)
            server.kill()
            began = time.monotonic()
            assert written <= offset(there, path) <= HALF
            told("taken over from a dead server", time.monotonic() - began)
            hanging.end()
            finish(there, path)
            assert usage(there) == (len(BODY), 0)
    finally:
        other.kill()
    assert other.incoming() == []


def test_a_server_that_stands_still_never_writes_again(start_server: ServerFactory, tmp_path: Path) -> None:
    """What it has of the upload when it wakes up goes nowhere."""
    server = start_server()
    other = beside(server, tmp_path / "other.log")
    other.start()
    try:
        with other.client("ada", timeout=30) as there:
            path = created(there)
            hanging = HalfSent(server, "ada", path, 0, BODY[:HALF])
            written = arrived(server, path, MOST)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                hanging.send(image(400_000, seed=9))  # not what the client sends there; it waits in the kernel
                began = time.monotonic()
                at = offset(there, path)
                told(f"taken over from a server that stands still, with {at} bytes,", time.monotonic() - began)
                assert written <= at <= HALF
                assert patch(there, path, at, BODY[at:2_000_000]).status_code == 204
            finally:
                os.kill(server.pid, signal.SIGCONT)
            hanging.send(image(400_000, seed=9))
            assert hanging.answered() in (b"423", b"")
            hanging.end()
            assert offset(there, path) == 2_000_000
            finish(there, path)
            assert usage(there) == (len(BODY), 0)
    finally:
        other.kill()
    assert server.stored_files() == {hashlib.sha256(BODY).hexdigest()}


def test_a_server_that_stood_still_for_longer_than_its_lease_goes_on(start_server: ServerFactory) -> None:
    """Nobody else has asked for the upload in the meantime, so that its client need not know."""
    server = start_server()
    with server.client("ada", timeout=30) as client:
        path = created(client)
        sending = HalfSent(server, "ada", path, 0, BODY[:HALF])
        arrived(server, path, MOST)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            sending.send(BODY[HALF : HALF + 400_000])  # it waits in the kernel
            until(lambda: execute(server.database_url, "select from resumable_uploads where held_until < clock_timestamp()"))
        finally:
            os.kill(server.pid, signal.SIGCONT)
        sending.send(BODY[HALF + 400_000 :])
        assert sending.answered() == b"204"
        sending.end()
        assert usage(client) == (len(BODY), 0)
    assert server.stored_files() == {hashlib.sha256(BODY).hexdigest()}


@pytest.mark.parametrize("how", ["close", "reset", "in mid-chunk"])
def test_a_client_that_goes_away_finds_its_bytes(
    pair: tuple[RunningServer, RunningServer], here: httpx.Client, user_id: str, how: str
) -> None:
    server = pair[0]
    path = created(here)
    at = 0
    for sent in (700_000, 10, 1_500_000):
        piece = BODY[at : at + sent]
        if how == "in mid-chunk":
            gone = HalfSent(server, user_id, path, at, b"300000\r\n" + piece, is_chunked=True)
        else:
            gone = HalfSent(server, user_id, path, at, piece)
        until(lambda: is_held(server, path))
        written = arrived(server, path, max(0, at + sent - 600_000)) if at + sent > 600_000 else 0
        gone.end(reset=how == "reset")
        until(lambda: not is_held(server, path))
        began, at = at, offset(here, path)
        # A reset may overtake what was sent before.
        assert max(began, written) <= at <= began + sent if how == "reset" else at == began + sent
    finish(here, path)
    assert usage(here) == (len(BODY), 0)


def test_a_client_that_goes_away_before_it_is_heard_finds_its_bytes(
    pair: tuple[RunningServer, RunningServer], here: httpx.Client, user_id: str
) -> None:
    """The connection has ended before the server has found out who it was and whose the upload is."""
    path = created(here)
    HalfSent(pair[0], user_id, path, 0, BODY[:10]).end()
    # A HEAD would want the upload from whoever is about to write.
    recorded = "select offset_bytes from resumable_uploads where id = $1 and held_by is null"
    until(lambda: [row["offset_bytes"] for row in execute(pair[0].database_url, recorded, path.rpartition("/")[2])] == [10])
    assert offset(here, path) == 10
    finish(here, path)


def test_a_client_that_dawdles_is_cut_off_and_finds_its_bytes(
    pair: tuple[RunningServer, RunningServer], here: httpx.Client, user_id: str
) -> None:
    path = created(here)
    slow = HalfSent(pair[0], user_id, path, 0, BODY[:1_000])
    assert slow.answered() == b"408"
    slow.end()
    assert offset(here, path) == 1_000
    finish(here, path)


def test_more_than_was_declared_is_refused(here: httpx.Client) -> None:
    """What fits stays, and the rest is sent again."""
    path = created(here)
    assert patch(here, path, 0, BODY[:HALF]).status_code == 204
    answer = patch(here, path, HALF, BODY[HALF:] + b"more")
    assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")
    assert HALF <= offset(here, path) <= len(BODY)
    finish(here, path)
    assert usage(here) == (len(BODY), 0)


def test_a_stop_in_mid_patch_keeps_what_came(server: RunningServer) -> None:
    with server.client("ada", timeout=30) as client:
        path = created(client)
        hanging = HalfSent(server, "ada", path, 0, BODY[:HALF])
        written = arrived(server, path, MOST)
        began = time.monotonic()
        server.stop()
        told("stopped", time.monotonic() - began, most=20)  # it did not wait for the client, for which it would have 30
        assert hanging.answered() in (b"423", b"")
        hanging.end()
        assert not is_held(server, path)
        server.start()
    with server.client("ada", timeout=30) as client:
        assert written <= offset(client, path) <= HALF
        finish(client, path)


def held_by(server: RunningServer, user_id: str) -> int:
    """What the user's uploads hold: creations whose answer was lost are uploads too, which expire."""
    (row,) = execute(
        server.database_url, "select coalesce(sum(reserved_bytes), 0)::bigint as bytes from uploads where user_id = $1", user_id
    )
    held_bytes: int = row["bytes"]
    return held_bytes


def test_many_faults_on_the_way_end_with_the_same_bytes(start_server: ServerFactory) -> None:
    """Short form: `make torture` does more of the same."""
    server = start_server(COFFER_TUS_SYNC_BYTES=str(2**20))
    bodies = [image(5_000_000, seed) for seed in range(4)]
    with Proxy(server.host, server.port, faults=40, within_bytes=300_000, seed=5) as proxy, ThreadPoolExecutor(4) as pool:
        headers = [{"Authorization": f"Bearer {server.api_key}", "X-User-Id": f"user-{number}"} for number in range(4)]
        uploads = [
            PersistentUpload([proxy.url], *each, piece_bytes=500_000, timeout_seconds=1) for each in zip(headers, bodies, strict=True)
        ]
        try:
            list(pool.map(PersistentUpload.run, uploads))
        finally:
            for upload in uploads:
                upload.close()
        log.info("%s; %s", dict(proxy.done), [dict(upload.answers) for upload in uploads])
        told("known again", max(upload.waited_seconds for upload in uploads), most=20)
        assert proxy.done.total() == 40
    for number, (upload, body) in enumerate(zip(uploads, bodies, strict=True)):
        with server.client(f"user-{number}", timeout=30) as client:
            assert client.get(f"/api/files/{upload.file_id}/download").content == body
            file = client.get(f"/api/files/{upload.file_id}").json()
            assert file["sha256"] == hashlib.sha256(body).hexdigest()
            leftover = client.get("/api/storage/usage").json()
            begun = execute(
                server.database_url, "select coalesce(sum(reserved_bytes), 0) as bytes from uploads where user_id = $1", f"user-{number}"
            )
            assert (leftover["used_bytes"], leftover["reserved_bytes"]) == (len(body), begun[0]["bytes"])
