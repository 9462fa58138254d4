"""Volumes: making, listing and opening them again."""

from pathlib import Path
from typing import Any
from uuid import UUID

from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, say, show
from server.errors import NotFound
from server.ledger import Database, add_volume, list_volumes, set_volume_state
from server.settings import Settings
from server.vault import Vault
from server.vault.layout import SENTINEL
from server.vault.sentinel import init_volume


async def register_volume(db: Database, mount: Path) -> UUID | None:
    """Makes the directory a volume that the database knows. Returns its id, or None when it was one already.

    Safe to repeat after a crash half-way, and after the mount moved. A directory that the database knows as a volume but
    that holds no sentinel is refused: what is missing is most likely its mount, and a new volume there would hide that.
    """
    mount = mount.resolve()
    rows = await list_volumes(db)
    try:
        volume_id = UUID((mount / SENTINEL).read_text().strip())
    except FileNotFoundError:
        for row in rows:
            if Path(row.mount_path) == mount:
                raise CommandFailed(
                    f"{mount} is volume {row.id} of this database, but its sentinel {SENTINEL} is missing. Is it mounted?", Exit.REFUSED
                ) from None
        volume_id = init_volume(mount)
    except ValueError:
        raise CommandFailed(f"{mount / SENTINEL} is damaged: it does not hold the volume's UUID", Exit.REFUSED) from None
    if any(row.id == volume_id and Path(row.mount_path) == mount for row in rows):
        return None
    await add_volume(db, volume_id, str(mount))
    return volume_id


async def init(db: Database, settings: Settings, *, mount: Path, as_json: bool) -> None:
    """`coffer volume init`"""
    if not mount.is_dir():
        raise CommandFailed(f"{mount} is not a directory", Exit.NOT_FOUND)
    volume_id = await register_volume(db, mount)
    if volume_id is None:
        say(f"{mount} is a volume already")
    await show_all(db, settings, as_json=as_json)


async def show_all(db: Database, settings: Settings, *, as_json: bool) -> None:
    """`coffer volume list`: the rows, and what this machine sees at their mounts."""
    vault = Vault(settings.volume_reserve_bytes)
    try:
        rows = await list_volumes(db)
        await vault.refresh(rows)
        table: list[dict[str, Any]] = []
        for row in rows:
            volume = vault.volume(row.id)
            free = volume.free_bytes() if volume.state != "unavailable" else None
            table.append(
                {
                    "id": row.id,
                    "state": volume.state,
                    "free_bytes": free,
                    "mount_path": row.mount_path,
                    "reason": volume.reason,
                }
            )
    finally:
        vault.close()
    if not as_json:
        for line in table:
            line["free"] = None if line["free_bytes"] is None else human_bytes(line["free_bytes"])
    show(table, ("id", "state", "free", "mount_path", "reason"), as_json)


async def reopen(db: Database, *, volume_id: UUID) -> None:
    """`coffer volume reopen`: lets uploads write to a volume again that an I/O error closed."""
    try:
        await set_volume_state(db, volume_id, "open")
    except NotFound:
        raise CommandFailed(f"there is no volume {volume_id}", Exit.NOT_FOUND) from None
    say(f"volume {volume_id} takes writes again")
