"""The audit trail: who did what to which file, and when.

Records are written by the statements that make the changes, all over `sql/queries/`; here they are read, and leave by age. `events` are
another thing: they tell an app about its user's files, name them, are its user's to lose, and may be dropped once delivered. A record
tells a sysadmin who did it, holds no content, and outlives the user.
"""

import base64
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.errors import InvalidRequest
from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import AuditPage, AuditQuery, AuditRecord
from server.ledger.statements import statement

Position = tuple[Annotated[datetime, msgspec.Meta(tz=True)], Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]

READ_AT_MOST = 10_000
"""Rows that a page reads where one filter's index yields many and the other filters let few through: under 0.1 s."""

SHORTEST_DAYS = 30
"""Younger records are kept by the database itself, whatever it is told (`keep_audit_log_v1`)."""

_PURGE_LOCK = 0x6175646974
"""`audit` in ASCII, beside the key of `migrations.py`."""

_COLUMNS = ", ".join("host(l.address) as address" if name == "address" else f"l.{name}" for name in AuditRecord.__struct_fields__)
_PURGE = statement("purge_trail")
_RECORD_READS = statement("record_reads")
_cursors = msgspec.json.Decoder(Position)


async def list_trail(db: Database, query: AuditQuery) -> AuditPage:
    """One page, newest first. A record that is added meanwhile never makes another one appear twice or be left out.

    Reading stops after `READ_AT_MOST` rows, so a page of filters that seldom meet may hold fewer records than `limit`, even none: the list
    ends where `next_cursor` is None. Raises `InvalidRequest` for a cursor that is malformed.
    """
    sql, values = compose(query, None if query.cursor is None else _read_cursor(query.cursor), READ_AT_MOST)
    rows = await db.read(sql, *values)
    matching = [row for row in rows if row["matches"]]
    last = None
    if len(matching) > query.limit:
        last = matching[query.limit - 1]
    elif rows and rows[-1]["place"] == READ_AT_MOST:
        last = rows[-1]
    return AuditPage(
        records=[_record_of(row) for row in matching[: query.limit]],
        next_cursor=None if last is None else _write_cursor(last),
    )


def compose(query: AuditQuery, after: Position | None, most: int) -> tuple[str, list[Any]]:
    """The statement that reads one record more than the page holds, but at most `most` rows, after a position; and its values."""
    values: list[Any] = [query.limit + 1, most]

    def bind(value: object) -> str:
        values.append(value)
        return f"${len(values)}"

    # The first of these that is given is likely to tell most: its index is read, the others are applied to what that yields.
    given = [
        (column, value)
        for column, value in (("file_id", query.file_id), ("user_id", query.user_id), ("actor_id", query.actor_id))
        if value is not None
    ]
    bounds = [f"l.{column} = {bind(value)}" for column, value in given[:1]]
    if after is not None:
        bounds.append(f"(l.at, l.id) < ({bind(after[0])}, {bind(after[1])})")
    if query.since is not None:
        bounds.append(f"l.at >= {bind(query.since)}")
    if query.until is not None:
        bounds.append(f"l.at < {bind(query.until)}")
    others = [f"l.{column} is not distinct from {bind(value)}" for column, value in given[1:]]
    if query.action is not None:
        others.append(f"l.action = {bind(query.action)}")
    sql = statement(
        "list_trail",
        record=_COLUMNS,
        bounds="".join(f" and {bound}" for bound in bounds),
        others="".join(f" and {other}" for other in others),
    )
    return sql, values


async def record_reads(db: Database, action: Literal["file.downloaded", "link.created"], user_id: str, ids: Sequence[UUID]) -> None:
    """Records for each of the user's files what changes no row. Call it before the answer begins, and let what it raises refuse it."""
    await db.write(_RECORD_READS, action, user_id, list(ids), actor_json())


async def purge_trail(db: Database, days: int, limit: int) -> int:
    """Deletes at most `limit` records older than so many days (`SHORTEST_DAYS` or more), oldest first, and tells how many.

    Several processes may call it at once: those that find one at work do nothing.
    """
    count: int = (await db.write(_PURGE, days, limit, _PURGE_LOCK, patience=LONG_PATIENCE_SECONDS))[0]["count"]
    return count


def _record_of(row: Row) -> AuditRecord:
    values = {name: row[name] for name in AuditRecord.__struct_fields__}
    values["detail"] = msgspec.json.decode(values["detail"])
    return AuditRecord(**values)


def _write_cursor(row: Row) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((row["at"], row["id"]))).rstrip(b"=").decode()


def _read_cursor(cursor: str) -> Position:
    try:
        position: Position = _cursors.decode(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, msgspec.MsgspecError) as problem:
        raise InvalidRequest(field="cursor", reason="it is not one that a page of this list gave") from problem
    return position
