"""Has the kernel fail a running server's calls as a broken disk would: any one of them, by its number, in whatever thread it is made.

The server starts with a seccomp filter that asks us about each call which changes files (seccomp_unotify(2)); all of it, HTTP, threads and
system calls, is the real one. x86_64 and aarch64 only; root.
"""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.previews.confinement import end_with_parent
from tests.launching import Launched

Fault = int | Literal["short"]
"""An errno, or a write that takes only half of the bytes."""

# fmt: off
_CALLS = {
    "write": (1, 64), "writev": (20, 66), "pwrite64": (18, 68), "pwritev": (296, 70), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "openat": (257, 56), "mkdirat": (258, 34), "linkat": (265, 37), "unlinkat": (263, 35), "renameat": (264, 38),
    "renameat2": (316, 276),
}
# fmt: on
_MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}  # column, AUDIT_ARCH_*, the number of seccomp(2)
_COLUMN, _ARCHITECTURE, _SECCOMP = _MACHINES.get(os.uname().machine, (0, 0, 0))
_NAMES = {numbers[_COLUMN]: name for name, numbers in _CALLS.items()}
_LOAD, _EQUAL, _BITS_SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # linux/filter.h
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_SET_FILTER, _NEW_LISTENER = 1, 8
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # SECCOMP_IOCTL_NOTIF_*
_NOTICE = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, number, architecture, instruction, arguments
_ANSWER = struct.Struct("=QqiI")
_WRITES, _AT = {"write", "writev", "pwrite64", "pwritev"}, {"openat", "mkdirat", "linkat", "unlinkat", "renameat", "renameat2"}


@dataclass(frozen=True)
class Call:
    """A call that changed something below the directory, or was to. `path` is relative to it."""

    name: str
    path: str
    failed: bool = False


class FaultyDisk:
    """What stands between a server and what lies below a directory. `launch` starts the server."""

    def __init__(self, below: Path) -> None:
        self._below = f"{below}/"
        self._lock = threading.Lock()
        self._strike_at = 0
        self._fault: Fault = 0
        self.calls: list[Call] = []
        self.struck: Call | None = None

    def arm(self, number: int, fault: Fault) -> None:
        """From now on calls are counted, and the one of that number (from 1 on; 0: none) fails; only it."""
        with self._lock:
            self._strike_at, self._fault, self.calls, self.struck = number, fault, [], None

    def launch(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> Launched:
        """As `tests.launching.Executed`."""
        ours, theirs = socket.socketpair()
        with ours, theirs, log.open("ab") as said:
            command = [sys.executable, "-m", "tests.torture.faults", str(theirs.fileno()), *arguments]
            process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            theirs.close()
            _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
        return _Started(process)

    def _listen(self, listener: int) -> None:
        notice = bytearray(_NOTICE.size)
        with os.fdopen(listener, "rb"):
            while True:
                notice[:] = bytes(_NOTICE.size)
                try:
                    fcntl.ioctl(listener, _RECEIVE, notice)
                except FileNotFoundError:  # who asked was killed
                    continue
                except OSError:
                    return
                call_id, pid, _, number, _, _, *arguments = _NOTICE.unpack(notice)
                value, error = 0, 0
                flags = _CONTINUE
                with suppress(OSError):  # it has ended, or uses a descriptor that is none
                    answer = self._judge(pid, _NAMES[number], arguments)
                    if answer is not None:
                        (value, error), flags = answer, 0
                with suppress(OSError):
                    fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(call_id, value, -error, flags)))

    def _judge(self, pid: int, name: str, arguments: list[int]) -> tuple[int, int] | None:
        """What the call is to return, as its value and errno; None: it goes on."""
        directory = Path(f"/proc/{pid}/fd/{arguments[0]}").readlink() if arguments[0] < 2**31 else Path()
        target = str(directory / _text(pid, arguments[1])) if name in _AT else str(directory)
        if not target.startswith(self._below):
            return None
        with self._lock:
            call = Call(name, target.removeprefix(self._below))
            fault = self._fault
            if len(self.calls) + 1 != self._strike_at or (fault == "short" and name != "writev"):
                self.calls.append(call)
                return None
            self.struck = Call(call.name, call.path, failed=True)
            self.calls.append(self.struck)
        return (_write_half(pid, arguments), 0) if fault == "short" else (0, fault)


class _Started:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid
        self.poll, self.terminate, self.kill = process.poll, process.terminate, process.kill

    def join(self, timeout_seconds: float | None = None) -> int:
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None


def _memory(pid: int, address: int, size: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def _text(pid: int, address: int) -> str:
    found = b""
    while b"\0" not in found:  # up to the end of a page: the next one may not be there
        found += _memory(pid, address + len(found), 4096 - (address + len(found)) % 4096)
    return os.fsdecode(found.partition(b"\0")[0])


def _write_half(pid: int, arguments: list[int]) -> int:
    """Writes the first half of what a writev was to write, where it was to, and returns how much that is."""
    fd, vectors, count = arguments[:3]
    places = struct.iter_unpack("QQ", _memory(pid, vectors, 16 * count))
    content = b"".join(_memory(pid, address, size) for address, size in places)
    process = os.pidfd_open(_group_of(pid))
    try:
        theirs = ctypes.CDLL(None, use_errno=True).syscall(438, process, fd, 0)  # pidfd_getfd(2): the same open file, with its offset
        try:
            return os.write(theirs, content[: (len(content) + 1) // 2])
        finally:
            os.close(theirs)
    finally:
        os.close(process)


def _group_of(thread: int) -> int:
    lines = Path(f"/proc/{thread}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))


def _program() -> bytes:
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    for number, name in _NAMES.items():
        if name == "openat":  # only those that may make a file
            program += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, 32),
                (_BITS_SET, 0, 1, os.O_CREAT),
                (_RETURN, 0, 0, _ASK),
                (_RETURN, 0, 0, _ALLOW),
            ]
        else:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ASK)]
    return b"".join(struct.pack("HBBI", *each) for each in [*program, (_RETURN, 0, 0, _ALLOW)])


def _become(to: socket.socket, arguments: list[str]) -> None:
    """Puts the filter on this process, hands out its end, and becomes the server."""
    program = _program()
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("H6xQ", len(program) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    listener = ctypes.CDLL(None, use_errno=True).syscall(_SECCOMP, _SET_FILTER, _NEW_LISTENER, header)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp(2) gives no listener")
    socket.send_fds(to, [b"x"], [listener])
    os.close(listener)
    end_with_parent()
    os.execv(sys.executable, [sys.executable, "-m", "server.cli", *arguments])  # noqa: S606


if __name__ == "__main__":
    _become(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
