"""Users: what they use, what they may use, and their end."""

from typing import Any

import msgspec

from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, say, show
from server.errors import NotFound
from server.intake import Intake
from server.ledger import Database, User, get_user, list_users, list_volumes, usage
from server.ledger import set_quota as set_quota_of
from server.settings import Settings
from server.vault import Vault

_PAGE = 1000
_COLUMNS = ("user_id", "tier", "files", "used", "reserved", "limit", "erasing_at")


async def show_one(db: Database, *, user_id: str, as_json: bool) -> None:
    """`coffer user show`"""
    user, kinds = await usage(db, user_id)
    if user is None:
        raise _unknown(user_id)
    if as_json:
        by_type = {kind: {"file_count": each.file_count, "total_bytes": each.total_bytes} for kind, each in kinds.items()}
        show([msgspec.structs.asdict(user) | {"by_type": by_type}], (), as_json=True)
        return
    _show([user], as_json=False)
    if kinds:
        print()
        rows = [{"type": kind, "files": each.file_count, "used": human_bytes(each.total_bytes)} for kind, each in kinds.items()]
        show(rows, ("type", "files", "used"), as_json=False)


async def show_all(db: Database, *, as_json: bool) -> None:
    """`coffer user list`"""
    found: list[User] = []
    while page := await list_users(db, found[-1].user_id if found else None, _PAGE):
        found += page
    _show(found, as_json)


async def set_quota(db: Database, *, user_id: str, max_bytes: int | None, as_json: bool) -> None:
    """`coffer user set-quota`: also for a user who has not stored anything yet."""
    _show([await set_quota_of(db, user_id, max_bytes)], as_json)


async def delete(db: Database, settings: Settings, *, user_id: str, for_real: bool) -> None:
    """`coffer user delete`: every byte and row. Interrupted, a repetition or the server itself finishes it."""
    try:
        user = await get_user(db, user_id)
    except NotFound:
        raise _unknown(user_id) from None
    holds = f"{user.file_count} files, {human_bytes(user.total_bytes)}"
    if not for_real:
        say(f"would erase user {user_id!r} ({holds}) for ever. Nothing was changed; repeat with --for-real")
        return
    vault = Vault(settings.volume_reserve_bytes)
    try:
        await vault.refresh(await list_volumes(db))
        await Intake(settings, db, vault).erase_user(user_id)
    finally:
        vault.close()
    say(f"erased user {user_id!r} ({holds})")


def _show(users: list[User], as_json: bool) -> None:
    if as_json:
        show([msgspec.structs.asdict(user) for user in users], (), as_json=True)
    else:
        show([_line(user) for user in users], _COLUMNS, as_json=False)


def _line(user: User) -> dict[str, Any]:
    return {
        "user_id": user.user_id,
        "tier": user.tier,
        "files": user.file_count,
        "used": human_bytes(user.total_bytes),
        "reserved": human_bytes(user.reserved_bytes),
        "limit": "unlimited" if user.max_bytes is None else human_bytes(user.max_bytes),
        "erasing_at": user.erasing_at,
    }


def _unknown(user_id: str) -> CommandFailed:
    return CommandFailed(f"there is no user {user_id!r}", Exit.NOT_FOUND)
