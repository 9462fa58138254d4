"""Clients that cost little: curl for large bodies, one blocking socket per process for small ones."""

import multiprocessing
import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.processes import BenchError
from tests.bench.servers import Request, Server

CLIENT_SECONDS = 300
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_fork = multiprocessing.get_context("fork")


def send_large(server: Server, requests: Sequence[Request], body: Path, *, as_form: bool = False) -> float:
    """Sends the body with every request, all at once, each from a curl of its own. Returns the seconds until all were answered."""
    how: list[str | Path] = ["-F", f"file=@{body};type=video/mp4"] if as_form else ["-T", body]
    return _curl(server, [(request, how) for request in requests])


def _curl(server: Server, jobs: Sequence[tuple[Request, Sequence[str | Path]]]) -> float:
    commands = []
    for number, (request, how) in enumerate(jobs):
        url = f"http://127.0.0.1:{server.port}{request.path.replace('{n}', _unique(number))}"
        headers = [part for header in (*request.headers, "Expect:") for part in ("-H", header)]
        command = ["curl", "-s", "-S", "--http1.1", "-w", "\\n%{http_code}", "-X", request.method, *headers, *how, url]
        commands.append(command)
    began = time.perf_counter()
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    answers = [client.communicate(timeout=CLIENT_SECONDS) for client in clients]
    seconds = time.perf_counter() - began
    for answer, errors in answers:
        if not answer.rpartition(b"\n")[2].startswith(b"2"):
            raise BenchError(f"a large request failed: {answer.decode()} {errors.decode()}")
    return seconds


def send_small(server: Server, requests: Sequence[Request], body: bytes, *, seconds: float = 0, each: int = 0) -> float:
    """One client per request, on a connection of its own, sends it with `body` over and over, for `seconds` or `each` times.

    Returns answers per second, of all clients together.
    """
    ready, results = _fork.Barrier(len(requests)), _fork.SimpleQueue()
    arguments = [(server.port, number, request, body, seconds, each, ready, results) for number, request in enumerate(requests)]
    clients = [_fork.Process(target=_small_client, args=each_arguments, daemon=True) for each_arguments in arguments]
    for client in clients:
        client.start()
    for client in clients:
        client.join(CLIENT_SECONDS)
        if client.exitcode != 0:
            raise BenchError("a small request failed; see above")
    outcomes: list[tuple[int, float, float]] = [results.get() for _ in clients]
    answered = sum(count for count, _, _ in outcomes)
    return answered / (max(end for _, _, end in outcomes) - min(began for _, began, _ in outcomes))


def _small_client(port: int, number: int, request: Request, body: bytes, seconds: float, each: int, ready: Any, results: Any) -> None:
    connection = Connection(port)
    ready.wait()
    began, answered = time.perf_counter(), 0
    while answered < each or time.perf_counter() - began < seconds:
        connection.ask(request, body, f"{_unique(number)}-{answered}")
        answered += 1
    results.put((answered, began, time.perf_counter()))


class Connection:
    """One HTTP/1.1 connection that is kept, with no library between it and the socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=CLIENT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(256 * 1024)

    def ask(self, request: Request, body: bytes = b"", unique: str = "") -> bytes:
        """Sends one request and returns the answer's body. Raises `BenchError` unless it is a success of declared length."""
        lines = [
            f"{request.method} {request.path.replace('{n}', unique)} HTTP/1.1",
            "Host: 127.0.0.1",
            *request.headers,
            *([f"Content-Length: {len(body)}"] if body else []),
        ]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return self._answer(lines[0])

    def _answer(self, asked: str) -> bytes:
        answer = bytearray()
        while (end := answer.find(b"\r\n\r\n")) < 0:
            self._receive_into(answer)
        head = bytes(answer[:end])
        length = _CONTENT_LENGTH.search(head)
        expected = end + 4 + (int(length[1]) if length else 0)
        while len(answer) < expected:
            self._receive_into(answer)
        if head[9:10] != b"2":
            raise BenchError(f"{asked} failed: {bytes(answer[:2000]).decode(errors='replace')}")
        return bytes(answer[end + 4 :])

    def _receive_into(self, answer: bytearray) -> None:
        count = self._socket.recv_into(self._buffer)
        if not count:
            raise BenchError("the server hung up")
        answer += memoryview(self._buffer)[:count]


def _unique(number: int) -> str:
    return f"{os.getpid()}-{time.monotonic_ns()}-{number}"
