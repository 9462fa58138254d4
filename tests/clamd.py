"""A real clamd with signatures of its own, and a false one for what a real one cannot be brought to do."""

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.waiting import until

MARKER = b"coffer: harmless, but the clamd of the tests takes it for a virus"
# In pieces, so that no scanner trips over this file.
EICAR = "".join(["X5O!P%@AP[4\\PZX54(P^)7CC)7}$", "EICAR", "-STANDARD-", "ANTIVIRUS-TEST", "-FILE!$H+H*"]).encode()

# What is larger is refused by clamd (StreamMaxLength), or not looked into (MaxFileSize), which AlertExceedsMax makes it tell.
LONGEST_SCANNED_BYTES = 3 * 2**20
LONGEST_STREAM_BYTES = 4 * 2**20

_CONFIGURATION = """\
LocalSocket {directory}/socket
TCPSocket {port}
TCPAddr 127.0.0.1
DatabaseDirectory {directory}/database
TemporaryDirectory {directory}
Foreground yes
StreamMaxLength {stream}
MaxFileSize {file}
MaxScanSize 16M
AlertExceedsMax yes
"""


class Clamd:
    """clamd as Debian packages it, without Debian's configuration and signatures."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.unix = f"unix:{directory}/socket"
        self.tcp = f"tcp:127.0.0.1:{port}"
        self._socket = directory / "socket"
        self._configuration = directory / "clamd.conf"
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "database").mkdir()
        (directory / "database" / "tests.ndb").write_text(f"Coffer.Marker:0:*:{MARKER.hex()}\nEicar:0:*:{EICAR.hex()}\n")
        self._configuration.write_text(
            _CONFIGURATION.format(directory=directory, port=port, stream=LONGEST_STREAM_BYTES, file=LONGEST_SCANNED_BYTES)
        )

    def start(self) -> None:
        command = shutil.which("clamd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert command is not None, "clamd is not installed (Debian package clamav-daemon)"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", command, "--config-file", str(self._configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"clamd ended by itself; its log:\n{self._log.read_text()[-5000:]}"
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self._socket))
                connection.sendall(b"zPING\0")
                return connection.recv(16) == b"PONG\0"
            except OSError:
                return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._socket.unlink(missing_ok=True)


@contextmanager
def clamd_running() -> Iterator[Clamd]:
    # A socket's path may have 107 characters, which pytest's directories may exceed.
    with tempfile.TemporaryDirectory(prefix="coffer-clamd-") as directory:
        clamd = Clamd(Path(directory))
        clamd.start()
        try:
            yield clamd
        finally:
            clamd.stop()


Behaviour = Callable[["FalseClamd", socket.socket], bytes]


class FalseClamd:
    """Answers every connection with what `behave` returns, which gets this object and the connection; a PING as the real one does."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.release = threading.Event()
        self.now = self.most = self.count = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            if connection.recv(6, socket.MSG_PEEK) == b"zPING\0":
                connection.sendall(b"PONG\0")
                return
            with self._lock:
                self.count += 1
                self.now += 1
                self.most = max(self.most, self.now)
            reply = b""
            with suppress(OSError):
                reply = self.behave(self, connection)
            with self._lock:  # before the reply, after which the next may come
                self.now -= 1
            with suppress(OSError):
                connection.sendall(reply)

    def close(self) -> None:
        self.release.set()
        self._listener.close()


def read_stream(connection: socket.socket) -> int:
    """Reads what an INSTREAM sends, and returns how many bytes it was; -1 when it ends early."""
    file = connection.makefile("rb")
    assert file.read(10) == b"zINSTREAM\0"
    total = 0
    while head := file.read(4):
        length = int.from_bytes(head)
        if not length:
            return total
        total += len(file.read(length))
    return -1


def infected(body: bytes, marker: bytes = MARKER) -> bytes:
    """The marker in the middle of where it is not seen at once."""
    at = len(body) * 2 // 3
    return body[:at] + marker + body[at + len(marker) :]


def silent(false: FalseClamd, connection: socket.socket) -> bytes:
    """Takes all the bytes and says nothing of them until the end."""
    read_stream(connection)
    false.release.wait()
    return b""
