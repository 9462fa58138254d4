"""The attacks of `make attack`, with few tries each, so that every change meets them."""

from collections.abc import Callable, Iterator

import pytest

from tests.attack.cases import CASES, Case, run
from tests.attack.target import Target, target_on
from tests.conftest import PostgresServer


@pytest.fixture(scope="module")
def target(postgres_servers: Callable[[bool], PostgresServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One server for all: whatever an attack leaves behind must not help the next."""
    with (
        postgres_servers(False).database() as database_url,
        target_on(database_url, tmp_path_factory.mktemp("attack"), thorough=False) as target,
    ):
        yield target


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.title.replace(' ', '-')}")
def test_it_is_refused(target: Target, case: Case) -> None:
    run(case, target)
