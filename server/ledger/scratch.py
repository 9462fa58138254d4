"""Databases for an hour: a dump is restored to one and asked whether it is whole."""

from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg

from server.errors import DatabaseUnavailable
from server.ledger.database import CONNECT_SECONDS, LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import StoredFile
from server.ledger.statements import statement
from server.settings import Settings

_CREATE_LISTING = statement("create_listing")
_NOTE = statement("note_listing")
_MISSING = statement("missing_in_listing")
_SAMPLE = statement("sample_files")
_WITHHELD = statement("withheld_paths")
_COUNT = statement("count_dumped")

_PATIENCE_SECONDS = 600.0


class Listed(NamedTuple):
    """An entry of a backup. No `sha256`: its bytes were not read."""

    path: str
    size_bytes: int
    sha256: bytes | None


class Compared(NamedTuple):
    """A page of rows held against what a backup holds. `last` is the id to go on from; None: that was all."""

    missing: list[StoredFile]
    looked_at: int
    last: UUID | None


async def make_scratch(settings: Settings, name: str) -> str:
    """A new, empty database on the server of the configured one, in the place of a left-over of that name. Returns its URL.

    Raises `DatabaseUnavailable`, also where the role may not create databases.
    """
    await drop_scratch(settings, name)
    await _execute(settings, f"create database {name} template template0")
    return urlunsplit(urlsplit(settings.database_url)._replace(path=f"/{name}"))


async def drop_scratch(settings: Settings, name: str) -> None:
    """Removes it, whoever is connected. Repeating is safe."""
    await _execute(settings, f"drop database if exists {name} with (force)")


async def _execute(settings: Settings, sql: str) -> None:
    try:
        connection = await asyncpg.connect(settings.database_url, timeout=CONNECT_SECONDS)
        try:
            await connection.execute(sql, timeout=_PATIENCE_SECONDS)
        finally:
            connection.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as problem:
        raise DatabaseUnavailable from problem


async def create_listing(db: Database) -> None:
    """Where what a backup holds is noted."""
    await db.write(_CREATE_LISTING)


async def note_listing(db: Database, volume_id: UUID, entries: Sequence[Listed]) -> None:
    """The backup holds these of the volume."""
    paths, sizes, digests = ([each[place] for each in entries] for place in range(3))
    await db.write(_NOTE, volume_id, paths, sizes, digests, patience=LONG_PATIENCE_SECONDS)


async def compare_listing(db: Database, after: UUID | None, limit: int) -> Compared:
    """The next `limit` files in the order of their ids: which of them the backup lacks, or holds with other bytes."""
    rows = await db.read(_MISSING, after or UUID(int=0), limit, patience=_PATIENCE_SECONDS)
    end = next(row for row in rows if row["id"] is None)
    return Compared([_file_of(row) for row in rows if row["id"] is not None], end["looked_at"], end["last"])


async def sample(db: Database, count: int) -> list[StoredFile]:
    """So many files by chance, none that is known to be damaged."""
    return [_file_of(row) for row in await db.read(_SAMPLE, count, patience=_PATIENCE_SECONDS)]


async def withheld_paths(db: Database, volume_id: UUID, paths: Sequence[str]) -> set[str]:
    """Those of the paths whose bytes were saved from withheld/."""
    return {row["path"] for row in await db.read(_WITHHELD, volume_id, list(paths), patience=_PATIENCE_SECONDS)}


async def count_by_volume(db: Database) -> dict[UUID, tuple[int, int]]:
    """Files and bytes of each volume."""
    return {row["volume_id"]: (row["files"], row["bytes"]) for row in await db.read(_COUNT, patience=_PATIENCE_SECONDS)}


def _file_of(row: Row) -> StoredFile:
    return StoredFile(**{name: row[name] for name in StoredFile.__struct_fields__})
