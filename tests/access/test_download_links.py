"""Signed download links against a running server."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from ops.embedded_postgres import EmbeddedPostgres
from server import ledger
from server.auth import Scope
from server.delivery import AwaitedPreviews, Delivery, Links
from server.errors import DatabaseUnavailable, NotFound
from server.ledger import Database, Notices
from server.settings import Settings
from server.vault import Vault
from server.vault.layout import stored_path
from server.vault.sentinel import init_volume
from tests.download.samples import a_file
from tests.linking import BODY, link, stored
from tests.samples import image
from tests.serving import RunningServer, ServerFactory
from tests.waiting import until

MISSING = "01900000-0000-7000-8000-000000000000"


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


@pytest.fixture
def browser(server: RunningServer) -> Iterator[httpx.Client]:
    """Nobody: no key, no user."""
    with httpx.Client(base_url=server.url) as client:
        yield client


def test_a_link_serves_like_the_owner_route(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        file_id = stored(ada)
        url = link(ada, file_id)
        owners = ada.get(f"/api/files/{file_id}/download")
    whole = browser.get(url)
    assert (whole.status_code, whole.content) == (200, BODY)
    for name in ("etag", "content-type", "accept-ranges", "last-modified", "content-disposition", "content-security-policy", "repr-digest"):
        assert whole.headers[name] == owners.headers[name], name
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["cross-origin-resource-policy"] == "cross-origin"  # shown by pages of the app's own origin
    cache = whole.headers["cache-control"]
    assert cache.startswith("private, max-age=") and cache.endswith(", immutable, no-transform")
    assert 0 < int(cache.split("=")[1].split(",")[0]) <= 3_600 + 300
    head = browser.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(BODY)))
    part = browser.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, BODY[10:20])
    assert browser.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    assert browser.get(url, headers={"Range": "bytes=999999999-"}).status_code == 416


def test_disposition_and_name_are_those_of_the_link(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        file_id = stored(ada)
        saved = browser.get(link(ada, file_id, disposition="attachment", name='x"; evil.exe\\.png')).headers["content-disposition"]
        assert saved.startswith('attachment; filename="x__ evil.exe_.png"') or "x%22%3B%20evil.exe_.png" in saved
        assert "evil.exe" in saved and "\n" not in saved


def test_within_a_window_a_link_is_the_same(server: RunningServer) -> None:
    with server.client("ada") as ada:
        file_id = stored(ada)
        wish = {"ttl_seconds": 7 * 86_400}
        first, again = (ada.post(f"/api/files/{file_id}/link", json=wish).json() for _ in range(2))
        if first["expires_at"] == again["expires_at"]:  # else a window of five minutes ended between the two
            assert first["url"] == again["url"]
        by_get = ada.get(f"/api/storage/{file_id}/url", params=wish).json()
        assert by_get["url"] == again["url"] or by_get["expires_at"] != again["expires_at"]
        assert link(ada, file_id, disposition="attachment", **wish) != again["url"]


def test_what_is_changed_is_refused(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        url = link(ada, stored(ada))
    for changed in (
        f"{url}?x=1",
        f"{url}?",
        f"{url}/",
        url.replace("/f/", "/f//"),
        url.rpartition("/")[0],
        url.rpartition("/")[0] + "/other.png",
        url.replace("%F0", "%f0"),
        "/f/",
        "/f/x",
        "/f/x/y",
        "/f/" + "A" * 5_000 + "/x",
    ):
        answer = browser.get(changed)
        if changed == f"{url}?":
            assert answer.status_code == 200  # an empty query is none: clients drop the question mark
        else:
            assert code(answer) == (403, "link_invalid"), changed
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert browser.request(method, url).status_code == 405


def test_an_expired_link_is_refused(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        url = link(ada, stored(ada), ttl_seconds=1)
    until(lambda: browser.get(url).status_code != 200)
    assert code(browser.get(url)) == (403, "link_expired")


def test_bytes_that_are_gone_or_others_are_never_shown(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        replaced, deleted = stored(ada), stored(ada)
        links = link(ada, replaced), link(ada, deleted)
        assert ada.put(f"/api/files/{replaced}/content", content=image(10_000, seed=9)).status_code == 200
        assert ada.delete(f"/api/files/{deleted}").status_code == 204
        for url in links:
            assert code(browser.get(url)) == (404, "not_found")
        assert browser.get(link(ada, replaced)).content == image(10_000, seed=9)


def test_links_to_one_file_are_revoked(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        file_id, other = stored(ada), stored(ada)
        old, others = link(ada, file_id), link(ada, other)
        before = ada.get(f"/api/files/{file_id}").json()
        assert code(bob.post(f"/api/files/{file_id}/revoke-links")) == (404, "not_found")
        for _ in range(2):
            after = ada.post(f"/api/files/{file_id}/revoke-links").json()
            assert after | {"updated_at": before["updated_at"]} == before
            assert code(browser.get(old)) == (404, "not_found")
            old = link(ada, file_id)
            assert browser.get(old).content == BODY
        assert browser.get(others).status_code == 200
        assert ada.get(f"/api/files/{file_id}/download").content == BODY
        assert ada.get("/api/storage/usage").json()["used_bytes"] == 2 * len(BODY)
    assert len(server.stored_paths()) == 2


def test_links_to_all_of_a_users_files_are_revoked(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        mine, his = link(ada, (file_id := stored(ada))), link(bob, stored(bob))
        assert ada.post("/api/links/revoke").status_code == 204
        assert code(browser.get(mine)) == (404, "not_found")
        assert browser.get(his).status_code == 200
        assert browser.get(link(ada, file_id)).status_code == 200


def test_many_links_at_once_and_in_lists(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        ids = [stored(ada, image(1_000, seed=n), f"{n}.png") for n in range(3)]
        strangers = stored(bob)
        asked = [*ids, strangers, MISSING, "nonsense", ids[0]]
        results = ada.post("/api/links", json={"ids": asked, "disposition": "attachment"}).json()["links"]
        assert [each["id"] for each in results] == asked
        assert [each["status"] for each in results] == ["linked"] * 3 + ["not_found"] * 3 + ["linked"]
        for seed, each in enumerate(results[:3]):
            answer = browser.get(each["url"])
            assert answer.content == image(1_000, seed=seed) and answer.headers["content-disposition"].startswith("attachment")
        assert "url" not in results[3]
        assert ada.post("/api/links", json={"ids": [MISSING] * 501}).status_code == 400
        with server.client("new") as new:
            assert new.post("/api/links", json={"ids": [MISSING]}).json()["links"][0]["status"] == "not_found"
        listed = ada.get("/api/files", params={"links": "1", "sort": "name"}).json()["files"]
        assert [browser.get(each["link"]["url"]).content for each in listed] == [image(1_000, seed=n) for n in range(3)]
        assert "link" not in ada.get("/api/files").json()["files"][0]


def test_who_may_make_links(server: RunningServer) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        file_id = stored(ada)
        assert code(bob.post(f"/api/files/{file_id}/link")) == (404, "not_found")
        assert code(bob.get(f"/api/storage/{file_id}/url")) == (404, "not_found")
        assert ada.post(f"/api/files/{file_id}/link").status_code == 200  # a body is not needed
        for wish, field in (
            ({"ttl_seconds": 0}, "ttl_seconds"),
            ({"ttl_seconds": 7 * 86_400 + 1}, "ttl_seconds"),
            ({"disposition": "x"}, "disposition"),
            ({"name": "a\nb"}, "name"),
        ):
            refused = ada.post(f"/api/files/{file_id}/link", json=wish)
            assert (code(refused), refused.json()["field"]) == ((400, "invalid_request"), field)
        refused = bob.post("/api/links", json={"ids": [file_id], "ttl_seconds": 7 * 86_400 + 1})
        assert code(refused) == (400, "invalid_request")
    reading = server.new_key(Scope.FILES_READ, Scope.FILES_WRITE)
    with server.client("ada", api_key=reading) as client:
        for answer in (
            client.post(f"/api/files/{file_id}/link"),
            client.post("/api/links", json={"ids": [file_id]}),
            client.get(f"/api/storage/{file_id}/url"),
            client.post(f"/api/files/{file_id}/revoke-links"),
            client.post("/api/links/revoke"),
            client.put(f"/api/files/{file_id}/public", json={"is_public": True}),
            client.post("/api/uploads/links", json={"max_bytes": 1}),
            client.get("/api/files", params={"links": "1"}),
        ):
            assert (answer.status_code, answer.json()["needed_scope"]) == (403, "links:write")


def test_a_public_file_has_an_url_that_ends_with_it(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        file_id = stored(ada)
        path = f"/api/files/{file_id}/public"
        assert ada.get(path).json() == {"url": None}
        assert code(bob.put(path, json={"is_public": True})) == (404, "not_found")
        url = ada.put(path, json={"is_public": True}).json()["url"]
        assert ada.put(path, json={"is_public": True}).json() == ada.get(path).json() == {"url": url}
        assert ada.get(f"/api/files/{file_id}").json()["is_public"] is True
        answer = browser.get(url)
        assert (answer.content, answer.headers["cache-control"]) == (BODY, "public, max-age=300, no-transform")
        assert browser.get(url, headers={"Range": "bytes=-5"}).content == BODY[-5:]
        assert ada.put(path, json={"is_public": False}).json() == {"url": None}
        for gone in (url, url[:-1] + "_", "/p/", "/p/x/y", url + "/x"):
            assert code(browser.get(gone)) == (404, "not_found")
        assert ada.put(path, json={"is_public": True}).json()["url"] != url


def test_links_are_served_while_the_database_is_away(start_server: ServerFactory, tmp_path: Path) -> None:
    postgres = EmbeddedPostgres(tmp_path / "postgres")
    server = start_server(database_url=postgres.start())
    try:
        with server.client("ada") as ada, httpx.Client(base_url=server.url) as browser:
            one, two, three = stored(ada), stored(ada), stored(ada)
            kept, revoked, deleted = link(ada, one), link(ada, two), link(ada, three)
            with_database = browser.get(kept).headers
            ada.post(f"/api/files/{two}/revoke-links")
            ada.delete(f"/api/files/{three}")
            postgres.stop()
            answer = browser.get(kept)
            assert (answer.status_code, answer.content) == (200, BODY)
            for name in with_database.keys() - {"date", "cache-control", "x-request-id"}:
                assert answer.headers[name] == with_database[name], name
            assert browser.get(kept, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
            assert browser.get(kept, headers={"Range": "bytes=7-8"}).content == BODY[7:9]
            for url in (revoked, deleted):
                assert code(browser.get(url)) == (404, "not_found")
            assert code(ada.get("/api/files")) == (503, "database_unavailable")
    finally:
        server.stop()
        postgres.stop()


@pytest.mark.anyio
async def test_a_revoked_user_is_remembered_while_the_database_is_away(settings: Settings, volume: Path) -> None:
    db, vault = Database(settings), Vault(None)
    await db.open()
    try:
        await vault.refresh(await ledger.list_volumes(db))
        (known,) = vault.volumes
        user_id = "ada@example.com"  # whose directory has another name
        await ledger.ensure_user(db, user_id, max_bytes=None, volume_id=known.id)
        file_id = uuid4()
        path = stored_path(user_id, "image", file_id, 1, "png")
        (volume / path).parent.mkdir(parents=True)
        (volume / path).write_bytes(BODY)
        links = Links(["k" * 32])
        file = a_file(BODY, id=file_id, user_id=user_id, file_path=path, volume_id=known.id)
        _, _, token, segment = links.download(file, 0, expires_at=4_000_000_000).split("/")
        found = links.verify_download(token, segment)
        delivery = Delivery(db, vault, AwaitedPreviews(db, Notices(settings), 1, asyncio.Event()))
        await delivery.refresh_link_epochs()
        await ledger.raise_link_epoch(db, user_id)
        seen = Delivery(db, vault, AwaitedPreviews(db, Notices(settings), 1, asyncio.Event()))
        await seen.refresh_link_epochs()
        await db.close()
        assert (await delivery.open_linked(found, "HEAD", {}, "private")).status == 200  # it has not heard of the revocation
        with pytest.raises(DatabaseUnavailable):
            await seen.open_linked(found, "HEAD", {}, "private")
    finally:
        vault.close()
        await db.close()


@pytest.mark.anyio
async def test_a_moved_file_is_found_while_the_database_is_away(settings: Settings, volume: Path, tmp_path: Path) -> None:
    """Its link names the old volume."""
    db, vault = Database(settings), Vault(0)
    await db.open()
    try:
        (tmp_path / "second").mkdir()
        new_id = init_volume(tmp_path / "second")
        await ledger.add_volume(db, new_id, str(tmp_path / "second"))
        await vault.refresh(rows := await ledger.list_volumes(db))
        path = stored_path("ada", "image", file_id := uuid4(), 1, "png")
        (tmp_path / "second" / path).parent.mkdir(parents=True)
        (tmp_path / "second" / path).write_bytes(BODY)
        old_id = next(row.id for row in rows if row.id != new_id)
        links = Links(["k" * 32])
        file = a_file(BODY, id=file_id, user_id="ada", file_path=path, volume_id=old_id)
        _, _, token, segment = links.download(file, 0, expires_at=4_000_000_000).split("/")
        delivery = Delivery(db, vault, AwaitedPreviews(db, Notices(settings), 1, asyncio.Event()))
        await db.close()
        answer = await delivery.open_linked(links.verify_download(token, segment), "GET", {}, "private")
        assert answer.body is not None
        assert (answer.status, answer.body.volume_id) == (200, new_id)
        answer.body.close()
        (tmp_path / "second" / path).unlink()
        with pytest.raises(NotFound):
            await delivery.open_linked(links.verify_download(token, segment), "GET", {}, "private")
    finally:
        vault.close()
        await db.close()


def test_nothing_that_opens_a_door_is_logged(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        url = link(ada, (file_id := stored(ada)))
        public = ada.put(f"/api/files/{file_id}/public", json={"is_public": True}).json()["url"]
        upload = ada.post("/api/uploads/links", json={"max_bytes": 10}).json()["url"]
        for each in (url, public, url[:-1], upload):
            browser.get(each)
        browser.put(upload, content=b"x")
        metrics = ada.get("/metrics").text
    server.stop()
    logged = server.logged() + metrics
    for secret in (url.split("/")[2].split(".")[0], url.split("/")[2].split(".")[1], public.split("/")[2], upload.split(".")[-1]):
        assert secret not in logged
    assert '"/f/{token}/{name}"' in logged


def test_without_a_key_to_sign_with_it_does_not_start(database_url: str) -> None:
    for keys, complaint in (("", "COFFER_LINK_KEYS is not set"), ("short", "COFFER_LINK_KEYS: each key needs at least 32")):
        environment = {"PATH": os.environ["PATH"], "DATABASE_URL": database_url, "COFFER_LINK_KEYS": keys, "COFFER_PORT": "0"}
        command = [sys.executable, "-m", "server.cli", "serve"]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
        assert (done.returncode, complaint in done.stderr) == (2, True), done.stderr


def test_a_public_url_of_its_own(start_server: ServerFactory) -> None:
    server = start_server(COFFER_PUBLIC_URL="https://media.example.com/", COFFER_LINK_CACHE="public")
    with server.client("ada") as ada:
        url = link(ada, stored(ada))
        assert url.startswith("https://media.example.com/f/")
        answer = httpx.get(server.url + url.removeprefix("https://media.example.com"))
        assert answer.headers["cache-control"].startswith("public, max-age=")
