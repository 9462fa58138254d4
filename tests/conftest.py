"""Fixtures on a real PostgreSQL. How to use them:

- `database_url`: a migrated, empty database of this test's own. Everything else builds on it.
- `settings`: Settings for that database. `db`: an opened Database on it. `volume`: a volume's directory, known to that database.
- `start_server`, `server`: a real server in a process of its own (tests/serving.py).

A test that awaits is an `async def` under `pytestmark = pytest.mark.anyio` (asyncio is the only backend); `db` and `volume` are for
such tests only. A plain `def` test may use all the others.

PostgreSQL is the embedded one, started once per session, without durability and in memory, where a database for a test costs a tenth of
what it does on a disk. Tests in tests/recovery must never lack durability: they get a second one, on a disk. TEST_DATABASE_URL names
another server to use for both; its role must be allowed to create databases.
"""

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from ops.embedded_postgres import EmbeddedPostgres
from ops.scratch import directory_for_now
from server.ledger import Database, add_volume, migrate
from server.settings import Settings
from server.vault.sentinel import init_volume

pytest_plugins = ["tests.serving"]

# A shell starts what runs in its background deaf to interrupts, and that is inherited, by servers that tests interrupt, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Told to end, pytest takes away what the fixtures have made, as it does when it is interrupted.
signal.signal(signal.SIGTERM, signal.default_int_handler)

# The embedded PostgreSQL has no TLS. asyncpg would ask for it first, and where that is cancelled it leaves an exception behind that nobody
# takes; anyio then fails the test.
os.environ.setdefault("PGSSLMODE", "disable")

RECOVERY = Path(__file__).parent / "recovery"
FAST = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "min_wal_size": "32MB",
    "max_wal_size": "128MB",
    "max_connections": "200",
}
DURABLE = {"max_connections": "200"}
_CLUSTER_BYTES = 2 * 2**30
"""More than a session's cluster takes with all its databases; its log of changes is kept short."""

_numbers = itertools.count()


class PostgresServer:
    """A server with a migrated template, cloned for each test."""

    def __init__(self, url: str, *, is_durable: bool) -> None:
        self._url = url
        # Its checkpoints cost nothing where nothing is durable; to log every page costs twice as much there.
        self._strategy = "wal_log" if is_durable else "file_copy"
        self._template = f"coffer_template_{os.getpid()}_{next(_numbers)}"
        asyncio.run(self._execute(f"create database {self._template}"))
        asyncio.run(migrate(self.url_of(self._template)))

    def url_of(self, database: str) -> str:
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{database}"))

    def clone(self, *, empty: bool = False) -> str:
        """A new database, a copy of the template or an `empty` one."""
        name = f"coffer_test_{os.getpid()}_{next(_numbers)}"
        template = "template0" if empty else self._template
        asyncio.run(self._execute(f"create database {name} template {template} strategy {self._strategy}"))
        return self.url_of(name)

    @contextmanager
    def database(self, *, empty: bool = False) -> Iterator[str]:
        """A new database until the end of the block, a copy of the template or an `empty` one."""
        url = self.clone(empty=empty)
        try:
            yield url
        finally:
            self.drop(url)

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
    # Not below pytest's directory, which belongs to root alone when root runs the tests, and PostgreSQL refuses to be root.
    with (
        directory_for_now(_memory() or Path(tempfile.gettempdir()), "coffer-tests-") as fast,
        directory_for_now(Path(tempfile.gettempdir()), "coffer-tests-durable-") as durable,
        ExitStack() as stack,
    ):

        def server(is_durable: bool) -> PostgresServer:
            url = os.environ.get("TEST_DATABASE_URL")
            is_durable = is_durable or url is not None
            if is_durable not in started:
                if url is None:
                    postgres = EmbeddedPostgres(durable, settings=DURABLE) if is_durable else EmbeddedPostgres(fast, settings=FAST)
                    stack.callback(postgres.stop)
                    url = postgres.start()
                started[is_durable] = PostgresServer(url, is_durable=is_durable)
                stack.callback(started[is_durable].close)
            return started[is_durable]

        yield server


def _memory() -> Path | None:
    """A file system in memory with room for a cluster, if there is one; containers may have one of 64 MiB."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free >= _CLUSTER_BYTES else None


@pytest.fixture
def postgres_server(request: pytest.FixtureRequest, postgres_servers: Callable[[bool], PostgresServer]) -> PostgresServer:
    """The server that suits this test."""
    return postgres_servers(request.path.is_relative_to(RECOVERY))


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database without Coffer's tables."""
    with postgres_server.database(empty=True) as url:
        yield url


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
