"""Users are moved between volumes, and nobody notices: not who uploads, not who downloads, and not whoever kills the tool."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from server.commands.failures import Exit
from tests.ops.conftest import Second, Tool, drifted, path_of, place_on_first, store, where
from tests.ops.traffic import Traffic
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.waiting import until

AT_ONCE = ("--for-real", "--keep-old", "0")

INSERT_PREVIEW = """
insert into previews (file_id, variant, user_id, file_name, mime_type, size_bytes) values ($1, $2, 'ada', $2 || '.webp', 'image/webp', $3)
"""


def test_a_user_is_moved_with_all_that_is_stored(server: RunningServer, second: Second, tool: Tool) -> None:
    place_on_first(server, second)
    ids = store(server, "ada", 40)
    directory = server.volume / "users" / "ada" / "previews" / ids[0]
    directory.mkdir(parents=True)
    (directory / "320.webp").write_bytes(b"a picture")
    (directory / "640.webp").write_bytes(b"short")
    execute(server.database_url, INSERT_PREVIEW, ids[0], "320", 9)
    execute(server.database_url, INSERT_PREVIEW, ids[0], "640", 9)
    execute(server.database_url, "update user_files set preview_state = 'ready'")
    before = server.stored_files()
    wanted = ("rebalance", "--user", "ada", "--to", str(second.id))
    rehearsed = tool(*wanted)
    assert (rehearsed.code, rehearsed.states) == (Exit.FOUND, [("move", "repairable")])
    assert where(server) == {second.first} and second.files() == set()
    told = tool(*wanted, *AT_ONCE)
    assert (told.code, told.states) == (Exit.OK, [("move", "repaired")])
    assert (told.summary["files"], told.summary["users"], told.summary["bytes"]) == (40, 1, 80_000)
    assert where(server) == {second.id}
    assert second.files() - {hashlib.sha256(b"a picture").hexdigest()} == before
    assert server.stored_files() == set()
    moved = second.mount / "users" / "ada" / "previews" / ids[0]
    assert [each.read_bytes() for each in moved.iterdir()] == [b"a picture"]
    # The other preview was not what its row says, and is made again.
    assert execute(server.database_url, "select preview_state from user_files where id = $1", UUID(ids[0]))[0]["preview_state"] == "pending"
    assert execute(server.database_url, "select count(*) from tombstones")[0]["count"] == 0
    assert drifted(server.database_url) == []
    with server.client("ada") as client:
        assert client.get(f"/api/files/{ids[7]}/download").content == image(2_000, 7)
        later = client.post("/api/files/upload", content=image(3_000, 99)).json()["id"]
    assert execute(server.database_url, "select volume_id from user_files where id = $1", UUID(later))[0]["volume_id"] in (
        second.first,
        second.id,
    )
    assert tool(*wanted, *AT_ONCE).findings == []
    assert where(server) == {second.id}


def test_nobody_notices(server: RunningServer, second: Second, tool: Tool) -> None:
    """To and fro while the user uploads, resumes, downloads, follows old links, replaces, revokes and deletes; audits look on."""
    place_on_first(server, second)
    kept = {file_id: image(2_000, number) for number, file_id in enumerate(store(server, "ada", 20))}
    with Traffic(server, "ada", kept) as traffic:
        for target in (second.id, second.first):
            traffic.wait_for_rounds(1)
            told = tool("rebalance", "--user", "ada", "--to", str(target), "--for-real", "--keep-old", "3")
            assert told.code == Exit.OK, told
            audit = tool("audit", "--repair", "--older-than", "0")
            assert [each for each in audit.findings if each["kind"] != "garbage"] == [], audit
        traffic.wait_for_rounds(1)
    traffic.check()
    until(lambda: tool("rebalance", "--user", "ada", "--to", str(second.id), *AT_ONCE).states == [])
    traffic.check()
    assert where(server) == {second.id}
    assert server.stored_files() == set()
    assert drifted(server.database_url) == []
    assert min(traffic.rounds.values()) >= 3, traffic.rounds
    assert tool("audit").findings == []


def test_what_the_rules_demand(server: RunningServer, second: Second, tool: Tool) -> None:
    """Off what is drained and off what is somebody else's; onto one's own."""
    for user_id in ("ada", "bob", "eve"):
        execute(server.database_url, "insert into user_storage (user_id, volume_id) values ($1, $2)", user_id, second.first)
        store(server, user_id, 2)
    assert tool("rebalance").findings == []
    assert tool("volume", "add", str(second.mount), "--for-user", "bob").code == Exit.OK
    told = tool("rebalance")
    assert [(each["kind"], each["user_id"]) for each in told.findings] == [("move", "bob")]
    assert tool("rebalance", *AT_ONCE).code == Exit.OK
    assert [where(server, each) for each in ("ada", "bob", "eve")] == [{second.first}, {second.id}, {second.first}]
    refused = tool("rebalance", "--user", "ada", "--to", str(second.id), *AT_ONCE)
    assert (refused.code, where(server)) == (Exit.REFUSED, {second.first})
    # The first is drained, and there is no other for anybody.
    tool("volume", "drain", str(second.first), as_json=False)
    told = tool("rebalance", *AT_ONCE)
    assert (told.code, told.states) == (Exit.FOUND, [("no_room", "look")] * 2)
    # Then somebody else's user is on bob's volume, as if it had been reserved later.
    tool("volume", "drain", str(second.first), "--undo", as_json=False)
    execute(server.database_url, "update user_storage set volume_id = $1 where user_id = 'eve'", second.id)
    until(lambda: tool("rebalance", *AT_ONCE).states == [])
    assert [where(server, each) for each in ("ada", "bob", "eve")] == [{second.first}, {second.id}, {second.first}]


def test_wrong_words_are_refused(server: RunningServer, second: Second, tool: Tool) -> None:
    place_on_first(server, second)
    for wrong, expected in (
        (("--user", "nobody", "--to", str(second.id)), Exit.NOT_FOUND),
        (("--user", "ada", "--to", str(uuid4())), Exit.NOT_FOUND),
        (("--user", "ada"), Exit.USAGE),
        (("--to", str(second.id)), Exit.USAGE),
    ):
        assert tool("rebalance", *wrong).code == expected, wrong


def test_what_is_damaged_stays_and_is_told_of(server: RunningServer, second: Second, tool: Tool) -> None:
    place_on_first(server, second)
    ids = store(server, "ada", 6)
    rotten, short, gone = (path_of(server, file_id) for file_id in ids[:3])
    rotten.write_bytes(image(2_000, 77))
    os.truncate(short, 1_999)
    gone.unlink()
    execute(server.database_url, "update user_files set damaged_at = now() where id = $1", UUID(ids[3]))
    told = tool("rebalance", "--user", "ada", "--to", str(second.id), *AT_ONCE)
    assert told.code == Exit.FOUND
    unmoved = {each["text"].split()[1] for each in told.findings if each["kind"] == "damaged"}
    assert unmoved == set(ids[:4])
    places = {str(row["id"]): row["volume_id"] for row in execute(server.database_url, "select id, volume_id from user_files")}
    assert {file_id for file_id, volume_id in places.items() if volume_id == second.first} == set(ids[:4])
    assert {path.name for path in (second.mount / "incoming").iterdir()} == set()
    # Restored, it follows.
    rotten.write_bytes(image(2_000, 0))
    tool("rebalance", *AT_ONCE)
    assert execute(server.database_url, "select volume_id from user_files where id = $1", UUID(ids[0]))[0]["volume_id"] == second.id
    with server.client("ada") as client:
        assert client.get(f"/api/files/{ids[0]}/download").content == image(2_000, 0)


def test_a_copy_that_reads_back_wrong_moves_nothing(
    server: RunningServer, second: Second, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new disk says that it has synced what it has not."""
    place_on_first(server, second)
    store(server, "ada", 2)
    sync = os.fdatasync

    def forget(fd: int) -> None:
        sync(fd)
        os.pwrite(fd, b"rot", 500)

    monkeypatch.setattr(os, "fdatasync", forget)
    told = tool("rebalance", "--user", "ada", "--to", str(second.id), *AT_ONCE)
    assert (told.code, "volume" in {each["kind"] for each in told.findings}) == (Exit.FOUND, True)
    assert where(server) == {second.first}
    assert second.files() == set()


def test_told_to_stop_it_ends_with_what_is_in_hand(server: RunningServer, second: Second, tool: Tool) -> None:
    place_on_first(server, second)
    ids = store(server, "ada", 40)
    command = [sys.executable, "-m", "ops.cli", "rebalance", "--user", "ada", "--to", str(second.id), "--for-real", "--rate", "20KiB"]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
    until(lambda: second.id in where(server))
    process.terminate()
    summary = json.loads(process.communicate()[0].splitlines()[-1])["summary"]
    assert (process.returncode, summary["is_complete"]) == (Exit.OK, False)
    assert where(server) == {second.first, second.id}
    with server.client("ada") as client:
        for number, file_id in enumerate(ids):
            assert client.get(f"/api/files/{file_id}/download").content == image(2_000, number)
    assert ("move", "repairable") in tool("rebalance").states
    assert tool("rebalance", *AT_ONCE).code == Exit.OK
    assert (where(server), server.stored_files()) == ({second.id}, set())


def test_volumes_are_evened_out(server: RunningServer, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COFFER_VOLUME_RESERVE_BYTES", str(2**20))
    mounts = [tmp_path / "left", tmp_path / "right"]
    for mount in mounts:
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=32m,nr_inodes=8000", "tmpfs", str(mount)]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    try:
        for mount in mounts:
            tool("volume", "init", str(mount))
        ids = {row["mount_path"]: row["id"] for row in execute(server.database_url, "select id, mount_path from volumes")}
        left, right = (ids[str(mount)] for mount in mounts)
        execute(server.database_url, "update volumes set created_at = created_at - interval '1 minute'")
        # The disk of the tests is no part of this.
        execute(server.database_url, "update volumes set draining_since = now() where id not in ($1, $2)", left, right)
        with server.client() as client:
            until(lambda: len(client.get("/health/ready").json()["volumes"]) == 3)
        for number, user_id in enumerate(("ada", "bob", "cyd", "dan")):
            execute(server.database_url, "insert into user_storage (user_id, volume_id) values ($1, $2)", user_id, left)
            store(server, user_id, 1, size_bytes=(number + 2) * 2**20)
        told = tool("rebalance", "--evenly", *AT_ONCE)
        assert told.code == Exit.OK, told
        rows = execute(server.database_url, "select volume_id, sum(total_bytes)::bigint as bytes from user_storage group by volume_id")
        used = {row["volume_id"]: row["bytes"] for row in rows}
        assert abs(used[left] - used[right]) <= 2 * 2**20, used
        assert tool("rebalance", "--evenly").findings == []
    finally:
        for mount in mounts:
            subprocess.run(["umount", "-l", mount], check=False)
