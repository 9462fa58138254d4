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

_COLUMNS = ", ".join(f"f.{name}" for name in File.__struct_fields__)
_SORT_COLUMNS = {"created": "upload_date", "name": "name_key", "size": "file_size"}
_CURSORS: dict[str, msgspec.json.Decoder[Any]] = {
    "created": msgspec.json.Decoder(tuple[str, Annotated[datetime, msgspec.Meta(tz=True)], UUID]),
    "name": msgspec.json.Decoder(tuple[str, str, UUID]),
    "size": msgspec.json.Decoder(tuple[str, Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)], UUID]),
}


async def list_files(db: Database, user_id: str, query: FileQuery) -> FilePage:
    """One page. A file that is added or removed meanwhile never makes another one appear twice or be left out.

    Of several filters, one is read from its index and the others are applied to what it yields. Raises `SortNotAvailable` for a
    name search or dates with another sort than theirs, and `InvalidRequest` for a cursor that is malformed or of another order.
    """
    sql, values = compose(user_id, query)
    rows = await db.read(sql, *values)
    files = [file_of(row) for row in rows[: query.limit]]
    last = rows[query.limit - 1] if len(rows) > query.limit else None
    return FilePage(files=files, next_cursor=_write_cursor(query, last["sort_key"], last["id"]) if last else None)


def compose(user_id: str, query: FileQuery) -> tuple[str, list[Any]]:
    """The statement for a query and its values. It reads one row more than the page, to know whether another page follows."""
    _refuse_what_has_no_index(query)
    values: list[Any] = [user_id, query.limit + 1]

    def bind(value: object) -> str:
        values.append(value)
        return f"${len(values)}"

    # The most selective filter is the source; it binds its own values first, as sql/queries/listing.sql numbers them.
    column, source_alias, source_id = _SORT_COLUMNS[query.sort], "f", "f.id"
    residual = {"tag", "package", "favorite", "type"}
    if query.name is not None:
        source, column, source_alias, source_id = "list_name", "suffix_key", "s", "s.file_id"
        bind(query.name)
    elif query.tag is not None:
        source, source_alias, source_id = "list_tag", "s", "s.file_id"
        residual.remove("tag")
        bind(query.tag)
    elif query.package_name is not None:
        source = "list_package"
        residual.remove("package")
        bind(query.package_name)
    elif query.is_favorite:
        source = "list_favorites"
        residual.remove("favorite")
    elif query.file_type is not None or query.mime_type is not None:
        source = "list_by_type"
        residual.remove("type")
        bind(query.file_type)
        bind(query.mime_type)
    else:
        source = "list_all"

    more = []
    if query.cursor is not None:
        key, file_id = _read_cursor(query)
        comparison = "<" if query.descending else ">"
        more.append(f"({source_alias}.{column}, {source_id}) {comparison} ({bind(key)}, {bind(file_id)})")
    if query.created_from is not None:
        more.append(f"{source_alias}.upload_date >= {bind(query.created_from)}")
    if query.created_to is not None:
        more.append(f"{source_alias}.upload_date < {bind(query.created_to)}")
    if "tag" in residual and query.tag is not None:
        more.append(f"{bind(query.tag)} = any (f.tags)")
    if "package" in residual and query.package_name is not None:
        more.append(f"f.package_name = {bind(query.package_name)}")
    if "favorite" in residual and query.is_favorite:
        more.append("f.is_favorite")
    if "type" in residual and query.file_type is not None:
        more.append(f"f.file_type = {bind(query.file_type)}")
    if "type" in residual and query.mime_type is not None:
        more.append(f"f.mime_type = {bind(query.mime_type)}")

    sql = statement(
        source,
        file=_COLUMNS,
        key=column,
        direction="desc" if query.descending else "asc",
        more="".join(f" and {condition}" for condition in more),
    )
    return sql, values


def _refuse_what_has_no_index(query: FileQuery) -> None:
    if query.name is not None and query.sort != "name":
        raise SortNotAvailable(filter="name", sort=query.sort)
    if query.created_from is not None and query.sort != "created":
        raise SortNotAvailable(filter="created_from", sort=query.sort)
    if query.created_to is not None and query.sort != "created":
        raise SortNotAvailable(filter="created_to", sort=query.sort)
    if query.is_favorite is False:
        raise InvalidRequest(field="favorite", reason="only favourites can be asked for; leave it out to list all files")


def _order(query: FileQuery) -> str:
    return f"{'search' if query.name is not None else query.sort}-{'desc' if query.descending else 'asc'}"


def _write_cursor(query: FileQuery, key: object, file_id: UUID) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((_order(query), key, file_id))).rstrip(b"=").decode()


def _read_cursor(query: FileQuery) -> tuple[Any, UUID]:
    text = query.cursor or ""
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        order, key, file_id = _CURSORS[query.sort].decode(content)
    except (ValueError, msgspec.MsgspecError) as problem:
        raise InvalidRequest(field="cursor", reason="it is not one that a page of this list gave") from problem
    if order != _order(query):
        raise InvalidRequest(field="cursor", reason="it belongs to a list in another order")
    return key, file_id
