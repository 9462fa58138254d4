"""What all rows together say, for `/metrics`, and what workers count for it."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping

import msgspec

from server.ledger.database import Database
from server.ledger.models import StoreFigures, Work, WorkFigures
from server.ledger.statements import statement

WORKER_APPLICATION = "coffer worker"
"""What workers call themselves to PostgreSQL."""
KEPT_SECONDS = 10.0
"""However often it is asked for, the table of users is read once in this time: anybody who reaches the port may ask."""

_COUNTED_AT_MOST = 100_000
"""Of what waits for an endpoint that is dead: more takes too long to count."""

_FIGURES = statement("store_figures")
_WORK_FIGURES = statement("work_figures")
_WORK_COUNTS = statement("work_counts")
_ADD_WORK_COUNTS = statement("add_work_counts")


class RememberedFigures:
    """The figures of the last look, for `KEPT_SECONDS`. Lives in one event loop."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._looking = asyncio.Lock()
        self._found: StoreFigures | None = None
        self._until = 0.0

    async def get(self) -> StoreFigures:
        """Raises `DatabaseUnavailable` when it is time to look, and nobody answers."""
        async with self._looking:
            if self._found is None or time.monotonic() >= self._until:
                self._found = None
                store = (await self._db.read(_FIGURES, WORKER_APPLICATION))[0]
                self._found = StoreFigures(**dict(store), work=await _work_figures(self._db))
                self._until = time.monotonic() + KEPT_SECONDS
            return self._found


class WorkCounts:
    """Counts what a worker does with other machines, until that is told to the database. Lives in one event loop."""

    def __init__(self) -> None:
        self._counted: Counter[tuple[Work, str]] = Counter()

    def count(self, work: Work, result: str) -> None:
        """One more. `result` is one of a few fixed words."""
        self._counted[work, result] += 1

    def take(self) -> dict[tuple[Work, str], int]:
        """What was counted since the last time."""
        taken = dict(sorted(self._counted.items()))
        self._counted.clear()
        return taken


async def add_work_counts(db: Database, counts: Mapping[tuple[Work, str], int]) -> None:
    """Adds to what all workers have counted."""
    await db.write(_ADD_WORK_COUNTS, [work for work, _ in counts], [result for _, result in counts], list(counts.values()))


async def _work_figures(db: Database) -> WorkFigures:
    row = dict((await db.read(_WORK_FIGURES, _COUNTED_AT_MOST))[0])
    for name in ("open_jobs", "ended_jobs", "ended_outputs"):
        row[name] = msgspec.json.decode(row[name], type=dict[str, int])
    counts = {(each["work"], each["result"]): each["count"] for each in await db.read(_WORK_COUNTS)}
    return WorkFigures(**row, counts=counts)
