"""Contact sheets as rows: those that are asked for and not made yet."""

from uuid import UUID

import msgspec

from server.actor import actor_json
from server.ledger.database import Database
from server.ledger.files import FILE_COLUMNS, file_of
from server.ledger.models import File
from server.ledger.statements import statement

_FILE = statement("find_sheet_file", file=FILE_COLUMNS)
_WISH = statement("wish_for_sheet")
_GET = statement("get_sheet")
_REFUSE = statement("refuse_sheet")
_END = statement("end_sheet")
_PURGE = statement("purge_sheets")


class SheetRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sheet that is to be made of a user's `pictures`. `sheet`, `details`, `actor` and `problem` are JSON."""

    id: UUID
    user_id: str
    digest: bytes
    pictures: list[UUID]
    sheet: str
    details: str
    actor: str
    problem: str | None


async def find_sheet_file(db: Database, user_id: str, idempotency_key: str) -> File | None:
    """What a sheet became, as long as the file is there and has these bytes."""
    rows = await db.read(_FILE, user_id, idempotency_key)
    return file_of(rows[0]) if rows else None


async def wish_for_sheet(
    db: Database, sheet_id: UUID, user_id: str, digest: bytes, pictures: list[UUID], *, sheet: str, details: str, idempotency_key: str
) -> UUID:
    """Asks for a sheet of a known user; returns its id, which is that of an earlier wish for the same.

    Why an earlier one could not be made is forgotten.
    """
    rows = await db.write(_WISH, sheet_id, user_id, digest, pictures, sheet, details, actor_json(), idempotency_key)
    wished: UUID = rows[0]["id"]
    return wished


async def get_sheet(db: Database, sheet_id: UUID) -> SheetRow | None:
    """One that is to be made, or cannot be; None when it has been, or its user is gone."""
    rows = await db.read(_GET, sheet_id)
    return SheetRow(**{name: rows[0][name] for name in SheetRow.__struct_fields__}) if rows else None


async def refuse_sheet(db: Database, sheet_id: UUID, problem: str) -> None:
    """Says why it cannot be made."""
    await db.write(_REFUSE, sheet_id, problem)


async def end_sheet(db: Database, sheet_id: UUID) -> None:
    """Says that it has been made."""
    await db.write(_END, sheet_id)


async def purge_sheets(db: Database, older_than_seconds: float, limit: int) -> None:
    """Forgets up to `limit` wishes that are that old."""
    await db.write(_PURGE, older_than_seconds, limit)
