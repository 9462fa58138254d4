"""The memory of making as rows: which model, prompt, parameters and references each piece of media was made with. Private to its user."""

from typing import Any
from uuid import UUID

import msgspec

from server.errors import NotFound
from server.ledger.database import Database, Row
from server.ledger.generation import READ_AT_MOST, Position, page_of, read_cursor, write_cursor
from server.ledger.models import Media, MediaPage, MediaQuery
from server.ledger.statements import statement

MOST_ANCESTORS = 100

_MEDIA = ", ".join(f"m.{name}" for name in Media.__struct_fields__)
_KEPT = "not exists (select from user_files f where f.id = m.file_id and f.deleted_at is not null)"
_GET = statement("get_media", media=_MEDIA, kept=_KEPT)
_ADD_UPLOADED = statement("add_uploaded_media", media=_MEDIA)
_ANCESTORS = statement("media_ancestors", media=_MEDIA, kept=_KEPT)
_SET_PRIMARY = statement("set_primary", media=_MEDIA, kept=_KEPT)


async def list_media(db: Database, user_id: str, query: MediaQuery) -> MediaPage:
    """One page, newest first. A page of filters that seldom meet may hold less than `limit`: the list ends where `next_cursor` is None.

    Raises `InvalidRequest` for a cursor that is malformed.
    """
    sql, values = compose(user_id, query, None if query.cursor is None else read_cursor(query.cursor), READ_AT_MOST)
    matching, last = page_of(await db.read(sql, *values), query.limit, READ_AT_MOST)
    return MediaPage([_media_of(row) for row in matching], None if last is None else write_cursor(last))


def compose(user_id: str, query: MediaQuery, after: Position | None, most: int) -> tuple[str, list[Any]]:
    """The statement that reads one row more than the page holds, but at most `most`, after a position; and its values.

    The first of root, entity, project and model that is given is likely to tell most: its index is read, the others are applied to that.
    """
    values: list[Any] = [user_id, query.limit + 1, most]

    def bind(value: object) -> str:
        values.append(value)
        return f"${len(values)}"

    bounds: list[str] = []
    others: list[str] = []
    sources = [("root_id", query.root_id), ("project_id", query.project_id), ("model_used", query.model)]
    if query.root_id is None and query.entity_type is not None and query.entity_id is not None:
        bounds.append(f"m.entity_type = {bind(query.entity_type)} and m.entity_id = {bind(query.entity_id)}")
    else:
        sources += [("entity_type", query.entity_type), ("entity_id", query.entity_id)]
    for column, value in sources:
        if value is not None:
            if not bounds and not column.startswith("entity"):
                bounds.append(f"m.{column} = {bind(value)}")
            else:
                others.append(f"m.{column} is not distinct from {bind(value)}")
    if after is not None:
        bounds.append(f"(m.created_at, m.id) < ({bind(after[0])}, {bind(after[1])})")
    if query.media_type is not None:
        others.append(f"m.media_type = {bind(query.media_type)}")
    if query.source_type is not None:
        others.append(f"m.source_type = {bind(query.source_type)}")
    if query.is_primary is not None:
        others.append(f"m.is_primary = {bind(query.is_primary)}")
    if query.kinds is not None:
        others.append(f"m.media_type = any ({bind(sorted(query.kinds))})")
    if query.prompt is not None:
        others.append(f"m.prompt_words @@ plainto_tsquery('simple', {bind(query.prompt)})")
    sql = statement(
        "list_media",
        media=_MEDIA,
        kept=_KEPT,
        bounds="".join(f" and {bound}" for bound in bounds),
        others="".join(f" and {other}" for other in others),
    )
    return sql, values


async def get_media(db: Database, user_id: str, media_id: UUID, kinds: frozenset[str] | None = None) -> Media:
    """One piece of media of the user. Raises `NotFound`, also for one of other than these types."""
    return _one(await db.read(_GET, user_id, media_id, None if kinds is None else sorted(kinds)))


async def add_uploaded_media(
    db: Database, user_id: str, file_id: UUID, *, entity_type: str | None, entity_id: str | None, project_id: str | None
) -> Media | None:
    """Remembers a file as media that its user has uploaded, of this entity and project; asked again, of others.

    None when there is no such file, or it is media in another way.
    """
    rows = await db.write(_ADD_UPLOADED, user_id, file_id, entity_type, entity_id, project_id)
    return _media_of(rows[0]) if rows else None


async def media_ancestors(db: Database, user_id: str, media_id: UUID) -> list[Media]:
    """What it was made anew from, and that from, nearest first, as far as they are still there; `MOST_ANCESTORS` at most."""
    return [_media_of(row) for row in await db.read(_ANCESTORS, user_id, media_id, MOST_ANCESTORS)]


async def set_primary(db: Database, user_id: str, media_id: UUID, *, is_primary: bool) -> Media:
    """Makes it the one that stands for its entity, in place of any other, or no longer.

    Raises `NotFound`, and `Conflict` when another is made so at the same moment.
    """
    return _one(await db.write(_SET_PRIMARY, user_id, media_id, is_primary))


def _media_of(row: Row) -> Media:
    values = {name: row[name] for name in Media.__struct_fields__}
    values["generation_params"] = msgspec.json.decode(values["generation_params"])
    return Media(**values)


def _one(rows: list[Row]) -> Media:
    if not rows:
        raise NotFound
    return _media_of(rows[0])
