"""The table of faults: classes by number, several cases each. A new one is a function from the stage to its figures, and a line here."""

from collections.abc import Callable
from typing import NamedTuple

from tests.torture import broken_disk, disks, resumable, tools
from tests.torture.stage import Stage


class Case(NamedTuple):
    """One fault."""

    number: int
    title: str
    run: Callable[[Stage], str]


CASES = [
    Case(1, "resumable uploads to a server that is killed", resumable.killed_server),
    Case(2, "resumable uploads that crash at every step, and the power cut", resumable.every_step),
    Case(4, "every call of an upload fails", broken_disk.failing_calls),
    Case(5, "one of two volumes fails", disks.failing),
    Case(6, "a volume turns read-only under load", broken_disk.turns_read_only),
    Case(13, "bit rot", tools.rot),
    Case(14, "audits and scrubs under load", tools.audited),
    Case(15, "a backup under load, restored on an empty machine", tools.restored),
    Case(17, "resumable uploads on a bad network", resumable.bad_network),
    Case(17, "a hundred resumable uploads in memory", resumable.memory),
    Case(17, "resumable uploads begun by the thousand", resumable.begun_by_the_thousand),
    Case(18, "two of everything", tools.twice),
]
