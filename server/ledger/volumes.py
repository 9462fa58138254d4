"""Volumes: mounted file systems, whether they take writes, and whom they take."""

from typing import NamedTuple
from uuid import UUID

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import Database
from server.ledger.models import VolumeRow
from server.ledger.statements import statement

_PATIENCE_SECONDS = 600.0
"""To count what is on a volume is to look at every file's row: a second for some millions."""

_ADD = statement("add_volume")
_LIST = statement("list_volumes")
_SET_STATE = statement("set_volume_state")
_DRAIN = statement("drain_volume")
_CONTENTS = statement("volume_contents")
_COUNT_LEFT = statement("count_left")
_RETIRE = statement("retire_volume")


class Left(NamedTuple):
    """What a volume still has. `unremoved`: stored names that no row needs, whose bytes are still to be removed."""

    users: int
    files: int
    uploads: int
    unremoved: int


async def add_volume(db: Database, volume_id: UUID, mount_path: str, *, reserved_for: str | None = None) -> None:
    """Registers a volume; one that is known gets the mount path, and the user for whom it is reserved if one is given.

    Raises `Conflict` when another volume is reserved for that user.
    """
    await db.write(_ADD, volume_id, mount_path, reserved_for, actor_json())


async def list_volumes(db: Database) -> list[VolumeRow]:
    """All volumes, oldest first."""
    return [VolumeRow(**{name: row[name] for name in VolumeRow.__struct_fields__}) for row in await db.read(_LIST)]


async def set_volume_state(db: Database, volume_id: UUID, state: str) -> None:
    """Sets `open` or `read_only`. Raises `NotFound`."""
    if not await db.write(_SET_STATE, volume_id, state, actor_json()):
        raise NotFound


async def drain_volume(db: Database, volume_id: UUID, *, is_draining: bool) -> None:
    """From now on the volume takes no new users, or takes them again. Raises `NotFound`."""
    if not await db.write(_DRAIN, volume_id, is_draining, actor_json()):
        raise NotFound


async def volume_contents(db: Database) -> dict[UUID, tuple[int, int]]:
    """How many users are placed on each volume, and the bytes that they store; volumes without users are left out."""
    return {row["volume_id"]: (row["users"], row["bytes"]) for row in await db.read(_CONTENTS, patience=_PATIENCE_SECONDS)}


async def count_left(db: Database, volume_id: UUID) -> Left:
    """What keeps a volume from being retired."""
    row = (await db.read(_COUNT_LEFT, volume_id, patience=_PATIENCE_SECONDS))[0]
    return Left(**{name: row[name] for name in Left._fields})


async def retire_volume(db: Database, volume_id: UUID, *, leaves_bytes: bool) -> bool:
    """Forgets a volume that is being drained and is empty; with `leaves_bytes` also what is still to be removed from it.

    False, and nothing is changed, when it is not so. Raises `VolumeUnavailable` when a user, a file or an upload is on it.
    """
    return bool(await db.write(_RETIRE, volume_id, leaves_bytes, actor_json(), patience=_PATIENCE_SECONDS))
