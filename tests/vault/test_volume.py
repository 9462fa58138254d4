"""The vault against a real directory: order, faults at every call, volumes that go away."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from server.errors import CofferError, DigestMismatch, VolumeFull, VolumeReadOnly, VolumeUnavailable
from server.vault import IncomingFile, Volume
from server.vault.layout import stored_path
from server.vault.sentinel import init_volume

BODY = [b"first " * 1000, b"second"]
WHOLE = b"".join(BODY)


def store(volume: Volume, file_id: UUID, expected: dict[str, bytes] | None = None) -> str:
    path = stored_path("ada", "image", file_id, 1, "png")
    file = IncomingFile(volume, file_id, expected or {})
    try:
        file.append(BODY)
        file.seal()
        file.publish(path)
    except BaseException:
        file.discard()
        raise
    return path


def stored_files(mount: Path) -> list[Path]:
    return [path for path in (mount / "users").rglob("*") if path.is_file()]


def test_bytes_arrive_whole_under_their_final_name_and_leave_incoming(volume: Volume, mount: Path) -> None:
    path = store(volume, uuid4(), {"sha-256": hashlib.sha256(WHOLE).digest(), "md5": hashlib.md5(WHOLE).digest()})  # noqa: S324
    fd = volume.open_stored(path)
    assert os.read(fd, 100_000) == WHOLE
    os.close(fd)
    assert list((mount / "incoming").iterdir()) == []


def test_nothing_is_ever_overwritten(volume: Volume, mount: Path) -> None:
    file_id = uuid4()
    path = store(volume, file_id)
    (mount / path).write_bytes(b"somebody's file")
    with pytest.raises(FileExistsError):
        store(volume, file_id)
    assert (mount / path).read_bytes() == b"somebody's file"


def test_a_wrong_digest_publishes_nothing(volume: Volume, mount: Path) -> None:
    with pytest.raises(DigestMismatch):
        store(volume, uuid4(), {"sha-256": bytes(32)})
    assert stored_files(mount) == [] and list((mount / "incoming").iterdir()) == []


def test_order_is_sync_file_link_sync_directory(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def watched(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*arguments, **options)

        return call

    for name in ("fdatasync", "link", "fsync"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    store(volume, uuid4())
    store(volume, uuid4())
    # The first upload of a user also syncs the parents of the two directories it made: users/ and users/ada.
    assert calls == ["fdatasync", "fsync", "fsync", "link", "fsync", "fdatasync", "link", "fsync"]


def failing_at(nth: int, error: int) -> Callable[[Any], Any]:
    """Wraps functions so that the nth call of any of them fails; remembers how often syncs were called afterwards."""
    state = {"calls": 0, "syncs_after": 0, "failed": 0}

    def wrap(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            state["calls"] += 1
            if state["failed"] and name in ("fsync", "fdatasync"):
                state["syncs_after"] += 1
            if state["calls"] == nth:
                state["failed"] = 1
                state["what"] = name  # type: ignore[assignment]
                raise OSError(error, os.strerror(error))
            return real(*arguments, **options)

        return call

    wrap.state = state  # type: ignore[attr-defined]
    return wrap  # type: ignore[return-value]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_an_error_at_any_call_of_an_upload_is_never_a_success(mount: Path, error: int) -> None:
    volume_id = init_volume(mount)
    nth = 0
    while True:
        nth += 1
        volume = Volume(volume_id, mount, reserve_bytes=0)
        volume.probe()
        wrap: Any = failing_at(nth, error)
        before = len(stored_files(mount))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "writev", "fdatasync", "link", "unlink", "fsync", "mkdir"):
                patch.setattr(os, name, wrap(name, getattr(os, name)))
            try:
                store(volume, uuid4())
                succeeded = True
            except CofferError as problem:
                succeeded = False
                expected = VolumeFull if error == errno.ENOSPC else VolumeReadOnly
                syncing = wrap.state["what"] in ("fsync", "fdatasync")
                assert isinstance(problem, VolumeReadOnly if syncing else expected)
                if syncing or error == errno.EIO:
                    assert volume.state == "read_only" and volume.unrecorded_fault
                    with pytest.raises(VolumeReadOnly):
                        volume.check_writable(0)
        assert succeeded is not bool(wrap.state["failed"])
        assert wrap.state["syncs_after"] == 0
        assert list((mount / "incoming").iterdir()) == []
        if succeeded:
            assert len(stored_files(mount)) == before + 1
            break
        shutil.rmtree(mount / "users" / "ada", ignore_errors=True)
    assert nth > 10  # every kind of call was made to fail once


def test_short_writes_are_continued(volume: Volume, mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: real(fd, [memoryview(views[0])[:7]]))
    path = store(volume, uuid4())
    assert (mount / path).read_bytes() == WHOLE


def test_a_fault_lasts_until_a_sysadmin_reopens_the_row(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(VolumeReadOnly):
            store(volume, uuid4())
    volume.apply_row("open")  # the row does not know yet
    volume.probe()
    assert volume.state == "read_only"
    volume.apply_row("read_only")  # now it does
    volume.probe()
    assert volume.unrecorded_fault is None and volume.state == "read_only"
    volume.apply_row("open")  # and somebody reopened it
    volume.probe()
    store(volume, uuid4())


def test_a_bare_mountpoint_takes_no_byte(volume: Volume, mount: Path) -> None:
    mount.rename(mount.parent / "elsewhere")
    mount.mkdir()  # what an unmounted volume leaves behind
    volume.probe()
    assert volume.state == "unavailable"
    with pytest.raises(VolumeUnavailable):
        store(volume, uuid4())
    assert list(mount.iterdir()) == []
    mount.rmdir()
    (mount.parent / "elsewhere").rename(mount)
    volume.probe()
    store(volume, uuid4())


def test_another_volumes_sentinel_is_not_accepted(volume: Volume, mount: Path) -> None:
    (mount / ".coffer-volume").write_text(f"{uuid4()}\n")
    volume.probe()
    assert volume.state == "unavailable"


def test_a_volume_that_went_away_in_mid_upload_takes_no_file(volume: Volume, mount: Path) -> None:
    file = IncomingFile(volume, uuid4(), {})
    file.append(BODY)
    file.seal()
    mount.rename(mount.parent / "elsewhere")
    volume.probe()
    with pytest.raises(VolumeUnavailable):
        file.publish(stored_path("ada", "image", uuid4(), 1, "png"))


def test_a_symbolic_link_on_the_way_is_not_followed(volume: Volume, mount: Path, tmp_path: Path) -> None:
    path = store(volume, uuid4())
    real = tmp_path / "moved"
    (mount / "users" / "ada").rename(real)
    (mount / "users" / "ada").symlink_to(real)
    with pytest.raises(OSError):
        volume.open_stored(path)


def test_a_file_that_was_just_there_is_opened_at_once(volume: Volume, mount: Path, tmp_path: Path) -> None:
    """And nothing else is, whatever the kernel has in memory: no link, no path that is not ours, no volume that is away."""
    path = store(volume, uuid4())
    os.close(volume.open_stored(path))
    fd = volume.open_at_once(path)
    assert fd is not None
    assert os.read(fd, 100_000) == WHOLE and not os.get_inheritable(fd)
    os.close(fd)
    missing = stored_path("ada", "image", uuid4(), 1, "png")
    assert volume.open_at_once(missing) is None
    for strange in ("../etc/passwd", "users/ada/../ada/images/x", "/etc/passwd"):
        with pytest.raises(ValueError):
            volume.open_at_once(strange)

    file = mount / path
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")
    assert file.read_bytes() == WHOLE
    assert volume.open_at_once(path) is None
    file.unlink()
    file.with_name("elsewhere").rename(file)
    (mount / "users" / "ada").rename(tmp_path / "moved")
    (mount / "users" / "ada").symlink_to(tmp_path / "moved")
    assert file.read_bytes() == WHOLE
    assert volume.open_at_once(path) is None

    mount.rename(mount.parent / "gone")
    volume.probe()
    with pytest.raises(VolumeUnavailable):
        volume.open_at_once(path)


def test_the_reserve_is_kept(mount: Path) -> None:
    volume = Volume(init_volume(mount), mount, reserve_bytes=2**62)
    volume.probe()
    assert volume.state == "full"
    with pytest.raises(VolumeFull):
        volume.check_writable(0)


def test_removing_is_safe_to_repeat_and_erasing_leaves_no_trace(volume: Volume, mount: Path) -> None:
    paths = [store(volume, uuid4()) for _ in range(3)]
    volume.remove_stored(paths[:2])
    volume.remove_stored(paths[:2])
    assert stored_files(mount) == [mount / paths[2]]
    volume.remove_user("ada")
    volume.remove_user("ada")
    assert list((mount / "users").iterdir()) == []


def test_a_volume_is_made_once(mount: Path) -> None:
    init_volume(mount)
    with pytest.raises(FileExistsError):
        init_volume(mount)
