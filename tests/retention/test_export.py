"""Exports: everything that a user has stored, readable by anybody's tar, while it changes, in flat memory."""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote
from uuid import UUID

import httpx
import pytest

from server import ledger
from server.auth import Scope
from server.commands.failures import Exit
from server.delivery.export import Export
from server.ledger import Database
from server.ledger.export import Record, page_of_user_records
from server.settings import Settings
from server.vault import Vault
from tests.ops.conftest import path_of
from tests.retention.conftest import Coffer, store
from tests.samples import image, video
from tests.serving import RunningServer, execute

NAMES = [
    "photo.jpg",
    "photo.jpg",
    "../../etc/passwd",
    "/absolute",
    "日本語 🐬.png",
    "a" * 400 + ".png",
    "<script>alert(1)</script>.png",
    'quote" & co.png',
    "CON",
    "...",
    "no extension",
    "e\u0301.PNG",
    "\u202egnp.exe",
]


def about(archive: tarfile.TarFile) -> dict[str, Any]:
    file = archive.extractfile("coffer-export/metadata.json")
    assert file is not None
    found: dict[str, Any] = json.load(file)
    return found


def test_everything_is_in_it(trashing: RunningServer, user: str, tmp_path: Path) -> None:
    bytes_of: dict[str, bytes] = {}
    with trashing.client(user) as client:
        for seed, name in enumerate(NAMES):
            content = image(1_000 + seed, seed)
            fields = {"name": name, "tags": "sun,<b>", "metadata": '{"a": 1}'}
            answer = client.post("/api/files/upload", content=content, params=fields)
            bytes_of[answer.json()["id"]] = content
        film = client.post("/api/files/upload", content=video(300_000), params={"name": "film.mp4"}).json()["id"]
        bytes_of[film] = video(300_000)
        deleted = store(trashing, user, seed=99)
        bytes_of[deleted] = image(2_000, 99)
        client.delete(f"/api/files/{deleted}").raise_for_status()
        answer = client.get(f"/api/users/{user}/export")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-tar")
    assert answer.headers["content-disposition"] == 'attachment; filename="coffer-export.tar"'
    archive = tarfile.open(fileobj=io.BytesIO(answer.content))  # noqa: SIM115 - in memory
    facts = about(archive)
    assert facts["user"]["user_id"] == user and facts["counts"] == {"whole": len(bytes_of), "damaged": 0, "missing": 0, "deleted": 0}
    assert {file["id"] for file in facts["files"]} == set(bytes_of)
    names = archive.getnames()
    assert len(set(names)) == len(names) == len(bytes_of) + 2
    for file in facts["files"]:
        member = archive.extractfile(f"coffer-export/{file['path']}")
        assert member is not None and member.read() == bytes_of[file["id"]]
        assert (file["file_size"], file["deleted_at"] is not None) == (len(bytes_of[file["id"]]), file["id"] == deleted)
        assert file["path"].startswith("trash/" if file["id"] == deleted else "files/")
        assert not {"file_path", "volume_id"} & file.keys()
    assert [file["file_name"] for file in facts["files"]][: len(NAMES)] == NAMES
    assert (facts["files"][0]["tags"], facts["files"][0]["metadata"]) == (["sun", "<b>"], {"a": 1})
    page = archive.extractfile("coffer-export/index.html")
    assert page is not None
    text = page.read().decode()
    assert "<script" not in text and "<b>" not in text
    linked = {unquote(each) for each in re.findall(r'href="([^"]+)"', text)}
    assert {f"coffer-export/{each}" for each in linked} == set(names) - {"coffer-export/index.html"}
    # Another program's tar has the same opinion, and nothing lands elsewhere.
    (tmp_path / "export.tar").write_bytes(answer.content)
    subprocess.run(["tar", "-xf", "export.tar"], cwd=tmp_path, check=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {*names, "export.tar"}
    assert {len(path.name.encode()) <= 255 for path in tmp_path.rglob("*")} == {True}
    with trashing.client() as admin:
        (record,) = admin.get("/api/audit", params={"user": user, "action": "user.exported"}).json()["records"]
    assert record["detail"]["file_count"] == len(bytes_of)


def test_what_else_is_known_of_them(trashing: RunningServer, user: str) -> None:
    secret = "whsec_" + base64.b64encode(bytes(24)).decode()
    with trashing.client(user) as client:
        store(trashing, user)
        wish = {"model": "a-model", "entity_type": "character", "entity_id": "mira", "outputs": [{"max_bytes": 10_000}]}
        callback = {"callback": {"url": "https://app.example.com/told", "secret": secret}}
        tickets = [
            client.post(
                "/api/generate", json={**wish, **callback, "entity_type": "character", "entity_id": "mira", "prompt": f"Mira {number}"}
            ).json()
            for number in range(3)
        ]
        client.put(tickets[0]["uploads"][0]["url"], content=image(500)).raise_for_status()
        for number in range(3):
            client.post("/api/assets/link", json={"url": f"https://example.com/{number}.jpg"}).raise_for_status()
        answer = client.get(f"/api/users/{user}/export")
    with trashing.client(f"{user}-2") as other:
        store(trashing, f"{user}-2")
        theirs = other.get(f"/api/users/{user}-2/export")
    facts = about(tarfile.open(fileobj=io.BytesIO(answer.content)))  # noqa: SIM115 - in memory
    assert [job["prompt_used"] for job in facts["generation_jobs"]] == ["Mira 0", "Mira 1", "Mira 2"]
    assert [media["prompt_used"] for media in facts["generated_media"]] == ["Mira 0"]
    assert [asset["url"] for asset in facts["linked_assets"]] == [f"https://example.com/{number}.jpg" for number in range(3)]
    assert secret not in json.dumps(facts)
    facts = about(tarfile.open(fileobj=io.BytesIO(theirs.content)))  # noqa: SIM115 - in memory
    assert (facts["generation_jobs"], facts["generated_media"], facts["linked_assets"]) == ([], [], [])


@pytest.mark.anyio
async def test_records_come_page_by_page(trashing: RunningServer, user: str) -> None:
    with trashing.client(user) as client:
        store(trashing, user)
        for number in range(5):
            client.post("/api/assets/link", json={"url": f"https://example.com/{number}.jpg"}).raise_for_status()
            wish = {"prompt": str(number), "outputs": [{"max_bytes": 10_000}]}
            client.post("/api/generate", json={**wish, "entity_type": "character", "entity_id": "mira"}).raise_for_status()
    db = Database(Settings(database_url=trashing.database_url))
    await db.open()
    try:
        now = datetime.now(UTC) + timedelta(minutes=1)
        for kind, field, values in (
            ("linked_assets", "url", [f"https://example.com/{number}.jpg" for number in range(5)]),
            ("generation_jobs", "prompt_used", [str(number) for number in range(5)]),
        ):
            read: list[Record] = []
            while page := await page_of_user_records(db, kind, user, read[-1] if read else None, now, 2):  # type: ignore[arg-type]
                read += page
            assert [json.loads(each.json)[field] for each in read] == values
    finally:
        await db.close()


def test_who_may(trashing: RunningServer, user: str) -> None:
    store(trashing, user)
    path = f"/api/users/{user}/export"
    reading = trashing.new_key(Scope.FILES_READ)
    with (
        trashing.client(user, api_key=reading) as own,
        trashing.client(f"not-{user}", api_key=reading) as other,
        trashing.client(user, api_key=trashing.new_key(Scope.FILES_WRITE)) as writing,
        trashing.client(api_key=trashing.new_key(Scope.ADMIN)) as admin,
    ):
        assert own.get(path).status_code == admin.get(path).status_code == 200
        for missing in (path, f"/api/users/nobody-{user}/export"):
            for client in (other, writing):
                answer = client.get(missing)
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert admin.get(f"/api/users/nobody-{user}/export").status_code == 404
        assert admin.get("/api/users/%00/export").status_code == 400
        assert httpx.get(trashing.url + path).status_code == 401
        refused = own.post(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, OPTIONS")
        key_id = reading.split("_")[1]
        execute(trashing.database_url, "update api_keys set kinds = array['video'] where key_id = $1", key_id)
    with trashing.client(user, api_key=trashing.new_key(Scope.FILES_READ)) as narrow:
        execute(trashing.database_url, "update api_keys set kinds = array['video'] where not 'admin' = any (scopes)")
        assert narrow.get(path).status_code == 403


def test_an_id_that_holds_anything(trashing: RunningServer) -> None:
    for user_id in ("a/export", "ü/é", "export", "~"):
        store(trashing, user_id)
        with trashing.client() as admin:
            answer = admin.get(f"/api/users/{quote(user_id, safe='')}/export")
        assert answer.status_code == 200
        assert about(tarfile.open(fileobj=io.BytesIO(answer.content)))["user"]["user_id"] == user_id  # noqa: SIM115


@pytest.mark.anyio
async def test_files_change_meanwhile(trashing: RunningServer, user: str) -> None:
    ids = [await asyncio.to_thread(store, trashing, user, seed=seed, size_bytes=600_000) for seed in range(8)]
    opened, gone, moved, replaced, damaged, lost, rotten, last = ids
    db, vault = Database(Settings(database_url=trashing.database_url)), Vault(0)
    await db.open()
    try:
        await vault.refresh(await ledger.list_volumes(db))
        export = Export(db, vault, await ledger.get_user(db, user))
        await export.begin()
        pieces = export.pieces()
        content = await anext(pieces) + await anext(pieces)  # the first file is open, and its rows have been read

        def change() -> None:
            path_of(trashing, lost).unlink()
            path_of(trashing, rotten).write_bytes(bytes(600_000))
            with trashing.client(user) as client:
                client.delete(f"/api/files/{opened}", params={"permanent": "true"}).raise_for_status()
                client.delete(f"/api/files/{gone}", params={"permanent": "true"}).raise_for_status()
                client.delete(f"/api/files/{moved}").raise_for_status()
                client.put(f"/api/files/{replaced}/content", content=image(700_000, 50)).raise_for_status()
            path = path_of(trashing, damaged)
            path.rename(path.with_name(f"{path.name}.damaged"))
            execute(trashing.database_url, "update user_files set damaged_at = now() where id = $1", UUID(damaged))
            store(trashing, user, seed=60)  # too late to be in it

        await asyncio.to_thread(change)
        async for piece in pieces:
            content += piece
    finally:
        vault.close()
        await db.close()
    archive = tarfile.open(fileobj=io.BytesIO(content))  # noqa: SIM115
    facts = about(archive)
    assert {file["id"]: file["status"] for file in facts["files"]} == {
        opened: "whole",
        gone: "deleted",
        moved: "whole",
        replaced: "whole",
        damaged: "damaged",
        lost: "missing",
        rotten: "damaged",
        last: "whole",
    }
    expected = {opened: image(600_000, 0), moved: image(600_000, 2), replaced: image(700_000, 50), last: image(600_000, 7)}
    for file in facts["files"]:
        if file["status"] == "whole":
            member = archive.extractfile(f"coffer-export/{file['path']}")
            assert member is not None and member.read() == expected[file["id"]]
    assert facts["counts"] == {"whole": 4, "damaged": 2, "missing": 1, "deleted": 1}


@pytest.mark.anyio
async def test_no_connection_is_held(trashing: RunningServer, user: str) -> None:
    await asyncio.to_thread(store, trashing, user, size_bytes=600_000)
    db, vault = Database(Settings(database_url=trashing.database_url, database_connections=2)), Vault(0)
    await db.open()
    try:
        await vault.refresh(await ledger.list_volumes(db))
        begun = [Export(db, vault, await ledger.get_user(db, user)) for _ in range(5)]
        for each in begun:
            await each.begin()
        exports = [each.pieces() for each in begun]
        for pieces in exports:
            await anext(pieces)
        await db.check()
        for pieces in exports:
            await pieces.aclose()
    finally:
        vault.close()
        await db.close()


def test_memory_stays_flat(trashing: RunningServer, user: str) -> None:
    """Of one file of 200 MB, and of 2,000 of which 24 MB are told at the end."""
    file_id = store(trashing, user)
    os.truncate(path_of(trashing, file_id), 200_000_000)
    execute(trashing.database_url, "update user_files set file_size = 200000000 where id = $1", UUID(file_id))
    with trashing.client(user, timeout=120) as client:
        client.get(f"/api/users/{user}/export").raise_for_status()
        path = path_of(trashing, file_id).relative_to(trashing.volume)
        rows = """
            insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, metadata)
            select made.id, f.user_id, 'a.png', 'image', 'image/png', 7, f.sha256, f.volume_id,
                   replace($2, $3, made.id::text), jsonb_build_object('a', repeat('x', 12000))
              from user_files f, (select gen_random_uuid() as id from generate_series(1, 2000)) made where f.id = $1
        """
        execute(trashing.database_url, rows, UUID(file_id), str(path), file_id)
        before = trashing.peak_memory_bytes()
        answer = client.get(f"/api/users/{user}/export")
        assert answer.status_code == 200 and len(answer.content) > 200_000_000
        assert trashing.peak_memory_bytes() - before < 8 * 2**20
        execute(trashing.database_url, "delete from user_files where user_id = $1 and file_size = 7", user)


def test_the_command(trashing: RunningServer, user: str, coffer: Coffer, tmp_path: Path) -> None:
    file_id = store(trashing, user)
    target = tmp_path / "export.tar"
    assert coffer("user", "export", user, "--output", str(target), DATABASE_URL=trashing.database_url).code == 0
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        assert [file["id"] for file in about(archive)["files"]] == [file_id]
    again = coffer("user", "export", user, "-o", str(target), DATABASE_URL=trashing.database_url)
    assert (again.code, "exists" in again.stderr) == (Exit.REFUSED, True)
    assert coffer("user", "export", f"no-{user}", "-o", "-", DATABASE_URL=trashing.database_url).code == Exit.NOT_FOUND
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["export.tar"]
    piped = subprocess.run(
        [sys.executable, "-m", "ops.cli", "user", "export", user, "-o", "-"],
        env=os.environ | {"DATABASE_URL": trashing.database_url},
        capture_output=True,
        check=True,
    )
    assert about(tarfile.open(fileobj=io.BytesIO(piped.stdout)))["counts"]["whole"] == 1  # noqa: SIM115


def test_the_clock_that_dates_the_files_decides(
    server: RunningServer, coffer: Coffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database may be another machine, and ahead of this one: what was uploaded a moment ago is in it all the same."""

    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) - timedelta(hours=1)

    file_id = store(server, "ada")
    monkeypatch.setattr("server.delivery.export.datetime", Behind)
    assert coffer("user", "export", "ada", "--output", str(tmp_path / "ada.tar")).code == 0
    with tarfile.open(tmp_path / "ada.tar") as archive:
        assert [file["id"] for file in about(archive)["files"]] == [file_id]
