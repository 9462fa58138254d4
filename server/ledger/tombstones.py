"""Stored files whose rows are gone and whose bytes must go too."""

from collections.abc import Sequence
from uuid import UUID

from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import Tombstone
from server.ledger.statements import statement

_PENDING = statement("pending_tombstones")
_BELOW = statement("tombstones_below")
_OF = statement("tombstones_of")
_DROP = statement("drop_tombstones")
_WITHHELD = statement("mark_withheld")
_HELD = statement("unlinks_are_held")


async def pending_tombstones(db: Database, limit: int) -> list[Tombstone]:
    """The `limit` oldest tombstones that something can be done about."""
    return [_tombstone_of(row) for row in await db.read(_PENDING, limit)]


async def tombstones_below(db: Database, directory: str) -> list[Tombstone]:
    """Those of a directory, such as users/ada/, that have not been withheld yet."""
    return [_tombstone_of(row) for row in await db.read(_BELOW, directory, patience=LONG_PATIENCE_SECONDS)]


async def tombstones_of(db: Database, file_id: UUID, generation: int) -> list[Tombstone]:
    """What is left to remove of a file's bytes of that generation, which it has no more: their name, and copies on other volumes."""
    return [_tombstone_of(row) for row in await db.read(_OF, file_id, generation)]


async def drop_tombstones(db: Database, ids: Sequence[int]) -> None:
    """Forgets stored files. Call it only when they are unlinked and their directories synced. Repeating is safe."""
    await db.write(_DROP, list(ids), patience=LONG_PATIENCE_SECONDS)


async def mark_withheld(db: Database, ids: Sequence[int]) -> None:
    """Remembers that stored files have left their places and that a backup keeps their bytes. Repeating is safe."""
    await db.write(_WITHHELD, list(ids), patience=LONG_PATIENCE_SECONDS)


async def unlinks_are_held(db: Database) -> bool:
    """Whether a backup needs the bytes of files whose rows are gone.

    Ask it after the commit that made the bytes nobody's, and before each unlink. A backup holds first and looks at the rows afterwards: who
    hears "no" has committed before, and the backup does not know the rows any more.
    """
    is_held: bool = (await db.read(_HELD))[0]["yes"]
    return is_held


def _tombstone_of(row: Row) -> Tombstone:
    return Tombstone(id=row["id"], volume_id=row["volume_id"], file_path=row["file_path"])
