"""Volumes: mounted file systems and whether they take writes."""

from uuid import UUID

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import Database
from server.ledger.models import VolumeRow
from server.ledger.statements import statement

_ADD = statement("add_volume")
_LIST = statement("list_volumes")
_SET_STATE = statement("set_volume_state")


async def add_volume(db: Database, volume_id: UUID, mount_path: str) -> None:
    """Registers a volume; one that is known gets the mount path."""
    await db.write(_ADD, volume_id, mount_path, actor_json())


async def list_volumes(db: Database) -> list[VolumeRow]:
    """All volumes, oldest first."""
    return [
        VolumeRow(id=row["id"], mount_path=row["mount_path"], state=row["state"], created_at=row["created_at"])
        for row in await db.read(_LIST)
    ]


async def set_volume_state(db: Database, volume_id: UUID, state: str) -> None:
    """Sets `open` or `read_only`. Raises `NotFound`."""
    if not await db.write(_SET_STATE, volume_id, state, actor_json()):
        raise NotFound
