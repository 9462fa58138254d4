"""What a sysadmin looks at: the database itself, totals, what is under way, and when the last backup was made."""

from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from server.ledger.database import Database
from server.ledger.statements import statement

_FACTS = statement("database_facts")
_TOTALS = statement("stored_totals")
_DAMAGED = statement("count_damaged")
_JOBS = statement("count_jobs")
_UPLOADS = statement("uploads_under_way")
_HAS_BACKUPS = statement("has_backups")
_BACKUPS = statement("last_backups")
_GROWTH = statement("growth_by_volume")


class DatabaseFacts(NamedTuple):
    """PostgreSQL itself. `version` is 150006 for 15.6; the settings are as it writes them; `connections` counts all there are now."""

    version: int
    version_text: str
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    data_checksums: str
    connections_at_most: int
    connections: int
    size_bytes: int
    now: datetime


class Totals(NamedTuple):
    """What all users have, and what uploads under way hold."""

    users: int
    files: int
    total_bytes: int
    reserved_bytes: int


class Jobs(NamedTuple):
    """Jobs in one state, and for how long the oldest has been there."""

    state: str
    jobs: int
    oldest_seconds: float


class UploadUnderWay(NamedTuple):
    """An upload that holds a quota. `way`: plain, link or resumable. `waits`: nobody sends to it now."""

    user_id: str
    reserved_bytes: int
    age_seconds: float
    way: str
    waits: bool


class Backups(NamedTuple):
    """None: never."""

    done_at: datetime | None
    tried_at: datetime | None
    proven_at: datetime | None
    last_drill_passed: bool | None


class Growth(NamedTuple):
    """What the users of a volume store more than `seconds` ago; negative where it is less."""

    volume_id: UUID
    more_bytes: int
    seconds: float


async def database_facts(db: Database) -> DatabaseFacts:
    """Of the server that answers."""
    return DatabaseFacts(**dict((await db.read(_FACTS))[0]))


async def stored_totals(db: Database) -> Totals:
    """As the counters say."""
    return Totals(**dict((await db.read(_TOTALS))[0]))


async def count_damaged(db: Database) -> int:
    """Files that answer `damaged`."""
    return int((await db.read(_DAMAGED))[0]["files"])


async def count_jobs(db: Database) -> list[Jobs]:
    """By state; a state without jobs is left out."""
    return [Jobs(**dict(row)) for row in await db.read(_JOBS)]


async def uploads_under_way(db: Database, limit: int) -> tuple[list[UploadUnderWay], int]:
    """The latest `limit`, and how many there are in all."""
    rows = await db.read(_UPLOADS, limit)
    shown = [UploadUnderWay(**{name: row[name] for name in UploadUnderWay._fields}) for row in rows]
    return shown, rows[0]["all_uploads"] if rows else 0


async def last_backups(db: Database) -> Backups | None:
    """None where the schema knows of no backups."""
    if not (await db.read(_HAS_BACKUPS))[0]["present"]:
        return None
    return Backups(**dict((await db.read(_BACKUPS))[0]))


async def growth_by_volume(db: Database, within: timedelta, changes: int) -> list[Growth]:
    """Within that time at most, and of that many changes; nothing of a volume without any."""
    return [Growth(**dict(row)) for row in await db.read(_GROWTH, within, changes)]
