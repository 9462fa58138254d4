"""Volumes: from making one to forgetting it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, say, show
from server.errors import Conflict, NotFound, VolumeUnavailable
from server.ledger import (
    Database,
    add_volume,
    count_left,
    drain_volume,
    list_volumes,
    retire_volume,
    set_volume_state,
    volume_contents,
)
from server.ledger.models import VolumeRow
from server.settings import Settings
from server.vault import Vault, Volume
from server.vault.checks import Check, verify
from server.vault.inventory import walk
from server.vault.layout import SENTINEL
from server.vault.sentinel import init_volume


async def register_volume(db: Database, mount: Path, for_user: str | None = None, replaced: UUID | None = None) -> UUID | None:
    """Makes the directory a volume that the database knows. Returns its id, or None when it was one already.

    Safe to repeat after a crash half-way, and after the mount moved. A directory that the database knows as a volume but
    that holds no sentinel is refused: what is missing is most likely its mount, and a new volume there would hide that.

    With `replaced`, an empty directory becomes that volume, whose disk is lost: `check_replaced` says whether it is.
    """
    mount = mount.resolve()
    rows = await list_volumes(db)
    try:
        volume_id = UUID((mount / SENTINEL).read_text().strip())
    except FileNotFoundError:
        for row in rows:
            # An empty disk may be mounted where the lost one was. A bare directory there is no disk.
            if Path(row.mount_path) == mount and not (row.id == replaced and mount.is_mount()):
                raise CommandFailed(
                    f"{mount} is volume {row.id} of this database, but its sentinel {SENTINEL} is missing. Is it mounted?", Exit.REFUSED
                ) from None
        if replaced is not None:
            if {each.name for each in mount.iterdir()} - {"lost+found"}:
                raise CommandFailed(f"{mount} is not empty: only an empty disk can take the place of a lost one", Exit.REFUSED) from None
            await set_volume_state(db, replaced, "open")  # what had closed it went with the old disk
        volume_id = init_volume(mount, replaced)
    except ValueError:
        raise CommandFailed(f"{mount / SENTINEL} is damaged: it does not hold the volume's UUID", Exit.REFUSED) from None
    if replaced not in (None, volume_id):
        raise CommandFailed(f"{mount} is volume {volume_id}, and so not another one", Exit.REFUSED)
    known = next((row for row in rows if row.id == volume_id), None)
    if known is not None and Path(known.mount_path) == mount and for_user in (None, known.reserved_for):
        return None
    try:
        await add_volume(db, volume_id, str(mount), reserved_for=for_user)
    except Conflict:
        raise _has_another(for_user) from None
    return volume_id


async def check_owner(db: Database, for_user: str | None) -> None:
    """Refuses a new volume for a user who has one. To be asked before a disk is bought or written to."""
    if for_user is not None and any(row.reserved_for == for_user for row in await list_volumes(db)):
        raise _has_another(for_user)


async def check_replaced(db: Database, settings: Settings, replaced: UUID | None, mount: Path, for_user: str | None) -> None:
    """Refuses to replace a volume that can still be read somewhere else than at `mount`. To be asked, too, before a disk is bought."""
    if replaced is None:
        return
    row = next((row for row in await list_volumes(db) if row.id == replaced), None)
    if row is None:
        raise _unknown(replaced)
    if for_user not in (None, row.reserved_for):
        raise CommandFailed(
            f"volume {replaced} is not reserved for user {for_user!r}, and replacing it changes nothing in that", Exit.REFUSED
        )
    if Path(row.mount_path) == mount.resolve():
        return
    vault = Vault(settings.volume_reserve_bytes)
    try:
        await vault.refresh([row])
        state = vault.volume(row.id).state
    finally:
        vault.close()
    if state != "unavailable":
        raise CommandFailed(
            f"volume {replaced} can be read at {row.mount_path}: unmount it first if its disk is to be replaced", Exit.REFUSED
        )


def _has_another(user_id: str | None) -> CommandFailed:
    return CommandFailed(f"another volume is reserved for user {user_id!r}", Exit.REFUSED)


async def init(db: Database, settings: Settings, *, mount: Path, for_user: str | None, replaced: UUID | None = None, as_json: bool) -> None:
    """`coffer volume init`"""
    if not mount.is_dir():
        raise CommandFailed(f"{mount} is not a directory", Exit.NOT_FOUND)
    await check_replaced(db, settings, replaced, mount, for_user)
    if replaced is None and not (mount / SENTINEL).exists():
        await check_owner(db, for_user)
    volume_id = await register_volume(db, mount, for_user, replaced)
    if volume_id is None and replaced is None:
        say(f"{mount} is a volume already")
    elif settings.edge_state_file:
        say("with nginx in front: coffer edge install --for-real, with the same options as before, for nginx must know each volume")
    if replaced is not None:
        say(f"{mount} is volume {replaced} now, without its files. To bring them back: coffer restore volume {replaced}")
    await show_all(db, settings, as_json=as_json)


async def add(db: Database, settings: Settings, *, mount: Path, for_user: str | None, as_json: bool) -> None:
    """`coffer volume add`: as `init`, but only what is a volume already: a bare mountpoint is no place to begin a new one."""
    if not (mount / SENTINEL).exists():
        raise CommandFailed(f"{mount} is no volume. Is it mounted? `coffer volume init {mount}` makes a new one", Exit.NOT_FOUND)
    await init(db, settings, mount=mount, for_user=for_user, as_json=as_json)


async def show_all(db: Database, settings: Settings, *, as_json: bool) -> None:
    """`coffer volume list`: the rows, and what this machine sees at their mounts."""
    rows = await list_volumes(db)
    contents = await volume_contents(db)
    vault = Vault(settings.volume_reserve_bytes)
    try:
        await vault.refresh(rows)
        table = [_line(row, vault.volume(row.id), *contents.get(row.id, (0, 0))) for row in rows]
    finally:
        vault.close()
    if not as_json:
        for line in table:
            line["free"] = None if line["free_bytes"] is None else human_bytes(line["free_bytes"])
            line["used_by_users"] = human_bytes(line["user_bytes"])
    columns = ("id", "state", "takes", "users", "used_by_users", "free", "free_inodes", "mount_path", "reason")
    show(table, columns, as_json)


def _line(row: VolumeRow, volume: Volume, users: int, user_bytes: int) -> dict[str, Any]:
    is_there = volume.state != "unavailable"
    return {
        "id": row.id,
        "state": volume.state,
        "takes": "nobody" if row.is_draining else "anybody" if row.reserved_for is None else row.reserved_for,
        "is_draining": row.is_draining,
        "reserved_for": row.reserved_for,
        "users": users,
        "user_bytes": user_bytes,
        "free_bytes": volume.free_bytes() if is_there else None,
        "free_inodes": volume.free_inodes() if is_there else None,
        "mount_path": row.mount_path,
        "reason": volume.reason,
    }


async def reopen(db: Database, *, volume_id: UUID) -> None:
    """`coffer volume reopen`: lets uploads write to a volume again that an I/O error closed."""
    try:
        await set_volume_state(db, volume_id, "open")
    except NotFound:
        raise _unknown(volume_id) from None
    say(f"volume {volume_id} takes writes again")


async def drain(db: Database, *, volume_id: UUID, undo: bool) -> None:
    """`coffer volume drain`: from now on no new user is placed there. Those it has go on as before until they are moved: to refuse their
    writes would help nobody.
    """
    try:
        await drain_volume(db, volume_id, is_draining=not undo)
    except NotFound:
        raise _unknown(volume_id) from None
    if undo:
        say(f"volume {volume_id} takes new users again")
        return
    say(f"volume {volume_id} takes no new users any more. To move those it has: coffer rebalance --for-real")
    if not any(row.id != volume_id and not row.is_draining and row.reserved_for is None for row in await list_volumes(db)):
        say("there is no other volume that takes new users: they are refused until there is")


async def retire(db: Database, settings: Settings, *, volume_id: UUID, leaves_bytes: bool, for_real: bool) -> None:
    """`coffer volume retire`: refuses while anything is on the volume, as its rows and, where it can be read, its disk say."""
    row = next((row for row in await list_volumes(db) if row.id == volume_id), None)
    if row is None:
        raise _unknown(volume_id)
    if not row.is_draining:
        raise CommandFailed(f"users may still be placed there: first `coffer volume drain {volume_id}`", Exit.REFUSED)
    left = await count_left(db, volume_id)
    if left.users or left.files or left.uploads:
        what = f"{left.users} users, {left.files} files and {left.uploads} uploads"
        raise CommandFailed(f"there are {what} on it: `coffer rebalance --for-real` moves them", Exit.REFUSED)
    if not leaves_bytes:
        if left.unremoved:
            raise CommandFailed(f"the bytes of {left.unremoved} moved or deleted files are still to be removed from it", Exit.REFUSED)
        await _check_disk(settings, row)
    if not for_real:
        say(f"would forget volume {volume_id} at {row.mount_path}. Nothing was changed; repeat with --for-real")
        return
    try:
        is_retired = await retire_volume(db, volume_id, leaves_bytes=leaves_bytes)
    except VolumeUnavailable:
        is_retired = False
    if not is_retired:
        raise CommandFailed("something has come to it in this moment; try again", Exit.REFUSED)
    say(f"volume {volume_id} is forgotten. {row.mount_path} may be unmounted{'; wipe its disk' if leaves_bytes else ''}")


async def _check_disk(settings: Settings, row: VolumeRow) -> None:
    vault = Vault(settings.volume_reserve_bytes)
    try:
        await vault.refresh([row])
        volume = vault.volume(row.id)
        if volume.state == "unavailable":
            raise CommandFailed(f"it cannot be seen whether it is empty: {volume.reason}. Or give --leave-bytes", Exit.UNAVAILABLE)
        batch = await vault.run(next, walk(volume), None)
    finally:
        vault.close()
    if batch is not None:
        example = (batch.paths or [each[0] for each in batch.previews] or batch.strange)[0]
        raise CommandFailed(f"it has files without a row, such as {example}: `coffer audit --repair` sets them aside", Exit.REFUSED)


async def verify_all(db: Database, settings: Settings, *, ids: Sequence[UUID], as_json: bool) -> None:
    """`coffer volume verify`"""
    rows = await list_volumes(db)
    if unknown := set(ids) - {row.id for row in rows}:
        raise _unknown(unknown.pop())
    table: list[dict[str, Any]] = []
    for row in rows:
        if not ids or row.id in ids:
            volume = Volume(row.id, Path(row.mount_path), settings.volume_reserve_bytes)
            volume.apply_row(row.state)
            checks = await asyncio.to_thread(_checks, volume)
            table += [{"volume": row.id, "check": each.name, "verdict": each.verdict, "text": each.text} for each in checks]
    show(table, ("volume", "check", "verdict", "text"), as_json)
    if any(line["verdict"] == "wrong" for line in table):
        raise CommandFailed("somebody must look at what is wrong", Exit.FOUND)


def _checks(volume: Volume) -> list[Check]:
    return list(verify(volume))


def _unknown(volume_id: UUID) -> CommandFailed:
    return CommandFailed(f"there is no volume {volume_id}", Exit.NOT_FOUND)
