"""The audit finds what is wrong, all of it and nothing else, and repairs no more than what is safe."""

import os
import shlex
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from server.commands.failures import Exit
from server.errors import DatabaseUnavailable
from server.ledger.tools import tool_lock
from server.settings import Settings
from tests.ops.conftest import Tool, drifted, path_of, store
from tests.recovery.journal import Load
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute

AT_ONCE = ("--older-than", "0")

DAY = timedelta(days=1)
INSERT_PREVIEW = """
insert into previews (file_id, variant, user_id, file_name, mime_type, size_bytes) values ($1, $2, 'ada', $2 || '.webp', 'image/webp', 7)
"""
INSERT_UPLOAD = """
insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at) values ($1, 'ada', $2, 10, now() + $3::interval)
"""
INSERT_RESUMABLE = """
insert into resumable_uploads (id, user_id, volume_id, incoming_name, upload_metadata, details, expires_at)
values ($1, 'ada', $2, $3, '', '{}', now() + interval '1 day')
"""


def beside(path: Path, file_id: str | None = None) -> Path:
    """A copy of a stored file under a name that no row has."""
    copy = path.with_name(f"{file_id or uuid4()}.1.png")
    shutil.copyfile(path, copy)
    return copy


def quarantined(server: RunningServer) -> list[Path]:
    return [path for path in (server.volume / "quarantine").rglob("*") if path.is_file()]


def test_a_sound_store_is_told_to_be_sound(server: RunningServer, tool: Tool) -> None:
    store(server, "ada", 3)
    told = tool("audit", "--repair", *AT_ONCE)
    assert (told.code, told.findings) == (Exit.OK, [])
    assert (told.summary["rows_files"], told.summary["rows_bytes"], told.summary["listed_files"]) == (3, 6_000, 3)


def test_every_lost_file_is_named_and_none_else(server: RunningServer, tool: Tool) -> None:
    ids = store(server, "ada", 6)
    gone, short, long = (path_of(server, file_id) for file_id in ids[:3])
    gone.unlink()
    os.truncate(short, 1_999)
    with long.open("ab") as file:
        file.write(b"x")
    told = tool("audit", "--repair")
    assert told.code == Exit.FOUND
    assert [(each["kind"], each["file_id"]) for each in sorted(told.findings, key=lambda each: str(each["file_id"]))] == [
        ("file_missing", ids[0]),
        ("file_length", ids[1]),
        ("file_length", ids[2]),
    ]
    assert all(each["state"] == "look" and each["command"] == f"coffer restore file {each['file_id']}" for each in told.findings)


def test_garbage_is_set_aside_when_it_is_old_and_two_audits_have_seen_it(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1)
    garbage = beside(path_of(server, file_id))
    content = garbage.read_bytes()
    for _ in range(2):
        assert tool("audit", "--repair").findings == []  # young
    assert tool("audit", "--repair", *AT_ONCE).states == [("garbage", "waiting")]
    rehearsed = tool("audit", *AT_ONCE)
    assert (rehearsed.code, rehearsed.states) == (Exit.FOUND, [("garbage", "repairable")])
    assert garbage.exists()
    repaired = tool("audit", "--repair", *AT_ONCE)
    assert (repaired.code, repaired.states) == (Exit.OK, [("garbage", "repaired")])
    assert not garbage.exists()
    (aside,) = quarantined(server)
    assert aside.read_bytes() == content
    assert str(aside).endswith(str(garbage.relative_to(server.volume)))
    assert tool("audit", *AT_ONCE).findings == []
    assert path_of(server, file_id).exists()


def test_previews_without_a_row_are_garbage_too(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1)
    directory = server.volume / "users" / "ada" / "previews" / file_id
    directory.mkdir(parents=True)
    (directory / "320.webp").write_bytes(b"made and never entered")
    (directory / ".640.webp").write_bytes(b"half made")
    (directory / "1280.webp").write_bytes(b"entered")
    execute(server.database_url, INSERT_PREVIEW, file_id, "1280")
    execute(server.database_url, "update user_files set preview_state = 'ready'")
    tool("audit", "--repair", *AT_ONCE)
    assert tool("audit", "--repair", *AT_ONCE).states == [("garbage", "repaired")] * 2
    assert [each.name for each in directory.iterdir()] == ["1280.webp"]


def test_what_has_no_row_and_is_wanted_is_no_garbage(server: RunningServer, tool: Tool) -> None:
    ids = store(server, "ada", 2)
    path = path_of(server, ids[0])
    linked, resumable, buried = (beside(path) for _ in range(3))
    uuid_of = {each: each.name[:36] for each in (linked, resumable, buried)}
    volume_id = execute(server.database_url, "select id from volumes")[0]["id"]
    execute(server.database_url, INSERT_UPLOAD, uuid_of[linked], volume_id, DAY)
    execute(server.database_url, INSERT_RESUMABLE, uuid_of[resumable], volume_id, uuid_of[resumable])
    server.stop()  # its housekeeping would bury
    tombstone = "insert into tombstones (volume_id, file_path, file_id, generation) values ($1, $2, $3, 1)"
    execute(server.database_url, tombstone, volume_id, str(buried.relative_to(server.volume)), uuid_of[buried])
    for _ in range(3):
        assert tool("audit", "--repair", *AT_ONCE).findings == []
    assert linked.exists()
    assert resumable.exists()
    assert buried.exists()


def test_counters_are_made_the_sums_again(server: RunningServer, tool: Tool) -> None:
    store(server, "ada", 3)
    store(server, "bob", 2)
    for wrong in (
        "update user_storage set total_bytes = 1, file_count = 9, reserved_bytes = 77 where user_id = 'ada'",
        "update user_storage set preview_bytes = 5 where user_id = 'bob'",
        "update user_storage_by_type set total_bytes = total_bytes + 1 where user_id = 'bob'",
    ):
        by_hand(server.database_url, wrong)
    rehearsed = tool("audit")
    assert (rehearsed.code, rehearsed.states) == (Exit.FOUND, [("counters", "repairable")] * 2)
    assert drifted(server.database_url) != []
    repaired = tool("audit", "--repair")
    assert (repaired.code, repaired.states) == (Exit.OK, [("counters", "repaired")] * 2)
    assert "total_bytes 1 became 6000" in repaired.findings[0]["text"]
    assert drifted(server.database_url) == []
    assert tool("audit").findings == []
    assert execute(server.database_url, "select preview_bytes from user_storage where user_id = 'bob'")[0]["preview_bytes"] == 0
    with server.client("ada") as client:
        assert client.get("/api/storage/usage").json()["used_bytes"] == 6_000


def by_hand(database_url: str, statement: str) -> None:
    """As somebody who switches the triggers off."""
    execute(database_url, f"do $$ begin set local session_replication_role = replica; {statement}; end $$")


def test_missing_previews_are_made_again(server: RunningServer, tool: Tool) -> None:
    ids = store(server, "ada", 2)
    for file_id in ids:
        execute(server.database_url, INSERT_PREVIEW, file_id, "320")
    assert tool("audit", "--repair").findings == []  # a worker may be at them: they wait
    execute(server.database_url, "update user_files set preview_state = 'ready'")
    rehearsed = tool("audit")
    assert (rehearsed.code, rehearsed.states) == (Exit.FOUND, [("preview_missing", "repairable")] * 2)
    repaired = tool("audit", "--repair")
    assert (repaired.code, repaired.states) == (Exit.OK, [("preview_missing", "repaired")] * 2)
    assert {row["preview_state"] for row in execute(server.database_url, "select preview_state from user_files")} == {"pending"}
    assert tool("audit").findings == []


def test_what_housekeeping_left_is_settled(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1)
    path = path_of(server, file_id)
    server.stop()
    volume_id = execute(server.database_url, "select id from volumes")[0]["id"]
    upload_id = uuid4()
    execute(server.database_url, INSERT_UPLOAD, upload_id, volume_id, -DAY)
    (server.volume / "incoming" / str(upload_id)).write_bytes(b"begun")
    execute(server.database_url, "delete from user_files")
    execute(server.database_url, "update tombstones set created_at = now() - interval '1 hour'")
    rehearsed = tool("audit")
    assert (rehearsed.code, rehearsed.states) == (Exit.FOUND, [("reservation", "repairable"), ("tombstone", "repairable")])
    assert path.exists()
    assert tool("audit", "--repair").states == [("reservation", "repaired"), ("tombstone", "repaired")]
    assert not path.exists()
    assert server.incoming() == []
    assert execute(server.database_url, "select reserved_bytes from user_storage")[0]["reserved_bytes"] == 0
    assert tool("audit").findings == []


def test_leftovers_in_incoming_go_unless_an_upload_wants_them(server: RunningServer, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    store(server, "ada", 1)
    server.stop()
    volume_id = execute(server.database_url, "select id from volumes")[0]["id"]
    wanted, joined, left, young = (uuid4() for _ in range(4))
    execute(server.database_url, INSERT_UPLOAD, wanted, volume_id, DAY)
    execute(server.database_url, INSERT_RESUMABLE, wanted, volume_id, joined)  # its bytes have another name
    for each in (wanted, joined, left, young):
        (server.volume / "incoming" / str(each)).write_bytes(b"bytes")
    assert tool("audit", "--repair").findings == []
    monkeypatch.setattr("ops.audit._OVERDUE_SECONDS", -86_400.0)  # as if a day had passed: a file's ctime cannot be set
    (server.volume / "incoming" / str(young)).unlink()
    told = tool("audit", "--repair")
    assert [(each["kind"], each["state"], each["path"]) for each in told.findings if each["kind"] == "leftover"] == [
        ("leftover", "repaired", f"incoming/{left}")
    ]
    assert server.incoming() == sorted(map(str, (wanted, joined)))


def test_nothing_is_touched_that_coffer_did_not_make(server: RunningServer, tool: Tool, tmp_path: Path) -> None:
    (file_id,) = store(server, "ada", 1)
    users = server.volume / "users"
    strange = [
        users / "lost+found",
        users / "ada" / "notes.txt",
        path_of(server, file_id).with_name("a.png"),
        server.volume / "incoming" / "x",
    ]
    strange[0].mkdir()
    for each in strange[1:]:
        each.write_text("not ours")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{uuid4()}.1.png").write_text("not ours")
    (users / "eve").symlink_to(outside)
    (users / "ada" / "videos").symlink_to(outside)
    for _ in range(2):
        told = tool("audit", "--repair", *AT_ONCE)
        assert told.code == Exit.FOUND
        assert {each["path"] for each in told.findings} == {
            str(each.relative_to(server.volume)) for each in (*strange, users / "eve", users / "ada" / "videos")
        }
        assert {each["kind"] for each in told.findings} == {"strange"}
    assert all(each.exists() for each in strange)
    assert len(list(outside.iterdir())) == 1


def test_an_unmounted_volume_is_told_of_and_nothing_is_changed(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1)
    garbage = beside(path_of(server, file_id))
    tool("audit", "--repair", *AT_ONCE)
    sentinel = server.volume / ".coffer-volume"
    sentinel.rename(server.volume / "away")
    told = tool("audit", "--repair", *AT_ONCE)
    assert (told.code, told.states) == (Exit.FOUND, [("volume", "look")])
    assert garbage.exists()
    sentinel.write_text(f"{uuid4()}\n")  # another volume's
    assert tool("audit", "--repair", *AT_ONCE).states == [("volume", "look")]
    assert garbage.exists()


def test_an_empty_listing_is_not_believed(server: RunningServer, tool: Tool) -> None:
    store(server, "ada", 3)
    (server.volume / "users").rename(server.volume / "elsewhere")
    (server.volume / "users").mkdir()
    told = tool("audit", "--repair", *AT_ONCE)
    assert ("volume", "look") in told.states
    assert "its listing is empty" in "".join(each["text"] for each in told.findings)


def test_a_listing_that_breaks_off_is_not_believed(server: RunningServer, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    (file_id,) = store(server, "ada", 1)
    garbage = beside(path_of(server, file_id))
    tool("audit", "--repair", *AT_ONCE)
    scandir = os.scandir

    def failing(fd: int) -> object:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "images":
            raise OSError(5, "Input/output error")
        return scandir(fd)

    with monkeypatch.context() as broken:
        broken.setattr(os, "scandir", failing)
        told = tool("audit", "--repair", *AT_ONCE)
    assert told.states == [("volume", "look")]
    assert "could not be listed to its end" in told.findings[0]["text"]
    assert garbage.exists()
    # What the broken listing did not show is not forgotten as seen.
    assert tool("audit", "--repair", *AT_ONCE).states == [("garbage", "repaired")]


def test_too_much_garbage_is_no_garbage(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1)
    copies = [beside(path_of(server, file_id)) for _ in range(101)]
    for _ in range(3):
        told = tool("audit", "--repair", *AT_ONCE)
        assert (told.code, told.states) == (Exit.FOUND, [("volume", "look")])
    assert all(each.exists() for each in copies)
    copies.pop().unlink()
    assert set(tool("audit", "--repair", *AT_ONCE).states) == {("garbage", "waiting")}  # those audits believed nothing that they saw
    assert tool("audit", "--repair", *AT_ONCE).states == [("garbage", "repaired")] * 100


def test_too_many_losses_are_the_volumes_fault(server: RunningServer, tool: Tool) -> None:
    ids = store(server, "ada", 102, size_bytes=100)
    garbage = beside(path_of(server, ids[0]))
    tool("audit", "--repair", *AT_ONCE)
    for file_id in ids[1:]:
        path_of(server, file_id).unlink()
    told = tool("audit", "--repair", *AT_ONCE)
    assert told.states.count(("volume", "look")) == 1
    assert garbage.exists()


def test_no_false_findings_while_many_upload_and_delete(start_server: ServerFactory, tool: Tool) -> None:
    server = start_server()
    with Load(server, clients=16, deleting=True, sizes=(1_000, 50_000, 1_500_000)) as load:
        for number in range(6):
            wanted = (number + 1) * 40
            load.wait_for(lambda wanted=wanted: load.count >= wanted)  # type: ignore[misc]
            told = tool("audit", "--repair")
            assert (told.code, told.findings) == (Exit.OK, []), told
    load.journal.check(server)


@pytest.mark.anyio
async def test_a_lost_lock_stops_every_change(database: str) -> None:
    async with tool_lock(Settings(database_url=database), "audit") as lock:
        await lock.check()
        connection = await asyncpg.connect(database)
        await connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'coffer audit'")
        await connection.close()
        with pytest.raises(DatabaseUnavailable):
            await lock.check()


def run_what_is_told(tool: Tool, command: str) -> None:
    """As a sysadmin copies it, from a shell."""
    if not command.startswith("coffer "):
        assert subprocess.run(["sh", "-c", command], check=False, capture_output=True).returncode == 0, command
        return
    arguments = shlex.split(command)[1:]
    takes_json = arguments[0] in ("audit", "restore", "scrub", "rebalance")
    done = tool(*arguments, as_json=takes_json)
    assert done.code == Exit.OK, f"{command}: {done.stderr}"


def test_each_finding_tells_the_command_that_ends_it(server: RunningServer, repository: Path, tool: Tool) -> None:
    gone, short, aside, kept, unseen = store(server, "ada", 5)
    assert tool("backup").code == Exit.OK
    server.stop()  # its housekeeping would settle some of it
    beside(path_of(server, kept))
    path_of(server, gone).unlink()
    os.truncate(path_of(server, short), 10)
    path_of(server, aside).write_bytes(b"other bytes".ljust(2_000))
    assert tool("scrub", "--file", aside).code == Exit.FOUND
    execute(server.database_url, INSERT_PREVIEW, unseen, "320")
    execute(server.database_url, "update user_files set preview_state = 'ready'")
    by_hand(server.database_url, "update user_storage set total_bytes = 1 where user_id = 'ada'")
    volume_id = execute(server.database_url, "select id from volumes")[0]["id"]
    execute(server.database_url, INSERT_UPLOAD, uuid4(), volume_id, -DAY)
    tombstone = (
        "insert into tombstones (volume_id, file_path, file_id, generation, created_at) values ($1, $2, $3, 1, now() - interval '1 h')"
    )
    execute(server.database_url, tombstone, volume_id, f"users/ada/images/{(buried := uuid4())}.1.png", buried)
    tool("audit", *AT_ONCE)
    told = tool("audit", *AT_ONCE)
    assert {(each["kind"], each["state"]) for each in told.findings} == {
        ("file_missing", "look"),
        ("file_length", "look"),
        ("damaged", "look"),
        ("garbage", "repairable"),
        ("preview_missing", "repairable"),
        ("counters", "repairable"),
        ("reservation", "repairable"),
        ("tombstone", "repairable"),
    }
    for command in sorted({each["command"] for each in told.findings}, reverse=True):  # what must be restored goes first
        run_what_is_told(tool, command)
    left = tool("audit", *AT_ONCE).findings  # the wrong bytes, in whose place the right ones are now
    assert [(each["kind"], each["path"].endswith(".png.damaged")) for each in left] == [("garbage", True)] * 2
    run_what_is_told(tool, left[0]["command"])
    assert tool("audit", *AT_ONCE).findings == []
    server.start()
    with server.client("ada") as client:
        for number, file_id in enumerate((gone, short, aside)):
            assert client.get(f"/api/files/{file_id}/download").content == image(2_000, number)


def test_strange_names_and_volumes_are_told_with_a_command_that_works(server: RunningServer, tool: Tool) -> None:
    (file_id,) = store(server, "ada", 1)
    for name in ("it's $(here).txt", "-rf", "new\nline"):
        path_of(server, file_id).with_name(name).touch()
    told = tool("audit")
    assert told.states == [("strange", "look")] * 3
    for finding in told.findings:
        run_what_is_told(tool, finding["command"])
    for path in path_of(server, file_id).parent.iterdir():
        if path.name != path_of(server, file_id).name:
            path.unlink()
    server.stop()
    execute(server.database_url, "update volumes set state = 'read_only'")
    (finding,) = tool("audit").findings
    assert (finding["kind"], finding["state"]) == ("volume", "look")
    run_what_is_told(tool, finding["command"])
    assert tool("audit").findings == []
    sentinel = server.volume / ".coffer-volume"
    sentinel.rename(sentinel.with_name("away"))
    (finding,) = tool("audit").findings
    run_what_is_told(tool, finding["command"])
    sentinel.with_name("away").rename(sentinel)
    assert tool("audit").findings == []


def test_many_lost_previews_are_made_anew_by_the_command_that_is_told(server: RunningServer, tool: Tool) -> None:
    store(server, "ada", 1)
    execute(
        server.database_url,
        "insert into previews (file_id, variant, user_id, file_name, mime_type, size_bytes)"
        " select id, n, user_id, n || '.webp', 'image/webp', 7 from user_files, generate_series(1, 101) n",
    )
    execute(server.database_url, "update user_files set preview_state = 'ready'")
    (finding,) = tool("audit", "--repair").findings
    assert (finding["kind"], finding["state"]) == ("preview_missing", "look")
    run_what_is_told(tool, finding["command"])
    assert execute(server.database_url, "select preview_state from user_files")[0]["preview_state"] == "pending"
