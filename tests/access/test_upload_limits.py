"""How much one user may have under way: uploads, upload links, memory of small uploads."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import httpx
import pytest

from tests.access.test_download_links import code
from tests.access.test_upload_links import upload_link
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

SMALL, LARGE = 100_000, 3_000_000


class Slow:
    """An upload whose body does not come to its end until it is told to."""

    def __init__(self, server: RunningServer, head: str, body: bytes, sent_bytes: int = 1_000) -> None:
        self._connection = socket.create_connection((server.host, server.port), timeout=20)
        self._connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:sent_bytes])
        self._rest = body[sent_bytes:]

    @classmethod
    def of(cls, server: RunningServer, user: str, size: int, sent_bytes: int = 1_000) -> "Slow":
        head = f"POST /api/files/upload HTTP/1.1\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: {user}"
        return cls(server, head, image(size), sent_bytes)

    def finish(self) -> int:
        """Sends the rest, unless the answer has come already, and returns the answer's status."""
        self._connection.sendall(self._rest)
        return self.status()

    def status(self) -> int:
        """Waits for the answer."""
        return int(self._connection.recv(12).rpartition(b" ")[2])

    def close(self) -> None:
        self._connection.close()


def reservations(server: RunningServer) -> int:
    count: int = execute(server.database_url, "select count(*) from uploads")[0]["count"]
    return count


@contextmanager
def slow_uploads(server: RunningServer, user: str, count: int, size: int, sent_bytes: int = 1_000) -> Iterator[list[Slow]]:
    with ExitStack() as stack:
        client = stack.enter_context(server.client(user))
        # From here on the server knows the key and the user's place, so that it counts an upload as soon as it has its head.
        client.post("/api/files/upload", content=image()).raise_for_status()
        before = server.in_flight()
        uploads = [stack.enter_context(closing(Slow.of(server, user, size, sent_bytes))) for _ in range(count)]
        until(lambda: server.in_flight() == before + count)
        yield uploads


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_user_has_so_many_uploads_at_once(start_server: ServerFactory, size: int) -> None:
    server = start_server(COFFER_UPLOADS_AT_ONCE_PER_USER="3")
    with server.client("ada") as ada, server.client("bob") as bob, slow_uploads(server, "ada", 3, size) as uploads:
        until(lambda: reservations(server) == (3 if size == LARGE else 0))
        with closing(Slow.of(server, "ada", LARGE)) as early:  # refused before its body
            assert early.status() == 429
        refused = ada.post("/api/files/upload", content=image())
        assert (code(refused), refused.json()["limit"], refused.headers["retry-after"]) == ((429, "too_many_uploads"), 3, "5")
        for path in ("/api/files", "/api/storage/usage"):
            assert ada.get(path).status_code == 200
        assert bob.post("/api/files/upload", content=image(size)).status_code == 201
        assert uploads[0].finish() == 201
        assert ada.post("/api/files/upload", content=image(size, 1)).status_code == 201
        uploads[1].close()  # one that is given up makes room too
        until(lambda: server.in_flight() == 1)
        with closing(Slow.of(server, "ada", size)) as third, closing(Slow.of(server, "ada", size)) as fourth:
            until(lambda: server.in_flight() == 3)
            assert code(ada.post("/api/files/upload", content=image())) == (429, "too_many_uploads")
            assert (third.finish(), fourth.finish(), uploads[2].finish()) == (201, 201, 201)
        assert ada.get("/api/storage/usage").json()["reserved_bytes"] == 0
    assert server.incoming() == []


def test_processes_count_reservations_together(start_server: ServerFactory) -> None:
    server = start_server(COFFER_UPLOADS_AT_ONCE_PER_USER="5", COFFER_PROCESSES="2")
    until(lambda: server.logged().count('"message":"started"') == 2)
    with ExitStack() as stack:
        uploads = [stack.enter_context(closing(Slow.of(server, "ada", LARGE))) for _ in range(30)]
        until(lambda: server.in_flight() == 5 and reservations(server) == 5)
        finished = [upload.finish() for upload in uploads if not refused_already(upload)]
    assert finished == [201] * 5


def refused_already(upload: Slow) -> bool:
    upload._connection.setblocking(False)
    try:
        return b" 429 " in upload._connection.recv(200)
    except BlockingIOError:
        return False
    finally:
        upload._connection.settimeout(20)


def test_a_form_says_which_of_its_files_were_too_many(start_server: ServerFactory) -> None:
    server = start_server(COFFER_UPLOADS_AT_ONCE_PER_USER="2")
    with server.client("ada") as ada:
        answer = ada.post("/api/files/upload", files=[("file", (f"{n}.png", image(seed=n))) for n in range(3)])
        assert answer.status_code == 207
        assert [result["status"] for result in answer.json()["results"]] == [201, 201, 429]
        assert ada.post("/api/files/upload", content=image()).status_code == 201


def test_upload_links_are_counted_apart(start_server: ServerFactory) -> None:
    server = start_server(COFFER_UPLOAD_LINKS_PER_USER="2", COFFER_UPLOADS_AT_ONCE_PER_USER="1")
    with server.client("ada") as ada, server.client("bob") as bob:
        first, second = upload_link(ada), upload_link(ada)
        refused = ada.post("/api/uploads/links", json={"max_bytes": 1_000})
        assert (code(refused), refused.json()["limit"]) == ((429, "too_many_uploads"), 2)
        assert ada.get("/api/storage/usage").json()["reserved_bytes"] == 800_000
        upload_link(bob)
        assert ada.post("/api/files/upload", content=image(LARGE)).status_code == 201  # unused links are no uploads under way
        assert ada.delete(f"/api/uploads/links/{first['file_id']}").status_code == 204
        third = upload_link(ada)
        with closing(Slow(server, f"PUT {second['url']} HTTP/1.1", image(300_000))) as upload:
            until(lambda: server.in_flight() == 1)
            assert code(httpx.put(server.url + third["url"], content=image())) == (429, "too_many_uploads")
            assert code(ada.post("/api/files/upload", content=image(LARGE, 1))) == (429, "too_many_uploads")
            assert code(ada.post("/api/uploads/links", json={"max_bytes": 1_000})) == (429, "too_many_uploads")
            assert upload.finish() == 201
        with slow_uploads(server, "ada", 1, SMALL) as small:  # which has no row, so it is this process that refuses
            assert code(httpx.put(server.url + third["url"], content=image())) == (429, "too_many_uploads")
            assert small[0].finish() == 201
        assert httpx.put(server.url + third["url"], content=image()).status_code == 201  # the refusals left it as it was
        upload_link(ada)


def test_slow_small_uploads_leave_memory_to_others(start_server: ServerFactory) -> None:
    server = start_server(COFFER_BUFFERED_TOTAL_BYTES="4000000")
    with slow_uploads(server, "ada", 4, 1_000_000, 900_000) as adas, slow_uploads(server, "bob", 1, 1_000_000, 900_000) as bobs:
        until(lambda: reservations(server) == 3)  # of 1,000,000 bytes hers may hold, one has 900,000; the others went to disk
        holders = execute(server.database_url, "select distinct user_id from uploads")
        assert [row["user_id"] for row in holders] == ["ada"]
        assert [upload.finish() for upload in (*adas, *bobs)] == [201] * 5
    with slow_uploads(server, "ada", 1, 1_000_000, 900_000) as uploads:  # what was held has been given back
        assert reservations(server) == 0
        assert uploads[0].finish() == 201
