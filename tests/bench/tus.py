"""tus: one upload of 1 GiB in pieces of 64 MiB, against the same bytes in one plain upload, and against @tus/server with its file store."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.harness import GIB, MIB, Round, Stage, interleave, ratio, say, table, timed
from tests.bench.processes import BenchError, free_port, running, wait_for_port
from tests.bench.servers import Peer, Server

BODY_BYTES = GIB
PIECE_BYTES = 64 * MIB
ROUNDS = 5
_USER = "tus"
_TUS = "Tus-Resumable: 1.0.0"
_THEIRS = Path(__file__).parent / "tus_server"


def measure(stage: Stage) -> None:
    coffer = stage.coffer
    body = stage.file(BODY_BYTES)
    credentials = coffer.headers(_USER)

    def plain() -> Round:
        outcome = timed(coffer, 1, partial(_send_plain, coffer, credentials, body))
        coffer.erase(_USER)
        return outcome

    def resumable() -> Round:
        outcome = timed(coffer, 1, partial(_send_pieces, coffer, "/api/tus/", credentials, body))
        coffer.erase(_USER)
        return outcome

    def theirs(peer: Peer) -> Round:
        outcome = timed(peer, 1, partial(_send_pieces, peer, "/files", (), body))
        peer.clean()
        return outcome

    contestants: dict[str, Callable[[], Round]] = {"plain": plain, "tus": resumable}
    with ExitStack() as stack:
        try:
            for name, mode in (("@tus/server, no sync", ()), ("@tus/server, synced", ("synced",))):
                contestants[name] = partial(theirs, _their_server(stage.scratch, stack, *mode))
        except BenchError as missing:
            say(f"without @tus/server: {missing}")
        results = interleave(contestants, ROUNDS)
    table({name: [Round(each.rate * 1024, each.cpu_seconds) for each in rounds] for name, rounds in results.items()}, "MiB/s", "CPU s/GiB")
    ratio(results, "tus", "plain", at_least=0.9)
    ratio(results, "tus", "@tus/server, synced")
    ratio(results, "tus", "@tus/server, no sync")


def _send_plain(server: Server, headers: tuple[str, ...], body: Path) -> float:
    began = time.perf_counter()
    with _Connection(server.port) as connection, body.open("rb") as file:
        connection.ask("POST", "/api/files/upload?name=bench", (*headers, f"Content-Length: {BODY_BYTES}"))
        connection.send(file.fileno(), 0, BODY_BYTES)
        connection.answer(b"201")
    return time.perf_counter() - began


def _send_pieces(server: Server, path: str, headers: tuple[str, ...], body: Path) -> float:
    """As a client does that has 64 MiB at a time: every piece waits for the answer to the one before."""
    began = time.perf_counter()
    with _Connection(server.port) as connection, body.open("rb") as file:
        connection.ask("POST", path, (*headers, _TUS, f"Upload-Length: {BODY_BYTES}", "Content-Length: 0"))
        location = connection.answer(b"201")["location"]
        address = location if location.startswith("/") else "/" + location.split("/", 3)[3]
        for at in range(0, BODY_BYTES, PIECE_BYTES):
            piece = ("Content-Type: application/offset+octet-stream", f"Upload-Offset: {at}", f"Content-Length: {PIECE_BYTES}")
            connection.ask("PATCH", address, (*headers, _TUS, *piece))
            connection.send(file.fileno(), at, PIECE_BYTES)
            connection.answer(b"204")
    return time.perf_counter() - began


class _Connection:
    """HTTP/1.1 with bodies that the kernel sends from a file."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._received = self._socket.makefile("rb")

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._received.close()
        self._socket.close()

    def ask(self, method: str, path: str, headers: tuple[str, ...]) -> None:
        self._socket.sendall("\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode())

    def send(self, fd: int, at: int, size_bytes: int) -> None:
        with open(fd, "rb", closefd=False) as file:
            self._socket.sendfile(file, at, size_bytes)

    def answer(self, status: bytes) -> dict[str, str]:
        """The headers of the answer. Raises `BenchError` unless it has that status."""
        line = self._received.readline()
        headers = {}
        while (header := self._received.readline()) not in (b"\r\n", b""):
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if "transfer-encoding" in headers:  # of nothing: these answers have no bodies
            body = self._received.read(len(b"0\r\n\r\n"))
        else:
            body = self._received.read(int(headers.get("content-length", "0")))
        if line.split(b" ", 2)[1:2] != [status]:
            raise BenchError(f"expected {status.decode()}, got {line!r} {body[:500]!r}")
        return headers


def _their_server(scratch: Path, stack: ExitStack, *mode: str) -> Peer:
    """Raises `BenchError` where it cannot be had."""
    if not shutil.which("node") or not shutil.which("npm"):
        raise BenchError("node and npm are not installed")
    installed = scratch / "tus-server"
    if not installed.exists():
        shutil.copytree(_THEIRS, installed)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        if subprocess.run(command, cwd=installed, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
            raise BenchError("npm cannot install it")
    directory, port = scratch / f"tus-server-files-{len(mode)}", free_port()
    directory.mkdir()
    log = scratch / "tus-server.log"
    process = stack.enter_context(running(["node", installed / "server.mjs", directory, str(port), *mode], log))
    wait_for_port(port, process, log)
    return Peer(port, process.pid, directory)
