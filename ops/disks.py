"""File systems on block devices: made, mounted where nothing else can be written, remembered over a reboot, and grown while in use.

Every function may be repeated after a crash at any moment. Failures are `CommandFailed` with what the command said. Only root can do this.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from server.commands.failures import CommandFailed, Exit

KINDS = ("ext4", "xfs")
FSTAB = Path("/etc/fstab")
UNITS = Path("/etc/systemd/system")

_OPTIONS = {
    # nofail: a server without this volume still boots, and Coffer says that it is away. Nobody runs or owns anything on a store of media.
    # After an I/O error of its own ext4 stays readable and takes no more writes; XFS shuts itself down, and has no option for it.
    "ext4": "defaults,nofail,noatime,nodev,nosuid,noexec,errors=remount-ro",
    "xfs": "defaults,nofail,noatime,nodev,nosuid,noexec",
}
_PROBE_FOUND_NOTHING = 2  # blkid(8)
_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file system is mounted, and the two files that remember it. systemd prefers its unit to the line in fstab."""

    mount: Path
    fstab: Path = FSTAB
    units: Path = UNITS

    @property
    def unit(self) -> Path:
        """The mount unit, under the one name that systemd takes (systemd.unit(5), "String Escaping for Inclusion in Unit Names")."""
        name = "-".join(re.sub(r"[^A-Za-z0-9:_.]", _escape, part) for part in self.mount.parts[1:])
        return self.units / (re.sub(r"^\.", _escape, name) + ".mount")


def _escape(character: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character[0].encode())


def wait_for(device: Path) -> None:
    """Until the device is there: the cloud says that it is attached some moments before the kernel does."""
    _until(device.exists, f"{device} has not appeared")


def wait_for_size(device: Path, size_bytes: int) -> None:
    """Until the device is as large as the cloud says."""
    _until(lambda: size_of(device) >= size_bytes, f"{device} is still smaller than {size_bytes} bytes")


def size_of(device: Path) -> int:
    """In bytes."""
    return int(_run("blockdev", "--getsize64", device))


def file_system_of(device: Path) -> str | None:
    """What is on the device: `ext4`, `xfs`, another name, or None for nothing at all."""
    with device.open("rb") as raw:
        raw.read(4096)  # blkid says of an unreadable device, too, that it found nothing
    probed = subprocess.run(["blkid", "-p", "-o", "value", "-s", "TYPE", device], capture_output=True, text=True, check=False)
    if probed.returncode == _PROBE_FOUND_NOTHING:
        return None
    return probed.stdout.strip() or "something that blkid does not know"


def make_file_system(device: Path, kind: str) -> None:
    """Formats the device. Refuses one that holds anything: no option of Coffer's erases a disk."""
    if (found := file_system_of(device)) is not None:
        raise CommandFailed(f"{device} holds {found} already, and is not formatted", Exit.REFUSED)
    if kind == "ext4":
        # Coffer keeps a reserve of its own, so root needs none. The superblock is written last: a crash leaves nothing that looks whole.
        _run("mkfs.ext4", "-q", "-m", "0", "-e", "remount-ro", device)
    else:
        _run("mkfs.xfs", "-q", device)


def mounted_at(device: Path) -> tuple[Path, str] | None:
    """Where the device is mounted, and with which file system."""
    try:
        number = device.stat().st_rdev
    except FileNotFoundError:
        return None
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if fields[2] == wanted and fields[3] == "/":
            return Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4])), after.split()[0]
    return None


def check_bare(mount: Path) -> None:
    """Refuses a place where something is, or is mounted."""
    if os.path.ismount(mount):
        raise CommandFailed(f"something else is mounted at {mount}", Exit.REFUSED)
    if mount.exists() and (not mount.is_dir() or any(mount.iterdir())):
        raise CommandFailed(f"{mount} is not empty: what is in it would be hidden", Exit.REFUSED)


def mount(device: Path, kind: str, place: Place) -> None:
    """Mounts the device, over a directory that nobody can write into while it is not mounted, and has this remembered.

    Refuses a directory that has something in it, and one at which something else is mounted.
    """
    if (there := mounted_at(device)) is not None and there[0] != place.mount:
        raise CommandFailed(f"{device} is mounted at {there[0]} already", Exit.REFUSED)
    if there is None:
        check_bare(place.mount)
        place.mount.mkdir(parents=True, exist_ok=True)
        _run("chattr", "+i", place.mount)
    remember(device, kind, place)
    if there is None:
        _run("mount", "-t", kind, "-o", _OPTIONS[kind], device, place.mount)


def remember(device: Path, kind: str, place: Place) -> None:
    """The line in fstab and the mount unit. Changes nothing when they are there."""
    line = f"{device} {_in_fstab(place.mount)} {kind} {_OPTIONS[kind]} 0 {2 if kind == 'ext4' else 0}"
    lines = place.fstab.read_text().splitlines() if place.fstab.exists() else []
    if line not in lines:
        for other in lines:
            if other.split()[1:2] == [_in_fstab(place.mount)] and not other.lstrip().startswith("#"):
                raise CommandFailed(f"{place.fstab} has another line for {place.mount}: {other}", Exit.REFUSED)
        _write(place.fstab, "\n".join([*lines, line]) + "\n")
    # The unit is wanted, and not required, by the system's start: as nofail has it.
    _write(
        place.unit,
        f"# The same as the line in {place.fstab}, for systemd, which reads this first. Made by `coffer hetzner`.\n"
        f"[Unit]\nDescription=Coffer volume at {place.mount}\n\n"
        f"[Mount]\nWhat={device}\nWhere={place.mount}\nType={kind}\nOptions={_OPTIONS[kind]}\nTimeoutSec=60\n\n"
        "[Install]\nWantedBy=multi-user.target\n",
    )
    wanted = place.units / "multi-user.target.wants" / place.unit.name
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        wanted.symlink_to(place.unit)
    _tell_systemd(place)


def unmount(place: Place) -> None:
    """Unmounts, and has the mount forgotten. Refuses while anybody uses it."""
    if os.path.ismount(place.mount):
        unmounted = subprocess.run(["umount", place.mount], capture_output=True, text=True, check=False)
        if unmounted.returncode:
            raise CommandFailed(f"{unmounted.stderr.strip()}: stop Coffer's server and worker, and restart nginx, first", Exit.REFUSED)
    if place.fstab.exists():
        lines = place.fstab.read_text().splitlines()
        kept = [line for line in lines if line.split()[1:2] != [_in_fstab(place.mount)] or line.lstrip().startswith("#")]
        if kept != lines:
            _write(place.fstab, "\n".join(kept) + "\n")
    for path in (place.units / "multi-user.target.wants" / place.unit.name, place.unit):
        path.unlink(missing_ok=True)
    _tell_systemd(place)


def grow(device: Path, place: Path, kind: str) -> None:
    """Makes the mounted file system as large as its device, in use as it is. Nothing happens when it is."""
    if kind == "ext4":
        _run("resize2fs", device)
    else:
        _run("xfs_growfs", "-d", place)


def free_percent(mount: Path) -> float:
    """Of the file system's bytes."""
    facts = os.statvfs(mount)
    return 100 * facts.f_bavail / facts.f_blocks


def _in_fstab(path: Path) -> str:
    return re.sub(r"[ \t\n\\]", lambda found: f"\\{ord(found[0]):03o}", str(path))


def _write(path: Path, text: str) -> None:
    """Replaces a file as a whole, durably, where it differs: half a line in fstab may keep a server from booting."""
    path = path.resolve()
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.coffer")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
    draft.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _tell_systemd(place: Place) -> None:
    if place.units == UNITS and Path("/run/systemd/system").is_dir():
        _run("systemctl", "daemon-reload")


def _until(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise CommandFailed(f"{otherwise} within {_PATIENCE_SECONDS:.0f} s; run the same command again", Exit.UNAVAILABLE)
        time.sleep(_LOOK_SECONDS)


def _run(command: str, *arguments: str | Path) -> str:
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CommandFailed(f"there is no {command}: install e2fsprogs or xfsprogs, and util-linux", Exit.UNAVAILABLE) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise CommandFailed(f"{command} ended with {done.returncode}: {said}")
    return done.stdout
