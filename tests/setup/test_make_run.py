"""`make run` and `make stop`, as `python -m ops.run`: what they print, keep, refuse, and how everything ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.processes import has_ended
from tests.samples import image
from tests.serving import execute
from tests.waiting import until

START_SECONDS = 60


class Supervisor:
    """`make run` on a directory, in a process of its own."""

    def __init__(self, data: Path, port: int = 0, **environment: str) -> None:
        self.data = data
        self.said = data.parent / "said"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL"))}
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ops.run", "start", "--port", str(port), "--data", str(data)],
                env=clean | environment,
                stdout=said,
                stderr=said,
            )

    def wait_until_ready(self) -> dict[str, Any]:
        """What run.json says, once the welcome is printed."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.said.read_text()
            return "stops everything" in self.said.read_text()

        until(is_ready, START_SECONDS)
        run: dict[str, Any] = json.loads((self.data / "run.json").read_text())
        return run

    def ended(self) -> tuple[int, str]:
        """Its exit status and everything it said, once it has ended."""
        status = self.process.wait(START_SECONDS)
        return status, self.said.read_text()


@contextmanager
def supervised(data: Path, port: int = 0, **environment: str) -> Iterator[Supervisor]:
    supervisor = Supervisor(data, port, **environment)
    try:
        yield supervisor
    finally:
        supervisor.process.kill()
        supervisor.process.wait()
        with suppress(FileNotFoundError):
            until_gone(json.loads((data / "run.json").read_text())["pids"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the tests of this module that do not need a fresh one; each starts and stops everything on it."""
    return tmp_path_factory.mktemp("a place with spaces") / "data"


def stop(data: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ops.run", "stop", "--data", str(data)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=START_SECONDS)


def until_gone(pids: dict[str, int]) -> None:
    until(lambda: all(has_ended(pid) for pid in pids.values()))


def shell(commands: str, directory: Path) -> str:
    done = subprocess.run(["bash", "-euc", commands], cwd=directory, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_printed_commands_work_and_a_second_start_keeps_data_and_key(data: Path, tmp_path: Path) -> None:
    photo = image(50_000)
    (tmp_path / "photo.jpg").write_bytes(photo)
    with supervised(data) as supervisor:
        run = supervisor.wait_until_ready()
        assert set(run) == {"url", "api_key", "database_url", "volume", "pids"}
        assert set(run["pids"]) == {"supervisor", "server", "worker", "postgres"}
        for private in ("run.json", "api_key"):
            assert (data / private).stat().st_mode & 0o777 == 0o600
        welcome = supervisor.said.read_text()
        assert run["url"] in welcome
        assert run["api_key"] in welcome
        commands = re.findall(r"^  ((?:export|curl) .*)$", welcome, re.MULTILINE)
        answers = shell("\n".join(f"{command}; echo" for command in commands).replace("curl ", "curl -sSf "), tmp_path)
        assert '"file_name":"photo.jpg"' in answers
        assert '"used_bytes":50000' in answers
        assert stop(data).returncode == 0
        assert supervisor.ended()[0] == 0
        until_gone(run["pids"])
        assert not (data / "run.json").exists()
    with supervised(data) as supervisor:
        again = supervisor.wait_until_ready()
        assert again["api_key"] == run["api_key"]
        listed = shell(f"curl -sSf -H 'Authorization: Bearer {again['api_key']}' -H 'X-User-Id: user_1' {again['url']}/api/files", tmp_path)
        assert [file["file_name"] for file in json.loads(listed)["files"]] == ["photo.jpg"]
        supervisor.process.send_signal(signal.SIGINT)
        status, said = supervisor.ended()
        assert (status, said.splitlines()[-1]) == (0, "coffer: stopped")
        until_gone(again["pids"])


def test_a_second_start_is_refused_and_a_stop_without_a_start_is_not(data: Path) -> None:
    with supervised(data) as supervisor:
        run = supervisor.wait_until_ready()
        command = [sys.executable, "-m", "ops.run", "start", "--port", "0", "--data", str(data)]
        second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
        assert second.returncode == 1
        assert "already runs" in second.stderr
        assert json.loads((data / "run.json").read_text()) == run
        assert supervisor.process.poll() is None
        assert stop(data).returncode == 0
    for place in (data, data / "nothing"):
        assert stop(place).returncode == 0


def test_killing_the_supervisor_ends_everything_and_a_stale_run_file_is_no_obstacle(data: Path) -> None:
    with supervised(data) as supervisor:
        run = supervisor.wait_until_ready()
        supervisor.process.kill()
        supervisor.process.wait()
        # At once, while the old ones are still ending.
        with supervised(data, port=int(run["url"].rpartition(":")[2])) as successor:
            renewed = successor.wait_until_ready()
            until_gone(run["pids"])
            successor.process.kill()
            successor.process.wait()
            until_gone(renewed["pids"])
    assert (data / "run.json").exists()
    done = stop(data)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (data / "run.json").exists()


@pytest.mark.parametrize("child", ["worker", "server", "postgres"])
def test_a_child_that_ends_by_itself_ends_the_rest(data: Path, child: str) -> None:
    with supervised(data) as supervisor:
        run = supervisor.wait_until_ready()
        os.kill(run["pids"][child], signal.SIGKILL)
        status, said = supervisor.ended()
        assert status == 1
        assert re.search(f"(?i){child}.* ended by itself", said)
        until_gone(run["pids"])


def test_a_stop_in_the_middle_of_a_start_leaves_nothing_running(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for awaited in ("starting PostgreSQL", "applied migration", "waiting until"):
        with supervised(data) as supervisor:
            until(lambda said=supervisor.said, awaited=awaited: awaited in said.read_text(), START_SECONDS)  # type: ignore[misc]
            supervisor.process.terminate()
            status, said = supervisor.ended()
            assert status == 0, said
            directory = str(data).encode()
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    assert directory not in (process / "cmdline").read_bytes()
        if awaited == "applied migration":
            break
    with supervised(data) as supervisor:
        supervisor.wait_until_ready()


def test_a_database_of_ones_own(data: Path, tmp_path: Path, empty_database_url: str) -> None:
    with supervised(tmp_path / "data", DATABASE_URL=empty_database_url) as supervisor:
        run = supervisor.wait_until_ready()
        assert run["database_url"] == empty_database_url
        assert "postgres" not in run["pids"]
        assert not (tmp_path / "data" / "postgres").exists()
        rows = execute(empty_database_url, "select mount_path from volumes")
        assert [row["mount_path"] for row in rows] == [run["volume"]]


def test_a_volume_that_lost_its_sentinel_is_never_made_anew(data: Path) -> None:
    sentinel = data / "volume" / ".coffer-volume"
    sentinel.rename(data / "aside")
    try:
        with supervised(data) as supervisor:
            status, said = supervisor.ended()
            assert status == 1
            assert "Is it mounted?" in said
            assert not sentinel.exists()
    finally:
        (data / "aside").rename(sentinel)


def test_data_may_move(data: Path) -> None:
    moved = data.with_name("moved")
    data.rename(moved)
    try:
        with supervised(moved) as supervisor:
            assert supervisor.wait_until_ready()["volume"] == str(moved / "volume")
            assert stop(moved).returncode == 0
    finally:
        moved.rename(data)


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, supervised(tmp_path / "data", port=taken.getsockname()[1]) as supervisor:
        status, said = supervisor.ended()
        assert status == 1
        assert "make run PORT=" in said
        assert not (tmp_path / "data" / "postgres").exists()
