"""What is beyond its time, but for files."""

import msgspec

from server.ledger.database import LONG_PATIENCE_SECONDS, Database
from server.ledger.statements import statement

_PATIENCE_SECONDS = 600.0
"""A tool has time: counting old events reads all of them."""

_COUNT = statement("count_overdue")
_HELD = statement("held_users")
_PURGE_EVENTS = statement("purge_events")
_PURGE_JOBS = statement("purge_jobs")


class Overdue(msgspec.Struct, frozen=True, kw_only=True):
    """How much there is of what should go."""

    reservations: int
    reserved_bytes: int
    resumable_uploads: int
    records: int
    events: int
    jobs: int


async def count_overdue(
    db: Database, *, uploads_seconds: float, records_days: int | None, events_days: int | None, jobs_days: int | None
) -> Overdue:
    """Counts expired reservations, resumable uploads and jobs that ended so long ago, and older records and events; None: for ever."""
    row = (await db.read(_COUNT, uploads_seconds, records_days, events_days, jobs_days, patience=_PATIENCE_SECONDS))[0]
    return Overdue(**{name: row[name] for name in Overdue.__struct_fields__})


async def held_users(db: Database) -> list[str]:
    """Users whom a legal hold keeps. Looks at all of them."""
    return [row["user_id"] for row in await db.read(_HELD, patience=LONG_PATIENCE_SECONDS)]


async def purge_events(db: Database, days: int, limit: int) -> int:
    """Deletes those of the `limit` oldest events that are older than so many days, and tells how many."""
    count: int = (await db.write(_PURGE_EVENTS, days, limit, patience=LONG_PATIENCE_SECONDS))[0]["count"]
    return count


async def purge_jobs(db: Database, days: int, limit: int) -> int:
    """Deletes up to `limit` of the jobs that ended so many days ago, but for those of held users, and tells how many."""
    count: int = (await db.write(_PURGE_JOBS, days, limit, patience=LONG_PATIENCE_SECONDS))[0]["count"]
    return count
