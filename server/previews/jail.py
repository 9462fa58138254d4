"""Runs a decoder's command where it can do no harm: `run`.

The command has no network, reads its input and the system's libraries, writes into its output directory, starts no process, and has
bounded memory, CPU time, file size and wall-clock time. `confinement` does it from inside, in a child of `commands`, which becomes the
command.
"""

import asyncio
import atexit
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

import server
from server.previews import commands
from server.previews.commands import Command, Ended
from server.previews.confinement import Limits
from server.previews.models import Unmakeable

MIB = 2**20

INPUT = f"/proc/self/fd/{commands.INPUT_FD}"
"""How a command calls its input: it learns no path. A program may also read the descriptor itself (ffmpeg: `-fd 3 -i fd:`)."""

DECODER_LIMITS = Limits(memory_bytes=1536 * MIB, cpu_seconds=120, file_bytes=64 * MIB)
"""For ffmpeg on one thread: an 8K frame in 10 bits is 100 MB, and H.265 refers to up to six of that size."""

WALL_SECONDS = 180.0

# Where Debian and others keep shared libraries and what the dynamic linker wants; nothing here is private to the machine.
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_LONGEST_TEXT_BYTES = 16 * MIB
_LACK = {
    "namespaces": "user and network namespaces (unshare is refused; the filter of system calls still leaves no network)",
    "files": "Landlock (needs Linux 5.13): a decoder that is taken over could read what the worker's own user can",
    "system calls": "a seccomp filter (Coffer has one for x86_64 and aarch64)",
}

log = logging.getLogger("coffer.previews")
_told: set[str] = set()


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended: its status (negative is the signal that killed it) and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes


def tell_missing(missing: Iterable[str]) -> None:
    """Logs once in a process what the sandbox could not have here."""
    for layer in missing:
        if layer not in _told:
            _told.add(layer)
            log.warning("the preview sandbox runs without %s", _LACK[layer], extra={"missing": layer})


async def run(
    command: Sequence[str], source: Path, output: Path, *, limits: Limits = DECODER_LIMITS, wall_seconds: float = WALL_SECONDS
) -> Finished:
    """Runs the command, which calls the file `source` `INPUT`, in the directory `output`, and waits until it has ended.

    Raises `Unmakeable` "too_slow" past its CPU or wall-clock time, and "too_large" past its file size, or 16 MiB on one of its outputs;
    what else its status means is the caller's to judge. However it ends, cancellation included, nothing of it runs on.
    """
    request = _request(command, output, limits)
    with source.open("rb", buffering=0) as file, _memory("stdout") as stdout, _memory("stderr") as stderr:
        starter = _taken()
        try:
            async with asyncio.timeout(wall_seconds):
                ended = await starter.run(request, [file.fileno(), stdout.fileno(), stderr.fileno()])
        except BaseException as problem:
            await asyncio.shield(asyncio.to_thread(starter.kill))
            if isinstance(problem, TimeoutError):
                raise Unmakeable("too_slow") from None
            raise
        _idle.append(starter)
        texts = [_written(each) for each in (stdout, stderr)]
    if ended.missing is None:
        raise RuntimeError(f"the sandbox could not be entered: {texts[1].decode(errors='replace')[-500:]}")
    tell_missing(ended.missing)
    if ended.status == -signal.SIGXCPU:
        raise Unmakeable("too_slow")
    if ended.status == -signal.SIGXFSZ or any(len(text) > _LONGEST_TEXT_BYTES for text in texts):
        raise Unmakeable("too_large")
    return Finished(status=ended.status, stdout=texts[0], stderr=texts[1])


def _request(command: Sequence[str], output: Path, limits: Limits) -> bytes:
    """A program that is not there raises FileNotFoundError."""
    found = shutil.which(command[0])
    if found is None:
        raise FileNotFoundError(command[0])
    program, directory = str(Path(found).resolve()), str(output.resolve())
    return msgspec.msgpack.encode(
        Command(
            program=program,
            arguments=[program, *command[1:]],
            directory=directory,
            readable=[INPUT, *_DEVICES],
            executable=[program, *_LIBRARIES],
            writable=[directory, "/dev/null"],
            limits=limits,
        )
    )


def _memory(name: str) -> BinaryIO:
    """A file without a path, for an output that nobody has to read meanwhile. The limit on the command's files holds for it, too."""
    return os.fdopen(os.memfd_create(name), "rb", buffering=0)


def _written(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(_LONGEST_TEXT_BYTES + 1)


class Starter:
    """A process of `commands`. It ends with the thread that made it."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._alive, their_life = os.pipe()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", commands.__name__, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={"PYTHONPATH": str(Path(server.__file__).parent.parent), "LC_ALL": "C.UTF-8"},
                    pass_fds=(theirs.fileno(), their_life),
                    start_new_session=True,
                )
            finally:
                os.close(their_life)

    def lives(self) -> bool:
        return self._process.poll() is None

    async def run(self, request: bytes, descriptors: list[int]) -> Ended:
        """Runs one command at a time, with these descriptors (`Command`). After any error, `kill`."""
        socket.send_fds(self._control, [request], descriptors)
        said = await asyncio.get_running_loop().sock_recv(self._control, 65_536)
        if not said:
            raise RuntimeError("the starter of commands died")
        return msgspec.msgpack.decode(said, type=Ended)

    def kill(self) -> None:
        """Ends the process and its command, and waits until both have ended."""
        self._process.kill()
        self._process.wait()
        os.read(self._alive, 1)  # both have the other end: nothing comes, but its closing
        os.close(self._alive)
        self._control.close()


_idle: list[Starter] = []


def _taken() -> Starter:
    """One that is idle and still lives, or a new one."""
    while _idle:
        starter = _idle.pop()
        if starter.lives():
            return starter
        starter.kill()
    return Starter()


@atexit.register
def close_starters() -> None:
    """Ends those that are idle."""
    while _idle:
        _idle.pop().kill()
