"""Users: what they use, what they may use, and who keeps it from going."""

from typing import Any

import msgspec

from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, printable, say, show
from server.errors import NotFound
from server.ledger import Database, User, hold_user, list_users, release_user, usage
from server.ledger import set_quota as set_quota_of

_PAGE = 1000
_COLUMNS = ("user_id", "tier", "files", "used", "reserved", "limit", "warned", "erasing_at", "held_at")


async def show_one(db: Database, *, user_id: str, as_json: bool) -> None:
    """`coffer user show`"""
    user, kinds = await usage(db, user_id)
    if user is None:
        raise unknown(user_id)
    if as_json:
        by_type = {kind: {"file_count": each.file_count, "total_bytes": each.total_bytes} for kind, each in kinds.items()}
        show([msgspec.structs.asdict(user) | {"by_type": by_type}], (), as_json=True)
        return
    _show([user], as_json=False)
    if user.hold_reason is not None:
        say(f"a legal hold keeps this user's files: {printable(user.hold_reason)}")
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


async def hold(db: Database, *, user_id: str, reason: str, as_json: bool) -> None:
    """`coffer user hold`: from now on nothing of the user's goes, whoever asks."""
    try:
        _show([await hold_user(db, user_id, reason)], as_json)
    except NotFound:
        raise unknown(user_id) from None


async def release(db: Database, *, user_id: str, as_json: bool) -> None:
    """`coffer user release`: ends the hold. What lifecycle rules and the trash's time have waited for goes with the next purge."""
    try:
        _show([await release_user(db, user_id)], as_json)
    except NotFound:
        raise unknown(user_id) from None


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
        "warned": f"{user.warned_percent} %" if user.warned_percent else None,
        "erasing_at": user.erasing_at,
        "held_at": user.held_at,
    }


def unknown(user_id: str) -> CommandFailed:
    """The failure of a command about a user whom nobody knows."""
    return CommandFailed(f"there is no user {user_id!r}", Exit.NOT_FOUND)
