"""The audit trail against a running server: each action leaves its record, by whom and from where, and nothing that opens anything."""

import hashlib
import json
import os
import pwd
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from server import cli
from server.auth import Scope
from server.ledger.trail import SHORTEST_DAYS
from server.settings import SettingError, Settings
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

LARGE = 1_500_000  # past what waits in memory: it holds a reservation

Record = dict[str, Any]


def trail(server: RunningServer, **filters: str) -> list[Record]:
    """The records, oldest first."""
    with server.client() as admin:
        answer = admin.get("/api/audit", params={"limit": "200"} | filters)
    assert answer.status_code == 200, answer.text
    assert answer.json()["next_cursor"] is None
    records: list[Record] = answer.json()["records"]
    return records[::-1]


def key_id(key: str) -> str:
    return key.split("_")[1]


class Watched:
    """Sends requests, each with an id of its own, and gives the records that it has left."""

    def __init__(self, server: RunningServer, client: httpx.Client) -> None:
        self.server = server
        self.client = client

    def __call__(self, method: str, path: str, status: int = 200, **options: Any) -> tuple[Any, list[Record]]:
        request_id = str(uuid4())
        headers = {"X-Request-Id": request_id} | options.pop("headers", {})
        before = len(trail(self.server))
        answer = self.client.request(method, path, headers=headers, **options)
        assert answer.status_code == status, answer.text
        after = trail(self.server)
        assert all(each["request_id"] == request_id for each in after[before:])
        return answer.json() if answer.content else None, after[before:]


@pytest.fixture
def ada(server: RunningServer) -> Iterator[Watched]:
    with server.client("ada") as client:
        yield Watched(server, client)


def told(records: list[Record]) -> list[tuple[str, str | None, dict[str, Any]]]:
    return [(each["action"], each["file_id"], each["detail"]) for each in records]


def test_each_change_of_a_file_leaves_one_record(server: RunningServer, ada: Watched) -> None:
    def png(size: int) -> dict[str, Any]:
        return {"mime_type": "image/png", "file_size": size}

    file, left = ada("POST", "/api/files/upload", 201, content=image(500))
    path = f"/api/files/{file['id']}"
    assert told(left) == [("user.created", None, {"max_bytes": 10 * 2**30}), ("file.created", file["id"], png(500))]
    who = {
        "actor_kind": "api_key",
        "actor_id": key_id(server.api_key),
        "acting_user_id": "ada",
        "user_id": "ada",
        "address": "127.0.0.1",
    }
    assert [each | who for each in left] == left
    large, left = ada("POST", "/api/files/upload", 201, content=image(LARGE))
    assert told(left) == [("file.created", large["id"], png(LARGE))]
    form, left = ada("POST", "/api/files/upload", 201, files=[("file", ("a.png", image(1_000))), ("file", ("b.png", image(LARGE)))])
    assert told(left) == [("file.created", each["file"]["id"], png(each["file"]["file_size"])) for each in form["results"]]
    for size in (2_000, LARGE):
        assert told(ada("PUT", f"{path}/content", content=image(size))[1]) == [("file.replaced", file["id"], png(size))]
    changes = {"file_name": "b.png", "metadata": {"a": 1}}
    assert told(ada("PATCH", path, json=changes)[1]) == [("file.updated", file["id"], {"fields": ["file_name", "metadata"]})]
    assert told(ada("PATCH", path, json={})[1]) == []
    assert told(ada("POST", f"{path}/favorite")[1]) == [("file.updated", file["id"], {"fields": ["is_favorite"]})]
    assert told(ada("PUT", f"{path}/tags", json={"tags": ["a"]})[1]) == [("file.updated", file["id"], {"fields": ["tags"]})]
    copied, left = ada("POST", f"{path}/copy", 201)
    assert told(left) == [("file.created", copied["id"], png(LARGE))]
    assert told(ada("POST", f"{path}/revoke-links")[1]) == [("links.revoked", file["id"], {})]
    assert told(ada("POST", "/api/links/revoke", 204)[1]) == [("links.revoked", None, {})]
    for public, expected in ((True, ["file.made_public"]), (True, []), (False, ["file.made_private"]), (False, [])):
        left = ada("PUT", f"{path}/public", json={"is_public": public})[1]
        assert told(left) == [(action, file["id"], {}) for action in expected]
    assert [each | who for each in left] == left
    link, left = ada("POST", "/api/uploads/links", 201, json={"max_bytes": 1_000})
    ((action, file_id, detail),) = told(left)
    assert (action, file_id, detail["max_bytes"]) == ("upload_link.created", link["file_id"], 1_000)
    assert datetime.fromisoformat(detail["expires_at"]) >= datetime.fromisoformat(link["expires_at"])
    assert told(ada("DELETE", f"/api/uploads/links/{link['file_id']}", 204)[1]) == [("upload_link.closed", link["file_id"], {})]
    gone = {"file_type": "image", "file_size": LARGE}
    left = ada("POST", "/api/files/delete", json={"ids": [large["id"], copied["id"], str(uuid4())]})[1]
    assert sorted(told(left)) == sorted(("file.deleted", each["id"], gone) for each in (large, copied))
    left = ada("DELETE", path, 204)[1]
    assert told(left) == [("file.deleted", file["id"], gone)]
    assert [each | who for each in left] == left
    # What is only read leaves nothing.
    kept = form["results"][0]["file"]["id"]
    for read in ("/api/files", f"/api/files/{kept}", f"/api/files/{kept}/download", "/api/storage/usage", "/api/users", "/api/audit"):
        assert ada.client.get(read).status_code == 200
    assert trail(server)[-1] == left[-1]


def test_each_change_of_a_user_leaves_one_record(server: RunningServer) -> None:
    with server.client("ada") as ada:
        file_id = ada.post("/api/files/upload", content=image(500)).json()["id"]
    of_digests = hashlib.sha256(hashlib.sha256(image(500)).digest()).hexdigest()
    with server.client() as client:
        admin = Watched(server, client)
        assert told(admin("PUT", "/api/users/bob/quota", json={"max_bytes": 5})[1]) == [("user.created", None, {"max_bytes": 5})]
        assert told(admin("PUT", "/api/users/bob/quota", json={"max_bytes": None})[1]) == [("quota.changed", None, {"max_bytes": None})]
        left = admin("DELETE", "/api/users/ada", 204)[1]
    assert told(left) == [
        ("user.erasing", None, {"file_count": 1, "total_bytes": 500, "sha256_of_digests": of_digests}),
        ("file.deleted", file_id, {"file_type": "image", "file_size": 500}),
        ("user.erased", None, {}),
    ]
    assert {(each["actor_id"], each["acting_user_id"], each["user_id"]) for each in left} == {(key_id(server.api_key), None, "ada")}
    # The user's records keep ids; the last one tells from where the user was erased.
    assert [each["address"] for each in trail(server, user="ada")] == [None] * 4 + ["127.0.0.1"]


def test_what_is_refused_leaves_none(server: RunningServer) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        file = ada.post("/api/files/upload", content=image(500), headers={"Idempotency-Key": "k"}).json()
        bob.post("/api/files/upload", content=image(500))
        server.set_quota("bob", 500)
        before = trail(server)
        path = f"/api/files/{file['id']}"
        weak = server.client("ada", api_key=server.new_key(Scope.FILES_READ))
        made = [each for each in trail(server) if each not in before]
        refusals: list[tuple[int, httpx.Response]] = [
            (404, bob.put(f"{path}/content", content=image(500))),
            (404, bob.patch(path, json={"file_name": "b.png"})),
            (404, bob.post(f"{path}/favorite")),
            (404, bob.put(f"{path}/tags", json={"tags": []})),
            (404, bob.post(f"{path}/copy")),
            (404, bob.post(f"{path}/revoke-links")),
            (404, bob.put(f"{path}/public", json={"is_public": True})),
            (404, bob.delete(path)),
            (404, bob.delete(f"/api/uploads/links/{file['id']}")),
            (200, bob.post("/api/files/delete", json={"ids": [file["id"]]})),
            (413, bob.post("/api/files/upload", content=image(501))),
            (413, bob.post("/api/files/upload", content=image(LARGE))),
            (413, bob.post("/api/uploads/links", json={"max_bytes": 1})),
            (415, ada.post("/api/files/upload", content=b"plain text")),
            (412, ada.put(f"{path}/content", content=image(500), headers={"If-Match": '"x"'})),
            (412, ada.delete(path, headers={"If-Match": '"x"'})),
            (201, ada.post("/api/files/upload", content=image(500), headers={"Idempotency-Key": "k"})),  # answered, and stored once
            (403, weak.delete(path)),
            (401, httpx.delete(server.url + path)),
            (403, httpx.put(f"{server.url}/u/x", content=image(500))),
            (404, ada.delete("/api/users/nobody")),
        ]
        weak.close()
    for number, (status, answer) in enumerate(refusals):
        assert answer.status_code == status, (number, answer.text)
    assert [each["action"] for each in made] == ["key.created"]
    assert trail(server) == before + made


def test_an_upload_link_is_its_own_actor(server: RunningServer) -> None:
    with server.client("ada") as ada, httpx.Client(base_url=server.url) as browser:
        link = ada.post("/api/uploads/links", json={"max_bytes": LARGE}).json()
        for _ in range(2):
            browser.put(link["url"], content=image(500), headers={"X-Request-Id": "by-link", "X-User-Id": "eve"})
    (left,) = trail(server, actor=link["file_id"])
    assert (left["action"], left["file_id"], left["user_id"]) == ("file.created", link["file_id"], "ada")
    assert (left["actor_kind"], left["acting_user_id"], left["address"]) == ("upload_link", None, "127.0.0.1")
    assert left["request_id"] == "by-link"


def test_nothing_that_opens_or_tells_of_content_is_kept(server: RunningServer) -> None:
    secret = "Canary"
    with server.client("ada") as ada:
        wish = {"name": f"{secret}.png", "tags": secret, "package_name": secret, "metadata": json.dumps({secret: secret})}
        file = ada.post("/api/files/upload", content=image(500), params=wish).json()
        ada.patch(f"/api/files/{file['id']}", json={"file_name": f"{secret}2", "metadata": {secret: 1}, "package_name": secret})
        ada.put(f"/api/files/{file['id']}/tags", json={"tags": [secret]})
        public = ada.put(f"/api/files/{file['id']}/public", json={"is_public": True}).json()["url"]
        limits = {"max_bytes": 1_000, "file_name": secret, "metadata": {secret: 1}, "tags": [secret]}
        upload_link = ada.post("/api/uploads/links", json=limits).json()["url"]
    kept = "\n".join(row[0] for row in execute(server.database_url, "select l::text from audit_log l"))
    opening = (server.api_key, server.api_key.split("_", 2)[2], public.rsplit("/", 1)[1], upload_link.rsplit("/", 1)[1])
    for each in (secret, *opening, file["sha256"]):
        assert each not in kept, each


def test_reads_are_recorded_when_asked_for(start_server: ServerFactory) -> None:
    server = start_server(COFFER_AUDIT_READS="true")
    with server.client("ada") as client, server.client("bob") as bob, httpx.Client(base_url=server.url) as browser:
        ada = Watched(server, client)
        files = [client.post("/api/files/upload", content=image(500, seed=number)).json()["id"] for number in range(2)]
        path = f"/api/files/{files[0]}"
        public = client.put(f"{path}/public", json={"is_public": True}).json()["url"]
        whole = client.get(f"{path}/download")
        assert [each["action"] for each in trail(server)[-2:]] == ["file.made_public", "file.downloaded"]
        linked, left = ada("POST", f"{path}/link")
        assert told(left) == [("link.created", files[0], {})]
        for method, url, options in (
            ("POST", "/api/links", {"json": {"ids": [*files, str(uuid4())]}}),
            ("GET", "/api/files", {"params": {"links": "1"}}),
        ):
            assert {(each["action"], each["file_id"]) for each in ada(method, url, **options)[1]} == {
                ("link.created", each) for each in files
            }
        before = trail(server)
        for headers, status in (({}, 200), ({"Range": "bytes=1-"}, 206), ({"If-None-Match": whole.headers["etag"]}, 304)):
            assert browser.get(linked["url"], headers=headers).status_code == status
        assert browser.get(public).status_code == 200
        assert browser.head(public).status_code == client.head(f"{path}/download").status_code == 200
        assert bob.get(f"{path}/download").status_code == bob.post(f"{path}/link").status_code == 404
    assert [(each["action"], each["actor_kind"], each["actor_id"], each["user_id"]) for each in trail(server)[len(before) :]] == [
        ("file.downloaded", "download_link", files[0], "ada"),
        ("file.downloaded", "download_link", files[0], "ada"),
        ("file.downloaded", "public_link", None, "ada"),
    ]


def test_what_cannot_be_recorded_is_not_read(start_server: ServerFactory) -> None:
    server = start_server(COFFER_AUDIT_READS="true")
    with server.client("ada") as ada:
        file_id = ada.post("/api/files/upload", content=image(500)).json()["id"]
        url = ada.post(f"/api/files/{file_id}/link").json()["url"]
        assert ada.get(url).status_code == 200
        execute(server.database_url, "alter table audit_log add constraint full_up check (action <> 'file.downloaded') not valid")
        for path in (url, f"/api/files/{file_id}/download"):
            assert ada.get(path).status_code == 500


def test_only_admins_read_it(server: RunningServer) -> None:
    scopes = [scope for scope in Scope if scope is not Scope.ADMIN]
    with server.client("ada", api_key=server.new_key(*scopes)) as others:
        assert others.get("/api/audit").status_code == 403
    assert httpx.get(f"{server.url}/api/audit").status_code == 401


def test_it_is_read_strictly_and_page_by_page(server: RunningServer) -> None:
    with server.client("ada") as ada:
        ids = [ada.post("/api/files/upload", content=image(500, seed=number)).json()["id"] for number in range(5)]
        for wrong, field in (
            ({"usr": "ada"}, "usr"),
            ({"file": "x"}, "file"),
            ({"since": "soon"}, "since"),
            ({"limit": "0"}, "limit"),
            ({"limit": "201"}, "limit"),
            ({"cursor": "x"}, "cursor"),
            ({"user": "\n"}, "user"),
            ({"action": "\x00"}, "action"),
        ):
            answer = ada.get("/api/audit", params=wrong)
            assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (400, "invalid_request", field)
        found, cursor = [], ""
        while True:
            page = ada.get(
                "/api/audit", params={"user": "ada", "action": "file.created", "limit": "2", **({"cursor": cursor} if cursor else {})}
            )
            found += [each["file_id"] for each in page.json()["records"]]
            cursor = page.json()["next_cursor"]
            if cursor is None:
                break
        assert found == ids[::-1]
    day = {"since": datetime.now(UTC).date().isoformat(), "user": "ada"}
    assert len(trail(server, **day)) == 6 and trail(server, user="ada", until=day["since"]) == []
    assert trail(server, actor=key_id(server.api_key), file=ids[0]) == trail(server, file=ids[0]) != []


def test_housekeeping_lets_old_records_go(start_server: ServerFactory) -> None:
    server = start_server(COFFER_AUDIT_LOG_DAYS="60")
    now = datetime.now(UTC)
    server.stop()
    for days in (61, 59):
        age = now - timedelta(days=days)
        execute(
            server.database_url,
            "insert into audit_log (at, action, actor_kind, actor_id) values ($1, 'file.deleted', 'cli', $2)",
            age,
            str(days),
        )
    server.start()
    until(lambda: trail(server, actor="61") == [])
    assert len(trail(server, actor="59")) == 1


def test_the_database_keeps_what_no_setting_may_shorten() -> None:
    environment = {"DATABASE_URL": "postgresql://x/y"}
    for days in (0, SHORTEST_DAYS, 36_500):
        assert Settings.load(environment | {"COFFER_AUDIT_LOG_DAYS": str(days)}).audit_log_days == days
    for text in (str(SHORTEST_DAYS - 1), "-1", "36501", "a year"):
        with pytest.raises(SettingError, match="COFFER_AUDIT_LOG_DAYS"):
            Settings.load(environment | {"COFFER_AUDIT_LOG_DAYS": text})


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(arguments) == 0
    return capsys.readouterr().out


def test_the_command_acts_as_an_account_and_reads_the_trail(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("LOGNAME", "somebody-else")
    account = pwd.getpwuid(os.getuid()).pw_name
    run(capsys, "user", "set-quota", "ada", "5GiB")
    run(capsys, "user", "set-quota", "ada", "6GiB")
    key = json.loads(run(capsys, "key", "create", "a secret shop", "--json"))
    rotated = json.loads(run(capsys, "key", "rotate", key["key_id"], "--overlap", "1h", "--json"))
    run(capsys, "key", "revoke", key["key_id"])  # a rehearsal
    run(capsys, "key", "revoke", key["key_id"], "--for-real")
    run(capsys, "user", "delete", "ada", "--for-real")
    records = [json.loads(line) for line in run(capsys, "trail", "--json").splitlines()][::-1]
    assert [(each["action"], each["user_id"], each["detail"]) for each in records] == [
        ("user.created", "ada", {"max_bytes": 5 * 2**30}),
        ("quota.changed", "ada", {"max_bytes": 6 * 2**30}),
        ("key.created", None, {"key_id": key["key_id"], "scopes": ["files:read", "files:write"]}),
        ("key.rotated", None, {"key_id": rotated["key_id"], "old_key_id": key["key_id"], "scopes": ["files:read", "files:write"]}),
        ("key.revoked", None, {"key_id": key["key_id"]}),
        ("user.erasing", "ada", {"file_count": 0, "total_bytes": 0, "sha256_of_digests": hashlib.sha256().hexdigest()}),
        ("user.erased", "ada", {}),
    ]
    assert {(each["actor_kind"], each["actor_id"], each["address"], each["request_id"]) for each in records} == {
        ("cli", account, None, None)
    }
    filtered = run(capsys, "trail", "--json", "--user", "ada", "--action", "quota.changed", "--actor", account, "--since", "2026-01-01")
    assert [json.loads(line) for line in filtered.splitlines()] == [records[1]]
    assert run(capsys, "trail", "--json", "--until", "2026-01-01") == run(capsys, "trail", "--json", "--file", str(uuid4())) == ""
    assert len(run(capsys, "trail", "--json", "--limit", "2").splitlines()) == 2
    table = run(capsys, "trail", "--limit", "2").splitlines()
    assert [line.split()[2:5] for line in table[1:]] == [["user.erased", "cli", account], ["user.erasing", "cli", account]]
