"""Linked assets as apps meet them: a server, a worker, and somebody else's machine. And the worker is killed."""

import asyncio
import hashlib
import threading
from pathlib import Path

from tests.fetching.peer import Asked, Peer, Say, always, head, in_thread, ranged
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until
from tests.working import working

OUTSIDE = "127.0.0.2"
NETWORK = f"{OUTSIDE}/32"
BODY = image(3_000_000)
MISSING = "01900000-0000-7000-8000-000000000000"


def test_linked_media_is_remembered_as_what_is_known_of_it(start_server: ServerFactory, tmp_path: Path) -> None:
    server = start_server(COFFER_FETCH_PRIVATE_NETWORKS=NETWORK)
    with (
        in_thread(Peer(always(404), OUTSIDE)) as peer,
        server.client("ada", timeout=40) as ada,
        working(server, tmp_path / "worker.log", COFFER_FETCH_PRIVATE_NETWORKS=NETWORK),
    ):

        def remembered() -> list[tuple[str, str, bool, str | None]]:
            found = ada.get("/api/media", params={"entity_type": "character", "entity_id": "mira"}).json()["media"]
            return [(each["source_type"], each["original_url"], each["is_accessible"], each["file_id"]) for each in found]

        wish = {"url": f"{peer.url}/lost.png", "entity_type": "character", "entity_id": "mira"}
        refused = ada.post("/api/assets/link", json=wish).json()
        assert (refused["code"], refused["field"]) == ("invalid_request", "type")
        assert ada.post("/api/assets/link", json={"url": f"{peer.url}/other.png"}).status_code == 201
        path = f"/api/assets/{ada.post('/api/assets/link', json=wish | {'type': 'image'}).json()['id']}"
        until(lambda: remembered() == [("linked", f"{peer.url}/lost.png", False, None)])
        peer.answering = ranged(BODY)
        ada.put(f"{path}/replace", json={"url": f"{peer.url}/sea.png"}).raise_for_status()
        assert ada.get(f"{path}/check").json()["state"] == "reachable"
        assert remembered() == [("replaced", f"{peer.url}/sea.png", True, None)]
        ada.post(f"{path}/import").raise_for_status()
        done = until(lambda: (asset := ada.get(path).json())["import_state"] == "done" and asset)
        assert remembered() == [("replaced", f"{peer.url}/sea.png", True, done["file_id"])]
        ada.delete(path).raise_for_status()
        assert len(remembered()) == 1  # the file is still there
        ada.delete(f"/api/files/{done['file_id']}").raise_for_status()
        assert remembered() == []
        path = f"/api/assets/{ada.post('/api/assets/link', json=wish | {'type': 'image'}).json()['id']}"
        assert len(remembered()) == 1
        ada.delete(path).raise_for_status()
        assert remembered() == [] and len(ada.get("/api/media").json()["media"]) == 0


def test_an_asset_from_its_link_to_its_file(start_server: ServerFactory, tmp_path: Path) -> None:
    async def signing(asked: Asked, say: Say) -> None:
        if asked.path.startswith("/real"):
            await ranged(BODY)(asked, say)
        else:
            await always(302, location="/real/sea.png?token=private")(asked, say)

    server = start_server(COFFER_FETCH_PRIVATE_NETWORKS=NETWORK, COFFER_LOG_LEVEL="debug")
    with (
        in_thread(Peer(signing, OUTSIDE)) as peer,
        server.client("ada", timeout=40) as ada,
        server.client("bob") as bob,
        working(server, tmp_path / "worker.log", COFFER_FETCH_PRIVATE_NETWORKS=NETWORK, COFFER_LOG_LEVEL="debug") as worker,
    ):
        made = ada.post("/api/assets/link", json={"url": f"{peer.url}/sea.png?key=secret", "tags": ["sea"]})
        assert made.status_code == 201, made.text
        path = f"/api/assets/{made.json()['id']}"
        found = ada.get(f"{path}/check").json()
        assert (found["state"], found["reason"]) == ("reachable", None)
        assert ada.get("/api/assets", params={"state": "reachable"}).json()["assets"] == [found]
        assert ada.get("/api/assets", params={"state": "unreachable"}).json() == {"assets": [], "next_cursor": None}
        for answer in (bob.get(path), bob.get(f"{path}/check"), bob.delete(path), bob.post(f"{path}/import")):
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert bob.put(f"{path}/replace", json={"url": f"{peer.url}/his.png"}).status_code == 404
        assert ada.post(f"{path}/import").status_code == 202
        done = until(lambda: (asset := ada.get(path).json())["import_state"] == "done" and asset)
        file = ada.get(f"/api/files/{done['file_id']}").json()
        assert (file["file_name"], file["tags"], file["sha256"]) == ("sea.png", ["sea"], hashlib.sha256(BODY).hexdigest())
        peer.answering = always(404)
        replaced = ada.put(f"{path}/replace", json={"url": f"{peer.url}/lost.png"}).json()
        assert (replaced["state"], replaced["import_state"], replaced["file_id"]) == ("unchecked", None, None)
        lost = ada.get(f"{path}/check").json()
        assert (lost["state"], lost["reason"]) == ("unreachable", "status_404")
        asked = len(peer.asked)
        assert ada.get(f"{path}/check").json() == lost and len(peer.asked) == asked  # known well enough
        with server.client() as admin:
            records = admin.get("/api/audit", params={"user": "ada"}).json()["records"]
        actions = [record["action"] for record in records if record["action"].startswith("asset.")]
        assert actions == ["asset.replaced", "asset.imported", "asset.linked"]
        (created,) = [record for record in records if record["action"] == "file.created"]
        assert (created["actor_kind"], created["acting_user_id"]) == ("api_key", "ada")  # who wished for it
        assert ada.delete(path).status_code == 204 and ada.get(path).status_code == 404
        worker.stop()
    for log in (server.logged(), worker.log.read_text(), str(records)):
        assert not [word for word in ("key=secret", "token=private", "sea.png") if word in log]


def test_what_is_refused(server: RunningServer) -> None:
    with server.client("ada") as ada:
        for url in ("http://app.example.com/a", "https://127.0.0.1/a", "https://0x7f.1/", "https://169.254.169.254/latest/meta-data/"):
            answer = ada.post("/api/assets/link", json={"url": url})
            assert (answer.status_code, answer.json()["code"]) == (400, "url_refused"), url
        assert ada.get("/api/storage/usage").json()["used_bytes"] == 0
        with server.client() as admin:
            assert admin.get("/api/users").json()["users"] == []
        made = ada.post("/api/assets/link", json={"url": "https://app.example.com/a"}).json()
        answer = ada.put(f"/api/assets/{made['id']}/replace", json={"url": "https://[::1]/"})
        assert (answer.status_code, answer.json()["code"]) == (400, "url_refused")
        for parameters, field in (
            ({"state": "new"}, "state"),
            ({"cursor": "1"}, "cursor"),
            ({"limit": "0"}, "limit"),
            ({"sort": "x"}, "sort"),
        ):
            answer = ada.get("/api/assets", params=parameters)
            assert (answer.status_code, answer.json()["field"]) == (400, field)
        for method, path in (("GET", ""), ("GET", "/check"), ("POST", "/import"), ("DELETE", "")):
            assert ada.request(method, f"/api/assets/{MISSING}{path}").status_code == 404


def test_pages(server: RunningServer) -> None:
    with server.client("ada") as ada:
        ids = [ada.post("/api/assets/link", json={"url": f"https://app.example.com/{n}"}).json()["id"] for n in range(5)]
        found, cursor = [], None
        while True:
            page = ada.get("/api/assets", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
            found += [asset["id"] for asset in page["assets"]]
            if (cursor := page["next_cursor"]) is None:
                break
        assert found == ids


def test_a_killed_worker_leaves_one_file_and_no_quota_behind(start_server: ServerFactory, tmp_path: Path) -> None:
    killed = threading.Event()

    async def hanging(asked: Asked, say: Say) -> None:
        await say(head(200, content_length=len(BODY)) + BODY[:2_000_000])
        while not killed.is_set():  # noqa: ASYNC110 - it is set by another thread
            await asyncio.sleep(0.02)

    server = start_server(COFFER_FETCH_PRIVATE_NETWORKS=NETWORK)
    with in_thread(Peer(hanging, OUTSIDE)) as peer, server.client("ada", timeout=40) as ada:
        made = [ada.post("/api/assets/link", json={"url": f"{peer.url}/{n}.png"}).json() for n in range(3)]
        for each in made:
            ada.post(f"/api/assets/{each['id']}/import")
        with working(server, tmp_path / "first.log", COFFER_FETCH_PRIVATE_NETWORKS=NETWORK) as first:
            until(lambda: len(list((server.volume / "incoming").iterdir())) == 3)
            first.kill()
            killed.set()
        peer.answering = ranged(BODY)
        execute(server.database_url, "update linked_assets set import_at = clock_timestamp()")  # a minute later
        with working(server, tmp_path / "second.log", COFFER_FETCH_PRIVATE_NETWORKS=NETWORK) as second:
            for each in made:
                path = f"/api/assets/{each['id']}"
                # What the dead one had reserved, with the key that keeps a file from being stored twice, is released by its lease.
                until(lambda path=path: ada.get(path).json()["import_state"] == "done", 200)  # type: ignore[misc]
            second.stop()
        server.settle()
        usage = ada.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"]) == (3 * len(BODY), 0)
        assert len(server.stored_paths()) == 3
