"""One server for all tests of a module, which keep apart by acting for users of their own."""

import itertools
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.conftest import PostgresServer
from tests.serving import RunningServer, new_server

APP = "https://app.example.com"
MOST_UPLOADS = 5

_numbers = itertools.count()


@pytest.fixture(scope="module")
def tus(postgres_servers: Callable[[bool], PostgresServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    postgres = postgres_servers(False)
    database_url = postgres.clone()
    environment = {
        "COFFER_CORS_ORIGINS": APP,
        "COFFER_RESERVATION_STEP_BYTES": "100000",
        "COFFER_TUS_SYNC_BYTES": str(2**20),
        "COFFER_TUS_UPLOADS_PER_USER": str(MOST_UPLOADS),
    }
    server = new_server(database_url, tmp_path_factory.mktemp("tus"), None, environment)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        postgres.drop(database_url)


@pytest.fixture
def user_id() -> str:
    return f"user-{next(_numbers)}"


@pytest.fixture
def user(tus: RunningServer, user_id: str) -> Iterator[httpx.Client]:
    """Somebody who has nothing yet."""
    with tus.client(user_id) as client:
        yield client


@pytest.fixture
def nobody(tus: RunningServer) -> Iterator[httpx.Client]:
    """No key, no user."""
    with httpx.Client(base_url=tus.url) as client:
        yield client
