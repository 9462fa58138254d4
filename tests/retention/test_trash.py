"""The trash: what is deleted is gone for everybody, counts, and comes back as it was; but its links do not."""

import asyncio
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from server import ledger
from server.auth import Scope
from server.intake import Intake
from server.ledger import Database
from server.settings import Settings
from server.vault import Vault
from tests.ops.conftest import drifted, path_of
from tests.retention.conftest import store
from tests.samples import image
from tests.serving import RunningServer, execute


def stored_paths(server: RunningServer, user_id: str) -> list[Path]:
    return [path for path in server.stored_paths() if path.parts[-3] == user_id]


def ids_in(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [file["id"] for file in answer.json()["files"]]


def test_nobody_sees_it_and_it_counts(trashing: RunningServer, user: str) -> None:
    kept = store(trashing, user, seed=1, tags="sun", package_name="p")
    gone = store(trashing, user, seed=2, tags="sun", package_name="p")
    with trashing.client(user) as ada:
        ada.post(f"/api/files/{gone}/favorite", json={"is_favorite": True})
        before = ada.get("/api/storage/usage").json()
        assert ada.delete(f"/api/files/{gone}").status_code == 204
        assert ada.get("/api/storage/usage").json() == before
        for query in ({}, {"type": "image"}, {"mime": "image/png"}, {"tag": "sun"}, {"package_name": "p"}, {"name": "2"}, {"sort": "size"}):
            assert gone not in ids_in(ada.get("/api/files", params=query)), query
        assert ids_in(ada.get("/api/files", params={"favorite": "true"})) == []
        path = f"/api/files/{gone}"
        for method, tail, body in (
            ("GET", "", None),
            ("GET", "/download", None),
            ("PATCH", "", {"file_name": "x.png"}),
            ("PUT", "/tags", {"tags": ["a"]}),
            ("POST", "/favorite", None),
            ("POST", "/copy", None),
            ("POST", "/link", None),
            ("POST", "/revoke-links", None),
            ("PUT", "/public", {"is_public": True}),
            ("DELETE", "", None),
            ("DELETE", "?permanent=true", None),
        ):
            answer = ada.request(method, path + tail, json=body)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, tail)
        assert ada.put(f"{path}/content", content=image(50, 9)).status_code == 404
        assert ada.post("/api/links", json={"ids": [gone]}).json()["links"] == [{"id": gone, "status": "not_found"}]
        assert ada.post("/api/files/delete", json={"ids": [gone, kept]}).json()["results"] == [
            {"id": gone, "status": "not_found"},
            {"id": kept, "status": "deleted"},
        ]
        assert ids_in(ada.get("/api/trash")) == [kept, gone]
        assert ids_in(ada.get("/api/files")) == []
    assert drifted(trashing.database_url) == []


def test_it_comes_back_as_it_was_but_its_links_do_not(trashing: RunningServer, user: str) -> None:
    file_id = store(trashing, user, tags="sun")
    with trashing.client(user) as ada:
        was = ada.get(f"/api/files/{file_id}").json()
        link = ada.post(f"/api/files/{file_id}/link").json()["url"]
        public = ada.put(f"/api/files/{file_id}/public", json={"is_public": True}).json()["url"]
        for url in (link, public):
            assert httpx.get(trashing.url + url).status_code == 200  # and is remembered for a second
        path = path_of(trashing, file_id)
        assert ada.delete(f"/api/files/{file_id}").status_code == 204
        for url in (link, public):
            assert httpx.get(trashing.url + url).status_code == 404
        assert not path.exists()  # an edge, which asks for the name alone, finds nothing either
        (listed,) = ada.get("/api/trash").json()["files"]
        assert (listed["id"], listed["tags"], listed["deletes_at"] > listed["deleted_at"]) == (file_id, ["sun"], True)
        for _ in range(2):  # a repetition, whose first answer was lost
            restored = ada.post(f"/api/files/{file_id}/restore")
            assert restored.status_code == 200
            assert restored.json() | {"updated_at": was["updated_at"]} == was
        assert ada.get(f"/api/files/{file_id}/download").content == image(2_000, 0)
        assert ids_in(ada.get("/api/trash")) == []
        for url in (link, public):
            assert httpx.get(trashing.url + url).status_code == 404
        again = ada.post(f"/api/files/{file_id}/link").json()["url"]
        assert httpx.get(trashing.url + again).content == image(2_000, 0)
    events = [row["type"] for row in execute(trashing.database_url, "select type from events where user_id = $1 order by id", user)]
    assert events == ["file.created", "file.trashed", "file.restored"]
    with trashing.client() as admin:
        records = admin.get("/api/audit", params={"file": file_id}).json()["records"]
    assert [each["action"] for each in records] == ["file.restored", "file.trashed", "file.made_public", "file.created"]


def test_for_good(trashing: RunningServer, user: str) -> None:
    first, second, third = (store(trashing, user, seed=seed) for seed in range(3))
    with trashing.client(user) as ada:
        assert ada.delete(f"/api/trash/{first}").status_code == 404  # not in it
        assert ada.delete(f"/api/files/{first}").status_code == 204
        assert ada.delete(f"/api/trash/{first}").status_code == 204
        assert ada.delete(f"/api/trash/{first}").status_code == 404
        assert ada.delete(f"/api/files/{second}", params={"permanent": "true"}).status_code == 204
        assert ada.delete(f"/api/files/{third}", params={"permanent": "perhaps"}).json()["field"] == "permanent"
        deleted = ada.post("/api/files/delete", json={"ids": [third], "permanent": True}).json()["results"]
        assert deleted == [{"id": third, "status": "deleted"}]
        assert ids_in(ada.get("/api/trash")) == []
        assert ada.get("/api/storage/usage").json()["used_bytes"] == 0
        assert ada.post(f"/api/files/{first}/restore").status_code == 404
    assert stored_paths(trashing, user) == []


def test_without_a_trash_nothing_goes_there(server: RunningServer) -> None:
    file_id = store(server, "ada")
    with server.client("ada") as ada:
        assert ada.delete(f"/api/files/{file_id}").status_code == 204
        assert ids_in(ada.get("/api/trash")) == []
        assert ada.get("/api/storage/usage").json()["used_bytes"] == 0


def test_pages(trashing: RunningServer, user: str) -> None:
    ids = [store(trashing, user, seed=seed, size_bytes=200) for seed in range(7)]
    with trashing.client(user) as ada:
        for file_id in ids:
            ada.delete(f"/api/files/{file_id}")
        found: list[str] = []
        query: dict[str, str] = {"limit": "3"}
        while True:
            page = ada.get("/api/trash", params=query).json()
            found += [file["id"] for file in page["files"]]
            if page["next_cursor"] is None:
                break
            query["cursor"] = page["next_cursor"]
        assert found == ids[::-1]
        for bad in ("x", "AAAA", "é"):
            assert ada.get("/api/trash", params={"cursor": bad}).json()["field"] == "cursor"


def test_a_type_is_listed_whole_however_much_of_it_is_in_the_trash(trashing: RunningServer, user: str) -> None:
    old = [store(trashing, user, seed=seed, size_bytes=200) for seed in range(3)]
    new = [store(trashing, user, seed=seed, size_bytes=200) for seed in range(3, 9)]
    with trashing.client(user) as ada:
        assert ada.post("/api/files/delete", json={"ids": new}).status_code == 200
        assert ids_in(ada.get("/api/files", params={"type": "image", "limit": 2})) == [old[2], old[1]]


def test_strangers_and_narrow_keys(trashing: RunningServer, user: str) -> None:
    file_id = store(trashing, user)
    with trashing.client(user) as ada, trashing.client(f"not-{user}") as bob:
        ada.delete(f"/api/files/{file_id}")
        assert ids_in(bob.get("/api/trash")) == []
        for answer in (bob.post(f"/api/files/{file_id}/restore"), bob.delete(f"/api/trash/{file_id}")):
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        with trashing.client(user, api_key=trashing.new_key(Scope.FILES_READ)) as reader:
            assert ids_in(reader.get("/api/trash")) == [file_id]
            assert reader.post(f"/api/files/{file_id}/restore").status_code == 403
            assert reader.delete(f"/api/trash/{file_id}").status_code == 403
        with trashing.client(user, api_key=trashing.new_key(Scope.FILES_READ, Scope.FILES_WRITE)) as narrow:
            execute(trashing.database_url, "update api_keys set kinds = array['video'] where not 'admin' = any (scopes)")  # and unused yet
            assert ids_in(narrow.get("/api/trash")) == []
            assert narrow.post(f"/api/files/{file_id}/restore").status_code == 404
            assert narrow.delete(f"/api/trash/{file_id}").status_code == 404


def test_an_idempotency_key_is_forgotten_with_its_file(trashing: RunningServer, user: str) -> None:
    with trashing.client(user) as ada:
        first = ada.post("/api/files/upload", content=image(), headers={"Idempotency-Key": "k"}).json()["id"]
        ada.delete(f"/api/files/{first}")
        again = ada.post("/api/files/upload", content=image(), headers={"Idempotency-Key": "k"})
        assert again.status_code == 201 and "idempotency-replayed" not in again.headers
        assert ada.post(f"/api/files/{first}/restore").status_code == 200
        assert set(ids_in(ada.get("/api/files"))) == {first, again.json()["id"]}


def test_erasing_a_user_empties_the_trash(trashing: RunningServer, user: str) -> None:
    file_id = store(trashing, user)
    with trashing.client(user) as ada:
        ada.delete(f"/api/files/{file_id}")
        assert len(stored_paths(trashing, user)) == 1
        assert ada.delete(f"/api/users/{user}").status_code == 204
    assert stored_paths(trashing, user) == []
    assert execute(trashing.database_url, "select from user_files where user_id = $1", user) == []


def test_a_file_whose_bytes_are_gone_goes_to_the_trash_all_the_same(trashing: RunningServer, user: str) -> None:
    file_id = store(trashing, user)
    path = path_of(trashing, file_id)
    path.rename(path.with_name(f"{path.name}.damaged"))
    with trashing.client(user) as ada:
        assert ada.delete(f"/api/files/{file_id}").status_code == 204
        assert ids_in(ada.get("/api/trash")) == [file_id]
        assert ada.delete(f"/api/trash/{file_id}").status_code == 204
    assert stored_paths(trashing, user) == []


def test_what_a_crash_left_is_stepped_over(trashing: RunningServer, user: str) -> None:
    file_id = store(trashing, user)
    path = path_of(trashing, file_id)
    (path.with_name(f"{file_id}.2.png")).write_bytes(b"left by a crash")
    with trashing.client(user) as ada:
        assert ada.delete(f"/api/files/{file_id}").status_code == 204
        assert ada.post(f"/api/files/{file_id}/restore").status_code == 200
        assert ada.get(f"/api/files/{file_id}/download").content == image(2_000, 0)
    assert path_of_generation(trashing, file_id) == [2, 3]


def path_of_generation(server: RunningServer, file_id: str) -> list[int]:
    return sorted(int(path.name.split(".")[1]) for path in server.stored_paths() if path.name.startswith(file_id))


@pytest.mark.anyio
async def test_a_file_that_is_replaced_in_between_is_moved_with_its_new_bytes(
    trashing: RunningServer, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = await asyncio.to_thread(store, trashing, user)
    db, vault = Database(Settings(database_url=trashing.database_url)), Vault(0)
    await db.open()
    await vault.refresh(await ledger.list_volumes(db))
    intake = Intake(Settings(database_url=trashing.database_url, trash_days=1), db, vault)
    moving = ledger.trash_files
    replaced: list[httpx.Response] = []

    async def replaced_first(*arguments: object) -> object:
        if not replaced:
            with trashing.client(user) as ada:
                replaced.append(await asyncio.to_thread(ada.put, f"/api/files/{file_id}/content", content=image(3_000, 7)))
        return await moving(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "trash_files", replaced_first)
    try:
        assert await intake.delete(user, [UUID(file_id), uuid4()]) == {UUID(file_id)}
        (file,) = await ledger.list_trash(db, user, None, None, 10)
    finally:
        vault.close()
        await db.close()
    assert replaced[0].status_code == 200
    assert file.file_size == len((trashing.volume / file.file_path).read_bytes()) == 3_000
    assert len(stored_paths(trashing, user)) == 1
