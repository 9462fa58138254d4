"""Reservations: quota that an upload under way holds until it publishes, gives up, or its lease runs out."""

from collections.abc import Collection, Sequence
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import LONG_PATIENCE_SECONDS, Database
from server.ledger.models import ClaimedLink, UploadLink
from server.ledger.statements import statement

_OPEN = statement("open_reservation")
_RESIZE = statement("resize_reservation")
_RENEW = statement("renew_reservations")
_RELEASE = statement("release_reservation")
_EXPIRED = statement("release_expired")
_LIVE = statement("live_uploads")
_CLAIM = statement("claim_link")
_UNCLAIM = statement("unclaim_link")
_CLOSE = statement("close_link")
_INFECTED = statement("record_infected")


async def open_reservation(
    db: Database,
    *,
    upload_id: UUID,
    user_id: str,
    volume_id: UUID,
    reserved_bytes: int,
    idempotency_key: str | None,
    lease_seconds: float,
    link: UploadLink | None = None,
    most: int | None = None,
) -> None:
    """Charges the quota before a byte is read. A crash gives the bytes back when the lease ends.

    With `link` the reservation is an upload link's, and its lease the life of the link. `most` limits the user's uploads under way, or
    with `link` the user's upload links, in this statement and with this one.
    Raises `QuotaExceeded`, `TooManyUploads`, `UserErasing`, `NotFound` (no such user) and `IdempotencyInProgress` (another upload holds
    the key).
    """
    encoded = None if link is None else msgspec.json.encode(link).decode()
    await db.write(_OPEN, upload_id, user_id, volume_id, reserved_bytes, idempotency_key, lease_seconds, encoded, most, actor_json())


async def resize_reservation(db: Database, upload_id: UUID, to_bytes: int) -> None:
    """Makes a reservation larger or smaller. Raises `QuotaExceeded` and `UserErasing` (larger only), and `NotFound` when it is gone."""
    if not await db.write(_RESIZE, upload_id, to_bytes):
        raise NotFound


async def renew_reservations(db: Database, ids: Sequence[UUID], lease_seconds: float) -> None:
    """Moves the end of the leases to `lease_seconds` from now; ids that are gone are ignored."""
    await db.write(_RENEW, list(ids), lease_seconds)


async def release_reservation(db: Database, upload_id: UUID) -> None:
    """Gives the bytes back. Repeating is safe."""
    await db.write(_RELEASE, upload_id)


async def release_expired(db: Database, limit: int = 1000) -> dict[UUID, UUID]:
    """Gives back what at most `limit` abandoned uploads hold. Returns their ids, with the names of their bytes in incoming/."""
    return {row["id"]: row["incoming_name"] for row in await db.write(_EXPIRED, limit, patience=LONG_PATIENCE_SECONDS)}


async def claim_link(db: Database, upload_id: UUID, lease_seconds: float, most: int | None = None) -> ClaimedLink | None:
    """Takes an upload link for one upload. None when it is used up, in use, given up or past its end.

    `most` limits the user's uploads under way, with this one: raises `TooManyUploads`, and leaves the link as it was.
    """
    rows = await db.write(_CLAIM, upload_id, lease_seconds, most)
    if not rows:
        return None
    row = rows[0]
    return ClaimedLink(user_id=row["user_id"], reserved_bytes=row["reserved_bytes"], link=msgspec.json.decode(row["link"], type=UploadLink))


async def unclaim_link(db: Database, upload_id: UUID) -> None:
    """Leaves an upload link to be tried again, until it ends. Repeating is safe."""
    await db.write(_UNCLAIM, upload_id)


async def close_link(db: Database, user_id: str, upload_id: UUID, kinds: Collection[str] | None = None) -> bool:
    """Gives up a user's upload link and what it holds. False when there is none, or an upload is using it.

    With `kinds`, a link that was made for others too, or for all, is none.
    """
    return bool(await db.write(_CLOSE, upload_id, user_id, None if kinds is None else list(kinds), actor_json()))


async def live_uploads(db: Database, ids: Sequence[UUID]) -> set[UUID]:
    """Which of `ids` still hold a reservation, or name bytes for which one is held."""
    return {row["id"] for row in await db.read(_LIVE, list(ids))}


async def record_infected(
    db: Database, *, user_id: str, upload_id: UUID, signature: str, mime_type: str, size_bytes: int, sha256: bytes
) -> None:
    """Appends an event that tells of an upload refused as infected, with the id that the file would have had."""
    found = {"signature": signature, "mime_type": mime_type, "file_size": size_bytes, "sha256": sha256.hex()}
    await db.write(_INFECTED, user_id, upload_id, msgspec.json.encode(found).decode())
