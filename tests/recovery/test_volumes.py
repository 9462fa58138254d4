"""One of two volumes fails, in each way that disks do: its users are told so, and nobody else hears of it (FAULTS 4 to 7)."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from server.errors import VolumeUnavailable
from server.ledger import VolumeRow, add_volume
from server.vault import Vault, Volume
from server.vault.sentinel import init_volume
from tests.recovery.disks import SmallDisk, stuck_mount, why_no_disks
from tests.recovery.test_volume import code
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.tus.crashes import serving
from tests.waiting import until

MIB = 2**20
# The promise is two seconds. A machine that is busy with other tests is given more.
SOON_SECONDS = 20


class Pair:
    """A server with ada on a small disk of its own and bob on another volume."""

    def __init__(self, server: RunningServer, mount: Path, volume_id: UUID) -> None:
        self.server, self.mount, self.id = server, mount, volume_id

    def state(self) -> str:
        """What /health/ready tells of ada's volume, and that it tells nothing of bob's."""
        with self.server.client() as client:
            answer = client.get("/health/ready")
            states: dict[str, str] = {each["id"]: each["state"] for each in answer.json()["volumes"]}
        state = states.pop(str(self.id))
        assert set(states.values()) == {"open"}
        assert answer.status_code == (200 if state == "open" else 503)
        return state

    def becomes(self, state: str) -> None:
        until(lambda: self.state() == state, timeout_seconds=SOON_SECONDS)

    def upload(self, size_bytes: int = 2_000) -> tuple[int, str]:
        with self.server.client("ada") as client:
            return code(client.post("/api/files/upload", content=image(size_bytes)))

    @contextmanager
    def bob_writes_on(self) -> Iterator[None]:
        """Meanwhile he uploads and downloads, at least once, and is answered with success each time."""
        stop, strange, rounds = threading.Event(), list[Any](), [0]

        def write() -> None:
            with self.server.client("bob", timeout=60) as client:
                while not strange and (not stop.is_set() or not rounds[0]):
                    answer = client.post("/api/files/upload", content=image(10_000, rounds[0]))
                    if answer.status_code != 201:
                        strange.append(answer.text)
                    elif client.get(f"/api/files/{answer.json()['id']}/download").content != image(10_000, rounds[0]):
                        strange.append("other bytes")
                    rounds[0] += 1

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not strange


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if why_not := why_no_disks():
        pytest.skip(why_not)
    disk = SmallDisk(tmp_path)
    yield disk
    disk.unmount()


@pytest.fixture
def pair(server: RunningServer, disk: SmallDisk) -> Pair:
    volume_id = init_volume(disk.mount)

    async def add() -> None:
        async with serving(server.database_url) as service:
            await add_volume(service.db, volume_id, str(disk.mount))

    asyncio.run(add())
    (other,) = [row["id"] for row in execute(server.database_url, "select id from volumes where id <> $1", volume_id)]
    for user_id, place in (("ada", volume_id), ("bob", other)):
        execute(server.database_url, "insert into user_storage (user_id, volume_id) values ($1, $2)", user_id, place)
    with server.client() as client:
        until(lambda: len(client.get("/health/ready").json()["volumes"]) == 2)
    pair = Pair(server, disk.mount, volume_id)
    assert (pair.state(), pair.upload()[0]) == ("open", 201)
    return pair


def test_unmounted(pair: Pair, disk: SmallDisk) -> None:
    with pair.bob_writes_on():
        disk.unmount()
        pair.becomes("unavailable")
        assert pair.upload() == pair.upload(3 * MIB) == (503, "volume_unavailable")
        assert list(pair.mount.iterdir()) == []


def test_mounted_read_only(pair: Pair, disk: SmallDisk) -> None:
    with pair.server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=image(5_000, 1)).json()["id"]
        with pair.bob_writes_on():
            disk.make_read_only()
            pair.becomes("read_only")
            assert pair.upload() == pair.upload(3 * MIB) == (503, "volume_read_only")
            assert client.get(f"/api/files/{file_id}/download").content == image(5_000, 1)
        disk.make_writable()
        pair.becomes("open")
        assert pair.upload()[0] == 201


def test_read_only_after_an_error_of_the_file_system(pair: Pair) -> None:
    """It stays so until it is repaired, although newer kernels' statvfs(3) does not tell."""
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", pair.mount], check=True)
    device = subprocess.run(["findmnt", "-no", "SOURCE", pair.mount], check=True, capture_output=True, text=True).stdout.strip()
    trigger = Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error")
    if not os.access(trigger, os.W_OK):
        pytest.skip(f"{trigger} is not there to be written to")
    with pair.bob_writes_on():
        trigger.write_text("a test")
        pair.becomes("read_only")
        assert pair.upload() == pair.upload(3 * MIB) == (503, "volume_read_only")
    volume = Volume(pair.id, pair.mount, 0)
    volume.probe()  # no write has failed here
    assert (volume.state, "e2fsck" in volume.reason or volume.reason == "mounted read-only") == ("read_only", True)


def test_full(pair: Pair) -> None:
    with pair.server.client("ada") as client, pair.bob_writes_on():
        (pair.mount / "filler").write_bytes(bytes(10 * MIB))
        ids: list[str] = []
        while (answer := client.post("/api/files/upload", content=image(5 * MIB, len(ids)))).status_code == 201:
            ids.append(answer.json()["id"])
        assert code(answer) == (507, "volume_full")
        for file_id in ids:
            assert client.delete(f"/api/files/{file_id}").status_code == 204
        assert pair.upload(5 * MIB)[0] == 201


def test_out_of_inodes(pair: Pair) -> None:
    """There are 4,096, and the last 1,000 are kept back: each byte free is no use without one."""
    with pair.bob_writes_on():
        (pair.mount / "filler").mkdir()
        number = 0
        while os.statvfs(pair.mount).f_favail >= 1_000:
            (pair.mount / "filler" / str(number)).touch()
            number += 1
        pair.becomes("full")
        assert pair.upload() == pair.upload(3 * MIB) == (507, "volume_full")
    for each in (pair.mount / "filler").iterdir():
        each.unlink()
    pair.becomes("open")
    assert pair.upload()[0] == 201


def test_io_errors(pair: Pair, disk: SmallDisk) -> None:
    """The disk is there and fails: nothing is acknowledged, and nobody else waits."""
    with pair.bob_writes_on():
        disk.fail_file_system()
        answers = [pair.upload(size) for size in (2_000, 3 * MIB)]
        assert {status for status, _ in answers} == {503}, answers
        until(lambda: pair.state() != "open", timeout_seconds=SOON_SECONDS)
        with pair.server.client("ada") as client:
            assert client.get("/api/files").status_code == 200


def test_a_dead_disk_is_noticed_before_anybody_uses_it(pair: Pair, disk: SmallDisk) -> None:
    with pair.bob_writes_on():
        disk.fail_device()
        pair.becomes("unavailable")
        assert pair.upload() == (503, "volume_unavailable")


def test_a_mount_that_hangs(pair: Pair, disk: SmallDisk) -> None:
    """Nobody waits for it: not those who ask for the state, not those who write elsewhere, and not the looks at other volumes."""
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no /dev/fuse")
    disk.unmount()
    with stuck_mount(pair.mount):
        with pair.bob_writes_on():
            pair.becomes("unavailable")
            assert pair.upload() == (503, "volume_unavailable")
            with pair.server.client() as client:
                assert client.get("/metrics").status_code == 200
        # Nor does anything stay because of it: no command, and no server.
        told = subprocess.run(
            [sys.executable, "-m", "ops.cli", "volume", "list"],
            env=os.environ | {"COFFER_DATABASE_URL": pair.server.database_url},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert f"{pair.id}  unavailable" in told.stdout
        pair.server.stop()
        pair.server.start(wait_ready=False)
        pair.becomes("unavailable")
    disk.mount_again()
    pair.becomes("open")
    assert pair.upload()[0] == 201


def row_of(volume_id: UUID, mount: Path) -> VolumeRow:
    now = datetime.now(UTC)
    return VolumeRow(id=volume_id, mount_path=str(mount), state="open", is_draining=False, reserved_for=None, created_at=now)


def test_a_disk_that_does_not_answer_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = {}
    for name in ("hangs", "works"):
        (tmp_path / name).mkdir()
        mounts[name] = (init_volume(tmp_path / name), tmp_path / name)
    answers, probe = threading.Event(), Volume.probe

    def hang(volume: Volume) -> None:
        if volume.id == mounts["hangs"][0]:
            answers.wait()
        probe(volume)

    async def watch() -> None:
        vault = Vault(0)
        rows = [row_of(*each) for each in mounts.values()]
        await vault.refresh(rows)
        hanging, working = vault.volumes
        assert [volume.state for volume in vault.volumes] == ["open", "open"]
        monkeypatch.setattr(Volume, "probe", hang)
        monkeypatch.setattr("server.vault.vault._HANGS_SECONDS", 0.5)
        await vault.refresh(rows)
        assert [volume.state for volume in vault.volumes] == ["unavailable", "open"]
        with pytest.raises(VolumeUnavailable):
            hanging.root()
        (working.mount / ".coffer-volume").unlink()
        await vault.refresh(rows)
        assert [volume.state for volume in vault.volumes] == ["unavailable", "unavailable"]
        answers.set()
        until(lambda: hanging.state == "open")
        vault.close()

    try:
        asyncio.run(watch())
    finally:
        answers.set()


def test_a_disk_that_does_not_answer_leaves_threads_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_id = init_volume(tmp_path)
    answers, probe = threading.Event(), Volume.probe

    def hang(volume: Volume) -> None:
        answers.wait()
        probe(volume)

    async def watch() -> None:
        vault = Vault(0)
        rows = [row_of(volume_id, tmp_path)]
        await vault.refresh(rows)
        monkeypatch.setattr(Volume, "probe", hang)
        monkeypatch.setattr("server.vault.vault._HANGS_SECONDS", 0.5)
        stuck = [vault.start(answers.wait) for _ in range(100)]
        other = vault.start(lambda: "written")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(other), 0.1)
        await vault.refresh(rows)
        assert await asyncio.wait_for(other, 60) == "written"
        with pytest.raises(VolumeUnavailable):  # nobody else begins to wait
            await vault.check_writable(vault.volumes[0], 0)
        with pytest.raises(VolumeUnavailable):
            vault.place_for("ada")
        assert not any(each.done() for each in stuck)
        answers.set()
        await asyncio.gather(*stuck)
        vault.close()

    try:
        asyncio.run(watch())
    finally:
        answers.set()
