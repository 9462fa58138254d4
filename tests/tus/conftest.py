"""One server for all tests of a module, which keep apart by acting for users of their own."""

import itertools
from collections.abc import Iterator

import httpx
import pytest

from tests.serving import RunningServer, SharedServer

APP = "https://app.example.com"
MOST_UPLOADS = 5

_numbers = itertools.count()


@pytest.fixture(scope="module")
def tus(shared_server: SharedServer) -> Iterator[RunningServer]:
    with shared_server(
        COFFER_CORS_ORIGINS=APP,
        COFFER_RESERVATION_STEP_BYTES="100000",
        COFFER_TUS_SYNC_BYTES=str(2**20),
        COFFER_TUS_UPLOADS_PER_USER=str(MOST_UPLOADS),
    ) as server:
        yield server


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
