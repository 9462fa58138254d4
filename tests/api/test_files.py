"""The JSON routes of files, over HTTP."""

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.samples import image, video
from tests.serving import RunningServer

MISSING = "01890000-0000-7000-8000-000000000000"
FIELDS = {
    "id": str,
    "user_id": str,
    "file_name": str,
    "file_type": str,
    "mime_type": str,
    "file_size": int,
    "sha256": str,
    "etag": str,
    "resolution": type(None),
    "width": type(None),
    "height": type(None),
    "duration": type(None),
    "duration_seconds": type(None),
    "frame_rate": type(None),
    "video_codec": type(None),
    "audio_codec": type(None),
    "preview_state": str,
    "preview_reason": type(None),
    "thumbhash": type(None),
    "average_color": type(None),
    "package_name": type(None),
    "tags": list,
    "is_favorite": bool,
    "is_public": bool,
    "metadata": dict,
    "upload_date": str,
    "created_at": str,
    "updated_at": str,
}


def stored(client: httpx.Client, body: bytes | None = None, **query: str) -> dict[str, Any]:
    answer = client.post("/api/files/upload", content=image() if body is None else body, params=query)
    assert answer.status_code == 201, answer.text
    file: dict[str, Any] = answer.json()
    return file


def test_a_files_fields(api: RunningServer) -> None:
    with api.client("fields") as client:
        file = stored(client, name="a.png")
        assert {name: type(value) for name, value in file.items()} == FIELDS
        assert client.get(f"/api/files/{file['id']}").json() == file
        assert UUID(file["id"]).version == 7
        assert file["etag"] == f'"{file["sha256"]}"' == client.get(f"/api/files/{file['id']}/download").headers["etag"]
        for moment in (file["upload_date"], file["created_at"], file["updated_at"]):
            assert moment.endswith("Z") and abs(datetime.now(UTC) - datetime.fromisoformat(moment)) < timedelta(minutes=1)


def test_changes(api: RunningServer) -> None:
    with api.client("changes") as client:
        file = stored(client, name="a.png", package_name="p")
        path = f"/api/files/{file['id']}"
        assert client.patch(path, json={"file_name": "ü/\u202e.png"}).json()["file_name"] == "ü/\u202e.png"
        changed = client.patch(path, json={"metadata": {"a": [1, None, {"b": 2.5}]}}).json()
        assert (changed["metadata"], changed["package_name"], changed["file_name"]) == ({"a": [1, None, {"b": 2.5}]}, "p", "ü/\u202e.png")
        assert client.patch(path, json={"metadata": {"c": 1}}).json()["metadata"] == {"c": 1}
        assert client.patch(path, json={"package_name": None}).json()["package_name"] is None
        changed = client.get(path).json()
        assert client.patch(path, json={}).json() == client.get(path).json() == changed  # `updated_at` too
        assert client.patch(path, json={"package_name": None}).json()["updated_at"] > changed["updated_at"]
        assert client.patch(f"/api/files/{MISSING}", json={}).status_code == 404
        assert client.get(path).json()["sha256"] == file["sha256"]


def test_favorites_and_tags(api: RunningServer) -> None:
    with api.client("tags") as client:
        path = f"/api/files/{stored(client)['id']}"
        assert [client.post(f"{path}/favorite").json()["is_favorite"] for _ in range(3)] == [True, False, True]
        assert client.post(f"{path}/favorite", json={"is_favorite": True}).json()["is_favorite"] is True
        assert client.post(f"{path}/favorite", json={"is_favorite": False}).json()["is_favorite"] is False
        assert client.post(f"{path}/favorite", json={"is_favorite": "yes"}).status_code == 400
        assert client.put(f"{path}/tags", json={"tags": ["b", "a", "b", "é"]}).json()["tags"] == ["b", "a", "é"]
        assert client.put(f"{path}/tags", json={"tags": ["x"] * 200}).json()["tags"] == ["x"]
        for bad in (["\0"], [""], ["x" * 101], [str(n) for n in range(65)], "x", [1], None):
            assert client.put(f"{path}/tags", json={"tags": bad}).status_code == 400
        assert client.get(path).json()["tags"] == ["x"]
        assert client.put(f"{path}/tags", json={"tags": []}).json()["tags"] == []


def test_copies(api: RunningServer) -> None:
    with api.client("copies") as client:
        file = stored(client, name="a.png", tags="x,y")
        answer = client.post(f"/api/files/{file['id']}/copy")
        copy = answer.json()
        assert (answer.status_code, answer.headers["location"]) == (201, f"/api/files/{copy['id']}")
        same = ("file_name", "sha256", "tags", "file_type", "mime_type", "file_size", "user_id")
        assert copy["id"] != file["id"] and all(copy[name] == file[name] for name in same)
        assert client.get("/api/storage/usage").json()["used_bytes"] == 2_000
        assert client.delete(f"/api/files/{file['id']}").status_code == 204
        assert client.get(f"/api/files/{copy['id']}/download").content == image()
        api.set_quota("copies", 1_500)
        assert client.post(f"/api/files/{copy['id']}/copy").json()["code"] == "quota_exceeded"


def test_deleting_one_and_many(api: RunningServer) -> None:
    with api.client("deleting") as client:
        ids = [stored(client, image(1_000, seed))["id"] for seed in range(4)]
        deleted = client.delete(f"/api/files/{ids[0]}")
        assert (deleted.status_code, deleted.content) == (204, b"")
        assert client.delete(f"/api/files/{ids[0]}").status_code == 404
        results = client.post("/api/files/delete", json={"ids": [ids[1], MISSING, ids[2], ids[1], ids[0], "x"]}).json()["results"]
        assert [each["id"] for each in results] == [ids[1], MISSING, ids[2], ids[1], ids[0], "x"]
        assert [each["status"] for each in results] == ["deleted", "not_found", "deleted", "deleted", "not_found", "not_found"]
        assert [file["id"] for file in client.get("/api/files").json()["files"]] == ids[3:]
        assert client.get("/api/storage/usage").json()["used_bytes"] == 1_000
        bodies: list[dict[str, object]] = [{"ids": []}, {"ids": [MISSING] * 1_001}, {}, {"ids": None}]
        for bad in bodies:
            assert client.post("/api/files/delete", json=bad).status_code == 400
        assert len(client.post("/api/files/delete", json={"ids": [MISSING] * 1_000}).json()["results"]) == 1_000


@pytest.fixture(scope="module")
def library(api: RunningServer) -> list[dict[str, Any]]:
    """Twelve files of one user, in the order in which they were stored."""
    with api.client("library") as client:
        files = []
        for number in range(12):
            body = video(1_000 + number) if number % 3 == 0 else image(2_000 - number, number)
            file = stored(
                client,
                body,
                name=f"{'Sunset-Beach' if number % 2 else 'forest'} {number:02}.bin",
                tags="all,even" if number % 2 == 0 else "all",
            )
            if number % 4 == 0:
                client.post(f"/api/files/{file['id']}/favorite")
                client.patch(f"/api/files/{file['id']}", json={"package_name": "pack"})
            files.append(file)
        return files


def listed(api: RunningServer, **query: Any) -> list[str]:
    """The ids on all pages."""
    found: list[str] = []
    cursor: str | None = None
    with api.client("library") as client:
        while True:
            answer = client.get("/api/files", params=query | {"limit": 5} | ({"cursor": cursor} if cursor else {}))
            assert answer.status_code == 200, answer.text
            page = answer.json()
            assert len(page["files"]) <= 5
            found += [file["id"] for file in page["files"]]
            if (cursor := page["next_cursor"]) is None:
                return found


def test_sorts(api: RunningServer, library: list[dict[str, Any]]) -> None:
    newest_first = [file["id"] for file in reversed(library)]
    assert listed(api) == listed(api, sort="-created") == newest_first
    assert listed(api, sort="created") == newest_first[::-1]
    for key, sort in (("file_size", "size"), ("file_name", "name")):
        ordered = [file["id"] for file in sorted(library, key=lambda file: str(file[key]).lower().rjust(5, "0"))]
        assert listed(api, sort=sort) == ordered
        assert listed(api, sort=f"-{sort}") == ordered[::-1]


@pytest.mark.parametrize("sort", ["created", "-created", "name", "-name", "size", "-size"])
def test_filters(api: RunningServer, library: list[dict[str, Any]], sort: str) -> None:
    def expect(wanted: set[int], **query: Any) -> None:
        assert set(listed(api, sort=sort, **query)) == {library[number]["id"] for number in wanted}, query

    everything = set(range(12))
    expect({0, 3, 6, 9}, type="video")
    expect(everything - {0, 3, 6, 9}, mime="image/png")
    expect({0, 2, 4, 6, 8, 10}, tag="even")
    expect(everything, tag="all")
    expect(set(), tag="odd")
    expect({0, 4, 8}, favorite="true")
    expect({0, 4, 8}, package_name="pack")
    expect({0}, type="video", favorite="true", tag="even", package_name="pack", mime="video/mp4")
    expect(set(), type="audio")


def test_searching_names_and_dates(api: RunningServer, library: list[dict[str, Any]]) -> None:
    odd = [file["id"] for file in library[1::2]]
    assert listed(api, name="beach") == listed(api, name="SUNSET", sort="name") == odd
    assert listed(api, name="nothing") == []
    middle = library[6]["upload_date"]
    assert listed(api, created_from=middle) == [file["id"] for file in reversed(library[6:])]
    assert listed(api, created_to=middle, sort="created") == [file["id"] for file in library[:6]]
    assert listed(api, created_to="2020-01-01") == []
    assert len(listed(api, created_from="2020-01-01")) == 12


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"type": "picture"}, "type"),
        ({"sort": "colour"}, "sort"),
        ({"limit": "0"}, "limit"),
        ({"limit": "201"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"favorite": "perhaps"}, "favorite"),
        ({"created_from": "yesterday"}, "created_from"),
        ({"created_to": "0001-01-01T00:00:00+14:00"}, "created_to"),
        ({"created_to": "9999-12-31T23:59:59-14:00"}, "created_to"),
        ({"cursor": "nonsense"}, "cursor"),
        ({"cursor": ""}, "cursor"),
        ({"tag": "a\0"}, "tag"),
        ({"name": ""}, "name"),
        ({"mime": "\u2028"}, "mime"),
        ({"package_name": "x" * 501}, "package_name"),
    ],
    ids=str,
)
def test_questions_that_make_no_sense(api: RunningServer, query: dict[str, str], field: str) -> None:
    with api.client("ada") as client:
        answer = client.get("/api/files", params=query)
        assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (400, "invalid_request", field)


def test_sorts_without_an_index_are_not_offered(api: RunningServer) -> None:
    with api.client("ada") as client:
        for query in ({"name": "x", "sort": "size"}, {"created_from": "2026-01-01", "sort": "name"}):
            answer = client.get("/api/files", params=query)
            assert (answer.status_code, answer.json()["code"], answer.json()["sort"]) == (400, "sort_not_available", query["sort"])


def test_a_cursor_of_another_order_or_forged_is_refused(api: RunningServer, library: list[dict[str, Any]]) -> None:
    assert library
    with api.client("library") as client:
        cursor = client.get("/api/files", params={"limit": 5}).json()["next_cursor"]
        assert client.get("/api/files", params={"cursor": cursor, "sort": "size"}).status_code == 400
        forged: list[list[Any]] = [
            ["name-asc", "\0", MISSING],
            ["size-asc", -1, MISSING],
            ["size-asc", 2**63, MISSING],
            ["size-asc", 1, "x"],
            ["size-asc", None, MISSING],
        ]
        forged += [
            ["created-asc", moment, MISSING]
            for moment in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00", 7)
        ]
        for content in forged:
            text = base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
            answer = client.get("/api/files", params={"cursor": text, "sort": str(content[0]).split("-")[0]})
            assert answer.status_code == 400, (content, answer.text)


@pytest.mark.parametrize("method", ["DELETE", "PATCH"])
def test_if_match_guards_every_change(api: RunningServer, method: str) -> None:
    with api.client(f"guarded-{method}") as client:
        file = stored(client, image())
        url, body = f"/api/files/{file['id']}", {"json": {"file_name": "new.png"}} if method == "PATCH" else {}
        stale = client.request(method, url, headers={"If-Match": '"another"'}, **body)  # type: ignore[arg-type]
        assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")
        assert client.get(url).json()["file_name"] == file["file_name"]
        assert client.request(method, url, headers={"If-Match": file["etag"]}, **body).is_success  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["%", "_", "...", " "])
def test_a_search_for_no_word_is_refused(api: RunningServer, name: str) -> None:
    with api.client("ada") as client:
        answer = client.get("/api/files", params={"name": name})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
