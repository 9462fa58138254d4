"""A database and a directory for an hour."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MOMENT_SECONDS = 60


@contextmanager
def directory_for_now(parent: Path, prefix: str, before_removal: Callable[[Path], object] = lambda _: None) -> Iterator[Path]:
    """A directory below `parent` that ends with the block, or, when this process is killed, with the next one of that prefix.

    Others may only pass it: PostgreSQL, which refuses to be root, may have its place below. `before_removal` is told of each that a
    killed one has left.
    """
    _remove_left_overs(parent, prefix, before_removal)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    life = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(life, fcntl.LOCK_EX)
        directory.chmod(0o711)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(life)


def _remove_left_overs(parent: Path, prefix: str, before_removal: Callable[[Path], object]) -> None:
    """Who lives has locked its directory, but for the moment after it was made."""
    for directory in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            life = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                facts = os.fstat(life)
                if facts.st_uid == os.geteuid() and facts.st_mtime < time.time() - _MOMENT_SECONDS:
                    fcntl.flock(life, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    before_removal(directory)
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(life)
