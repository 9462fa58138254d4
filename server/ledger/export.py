"""All files of a user and what else is known of them, page by page, for an export."""

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import Database
from server.ledger.files import FILE_COLUMNS, file_of
from server.ledger.models import File
from server.ledger.statements import statement

_PAGE_OF_USER = statement("page_of_user_files", file=FILE_COLUMNS)
_GET = statement("get_exported_file", file=FILE_COLUMNS)
_RECORD_EXPORT = statement("record_export")

RecordKind = Literal["generation_jobs", "generated_media", "linked_assets"]

_RECORDS: dict[RecordKind, str] = {
    "generation_jobs": statement("page_of_user_jobs"),
    "generated_media": statement("page_of_user_media"),
    "linked_assets": statement("page_of_user_assets"),
}
RECORD_KINDS = tuple(_RECORDS)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One row, as JSON without what is nobody else's business: secrets, and how it is worked on."""

    created_at: datetime
    id: UUID
    json: str


async def page_of_user_files(db: Database, user_id: str, after: File | None, until: datetime, limit: int) -> list[File]:
    """The next `limit` of the user's files after one, in the order of their upload, which was not after `until`; the trash included."""
    position = (None, None) if after is None else (after.upload_date, after.id)
    return [file_of(row) for row in await db.read(_PAGE_OF_USER, user_id, *position, until, limit)]


async def page_of_user_records(
    db: Database, kind: RecordKind, user_id: str, after: Record | None, until: datetime, limit: int
) -> list[Record]:
    """The next `limit` of what is known of a user besides the files, after one, in the order in which it was made, which was not after
    `until`.
    """
    position = (None, None) if after is None else (after.created_at, after.id)
    rows = await db.read(_RECORDS[kind], user_id, *position, until, limit)
    return [Record(created_at=row["created_at"], id=row["id"], json=row["record"]) for row in rows]


async def get_exported_file(db: Database, user_id: str, file_id: UUID) -> File:
    """As `get_file`, in the trash or not."""
    rows = await db.read(_GET, user_id, file_id)
    if not rows:
        raise NotFound
    return file_of(rows[0])


async def record_export(db: Database, user_id: str) -> datetime:
    """Records that all of a user's files are given out, and returns when, by the clock that dates the files.

    Call it before, and let what it raises refuse it: `NotFound` when the user is gone.
    """
    rows = await db.write(_RECORD_EXPORT, user_id, actor_json())
    if not rows:
        raise NotFound
    began_at: datetime = rows[0]["began_at"]
    return began_at
