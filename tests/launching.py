"""Coffer's commands in processes of their own, which end with the tests, however those end. Each has a session and a log of its own."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

import server.cli
from server.intake import housekeeping
from server.previews.confinement import end_with_parent

__all__ = ["Executed", "Forked", "Launched", "Main", "kill_session"]

Main = Callable[[Sequence[str]], object]


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
    """A command as a service manager would start it, `within` a command that becomes it."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path, *, within: Sequence[str] = ()) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *within, sys.executable, "-m", "server.cli", *arguments]
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


def kill_session(process: Launched) -> None:
    """SIGKILL, to a command and its children, and waits until it has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or does not lead its session yet
        process.kill()
    process.join()


_TIDY_SECONDS = 3.0  # a fifth of what it is otherwise: many tests wait until a server has tidied up

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """A command in a process that has imported everything already: to do that anew for each server took half of the tests' time.

    Python's fork server imports it once (tests/preloaded.py). Not for measuring: the process knows the tests' main module too. `main` is
    Coffer's, or another one of a module's top level.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path, main: Main = server.cli.main) -> None:
        log.touch()
        self._process: ForkServerProcess = _context.Process(target=_become, args=(main, list(arguments), environment, log))
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


def _become(main: Main, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    end_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    nothing, said = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
    for to, of in ((0, nothing), (1, said), (2, said)):
        os.dup2(of, to)
    housekeeping._TIDY_SECONDS = _TIDY_SECONDS
    sys.stdin = os.fdopen(0)  # another number would not be inherited by the processes that a server starts
    main(arguments)
