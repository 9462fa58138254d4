"""A worker in a process of its own, beside the server of tests/serving.py: the real one, or one whose decoder is a stub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.previews import decoders
from server.previews.decoders import READER_COMMAND, Decoders
from tests.previews import impatient_worker, stub_worker
from tests.serving import RunningServer
from tests.working import BackgroundWorker

WorkerFactory = Callable[..., BackgroundWorker]
RealWorkerFactory = Callable[..., BackgroundWorker]


@pytest.fixture
def start_worker(server: RunningServer, tmp_path: Path) -> Iterator[WorkerFactory]:
    """Starts the worker of stub_worker.py, which takes `seconds_each`."""
    with _workers(server, tmp_path) as start:
        yield lambda seconds_each=0.0, **settings: start(settings, stub_worker.main, [str(seconds_each)])


@pytest.fixture
def start_real_worker(server: RunningServer, tmp_path: Path) -> Iterator[RealWorkerFactory]:
    """Starts `coffer worker`, as `make run` does; with `impatient`, the one of impatient_worker.py."""
    with _workers(server, tmp_path) as start:
        yield lambda impatient=False, **settings: start(settings, impatient_worker.main) if impatient else start(settings)


@pytest.fixture
def start_real_worker_of(tmp_path: Path) -> Iterator[Callable[[RunningServer], BackgroundWorker]]:
    """Starts `coffer worker` beside a server that has settings of its own."""
    started: list[BackgroundWorker] = []

    def start(server: RunningServer) -> BackgroundWorker:
        started.append(BackgroundWorker(server, tmp_path / f"own-worker-{len(started)}.log", {}))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


@contextmanager
def _workers(server: RunningServer, directory: Path) -> Iterator[WorkerFactory]:
    started: list[BackgroundWorker] = []

    def start(settings: dict[str, str], *program: Any) -> BackgroundWorker:
        started.append(BackgroundWorker(server, directory / f"worker-{len(started)}.log", settings, *program))
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            worker.kill()


@pytest.fixture(scope="module")
def reader() -> Iterator[Decoders]:
    """Reads what files say of their making, in the jail."""
    reading = Decoders(1, READER_COMMAND)
    yield reading
    reading.close()


@pytest.fixture(autouse=True, scope="module")
def shared_decoders_end() -> Iterator[None]:
    """Those that a module's tests have started end with it."""
    yield
    if decoders.shared.cache_info().currsize:
        decoders.shared().close()
        decoders.shared.cache_clear()
