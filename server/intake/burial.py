"""Removing the bytes of deleted rows. While a backup runs they only leave their places: its dump may name them."""

from collections.abc import Sequence
from uuid import UUID

from server import ledger
from server.ledger import Database
from server.ledger.models import Tombstone
from server.vault import Vault


async def bury(db: Database, vault: Vault, tombstones: Sequence[Tombstone]) -> None:
    """Unlinks the bytes of deleted rows and drops the tombstones; or withholds them, while a backup wants them.

    What it raises on leaves them for the next housekeeping. Repeating is safe.
    """
    by_volume: dict[UUID, list[Tombstone]] = {}
    for tombstone in tombstones:
        by_volume.setdefault(tombstone.volume_id, []).append(tombstone)
    for volume_id, group in by_volume.items():
        ids, paths = [each.id for each in group], [each.file_path for each in group]
        volume = vault.volume(volume_id)
        if await ledger.unlinks_are_held(db):
            await vault.run(volume.withhold, paths)
            await ledger.mark_withheld(db, ids)
        else:
            await vault.run(volume.remove_stored, paths)
            await ledger.drop_tombstones(db, ids)
