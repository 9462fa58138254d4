"""`coffer volume`: from making a volume to forgetting it."""

import os
import subprocess
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from server.commands.failures import Exit
from server.vault.checks import mount_of
from tests.ops.conftest import Second, Told, Tool, place_on_first, store, where
from tests.ops.test_rebalance import AT_ONCE
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.waiting import until

MOUNTINFO = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
29 22 0:25 / /run rw,nosuid,nodev shared:12 - tmpfs tmpfs rw,size=1632092k
95 22 8:16 / /mnt/one rw,nosuid,nodev,noexec,relatime shared:50 - ext4 /dev/sdb rw,discard
96 22 8:32 / /mnt/one\\040two rw,relatime - xfs /dev/sdc rw,attr2,nobarrier
97 95 8:48 / /mnt/one/deep ro,relatime - ext4 /dev/sdd ro
"""


def quiet(tool: Tool, *arguments: str) -> Told:
    return tool("volume", *arguments, as_json=False)


def line_of(tool: Tool, volume_id: UUID) -> dict[str, object]:
    return next(line for line in tool("volume", "list").findings if line["id"] == str(volume_id))


def test_a_user_may_have_a_volume_alone(server: RunningServer, tool: Tool, tmp_path: Path) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    assert tool("volume", "add", str(tmp_path / "own"), "--for-user", "ada").code == Exit.NOT_FOUND  # no volume yet
    assert tool("volume", "init", str(tmp_path / "own"), "--for-user", "ada").code == Exit.OK
    assert tool("volume", "init", str(tmp_path / "other"), "--for-user", "ada").code == Exit.REFUSED
    assert list((tmp_path / "other").iterdir()) == []
    own = execute(server.database_url, "select id from volumes where reserved_for = 'ada'")[0]["id"]
    assert line_of(tool, own)["takes"] == "ada"
    with server.client() as client:
        until(lambda: len(client.get("/health/ready").json()["volumes"]) == 2)
    # Whatever room there is, and whoever is first.
    for user_id in ("bob", "ada", "eve"):
        store(server, user_id, 1)
    assert where(server, "ada") == {own}
    assert own not in where(server, "bob") | where(server, "eve")
    # Registered from another mountpoint, it stays ada's.
    moved = (tmp_path / "own").rename(tmp_path / "moved")
    assert tool("volume", "add", str(moved)).code == Exit.OK
    assert (line_of(tool, own)["takes"], line_of(tool, own)["mount_path"]) == ("ada", str(moved))


def test_a_volume_is_drained_and_retired(server: RunningServer, second: Second, tool: Tool) -> None:
    place_on_first(server, second)
    (file_id,) = store(server, "ada", 1)
    first = str(second.first)
    assert quiet(tool, "retire", first, "--for-real").code == Exit.REFUSED  # not drained
    assert quiet(tool, "drain", str(uuid4())).code == Exit.NOT_FOUND
    assert quiet(tool, "drain", first).code == Exit.OK
    assert line_of(tool, second.first)["takes"] == "nobody"
    # New users go elsewhere, and the old one writes on.
    store(server, "bob", 1)
    assert where(server, "bob") == {second.id}
    store(server, "ada", 1, seed=5)
    assert where(server) == {second.first}
    assert quiet(tool, "retire", first, "--for-real").code == Exit.REFUSED  # not empty
    rehearsed = tool("rebalance")
    assert rehearsed.states == [("move", "repairable")]
    assert tool("rebalance", *AT_ONCE).code == Exit.OK
    until(lambda: tool("rebalance", *AT_ONCE).findings == [])
    assert where(server) == {second.id}
    stray = server.volume / "users" / "ada" / "images" / f"{uuid4()}.1.png"
    stray.write_bytes(b"nobody's")
    assert quiet(tool, "retire", first, "--for-real").code == Exit.REFUSED  # the disk is not empty
    stray.unlink()
    assert quiet(tool, "retire", first).code == Exit.OK
    assert len(execute(server.database_url, "select from volumes")) == 2  # only rehearsed
    assert quiet(tool, "retire", first, "--for-real").code == Exit.OK
    assert [row["id"] for row in execute(server.database_url, "select id from volumes")] == [second.id]
    with server.client("ada") as client:
        until(lambda: [each["id"] for each in client.get("/health/ready").json()["volumes"]] == [str(second.id)])
        assert client.get(f"/api/files/{file_id}/download").content == image(2_000, 0)
        assert client.post("/api/files/upload", content=image(2_000, 9)).status_code == 201
    actions = [
        row["action"]
        for row in execute(server.database_url, "select action from audit_log where action like 'volume.%' or action like 'user.mov%'")
    ]
    assert {"volume.added", "volume.changed", "volume.retired", "user.moving", "user.moved"} <= set(actions)


def test_draining_may_be_undone_and_says_when_nothing_is_left(server: RunningServer, tool: Tool) -> None:
    (volume_id,) = [row["id"] for row in execute(server.database_url, "select id from volumes")]
    assert "no other volume" in quiet(tool, "drain", str(volume_id)).stderr
    with server.client("ada") as client:
        refused = client.post("/api/files/upload", content=image())
        assert (refused.status_code, refused.json()["code"]) == (503, "volume_unavailable")
        assert quiet(tool, "drain", str(volume_id), "--undo").code == Exit.OK
        until(lambda: client.post("/api/files/upload", content=image()).status_code == 201)


def test_a_volume_is_verified(server: RunningServer, tool: Tool) -> None:
    (volume_id,) = [row["id"] for row in execute(server.database_url, "select id from volumes")]
    told = tool("volume", "verify")
    verdicts = {line["check"]: line["verdict"] for line in told.findings}
    assert told.code == Exit.OK
    assert (verdicts["sentinel"], verdicts["writing"], verdicts["space"]) == ("ok", "ok", "ok")
    assert list((server.volume / "incoming").iterdir()) == []
    (server.volume / ".coffer-volume").rename(server.volume / "away")
    told = tool("volume", "verify", str(volume_id))
    assert (told.code, [line["verdict"] for line in told.findings]) == (Exit.FOUND, ["wrong"])
    assert tool("volume", "verify", str(uuid4())).code == Exit.NOT_FOUND


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_verifying_looks_at_the_mount(server: RunningServer, tool: Tool, tmp_path: Path) -> None:
    mount = tmp_path / "memory"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=100", "tmpfs", mount], check=True)
    try:
        tool("volume", "init", str(mount))
        lines = [line for line in tool("volume", "verify").findings if line["check"] in ("mount", "inodes", "writing")][-3:]
        assert [(line["check"], line["verdict"]) for line in lines] == [("mount", "wrong"), ("writing", "ok"), ("inodes", "wrong")]
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        lines = [line for line in tool("volume", "verify").findings if line["check"] in ("options", "writing")][-2:]
        assert [line["verdict"] for line in lines] == ["wrong", "wrong"]
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/srv", "/", "ext4"),
        ("/mnt/one", "/mnt/one", "ext4"),
        ("/mnt/one/deep/er", "/mnt/one/deep", "ext4"),
        ("/mnt/one two", "/mnt/one two", "xfs"),
    ],
)
def test_the_mount_of_a_path(path: str, point: str, kind: str) -> None:
    found = mount_of(Path(path), MOUNTINFO)
    assert (str(found.point), found.kind) == (point, kind)
    assert ("nobarrier" in found.options) == (kind == "xfs")
