"""Fixtures on a real PostgreSQL. How to use them:

- `database_url`: a migrated, empty database of this test's own. Everything else builds on it.
- `settings`: Settings for that database. `db`: an opened Database on it. `volume`: a volume's directory, known to that database.
- `start_server`, `server`: a real server in a process of its own (tests/serving.py).

A test that awaits is an `async def` under `pytestmark = pytest.mark.anyio` (asyncio is the only backend); `db` and `volume` are for
such tests only. A plain `def` test may use all the others.

PostgreSQL is the embedded one, started once per session and without durability, which tests/recovery must never lack: tests there get
a second, durable one. TEST_DATABASE_URL names another server to use for both; its role must be allowed to create databases.
"""

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from ops.embedded_postgres import EmbeddedPostgres
from server.ledger import Database, add_volume, migrate
from server.settings import Settings
from server.vault.sentinel import init_volume

pytest_plugins = ["tests.serving"]

# A shell starts what runs in its background deaf to interrupts, and that is inherited, by servers that tests interrupt, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

RECOVERY = Path(__file__).parent / "recovery"
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}
DURABLE = {"max_connections": "200"}

_numbers = itertools.count()


class PostgresServer:
    """A server with a migrated template, cloned for each test."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._template = f"coffer_template_{os.getpid()}_{next(_numbers)}"
        asyncio.run(self._execute(f"create database {self._template}"))
        asyncio.run(migrate(self.url_of(self._template)))

    def url_of(self, database: str) -> str:
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{database}"))

    def clone(self, *, empty: bool = False) -> str:
        """A new database, a copy of the template or an `empty` one."""
        name = f"coffer_test_{os.getpid()}_{next(_numbers)}"
        asyncio.run(self._execute(f"create database {name} template {'template0' if empty else self._template}"))
        return self.url_of(name)

    def drop(self, url: str) -> None:
        asyncio.run(self._execute(f"drop database {urlsplit(url).path[1:]} with (force)"))

    def close(self) -> None:
        self.drop(self.url_of(self._template))

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self._url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def postgres_servers() -> Iterator[Callable[[bool], PostgresServer]]:
    """Gives the session's fast or (True) durable server, started when first asked for."""
    started: dict[bool, PostgresServer] = {}
    embedded: list[EmbeddedPostgres] = []
    # Not below pytest's directory, which belongs to root alone when root runs the tests, and PostgreSQL refuses to be root.
    directory = Path(tempfile.mkdtemp(prefix="coffer-tests-"))
    directory.chmod(0o711)

    def server(durable: bool) -> PostgresServer:
        url = os.environ.get("TEST_DATABASE_URL")
        durable = durable and url is None
        if durable not in started:
            if url is None:
                postgres = EmbeddedPostgres(directory / ("durable" if durable else "fast"), settings=DURABLE if durable else FAST)
                url = postgres.start()
                embedded.append(postgres)
            started[durable] = PostgresServer(url)
        return started[durable]

    try:
        yield server
        for each in started.values():
            each.close()
    finally:
        for each_embedded in embedded:
            each_embedded.stop()
        shutil.rmtree(directory)


@pytest.fixture
def postgres_server(request: pytest.FixtureRequest, postgres_servers: Callable[[bool], PostgresServer]) -> PostgresServer:
    """The server that suits this test."""
    return postgres_servers(request.path.is_relative_to(RECOVERY))


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    url = postgres_server.clone()
    yield url
    postgres_server.drop(url)


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database without Coffer's tables."""
    url = postgres_server.clone(empty=True)
    yield url
    postgres_server.drop(url)


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(database_url=database_url)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    database = Database(settings)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def volume(db: Database, tmp_path: Path) -> Path:
    directory = tmp_path / "volume"
    directory.mkdir()
    await add_volume(db, init_volume(directory), str(directory))
    return directory
