"""A worker in a process of its own, beside the server of tests/serving.py: the real one, or one whose decoder is a stub."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.previews import decoders
from tests.serving import DEFAULTS, RunningServer


class RunningWorker:
    """A worker on the database of a server; `module` is what Python runs."""

    def __init__(self, server: RunningServer, log: Path, module: Sequence[str], settings: dict[str, str]) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        environment |= DEFAULTS | {"COFFER_DATABASE_URL": server.database_url} | settings
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", *module]
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def stop(self) -> None:
        """SIGTERM; it must end by itself, and well."""
        self.ask_to_stop()
        assert self._process.wait(20) == 0, self.log.read_text()[-5000:]

    def pause(self) -> None:
        """SIGSTOP: it hangs, heartbeat and all."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT, after `pause`."""
        self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        """Ended by SIGKILL, whoever sent it."""
        return self._process.poll() == -signal.SIGKILL

    def kill(self) -> None:
        """SIGKILL, to it and its children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


WorkerFactory = Callable[..., RunningWorker]
RealWorkerFactory = Callable[..., RunningWorker]


@pytest.fixture
def start_worker(server: RunningServer, tmp_path: Path) -> Iterator[WorkerFactory]:
    """Starts the worker of stub_worker.py, which takes `seconds_each`."""
    with _workers(server, tmp_path) as start:
        yield lambda seconds_each=0.0, **settings: start(["tests.previews.stub_worker", str(seconds_each)], settings)


@pytest.fixture
def start_real_worker(server: RunningServer, tmp_path: Path) -> Iterator[RealWorkerFactory]:
    """Starts `coffer worker`, as `make run` does; with `impatient`, the one of impatient_worker.py."""
    with _workers(server, tmp_path) as start:
        modules = {False: ["server.cli", "worker"], True: ["tests.previews.impatient_worker"]}
        yield lambda impatient=False, **settings: start(modules[impatient], settings)


@contextmanager
def _workers(server: RunningServer, directory: Path) -> Iterator[Callable[[Sequence[str], dict[str, str]], RunningWorker]]:
    started: list[RunningWorker] = []

    def start(module: Sequence[str], settings: dict[str, str]) -> RunningWorker:
        worker = RunningWorker(server, directory / f"worker-{len(started)}.log", module, settings)
        started.append(worker)
        return worker

    try:
        yield start
    finally:
        for worker in started:
            worker.kill()


@pytest.fixture(autouse=True, scope="module")
def shared_decoders_end() -> Iterator[None]:
    """Those that a module's tests have started end with it."""
    yield
    if decoders.shared.cache_info().currsize:
        decoders.shared().close()
        decoders.shared.cache_clear()
