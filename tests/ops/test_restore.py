"""What was saved comes back, and nothing is stored before somebody has looked (FAULTS 15)."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from server.commands.failures import Exit
from server.ledger.statements import statement
from server.vault.layout import WITHHELD
from tests.conftest import PostgresServer
from tests.ops.conftest import Second, Tool, drifted, path_of, place_on_first, store, where
from tests.ops.slow_restic import SlowRestic
from tests.ops.test_scrub import download, flip
from tests.processes import has_ended
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.waiting import until

MIRA = {"entity_type": "character", "entity_id": "mira"}
OF_THE_WORKER = {"import_reason", "import_actor", "import_kinds", "import_at", "updated_at"}
"""Of linked assets: what is only about an import under way."""


def test_everything_comes_back_into_an_empty_place(
    server: RunningServer, repository: Path, tool: Tool, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = store(server, "ada", 20, size_bytes=30_000)
    other = store(server, "päul/../x", 3, seed=100)
    with server.client("ada") as client:
        assert client.delete(f"/api/files/{ids.pop()}").status_code == 204
    assert tool("backup").code == Exit.OK
    store(server, "ada", 1, seed=500)  # later than the backup
    url = postgres_server.clone(empty=True)
    monkeypatch.setenv("DATABASE_URL", url)
    told = tool("restore", "all", "--to", str(tmp_path / "restored"))
    assert (told.code, told.findings) == (Exit.OK, []), told.stderr
    assert (told.summary["restored_files"], told.summary["restored_bytes"]) == (22, 19 * 30_000 + 3 * 2_000)
    assert drifted(url) == []
    server.stop()
    server.database_url = url
    (server.volume,) = (tmp_path / "restored").iterdir()
    server.start()
    for number, file_id in enumerate(ids):
        assert download(server, "ada", file_id).content == image(30_000, number)
    for number, file_id in enumerate(other):
        assert download(server, "päul/../x", file_id).content == image(2_000, 100 + number)
    # Small and large, new users and old ones, new files and new bytes of old ones.
    with server.client("ada") as client, server.client("bob") as bob:
        for answer in (
            client.post("/api/files/upload", content=image(2_000, 1)),
            client.post("/api/files/upload", content=image(3_000_000, 1)),
            client.post(f"/api/files/{ids[0]}/copy"),
            client.put(f"/api/files/{ids[0]}/content", content=image(2_000, 2)),
            bob.post("/api/files/upload", content=image(2_000, 1)),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "uploads_stopped")
            assert answer.headers["retry-after"] == "60"
        assert tool("restore", "clear").code == Exit.OK
        assert client.post("/api/files/upload", content=image(2_000, 1)).status_code == 201
        assert client.delete(f"/api/files/{ids[1]}").status_code == 204
    assert tool("audit").findings == []
    server.stop()
    postgres_server.drop(url)


def test_a_damaged_file_comes_back_in_its_place(server: RunningServer, repository: Path, tool: Tool) -> None:
    rotten, missing, renamed, sound, later = store(server, "ada", 5)
    flip(path_of(server, later))  # before the backup, which has nothing better
    assert tool("backup").code == Exit.OK
    with server.client("ada") as client:
        assert client.post(f"/api/files/{renamed}/revoke-links").is_success  # so the backup has it under another name
    flip(path_of(server, rotten))
    path_of(server, missing).unlink()
    flip(path_of(server, renamed))
    assert tool("scrub", "--rate", "unlimited").states == [("damaged", "look")] * 4
    server.set_quota("ada", 1_000)  # what a user has is not charged again
    for number, file_id in enumerate((rotten, missing, renamed)):
        assert download(server, "ada", file_id).status_code == 410
        told = tool("restore", "file", file_id)
        assert (told.code, told.findings) == (Exit.OK, []), told.stderr
        assert download(server, "ada", file_id).content == image(2_000, number)
    told = tool("restore", "file", later)
    assert (told.code, "no backup has the bytes" in told.stderr) == (Exit.NOT_FOUND, True)
    assert download(server, "ada", later).status_code == 410
    assert tool("restore", "file", sound).code == Exit.OK
    assert tool("restore", "file", "00000000-0000-7000-8000-000000000000").code == Exit.NOT_FOUND
    assert server.incoming() == []


def test_a_file_that_has_moved_since_comes_back_to_where_it_is_now(
    server: RunningServer, repository: Path, tool: Tool, second: Second
) -> None:
    place_on_first(server, second)
    (file_id,) = store(server, "ada", 1)
    assert tool("backup").code == Exit.OK
    assert tool("rebalance", "--user", "ada", "--to", str(second.id), "--keep-old", "0", "--for-real").code == Exit.OK
    (path,) = (second.mount / "users").glob(f"*/*/{file_id}.*")
    flip(path)
    assert tool("scrub", "--rate", "unlimited").states == [("damaged", "look")]
    told = tool("restore", "file", file_id)
    assert (told.code, told.findings) == (Exit.OK, []), told.stderr
    assert download(server, "ada", file_id).content == image(2_000, 0)
    assert where(server) == {second.id}


def test_what_a_user_lost_comes_back_beside_what_they_have(server: RunningServer, repository: Path, tool: Tool) -> None:
    kept, deleted, changed, again = store(server, "ada", 4)
    with server.client("ada") as client:
        client.put(f"/api/files/{deleted}/tags", json={"tags": ["beach"]}).raise_for_status()
        before = client.get(f"/api/files/{deleted}").json()
        link = client.post(f"/api/files/{deleted}/link", json={}).json()["url"]
        assert tool("backup").code == Exit.OK
        client.put(f"/api/files/{changed}/content", content=image(999, 77)).raise_for_status()
        for file_id in (deleted, again):
            assert client.delete(f"/api/files/{file_id}").status_code == 204
        (newer,) = store(server, "ada", 1, seed=50)
        told = tool("restore", "user", "ada")
        assert (told.code, told.findings) == (Exit.OK, []), told.stderr
        assert (told.summary["restored_files"], told.summary["files_there"]) == (2, 2)
        after = client.get(f"/api/files/{deleted}").json()
        assert {name: after[name] for name in before if name != "updated_at"} == {
            name: before[name] for name in before if name != "updated_at"
        }
        for number, file_id in ((0, kept), (1, deleted), (3, again)):
            assert client.get(f"/api/files/{file_id}/download").content == image(2_000, number)
        assert client.get(f"/api/files/{changed}/download").content == image(999, 77)
        assert client.get(f"/api/files/{newer}/download").content == image(2_000, 50)
        assert client.get(link).status_code in (403, 404)
        assert drifted(server.database_url) == []
        assert tool("restore", "user", "ada").summary["restored_files"] == 0
    server.settle()
    assert (tool("audit").findings, (server.volume / ".coffer-staging").exists()) == ([], False)


def test_how_files_were_made_and_what_was_linked_come_back(server: RunningServer, repository: Path, tool: Tool) -> None:
    with server.client("ada") as client:

        def make(seed: int, **wish: Any) -> str:
            made = client.post("/api/generate", json={"outputs": [{"max_bytes": 9_000}], **MIRA, "prompt": "a pier", **wish}).json()
            client.put(made["uploads"][0]["url"], content=image(2_000, seed)).raise_for_status()
            return str(made["uploads"][0]["file_id"])

        def link(name: str, **wish: Any) -> str:
            asset = client.post("/api/assets/link", json={"url": f"https://example.com/{name}.png", "type": "image", **MIRA, **wish})
            asset.raise_for_status()
            return str(asset.json()["id"])

        first, other = make(1, model="sdxl"), make(2)
        child = make(4, parent_id=first)
        imported, kept, alone = link("a", tags=["sea"]), link("b"), link("c")
        (uploaded,) = store(server, "ada", 1, seed=60)
        sql = "update linked_assets set import_state = 'done', check_at = null, file_id = $2 where id = $1"
        execute(server.database_url, sql, imported, uploaded)
        client.put(f"/api/media/{first}/primary", json={"is_primary": True}).raise_for_status()
        before = {each["id"]: each for each in client.get("/api/media").json()["media"]}
        assets = {each["id"]: each for each in client.get("/api/assets").json()["assets"]}
        assert len(before) == 6
        assert tool("backup").code == Exit.OK
        for file_id in (first, child, uploaded):
            client.delete(f"/api/files/{file_id}").raise_for_status()
        for asset_id in (imported, alone):
            client.delete(f"/api/assets/{asset_id}").raise_for_status()
        client.put(f"/api/media/{other}/primary", json={"is_primary": True}).raise_for_status()
        told = tool("restore", "user", "ada")
        assert (told.code, told.findings) == (Exit.OK, []), told.stderr
        assert (told.summary["restored_files"], told.summary["restored_assets"]) == (3, 2)
        after = {each["id"]: each for each in client.get("/api/media").json()["media"]}
        before[first]["is_primary"], before[other]["is_primary"] = False, True  # another one is by now
        assert after == before
        back = {each["id"]: each for each in client.get("/api/assets").json()["assets"]}
        assert {key: value | {"updated_at": None} for key, value in back.items()} == {
            key: value | {"updated_at": None} for key, value in assets.items()
        }
        client.delete(f"/api/files/{uploaded}").raise_for_status()
        client.delete(f"/api/assets/{imported}").raise_for_status()
        execute(server.database_url, "update user_storage set max_bytes = total_bytes")  # no room for the file
        assert tool("restore", "user", "ada").states == [("not_restored", "look")]
        again = client.get(f"/api/assets/{imported}").json()
        assert (again["import_state"], again["file_id"]) == (None, None)
        assert tool("restore", "user", "ada").summary["restored_assets"] == 0
    (row,) = execute(server.database_url, "select check_at is not null as due from linked_assets where id = $1", imported)
    assert row["due"] and kept in back


@pytest.mark.parametrize(("table", "apart"), [("generated_media", {"prompt_words"}), ("linked_assets", OF_THE_WORKER)])
def test_every_column_comes_back(database_url: str, table: str, apart: set[str]) -> None:
    columns = execute(database_url, "select column_name as name from information_schema.columns where table_name = $1", table)
    text = statement("restore_file" if table == "generated_media" else "restore_asset")
    assert {row["name"] for row in columns if not re.search(rf"\b{row['name']}\b", text)} == apart


def test_a_user_who_was_erased_comes_back_within_their_quota(server: RunningServer, repository: Path, tool: Tool) -> None:
    ids = store(server, "ada", 3)
    server.set_quota("ada", 6_500)
    assert tool("backup").code == Exit.OK
    with server.client() as admin, server.client("ada") as client:
        assert admin.delete("/api/users/ada").status_code == 204
        told = tool("restore", "user", "ada")
        assert (told.code, told.summary["restored_files"]) == (Exit.OK, 3), told.stderr
        assert client.get("/api/storage/usage").json()["limit_bytes"] == 6_500
        assert client.delete(f"/api/files/{ids[1]}").status_code == 204
        store(server, "ada", 1, size_bytes=2_400, seed=9)  # there is no room now for what was deleted
        told = tool("restore", "user", "ada")
    assert (told.code, told.states, told.findings[0]["file_id"]) == (Exit.FOUND, [("not_restored", "look")], ids[1])
    assert drifted(server.database_url) == []
    server.settle()
    assert tool("audit").findings == []
    assert tool("restore", "user", "nobody").code == Exit.NOT_FOUND


def test_a_store_is_restored_over_nothing_that_is_there(
    server: RunningServer, repository: Path, tool: Tool, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(server, "ada", 1)
    assert tool("backup").code == Exit.OK
    told = tool("restore", "all", "--to", str(tmp_path / "restored"))
    assert (told.code, "is not empty" in told.stderr) == (Exit.REFUSED, True)
    url = postgres_server.clone(empty=True)
    monkeypatch.setenv("DATABASE_URL", url)
    told = tool("restore", "all")  # to its old place, where it still is
    assert told.code == Exit.REFUSED
    (tmp_path / "restored" / told_volume(server)).mkdir(parents=True)
    (tmp_path / "restored" / told_volume(server) / "something").touch()
    told = tool("restore", "all", "--to", str(tmp_path / "restored"))
    assert (told.code, "is not empty" in told.stderr) == (Exit.REFUSED, True)
    assert execute(url, "select from pg_tables where schemaname = 'public'") == []
    postgres_server.drop(url)


def told_volume(server: RunningServer) -> str:
    return (server.volume / ".coffer-volume").read_text().strip()


def test_a_restore_that_was_killed_goes_on(
    server: RunningServer,
    repository: Path,
    tool: Tool,
    slow_restic: SlowRestic,
    postgres_server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store(server, "ada", 3)
    assert tool("backup").code == Exit.OK
    url = postgres_server.clone(empty=True)
    monkeypatch.setenv("DATABASE_URL", url)
    command = ["restore", "all", "--to", str(tmp_path / "restored")]
    for stage in ("^dump .*coffer.dump", "^restore "):
        slow_restic.stop_at(stage)
        with subprocess.Popen([sys.executable, "-m", "ops.cli", *command], stderr=subprocess.DEVNULL) as process:
            restic = slow_restic.wait_until_stopped()
            process.kill()
        until(partial(has_ended, restic))
        slow_restic.go()
    told = tool(*command)
    assert (told.code, told.findings, told.summary["restored_files"]) == (Exit.OK, [], 3), told.stderr
    assert len(execute(url, "select from upload_stops")) == 1
    postgres_server.drop(url)


def test_rows_come_back_to_volumes_that_were_not_lost(
    server: RunningServer, repository: Path, tool: Tool, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, deleted, replaced = store(server, "ada", 3)
    assert tool("backup").code == Exit.OK
    with server.client("ada") as client:
        assert client.delete(f"/api/files/{deleted}").status_code == 204
        client.put(f"/api/files/{replaced}/content", content=image(999, 77)).raise_for_status()
    store(server, "ada", 1, seed=50)
    server.settle()
    server.stop()
    there = set(server.stored_paths())
    withheld = server.volume / WITHHELD
    withheld.mkdir(exist_ok=True)
    (withheld / "00000000-0000-7000-8000-000000000000.1.png").touch()  # of a backup that was killed, and nobody's
    assert tool("restore", "rows").code == Exit.REFUSED
    url = postgres_server.clone(empty=True)
    monkeypatch.setenv("DATABASE_URL", url)
    sentinel = server.volume / ".coffer-volume"
    sentinel.rename(server.volume / "sentinel")
    told = tool("restore", "rows")
    assert (told.code, "mount it there" in told.stderr) == (Exit.UNAVAILABLE, True)
    assert execute(url, "select from pg_tables where schemaname = 'public'") == []
    (server.volume / "sentinel").rename(sentinel)
    for _ in range(2):  # what was restored already is no other's
        told = tool("restore", "rows")
        assert (told.code, {each["file_id"] for each in told.findings if each["state"] == "look"}) == (Exit.FOUND, {deleted, replaced})
        assert set(server.stored_paths()) == there
    assert not withheld.exists()
    for file_id in (deleted, replaced):
        assert tool("restore", "file", file_id).code == Exit.OK
    server.database_url = url
    server.start()
    for number, file_id in enumerate((kept, deleted, replaced)):
        assert download(server, "ada", file_id).content == image(2_000, number)
    with server.client("ada") as client:
        assert client.post("/api/files/upload", content=image(2_000, 1)).json()["code"] == "uploads_stopped"
    assert set(server.stored_paths()) > there
    server.stop()
    postgres_server.drop(url)


def test_a_plain_archive_is_a_backup_too(
    server: RunningServer, tool: Tool, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = store(server, "ada", 5, size_bytes=30_000)
    archives = tmp_path / "archives"
    archives.mkdir()
    (archives / "coffer-20200101T030000.000000Z.tar.gz").touch()
    (archives / "other.tar.gz").touch()
    monkeypatch.setenv("COFFER_BACKUP_KEEP_DAILY", "1")
    told = tool("backup", "--tar", str(archives))
    assert (told.code, told.findings, told.summary["files"], told.summary["backups"]) == (Exit.OK, [], 5, 1), told.stderr
    (archive,) = archives.glob("coffer-*")
    assert (archives / "other.tar.gz").exists()
    assert archive.stat().st_mode & 0o777 == 0o600
    url = postgres_server.clone(empty=True)
    monkeypatch.setenv("DATABASE_URL", url)
    told = tool("restore", "all", "--tar", str(archive), "--to", str(tmp_path / "restored"))
    assert (told.code, told.findings, told.summary["restored_files"]) == (Exit.OK, [], 5), told.stderr
    (volume,) = (tmp_path / "restored").iterdir()
    for number, file_id in enumerate(ids):
        assert next(volume.glob(f"users/ada/images/{file_id}.*")).read_bytes() == image(30_000, number)
    assert len(execute(url, "select from upload_stops")) == 1
    archive.write_bytes(archive.read_bytes()[:1_000])
    told = tool("restore", "all", "--tar", str(archive), "--to", str(tmp_path / "again"))
    assert told.code in (Exit.NOT_FOUND, Exit.REFUSED, Exit.FAILURE)
    postgres_server.drop(url)


@pytest.mark.parametrize("way", ["restic", "tar"])
def test_a_lost_volume_comes_back_on_an_empty_disk(server: RunningServer, repository: Path, tool: Tool, tmp_path: Path, way: str) -> None:
    kept, deleted, revoked, replaced = store(server, "ada", 4, size_bytes=30_000)
    archive = tmp_path / "coffer.tar.gz"
    from_archive = ["--tar", str(archive)] if way == "tar" else []
    assert tool("backup", *from_archive).code == Exit.OK
    newer = store(server, "ada", 1, seed=100)[0]
    volume_id = str(execute(server.database_url, "select id from volumes")[0]["id"])
    with server.client("ada") as client:
        old_link = client.post(f"/api/files/{revoked}/link").json()["url"]
        assert client.delete(f"/api/files/{deleted}").status_code == 204
        assert client.post(f"/api/files/{revoked}/revoke-links").status_code == 200
        assert client.put(f"/api/files/{replaced}/content", content=image(2_000, 7)).status_code == 200
        lost, empty = server.volume, tmp_path / "empty"
        lost.rename(tmp_path / "lost")
        empty.mkdir()
        until(lambda: client.get("/health/ready").status_code == 503)  # the server has let go of it, too
        away = tool("restore", "volume", volume_id)
        assert (away.code, f"coffer volume init DIRECTORY --replace {volume_id}" in away.stderr) == (Exit.UNAVAILABLE, True)
        assert tool("volume", "init", str(empty), "--replace", volume_id).code == Exit.OK
        until(lambda: client.get("/health/ready").status_code == 200)
        later = store(server, "ada", 1, seed=200)[0]  # the empty disk is written to meanwhile
        told = tool("restore", "volume", volume_id, *from_archive)
        assert (told.code, told.summary["restored_files"], told.summary["restored_bytes"]) == (Exit.FOUND, 2, 60_000), told.stderr
        assert {each["file_id"] for each in told.findings} == {newer, replaced}
        marked = execute(server.database_url, "select id::text from user_files where damaged_at is not null")
        assert {row["id"] for row in marked} == {newer, replaced}
        for file_id, seed in ((kept, 0), (revoked, 2)):
            assert download(server, "ada", file_id).content == image(30_000, seed)
        assert download(server, "ada", later).status_code == 200
        assert client.get(old_link).status_code == 404
        for file_id in (newer, replaced):
            assert (download(server, "ada", file_id).status_code, download(server, "ada", file_id).json()["code"]) == (410, "damaged")
        assert not list(empty.rglob(f"*{deleted}*"))
        again = tool("restore", "volume", volume_id, *from_archive)
        assert (again.code, again.summary["restored_files"], again.summary["missing_files"]) == (Exit.FOUND, 0, 2)
        if way == "tar":
            archive.write_bytes(archive.read_bytes()[:-1_000])
            broken = tool("restore", "volume", volume_id, *from_archive)
            assert (broken.code, "gzip: " in broken.stderr) == (Exit.FAILURE, True)
        for file_id in (newer, replaced):
            assert client.delete(f"/api/files/{file_id}").status_code == 204
    assert drifted(server.database_url) == []
    assert [each for each in tool("audit").findings if each["state"] == "look"] == []
