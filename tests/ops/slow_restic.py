"""restic, stopped before what a test names until the test lets it go: the real one does the work."""

import os
import shutil
from pathlib import Path

import pytest

from tests.waiting import until

_SCRIPT = """\
#!/bin/sh
# The first run whose arguments match the pattern in stop-at waits for the file `go`.
if [ -e "{directory}/stop-at" ] && printf '%s' "$*" | grep -q -- "$(cat {directory}/stop-at)"; then
    echo $$ >"{directory}/pid.draft" && mv "{directory}/pid.draft" "{directory}/pid"
    while [ ! -e "{directory}/go" ]; do sleep 0.05; done
fi
exec {restic} "$@"
"""


class SlowRestic:
    """What stands for restic in PATH."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        restic = shutil.which("restic")
        assert restic is not None
        directory.mkdir()
        script = directory / "restic"
        script.write_text(_SCRIPT.format(directory=directory, restic=restic))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        self._directory = directory

    def stop_at(self, pattern: str) -> None:
        """Stops the next run whose arguments match."""
        for name in ("pid", "go"):
            (self._directory / name).unlink(missing_ok=True)
        (self._directory / "stop-at").write_text(pattern)

    def wait_until_stopped(self) -> int:
        """Returns the process that waits."""
        until((self._directory / "pid").exists)
        return int((self._directory / "pid").read_text())

    def go(self) -> None:
        """Lets it go on, and stops none any more."""
        (self._directory / "stop-at").unlink()
        (self._directory / "go").touch()
