"""What all rows together say, for `/metrics`, and what workers count for it."""

import asyncio
import time
from collections import Counter

from server.ledger.database import Database
from server.ledger.models import StoreFigures, Work
from server.ledger.statements import statement

WORKER_APPLICATION = "coffer worker"
"""What workers call themselves to PostgreSQL."""
KEPT_SECONDS = 10.0
"""However often it is asked for, the table of users is read once in this time: anybody who reaches the port may ask."""

_FIGURES = statement("store_figures")


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
                self._found = StoreFigures(**dict(store))
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
