"""`POST /api/files/upload` with the file's own bytes as the body."""

import base64
import hashlib
from collections.abc import Iterator

import pytest

from tests.samples import image, video
from tests.serving import RunningServer

MIB = 2**20


@pytest.mark.parametrize("size", [1_000, 200_000, MIB, MIB + 1, 5 * MIB])
def test_every_size_comes_back_byte_for_byte(server: RunningServer, size: int) -> None:
    body = image(size)
    with server.client("ada") as client:
        answer = client.post("/api/files/upload", content=body, params={"name": "Šárka's photo 🐬.png", "type": "image", "tags": "a,b"})
        assert answer.status_code == 201, answer.text
        file = answer.json()
        assert answer.headers["location"] == f"/api/files/{file['id']}"
        assert answer.headers["etag"] == file["etag"] == f'"{hashlib.sha256(body).hexdigest()}"'
        assert (file["file_name"], file["file_type"], file["mime_type"], file["file_size"]) == (
            "Šárka's photo 🐬.png",
            "image",
            "image/png",
            size,
        )
        assert file["tags"] == ["a", "b"]
        assert client.get(f"/api/files/{file['id']}/download").content == body
        assert client.get("/api/storage/usage").json()["used_bytes"] == size
    assert server.stored_files() == {hashlib.sha256(body).hexdigest()}


@pytest.mark.parametrize("user", ["previews", "users", "quarantine"])
def test_a_user_may_be_called_as_our_directories_are(server: RunningServer, user: str) -> None:
    with server.client(user) as client:
        file = client.post("/api/files/upload", content=image(1_000)).json()
        assert client.get(f"/api/files/{file['id']}/download").content == image(1_000)
        assert client.put(f"/api/files/{file['id']}/content", content=image(2_000)).status_code == 200
        assert client.get(f"/api/files/{file['id']}/download").content == image(2_000)
        assert client.delete(f"/api/files/{file['id']}").status_code == 204
    assert server.stored_files() == set()


@pytest.mark.parametrize("size", [1_000, 3 * MIB])
def test_an_undeclared_length_is_as_good(server: RunningServer, size: int) -> None:
    body = video(size)

    def pieces() -> Iterator[bytes]:
        for at in range(0, size, 70_000):
            yield body[at : at + 70_000]

    with server.client("ada") as client:
        answer = client.post("/api/files/upload", content=pieces())
        assert answer.status_code == 201, answer.text
        assert client.get(f"/api/files/{answer.json()['id']}/download").content == body
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"]) == (size, 0)


@pytest.mark.parametrize("size", [1_000, 3 * MIB])
@pytest.mark.parametrize(
    ("header", "algorithm"),
    [("Content-Digest", "sha-256"), ("Repr-Digest", "sha-256"), ("Content-Digest", "sha-512"), ("Content-MD5", "md5")],
)
def test_digests_are_checked_before_anything_is_published(server: RunningServer, size: int, header: str, algorithm: str) -> None:
    body = image(size)

    def value(data: bytes) -> str:
        digest = base64.b64encode(hashlib.new(algorithm.replace("-", ""), data, usedforsecurity=False).digest()).decode()
        return digest if header == "Content-MD5" else f"crc32c=:AAAAAA==:, {algorithm}=:{digest}:"

    with server.client("ada") as client:
        assert client.post("/api/files/upload", content=body, headers={header: value(body)}).status_code == 201
        wrong = client.post("/api/files/upload", content=body, headers={header: value(body + b"!")})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "digest_mismatch")
        malformed = client.post("/api/files/upload", content=body, headers={header: "sha-256=nonsense"})
        assert (malformed.status_code, malformed.json()["code"]) == (400, "invalid_request")
        assert client.get("/api/storage/usage").json()["file_count"] == 1
    assert len(server.stored_files()) == 1 and server.incoming() == []


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", None, 415, "unsupported_type"),
        (b"hello, world", "image", 415, "unsupported_type"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image", 415, "unsupported_type"),
        (b"<svg " + b" " * 3 * MIB, "image", 415, "unsupported_type"),
        (image(), "video", 415, "type_mismatch"),
        (image(3 * MIB), "video", 415, "type_mismatch"),
        (image(), "picture", 400, "invalid_request"),
        (b'{"nodes": []}', None, 400, "kind_required"),
    ],
)
def test_the_bytes_decide_the_type(server: RunningServer, body: bytes, kind: str | None, status: int, code: str) -> None:
    with server.client("ada") as client:
        answer = client.post(
            "/api/files/upload", content=body, params={"type": kind} if kind else {}, headers={"Content-Type": "image/jpeg"}
        )
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"], usage["file_count"]) == (0, 0, 0)
    assert server.stored_files() == set() and server.incoming() == []


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "x" * 501])
def test_bad_names_are_refused_and_odd_ones_round_trip(server: RunningServer, name: str) -> None:
    with server.client("ada") as client:
        refused = client.post("/api/files/upload", content=image(), params={"name": name})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
        for odd in ("../../etc/passwd", "-rf", "CON", "%2e%2e", "é" * 500, "e\u0301", "a/b\\c"):
            kept = client.post("/api/files/upload", content=image(), params={"name": odd})
            assert kept.json()["file_name"] == odd


def test_a_file_over_the_limit_is_refused_before_its_body(server: RunningServer) -> None:
    limit = 6 * MIB  # the fixture's COFFER_MAX_FILE_BYTES
    with server.client("ada") as client:
        declared = client.post("/api/files/upload", content=image(limit + 1))
        assert (declared.status_code, declared.json()["code"], declared.json()["limit_bytes"]) == (413, "file_too_large", limit)
        body = image(limit + 1)
        undeclared = client.post("/api/files/upload", content=iter([body[: 4 * MIB], body[4 * MIB :]]))
        assert (undeclared.status_code, undeclared.json()["code"]) == (413, "file_too_large")
        assert client.get("/api/storage/usage").json()["reserved_bytes"] == 0
    assert server.stored_files() == set() and server.incoming() == []


@pytest.mark.parametrize("query", ["name=%FF", "&".join(f"a{number}=1" for number in range(101))])
def test_a_query_that_cannot_be_read_is_refused(server: RunningServer, query: str) -> None:
    with server.client("ada") as client:
        answer = client.post(f"/api/files/upload?{query}", content=image())
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
