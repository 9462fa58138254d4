"""A real server in a process of its own, with its own database and volume, for tests that speak HTTP to it."""

import asyncio
import hashlib
import os
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import asyncpg
import httpx
import pytest

from server.auth import NewApiKey, Scope
from server.commands.volumes import register_volume
from server.ledger import Database, create_api_key, migrate
from server.settings import Settings
from tests.launching import Executed, Forked, Launched, kill_session
from tests.waiting import until

if TYPE_CHECKING:
    from tests.conftest import PostgresServer

READY_SECONDS = 60
_NO_TLS = ssl.create_default_context()  # reading the certificates of those who vouch for others takes 20 ms each time
ALL_SCOPES = [scope.value for scope in Scope]

DEFAULTS = {
    "COFFER_LINK_KEYS": "a key that signs the links of tests".replace(" ", "-"),
    "COFFER_MAX_FILE_BYTES": str(6 * 2**20),
    "COFFER_RESERVATION_LEASE_SECONDS": "5",
    "COFFER_VOLUME_RESERVE_BYTES": str(2**20),
}


class RunningServer:
    """A server that can be stopped, killed and started again on the same port, with the same data."""

    launch: Callable[[Sequence[str], dict[str, str], Path], Launched] = Executed

    def __init__(self, database_url: str, volume: Path, log: Path, api_key: str, environment: dict[str, str]) -> None:
        self.database_url = database_url
        self.volume = volume
        self.log = log
        self.api_key = api_key
        self.host = "127.0.0.1"
        reserved = _reserved_port()
        self.port: int = reserved.getsockname()[1]
        weakref.finalize(self, reserved.close)
        self._environment = DEFAULTS | environment
        self._process: Launched | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait_ready: bool = True) -> None:
        """Starts it, and waits until it is ready, or only until it is live."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        environment |= self._environment
        environment |= {"COFFER_DATABASE_URL": self.database_url, "COFFER_HOST": self.host, "COFFER_PORT": str(self.port)}
        self._process = self.launch(["serve"], environment, self.log)
        path = "/health/ready" if wait_ready else "/health/live"
        try:
            until(lambda: self._answers(path), timeout_seconds=READY_SECONDS)
        except AssertionError:
            raise AssertionError(f"not ready within {READY_SECONDS} s; its log:\n{self.logged()[-5000:]}") from None

    def _answers(self, path: str) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"it ended by itself; its log:\n{self.logged()[-5000:]}"
        try:
            with closing(HTTPConnection(self.host, self.port, timeout=5)) as connection:
                connection.request("GET", path)
                return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False

    def stop(self) -> None:
        """SIGTERM, and waits until it has ended."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.join(40)
            except TimeoutError:
                self.kill()
                raise AssertionError(f"it did not stop; its log:\n{self.logged()[-5000:]}") from None
            self._process = None

    def kill(self) -> None:
        """SIGKILL, to it and its children."""
        if self._process is not None:
            kill_session(self._process)
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def client(self, user_id: str | None = None, *, timeout: float = 10, api_key: str | None = None) -> httpx.Client:
        """An HTTP client with an API key (of all scopes, unless another is given) that acts for that user."""
        headers = {"Authorization": f"Bearer {api_key or self.api_key}"}
        raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        if user_id is not None:
            raw_headers.append((b"X-User-Id", user_id.encode()))
        return httpx.Client(base_url=self.url, headers=raw_headers, timeout=timeout, verify=_NO_TLS)

    def new_key(self, *scopes: Scope) -> str:
        """Another API key, with these scopes."""
        return asyncio.run(_add_key(self.database_url, [scope.value for scope in scopes]))

    def set_quota(self, user_id: str, max_bytes: int | None) -> None:
        with self.client() as admin:
            admin.put(f"/api/users/{quote(user_id, safe='')}/quota", json={"max_bytes": max_bytes}).raise_for_status()

    def stored_paths(self) -> list[Path]:
        """Every stored file."""
        return [path for path in (self.volume / "users").glob("*/*/*") if path.is_file()]

    def stored_files(self) -> set[str]:
        """The SHA-256 of every stored file's bytes."""
        found = set()
        for path in self.stored_paths():
            with path.open("rb") as file:
                found.add(hashlib.file_digest(file, "sha256").hexdigest())
        return found

    def incoming(self) -> list[str]:
        """What lies in incoming/."""
        return sorted(path.name for path in (self.volume / "incoming").iterdir())

    def settle(self) -> None:
        """Waits until housekeeping has released what a crash left reserved and removed what it left to bury."""
        left = "select (select count(*) from tombstones) + (select count(*) from uploads) as left"
        until(lambda: execute(self.database_url, left)[0]["left"] == 0)

    def in_flight(self) -> int:
        """Requests under way, besides this one."""
        lines = httpx.get(f"{self.url}/metrics", verify=_NO_TLS).text.splitlines()
        (value,) = (line.split()[1] for line in lines if line.startswith("coffer_http_requests_in_flight "))
        return int(float(value)) - 1

    def logged(self) -> str:
        return self.log.read_text()

    def peak_memory_bytes(self) -> int:
        """The most memory that was ever resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel does not tell")


class ServerFactory(Protocol):
    """Starts a server that the test's end stops. Keyword arguments in capitals are settings by their variables."""

    def __call__(self, *, database_url: str | None = None, volume: Path | None = None, **environment: str) -> RunningServer: ...


def new_server(database_url: str, directory: Path, volume: Path | None, environment: dict[str, str]) -> RunningServer:
    """A server that is set up and not started yet. Its log, and its volume unless one is given, are in `directory`."""
    if volume is None:
        volume = directory / "volume"
        volume.mkdir()
    api_key = asyncio.run(_set_up(database_url, volume))
    return RunningServer(database_url, volume, directory / "log", api_key, environment)


@pytest.fixture
def start_server(database_url: str, tmp_path: Path) -> Iterator[ServerFactory]:
    started: list[RunningServer] = []

    def start(*, database_url: str | None = database_url, volume: Path | None = None, **environment: str) -> RunningServer:
        assert database_url is not None
        directory = tmp_path / f"server-{len(started)}"
        directory.mkdir()
        server = new_server(database_url, directory, volume, environment)
        server.launch = Forked
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def server(start_server: ServerFactory) -> RunningServer:
    """A server on a database and a volume of this test's own."""
    return start_server()


class SharedServer(Protocol):
    """A server on a database and a volume of its own, within a block. Keyword arguments in capitals are settings by their variables."""

    def __call__(self, **environment: str) -> AbstractContextManager[RunningServer]: ...


@pytest.fixture(scope="session")
def shared_server(postgres_servers: "Callable[[bool], PostgresServer]", tmp_path_factory: pytest.TempPathFactory) -> SharedServer:
    """For a server that all tests of a module share, which keep apart by acting for users of their own."""

    @contextmanager
    def running(**environment: str) -> Iterator[RunningServer]:
        with postgres_servers(False).database() as database_url:
            server = new_server(database_url, tmp_path_factory.mktemp("server"), None, environment)
            server.launch = Forked
            try:
                server.start()
                yield server
            finally:
                server.kill()

    return running


def execute(database_url: str, statement: str, *arguments: Any) -> list[asyncpg.Record]:
    """Runs one statement on a connection of its own."""

    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(database_url)
        try:
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close()

    return asyncio.run(run())


async def _set_up(database_url: str, volume: Path) -> str:
    await migrate(database_url)
    async with _opened(database_url) as db:
        await register_volume(db, volume)
        return await _create_key(db, ALL_SCOPES)


async def _add_key(database_url: str, scopes: list[str]) -> str:
    async with _opened(database_url) as db:
        return await _create_key(db, scopes)


async def _create_key(db: Database, scopes: list[str]) -> str:
    key = NewApiKey.generate()
    await create_api_key(db, key_id=key.key_id, name="test", secret_sha256=key.secret_sha256, scopes=scopes)
    return key.text


@asynccontextmanager
async def _opened(database_url: str) -> AsyncIterator[Database]:
    db = Database(Settings(database_url=database_url))
    await db.open()
    try:
        yield db
    finally:
        await db.close()


def _reserved_port() -> socket.socket:
    """Keeps a port from all others. It does not listen, so a server may (socket(7), SO_REUSEADDR), again and again."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
