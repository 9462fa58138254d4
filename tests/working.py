"""`coffer worker` in a process of its own, beside a server of tests/serving.py."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import server.cli
from tests.launching import Forked, Main, kill_session
from tests.serving import DEFAULTS, RunningServer


class BackgroundWorker:
    """A worker on the database of a server. `main` is Coffer's, or one with a worker that tests have changed, with its `arguments`."""

    def __init__(
        self,
        server: RunningServer,
        log: Path,
        settings: dict[str, str],
        main: Main = server.cli.main,
        arguments: Sequence[str] = ("worker",),
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        environment |= DEFAULTS | {"COFFER_DATABASE_URL": server.database_url} | settings
        self.log = log
        self._process = Forked(arguments, environment, log, main)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        """Ended by SIGKILL, whoever sent it."""
        return self._process.poll() == -signal.SIGKILL

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def stop(self) -> None:
        """SIGTERM; it must end by itself, and well."""
        self.ask_to_stop()
        assert self._process.join(30) == 0, self.log.read_text()[-5000:]

    def pause(self) -> None:
        """SIGSTOP: it hangs, heartbeat and all."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT, after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, to it and its children."""
        kill_session(self._process)


@contextmanager
def working(server: RunningServer, log: Path, **settings: str) -> Iterator[BackgroundWorker]:
    """A worker until the end of the block, when it is killed if it still runs."""
    worker = BackgroundWorker(server, log, settings)
    try:
        yield worker
    finally:
        worker.kill()
