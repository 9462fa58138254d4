"""Small disks of their own for volumes that are to fail, and the ways in which they do. Only root can make them."""

import ctypes
import fcntl
import functools
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import until

MIB = 2**20
_EXT4_IOC_SHUTDOWN, _NO_FLUSH = 0x8004587D, 2  # linux/ext4.h
_MNT_DETACH = 2


class SmallDisk:
    """An ext4 of 64 MiB with 4,096 inodes on a loop device, mounted at `mount`. Raises `CalledProcessError` where that cannot be."""

    def __init__(self, directory: Path) -> None:
        self.picture, self.mount = directory / "disk.img", directory / "disk"
        self.mount.mkdir()
        with self.picture.open("wb") as file:
            file.truncate(64 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-N", "4096", self.picture], check=True)
        self.mount_again()

    def mount_again(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.picture, self.mount], check=True, capture_output=True)

    def unmount(self) -> None:
        """As somebody does who does not ask who uses it."""
        subprocess.run(["umount", "-l", self.mount], check=False, capture_output=True)

    def make_read_only(self) -> None:
        """As the kernel does after some errors; unlike the kernel at a moment when no file is open to be written."""
        until(lambda: subprocess.run(["mount", "-o", "remount,ro", self.mount], check=False, capture_output=True).returncode == 0)

    def make_writable(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", self.mount], check=True)

    def fill(self, left_bytes: int) -> None:
        """Leaves so much."""
        facts = os.statvfs(self.mount)
        subprocess.run(["fallocate", "--length", str(facts.f_bavail * facts.f_frsize - left_bytes), self.mount / "filler"], check=True)

    def fail_file_system(self) -> None:
        """From now on the file system answers everything with an I/O error, and says nothing by itself."""
        root = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(root, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_FLUSH))
        finally:
            os.close(root)

    def fail_device(self) -> None:
        """The disk below the file system is gone: what the kernel remembers of it can be read on."""
        os.truncate(self.picture, 0)


@functools.cache
def why_no_disks() -> str | None:
    """Why there can be no disks here, to be told by tests that are skipped for it: they need root, loop devices and the right to mount."""
    with tempfile.TemporaryDirectory(prefix="coffer-disk-") as directory:
        try:
            SmallDisk(Path(directory)).unmount()
        except (OSError, subprocess.CalledProcessError) as problem:
            return f"no disk image can be mounted (needs root, loop devices and Debian's e2fsprogs): {problem}"
    return None


@contextmanager
def stuck_mount(mount: Path) -> Iterator[None]:
    """Over `mount` lies a file system of which every question stays without an answer, as a network's that is gone; until the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    connection = os.open("/dev/fuse", os.O_RDWR)  # nobody ever reads from it
    options = f"fd={connection},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"stuck", os.fsencode(mount), b"fuse", 0, options):
        os.close(connection)
        raise OSError(ctypes.get_errno(), "mounting a FUSE without a daemon")
    try:
        yield
    finally:
        os.close(connection)  # those who wait get an error
        libc.umount2(os.fsencode(mount), _MNT_DETACH)
