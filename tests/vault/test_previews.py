"""Previews on a volume: what is planted in their way, what fails half-way, and what is left when their file or its user has gone."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from server.errors import CofferError, VolumeFull, VolumeReadOnly
from server.vault import Volume
from server.vault.layout import previews_directory, stored_path

FILE_ID = uuid4()
DIRECTORY = previews_directory(stored_path("ada", "image", FILE_ID, 1, "png"), FILE_ID)
OLD, NEW = b"old" * 100, b"new" * 150
NAMES = ["320.webp", "640.webp"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "made"
    directory.mkdir()
    return directory


def make(made: Path, content: bytes) -> None:
    for name in NAMES:
        (made / name).write_bytes(content)


def there(mount: Path, directory: str = DIRECTORY) -> dict[str, bytes]:
    """What lies in a directory of previews, by name."""
    return {path.name: path.read_bytes() for path in (mount / directory).iterdir()}


def failing(name: str, nth: int, error: int) -> Callable[..., Any]:
    """The function of `os`, whose nth call fails."""
    real, numbers = getattr(os, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == nth:
            raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    return call


def test_storing_replaces_all_or_those_of_the_same_names(volume: Volume, mount: Path, made: Path) -> None:
    make(made, OLD)
    assert volume.store_previews(DIRECTORY, made, NAMES) == [len(OLD)] * 2
    make(made, NEW)
    assert volume.store_previews(DIRECTORY, made, NAMES[:1], keep_others=True) == [len(NEW)]
    assert there(mount) == {"320.webp": NEW, "640.webp": OLD}
    volume.store_previews(DIRECTORY, made, NAMES[:1])
    assert there(mount) == {"320.webp": NEW}


@pytest.mark.parametrize("name", ["../x.webp", "a/b.webp", ".320.webp", "320", "", "320.webp\n"])
def test_a_name_leads_nowhere_else(volume: Volume, made: Path, name: str) -> None:
    make(made, NEW)
    with pytest.raises(ValueError):
        volume.store_previews(DIRECTORY, made, [name])
    with pytest.raises(ValueError):
        volume.remove_preview(f"{DIRECTORY}/{name}")


@pytest.mark.parametrize("what", ["symlink", "directory", "fifo", "nothing"])
def test_a_decoder_that_leaves_no_plain_file_gives_no_preview(volume: Volume, mount: Path, made: Path, tmp_path: Path, what: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"another user's")
    match what:
        case "symlink":
            (made / NAMES[0]).symlink_to(secret)
        case "directory":
            (made / NAMES[0]).mkdir()
        case "fifo":
            os.mkfifo(made / NAMES[0])
    with pytest.raises((ValueError, FileNotFoundError, CofferError)):
        volume.store_previews(DIRECTORY, made, NAMES[:1])
    assert there(mount) == {}


@pytest.mark.parametrize("what", ["symlink", "hard link", "fifo"])
def test_nothing_is_written_through_what_was_planted(volume: Volume, mount: Path, made: Path, tmp_path: Path, what: str) -> None:
    """Under the name that a preview has while it is written, and under its own."""
    victim = mount / "victim"
    victim.write_bytes(b"somebody's")
    make(made, NEW)
    (mount / DIRECTORY).mkdir(parents=True)
    for name in (f".{NAMES[0]}", NAMES[0]):
        planted = mount / DIRECTORY / name
        match what:
            case "symlink":
                planted.symlink_to(victim)
            case "hard link":
                planted.hardlink_to(victim)
            case "fifo":
                os.mkfifo(planted)
    volume.store_previews(DIRECTORY, made, NAMES)
    assert there(mount) == dict.fromkeys(NAMES, NEW)
    assert victim.read_bytes() == b"somebody's"


def test_a_symbolic_link_in_the_place_of_a_directory_is_not_followed(volume: Volume, mount: Path, made: Path, tmp_path: Path) -> None:
    make(made, NEW)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / NAMES[0]).write_bytes(b"kept")
    (mount / DIRECTORY).parent.mkdir(parents=True)
    (mount / DIRECTORY).symlink_to(elsewhere)
    for act in (
        lambda: volume.store_previews(DIRECTORY, made, NAMES),
        lambda: volume.remove_previews(DIRECTORY),
        lambda: volume.remove_late_previews(DIRECTORY),
        lambda: volume.remove_preview(f"{DIRECTORY}/{NAMES[0]}"),
        lambda: volume.open_stored(f"{DIRECTORY}/{NAMES[0]}"),
    ):
        with pytest.raises((OSError, CofferError)):
            act()
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {NAMES[0]: b"kept"}


def test_a_symbolic_link_among_previews_goes_without_what_it_leads_to(volume: Volume, mount: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"kept")
    (mount / DIRECTORY).mkdir(parents=True)
    (mount / DIRECTORY / "a").symlink_to(kept)
    (mount / DIRECTORY / "b").symlink_to(kept / "file")
    volume.remove_previews(DIRECTORY)
    assert not (mount / DIRECTORY).exists() and (kept / "file").read_bytes() == b"kept"


@pytest.mark.parametrize("what", ["removes", "stores"])
def test_removing_bears_what_others_do_meanwhile(
    volume: Volume, mount: Path, made: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A second eraser at the same previews, or a worker that stores its last ones there."""
    make(made, NEW)
    volume.store_previews(DIRECTORY, made, NAMES)
    real, others = os.rmdir, [True]

    def meanwhile(path: str, *, dir_fd: int) -> None:
        if others and others.pop():
            if what == "removes":
                real(path, dir_fd=dir_fd)
            else:
                (mount / DIRECTORY / "late.webp").touch()
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", meanwhile)
    volume.remove_user("/".join(DIRECTORY.split("/")[1:2]))
    assert not others
    assert list((mount / "users").iterdir()) == []


@pytest.mark.parametrize(("error", "expected"), [(errno.ENOSPC, VolumeFull), (errno.EDQUOT, VolumeFull), (errno.EROFS, VolumeReadOnly)])
@pytest.mark.parametrize("call", ["sendfile", "rename"])
def test_what_fails_half_way_leaves_whole_previews_and_no_rest(
    volume: Volume, mount: Path, made: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, expected: type[CofferError]
) -> None:
    make(made, OLD)
    volume.store_previews(DIRECTORY, made, NAMES)
    make(made, NEW)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing(call, 2, error))
        with pytest.raises(expected):
            volume.store_previews(DIRECTORY, made, NAMES)
    left = there(mount)
    assert left.pop(NAMES[0]) in {OLD, NEW} and left.pop(NAMES[1]) == OLD
    assert call == "rename" or left == {}  # the next storing takes what is left
    volume.probe()
    volume.store_previews(DIRECTORY, made, NAMES)
    assert there(mount) == dict.fromkeys(NAMES, NEW)


def test_a_failed_sync_closes_the_volume(volume: Volume, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(made, NEW)
    volume.store_previews(DIRECTORY, made, NAMES)
    for nth in (1, 2, 3):  # each file, then their directory
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing("fsync", nth, errno.EIO))
            with pytest.raises(VolumeReadOnly):
                volume.store_previews(DIRECTORY, made, NAMES)
        assert volume.unrecorded_fault is not None
        volume.apply_row("read_only")
        volume.apply_row("open")
        volume.probe()


def test_each_file_is_synced_before_it_has_its_name(volume: Volume, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(made, NEW)
    volume.store_previews(DIRECTORY, made, NAMES)
    calls: list[str] = []

    def watched(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    volume.store_previews(DIRECTORY, made, NAMES)
    assert calls == ["fsync", "rename", "fsync", "rename", "fsync"]


def test_late_previews_go_with_the_directories_that_nothing_else_is_in(volume: Volume, mount: Path, made: Path) -> None:
    make(made, NEW)
    for others in ([], ["images"], ["previews/another"]):
        volume.store_previews(DIRECTORY, made, NAMES)
        for other in others:
            (mount / "users" / "ada" / other).mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            volume.remove_late_previews(DIRECTORY)
            left = {str(path.relative_to(mount)) for path in (mount / "users").glob("**/*")}
            assert left - {"users/ada/previews"} == ({"users/ada", *(f"users/ada/{other}" for other in others)} if others else set())
        volume.remove_user("ada")
