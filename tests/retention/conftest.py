"""Servers with a trash, and the `coffer` command beside them."""

import os
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import asyncpg
import pytest

from ops import cli
from tests.samples import image
from tests.serving import RunningServer, SharedServer

TRASH_DAYS = 30


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


Coffer = Callable[..., Done]


@pytest.fixture(scope="module")
def trashing(shared_server: SharedServer) -> Iterator[RunningServer]:
    """A server whose deletions go to the trash, for all tests of a module, which keep apart by acting for users of their own."""
    with shared_server(COFFER_TRASH_DAYS=str(TRASH_DAYS)) as server:
        yield server


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    """A user of this test's own."""
    return f"user-{zlib.crc32(request.node.name.encode())}"


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection: what holds must hold without any of our Python."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
def coffer(database_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Coffer:
    """Runs `coffer` on the test's database; keyword arguments in capitals are settings."""
    for name in list(os.environ):
        if name.startswith(("COFFER_", "DATABASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", database_url)

    def run(*arguments: str, **environment: str) -> Done:
        capfd.readouterr()
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            try:
                code = cli.run(arguments)
            except SystemExit as stopped:  # argparse
                code = int(stopped.code or 0)
        return Done(code, *capfd.readouterr())

    return run


def store(server: RunningServer, user_id: str, *, seed: int = 0, size_bytes: int = 2_000, **fields: str) -> str:
    """Uploads a file and returns its id."""
    with server.client(user_id) as client:
        answer = client.post("/api/files/upload", content=image(size_bytes, seed), params={"name": f"{seed}.png"} | fields)
        assert answer.status_code == 201, answer.text
        file_id: str = answer.json()["id"]
        return file_id
