"""`coffer trail`: the audit trail, from PostgreSQL itself, so that it can be read while the server is down."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from server.commands.output import show
from server.ledger import AuditQuery, AuditRecord, Database, list_trail

_PAGE = 1_000
_MOST_IN_A_TABLE = 100
_COLUMNS = ("at", "action", "actor", "user_id", "file_id", "address", "request_id", "detail")


async def show_all(db: Database, *, query: AuditQuery, most: int | None, as_json: bool) -> None:
    """Prints records, newest first: at most `most`; when None, all as JSON, or a hundred as a table, which waits for its last line."""
    if as_json:
        async for records in _pages(db, query, most):
            show(map(msgspec.structs.asdict, records), (), as_json=True)
        return
    lines = [_line(record) async for records in _pages(db, query, most or _MOST_IN_A_TABLE) for record in records]
    show(lines, _COLUMNS, as_json=False)


async def _pages(db: Database, query: AuditQuery, most: int | None) -> AsyncIterator[list[AuditRecord]]:
    left = most
    while left is None or left > 0:
        page = await list_trail(db, msgspec.structs.replace(query, limit=_PAGE if left is None else min(left, _PAGE)))
        yield page.records
        if page.next_cursor is None:
            return
        query = msgspec.structs.replace(query, cursor=page.next_cursor)
        left = None if left is None else left - len(page.records)


def _line(record: AuditRecord) -> dict[str, Any]:
    return {
        "at": f"{record.at:%Y-%m-%d %H:%M:%S}",
        "action": record.action,
        "actor": record.actor_kind if record.actor_id is None else f"{record.actor_kind} {record.actor_id}",
        "user_id": record.user_id,
        "file_id": record.file_id,
        "address": record.address,
        "request_id": record.request_id,
        "detail": msgspec.json.encode(record.detail).decode() if record.detail else None,
    }
