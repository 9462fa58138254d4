"""Backups are whole, whatever happens beside them (P5, FAULTS 18)."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from ops import sets
from ops.hooks import run_hook
from ops.restic import Snapshot
from server.commands.failures import CommandFailed, Exit
from server.vault.layout import WITHHELD
from tests.conftest import PostgresServer
from tests.ops.cheap_repository import PASSWORD
from tests.ops.conftest import Tool, path_of, store
from tests.ops.slow_restic import SlowRestic
from tests.processes import has_ended
from tests.recovery.journal import Load
from tests.serving import RunningServer, execute
from tests.waiting import until

COFFER = [sys.executable, "-m", "ops.cli"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    yield mount
    subprocess.run(["umount", "-l", mount], check=False)


def states(database_url: str) -> list[str]:
    return [row["state"] for row in execute(database_url, "select state from backups order by started_at")]


def hold(database_url: str, seconds: int) -> None:
    """As a backup does that ran until now, so many seconds before its hold ends."""
    statement = "insert into backups (id, way, state, holds_until) values ($1, 'restic', 'running', now() + make_interval(secs => $2))"
    execute(database_url, statement, uuid4(), seconds)


def held(server: RunningServer) -> list[str]:
    return sorted(path.name for path in (server.volume / WITHHELD).glob("*"))


def test_a_backup_is_recorded_and_the_next_one_adds_little(server: RunningServer, no_repository: Path, tool: Tool) -> None:
    store(server, "ada", 5, size_bytes=200_000)
    first = tool("backup", "--init")
    assert (first.code, first.findings) == (Exit.OK, []), first.stderr
    assert (first.summary["files"], first.summary["bytes"]) == (5, 1_000_000)
    second = tool("backup")
    assert second.code == Exit.OK, second.stderr
    assert second.summary["added_bytes"] < first.summary["added_bytes"] / 5
    assert states(server.database_url) == ["done", "done"]
    assert (first.summary["backups"], second.summary["backups"]) == (1, 1)  # of a day the last is kept
    assert len(tool("restore", "list").findings) == 1


def test_it_is_one_moment_while_clients_upload_and_delete(
    server: RunningServer,
    repository: Path,
    tool: Tool,
    slow_restic: SlowRestic,
    postgres_server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The oracle is the clients' journal: what was acknowledged before and not deleted until after is there, with its bytes."""
    before: dict[str, str] = {}

    def change_much_between_rows_and_files(load: Load) -> None:
        slow_restic.wait_until_stopped()
        wanted = len(load.journal.delete_answered) + 25
        load.wait_for(lambda: len(load.journal.delete_answered) >= wanted)
        slow_restic.go()

    slow_restic.stop_at(r" users$")
    with Load(server, clients=8, deleting=True, sizes=(1_000, 30_000)) as load:
        load.wait_for(lambda: load.count > 40)
        changing = threading.Thread(target=change_much_between_rows_and_files, args=(load,))
        changing.start()
        with load.journal.lock:
            for acknowledged in load.journal.stored.values():
                before |= {file_id: digest for file_id, digest in acknowledged.items() if file_id not in load.journal.delete_asked}
        told = tool("backup")
        with load.journal.lock:
            deleted_meanwhile = set(load.journal.delete_asked)
        changing.join()
    assert (told.code, told.findings) == (Exit.OK, []), told.stderr
    load.journal.check(server)
    server.settle()
    assert held(server) == []
    server.stop()
    url = postgres_server.clone(empty=True)
    monkeypatch.setenv("DATABASE_URL", url)
    restored = tool("restore", "all", "--to", str(tmp_path / "restored"))
    assert (restored.code, restored.findings) == (Exit.OK, []), restored.stderr
    (volume,) = (tmp_path / "restored").iterdir()
    rows = {str(row["id"]): row for row in execute(url, "select id, file_path, sha256 from user_files")}
    assert len(rows) == told.summary["files"]
    assert before.keys() - deleted_meanwhile <= rows.keys()
    for row in rows.values():
        assert hashlib.sha256((volume / row["file_path"]).read_bytes()).digest() == row["sha256"]
    assert all(rows[file_id]["sha256"].hex() == digest for file_id, digest in before.items() if file_id in rows)
    assert not (volume / WITHHELD).exists()
    postgres_server.drop(url)


def test_bytes_that_a_backup_wants_leave_their_place_and_go_afterwards(server: RunningServer) -> None:
    deleted, replaced, revoked = store(server, "ada", 3)
    erased = store(server, "bob", 2, seed=10)
    paths = [path_of(server, file_id) for file_id in (deleted, replaced, revoked, *erased)]
    hold(server.database_url, 3_600)
    with server.client("ada") as client:
        link = client.post(f"/api/files/{deleted}/link", json={}).json()["url"]
        assert client.delete(f"/api/files/{deleted}").status_code == 204
        assert client.put(f"/api/files/{replaced}/content", content=b"GIF89a" + bytes(100)).status_code == 200
        assert client.post(f"/api/files/{revoked}/revoke-links").status_code in (200, 204)
        assert client.get(link).status_code == 404
    with server.client() as admin:
        assert admin.delete("/api/users/bob").status_code == 204
    until(lambda: held(server) == sorted(path.name for path in paths))
    assert not any(path.exists() for path in paths)  # and so no edge serves them
    assert len(server.stored_paths()) == 2
    execute(server.database_url, "update backups set state = 'done', holds_until = null")
    server.settle()
    assert held(server) == []
    assert len(server.stored_paths()) == 2


def test_a_dead_backup_holds_nothing_for_ever(server: RunningServer) -> None:
    (file_id,) = store(server, "ada", 1)
    hold(server.database_url, 8)
    with server.client("ada") as client:
        client.delete(f"/api/files/{file_id}")
    assert len(held(server)) == 1
    server.settle()  # nobody has renewed it
    assert held(server) == []


@pytest.mark.parametrize("stage", ["coffer.dump", " users$", "manifest.json", "forget"])
def test_killed_anywhere_it_holds_nothing_up(
    server: RunningServer, repository: Path, tool: Tool, slow_restic: SlowRestic, stage: str
) -> None:
    ids = store(server, "ada", 6)
    assert tool("backup").code == Exit.OK
    slow_restic.stop_at(stage)
    with subprocess.Popen([*COFFER, "backup"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        restic = slow_restic.wait_until_stopped()
        with server.client("ada") as client:
            assert client.delete(f"/api/files/{ids.pop()}").status_code == 204
        process.kill()
    until(lambda: has_ended(restic))
    slow_restic.go()
    with server.client("ada") as client:
        assert client.delete(f"/api/files/{ids.pop()}").status_code == 204
    told = tool("backup")
    assert (told.code, told.findings, told.summary["files"]) == (Exit.OK, [], 4), told.stderr
    assert states(server.database_url) == ["done", "done" if stage == "forget" else "failed", "done"]
    server.settle()
    assert held(server) == []
    assert (tool("drill").code, tool("audit").findings) == (Exit.OK, [])


def test_told_to_stop_it_says_so_at_once(server: RunningServer, repository: Path, tool: Tool, slow_restic: SlowRestic) -> None:
    store(server, "ada", 1)
    slow_restic.stop_at(" users$")
    with subprocess.Popen([*COFFER, "backup"], stderr=subprocess.PIPE, text=True) as process:
        slow_restic.wait_until_stopped()
        process.terminate()
        assert process.wait() == Exit.INTERRUPTED
        assert process.stderr is not None
        assert "told to stop" in process.stderr.read()
    rows = execute(server.database_url, "select state, error, holds_until from backups")
    assert [tuple(row) for row in rows] == [("failed", "it was told to stop", None)]


def test_of_two_backups_one_does_the_work(server: RunningServer, repository: Path, tool: Tool, slow_restic: SlowRestic) -> None:
    store(server, "ada", 2)
    slow_restic.stop_at(" users$")
    with subprocess.Popen([*COFFER, "backup"]) as first:
        slow_restic.wait_until_stopped()
        second = tool("backup")
        assert (second.code, "at work already" in second.stderr) == (Exit.BUSY, True)
        slow_restic.go()
        assert first.wait() == Exit.OK
    assert states(server.database_url) == ["done"]


def test_a_backup_whose_hold_was_lost_is_none(server: RunningServer, repository: Path, tool: Tool, slow_restic: SlowRestic) -> None:
    store(server, "ada", 2)
    slow_restic.stop_at(" users$")

    def lose() -> None:
        slow_restic.wait_until_stopped()
        execute(server.database_url, "update backups set holds_until = now()")
        slow_restic.go()

    losing = threading.Thread(target=lose)
    losing.start()
    told = tool("backup")
    losing.join()
    assert (told.code, "lost its hold" in told.stderr) == (Exit.FAILURE, True)
    assert states(server.database_url) == ["failed"]
    assert tool("restore", "list").findings == []


def test_failures_are_loud(
    server: RunningServer, no_repository: Path, tool: Tool, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(server, "ada", 2, size_bytes=5_000_000)
    said, metrics = tmp_path / "said", tmp_path / "metrics"
    monkeypatch.setenv("COFFER_BACKUP_FAILED", f'echo "$COFFER_FAILURE" >>{said}')

    def failed(*arguments: str, code: Exit = Exit.FAILURE) -> str:
        said.unlink(missing_ok=True)
        assert tool("backup", *arguments, "--metrics-file", str(metrics)).code == code
        assert f"coffer_backup_exit_code {float(code)}" in metrics.read_text()
        return said.read_text()

    assert "coffer backup: restic: Fatal: unable to open config" in failed()  # and none is made unasked
    assert not no_repository.exists()
    assert tool("backup", "--init").code == Exit.OK
    with monkeypatch.context() as context:
        context.setenv("COFFER_BACKUP_PASSWORD", "another")
        assert "wrong password" in failed()
    with monkeypatch.context() as context:
        context.setenv("COFFER_BACKUP_REPOSITORY", str(small_disk / "repository"))
        assert "no space left" in failed("--init")
    with monkeypatch.context() as context:
        context.setenv("COFFER_BACKUP_BEFORE", "exit 3")
        assert "COFFER_BACKUP_BEFORE failed with 3" in failed()
    with monkeypatch.context() as context:
        context.delenv("COFFER_BACKUP_PASSWORD")
        assert "COFFER_BACKUP_PASSWORD is not set" in failed(code=Exit.USAGE)
    (server.volume / ".coffer-volume").rename(server.volume / "sentinel")
    assert "is unavailable" in failed(code=Exit.UNAVAILABLE)
    assert states(server.database_url) == ["done", "failed"]
    assert execute(server.database_url, "select from backups where holds_until is not null") == []
    said.unlink()
    (server.volume / "sentinel").rename(server.volume / ".coffer-volume")
    monkeypatch.setenv("COFFER_BACKUP_AFTER", f"echo done >{said}")
    assert tool("backup").code == Exit.OK
    assert said.read_text() == "done\n"


def test_what_comes_before_may_bring_the_repository(
    server: RunningServer, repository: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(server, "ada", 1)
    elsewhere = repository.rename(repository.with_name("elsewhere"))
    monkeypatch.setenv("COFFER_BACKUP_BEFORE", f"mv {elsewhere} {repository}")
    monkeypatch.setenv("COFFER_BACKUP_AFTER", f"mv {repository} {elsewhere}")
    told = tool("backup")
    assert (told.code, repository.exists(), elsewhere.exists()) == (Exit.OK, False, True), told.stderr


def test_a_hook_that_hangs_is_ended_with_all_that_it_began(database: str, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(CommandFailed, match="the hook had not ended after 1 s"):
        asyncio.run(run_hook(f"sh -c 'echo $$ >{pid}; exec sleep 1000' & wait", "the hook", limit_seconds=1))
    until(lambda: has_ended(int(pid.read_text())))


@pytest.mark.parametrize("hook", ["COFFER_BACKUP_BEFORE", "COFFER_BACKUP_AFTER"])
def test_told_to_stop_it_does_not_wait_for_hooks(
    server: RunningServer, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setenv(hook, f"echo $$ >{pid}.draft; mv {pid}.draft {pid}; exec sleep 1000")
    with subprocess.Popen([*COFFER, "backup"], stderr=subprocess.PIPE, text=True) as process:
        until(pid.exists)
        process.terminate()
        assert process.wait() == Exit.INTERRUPTED
        assert process.stderr is not None
        assert "told to stop" in process.stderr.read()
    until(lambda: has_ended(int(pid.read_text())))
    assert states(server.database_url) == ([] if hook == "COFFER_BACKUP_BEFORE" else ["done"])


# Somebody else at the repository


@contextmanager
def restic_at_work(repository: Path, *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Another run of restic, which has its lock by now."""
    before = set((repository / "locks").iterdir())
    environment = os.environ | {"RESTIC_REPOSITORY": str(repository), "RESTIC_PASSWORD": PASSWORD}
    with subprocess.Popen(["restic", *command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: set((repository / "locks").iterdir()) - before)
            yield process
        finally:
            process.kill()


def endless_check(repository: Path) -> AbstractContextManager["subprocess.Popen[bytes]"]:
    """What no other run may be beside; it reads a kibibyte a second."""
    return restic_at_work(repository, "check", "--read-data", "--limit-download", "1", "--no-cache")


def test_locks_of_the_dead_are_removed(server: RunningServer, repository: Path, tool: Tool) -> None:
    store(server, "ada", 1, size_bytes=3_000_000)
    assert tool("backup").code == Exit.OK
    with endless_check(repository):
        pass
    assert list((repository / "locks").iterdir())
    told = tool("backup")
    assert (told.code, told.findings, told.summary["backups"]) == (Exit.OK, [], 1), told.stderr
    with endless_check(repository):
        pass
    assert tool("drill").code == Exit.OK
    with restic_at_work(repository, "backup", "--stdin"):
        pass
    told = tool("backup")
    assert (told.code, told.findings, told.summary["backups"]) == (Exit.OK, [], 1), told.stderr


def test_the_living_are_waited_for(server: RunningServer, repository: Path, tool: Tool) -> None:
    store(server, "ada", 1, size_bytes=3_000_000)
    assert tool("backup").code == Exit.OK
    with endless_check(repository) as checking, subprocess.Popen([*COFFER, "drill"], stderr=subprocess.PIPE, text=True) as drilling:
        assert drilling.stderr is not None
        assert "waiting for the repository" in drilling.stderr.readline()
        checking.kill()
        checking.wait()  # a zombie lives, for restic
        assert drilling.wait() == Exit.OK, drilling.stderr.read()


def test_while_somebody_reads_old_backups_stay(server: RunningServer, repository: Path, tool: Tool) -> None:
    store(server, "ada", 1)
    assert tool("backup").code == Exit.OK
    with restic_at_work(repository, "backup", "--stdin"):
        told = tool("backup")
    assert (told.code, told.states) == (Exit.OK, [("old_backups", "waiting")]), told.stderr
    told = tool("backup")
    assert (told.code, told.findings, told.summary["backups"]) == (Exit.OK, [], 1), told.stderr


def test_where_nothing_may_be_removed_nothing_is(
    server: RunningServer, repository: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(server, "ada", 1)
    archives = tmp_path / "archives"
    archives.mkdir()
    old = archives / "coffer-20200101T030000.000000Z.tar.gz"
    old.touch()
    monkeypatch.setenv("COFFER_BACKUP_KEEP_DAILY", "1")
    monkeypatch.setenv("COFFER_BACKUP_FORGET", "false")
    for count in (1, 2):
        told = tool("backup")
        assert (told.code, told.findings, told.summary["backups"]) == (Exit.OK, [], count), told.stderr
    told = tool("backup", "--tar", str(archives))
    assert (told.summary["backups"], old.exists()) == (2, True)
    monkeypatch.setenv("COFFER_BACKUP_FORGET", "true")
    assert tool("backup").summary["backups"] == 1


def test_files_that_cannot_be_saved_are_told(server: RunningServer, repository: Path, tool: Tool) -> None:
    lost, _ = store(server, "ada", 2)
    path_of(server, lost).unlink()
    told = tool("backup")
    assert (told.code, told.states) == (Exit.FOUND, [("file_missing", "look")])
    drilled = tool("drill")
    assert (drilled.code, drilled.findings[0]["file_id"]) == (Exit.FOUND, lost)
    assert "is not in the backup" in drilled.findings[0]["text"]  # by its listing: a sample would miss it in a large store


def test_of_an_emptied_volume_there_is_no_backup(server: RunningServer, repository: Path, tool: Tool) -> None:
    store(server, "ada", 101)
    (server.volume / "users").rename(server.volume / "elsewhere")
    (server.volume / "users").mkdir()
    told = tool("backup")
    assert (told.code, "this is no backup" in told.stderr) == (Exit.FAILURE, True)
    assert tool("restore", "list").findings == []


def test_previews_are_left_out_unless_they_are_asked_for(
    server: RunningServer, repository: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file_id,) = store(server, "ada", 1)
    previews = server.volume / "users" / "ada" / "previews" / file_id
    previews.mkdir(parents=True)
    (previews / "320.webp").write_bytes(b"preview")
    assert tool("backup").code == Exit.OK
    assert saved_names(repository) == {path_of(server, file_id).name}
    monkeypatch.setenv("COFFER_BACKUP_PREVIEWS", "true")
    assert tool("backup").code == Exit.OK
    assert saved_names(repository) == {path_of(server, file_id).name, "320.webp"}


def saved_names(repository: Path) -> set[str]:
    """What the newest backup has below users/."""
    environment = os.environ | {"RESTIC_REPOSITORY": str(repository), "RESTIC_PASSWORD": os.environ["COFFER_BACKUP_PASSWORD"]}
    snapshots = subprocess.run(["restic", "snapshots", "--json"], env=environment, check=True, capture_output=True, text=True).stdout
    (files,) = [each["id"] for each in json.loads(snapshots) if each["paths"][0].endswith("/users")]
    listed = subprocess.run(["restic", "ls", "--json", files], env=environment, check=True, capture_output=True, text=True).stdout
    return {node["name"] for node in map(json.loads, listed.splitlines()) if node.get("type") == "file"}


# What is kept


def times(*days: str) -> list[datetime]:
    return [datetime.fromisoformat(day).replace(tzinfo=UTC) for day in days]


def test_the_last_of_each_day_week_and_month_is_kept() -> None:
    newest = datetime(2026, 3, 31, 3, tzinfo=UTC)
    nightly = [newest - timedelta(days=number, hours=hour) for number in range(100) for hour in (0, 2)]
    assert sorted(sets.kept(nightly, daily=7, weekly=0, monthly=0)) == [newest - timedelta(days=number) for number in range(6, -1, -1)]
    weekly = sets.kept(nightly, daily=1, weekly=3, monthly=0)
    assert sorted(weekly) == times("2026-03-22 03:00", "2026-03-29 03:00", "2026-03-31 03:00")
    monthly = sets.kept(nightly, daily=1, weekly=0, monthly=3)
    assert sorted(monthly) == times("2026-01-31 03:00", "2026-02-28 03:00", "2026-03-31 03:00")
    assert sets.kept([], daily=7, weekly=4, monthly=12) == set()


def test_of_interrupted_backups_the_young_stay() -> None:
    now = datetime(2026, 3, 31, 3, tzinfo=UTC)

    def snapshots(set_at: datetime, *parts: str) -> list[Snapshot]:
        set_id = uuid4()
        return [Snapshot(str(uuid4()), set_at, sets.tags(set_id, part, set_at if part == "manifest" else None)) for part in parts]

    old_half = snapshots(now - timedelta(days=2), "dump")
    young_half = snapshots(now - timedelta(hours=2), "dump")
    yesterday = snapshots(now - timedelta(days=1), "dump", "manifest")
    today = snapshots(now, "dump", "manifest")
    others = [Snapshot("other", now, ["something"])]
    found = sets.sets_of([*old_half, *young_half, *yesterday, *today, *others])
    assert len(sets.whole(found)) == 2
    assert [each.at for each in sets.whole(found, until=now - timedelta(minutes=1))] == [now - timedelta(days=1)]
    gone = set(sets.to_forget(found, now, daily=1, weekly=0, monthly=0))
    assert gone == {each.id for each in (*old_half, *yesterday)}
