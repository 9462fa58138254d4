"""Downloads from a running server: through real HTTP, from real rows and files."""

import base64
import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.message import Message
from email.utils import collapse_rfc2231_value
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from server.auth import Scope
from server.delivery.service import READ_BYTES
from tests.processes import open_below
from tests.samples import image
from tests.serving import RunningServer, ServerFactory
from tests.waiting import until

MIB = 2**20
BODY = image(3 * MIB + 5)


def stored(client: httpx.Client, body: bytes, name: str = "a.png") -> tuple[dict[str, Any], str]:
    """Uploads; returns the file's description and the path of its download."""
    answer = client.post("/api/files/upload", content=body, params={"name": name})
    assert answer.status_code == 201, answer.text
    return answer.json(), f"/api/files/{answer.json()['id']}/download"


def name_in(answer: httpx.Response) -> str:
    """The name under which RFC 6266 has a client save it."""
    message = Message()
    message["Content-Disposition"] = answer.headers["content-disposition"]
    return collapse_rfc2231_value([value for key, value in message.get_params([], "content-disposition") if key == "filename"][-1])


def without_ids(answer: httpx.Response) -> tuple[int, dict[str, Any]]:
    return answer.status_code, {key: value for key, value in answer.json().items() if key != "request_id"}


def test_what_http_clients_do(server: RunningServer) -> None:
    """One connection throughout, so an answer that is longer or shorter than announced spoils the next."""
    with server.client("ada") as client:
        file, url = stored(client, BODY, "Sonnenuntergang 🌅 “50%”.png")
        whole = client.get(url)
        assert (whole.status_code, whole.content) == (200, BODY)
        assert whole.headers["etag"] == file["etag"] == f'"{hashlib.sha256(BODY).hexdigest()}"'
        assert whole.headers["repr-digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(BODY).digest()).decode()}:"
        assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("image/png", "bytes")
        assert whole.headers["content-disposition"].startswith("inline; ")
        assert name_in(whole) == "Sonnenuntergang 🌅 “50%”.png"
        assert client.get(url, params={"disposition": "attachment"}).headers["content-disposition"].startswith("attachment; ")
        assert (whole.headers["x-content-type-options"], whole.headers["cache-control"]) == ("nosniff", "private, no-cache, no-transform")
        assert "sandbox" in whole.headers["content-security-policy"]

        head = client.head(url)
        varying = {"date", "x-request-id"}
        assert (head.status_code, head.content) == (200, b"")
        assert {key: value for key, value in head.headers.items() if key not in varying} == {
            key: value for key, value in whole.headers.items() if key not in varying
        }

        for asked, start, end in (
            ("0-0", 0, 1),
            ("-7", len(BODY) - 7, len(BODY)),
            (f"{MIB}-", MIB, len(BODY)),
            ("5-99999999", 5, len(BODY)),
        ):
            part = client.get(url, headers={"Range": f"bytes={asked}"})
            assert (part.status_code, part.content) == (206, BODY[start:end])
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(BODY)}"
        assert client.get(url, headers={"Range": "bytes=0-0,5-6"}).content == BODY

        beyond = client.get(url, headers={"Range": f"bytes={len(BODY)}-"})
        assert (beyond.status_code, beyond.json()["code"], beyond.json()["size_bytes"]) == (416, "range_not_satisfiable", len(BODY))
        assert beyond.headers["content-range"] == f"bytes */{len(BODY)}"

        for header, value in (("If-None-Match", f'"x", W/{file["etag"]}'), ("If-Modified-Since", whole.headers["last-modified"])):
            cached = client.get(url, headers={header: value, "Range": "bytes=0-0"})
            assert (cached.status_code, cached.content, cached.headers["etag"]) == (304, b"", file["etag"])
        failed = client.get(url, headers={"If-Match": '"x"'})
        assert (failed.status_code, failed.json()["code"]) == (412, "precondition_failed")
        strange = client.get(url, params={"disposition": "open"})
        assert (strange.status_code, strange.json()["field"]) == (400, "disposition")
        assert client.get(url).content == BODY


def test_a_download_continues_only_with_the_bytes_it_began_with(server: RunningServer) -> None:
    with server.client("ada") as client:
        file, url = stored(client, BODY)
        pieces = b""
        while len(pieces) < len(BODY):
            headers = {"Range": f"bytes={len(pieces)}-{len(pieces) + MIB - 1}", "If-Range": file["etag"]}
            pieces += client.get(url, headers=headers).content
        assert pieces == BODY

        date = client.head(url).headers["last-modified"]
        assert client.get(url, headers={"Range": "bytes=9-", "If-Range": date}).status_code == 206
        other = image(2 * MIB, 1)
        assert client.put(f"/api/files/{file['id']}/content", content=other).status_code == 200
        for validator in (file["etag"], date):
            again = client.get(url, headers={"Range": "bytes=9-", "If-Range": validator})
            assert (again.status_code, again.content) == (200, other)


def test_a_name_too_long_for_a_header_is_cut_there_alone(server: RunningServer) -> None:
    name = "🌅" * 496 + ".png"
    with server.client("ada") as client:
        file, url = stored(client, BODY, name)
        assert file["file_name"] == client.get(f"/api/files/{file['id']}").json()["file_name"] == name
        head = client.head(url)
        assert len(head.headers["content-disposition"]) <= 2_048
        assert sum(len(key) + len(value) + 4 for key, value in head.headers.items()) < 3_584  # nginx's 4 KiB, with room for its own
        assert name_in(head).endswith("🌅.png") and name.startswith(name_in(head).removesuffix(".png"))


def test_nobody_else_learns_that_the_file_exists(server: RunningServer) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        _, url = stored(ada, BODY)
        missing = f"/api/files/{uuid4()}/download"
        conditions: list[dict[str, str]] = [{}, {"If-None-Match": "*"}, {"Range": "bytes=99999999-"}, {"If-Match": '"x"'}]
        for headers in conditions:
            assert without_ids(bob.get(url, headers=headers)) == without_ids(bob.get(missing, headers=headers))
            assert bob.get(url, headers=headers).status_code == 404
            assert bob.head(url, headers=headers).status_code == 404
        assert httpx.get(server.url + url, headers={"X-User-Id": "ada"}).status_code == 401
        with server.client("ada", api_key=server.new_key(Scope.FILES_WRITE)) as writer:
            assert writer.get(url).status_code == 403
        assert ada.get(url).content == BODY


def test_damage_is_told_before_the_answer_begins(server: RunningServer) -> None:
    with server.client("ada") as client:
        _, url = stored(client, BODY)
        (path,) = server.stored_paths()
        path.chmod(0o600)
        path.write_bytes(BODY[:-1])
        for _ in range(2):
            answer = client.get(url, headers={"Range": "bytes=0-0"})
            assert (answer.status_code, answer.json()["code"]) == (410, "damaged")
            assert client.head(url).status_code == 410
            path.unlink(missing_ok=True)


# Long answers and what happens under them


@contextmanager
def slow_download(server: RunningServer, url: str) -> Iterator[socket.socket]:
    """A client that has asked and does not read, with little room for bytes under way."""
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.settimeout(10)
        client.connect((server.host, server.port))
        headers = ("Host: coffer", f"Authorization: Bearer {server.api_key}", "X-User-Id: ada", "Connection: close")
        client.sendall("\r\n".join((f"GET {url} HTTP/1.1", *headers, "", "")).encode())
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        yield client


def rest_of(client: socket.socket) -> bytes:
    """What arrives until the connection ends, from the body on."""
    received = bytearray()
    try:
        while chunk := client.recv(MIB):
            received += chunk
    except ConnectionResetError:
        pass
    return bytes(received).partition(b"\r\n\r\n")[2]


def open_files(server: RunningServer) -> int:
    """How many stored files the server has open."""
    return len(open_below(server.volume / "users", server.pid))


def bytes_read(server: RunningServer) -> int:
    """How many bytes the server has read from files so far."""
    lines = Path(f"/proc/{server.pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


@pytest.fixture(params=[True, False], ids=["sendfile", "reading"])
def sends_files(request: pytest.FixtureRequest) -> bool:
    """Whether the kernel sends them."""
    return bool(request.param)


@pytest.fixture
def roomy(start_server: ServerFactory, sends_files: bool) -> RunningServer:
    """A server that takes files longer than all buffers between it and a client."""
    return start_server(COFFER_MAX_FILE_BYTES=str(64 * MIB), COFFER_SENDFILE=str(sends_files).lower())


def test_long_answers(roomy: RunningServer, sends_files: bool) -> None:
    body = image(48 * MIB)
    with roomy.client("ada") as client:
        file, url = stored(client, body)

        # A client that goes away: the file is closed, and the reading stops.
        before = bytes_read(roomy)
        with slow_download(roomy, url):
            until(lambda: open_files(roomy) == 1)
        until(lambda: open_files(roomy) == 0)
        assert bytes_read(roomy) - before < len(body) / 2

        # Stalled clients cost some reads each, not the file; and where the kernel sends it, not even those.
        before = roomy.peak_memory_bytes()
        stalled = [slow_download(roomy, url) for _ in range(12)]
        for each in stalled:
            each.__enter__()
        until(lambda: open_files(roomy) == 12)
        assert roomy.peak_memory_bytes() - before < 12 * (1 if sends_files else 6) * READ_BYTES
        for each in stalled:
            each.__exit__(None, None, None)
        until(lambda: open_files(roomy) == 0)

        # Deleted under way: who has begun gets all of it, who comes later nothing.
        with slow_download(roomy, url) as slow:
            assert client.delete(f"/api/files/{file['id']}").status_code == 204
            assert client.get(url).status_code == 404
            assert roomy.stored_paths() == []
            assert rest_of(slow) == body
        until(lambda: open_files(roomy) == 0)

        # Cut short under way: the connection ends before the announced length, so nobody takes it for whole.
        _, url = stored(client, body)
        (path,) = roomy.stored_paths()
        with slow_download(roomy, url) as slow:
            path.chmod(0o600)
            with path.open("r+b") as damaged:
                damaged.truncate(len(body) - 1)
            received = rest_of(slow)
        # Of what is missing nothing is made up. Where it is read, not even the piece that is short is sent.
        assert body[:-1].startswith(received) and (sends_files or len(received) < len(body) - 1)
        # Told, but with no traceback: on a disk that fails, there would be one for each request.
        assert '"request failed"' in roomy.logged() and '"error":"Damaged"' in roomy.logged() and "Traceback" not in roomy.logged()
        until(lambda: open_files(roomy) == 0)


def test_an_answer_is_of_one_version_while_the_file_is_replaced(server: RunningServer) -> None:
    """The ETag of every answer, whole or not, is that of its bytes: never a row of one version with bytes of another."""
    versions = [image(MIB + number, number) for number in range(6)]
    by_etag = {f'"{hashlib.sha256(each).hexdigest()}"': each for each in versions}
    seen = set()
    with server.client("ada") as client:
        file, url = stored(client, versions[0])
        over = threading.Event()

        def replace_again_and_again() -> None:
            with server.client("ada") as other:
                for _ in range(5):
                    for each in versions:
                        assert other.put(f"/api/files/{file['id']}/content", content=each).status_code == 200
            over.set()

        replacing = threading.Thread(target=replace_again_and_again)
        replacing.start()
        while replacing.is_alive():
            answer = client.get(url)
            assert answer.status_code == 200, answer.text
            assert answer.content == by_etag[answer.headers["etag"]]
            part = client.get(url, headers={"Range": "bytes=-10"})
            assert part.status_code == 206, part.text
            assert part.content == by_etag[part.headers["etag"]][-10:]
            seen.add(answer.headers["etag"])
        replacing.join()
        assert over.is_set()
    assert len(seen) > 1
