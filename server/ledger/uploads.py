"""Reservations: quota that an upload under way holds until it publishes, gives up, or its lease runs out."""

from collections.abc import Sequence
from uuid import UUID

from server.errors import NotFound
from server.ledger.database import LONG_PATIENCE_SECONDS, Database
from server.ledger.statements import statement

_OPEN = statement("open_reservation")
_RESIZE = statement("resize_reservation")
_RENEW = statement("renew_reservations")
_RELEASE = statement("release_reservation")
_EXPIRED = statement("release_expired")
_LIVE = statement("live_uploads")


async def open_reservation(
    db: Database,
    *,
    upload_id: UUID,
    user_id: str,
    volume_id: UUID,
    reserved_bytes: int,
    idempotency_key: str | None,
    lease_seconds: float,
) -> None:
    """Charges the quota before a byte is read. A crash gives the bytes back when the lease ends.

    Raises `QuotaExceeded`, `UserErasing`, `NotFound` (no such user) and `IdempotencyInProgress` (another upload holds the key).
    """
    await db.write(_OPEN, upload_id, user_id, volume_id, reserved_bytes, idempotency_key, lease_seconds)


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


async def release_expired(db: Database, limit: int = 1000) -> list[UUID]:
    """Gives back what at most `limit` abandoned uploads hold, and returns their ids."""
    return [row["id"] for row in await db.write(_EXPIRED, limit, patience=LONG_PATIENCE_SECONDS)]


async def live_uploads(db: Database, ids: Sequence[UUID]) -> set[UUID]:
    """Which of `ids` still hold a reservation."""
    return {row["id"] for row in await db.read(_LIVE, list(ids))}
