"""`edge`: one nginx and one server for all tests of a module. `start_edge`: a pair of a test's own, with settings of its own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import PostgresServer
from tests.edge.nginx import Edge, Nginx
from tests.launching import Forked
from tests.serving import new_server

StartEdge = Callable[..., Edge]


@contextmanager
def running_edge(postgres: PostgresServer, directory: Path, environment: dict[str, str]) -> Iterator[Edge]:
    state = directory / "edge-state"
    environment = {"COFFER_EDGE_STATE_FILE": str(state), "COFFER_TRUSTED_PROXIES": "127.0.0.1", **environment}
    with postgres.database() as database_url:
        server = new_server(database_url, directory, None, environment)
        server.launch = Forked
        nginx = Nginx(directory / "nginx")
        try:
            server.start()
            edge = Edge(server, nginx, state, environment)
            edge.install()
            nginx.start()
            yield edge
        finally:
            nginx.stop()
            server.kill()


@pytest.fixture(scope="module")
def edge(postgres_servers: Callable[[bool], PostgresServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(postgres_servers(False), tmp_path_factory.mktemp("edge"), {}) as running:
        yield running


@pytest.fixture
def start_edge(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[StartEdge]:
    """Keyword arguments in capitals are the server's settings by their variables."""
    with ExitStack() as stack:
        yield lambda **environment: stack.enter_context(running_edge(postgres_server, tmp_path, environment))
