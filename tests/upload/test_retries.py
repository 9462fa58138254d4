"""Repeating an upload with the same `Idempotency-Key`."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.samples import image
from tests.serving import RunningServer

MIB = 2**20


@pytest.mark.parametrize("size", [1_000, 2 * MIB])
@pytest.mark.parametrize("form", [False, True])
def test_fifty_at_once_make_one_file(server: RunningServer, size: int, form: bool) -> None:
    body = image(size)

    def send(_: int) -> httpx.Response:
        with server.client("ada", timeout=60) as client:
            headers = {"Idempotency-Key": "once"}
            if form:
                return client.post("/api/files/upload", files={"file": ("a.png", body)}, headers=headers)
            return client.post("/api/files/upload", content=body, headers=headers)

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(send, range(50)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    with server.client("ada") as client:
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"], usage["file_count"]) == (size, 0, 1)
    assert len(server.stored_files()) == 1 and server.incoming() == []


def test_each_file_of_a_form_is_repeated_on_its_own(server: RunningServer) -> None:
    files = [("a", ("1.png", image(seed=1))), ("b", ("2.png", image(seed=2)))]
    with server.client("ada") as client:
        first, again = (client.post("/api/files/upload", files=files, headers={"Idempotency-Key": "k"}).json() for _ in range(2))
        assert first == again
        assert client.get("/api/storage/usage").json()["file_count"] == 2
        for key in ("k/1", "k-1", "k1", "k:1"):  # no key that a client can choose is that of the second file
            other = client.post("/api/files/upload", content=image(seed=3), headers={"Idempotency-Key": key}).json()
            assert other["id"] not in [result["file"]["id"] for result in first["results"]]


def test_a_failed_first_try_leaves_the_key_free(server: RunningServer) -> None:
    with server.client("ada") as client:
        headers = {"Idempotency-Key": "k"}
        assert client.post("/api/files/upload", content=b"text", headers=headers).status_code == 415
        assert client.post("/api/files/upload", content=image(), headers=headers).status_code == 201


def test_a_key_belongs_to_one_user_and_one_upload(server: RunningServer) -> None:
    headers = {"Idempotency-Key": "k"}
    with server.client("ada") as ada, server.client("bob") as bob:
        first = ada.post("/api/files/upload", content=image(1_000), headers=headers).json()["id"]
        assert bob.post("/api/files/upload", content=image(1_000), headers=headers).json()["id"] != first
        other = ada.post("/api/files/upload", content=image(1_001), headers=headers)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("key", ["", "a b", "x" * 201])
def test_unusable_keys_are_refused(server: RunningServer, key: str) -> None:
    with server.client("ada") as client:
        answer = client.post("/api/files/upload", content=image(), headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
