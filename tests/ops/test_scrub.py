"""The scrub finds every rotten file, names it, and nobody is given its bytes (FAULTS 13)."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from server.commands.failures import Exit
from server.vault import inventory
from tests.ops.conftest import Tool, path_of, store
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.waiting import until

FAST = ("scrub", "--rate", "unlimited")


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def download(server: RunningServer, user_id: str, file_id: str) -> httpx.Response:
    with server.client(user_id) as client:
        return client.get(f"/api/files/{file_id}/download")


def events(server: RunningServer, file_id: str) -> list[str]:
    return [row["type"] for row in execute(server.database_url, "select type from events where file_id = $1 order by id", file_id)]


def test_a_hundred_rotten_files_are_found_and_named(server: RunningServer, tool: Tool) -> None:
    ids = store(server, "ada", 130, size_bytes=3_000)
    flipped, cut, removed, swapped, sound = ids[:40], ids[40:60], ids[60:80], ids[80:100], ids[100:]
    paths = {file_id: path_of(server, file_id) for file_id in ids}
    for file_id in flipped:
        flip(paths[file_id])
    for file_id in cut:
        os.truncate(paths[file_id], 2_000)
    for file_id in removed:
        paths[file_id].unlink()
    for one, other in zip(swapped[::2], swapped[1::2], strict=True):
        aside = paths[one].with_name("aside")
        paths[one].rename(aside)
        paths[other].rename(paths[one])
        aside.rename(paths[other])
    told = tool(*FAST)
    assert told.code == Exit.FOUND
    assert sorted(each["file_id"] for each in told.findings) == sorted(ids[:100])
    assert set(told.states) == {("damaged", "look")}
    assert (told.summary["files"], told.summary["damaged_files"]) == (130, 100)
    with server.client("ada") as client:
        for file_id in ids[:100]:
            answer = client.get(f"/api/files/{file_id}/download")
            assert (answer.status_code, answer.json()["code"]) == (410, "damaged")
        for number, file_id in enumerate(sound):
            assert client.get(f"/api/files/{file_id}/download").content == image(3_000, 100 + number)
    # Nothing is lost that was there, and nothing is served by whoever knows the name.
    assert len(server.stored_paths()) == 110
    assert not any(paths[file_id].exists() for file_id in ids[:100])
    assert events(server, flipped[0])[-1] == "file.damaged"
    assert tool(*FAST, "--damaged").states == [("damaged", "look")] * 100
    # The audit knows of them, and takes none for garbage or for a new loss.
    assert tool("audit", "--repair", "--older-than", "0").states == [("damaged", "look")] * 100


def test_what_was_put_back_is_served_again(server: RunningServer, tool: Tool) -> None:
    rotten, misjudged = store(server, "ada", 2)
    for file_id in (rotten, misjudged):
        flip(path_of(server, file_id))
    assert tool(*FAST).states == [("damaged", "look")] * 2
    # One comes from the backup; the other's bytes were right all the time, where they were set aside.
    path_of(server, rotten).with_name(f"{rotten}.1.png").write_bytes(image(2_000, 0))
    path_of(server, misjudged).write_bytes(image(2_000, 1))
    told = tool("scrub", "--file", rotten, "--file", misjudged)
    assert (told.code, told.states) == (Exit.OK, [("damaged", "repaired")] * 2)
    for number, file_id in enumerate((rotten, misjudged)):
        assert download(server, "ada", file_id).content == image(2_000, number)
        assert events(server, file_id)[-2:] == ["file.damaged", "file.recovered"]
    assert tool(*FAST).findings == []


def test_a_damaged_file_can_be_replaced_and_deleted(server: RunningServer, tool: Tool) -> None:
    replaced, deleted = store(server, "ada", 2)
    flip(path_of(server, replaced))
    flip(path_of(server, deleted))
    tool(*FAST)
    with server.client("ada") as client:
        assert client.put(f"/api/files/{replaced}/content", content=image(500, 9)).status_code == 200
        assert client.get(f"/api/files/{replaced}/download").content == image(500, 9)
        assert client.delete(f"/api/files/{deleted}").status_code == 204
    until(lambda: len(server.stored_paths()) == 1)  # nothing of them stays, set aside or not
    assert tool(*FAST).findings == []


def test_links_to_a_damaged_file_answer_that(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1)
    with server.client("ada") as client:
        link = client.post(f"/api/files/{file_id}/link", json={}).json()["url"]
        assert client.get(link).status_code == 200
        flip(path_of(server, file_id))
        tool(*FAST)
        answer = client.get(link)
    assert (answer.status_code, answer.json()["code"]) == (410, "damaged")


def test_a_marked_file_is_not_read_whatever_lies_in_its_place(server: RunningServer) -> None:
    (file_id,) = store(server, "ada", 1)
    execute(server.database_url, "update user_files set damaged_at = now()")
    assert download(server, "ada", file_id).status_code == 410
    with server.client("ada") as client:
        assert client.head(f"/api/files/{file_id}/download").status_code == 410
        assert client.get(f"/api/files/{file_id}").status_code == 200


def test_one_wrong_look_alone_damages_nothing(server: RunningServer, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    (file_id,) = store(server, "ada", 1)
    real, looks = inventory.begin_digest, []

    def at_first_wrong(volume: object, path: str) -> inventory.Digest:
        digest = real(volume, path)  # type: ignore[arg-type]
        looks.append(path)
        if len(looks) == 1:
            digest._sha256 = hashlib.sha256(b"a bit that fell in memory")
        return digest

    monkeypatch.setattr(inventory, "begin_digest", at_first_wrong)
    told = tool(*FAST)
    assert (told.states, len(looks)) == ([("unsteady", "look")], 2)
    assert download(server, "ada", file_id).status_code == 200


def test_an_unmounted_volume_damages_nothing(server: RunningServer, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    store(server, "ada", 5)
    real = inventory.begin_digest

    def unmounting(volume: object, path: str) -> inventory.Digest:
        (server.volume / ".coffer-volume").unlink(missing_ok=True)
        (server.volume / "users").rename(server.volume / "elsewhere")
        return real(volume, path)  # type: ignore[arg-type]

    monkeypatch.setattr(inventory, "begin_digest", unmounting)
    told = tool(*FAST)
    assert (told.code, told.states) == (Exit.FOUND, [("volume", "look")])
    assert tool(*FAST).states == [("volume", "look")]
    assert execute(server.database_url, "select id from user_files where damaged_at is not null") == []


def test_a_round_goes_on_where_it_was_stopped(server: RunningServer, tool: Tool, tmp_path: Path) -> None:
    ids = store(server, "ada", 12, size_bytes=20_000)
    for file_id in (ids[1], ids[10]):
        flip(path_of(server, file_id))
    # At this rate a file takes half a second, so that the first rotten one is found long before the second is reached.
    command = [sys.executable, "-m", "ops.cli", "scrub", "--json", "--rate", "72KiB", "--metrics-file", str(tmp_path / "scrub.prom")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["file_id"] == ids[1]
        process.send_signal(signal.SIGTERM)
        summary = json.loads(process.stdout.readlines()[-1])["summary"]
        assert process.wait() == Exit.FOUND
    assert summary["is_complete"] is False
    assert 2 <= summary["files"] < 10
    assert "coffer_scrub_is_complete 0.0" in (tmp_path / "scrub.prom").read_text()
    told = tool(*FAST)
    assert [each["file_id"] for each in told.findings] == [ids[10]]
    assert told.summary["files"] == 12 - summary["files"]
    assert tool(*FAST).summary["files"] == 12  # the next round


def test_files_are_left_out_of_the_page_cache(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1, size_bytes=3 * 2**20)
    path = path_of(server, file_id)
    path.read_bytes()
    os.sync()
    assert resident_pages(path) > 0
    tool(*FAST)
    assert resident_pages(path) == 0


def resident_pages(path: Path) -> int:
    """As util-linux counts them, with mincore(2)."""
    return int(subprocess.run(["fincore", "--noheadings", "--output", "PAGES", str(path)], check=True, capture_output=True).stdout)


def test_unknown_files_are_told(database: str, tool: Tool) -> None:
    told = tool("scrub", "--file", "00000000-0000-7000-8000-000000000000")
    assert (told.code, "there is no file" in told.stderr) == (Exit.NOT_FOUND, True)
