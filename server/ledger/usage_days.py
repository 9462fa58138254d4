"""What users stored on each day, summed up from the history of their totals. (`usage` is what a user has now: `users.py`.)"""

from datetime import date
from decimal import Decimal
from typing import NamedTuple

from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.statements import statement

_PATIENCE_SECONDS = 600.0
"""A tool has time: the first run reads all changes for the first of them, and each run those of a day for the next one's."""

_PAGES_LOCK = 0x7573616765
"""`usage` in ASCII, beside the keys of `migrations.py` and `trail.py`."""

_SUMS = """count(*) as days, coalesce(sum(d.byte_seconds), 0) as byte_seconds, coalesce(max(d.most_bytes), 0) as most_bytes,
       coalesce(sum(d.added_bytes), 0)::bigint as added_bytes, coalesce(sum(d.removed_bytes), 0)::bigint as removed_bytes"""

_TODAY = statement("utc_today")
_FIRST_DAY = statement("first_day_to_sum")
_FIRST_CHANGE = statement("first_change_of")
_BEGIN_PAGE = statement("begin_usage_page")
_SUM = statement("sum_usage_day")
_NOTE = statement("note_usage_summed")
_AWAIT = statement("await_usage_pages")
_PAGE = statement("page_of_usage", sums=_SUMS)
_OF_USER = statement("usage_of_user", sums=_SUMS)


class SummedPage(NamedTuple):
    """Users of whom a day was summed. `last` is the id to go on from; None: that was all. `used` of them have a row of that day."""

    last: str | None
    users: int
    used: int
    byte_seconds: Decimal


class Usage(NamedTuple):
    """What one user stored in some days. `days` had a byte, or a change; `most_bytes` is the largest total of any moment."""

    user_id: str
    days: int
    byte_seconds: Decimal
    most_bytes: int
    added_bytes: int
    removed_bytes: int


async def today(db: Database) -> date:
    """The day of UTC that it is, by the database's clock, which dates the changes."""
    day: date = (await db.read(_TODAY))[0]["day"]
    return day


async def first_day_to_sum(db: Database) -> tuple[date | None, int]:
    """The day before the newest that was summed, or that of the first change; None: there is none. And an id for `first_change_of`."""
    row = (await db.read(_FIRST_DAY, patience=_PATIENCE_SECONDS))[0]
    return row["day"], row["first_id"]


async def first_change_of(db: Database, day: date, not_before: int) -> int:
    """An id such that no change of this day or a later one has a smaller one. Reads the changes from `not_before` on, one such id of an
    earlier day, until there is one of the day.
    """
    first_id: int = (await db.read(_FIRST_CHANGE, not_before, day, patience=_PATIENCE_SECONDS))[0]["id"]
    return first_id


async def sum_day(db: Database, day: date, first_id: int, after: str | None, limit: int) -> SummedPage:
    """Sums a day of the next `limit` users in the order of their ids, and writes what differs; nothing of who had no byte and no change.

    Repeating is safe. Takes no lock that an upload waits for. An erasure waits until it is done, and finds all that it has written.
    """
    async with db.transaction() as run:
        await run(_BEGIN_PAGE, _PAGES_LOCK)
        row = (await run(_SUM, day, first_id, after or "", limit))[0]
    return SummedPage(**dict(row))


async def note_summed(db: Database, day: date, first_id: int) -> None:
    """Remembers that a day was summed of all users; the next run begins with the day before it."""
    await db.write(_NOTE, day, first_id)


async def await_pages(db: Database) -> None:
    """After it, nobody writes usage of a user any more whose erasure had begun before."""
    await db.write(_AWAIT, _PAGES_LOCK)


async def page_of_usage(db: Database, first: date, end: date, after: str | None, limit: int) -> list[Usage]:
    """What the next `limit` users stored from a day until before another, in the order of their ids; `days` is 0 for who stored nothing.

    Of users who were erased there is nothing, and of those who were removed by hand what was summed before.
    """
    return [_usage_of(row) for row in await db.read(_PAGE, after or "", limit, first, end, patience=LONG_PATIENCE_SECONDS)]


async def usage_of_user(db: Database, user_id: str, first: date, end: date) -> Usage:
    """The same of one user, known or not."""
    return _usage_of((await db.read(_OF_USER, user_id, first, end))[0])


def _usage_of(row: Row) -> Usage:
    return Usage(**{name: row[name] for name in Usage._fields})
