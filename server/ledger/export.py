"""All files of a user and what else is known of them, page by page, for an export."""

from datetime import datetime
from uuid import UUID

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import Database
from server.ledger.files import FILE_COLUMNS, file_of
from server.ledger.models import File
from server.ledger.statements import statement

_PAGE_OF_USER = statement("page_of_user_files", file=FILE_COLUMNS)
_GET = statement("get_exported_file", file=FILE_COLUMNS)
_RECORD_EXPORT = statement("record_export")


async def page_of_user_files(db: Database, user_id: str, after: File | None, until: datetime, limit: int) -> list[File]:
    """The next `limit` of the user's files after one, in the order of their upload, which was not after `until`; the trash included."""
    position = (None, None) if after is None else (after.upload_date, after.id)
    return [file_of(row) for row in await db.read(_PAGE_OF_USER, user_id, *position, until, limit)]


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
