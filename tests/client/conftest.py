"""One server for all tests of a module, which keep apart by acting for users of their own."""

from collections.abc import Iterator

import pytest

from tests.serving import RunningServer, SharedServer


@pytest.fixture(scope="module")
def api(shared_server: SharedServer) -> Iterator[RunningServer]:
    with shared_server() as server:
        yield server
