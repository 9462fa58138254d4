"""What can be told of a volume by trying it: whether it is mounted as it should be, keeps what it is given, and has room."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

from server.vault.layout import INCOMING
from server.vault.volume import Handle, Volume

Verdict = Literal["ok", "advice", "wrong"]

_PROBE = os.urandom(64 * 1024)
_FORGETFUL = frozenset({"tmpfs", "ramfs"})


class Check(NamedTuple):
    """`wrong` endangers bytes or keeps them out; `advice` is for a better night's sleep."""

    name: str
    verdict: Verdict
    text: str


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo (proc(5)): where, what, and the options of this mount and of its file system."""

    point: Path
    kind: str
    options: frozenset[str]


def mount_of(path: Path, mountinfo: str) -> Mount:
    """The mount that a path lies on: of those above it the longest, and of several there the last."""
    best = Mount(Path("/"), "unknown", frozenset())
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, of_file_system) = before.split(), after.split(" ", 2)
        point = Path(fields[4].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= len(best.point.parts):
            best = Mount(point, kind, frozenset(fields[5].split(",")) | frozenset(of_file_system.split(",")))
    return best


def verify(volume: Volume, mountinfo: str | None = None) -> Iterator[Check]:
    """Looks at everything once; writes, syncs, reads and removes a file of 64 KiB. Blocks. `mountinfo` is this machine's when left out."""
    volume.probe()
    if volume.state == "unavailable":
        yield Check("sentinel", "wrong", volume.reason)
        return
    yield Check("sentinel", "ok", f"it is volume {volume.id}")
    mount = mount_of(volume.mount.resolve(), Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo)
    yield from _check_mount(volume, mount)
    yield _check_writing(volume)
    yield from _check_room(volume)


def _check_mount(volume: Volume, mount: Mount) -> Iterator[Check]:
    if mount.point != volume.mount.resolve():
        yield Check("mount", "advice", f"no file system of its own: it shares that of {mount.point}, which fills up with it")
    elif mount.kind in _FORGETFUL:
        yield Check("mount", "wrong", f"{mount.kind} is memory: it forgets everything when the machine stops")
    else:
        yield Check("mount", "ok", f"{mount.kind}, a file system of its own")
    wrong = [option for option in ("ro", "nobarrier", "barrier=0") if option in mount.options]
    if wrong:
        yield Check("options", "wrong", f"mounted with {', '.join(wrong)}: bytes are refused, or lost by a power cut though synced")
        return
    missing = [option for option in ("nodev", "nosuid", "noexec") if option not in mount.options]
    if not mount.options & {"noatime", "relatime"}:
        missing.append("noatime")
    if mount.kind.startswith("ext") and "errors=remount-ro" not in mount.options:
        missing.append("errors=remount-ro")
    if missing:
        yield Check("options", "advice", f"better mounted with {','.join(missing)}")
    else:
        yield Check("options", "ok", ",".join(sorted(mount.options)))


def _check_writing(volume: Volume) -> Check:
    if volume.state == "read_only":
        return Check("writing", "wrong", f"it is read-only: {volume.reason}")
    root = volume.root()
    name = f"{INCOMING}/{uuid4()}"  # so named, housekeeping removes it should we die
    try:
        file = Handle(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640, dir_fd=root.fd))
        try:
            directory = Handle(volume.incoming(root))
            os.pwrite(file.fd, _PROBE, 0)
            os.fsync(file.fd)
            os.fsync(directory.fd)
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from memory
            is_kept = os.pread(file.fd, len(_PROBE), 0) == _PROBE
        finally:
            os.unlink(name, dir_fd=root.fd)
        os.fsync(directory.fd)
    except OSError as problem:
        return Check("writing", "wrong", f"a file could not be written, synced, read and removed: {problem.strerror}")
    if not is_kept:
        return Check("writing", "wrong", "what was read back is not what was written and synced")
    return Check("writing", "ok", "a file was written, synced, read back and removed")


def _check_room(volume: Volume) -> Iterator[Check]:
    free_bytes, inodes = volume.free_bytes(), volume.free_inodes()
    yield Check("space", "ok" if free_bytes > 0 else "wrong", f"{max(0, free_bytes):,} bytes above the reserve")
    if inodes is None:
        yield Check("inodes", "ok", "as many as there is space")
    else:
        yield Check("inodes", "ok" if inodes > 0 else "wrong", f"{max(0, inodes):,} above the reserve")
