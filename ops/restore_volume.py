"""`coffer restore volume`: the files that a volume's rows name and its disk has not, from a backup, while the store runs.

For a disk that was lost and an empty one in its place: the rows are whole, and newer than any backup. So only bytes come back, each under
the name that its row has now, verified and synced as an upload's are (P1). What was deleted since does not come back, and links that were
revoked since stay so. Killed, it is run again: what is there is passed over.
"""

import asyncio
import os
import re
import tarfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple
from uuid import UUID

from uuid_utils.compat import uuid7

from ops import sets
from ops.children import Pipe
from ops.restic import Repository
from ops.restore import chosen
from ops.tarball import Tarball
from ops.tool import Desk, Finding
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes
from server.errors import DigestMismatch
from server.ledger import audit as rows
from server.ledger import scrub as damages
from server.ledger.models import StoredFile
from server.vault import Volume, inventory
from server.vault.incoming import IncomingFile

_STORED = re.compile(r"/?(?:users/[^/]+/[a-z]+|withheld)/([0-9a-f-]{36})\.[0-9]+\.[a-z0-9]+")
_PIECE_BYTES = 2**20
_PAGE = 1_000


async def run(desk: Desk) -> str:
    """Restores all that is missing or damaged on one volume. What the backup has not is marked damaged, and told."""
    volume_id: UUID = desk.arguments.volume_id
    volume = next((each for each in desk.vault.volumes if each.id == volume_id), None)
    if volume is None:
        raise CommandFailed(f"there is no volume {volume_id}", Exit.NOT_FOUND)
    if volume.state == "unavailable":
        text = f"volume {volume_id} is away ({volume.reason}). When its disk is lost: coffer volume init DIRECTORY --replace {volume_id}"
        raise CommandFailed(text, Exit.UNAVAILABLE)
    volume.check_state()
    restore = _Restore(desk, volume)
    backup = await (_from_repository(desk, restore) if desk.arguments.tar is None else _from_tarball(desk.arguments.tar, restore))
    await restore.tell_missing(backup.id)
    desk.figures |= {"restored_files": restore.files, "restored_bytes": restore.size_bytes, "missing_files": restore.missing}
    return (
        f"{restore.files:,} files ({human_bytes(restore.size_bytes)}) of volume {volume_id} restored from backup {backup.id} of "
        f"{backup.at:%Y-%m-%dT%H:%M:%SZ}, {restore.missing:,} are not in it"
    )


class _Backup(NamedTuple):
    id: UUID
    at: datetime


async def _from_repository(desk: Desk, restore: "_Restore") -> _Backup:
    repository = Repository(desk.settings)
    backup = (await chosen(repository, desk.arguments.at, desk.arguments.backup))[-1]
    for part in (sets.files_of(restore.volume.id), sets.withheld_of(restore.volume.id)):
        if (snapshot_id := backup.part(part)) is not None:
            async with repository.piped(snapshot_id, "/") as (stream, running):
                await restore.read(stream, "")
                await repository.check(running)
    assert backup.at is not None  # noqa: S101 - it is a whole one
    return _Backup(backup.id, backup.at)


async def _from_tarball(path: Path, restore: "_Restore") -> _Backup:
    archive = Tarball(path)
    manifest = await archive.manifest()
    mount_path = next((each.mount_path for each in manifest.volumes if each.id == restore.volume.id), None)
    if mount_path is not None:
        async with archive.members() as (stream, check):
            await restore.read(stream, mount_path.strip("/") + "/")
            await check()
    return _Backup(manifest.id, manifest.at)


class _Restore:
    def __init__(self, desk: Desk, volume: Volume) -> None:
        self.desk = desk
        self.volume = volume
        self.files = self.size_bytes = self.missing = 0

    async def read(self, archive: Pipe, below: str) -> None:
        """Takes from an archive what is wanted of it: nothing else comes to the disk. The volume's directories are `below` a path of it."""
        loop = asyncio.get_running_loop()

        def wanted(name: str) -> StoredFile | None:
            return asyncio.run_coroutine_threadsafe(self._wanted(name), loop).result()

        def restored(file: StoredFile) -> None:
            asyncio.run_coroutine_threadsafe(self._restored(file), loop).result()

        await asyncio.to_thread(_take, self.volume, os.dup(archive.read), below, wanted, restored)
        archive.close_read()  # should it not have been read to its end, whoever still writes it ends now

    async def _wanted(self, name: str) -> StoredFile | None:
        """The row of a file of the backup, if its bytes lack."""
        stored = _STORED.fullmatch(name)
        found = await rows.get_stored(self.desk.db, [UUID(stored[1])]) if stored else []
        if not found or found[0].volume_id != self.volume.id:
            return None
        is_there = await self.desk.vault.run(inventory.facts_of, self.volume, found[0].file_path) is not None
        return None if is_there and found[0].damaged_at is None else found[0]

    async def _restored(self, file: StoredFile) -> None:
        await damages.unmark_damaged(self.desk.db, file)
        now = await rows.get_stored(self.desk.db, [file.id])
        if not now or now[0].file_path != file.file_path:  # deleted or revoked meanwhile; nobody would ever remove what we have put there
            await self.desk.vault.run(self.volume.remove_stored, [file.file_path])
            return
        self.files += 1
        self.size_bytes += file.file_size

    async def tell_missing(self, backup_id: UUID) -> None:
        """Marks what is still not there, so that reads answer `damaged` at once."""
        after: UUID | None = None
        while (page := await damages.page_to_scrub(self.desk.db, self.volume.id, after, _PAGE)).last is not None:
            after = page.last
            for file in page.files:
                if await self.desk.vault.run(inventory.facts_of, self.volume, file.file_path) is not None:
                    continue
                now = await rows.get_stored(self.desk.db, [file.id])
                if not now or now[0].file_path != file.file_path:
                    continue
                await damages.mark_damaged(self.desk.db, file, "missing")
                self.missing += 1
                self.desk.found(
                    Finding(
                        kind="missing",
                        state="look",
                        text=f"file {file.id} of user {file.user_id!r} is not in backup {backup_id} with the bytes that its row names",
                        user_id=file.user_id,
                        file_id=file.id,
                        volume_id=file.volume_id,
                        command=f"coffer restore file {file.id}",
                    )
                )


def _take(
    volume: Volume, source: int, below: str, wanted: Callable[[str], StoredFile | None], restored: Callable[[StoredFile], None]
) -> None:
    """Reads an archive to its end. One that breaks off is left to the program that makes it: it says why."""
    with os.fdopen(source, "rb") as stream:
        try:
            with tarfile.open(mode="r|", fileobj=stream) as archive:
                for member in archive:
                    is_ours = member.isreg() and member.name.startswith(below)
                    file = wanted(member.name[len(below) :]) if is_ours else None
                    if file is not None and (content := archive.extractfile(member)) is not None and _store(volume, file, content):
                        restored(file)
        except tarfile.TarError:
            return
        while stream.read(_PIECE_BYTES):  # what fills the last block
            pass


def _store(volume: Volume, file: StoredFile, content: IO[bytes]) -> bool:
    """False when these are not the file's bytes, which may have been replaced since the backup."""
    incoming = IncomingFile(volume, uuid7(), {"sha-256": file.sha256})
    try:
        while piece := content.read(_PIECE_BYTES):
            incoming.append([piece])
        incoming.seal()
        if inventory.facts_of(volume, file.file_path) is not None:
            inventory.set_aside(volume, file.file_path)
        incoming.publish(file.file_path)
    except (DigestMismatch, FileExistsError):  # or somebody else has restored it
        return False
    finally:
        incoming.discard()
    return True
