"""HTTP/1.1 by hand: requests that no well-behaved client would send, and answers with every byte of their head."""

import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

TIMEOUT_SECONDS = 20
PIPELINED = 32

# What may be sent before the answer to the request in front of it has come. Anything else may make the server hang up.
_PLAIN = re.compile(rb"[A-Z]+ /[!$-~]* HTTP/1\.1\r\n(?:[A-Za-z-]+: [ -~\x80-\xff]*\r\n)*\r\n", re.DOTALL)
_OF_ITS_OWN = {"date", "x-request-id", "ratelimit"}  # differ between any two answers, the last by how often was asked

Headers = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `head` is as it was received; `headers` are its lines in order, names in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    head: bytes

    def header(self, name: str) -> str | None:
        """The value of a header that may come once; None when it did not come. AssertionError for a repeated one."""
        values = [value for each, value in self.headers if each == name]
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None

    @property
    def code(self) -> str:
        """The stable code of a failure, or nothing."""
        if self.header("content-type") != "application/problem+json" or not self.body:
            return ""
        return str(msgspec.json.decode(self.body)["code"])

    def comparable(self, *private: str) -> tuple[int, tuple[tuple[str, str], ...], bytes]:
        """All of it but what any two answers differ in, with what the two requests do not share (`private`) blanked out."""
        body = self.body
        for text in (*(value for name, value in self.headers if name == "x-request-id"), *private):
            body = body.replace(text.encode(), b"*")
        return self.status, tuple(sorted(each for each in self.headers if each[0] not in _OF_ITS_OWN)), body


class Wire:
    """One connection at a time, kept while the server keeps it."""

    def __init__(self, host: str, port: int, timeout_seconds: float = TIMEOUT_SECONDS, *, source: str = "") -> None:
        """`source` is the address of this machine to come from."""
        self._address = (host, port)
        self._source = (source, 0) if source else None
        self._timeout_seconds = timeout_seconds
        self._socket: socket.socket | None = None
        self._reader: BinaryIO | None = None

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._reader = None

    def ask(self, request: bytes) -> Answer | None:
        """The first answer to these bytes; None when the server hung up without one."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, self._timeout_seconds, self._source)
            self._reader = self._socket.makefile("rb")
        with suppress(ConnectionError):  # hung up while we were talking: what it said before is still there to be read
            self._socket.sendall(request)
        return self._answer(is_head=request.startswith(b"HEAD "))

    def expect(self, request: bytes) -> Answer:
        """The first answer to these bytes, which must come."""
        answer = self.ask(request)
        assert answer is not None, f"no answer to {request[:200]!r}"
        return answer

    def expect_all(self, requests: Sequence[bytes]) -> list[Answer]:
        """The answer to each, several under way at once where that is safe: thousands take seconds."""
        answers: list[Answer] = []
        while len(answers) < len(requests):
            batch = requests[len(answers) : len(answers) + PIPELINED]
            plain = next((at for at, each in enumerate(batch) if not _PLAIN.fullmatch(each)), len(batch))
            if plain < 2:
                self.close()
                answers.append(self.expect(batch[0]))
                continue
            answers.append(self.expect(batch[0]))  # connects, and finds a connection that has gone
            if self._socket is None or self._reader is None:
                continue
            self._socket.sendall(b"".join(batch[1:plain]))
            for each in batch[1:plain]:
                answer = self._answer(is_head=each.startswith(b"HEAD "))
                if answer is None:
                    break
                answers.append(answer)
                if answer.header("connection") == "close":
                    break
        return answers

    def rest(self) -> bytes:
        """Says that nothing more will come, and returns whatever else the server sends until it hangs up."""
        if self._socket is None or self._reader is None:
            return b""
        try:
            self._socket.shutdown(socket.SHUT_WR)
            return self._reader.read()
        except OSError:
            return b""
        finally:
            self.close()

    def _answer(self, *, is_head: bool) -> Answer | None:
        reader = self._reader
        assert reader is not None
        lines: list[bytes] = []
        try:
            while (line := reader.readline()) not in {b"\r\n", b""}:
                lines.append(line)
                if line.startswith(b"HTTP/1.1 100 "):
                    reader.readline()
                    lines.clear()
        except ConnectionError:
            line = b""
        if not lines or not line:
            self.close()
            return None
        status = int(lines[0].split(b" ")[1])
        headers = tuple(_header(each) for each in lines[1:])
        fields = dict(headers)
        body = b""
        if not (is_head or status in {204, 304}):
            body = _chunked(reader) if fields.get("transfer-encoding") == "chunked" else reader.read(int(fields.get("content-length", "0")))
        if fields.get("connection") == "close":
            self.close()
        return Answer(status, headers, body, b"".join(lines))


def request(method: str, target: str | bytes, headers: Headers = (), body: bytes = b"") -> bytes:
    """The bytes of a request with a Host and, when there is a body, its length. Texts go out in UTF-8."""
    raw_target = target.encode() if isinstance(target, str) else target
    lines = [("Host", "coffer.test"), *headers, *([("Content-Length", str(len(body)))] if body else [])]
    head = b"".join(f"{name}: {value}\r\n".encode() for name, value in lines)
    return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method.encode(), raw_target, head, body)


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("latin-1").partition(":")
    return name.lower(), value.strip()


def _chunked(reader: BinaryIO) -> bytes:
    body = b""
    while size := int(reader.readline(), 16):
        body += reader.read(size)
        reader.readline()
    reader.readline()
    return body
