"""What killed workers leave among the system's temporary files."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from server.previews.scratch import remove_left_over, scratch_directory

OLD_SECONDS = 25 * 3600


def test_only_old_leftovers_of_ours_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old = time.time() - OLD_SECONDS
    with scratch_directory() as at_work:
        left = Path(tempfile.mkdtemp(prefix=Path(at_work).name[:15]))
        (left / "640.webp").write_bytes(b"half")
        other, planted = tmp_path / "other", tmp_path / "coffer-preview-planted"
        other.mkdir()
        (other / "file").touch()
        planted.symlink_to(other)
        for path in (left, other, planted):
            os.utime(path, (old, old), follow_symlinks=False)
        remove_left_over()
        assert not left.exists()
        assert Path(at_work).exists() and (other / "file").exists()
