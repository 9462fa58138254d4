"""What a long run of `python -m tests.…` leaves behind: nothing, however it ends."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ops.scratch import directory_for_now


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory for a run, which SIGTERM and SIGHUP end as Ctrl-C does. What killed ones have left is removed first, and unmounted."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    with directory_for_now(parent.resolve(), prefix, before_removal=unmount_below) as directory:
        yield directory


def unmount_below(directory: Path) -> None:
    """Takes away the file systems that are mounted there, the last one first."""
    for mount in reversed(mounts_below(directory)):
        subprocess.run(["umount", "-l", mount], check=False)


def mounts_below(directory: Path) -> list[Path]:
    """In the order in which they were mounted."""
    mounts = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [mount for mount in mounts if mount.is_relative_to(directory)]


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # clients may take long to end: a second one does not wait, and leaves the rest to the next run
    sys.exit(128 + number)
