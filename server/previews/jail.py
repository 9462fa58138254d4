"""Runs a decoder's command where it can do no harm: `run`.

The command has no network, reads its input and the system's libraries, writes into its output directory, starts no process, and has
bounded memory, CPU time, file size and wall-clock time. `confinement` does it from inside, in the process that becomes the command.
"""

import asyncio
import logging
import marshal
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from server.previews import confinement
from server.previews.confinement import Limits
from server.previews.models import Unmakeable

MIB = 2**20

INPUT = f"/proc/self/fd/{confinement.INPUT_FD}"
"""How a command calls its input: it learns no path. A program may also read the descriptor itself (ffmpeg: `-fd 3 -i fd:`)."""

DECODER_LIMITS = Limits(memory_bytes=1536 * MIB, cpu_seconds=120, file_bytes=64 * MIB)
"""For ffmpeg on one thread: an 8K frame in 10 bits is 100 MB, and H.265 refers to up to six of that size."""

WALL_SECONDS = 180.0

NICE = 10
"""Decoders yield the processor to uploads and downloads."""

# Where Debian and others keep shared libraries and what the dynamic linker wants; nothing here is private to the machine.
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
CONFINED = f"import sys; sys.path.append({str(Path(confinement.__file__).parent)!r}); import confinement; confinement.main()"
"""What Python runs to confine itself. Behind the library's own modules, and by import, which finds it compiled: for a quick start."""

_LONGEST_TEXT_BYTES = 16 * MIB
_LACK = {
    "namespaces": "user and network namespaces (unshare is refused; the filter of system calls still leaves no network)",
    "files": "Landlock (needs Linux 5.13): a decoder that is taken over could read what the worker's own user can",
    "system calls": "a seccomp filter (Coffer has one for x86_64 and aarch64)",
}

log = logging.getLogger("coffer.previews")
_told: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
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

    Raises `Unmakeable` "too_slow" past its CPU or wall-clock time, and "too_large" past its file size or 16 MiB on one of its outputs;
    what else its status means is the caller's to judge. However it ends, cancellation included, nothing of it runs on.
    """
    opened = [os.open(source, os.O_RDONLY | os.O_CLOEXEC), *os.pipe()]
    source_fd, report, report_inside = opened
    try:
        process = await asyncio.create_subprocess_exec(
            *_confined(command, source_fd, report_inside, output, limits),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=output,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"},
            pass_fds=(source_fd, report_inside),
            start_new_session=True,
        )
        os.close(opened.pop())
        try:
            async with asyncio.timeout(wall_seconds):
                stdout, stderr = await asyncio.gather(_read(process.stdout), _read(process.stderr))
                status = await process.wait()
        except TimeoutError:
            raise Unmakeable("too_slow") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
        told = os.read(report, 4096)
    finally:
        for fd in opened:
            os.close(fd)
    if not told:  # it never came as far as the command
        raise RuntimeError(f"the sandbox could not be entered: {stderr.decode(errors='replace')[-500:]}")
    tell_missing(marshal.loads(told))  # noqa: S302 - of our own, before it became the command
    if status == -signal.SIGXCPU:
        raise Unmakeable("too_slow")
    if status == -signal.SIGXFSZ:
        raise Unmakeable("too_large")
    return Finished(status=status, stdout=stdout, stderr=stderr)


def _confined(command: Sequence[str], source_fd: int, report_fd: int, output: Path, limits: Limits) -> list[str]:
    """The command line that confines itself before it becomes the command. A program that is not there raises FileNotFoundError."""
    found = shutil.which(command[0])
    if found is None:
        raise FileNotFoundError(command[0])
    program = str(Path(found).resolve())
    asked = {
        "limits": limits.as_dict(),
        "nice": NICE,
        "parent": os.getpid(),
        "source": source_fd,
        "report": report_fd,
        "readable": [f"/proc/self/fd/{confinement.INPUT_FD}", *_DEVICES],
        "executable": [program, *_LIBRARIES],
        "writable": [str(output.resolve()), "/dev/null"],
    }
    return [sys.executable, "-I", "-S", "-c", CONFINED, marshal.dumps(asked).hex(), program, *command[1:]]


async def _read(pipe: asyncio.StreamReader | None) -> bytes:
    assert pipe is not None  # noqa: S101 - both were asked for
    text = bytearray()
    while piece := await pipe.read(65_536):
        text += piece
        if len(text) > _LONGEST_TEXT_BYTES:
            raise Unmakeable("too_large")
    return bytes(text)
