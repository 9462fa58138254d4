"""How far the scrub has come, and what it found."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from server.actor import actor_json
from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import StoredFile
from server.ledger.statements import statement

_BEGIN = statement("begin_scrub")
_LIST = statement("list_scrubs")
_PAGE = statement("page_to_scrub")
_REMEMBER = statement("remember_scrub")
_FINISH = statement("finish_scrub")
_MARK = statement("mark_damaged")
_UNMARK = statement("unmark_damaged")
_DAMAGED = statement("page_of_damaged")


class ScrubPage(NamedTuple):
    """Files to verify. `last` is the id to go on from; None: the round is over."""

    files: list[StoredFile]
    last: UUID | None


async def begin_scrub(db: Database, volume_id: UUID) -> UUID | None:
    """After which file the scrub of a volume goes on; None: with the first."""
    after: UUID | None = (await db.write(_BEGIN, volume_id))[0]["after_id"]
    return after


async def last_rounds(db: Database) -> dict[UUID, datetime | None]:
    """When the last round over each volume ended that was ever begun; None: that has not ended yet."""
    return {row["volume_id"]: row["last_round_ended_at"] for row in await db.read(_LIST)}


async def page_to_scrub(db: Database, volume_id: UUID, after: UUID | None, limit: int) -> ScrubPage:
    """Those of the next `limit` files of all volumes, in the order of their ids, that are on this one."""
    rows = await db.read(_PAGE, volume_id, after, limit, patience=LONG_PATIENCE_SECONDS)
    return ScrubPage(
        [_file_of(row) for row in rows if row["file_path"] is not None], next(row["last"] for row in rows if row["file_path"] is None)
    )


async def remember_scrub(db: Database, volume_id: UUID, after: UUID) -> None:
    """All files up to this one have been looked at in this round."""
    await db.write(_REMEMBER, volume_id, after)


async def finish_scrub(db: Database, volume_id: UUID) -> None:
    """The round is over."""
    await db.write(_FINISH, volume_id)


async def mark_damaged(db: Database, file: StoredFile, reason: str) -> bool:
    """From now on reads of the file answer `damaged`. False when it is marked already, is gone or has other bytes by now."""
    return bool(await db.write(_MARK, file.id, file.volume_id, file.file_path, file.sha256, reason, actor_json()))


async def unmark_damaged(db: Database, file: StoredFile) -> bool:
    """The bytes of a damaged file are right again."""
    return bool(await db.write(_UNMARK, file.id, file.volume_id, file.file_path, file.sha256, actor_json()))


async def page_of_damaged(db: Database, after: UUID | None, limit: int) -> list[StoredFile]:
    """The next `limit` damaged files in the order of their ids."""
    return [_file_of(row) for row in await db.read(_DAMAGED, after, limit, patience=LONG_PATIENCE_SECONDS)]


def _file_of(row: Row) -> StoredFile:
    return StoredFile(**{name: row[name] for name in StoredFile.__struct_fields__})
