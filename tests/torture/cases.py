"""The table of faults. A new one is a function from the stage to its figures, and a line here."""

from collections.abc import Callable
from typing import NamedTuple

from tests.torture import resumable
from tests.torture.stage import Stage


class Case(NamedTuple):
    """One fault."""

    number: int
    title: str
    run: Callable[[Stage], str]


CASES = [
    Case(1, "resumable uploads on a bad network", resumable.bad_network),
    Case(2, "resumable uploads to a server that is killed", resumable.killed_server),
    Case(3, "a hundred resumable uploads in memory", resumable.memory),
    Case(4, "resumable uploads begun by the thousand", resumable.begun_by_the_thousand),
    Case(5, "resumable uploads that crash at every step", resumable.every_step),
]
