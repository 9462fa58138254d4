"""Coffer in this process, whose insides a test may look at and change, on connections of the test's own."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import uvicorn

from server.api import accounting, express
from server.app import HTTP, assemble
from server.settings import Settings
from tests.serving import DEFAULTS, RunningServer
from tests.waiting import until

MIB = 2**20


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def request(server: RunningServer, target: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "Host: x", f"Authorization: Bearer {server.api_key}", "X-User-Id: ada", *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def reply(stream: Any, *, to_head: bool = False) -> Reply:
    """The next answer of a connection, and nothing of what follows."""
    status = int(stream.readline().split()[1])
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode().partition(": ")
        headers[name] = value
    length = 0 if to_head or status == 304 else int(headers["content-length"])
    return Reply(status, headers, stream.read(length))


class Here(NamedTuple):
    port: int
    extensions: list[Any]


@contextmanager
def serving_here(settings: Settings, **server_settings: Any) -> Iterator[Here]:
    """Coffer as `serve` runs it, in this process, with the server's settings changed."""
    seen: list[Any] = []
    front = assemble(settings)

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(scope.get("extensions"))
        await front(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(watched, port=0, **HTTP, **server_settings))
    running = threading.Thread(target=server.run)
    running.start()
    try:
        until(lambda: server.started)
        yield Here(server.servers[0].sockets[0].getsockname()[1], seen)
    finally:
        server.should_exit = True
        running.join()


def settings_of(server: RunningServer, **changes: Any) -> Settings:
    return Settings(database_url=server.database_url, link_keys=(DEFAULTS["COFFER_LINK_KEYS"],), volume_reserve_bytes=MIB, **changes)


@dataclass
class Stage:
    """A server with files of ada's, one of this process that serves them too, and what that has told of requests."""

    server: RunningServer
    here: Here
    told: list[dict[str, Any]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def passed_on(self) -> int:
        """How many requests the application has seen."""
        return len(self.here.extensions)

    def connect(self, receive_buffer_bytes: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.here.port))
        return client

    def request(self, name: str, *headers: str) -> bytes:
        return request(self.server, self.paths.get(name, name), *headers)

    def send(self, asked: bytes) -> Reply:
        with closing(self.connect()) as client, client.makefile("rb") as stream:
            client.sendall(asked)
            return reply(stream)

    def ask(self, name: str, *headers: str) -> Reply:
        return self.send(self.request(name, *headers))


def told_of_requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is counted and logged of each request from now on."""
    told: list[dict[str, Any]] = []
    account = accounting.account

    def noting(*arguments: Any, **facts: Any) -> None:
        told.append(facts)
        account(*arguments, **facts)

    for caller in ("front", "express"):
        monkeypatch.setattr(f"server.api.{caller}.account", noting)
    return told


def connected(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The server's ends of connections that are made from now on."""
    protocols: list[Any] = []
    take = express.ExpressProtocol.connection_made

    def noting(protocol: Any, transport: Any) -> None:
        protocols.append(protocol)
        take(protocol, transport)

    monkeypatch.setattr(express.ExpressProtocol, "connection_made", noting)
    return protocols


def is_same(one: Reply, other: Reply, differing: set[str]) -> bool:
    """Line by line, and in that order."""
    heads = [[each for each in reply.headers.items() if each[0] not in differing] for reply in (one, other)]
    return heads[0] == heads[1] and differing <= one.headers.keys() == other.headers.keys() and one.status == other.status
