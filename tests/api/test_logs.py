"""Logs are JSON, carry the request's id, and hold no secrets."""

import io
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from server import logs
from server.auth import NewApiKey
from tests.samples import image
from tests.serving import RunningServer, ServerFactory

LINE: dict[str, object] = dict.fromkeys(("level", "logger", "message", "request_id", "method", "route", "path"), "")
LINE |= dict.fromkeys(("principal", "user_id", "client"), "")
LINE |= dict.fromkeys(("status", "duration_ms", "bytes_in", "bytes_out"), 0)


def formatted(message: str, **extra: object) -> dict[str, Any]:
    record = logging.makeLogRecord({"name": "test", "levelname": "INFO", "msg": message, **extra})
    line: dict[str, Any] = json.loads(logs.JsonLines().format(record))
    return line


def test_a_record_becomes_one_line_of_json() -> None:
    logs.request_id.set("request-1")
    try:
        line = formatted("two\nlines", volume_id="v", problem=ValueError("x"))
    finally:
        logs.request_id.set(None)
    assert (line["message"], line["volume_id"], line["problem"], line["request_id"]) == ("two\nlines", "v", "x", "request-1")
    assert formatted("\ud800")["message"]  # what JSON cannot hold is told in another form, not lost


def test_an_exception_brings_its_traceback() -> None:
    try:
        raise ValueError("oh")
    except ValueError:
        assert "ValueError: oh" in formatted("failed", exc_info=sys.exc_info())["traceback"]


def test_what_looks_like_a_secret_is_blanked() -> None:
    key = NewApiKey.generate()
    secret = key.text.rpartition(f"{key.key_id}_")[2]
    text = json.dumps(formatted(f"with {key.text}", url="postgresql://coffer:hunter2@host/db", header="Authorization: Bearer abc.def-ghi"))
    assert json.loads(text)["header"] == "Authorization: Bearer ***"
    assert secret not in text and "hunter2" not in text and "abc.def" not in text
    assert key.key_id in text and "@host/db" in text


@pytest.mark.parametrize("piece", ["a", "eyJa", "eyJ-", "a://b:", "bearer "])
def test_no_text_takes_long_to_look_through(piece: str) -> None:
    """Whoever sends a path of 64 KiB must not stop the server. Were each start tried to the end, this would take half an hour."""
    text = f"/api/users/{piece * (2**20 // len(piece))}"
    key = NewApiKey.generate()
    blanked = logs.without_secrets(f"{text} {key.text}")
    assert blanked.endswith(f"cof_{key.key_id}_***")


@pytest.mark.parametrize("before", ["", "/api/users/", "token=", 'quoted "'])
def test_a_token_is_blanked_wherever_it_stands(before: str) -> None:
    assert logs.without_secrets(f"{before}eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.c2ln after") == f"{before}eyJ*** after"


def test_a_log_that_cannot_be_written_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs, "_access_is_logged", True)
    monkeypatch.setattr(sys, "stderr", Full())
    logs.access(msgspec.convert({**LINE, "time": datetime.now(UTC)}, logs.AccessLine))


def test_a_servers_log_tells_of_requests_and_of_no_secrets(start_server: ServerFactory) -> None:
    server: RunningServer = start_server(COFFER_LOG_LEVEL="debug")
    secret = server.api_key.split("_", 2)[2]
    wrong = NewApiKey.generate().text
    with server.client("ada") as client:
        stored = client.post(
            "/api/files/upload", content=image(), params={"name": "private-name.png"}, headers={"X-Request-Id": "my-id.1"}
        ).json()
        client.get(f"/api/files/{stored['id']}/download", params={"token": "t0ken-in-query"})
        client.get("/api/files", params={"key": server.api_key})
        client.get(f"/nowhere/{server.api_key}")
        client.get("/api/files", headers={"Authorization": f"Bearer {wrong}"})
        client.get("/api/files", headers={"Authorization": f"Basic {secret}"})
    server.stop()
    text = server.logged()
    lines = [json.loads(line) for line in text.splitlines()]
    for word in (secret, wrong.split("_", 2)[2], "t0ken-in-query", "Bearer", "private-name"):
        assert word not in text
    password = server.database_url.split(":")[2].split("@")[0]
    assert len(password) < 8 or password not in text
    (uploaded,) = [line for line in lines if line.get("request_id") == "my-id.1" and line["logger"] == "coffer.access"]
    assert uploaded["route"] == uploaded["path"] == "/api/files/upload"
    assert (uploaded["method"], uploaded["status"], uploaded["bytes_in"]) == ("POST", 201, 1000)
    assert (uploaded["principal"], uploaded["user_id"]) == ("api_key", "ada")
    assert uploaded["bytes_out"] > 0 and uploaded["duration_ms"] > 0
    (download,) = [line for line in lines if line.get("route") == "/api/files/{file_id}/download"]
    assert download["path"] == f"/api/files/{stored['id']}/download" and download["bytes_out"] == 1000
    assert [line["path"] for line in lines if line.get("route") == "unmatched"] == [None]


def test_a_key_in_the_wrong_place_is_told_to_nobody(server: RunningServer) -> None:
    """As a user's id, as a request's id, as a file's id: slips that are easily made, and logs are read by many."""
    with server.client() as admin:
        misplaced = [
            admin.get(f"/api/users/{server.api_key}"),
            admin.get("/api/files", headers={"X-User-Id": server.api_key}),
            admin.get("/api/files", headers={"X-Request-Id": server.api_key}),
            admin.get(f"/api/files/{server.api_key}/download"),
        ]
    secret = server.api_key.split("_", 2)[2]
    server.stop()
    lines = [json.loads(line) for line in server.logged().splitlines()]
    assert sum(line.get("message") == "request" and line["method"] == "GET" for line in lines) >= len(misplaced)
    assert secret not in server.logged()
    assert not [answer for answer in misplaced if secret in f"{answer.headers}{answer.text}"]


def test_what_is_no_file_id_is_not_logged(server: RunningServer) -> None:
    with server.client("ada") as ada:
        assert ada.get("/api/files/a-word-that-should-be-secret/download").json()["code"] == "not_found"
    server.stop()
    assert "should-be-secret" not in server.logged()
