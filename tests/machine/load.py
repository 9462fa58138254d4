"""Clients that never try anything twice: each request that fails is counted, and what came back is compared.

Python's standard library alone, for a machine on which nothing but Coffer is installed.
"""

import hashlib
import http.client
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

KEPT = 4
"""Connections of a load that are kept."""
_PAUSE_SECONDS = 0.03
"""Between two requests of a client: it is to keep a server busy, and not a small machine."""


class Failed(Exception):
    """An answer that was not the one expected."""


@dataclass
class Server:
    """Where it listens, and the key to use."""

    host: str
    port: int
    api_key: str

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, user: str = "ada") -> bytes:
        """One request, once. Raises `Failed`, `OSError` or `HTTPException`."""
        headers = {"Authorization": f"Bearer {self.api_key}", "X-User-Id": user}
        connection.request(method, path, body=body, headers=headers, encode_chunked=False)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise Failed(f"{method} {path}: {answer.status} {content[:200]!r}")
        return content

    def upload(self, content: bytes, name: str = "a.png", user: str = "ada") -> dict[str, Any]:
        connection = self.connect()
        try:
            answer: dict[str, Any] = json.loads(self.ask(connection, "POST", f"/api/files/upload?name={name}", content, user))
            return answer
        finally:
            connection.close()

    def get(self, path: str, user: str = "ada") -> bytes:
        connection = self.connect()
        try:
            return self.ask(connection, "GET", path, user=user)
        finally:
            connection.close()


def picture(width_px: int, height_px: int, seed: int = 0) -> bytes:
    """A PNG that a decoder takes: two colours, and lines that depend on the seed."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    noise = hashlib.sha256(str(seed).encode()).digest()
    rows = b"".join(b"\0" + bytes((noise[row % 32], row % 256, 90)) * width_px for row in range(height_px))
    head = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@dataclass
class Load:
    """Requests of all sorts, from threads, until it is stopped."""

    server: Server
    requests: int = 0
    longest_seconds: float = 0
    failures: list[str] = field(default_factory=list)
    connections: int = 0
    stood_still_seconds: float = 0
    """How long, at the longest, this machine did not even come round to a thread that only sleeps: no server could have answered."""
    closed_idle: int = 0
    """Kept connections that ended without an answer; the request was then sent once more, as browsers do (RFC 9112, section 9.3.1)."""

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._content = os.urandom(200_000)
        png = picture(64, 64) + self._content
        self._file_id = str(self.server.upload(png)["id"])
        self._png = png
        kept: list[Callable[[http.client.HTTPConnection], None]] = [self._download, self._download, self._upload, self._list]
        self._threads = [
            *(threading.Thread(target=self._on_a_kept_connection, args=(each,)) for each in kept),
            threading.Thread(target=self._on_new_connections, args=(self._download,)),
            threading.Thread(target=self._on_new_connections, args=(self._upload,)),
            threading.Thread(target=self._upload_slowly),
            threading.Thread(target=self._watch_the_machine),
        ]

    def start(self) -> None:
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Ends it, once every request under way has its answer."""
        self._stopping.set()
        for each in self._threads:
            each.join()

    def _download(self, connection: http.client.HTTPConnection) -> None:
        content = self.server.ask(connection, "GET", f"/api/files/{self._file_id}/download")
        if content != self._png:
            raise Failed("a download had other bytes")

    def _upload(self, connection: http.client.HTTPConnection) -> None:
        answer = json.loads(self.server.ask(connection, "POST", "/api/files/upload?name=b.png", self._png, "eve"))
        self.server.ask(connection, "DELETE", f"/api/files/{answer['id']}", user="eve")

    def _list(self, connection: http.client.HTTPConnection) -> None:
        self.server.ask(connection, "GET", "/api/files")

    def _on_a_kept_connection(self, request: Callable[[http.client.HTTPConnection], None]) -> None:
        """A new one only when the server has said, with an answer, that it closes this one."""
        connection = self.server.connect()
        while not self._stopping.is_set():
            if connection.sock is None:
                with self._lock:
                    self.connections += 1
            self._counted(lambda: self._on(connection, request))
            time.sleep(_PAUSE_SECONDS)
        connection.close()

    def _on(self, connection: http.client.HTTPConnection, request: Callable[[http.client.HTTPConnection], None]) -> None:
        was_kept = connection.sock is not None
        try:
            request(connection)
        except ConnectionError:  # `RemoteDisconnected` is one
            if not was_kept:
                raise
            with self._lock:
                self.closed_idle += 1
            connection.close()
            request(connection)

    def _on_new_connections(self, request: Callable[[http.client.HTTPConnection], None]) -> None:
        while not self._stopping.is_set():
            connection = self.server.connect()
            self._counted(lambda: request(connection))  # noqa: B023 - called at once
            connection.close()
            time.sleep(_PAUSE_SECONDS)

    def _upload_slowly(self) -> None:
        """Five seconds for one upload, over and over: some begin before the server is replaced, and end after."""

        def pieces() -> Any:
            for start in range(0, len(self._png), 10_000):
                yield self._png[start : start + 10_000]
                time.sleep(0.25)

        def once() -> None:
            connection = self.server.connect()
            headers = {
                "Authorization": f"Bearer {self.server.api_key}",
                "X-User-Id": "slow",
                "Content-Length": str(len(self._png)),
            }
            connection.request("POST", "/api/files/upload?name=c.png", body=pieces(), headers=headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 201:
                raise Failed(f"a slow upload: {answer.status} {content[:200]!r}")
            connection.close()

        while not self._stopping.is_set():
            self._counted(once, slow=True)

    def _watch_the_machine(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            time.sleep(0.05)
            self.stood_still_seconds = max(self.stood_still_seconds, time.monotonic() - began - 0.05)

    def _counted(self, request: Callable[[], None], *, slow: bool = False) -> None:
        began = time.monotonic()
        problem = None
        try:
            request()
        except (OSError, http.client.HTTPException, Failed) as caught:
            problem = f"{datetime.now(UTC):%H:%M:%S.%f}, port {self.server.port}: {type(caught).__name__}: {caught}"
        with self._lock:
            self.requests += 1
            if not slow:
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            if problem is not None:
                self.failures.append(problem)
                time.sleep(0.1)
