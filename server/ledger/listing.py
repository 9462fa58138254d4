"""Pages of a user's files. Every filter and sort on offer reads one index range, so a page costs the same at any number of files."""

import base64
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec

from server.errors import InvalidRequest, SortNotAvailable
from server.ledger.database import Database
from server.ledger.files import file_of
from server.ledger.models import File, FilePage, FileQuery
from server.ledger.statements import statement

Position = tuple[Any, UUID]
"""What a row is sorted by, and its file's id."""

READ_AT_MOST = 10_000
"""Rows that a page reads where one filter's index yields many rows and the other filters let few through: under 0.1 s."""
SEARCH_AT_MOST = 2_000
"""The same for a search by name, which looks at the words of every row."""

_COLUMNS = ", ".join(f"f.{name}" for name in File.__struct_fields__)
_SORT_COLUMNS = {"created": "upload_date", "name": "name_key", "size": "file_size"}
_CURSORS: dict[str, msgspec.json.Decoder[Any]] = {
    "created": msgspec.json.Decoder(tuple[str, Annotated[datetime, msgspec.Meta(tz=True)], UUID]),
    "name": msgspec.json.Decoder(tuple[str, str, UUID]),
    "size": msgspec.json.Decoder(tuple[str, Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)], UUID]),
}


async def list_files(db: Database, user_id: str, query: FileQuery) -> FilePage:
    """One page. A file that is added or removed meanwhile never makes another one appear twice or be left out.

    Of several filters, one is read from its index and the others are applied to what it yields. Reading stops after `READ_AT_MOST` rows,
    so a page of filters that seldom meet may hold fewer files than `limit`, even none: the list ends where `next_cursor` is None.
    Raises `SortNotAvailable` for a name search or dates with another sort than theirs, and `InvalidRequest` for a cursor that is
    malformed or of another order.
    """
    _refuse_what_has_no_index(query)
    after = None if query.cursor is None else _read_cursor(query, query.cursor)
    most = READ_AT_MOST if query.name is None else SEARCH_AT_MOST
    sql, values = compose(user_id, query, after, most)
    rows = await db.read(sql, *values)
    matching = [row for row in rows if row["matches"]]
    last = None
    if len(matching) > query.limit:
        last = matching[query.limit - 1]
    elif rows and rows[-1]["place"] == most:
        last = rows[-1]
    return FilePage(
        files=[file_of(row) for row in matching[: query.limit]],
        next_cursor=None if last is None else _write_cursor(query, last["sort_key"], last["id"]),
    )


def _types(query: FileQuery) -> list[str] | None:
    """The types to look for: those that may be seen, and of those the one that is asked for. None is all."""
    asked = None if query.file_type is None else {query.file_type}
    both = asked if query.kinds is None else query.kinds if asked is None else query.kinds & asked
    return None if both is None else sorted(both)


def compose(user_id: str, query: FileQuery, after: Position | None, most: int) -> tuple[str, list[Any]]:
    """The statement that reads one file more than the page holds, but at most `most` rows, after a position; and its values."""
    values: list[Any] = [user_id, query.limit + 1, most]
    types = _types(query)

    def bind(value: object) -> str:
        values.append(value)
        return f"${len(values)}"

    # The filter that is likely to tell most is the source. It binds its values first, as sql/queries/listing.sql numbers them.
    column, source = _SORT_COLUMNS[query.sort], "f"
    left = {"favorite", "tag", "package", "type"}
    if query.name is not None:
        name, column, source = "list_name", "suffix_key", "s"
        bind(query.name)
    elif query.is_favorite:
        name = "list_favorites"
        left.remove("favorite")
    elif query.tag is not None:
        name, source = "list_tag", "s"
        left.remove("tag")
        bind(query.tag)
    elif query.package_name is not None:
        name = "list_package"
        left.remove("package")
        bind(query.package_name)
    elif types is not None or query.mime_type is not None:
        name = "list_by_type"
        left.remove("type")
        bind(query.limit + 1 if query.is_favorite is None else most)
        bind(types)
        bind(query.mime_type)
    else:
        name = "list_all"

    bounds = []
    if after is not None:
        file_id = "f.id" if source == "f" else "s.file_id"
        bounds.append(f"({source}.{column}, {file_id}) {'<' if query.descending else '>'} ({bind(after[0])}, {bind(after[1])})")
    if query.created_from is not None:
        bounds.append(f"{source}.upload_date >= {bind(query.created_from)}")
    if query.created_to is not None:
        bounds.append(f"{source}.upload_date < {bind(query.created_to)}")

    others = []
    if "favorite" in left and query.is_favorite is not None:
        others.append("f.is_favorite" if query.is_favorite else "not f.is_favorite")
    if "tag" in left and query.tag is not None:
        others.append(f"{bind(query.tag)} = any (f.tags)")
    if "package" in left and query.package_name is not None:
        others.append(f"f.package_name is not distinct from {bind(query.package_name)}")
    if "type" in left and types is not None:
        others.append(f"f.file_type = any ({bind(types)})")
    if "type" in left and query.mime_type is not None:
        others.append(f"f.mime_type = {bind(query.mime_type)}")

    sql = statement(
        name,
        file=_COLUMNS,
        key=column,
        direction="desc" if query.descending else "asc",
        first="max" if query.descending else "min",
        bounds="".join(f" and {bound}" for bound in bounds),
        others="".join(f" and {other}" for other in others),
    )
    return sql, values


def _refuse_what_has_no_index(query: FileQuery) -> None:
    if query.name is not None and query.sort != "name":
        raise SortNotAvailable(filter="name", sort=query.sort)
    if query.created_from is not None and query.sort != "created":
        raise SortNotAvailable(filter="created_from", sort=query.sort)
    if query.created_to is not None and query.sort != "created":
        raise SortNotAvailable(filter="created_to", sort=query.sort)


def _order(query: FileQuery) -> str:
    return f"{'search' if query.name is not None else query.sort}-{'desc' if query.descending else 'asc'}"


def _write_cursor(query: FileQuery, key: object, file_id: UUID) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((_order(query), key, file_id))).rstrip(b"=").decode()


def _read_cursor(query: FileQuery, cursor: str) -> Position:
    try:
        content = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        order, key, file_id = _CURSORS[query.sort].decode(content)
    except (ValueError, msgspec.MsgspecError) as problem:
        raise InvalidRequest(field="cursor", reason="it is not one that a page of this list gave") from problem
    if order != _order(query):
        raise InvalidRequest(field="cursor", reason="it belongs to a list in another order")
    return key, file_id
