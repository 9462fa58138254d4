"""A decoder that does not decode but tries to break out: `python -m tests.previews.captive <layers> <user id> <descriptor>`.

It is the decoder's own program, with its way of entering the jail, and another `render`: a job's type names the attempt, whose outcome
comes back as the answer's detail. `layers` are those of the jail to put on, joined by commas; the others are told to be missing.
"""

import ctypes
import encodings.idna  # noqa: F401 - which could not be loaded any more
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from server.previews import confinement, images
from server.previews.images import Answer, Job
from server.previews.models import Made, MadeFile

ATTEMPTS: dict[str, Callable[[str], object]] = {}
_libc = ctypes.CDLL(None, use_errno=True)
WORKER = os.getppid()
_remembered: list[str] = []


def attempt(does: Callable[[str], object]) -> Callable[[str], object]:
    ATTEMPTS[does.__name__] = does
    return does


def _called(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result


@attempt
def make_socket(_: str) -> None:
    socket.socket().close()


@attempt
def make_unix_socket(_: str) -> None:
    socket.socket(socket.AF_UNIX).close()


@attempt
def make_socket_pair(_: str) -> object:
    return len(socket.socketpair())


@attempt
def connect(port: str) -> None:
    socket.create_connection(("127.0.0.1", int(port)), 5).close()


@attempt
def read(path: str) -> object:
    return Path(path).read_bytes()


@attempt
def list_files(path: str) -> object:
    return list(Path(path).parent.iterdir())


@attempt
def overwrite(path: str) -> object:
    return Path(path).write_bytes(b"gone")


@attempt
def append(path: str) -> object:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    return os.write(fd, b"more")


@attempt
def create(path: str) -> None:
    os.close(os.open(f"{path}.new", os.O_CREAT | os.O_WRONLY))


@attempt
def delete(path: str) -> None:
    Path(path).unlink()


@attempt
def rename(path: str) -> object:
    return Path(path).rename(f"{path}.renamed")


@attempt
def link(path: str) -> None:
    Path(f"{path}.link").symlink_to("/")


@attempt
def change_mode(path: str) -> None:
    Path(path).chmod(0o600)


@attempt
def change_mode_at(path: str) -> None:
    os.chmod(path, 0o600, dir_fd=0)  # by another system call than Path.chmod


@attempt
def call(number: str) -> object:
    """With arguments that no call takes for good."""
    return _called(_libc.syscall(int(number), -1, -1, -1, -1, -1, -1))


@attempt
def change_times(path: str) -> None:
    os.utime(path, (1, 1))


@attempt
def fork(_: str) -> object:
    return os.fork() or os._exit(0)


@attempt
def spawn(_: str) -> object:
    return os.posix_spawn("/bin/true", ["true"], {})


@attempt
def execute(_: str) -> object:
    return os.execv("/bin/false", ["false"])  # noqa: S606 - what is tried


@attempt
def signal_worker(_: str) -> None:
    os.kill(WORKER, 0)


@attempt
def signal_all(_: str) -> None:
    os.kill(-1, 0)


@attempt
def trace_worker(_: str) -> object:
    return _called(_libc.ptrace(0x4206, WORKER, None, None))  # PTRACE_SEIZE, which does not stop it


@attempt
def limit_worker(_: str) -> object:
    return resource.prlimit(WORKER, resource.RLIMIT_CORE)


@attempt
def write_code(_: str) -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


@attempt
def execute_what_was_written(_: str) -> None:
    with mmap.mmap(-1, 4096) as memory:
        written = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(written)
        del written
        _called(_libc.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_EXEC))


@attempt
def new_namespace(_: str) -> object:
    return _called(_libc.unshare(0x10000000))


@attempt
def raise_limit(_: str) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError as problem:
        raise PermissionError(errno.EPERM, str(problem)) from problem


@attempt
def start_threads(_: str) -> object:
    done = threading.Event()
    started = []
    threading.stack_size(64 * 1024)  # or it is memory that ends first
    try:
        for _number in range(200):
            started.append(threading.Thread(target=done.wait))
            started[-1].start()
    except RuntimeError as problem:
        raise OSError(errno.EAGAIN, str(problem)) from problem
    finally:
        done.set()
    return len(started)


@attempt
def take_memory(_: str) -> object:
    return len(bytearray(4 * 2**30))


@attempt
def spin(_: str) -> object:
    while True:
        pass


@attempt
def hang(_: str) -> object:
    threading.Event().wait()
    return None


@attempt
def crash(_: str) -> object:
    return ctypes.string_at(0)


@attempt
def remember(word: str) -> object:
    _remembered.append(word)
    os.dup(0)
    return f"{_remembered}"


@attempt
def descriptors(_: str) -> object:
    found = []
    for fd in range(64):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            continue
        found.append(fd)
    return len(found)


def _webp(**changes: object) -> Answer:
    file = MadeFile(**({"variant": "320", "name": "320.webp", "mime_type": "image/webp", "width": 1, "height": 1} | changes))  # type: ignore[arg-type]
    return Answer(made=Made(files=[file], width=1, height=1), contents=[b"RIFF"])


LIES: dict[str, Answer] = {
    "a path": _webp(name="../source"),
    "an absolute path": _webp(name="/tmp/320.webp"),
    "another width": _webp(name="321.webp", variant="321"),
    "another variant": _webp(variant="1280"),
    "another type": _webp(mime_type="text/html"),
    "no content": Answer(made=_webp().made),
    "no files": Answer(),
    "other bytes": Answer(made=_webp().made, contents=[b"<script>"]),
    "twice": Answer(made=Made(files=_webp().made.files * 2), contents=[b"RIFF"] * 2),
    "a huge width": _webp(width=2**40),
    "no width": _webp(width=0),
    "a long hash": Answer(made=Made(files=_webp().made.files, thumbhash=bytes(1000)), contents=[b"RIFF"]),
    "a strange colour": Answer(made=Made(files=_webp().made.files, average_color="url(x)"), contents=[b"RIFF"]),
    "an unknown reason": Answer(reason="hello"),  # type: ignore[arg-type]
}


def render(image_fds: Sequence[int], job: Job) -> Answer:
    name, _, argument = job.mime_types[0].partition(" ")
    if name == "lie":
        return LIES[argument]
    if name == "flood":
        return Answer(contents=[bytes(100 * 2**20)])
    try:
        return Answer(detail=f"done: {ATTEMPTS[name](argument)}")
    except OSError as problem:
        return Answer(detail=f"refused: {errno.errorcode.get(problem.errno or 0, 'unknown')}")


def main() -> None:
    layers = sys.argv[1].split(",")
    if "namespaces" not in layers:
        confinement._leave_namespaces = lambda: False
    if "files" not in layers:
        confinement._restrict_files = lambda *_: False
    if "system calls" not in layers:
        vars(images)["filter_program"] = lambda **_: None
    images.LIMITS = confinement.Limits(memory_bytes=images.LIMITS.memory_bytes, cpu_seconds=1, file_bytes=0)
    if "limits" not in layers:
        vars(images)["limit"] = lambda *_, **__: None
    if os.getuid() == 0 and int(sys.argv[2]):
        os.setgroups([])
        os.setgid(int(sys.argv[2]))
        os.setuid(int(sys.argv[2]))
    sys.modules["server.previews.rendering"] = types.SimpleNamespace(render=render)  # type: ignore[assignment]
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    sys.argv[1:] = sys.argv[3:]
    images.main()


if __name__ == "__main__":
    main()
