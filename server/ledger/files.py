"""Rows of `user_files`. Every function is one statement; another user's file and a missing one are both `NotFound` (P4)."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.errors import Conflict, NotFound, PreconditionFailed
from server.kinds import PREVIEWED
from server.ledger.database import COMMIT_PATIENCE_SECONDS, LONG_PATIENCE_SECONDS, Database, Row, unstorable
from server.ledger.models import File, NewFile, PreviewState, ReplacedContent, Tombstone
from server.ledger.statements import statement

FILE_COLUMNS = ", ".join(File.__struct_fields__)

_PUBLISH = statement("publish_file")
_REPLACE = statement("replace_content", file=FILE_COLUMNS)
_GET = statement("get_file", file=FILE_COLUMNS)
_BY_KEY = statement("find_file_by_idempotency_key", file=FILE_COLUMNS)
_ANYWHERE = statement("find_file_anywhere", file=FILE_COLUMNS)
_UPDATE = statement("update_file", file=FILE_COLUMNS)
_FAVORITE = statement("set_favorite", file=FILE_COLUMNS)
_TAGS = statement("set_tags", file=FILE_COLUMNS)
_IDS_OF_KINDS = statement("ids_of_kinds")
_DELETE = statement("delete_files")
_GET_MANY = statement("get_files", file=FILE_COLUMNS)
_PUBLIC = statement("get_public_file", file=FILE_COLUMNS)
_SET_PUBLIC = statement("set_public", file=FILE_COLUMNS)
_RENAME_GENERATION = statement("rename_generation", file=FILE_COLUMNS)


def file_of(row: Row) -> File:
    """The struct of a row that holds at least `FILE_COLUMNS`."""
    values = {name: row[name] for name in File.__struct_fields__}
    values["metadata"] = msgspec.json.decode(values["metadata"])
    return File(**values)


async def publish_file(db: Database, new: NewFile) -> File:
    """Ends the upload's reservation, if it has one, and adds the file: one transaction, in which the quota is enforced.

    Call it when the bytes are synced under `new.file_path`. Raises `QuotaExceeded`, `UserErasing`, `NotFound` (no such user,
    or not the one of `user_since`, or another writer has the upload, or its reservation is gone and needed), `Conflict` (a file with
    this id or this user's idempotency key exists), `CommitUnknown` (the bytes must stay) and `DatabaseUnavailable` (nothing happened).
    """
    rows = await db.write(
        _PUBLISH,
        new.id,
        new.user_id,
        new.file_name,
        new.file_type,
        new.mime_type,
        new.file_size,
        new.sha256,
        new.volume_id,
        new.file_path,
        new.generation,
        new.package_name,
        new.tags,
        json_text(new.metadata),
        new.idempotency_key,
        new.user_since,
        actor_json(),
        preview_state_of(new),
        new.fence,
        new.needs_reservation,
        patience=COMMIT_PATIENCE_SECONDS,
    )
    if not rows:
        raise NotFound
    return published(new, rows[0]["upload_date"])


def preview_state_of(new: NewFile) -> PreviewState | None:
    """What a new file's row says of its preview."""
    return "pending" if new.file_type in PREVIEWED else None


def published(new: NewFile, date: datetime) -> File:
    """The row that publishing made of `new`; every date of it is the transaction's."""
    return File(
        id=new.id,
        user_id=new.user_id,
        file_name=new.file_name,
        file_type=new.file_type,
        mime_type=new.mime_type,
        file_size=new.file_size,
        sha256=new.sha256,
        volume_id=new.volume_id,
        file_path=new.file_path,
        generation=new.generation,
        thumbnail_path=None,
        resolution=None,
        width=None,
        height=None,
        duration=None,
        duration_seconds=None,
        preview_state=preview_state_of(new),
        preview_reason=None,
        preview_tries=0,
        thumbhash=None,
        average_color=None,
        frame_rate=None,
        video_codec=None,
        audio_codec=None,
        package_name=new.package_name,
        tags=new.tags,
        is_favorite=False,
        public_id=None,
        metadata=new.metadata,
        upload_date=date,
        content_changed_at=date,
        created_at=date,
        updated_at=date,
        damaged_at=None,
        deleted_at=None,
    )


def replacing(user_id: str, file_id: UUID, expected_generation: int, new: ReplacedContent) -> tuple[Any, ...]:
    """The first 11 parameters of every statement that points a file at other bytes; the last is the actor."""
    return (
        user_id,
        file_id,
        expected_generation,
        new.upload_id,
        new.mime_type,
        new.file_size,
        new.sha256,
        new.volume_id,
        new.file_path,
        new.generation,
        actor_json(),
    )


async def replace_content(db: Database, *, user_id: str, file_id: UUID, expected_generation: int, new: ReplacedContent) -> File:
    """Points a file at other bytes and leaves a tombstone for the old ones; ends the reservation `new.upload_id` in any case.

    Call it when the bytes are synced under `new.file_path`. Raises `PreconditionFailed` when the file has another generation,
    `NotFound`, `LegalHold`, `QuotaExceeded`, `UserErasing`, `CommitUnknown` and `DatabaseUnavailable`.
    """
    rows = await db.write(
        _REPLACE,
        *replacing(user_id, file_id, expected_generation, new),
        patience=COMMIT_PATIENCE_SECONDS,
    )
    if not rows:
        await get_file(db, user_id, file_id)
        raise PreconditionFailed
    return _one(rows)


async def get_file(db: Database, user_id: str, file_id: UUID) -> File:
    """One file. Raises `NotFound`."""
    return _one(await db.read(_GET, user_id, file_id))


async def get_files(db: Database, user_id: str, ids: Sequence[UUID]) -> dict[UUID, File]:
    """Those of the user's files that `ids` name."""
    files = map(file_of, await db.read(_GET_MANY, user_id, list(ids)))
    return {file.id: file for file in files}


async def get_public_file(db: Database, public_id: str) -> File:
    """The file of a public URL. Raises `NotFound`."""
    return _one(await db.read(_PUBLIC, public_id))


async def set_public(db: Database, user_id: str, file_id: UUID, public_id: str | None) -> File:
    """Makes a file public under this id, unless it is public under another already; None ends that for good. Raises `NotFound`."""
    return _one(await db.write(_SET_PUBLIC, user_id, file_id, public_id, actor_json()))


async def rename_generation(db: Database, user_id: str, old: File, generation: int, path: str) -> File:
    """Points a file at another name of the same bytes, leaving a tombstone for the old one.

    Call it when the new name is synced. Raises `Conflict` when the file has another generation, is on another volume or is gone, and
    `CommitUnknown`.
    """
    rows = await db.write(_RENAME_GENERATION, user_id, old.id, old.generation, generation, path, old.volume_id, actor_json())
    if not rows:
        raise Conflict
    return _one(rows)


async def find_file_by_idempotency_key(db: Database, user_id: str, key: str) -> File | None:
    """The file that an earlier request with this key published."""
    rows = await db.read(_BY_KEY, user_id, key)
    return file_of(rows[0]) if rows else None


async def find_file_anywhere(db: Database, file_id: UUID) -> File | None:
    """The file whoever owns it: settles a commit whose answer was lost."""
    rows = await db.read(_ANYWHERE, file_id)
    return file_of(rows[0]) if rows else None


async def update_file(
    db: Database,
    user_id: str,
    file_id: UUID,
    *,
    file_name: str | msgspec.UnsetType = msgspec.UNSET,
    package_name: str | msgspec.UnsetType | None = msgspec.UNSET,
    metadata: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET,
) -> File:
    """Changes what is not `UNSET`; `metadata` replaces what was there. Raises `NotFound`."""
    return _one(
        await db.write(
            _UPDATE,
            user_id,
            file_id,
            file_name is not msgspec.UNSET,
            None if file_name is msgspec.UNSET else file_name,
            package_name is not msgspec.UNSET,
            None if package_name is msgspec.UNSET else package_name,
            metadata is not msgspec.UNSET,
            None if metadata is msgspec.UNSET else json_text(metadata),
            actor_json(),
        )
    )


async def set_favorite(db: Database, user_id: str, file_id: UUID, value: bool | None) -> File:
    """Sets the flag, or turns it over when `value` is None. Raises `NotFound`."""
    return _one(await db.write(_FAVORITE, user_id, file_id, value, actor_json()))


async def set_tags(db: Database, user_id: str, file_id: UUID, tags: list[str]) -> File:
    """Replaces the tags. Raises `NotFound`."""
    return _one(await db.write(_TAGS, user_id, file_id, tags, actor_json()))


async def ids_of_kinds(db: Database, user_id: str, ids: Sequence[UUID], kinds: Collection[str]) -> list[UUID]:
    """Those of `ids` that are files of the user and of these kinds."""
    return [row["id"] for row in await db.read(_IDS_OF_KINDS, user_id, list(ids), list(kinds))]


async def delete_files(db: Database, user_id: str, ids: Sequence[UUID], *, from_trash: bool = False) -> list[tuple[UUID, Tombstone]]:
    """Deletes those of `ids` that are the user's, gives their quota back and returns what is left to unlink. Of files in the trash, with
    `from_trash`, and else of the others.

    Ids that are not returned were not found. A crash before the unlink leaves the tombstone to housekeeping. Raises `LegalHold`.
    """
    return tombstones_of(await db.write(_DELETE, user_id, list(ids), from_trash, actor_json(), patience=LONG_PATIENCE_SECONDS))


def tombstones_of(rows: list[Row]) -> list[tuple[UUID, Tombstone]]:
    """File ids and tombstones, as `delete_files_v3` returns them."""
    return [(row["file_id"], Tombstone(id=row["tombstone_id"], volume_id=row["volume_id"], file_path=row["file_path"])) for row in rows]


def _one(rows: list[Row]) -> File:
    if not rows:
        raise NotFound
    return file_of(rows[0])


def json_text(value: dict[str, Any] | list[str]) -> str:
    """JSON for a jsonb parameter. Raises `InvalidRequest` for text that is no Unicode."""
    try:
        return msgspec.json.encode(value).decode()
    except UnicodeEncodeError as problem:  # half of a surrogate pair
        raise unstorable() from problem
