"""Users: their quota, what they use, and their erasure."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple
from uuid import UUID

from server.actor import actor_json
from server.errors import Conflict, NotFound
from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.files import tombstones_of
from server.ledger.models import KindUsage, Tombstone, User
from server.ledger.statements import statement
from server.ledger.usage_days import await_pages

USER_COLUMNS = ", ".join(User.__struct_fields__)
_BATCH_ROWS = 5000

_GET = statement("get_user", user=USER_COLUMNS)
_ENSURE = statement("ensure_user", user=USER_COLUMNS)
_LIST = statement("list_users", user=USER_COLUMNS)
_SET_QUOTA = statement("set_quota", user=USER_COLUMNS)
_SET_RULES = statement("set_quota_rules")
_BY_TYPE = statement("usage_by_type")
_HOLD = statement("hold_user", user=USER_COLUMNS)
_RELEASE = statement("release_user", user=USER_COLUMNS)
_UNSEEN = statement("unseen_users", user=USER_COLUMNS)
_BEGIN_ERASING = statement("begin_erasing", user=USER_COLUMNS)
_BEGIN_ERASING_UNSEEN = statement("begin_erasing_unseen", user=USER_COLUMNS)
_ERASE_BATCH = statement("erase_batch")
_ERASE_EVENTS = statement("erase_events")
_ERASE_USAGE = statement("erase_usage")
_ERASE_USAGE_DAYS = statement("erase_usage_days")
_ERASE_ADDRESSES = statement("erase_addresses")
_LOCK = statement("lock_user", user=USER_COLUMNS)
_FINISH_ERASING = statement("finish_erasing")
_BEING_ERASED = statement("users_being_erased")
_RAISE_EPOCH = statement("raise_link_epoch", user=USER_COLUMNS)
_EPOCHS = statement("link_epochs")


class Unseen(NamedTuple):
    """Who is taken for a user that nobody uses: whose row has not changed for so many days, and who has the default quota, or any."""

    days: int
    default_quota_bytes: int | None
    any_quota: bool


async def ensure_user(db: Database, user_id: str, *, max_bytes: int | None, volume_id: UUID | None) -> User:
    """The user, who is added with this quota and volume if unknown. An existing user keeps quota and volume (unless that is null).

    A volume that is reserved for the user goes before the given one; a given one that takes no new users is none. Without a volume, the
    user is left to get one with the first upload.
    """
    rows = await db.read(_GET, user_id)
    if not rows or (volume_id is not None and rows[0]["volume_id"] is None):
        rows = await db.write(_ENSURE, user_id, max_bytes, volume_id, actor_json())
    return _user_of(rows[0])


async def get_user(db: Database, user_id: str) -> User:
    """One user. Raises `NotFound`."""
    return _one(await db.read(_GET, user_id))


async def list_users(db: Database, after: str | None, limit: int) -> list[User]:
    """At most `limit` users whose id is greater than `after`, in the order of ids."""
    return [_user_of(row) for row in await db.read(_LIST, after or "", limit)]


async def set_quota(db: Database, user_id: str, max_bytes: int | None, *, volume_id: UUID | None = None) -> User:
    """Sets the quota in bytes (None is unlimited) of a user, who is added if unknown.

    Less than what is used is allowed: it blocks new bytes only. Reservations that are held may still be published.
    """
    return _one(await db.write(_SET_QUOTA, user_id, max_bytes, volume_id, actor_json()))


async def set_quota_rules(db: Database, *, counts_previews: bool) -> None:
    """Says whether a quota counts previews, of all users, from now on. What is stored already stays, whatever it makes of quotas."""
    await db.write(_SET_RULES, counts_previews)


async def usage(db: Database, user_id: str) -> tuple[User | None, dict[str, KindUsage]]:
    """The user, if known, and files and bytes per type; types without files are left out."""
    rows = await db.read(_GET, user_id)
    if not rows:
        return None, {}
    kinds = await db.read(_BY_TYPE, user_id)
    by_type = {row["file_type"]: KindUsage(file_count=row["file_count"], total_bytes=row["total_bytes"]) for row in kinds}
    return _user_of(rows[0]), by_type


async def hold_user(db: Database, user_id: str, reason: str) -> User:
    """From its return on, none of the user's files is deleted, moved to the trash or replaced, nor is the user erased: that is `LegalHold`.

    Raises `NotFound`, and `UserErasing` where it comes too late.
    """
    return _one(await db.write(_HOLD, user_id, reason, actor_json()))


async def release_user(db: Database, user_id: str) -> User:
    """Ends the hold. Repeating is safe. Raises `NotFound`."""
    return _one(await db.write(_RELEASE, user_id, actor_json()))


async def unseen_users(db: Database, unseen: Unseen, after: str | None, limit: int) -> list[User]:
    """The next `limit` users after an id who have stored nothing and whom nobody has changed for so long."""
    rows = await db.read(_UNSEEN, after or "", unseen.days, unseen.default_quota_bytes, unseen.any_quota, limit)
    return [_user_of(row) for row in rows]


async def begin_erasing(db: Database, user_id: str, unseen: Unseen | None = None) -> User:
    """From its return on, nothing new is admitted for the user (`UserErasing`). Repeating is safe. The trail tells what there was.

    With `unseen`, only a user of whom that holds still. Raises `NotFound` and `LegalHold`.
    """
    if unseen is None:
        return _one(await db.write(_BEGIN_ERASING, user_id, actor_json(), patience=LONG_PATIENCE_SECONDS))
    rows = await db.write(_BEGIN_ERASING_UNSEEN, user_id, actor_json(), unseen.days, unseen.default_quota_bytes, unseen.any_quota)
    return _one(rows)


async def erase_batch(db: Database, user_id: str, limit: int = 1000) -> list[Tombstone]:
    """Deletes at most `limit` files of a user who is being erased; returns what is left to unlink, and nothing when done."""
    rows = await db.write(_ERASE_BATCH, user_id, limit, actor_json(), patience=LONG_PATIENCE_SECONDS)
    return [tombstone for _, tombstone in tombstones_of(rows)]


async def finish_erasing(db: Database, user_id: str, remove_bytes: Callable[[], Awaitable[None]]) -> None:
    """Deletes all other rows of a user whose files are gone, the user's own last: until then a crash leaves work to repeat.

    The audit trail stays, without the addresses of clients.

    `remove_bytes` runs while the user's row is locked, so no second eraser removes the bytes of a user of the same id who came
    later. Raises `Conflict` while files are left, or when the user is not being erased. A user who is gone is no error.
    """
    await await_pages(db)  # or what one of them writes now would stay
    for erase in (_ERASE_EVENTS, _ERASE_USAGE, _ERASE_USAGE_DAYS, _ERASE_ADDRESSES):
        while (await db.write(erase, user_id, _BATCH_ROWS, patience=LONG_PATIENCE_SECONDS))[0]["count"] == _BATCH_ROWS:
            pass
    async with db.transaction() as run:
        rows = await run(_LOCK, user_id)
        if not rows:
            return
        if rows[0]["erasing_at"] is None or rows[0]["file_count"]:
            raise Conflict
        await remove_bytes()
        await run(_FINISH_ERASING, user_id, actor_json())


async def users_being_erased(db: Database) -> list[str]:
    """Users whose erasure has begun and not ended."""
    return [row["user_id"] for row in await db.read(_BEING_ERASED)]


async def raise_link_epoch(db: Database, user_id: str) -> User:
    """Ends every link to the user's files that was made before. Raises `NotFound`."""
    return _one(await db.write(_RAISE_EPOCH, user_id, actor_json()))


async def link_epochs(db: Database) -> dict[str, int]:
    """The epoch of each user who ever raised it."""
    return {row["user_id"]: row["link_epoch"] for row in await db.read(_EPOCHS)}


def _user_of(row: Row) -> User:
    return User(**{name: row[name] for name in User.__struct_fields__})


def _one(rows: list[Row]) -> User:
    if not rows:
        raise NotFound
    return _user_of(rows[0])
