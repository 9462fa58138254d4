"""One server for all tests of a module, which keep apart by acting for users of their own."""

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import PostgresServer
from tests.serving import RunningServer, new_server


@pytest.fixture(scope="module")
def api(postgres_servers: Callable[[bool], PostgresServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    postgres = postgres_servers(False)
    database_url = postgres.clone()
    server = new_server(database_url, tmp_path_factory.mktemp("api"), None, {})
    try:
        server.start()
        yield server
    finally:
        server.kill()
        postgres.drop(database_url)
