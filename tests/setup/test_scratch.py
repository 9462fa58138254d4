"""Long runs of the tests leave nothing behind, however they end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.scratch import mounts_below

RUN = """
import sys
from pathlib import Path
from tests.scratch import scratch
with scratch(Path(sys.argv[1]), "coffer-run-") as directory:
    (directory / "large").write_bytes(bytes(1000))
    (directory / "disk").mkdir()
    print(directory, flush=True)
    sys.stdin.read()
"""
Start = Callable[[], tuple["subprocess.Popen[str]", Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a run, and gives its directory."""
    started: list[subprocess.Popen[str]] = []

    def run() -> tuple["subprocess.Popen[str]", Path]:
        process = subprocess.Popen([sys.executable, "-c", RUN, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield run
    for each in started:
        each.kill()
        each.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_told_to_end_removes_what_it_made(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process, _ = start()
    process.send_signal(number)
    assert process.wait(60) == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(start: Start, tmp_path: Path) -> None:
    killed, left = start()
    _, living = start()
    with suppress(subprocess.CalledProcessError):  # needs root
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", left / "disk"], check=True, capture_output=True)
    killed.kill()
    killed.wait()
    for directory in (left, living):
        os.utime(directory, (0, 0))
    _, new = start()
    assert set(tmp_path.iterdir()) == {living, new}
    assert (living / "large").exists()
    assert mounts_below(tmp_path) == []
