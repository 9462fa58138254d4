"""Stored files whose rows are gone and whose bytes must go too."""

from collections.abc import Sequence

from server.ledger.database import LONG_PATIENCE_SECONDS, Database
from server.ledger.models import Tombstone
from server.ledger.statements import statement

_PENDING = statement("pending_tombstones")
_DROP = statement("drop_tombstones")


async def pending_tombstones(db: Database, limit: int) -> list[Tombstone]:
    """The `limit` oldest tombstones."""
    rows = await db.read(_PENDING, limit)
    return [Tombstone(id=row["id"], volume_id=row["volume_id"], file_path=row["file_path"]) for row in rows]


async def drop_tombstones(db: Database, ids: Sequence[int]) -> None:
    """Forgets stored files. Call it only when they are unlinked and their directories synced. Repeating is safe."""
    await db.write(_DROP, list(ids), patience=LONG_PATIENCE_SECONDS)
