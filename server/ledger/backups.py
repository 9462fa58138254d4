"""What a backup, a drill and a restore tell the database, and the moment of the rows that a dump shows."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from server.errors import DatabaseUnavailable
from server.ledger.database import CONNECT_SECONDS, LONG_PATIENCE_SECONDS, Database
from server.ledger.statements import statement
from server.settings import Settings

HOLD_SECONDS = 300.0
"""How long bytes stay after the last sign of life of a backup."""
MARGIN_SECONDS = 60.0
"""A hold with less than this ahead counts as lost: its renewal might be committed after somebody has seen it end."""

_COUNT_SECONDS = 3_600.0
_NO_LIMITS = {"statement_timeout": "0", "idle_in_transaction_session_timeout": "0"}
"""Whatever the role or the server has: pg_dump, which needs the moment, sets the same for itself."""

_BEGIN = statement("begin_backup")
_RENEW = statement("renew_hold")
_RELEASE = statement("release_hold")
_FINISH = statement("finish_backup")
_FAIL = statement("fail_backup")
_DRILL = statement("record_drill")
_FACTS = statement("backup_facts")
_COUNT = statement("count_dumped")
_STOP = statement("stop_uploads")
_CLEAR = statement("clear_upload_stops")
_STOPS = statement("list_upload_stops")
_FORGET_PREVIEWS = statement("forget_restored_previews")
_IS_EMPTY = statement("is_empty_database")
_VERSION = statement("server_version")


class Moment(NamedTuple):
    """The rows as of one moment, for a dump that shows the same. `files` and `size_bytes` are by volume."""

    snapshot: str
    at: datetime
    server_version: int
    files: dict[UUID, int]
    size_bytes: dict[UUID, int]


class BackupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with backups; None where there never was one. `proven_at` is the moment of the newest that a drill has restored."""

    last_state: str | None
    last_error: str | None
    last_good_at: datetime | None
    last_drill_passed: bool | None
    last_proof_at: datetime | None
    proven_at: datetime | None
    uploads_are_stopped: bool

    def are_proven(self, max_age_days: int) -> bool:
        """Whether the last drill has restored a backup, so many days ago at most. What was not restored lately is hope."""
        youngest = datetime.now(UTC) - timedelta(days=max_age_days)
        return bool(self.last_drill_passed and self.last_proof_at and self.last_proof_at >= youngest)


class UploadStop(NamedTuple):
    """Why, and since when, nothing new is stored."""

    reason: str
    created_at: datetime


async def begin_backup(db: Database, backup_id: UUID, way: str) -> None:
    """From its commit on, bytes of deleted files stay. Call it under the tool's lock: what else is said to be running is taken for dead."""
    await db.write(_BEGIN, backup_id, way, HOLD_SECONDS, patience=LONG_PATIENCE_SECONDS)


async def renew_hold(db: Database, backup_id: UUID) -> bool:
    """Bytes stay for another `HOLD_SECONDS`. False: they may have gone meanwhile, so the backup is worth nothing."""
    return bool(await db.write(_RENEW, backup_id, HOLD_SECONDS, MARGIN_SECONDS))


async def release_hold(db: Database, backup_id: UUID) -> bool:
    """Bytes may go. False: as `renew_hold`."""
    return bool(await db.write(_RELEASE, backup_id, MARGIN_SECONDS))


async def finish_backup(db: Database, backup_id: UUID, at: datetime, files: int, size_bytes: int) -> bool:
    """The backup is whole, and shows that many files of that moment. False when it was given up for dead."""
    return bool(await db.write(_FINISH, backup_id, at, files, size_bytes))


async def fail_backup(db: Database, backup_id: UUID, error: str) -> None:
    """It has failed, and bytes may go. Repeating is safe."""
    await db.write(_FAIL, backup_id, error)


async def record_drill(
    db: Database, backup_id: UUID, at: datetime, *, is_full: bool, files: int, size_bytes: int, seconds: float, error: str | None
) -> None:
    """A backup was restored to scratch; no `error`: it is good."""
    await db.write(_DRILL, backup_id, at, error is None, is_full, files, size_bytes, seconds, error)


async def backup_facts(db: Database) -> BackupFacts:
    """For monitoring."""
    row = (await db.read(_FACTS))[0]
    return BackupFacts(**{name: row[name] for name in BackupFacts.__struct_fields__})


async def stop_uploads(db: Database, reason: str) -> None:
    """Nothing new is stored from its commit on."""
    await db.write(_STOP, reason)


async def clear_upload_stops(db: Database) -> list[UploadStop]:
    """Uploads are taken again. Returns why they were not."""
    return [UploadStop(*row) for row in await db.write(_CLEAR)]


async def list_upload_stops(db: Database) -> list[UploadStop]:
    """Why nothing new is stored; nothing when it is."""
    return [UploadStop(*row) for row in await db.read(_STOPS)]


@asynccontextmanager
async def moment(settings: Settings) -> AsyncIterator[Moment]:
    """Keeps one moment of the rows for as long as it is entered, for pg_dump's `--snapshot`. Raises `DatabaseUnavailable`."""
    lost = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
    try:
        connection = await asyncpg.connect(
            settings.database_url, timeout=CONNECT_SECONDS, server_settings={"application_name": "coffer backup"} | _NO_LIMITS
        )
    except lost as problem:
        raise DatabaseUnavailable from problem
    try:
        try:
            await connection.execute("begin isolation level repeatable read read only")
            row = await connection.fetchrow(
                "select pg_export_snapshot() as snapshot, now() as at, current_setting('server_version_num')::integer as version"
            )
            assert row is not None  # noqa: S101 - it has no condition
            counts = await connection.fetch(_COUNT, timeout=_COUNT_SECONDS)
        except lost as problem:
            raise DatabaseUnavailable from problem
        yield Moment(
            row["snapshot"],
            row["at"],
            row["version"],
            {each["volume_id"]: each["files"] for each in counts},
            {each["volume_id"]: each["bytes"] for each in counts},
        )
    finally:
        connection.terminate()


def settling(reason: str, mount_paths: dict[UUID, str], *, with_previews: bool) -> str:
    """The SQL that makes a store of a restored dump, for psql, which has no parameters: uploads stop, volumes have new places."""
    places = ", ".join(f"({_literal(str(volume_id))}::uuid, {_literal(path)})" for volume_id, path in mount_paths.items())
    settled = statement("settle_restored", reason=_literal(reason), places=places or "(null::uuid, null)")
    return settled + ";\n" + ("" if with_previews else _FORGET_PREVIEWS + ";\n")


def _literal(text: str) -> str:
    """A text in SQL, where standard_conforming_strings is on, as it is in a dump."""
    return "'" + text.replace("'", "''") + "'"


async def is_empty(db: Database) -> bool:
    """Whether the database has no table."""
    is_empty_database: bool = (await db.read(_IS_EMPTY))[0]["yes"]
    return is_empty_database


async def server_version(db: Database) -> int:
    """PostgreSQL's, such as 160004."""
    version: int = (await db.read(_VERSION))[0]["version"]
    return version
