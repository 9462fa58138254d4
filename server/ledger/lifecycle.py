"""Lifecycle rules: which files go by themselves, and when."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.files import json_text, tombstones_of
from server.ledger.models import LifecycleRule, Tombstone
from server.ledger.statements import statement

_COLUMNS = ", ".join(LifecycleRule.__struct_fields__)
_LIST = statement("list_rules", rule=_COLUMNS)
_ADD = statement("add_rule", rule=_COLUMNS)
_REMOVE = statement("remove_rule", rule=_COLUMNS)
_PAGE = statement("page_of_ruled")
_DELETE = statement("delete_ruled")


class Ruled(NamedTuple):
    """A file that a rule is about. `is_held`: a legal hold keeps it."""

    user_id: str
    id: UUID
    size_bytes: int
    rule_id: int
    is_held: bool


class RuledPage(NamedTuple):
    """`last` is the id to go on from; None: that was all."""

    files: list[Ruled]
    last: UUID | None


async def list_rules(db: Database) -> list[LifecycleRule]:
    """All rules, in the order in which they were made."""
    return [_rule_of(row) for row in await db.read(_LIST)]


async def add_rule(
    db: Database,
    *,
    action: Literal["delete", "trash"],
    after_days: int,
    user_id: str | None,
    file_type: str | None,
    mime_type: str | None,
    tag: str | None,
    package_name: str | None,
    metadata: dict[str, Any] | None,
    includes_favorites: bool,
) -> LifecycleRule:
    """A new rule. None is no condition; of `metadata`, a file must have all of these."""
    rows = await db.write(
        _ADD,
        action,
        after_days,
        user_id,
        file_type,
        mime_type,
        tag,
        package_name,
        None if metadata is None else json_text(metadata),
        includes_favorites,
        actor_json(),
    )
    return _rule_of(rows[0])


async def remove_rule(db: Database, rule_id: int) -> LifecycleRule:
    """Ends a rule, and tells what it was. Raises `NotFound`."""
    rows = await db.write(_REMOVE, rule_id, actor_json())
    if not rows:
        raise NotFound
    return _rule_of(rows[0])


async def page_of_ruled(db: Database, after: UUID | None, limit: int, *, with_trash: bool) -> RuledPage:
    """Those of the next `limit` files, in the order of their ids, that a rule is about; without `with_trash`, a rule that deletes."""
    rows = await db.read(_PAGE, after, limit, with_trash, patience=LONG_PATIENCE_SECONDS)
    return RuledPage(
        [Ruled(row["user_id"], row["id"], row["file_size"], row["rule_id"], row["is_held"]) for row in rows if row["id"] is not None],
        next(row["last"] for row in rows if row["id"] is None),
    )


async def delete_ruled(db: Database, user_id: str, ids: Sequence[UUID], rule_id: int) -> list[tuple[UUID, Tombstone]]:
    """As `delete_files`, those of the user's files that this rule, which deletes, is still about."""
    return tombstones_of(await db.write(_DELETE, user_id, list(ids), rule_id, actor_json(), patience=LONG_PATIENCE_SECONDS))


def _rule_of(row: Row) -> LifecycleRule:
    values = {name: row[name] for name in LifecycleRule.__struct_fields__}
    values["metadata"] = None if values["metadata"] is None else msgspec.json.decode(values["metadata"])
    return LifecycleRule(**values)
