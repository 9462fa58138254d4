"""Stored files whose rows are gone and whose bytes must go too."""

from collections.abc import Sequence
from uuid import UUID

from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import Tombstone
from server.ledger.statements import statement

_PENDING = statement("pending_tombstones")
_OF = statement("tombstones_of")
_DROP = statement("drop_tombstones")


async def pending_tombstones(db: Database, limit: int) -> list[Tombstone]:
    """The `limit` oldest tombstones that something can be done about."""
    return [_tombstone_of(row) for row in await db.read(_PENDING, limit)]


async def tombstones_of(db: Database, file_id: UUID, generation: int) -> list[Tombstone]:
    """What is left to remove of a file's bytes of that generation, which it has no more: their name, and copies on other volumes."""
    return [_tombstone_of(row) for row in await db.read(_OF, file_id, generation)]


async def drop_tombstones(db: Database, ids: Sequence[int]) -> None:
    """Forgets stored files. Call it only when they are unlinked and their directories synced. Repeating is safe."""
    await db.write(_DROP, list(ids), patience=LONG_PATIENCE_SECONDS)


def _tombstone_of(row: Row) -> Tombstone:
    return Tombstone(id=row["id"], volume_id=row["volume_id"], file_path=row["file_path"])
