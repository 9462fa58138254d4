"""Where previews are made: directories below the system's for temporary files (`TMPDIR`), one for each making."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = "coffer-preview-"
_LEFT_OVER_SECONDS = 24 * 3600.0
"""No making takes as long."""


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    """A context manager; a crash leaves the directory to `remove_left_over`."""
    return tempfile.TemporaryDirectory(prefix=_PREFIX)


def remove_left_over() -> None:
    """Removes what killed workers of the same user left, a day after."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # another worker does the same
            found = path.lstat()
            if found.st_uid == os.geteuid() and found.st_mtime < time.time() - _LEFT_OVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
