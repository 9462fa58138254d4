"""Lifecycle rules: which files go by themselves. `coffer purge` applies them."""

from typing import Any, Literal

import msgspec

from server.commands.failures import CommandFailed, Exit
from server.commands.output import say, show
from server.errors import NotFound
from server.ledger import Database, LifecycleRule, add_rule, list_rules, remove_rule
from server.settings import Settings, variable

_COLUMNS = ("id", "action", "after_days", "of")


async def show_all(db: Database, *, as_json: bool) -> None:
    """`coffer lifecycle list`"""
    _show(await list_rules(db), as_json)


async def add(
    db: Database, settings: Settings, *, action: Literal["delete", "trash"], conditions: dict[str, Any], everything: bool, as_json: bool
) -> None:
    """`coffer lifecycle add`: `conditions` as `add_rule` takes them. Removes nothing by itself."""
    if action == "trash" and not settings.trash_days:
        raise CommandFailed(f"there is no trash to move files to: {variable('trash_days')} is 0", Exit.USAGE)
    narrowing = ("user_id", "file_type", "mime_type", "tag", "package_name", "metadata")
    if not everything and all(conditions[name] is None for name in narrowing):
        raise CommandFailed("say which files are meant; a rule for all files of all users needs --everything", Exit.USAGE)
    _show([await add_rule(db, action=action, **conditions)], as_json)
    say("`coffer purge` tells what the rules are about by now, and removes that with --for-real")


async def remove(db: Database, *, rule_id: int, as_json: bool) -> None:
    """`coffer lifecycle remove`"""
    try:
        _show([await remove_rule(db, rule_id)], as_json)
    except NotFound:
        raise CommandFailed(f"there is no rule {rule_id}", Exit.NOT_FOUND) from None


def meaning(rule: LifecycleRule) -> str:
    """Which files a rule is about, in words."""
    facts = {
        "user": rule.user_id,
        "type": rule.file_type,
        "mime": rule.mime_type,
        "tag": rule.tag,
        "package": rule.package_name,
        "metadata": None if rule.metadata is None else msgspec.json.encode(rule.metadata).decode(),
    }
    words = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None) or "all files"
    return f"{words}, favourites too" if rule.includes_favorites else words


def _show(rules: list[LifecycleRule], as_json: bool) -> None:
    show((msgspec.structs.asdict(rule) | ({} if as_json else {"of": meaning(rule)}) for rule in rules), _COLUMNS, as_json)
