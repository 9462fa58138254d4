"""Coffer's commands in processes of their own, which end with the tests, however those end. Each has a session and a log of its own."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

import server.cli
from server.previews.confinement import end_with_parent

__all__ = ["Executed", "Forked", "Launched"]


class Launched(Protocol):
    """A running command."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """How it ended; negative is a signal."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""

    def join(self, timeout_seconds: float | None = None) -> int:
        """Waits, and returns how it ended. Raises TimeoutError."""


class Executed:
    """A command as a service manager would start it."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "server.cli", *arguments]
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        self.pid = self._process.pid
        self.poll = self._process.poll
        self.terminate = self._process.terminate
        self.kill = self._process.kill

    def join(self, timeout_seconds: float | None = None) -> int:
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "server.app"])


class Forked:
    """A command in a process that has imported everything already: to do that anew for each server took half of the tests' time.

    Python's fork server imports it once. Not for measuring: the process knows the tests' main module too.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        log.touch()
        self._process: ForkServerProcess = _context.Process(target=_become, args=(list(arguments), environment, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.terminate = self._process.terminate
        self.kill = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def join(self, timeout_seconds: float | None = None) -> int:
        self._process.join(timeout_seconds)
        if self._process.exitcode is None:
            raise TimeoutError
        return self._process.exitcode


def _become(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    end_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    nothing, said = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
    for to, of in ((0, nothing), (1, said), (2, said)):
        os.dup2(of, to)
    sys.stdin = os.fdopen(0)  # another number would not be inherited by the processes that a server starts
    server.cli.main(arguments)
