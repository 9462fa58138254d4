"""The trash: files that were deleted and may come back. They are rows of `user_files` with `deleted_at`, count, and keep their bytes."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from server.actor import actor_json
from server.ledger.database import LONG_PATIENCE_SECONDS, Database
from server.ledger.files import FILE_COLUMNS, file_of, get_file, tombstones_of
from server.ledger.models import File, MovedToTrash, Tombstone
from server.ledger.statements import statement

_TRASH = statement("trash_files")
_LIST = statement("list_trash", file=FILE_COLUMNS)
_LIST_OF_KINDS = statement("list_trash_of_kinds", file=FILE_COLUMNS)
_RESTORE = statement("restore_from_trash", file=FILE_COLUMNS)
_PAGE_OF_OLD = statement("page_of_old_trash")
_DELETE_OLD = statement("delete_old_trash")

Position = tuple[datetime, UUID]
"""Since when a file is in the trash, and its id."""


class OldTrash(NamedTuple):
    """A file that has been in the trash for long. `is_held`: a legal hold keeps it."""

    user_id: str
    id: UUID
    size_bytes: int
    deleted_at: datetime
    is_held: bool


async def trash_files(
    db: Database, user_id: str, volume_id: UUID, moved: Sequence[MovedToTrash], rule_id: int | None = None
) -> dict[UUID, Tombstone | None]:
    """Moves those of the user's files to the trash that are still on that volume, with the old generation.

    Returns these, with what is left to unlink. Call it when the bytes are synced under their new names. With `rule_id`, only files that the
    rule is about. Raises `LegalHold`, and `CommitUnknown` (both names must stay).
    """
    rows = await db.write(
        _TRASH,
        user_id,
        volume_id,
        [each.id for each in moved],
        [each.old_generation for each in moved],
        [each.generation for each in moved],
        [each.file_path for each in moved],
        rule_id,
        actor_json(),
        patience=LONG_PATIENCE_SECONDS,
    )
    left = dict(tombstones_of([row for row in rows if row["tombstone_id"] is not None]))
    return {row["file_id"]: left.get(row["file_id"]) for row in rows}


async def list_trash(db: Database, user_id: str, kinds: Collection[str] | None, after: Position | None, limit: int) -> list[File]:
    """The next `limit` files in the user's trash, of these kinds (None is all), the last deleted first."""
    deleted_at, file_id = after or (None, None)
    if kinds is None:
        rows = await db.read(_LIST, user_id, deleted_at, file_id, limit)
    else:
        rows = await db.read(_LIST_OF_KINDS, user_id, deleted_at, file_id, limit, sorted(set(kinds)))
    return [file_of(row) for row in rows]


async def restore_file(db: Database, user_id: str, file_id: UUID) -> File:
    """Takes a file out of the trash. One that is not in it stays as it is: repeating is safe. Raises `NotFound`."""
    rows = await db.write(_RESTORE, user_id, file_id, actor_json())
    return file_of(rows[0]) if rows else await get_file(db, user_id, file_id)


async def page_of_old_trash(db: Database, days: int, after: Position | None, limit: int) -> list[OldTrash]:
    """The next `limit` files of all users that have been in the trash for so many days."""
    deleted_at, file_id = after or (None, None)
    rows = await db.read(_PAGE_OF_OLD, days, deleted_at, file_id, limit, patience=LONG_PATIENCE_SECONDS)
    return [OldTrash(row["user_id"], row["id"], row["file_size"], row["deleted_at"], row["is_held"]) for row in rows]


async def delete_old_trash(db: Database, user_id: str, ids: Sequence[UUID], days: int) -> list[tuple[UUID, Tombstone]]:
    """As `delete_files`, those of the user's files that are in the trash still, and have been for so many days."""
    return tombstones_of(await db.write(_DELETE_OLD, user_id, list(ids), days, actor_json(), patience=LONG_PATIENCE_SECONDS))
