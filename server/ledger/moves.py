"""Moving users between volumes, as rows: who is being moved, what is not where it should be, and which copies are left.

A copy is a stored name on another volume than the row of its file says. There is a tombstone for it from before it is made until it is
removed, by whoever moves files and nobody else: so a process that dies leaves nothing that is not known.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import ResumableUpload, Tombstone
from server.ledger.statements import statement

_PATIENCE_SECONDS = 600.0

_BEGIN = statement("begin_move")
_RESUME = statement("resume_move")
_RELABEL = statement("relabel_uploads")
_FINISH = statement("finish_move")
_BEING_MOVED = statement("users_being_moved")
_TO_MOVE = statement("users_to_move")
_ONE_TO_MOVE = statement("user_to_move")
_ASTRAY = statement("users_astray")
_LARGEST = statement("largest_user")
_PAGE = statement("page_to_move")
_PREVIEWS = statement("previews_to_move")
_COPIES_ON = statement("copies_on")
_ANNOUNCE = statement("announce_copies")
_LOCK = statement("lock_files_to_move")
_SWITCH = statement("switch_files")
_OLD_COPIES = statement("old_copies")
_COUNT_COPIES = statement("count_copies")
_RESUMABLES = statement("resumables_to_move", row=", ".join(f"r.{name}" for name in ResumableUpload.__struct_fields__))
_SWITCH_RESUMABLE = statement("switch_resumable_upload")

T = TypeVar("T", bound=msgspec.Struct)

_FIRST = (datetime.min.replace(tzinfo=UTC), UUID(int=0))


class MovedUser(msgspec.Struct, frozen=True, kw_only=True):
    """A user, and how much is to be moved with the user. `volume_id` is where the user is placed."""

    user_id: str
    volume_id: UUID | None
    file_count: int
    bytes: int


class MovedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is not on its user's volume."""

    id: UUID
    user_id: str
    volume_id: UUID
    file_path: str
    file_size: int
    sha256: bytes
    damaged_at: datetime | None
    generation: int
    upload_date: datetime


class MovedPreview(NamedTuple):
    """A preview of such a file."""

    file_id: UUID
    file_name: str
    size_bytes: int


async def begin_move(db: Database, user_id: str, volume_id: UUID) -> bool:
    """Places a user on another volume. False when the user is there, is unknown or is being erased, or may not be there."""
    return bool(await db.write(_BEGIN, user_id, volume_id, actor_json()))


async def resume_move(db: Database, user_id: str) -> None:
    """Has a user counted among those being moved, of whom something lies on another volume than the user's. Repeating is safe."""
    await db.write(_RESUME, user_id)


async def relabel_uploads(db: Database, user_id: str) -> None:
    """Says of upload links and of uploads that are over that they are on the user's volume. Nothing of theirs is on any."""
    await db.write(_RELABEL, user_id, patience=LONG_PATIENCE_SECONDS)


async def finish_move(db: Database, user_id: str, least_seconds: float) -> bool:
    """Ends a move that began so long ago. False while anything of the user's lies, or is being received, on another volume."""
    return bool(await db.write(_FINISH, user_id, least_seconds, actor_json(), patience=_PATIENCE_SECONDS))


async def users_being_moved(db: Database, after: str, limit: int) -> list[str]:
    """The next `limit` users whose move has begun, in the order of their ids."""
    return [row["user_id"] for row in await db.read(_BEING_MOVED, after, limit)]


async def users_to_move(db: Database, volume_id: UUID, after: str, limit: int) -> list[MovedUser]:
    """The next `limit` users who are placed on a volume or have anything there, in the order of their ids."""
    return [_filled(MovedUser, row) for row in await db.read(_TO_MOVE, volume_id, after, limit, patience=_PATIENCE_SECONDS)]


async def user_to_move(db: Database, user_id: str) -> MovedUser | None:
    """One user; None when there is none, or none any more."""
    rows = await db.read(_ONE_TO_MOVE, user_id)
    return _filled(MovedUser, rows[0]) if rows else None


async def users_astray(db: Database, after: str, limit: int) -> list[MovedUser]:
    """The next `limit` users who are on a volume that is reserved for somebody else, or not on the one that is reserved for them."""
    return [_filled(MovedUser, row) for row in await db.read(_ASTRAY, after, limit, patience=_PATIENCE_SECONDS)]


async def largest_user(db: Database, volume_id: UUID, most_bytes: int, but: Sequence[str]) -> MovedUser | None:
    """Who stores the most on a volume, and no more than so many bytes."""
    rows = await db.read(_LARGEST, volume_id, most_bytes, list(but), patience=_PATIENCE_SECONDS)
    return _filled(MovedUser, rows[0]) if rows else None


async def page_to_move(db: Database, user_id: str, after: MovedFile | None, limit: int) -> list[MovedFile]:
    """The next `limit` files of a user that are not on the user's volume, in the order in which they came."""
    date, file_id = _FIRST if after is None else (after.upload_date, after.id)
    return [_filled(MovedFile, row) for row in await db.read(_PAGE, user_id, date, file_id, limit, patience=_PATIENCE_SECONDS)]


async def previews_to_move(db: Database, ids: Sequence[UUID]) -> list[MovedPreview]:
    """All previews of some files."""
    rows = await db.read(_PREVIEWS, list(ids), patience=LONG_PATIENCE_SECONDS)
    return [MovedPreview(row["file_id"], row["file_name"], row["size_bytes"]) for row in rows]


# Copies


async def copies_on(db: Database, volume_id: UUID, ids: Sequence[UUID]) -> list[Tombstone]:
    """What is left on a volume of some files that are on another one."""
    return [_filled(Tombstone, row) for row in await db.read(_COPIES_ON, volume_id, list(ids))]


async def announce_copies(db: Database, volume_id: UUID, files: Sequence[MovedFile]) -> set[UUID]:
    """Makes copies of files, and of their previews, known before there are any on that volume. Returns which of them still need one."""
    rows = await db.write(_ANNOUNCE, volume_id, [each.id for each in files], [each.generation for each in files])
    return {row["id"] for row in rows}


async def switch_files(
    db: Database, volume_id: UUID, to: UUID, files: Sequence[MovedFile], publish: Callable[[list[UUID]], Awaitable[None]]
) -> set[UUID]:
    """From now on those files of a volume are on another one that are still as they were; returns which those are.

    `publish` gives the copies of those files their names, durably, while nobody can delete, replace or revoke them. What this raises leaves
    it open whether the rows were changed; the copies' tombstones then tell which of both names is the copy.
    """
    async with db.transaction() as run:
        rows = await run(_LOCK, volume_id, [each.id for each in files], [each.generation for each in files])
        ids = [row["id"] for row in rows]
        if ids:
            await publish(ids)
            await run(_SWITCH, volume_id, to, ids)
    return set(ids)


async def old_copies(db: Database, older_than_seconds: float, limit: int) -> list[Tombstone]:
    """Up to `limit` copies that have been so for that long."""
    return [_filled(Tombstone, row) for row in await db.read(_OLD_COPIES, older_than_seconds, limit, patience=LONG_PATIENCE_SECONDS)]


async def count_copies(db: Database) -> tuple[int, float]:
    """How many copies there are, and the age of the oldest in seconds."""
    row = (await db.read(_COUNT_COPIES, patience=_PATIENCE_SECONDS))[0]
    return row["copies"], row["oldest_seconds"] or 0.0


# Resumable uploads


async def resumables_to_move(db: Database, user_id: str) -> list[ResumableUpload]:
    """The user's resumable uploads that are not on the user's volume, but for those that somebody writes to, or is reading to join them."""
    return [_filled(ResumableUpload, row) for row in await db.read(_RESUMABLES, user_id)]


async def switch_resumable_upload(db: Database, upload: ResumableUpload, volume_id: UUID, incoming_name: UUID) -> bool:
    """From now on its bytes, as many as `upload` has, lie on that volume under that name. False when somebody has had it since."""
    rows = await db.write(_SWITCH_RESUMABLE, upload.id, upload.fence, upload.offset_bytes, upload.incoming_name, volume_id, incoming_name)
    return bool(rows)


def _filled(kind: type[T], row: Row) -> T:
    return kind(**{name: row[name] for name in kind.__struct_fields__})
