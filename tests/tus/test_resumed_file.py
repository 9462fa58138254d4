"""A file that comes in several requests: what is kept of it, what is known of its hash, and who may have it open."""

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from server.errors import Conflict, Damaged, VolumeFull, VolumeReadOnly
from server.vault import Volume
from server.vault.layout import stored_path
from server.vault.resumed import Hashed, InUse, ResumedFile
from server.vault.sentinel import init_volume

FIRST, SECOND = b"first " * 5_000, b"second" * 5_000


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


@pytest.fixture
def volume(mount: Path) -> Volume:
    volume = Volume(init_volume(mount), mount, reserve_bytes=0)
    volume.probe()
    return volume


@pytest.fixture
def name() -> UUID:
    return uuid4()


def written(volume: Volume, name: UUID, *pieces: bytes) -> Hashed:
    """Appends in a request of its own, and lets go. Returns what that request knows of the hash."""
    file = ResumedFile(volume, name, None, Hashed())
    for piece in pieces:
        file.append([piece])
    file.sync()
    file.close()
    return file.hashed


def sha256(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def test_it_goes_on_where_it_stopped(volume: Volume, mount: Path, name: UUID) -> None:
    hashed = written(volume, name, FIRST)
    file = ResumedFile(volume, name, None, hashed)
    assert (file.name, file.size_bytes) == (name, len(FIRST))
    file.append([SECOND[:10], memoryview(SECOND)[10:]])
    assert file.sync() == file.size_bytes == len(FIRST + SECOND)
    assert file.catch_up() and file.sha256 == sha256(FIRST + SECOND)
    file.close()
    assert file.is_closed and (mount / "incoming" / str(name)).read_bytes() == FIRST + SECOND


def test_only_what_is_to_be_kept_is(volume: Volume, mount: Path, name: UUID) -> None:
    for keep_bytes, kept in ((None, FIRST), (len(FIRST) + 1, FIRST), (100, FIRST[:100]), (0, b"")):
        written(volume, name, FIRST)
        file = ResumedFile(volume, name, keep_bytes, Hashed())
        assert file.size_bytes == len(kept)
        file.append([SECOND])
        file.close()
        assert (mount / "incoming" / str(name)).read_bytes() == kept + SECOND
        (mount / "incoming" / str(name)).unlink()


def test_a_hash_of_more_than_was_kept_is_forgotten(volume: Volume, name: UUID) -> None:
    hashed = written(volume, name, FIRST)
    file = ResumedFile(volume, name, 100, hashed)
    file.append([SECOND])
    assert file.catch_up() and file.sha256 == sha256(FIRST[:100] + SECOND)


def test_what_was_appended_is_taken_back(volume: Volume, mount: Path, name: UUID) -> None:
    file = ResumedFile(volume, name, None, Hashed())
    file.append([FIRST])
    file.sync()
    safe = file.hashed
    for wrong in (SECOND, FIRST * 3):
        file.append([wrong])
        file.cut(len(FIRST), safe.copy())
        assert file.size_bytes == len(FIRST) == (mount / "incoming" / str(name)).stat().st_size
    file.append([SECOND])
    assert file.catch_up() and file.sha256 == sha256(FIRST + SECOND)
    assert safe.sha256.digest() == sha256(FIRST)  # what is remembered does not go on by itself


def test_bytes_of_another_process_are_hashed_along_the_way(volume: Volume, name: UUID) -> None:
    """Four of them for each that is appended, the rest at the end, in steps."""
    written(volume, name, FIRST)
    file = ResumedFile(volume, name, None, Hashed())
    file.append([SECOND[:1_000]])
    assert file.hashed.size_bytes == 4_000
    assert not file.catch_up(10_000) and file.hashed.size_bytes == 14_000
    file.append([SECOND[1_000:]])
    while not file.catch_up(5_000):
        pass
    assert file.sha256 == sha256(FIRST + SECOND)
    file.append([FIRST])  # it has caught up: nothing is read again
    assert file.sha256 == sha256(FIRST + SECOND + FIRST)


def test_its_ends_are_those_of_the_whole(volume: Volume, name: UUID) -> None:
    file = ResumedFile(volume, name, None, Hashed())
    assert file.ends() == (b"", b"")
    file.append([b"a" * 100_000, b"z" * 100_000])
    head, tail = file.ends()
    assert head and set(head) == {ord("a")} and tail and set(tail) == {ord("z")}


def test_one_has_it_at_a_time(volume: Volume, name: UUID) -> None:
    file = ResumedFile(volume, name, None, Hashed())
    file.append([FIRST])
    with pytest.raises(InUse):
        ResumedFile(volume, name, 0, Hashed())
    assert file.sync() == len(FIRST)  # whoever was refused has cut nothing
    file.close()
    file.close()
    ResumedFile(volume, name, None, Hashed()).close()


def test_another_process_keeps_it_until_it_ends(volume: Volume, mount: Path, name: UUID) -> None:
    path = mount / "incoming" / str(name)
    written(volume, name, FIRST)
    holds = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holds, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(InUse):
            ResumedFile(volume, name, None, Hashed())
        holder.kill()
    ResumedFile(volume, name, None, Hashed()).close()


def test_a_copy_of_what_a_hung_process_has(volume: Volume, mount: Path, name: UUID) -> None:
    hung = ResumedFile(volume, name, None, Hashed())
    hung.append([FIRST, SECOND])
    whole = ResumedFile(volume, uuid4(), 0, Hashed())
    whole.begin_with(name, len(FIRST), None)
    assert whole.size_bytes == len(FIRST + SECOND)
    copy = ResumedFile(volume, uuid4(), 0, Hashed())
    copy.begin_with(name, len(FIRST), len(FIRST))
    hung.append([b"too late"])
    copy.append([SECOND])
    assert copy.size_bytes == len(FIRST + SECOND)
    while not copy.catch_up():
        pass
    assert copy.sha256 == sha256(FIRST + SECOND)
    assert (mount / "incoming" / str(copy.name)).read_bytes() == FIRST + SECOND


@pytest.mark.parametrize("most", [None, len(FIRST) + 1])
@pytest.mark.parametrize("exists", [True, False])
def test_there_is_no_copy_of_bytes_that_are_gone(volume: Volume, name: UUID, exists: bool, most: int | None) -> None:
    if exists:
        written(volume, name, FIRST)
    with pytest.raises(Damaged):
        ResumedFile(volume, uuid4(), 0, Hashed()).begin_with(name, len(FIRST) + 1, most)
    with pytest.raises(Damaged):
        list(volume.pieces_of_incoming(name, len(FIRST) + 1))
    assert volume.state == "open"  # it is that upload's misfortune alone


def test_a_disk_that_fills_up_keeps_what_it_took(volume: Volume, mount: Path, name: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file ends where it is said to, so the client goes on there; the hash is that of what is in it."""
    file = ResumedFile(volume, name, None, Hashed())
    file.append([FIRST])
    writev = os.writev

    def full(fd: int, views: list[memoryview]) -> int:
        if file_size() >= len(FIRST) + 1_000:
            raise OSError(errno.ENOSPC, "full")
        return writev(fd, [views[0][:1_000]])

    def file_size() -> int:
        return (mount / "incoming" / str(name)).stat().st_size

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(VolumeFull):
        file.append([SECOND])
    monkeypatch.undo()
    assert file.sync() == file.size_bytes == file_size() == len(FIRST) + 1_000
    file.append([SECOND[1_000:]])
    while not file.catch_up():
        pass
    assert file.sha256 == sha256(FIRST + SECOND)


def test_a_sync_that_failed_is_not_retried(volume: Volume, name: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ResumedFile(volume, name, None, Hashed())
    file.append([FIRST])
    failing: Callable[[int], None] = _raiser(OSError(errno.EIO, "gone"))
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(VolumeReadOnly):
        file.sync()
    monkeypatch.undo()
    assert file.is_suspect
    for again in (file.sync, file.seal, lambda: file.cut(0, Hashed())):
        with pytest.raises(VolumeReadOnly):
            again()


def test_a_new_one_and_its_name_are_synced(volume: Volume, mount: Path, name: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()))
    written(volume, name, FIRST)
    assert synced == [mount / "incoming"]
    written(volume, name, SECOND)
    assert len(synced) == 1


def publish(volume: Volume, name: UUID, path: str) -> None:
    file = ResumedFile(volume, name, None, Hashed())
    file.catch_up()
    file.seal()
    file.publish(path)


def test_it_is_published_and_keeps_its_first_name(volume: Volume, mount: Path, name: UUID) -> None:
    path = stored_path("ada", "image", name, 1, "png")
    written(volume, name, FIRST)
    publish(volume, name, path)
    assert (mount / path).read_bytes() == (mount / "incoming" / str(name)).read_bytes() == FIRST
    publish(volume, name, path)  # after a crash before the commit: it is there already
    assert [each.name for each in (mount / "incoming").iterdir()] == [str(name)]
    other = uuid4()
    written(volume, other, FIRST)
    with pytest.raises(FileExistsError):  # equal bytes are not the same file
        publish(volume, other, path)


def test_what_was_removed_meanwhile_is_not_published(volume: Volume, mount: Path, name: UUID) -> None:
    file = ResumedFile(volume, name, None, Hashed())
    file.seal()
    (mount / "incoming" / str(name)).unlink()
    with pytest.raises(Conflict):
        file.publish(stored_path("ada", "image", name, 1, "png"))


def _raiser(problem: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise problem

    return fail
