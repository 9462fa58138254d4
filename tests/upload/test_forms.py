"""`POST /api/files/upload` as `multipart/form-data`."""

import base64
import hashlib
from typing import Any

import pytest

from tests.samples import image, video
from tests.serving import RunningServer

MIB = 2**20


@pytest.mark.parametrize("size", [1_000, 3 * MIB])
def test_a_file_with_its_fields_in_any_order(server: RunningServer, size: int) -> None:
    body = image(size)
    with server.client("ada") as client:
        for order in (0, 1):
            fields: list[tuple[str, Any]] = [
                ("type", (None, "image")),
                ("tags", (None, "sea,sun")),
                ("tags", (None, "sand")),
                ("metadata", (None, '{"a": 1}')),
            ]
            parts: list[tuple[str, Any]] = [("file", ("beach.png", body, "image/png"))]
            answer = client.post("/api/files/upload", files=fields + parts if order else parts + fields)
            assert answer.status_code == 201, answer.text
            file = answer.json()
            assert (file["file_name"], file["tags"], file["metadata"]) == ("beach.png", ["sea", "sun", "sand"], {"a": 1})
            assert client.get(f"/api/files/{file['id']}/download").content == body
    assert server.incoming() == []


def test_several_files_each_get_an_answer(server: RunningServer) -> None:
    with server.client("ada") as client:
        answer = client.post(
            "/api/files/upload",
            files=[("a", ("one.png", image(seed=1))), ("b", ("no.txt", b"just text")), ("c", ("two.mp4", video(3 * MIB)))],
        )
        assert answer.status_code == 207
        results = answer.json()["results"]
        assert [each["status"] for each in results] == [201, 415, 201]
        assert results[0]["file"]["file_name"] == "one.png" and results[2]["file"]["file_type"] == "video"
        assert results[1]["problem"]["code"] == "unsupported_type"
        assert client.get("/api/storage/usage").json()["file_count"] == 2
    assert server.incoming() == []


def test_all_well_is_a_plain_201(server: RunningServer) -> None:
    with server.client("ada") as client:
        answer = client.post("/api/files/upload", files=[("a", ("1.png", image(seed=1))), ("a", ("2.png", image(seed=2)))])
        assert answer.status_code == 201
        assert [each["file"]["file_name"] for each in answer.json()["results"]] == ["1.png", "2.png"]


def test_a_later_file_over_the_quota_leaves_the_first(server: RunningServer) -> None:
    with server.client("ada") as client:
        server.set_quota("ada", 3 * MIB)
        answer = client.post("/api/files/upload", files=[("a", ("1.png", image(2 * MIB))), ("a", ("2.png", image(2 * MIB)))])
        assert answer.status_code == 207
        assert [each["status"] for each in answer.json()["results"]] == [201, 413]
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"]) == (2 * MIB, 0)


def test_digests_of_a_part_and_of_the_form(server: RunningServer) -> None:
    body = image()
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    boundary = "xxxxxxxx"

    def form(part_digest: str) -> bytes:
        disposition = 'Content-Disposition: form-data; name="file"; filename="a.png"'
        head = f"--{boundary}\r\n{disposition}\r\nContent-Digest: sha-256=:{part_digest}:\r\n\r\n"
        return head.encode() + body + f"\r\n--{boundary}--\r\n".encode()

    with server.client("ada") as client:
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        assert client.post("/api/files/upload", content=form(digest), headers=headers).status_code == 201
        wrong = client.post("/api/files/upload", content=form(base64.b64encode(bytes(32)).decode()), headers=headers)
        assert wrong.json()["code"] == "digest_mismatch"
        whole = base64.b64encode(hashlib.sha256(form(digest)).digest()).decode()
        headers["Content-Digest"] = f"sha-256=:{whole}:"
        assert client.post("/api/files/upload", content=form(digest), headers=headers).status_code == 201
        headers["Content-Digest"] = f"sha-256=:{digest}:"
        assert client.post("/api/files/upload", content=form(digest), headers=headers).json()["code"] == "digest_mismatch"
        assert client.get("/api/storage/usage").json()["file_count"] == 2


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=", b""),
        ("multipart/form-data; boundary=x", b"nothing of the sort"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Type: image/png\r\n\r\n\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="type"\r\n\r\nimage\r\n--x--\r\n'),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="type"\r\n\r\n\xff\r\n--x--\r\n'),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="m"\r\n\r\n' + b"m" * 200_000 + b"\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 65 + b"--x--\r\n"),
    ],
)
def test_malformed_forms_get_a_clear_refusal(server: RunningServer, content_type: str, body: bytes) -> None:
    with server.client("ada") as client:
        answer = client.post("/api/files/upload", content=body, headers={"Content-Type": content_type})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request"), answer.text


def test_a_form_that_ends_early_stores_nothing(server: RunningServer) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + image(2 * MIB)
    with server.client("ada") as client:
        answer = client.post("/api/files/upload", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert (answer.status_code, answer.json()["code"]) == (400, "incomplete_body")
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"]) == (0, 0)
    assert server.stored_files() == set() and server.incoming() == []


def test_the_querys_fields_count_unless_the_form_says_otherwise(server: RunningServer) -> None:
    with server.client("ada") as client:
        fields: list[tuple[str, Any]] = [("file", ("a.png", image())), ("tags", (None, "own"))]
        file = client.post("/api/files/upload?name=query.png&tags=one,two", files=fields).json()
        assert (file["file_name"], file["tags"]) == ("query.png", ["own"])
