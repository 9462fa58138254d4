"""`coffer restore`: a whole store into an empty place, or single files into one that runs. server/decisions/0021 tells how."""

import asyncio
import shlex
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from uuid import UUID

import msgspec
from uuid_utils.compat import uuid7

from ops import audit, sets
from ops.loading import Source, dump_in, load_dump
from ops.restic import Repository, ResticFailed
from ops.sets import MANIFEST, BackupSet, Manifest, VolumeManifest
from ops.tarball import Tarball
from ops.tool import Desk, Finding
from server import ledger
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, say, show
from server.errors import DigestMismatch
from server.ledger import audit as rows
from server.ledger import backups, migrate
from server.ledger import scrub as damages
from server.ledger.models import StoredFile
from server.settings import variable
from server.vault import Volume, inventory, restoring
from server.vault.incoming import IncomingFile
from server.vault.layout import WITHHELD

_PAGE = 1_000
_READ_BYTES = 2**20
_READERS = 4
_MOST_GENERATIONS = 20


async def run(desk: Desk) -> str:
    """Does what was asked for."""
    match desk.arguments.what:
        case "list":
            return await _list(desk)
        case "all":
            return await _all(desk)
        case "rows":
            return await _rows(desk)
        case "file":
            return await _file(desk)
        case _:
            return await _clear(desk)


def needs_store(what: str) -> bool:
    """Whether there must be a store already."""
    return what not in ("all", "rows", "list")


async def chosen(repository: Repository, at: datetime | None, backup_id: UUID | None) -> list[BackupSet]:
    """The backups that may serve, the best last. Raises `CommandFailed` when there is none."""
    found = sets.whole(sets.sets_of(await repository.snapshots(sets.MARK)), until=at)
    if backup_id is not None:
        found = [each for each in found if each.id == backup_id]
    if not found:
        raise CommandFailed("there is no such backup; see: coffer restore list", Exit.NOT_FOUND)
    return found


async def manifest_of(repository: Repository, backup: BackupSet) -> Manifest:
    """What the backup says of itself. Raises `CommandFailed`."""
    async with repository.reading(backup.part("manifest") or "", f"/{MANIFEST}") as running:
        said = await running.stdout.read()
        await repository.check(running)
    try:
        return msgspec.json.decode(said, type=Manifest)
    except msgspec.DecodeError as problem:
        raise CommandFailed(f"the manifest of backup {backup.id} cannot be read: {problem}") from problem


async def _list(desk: Desk) -> str:
    found = sets.whole(sets.sets_of(await Repository(desk.settings).snapshots(sets.MARK)))
    show([{"id": str(each.id), "at": each.at} for each in found], ("at", "id"), as_json=desk.arguments.json)
    return f"{len(found)} backups"


async def _clear(desk: Desk) -> str:
    stops = await backups.clear_upload_stops(desk.db)
    for stop in stops:
        say(f"uploads were refused since {stop.created_at:%Y-%m-%d %H:%M:%S %Z}: {stop.reason}")
    return "uploads are taken again" if stops else "uploads were not refused"


# Everything


class _Origin(Protocol):
    """Where a whole store comes from. Everything raises `CommandFailed`."""

    manifest: Manifest

    def dump(self) -> Source:
        """The rows."""

    async def files(self, volume: VolumeManifest, target: Path) -> None:
        """Writes users/ and withheld/ of a volume below `target`; called again, it writes them again."""


class _InRepository:
    def __init__(self, repository: Repository, backup: BackupSet, manifest: Manifest) -> None:
        self._repository, self._backup, self.manifest = repository, backup, manifest

    def dump(self) -> Source:
        return dump_in(self._repository, self._backup.part("dump") or "")

    async def files(self, volume: VolumeManifest, target: Path) -> None:
        for part in (sets.files_of(volume.id), sets.withheld_of(volume.id)):
            if (snapshot_id := self._backup.part(part)) is not None:
                await self._repository.restore(snapshot_id, target)


class _InTarball:
    def __init__(self, archive: Tarball, manifest: Manifest) -> None:
        self._archive, self.manifest = archive, manifest

    def dump(self) -> Source:
        return self._archive.dump()

    async def files(self, volume: VolumeManifest, target: Path) -> None:
        await self._archive.restore(volume.mount_path, target)


async def _origin(desk: Desk) -> _Origin:
    if desk.arguments.tar is not None:
        archive = Tarball(desk.arguments.tar)
        return _InTarball(archive, await archive.manifest())
    repository = Repository(desk.settings)
    backup = (await chosen(repository, desk.arguments.at, desk.arguments.backup))[-1]
    return _InRepository(repository, backup, await manifest_of(repository, backup))


async def _all(desk: Desk) -> str:
    origin = await _origin(desk)
    manifest = origin.manifest
    targets = {each.id: _target(desk, each.id, each.mount_path) for each in manifest.volumes}
    await _check_database(desk, _reason(manifest))
    for volume_id, target in targets.items():
        if not restoring.is_restored(target, volume_id) or await backups.is_empty(desk.db):
            try:
                restoring.begin_restoring(target, manifest.id)
            except OSError as problem:
                raise CommandFailed(f"volume {volume_id} cannot be restored to {target}: {problem}", Exit.REFUSED) from problem
    await _load(desk, origin, targets, with_previews=manifest.has_previews)
    for volume in manifest.volumes:
        if not restoring.is_restored(targets[volume.id], volume.id):
            say(f"restoring the files of volume {volume.id} to {targets[volume.id]}")
            await origin.files(volume, targets[volume.id])
            await _settle(desk, volume.id, targets[volume.id])
    await desk.vault.refresh(await ledger.list_volumes(desk.db))
    files, size_bytes = await _verify(desk)
    desk.arguments.repair, desk.arguments.older_than = True, audit.GARBAGE_AGE_SECONDS
    say("auditing what was restored")
    await audit.run(desk)
    desk.figures |= {"restored_files": files, "restored_bytes": size_bytes}
    _tell_what_next()
    return f"{files:,} files ({human_bytes(size_bytes)}) of {manifest.at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} restored and verified"


async def _rows(desk: Desk) -> str:
    """The database was lost, and the volumes were not: what no row names stays in its place, but for what a backup withheld."""
    origin = await _origin(desk)
    manifest = origin.manifest
    await _check_database(desk, _reason(manifest))
    places = {each.id: Path(each.mount_path) for each in manifest.volumes}
    for volume_id, place in places.items():
        if not restoring.is_restored(place, volume_id):
            text = f"volume {volume_id} is not at {place}: mount it there, or restore it as well (coffer restore all)"
            raise CommandFailed(text, Exit.UNAVAILABLE)
    await _load(desk, origin, places, with_previews=True)  # those that are there are not lost
    for volume_id, place in places.items():
        await _put_back(desk, volume_id, place)
    await desk.vault.refresh(await ledger.list_volumes(desk.db))
    desk.arguments.repair, desk.arguments.older_than = False, audit.GARBAGE_AGE_SECONDS
    say("auditing rows against files")
    await audit.run(desk)
    _tell_what_next()
    return f"the rows of {manifest.files:,} files of {manifest.at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} restored"


async def _load(desk: Desk, origin: _Origin, places: dict[UUID, Path], *, with_previews: bool) -> None:
    """Fills an empty database; in another one, the same restore has done it."""
    manifest = origin.manifest
    if await backups.is_empty(desk.db):
        say(f"restoring the rows of {manifest.at:%Y-%m-%d %H:%M:%S %Z}")
        version = max(manifest.server_version, await backups.server_version(desk.db))
        mount_paths = {volume_id: str(place) for volume_id, place in places.items()}
        # Nothing ever sees the restored rows without their stop, or with the places of another store's volumes.
        settling = backups.settling(_reason(manifest), mount_paths, with_previews=with_previews)
        await load_dump(origin.dump(), desk.settings.database_url, version, settling)
    await migrate(desk.settings.database_url)


def _reason(manifest: Manifest) -> str:
    """Why uploads are stopped, and what a restore knows its own rows by."""
    return f"restored from backup {manifest.id} of {manifest.at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _tell_what_next() -> None:
    say("uploads are refused until you have looked at it and said: coffer restore clear")
    say(f"links and keys that were revoked since then would work again: change {variable('link_keys')}, and see coffer key list")


def _target(desk: Desk, volume_id: UUID, mount_path: str) -> Path:
    to: Path | None = desk.arguments.to
    return Path(mount_path) if to is None else to.absolute() / str(volume_id)


async def _check_database(desk: Desk, reason: str) -> None:
    """It must be empty, or hold what the same restore has put there."""
    if await backups.is_empty(desk.db):
        return
    try:
        stops = await backups.list_upload_stops(desk.db)
    except Exception as problem:  # other tables than ours
        raise _not_empty() from problem
    if reason not in {each.reason for each in stops}:
        raise _not_empty()


def _not_empty() -> CommandFailed:
    text = f"the database of {variable('database_url')} is not empty: make another one, and name it there, to restore everything into it"
    return CommandFailed(text, Exit.REFUSED)


async def _settle(desk: Desk, volume_id: UUID, target: Path) -> None:
    """What was withheld goes to where its rows say, and the directory becomes the volume."""
    await _put_back(desk, volume_id, target)
    await desk.vault.run(restoring.finish_restoring, target, volume_id)


async def _put_back(desk: Desk, volume_id: UUID, target: Path) -> None:
    names = restoring.withheld_names(target)
    paths: dict[str, str] = {}
    for at in range(0, len(names), _PAGE):
        found = await rows.get_stored(desk.db, [UUID(name[:36]) for name in names[at : at + _PAGE]])
        paths |= {file.file_path.rsplit("/", 1)[1]: file.file_path for file in found if file.volume_id == volume_id}
    await desk.vault.run(restoring.put_back, target, paths)


async def _verify(desk: Desk) -> tuple[int, int]:
    """Reads every restored file from the disk. Those that are wrong are marked, so that nobody is served them."""
    _, size_bytes = await rows.count_stored(desk.db)
    files = total = 0
    with desk.progress("verify", size_bytes, "B") as bar:
        for volume in desk.vault.volumes:
            async for page in _pages(desk, volume):
                for at in range(0, len(page), _READERS):
                    some = page[at : at + _READERS]
                    for file, wrong in zip(some, await asyncio.gather(*(_wrong(desk, volume, file) for file in some)), strict=True):
                        bar.update(file.file_size)
                        if wrong is None:
                            files, total = files + 1, total + file.file_size
                        elif file.damaged_at is None and await damages.mark_damaged(desk.db, file, wrong):
                            _tell_damaged(desk, file, wrong)
    return files, total


async def _pages(desk: Desk, volume: Volume) -> AsyncIterator[list[StoredFile]]:
    after: UUID | None = None
    while (page := await damages.page_to_scrub(desk.db, volume.id, after, _PAGE)).last is not None:
        after = page.last
        yield page.files


async def _wrong(desk: Desk, volume: Volume, file: StoredFile) -> str | None:
    try:
        found = await desk.vault.run(restoring.digest_of, volume, file.file_path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError:
        return "unreadable"
    return None if found == (file.file_size, file.sha256) else "sha256"


def _tell_damaged(desk: Desk, file: StoredFile, wrong: str) -> None:
    text = f"file {file.id} of user {file.user_id!r} is not what the rows say: {wrong}"
    command = f"coffer restore file {file.id}"
    desk.found(
        Finding(kind="damaged", state="look", text=text, user_id=file.user_id, file_id=file.id, volume_id=file.volume_id, command=command)
    )


# One file


async def _file(desk: Desk) -> str:
    file_id: UUID = desk.arguments.file_id
    found = await rows.get_stored(desk.db, [file_id])
    if not found:
        raise CommandFailed(f"there is no file {file_id}", Exit.NOT_FOUND)
    file = found[0]
    volume = desk.vault.volume(file.volume_id)
    volume.check_state()
    if await _wrong(desk, volume, file) is None:
        await damages.unmark_damaged(desk.db, file)
        return f"file {file_id} is as it should be: nothing was restored"
    repository = Repository(desk.settings)
    for backup in reversed(await chosen(repository, desk.arguments.at, desk.arguments.backup)):
        if await _bring_back(desk, repository, backup, volume, file):
            return f"file {file_id} ({human_bytes(file.file_size)}) restored from backup {backup.id} of {backup.at:%Y-%m-%dT%H:%M:%SZ}"
    raise CommandFailed(f"no backup has the bytes of file {file_id}", Exit.NOT_FOUND)


async def _bring_back(desk: Desk, repository: Repository, backup: BackupSet, volume: Volume, file: StoredFile) -> bool:
    run = desk.vault.run
    for part, path in _places(file, backup):
        snapshot_id = backup.part(part)
        if snapshot_id is None:
            continue
        incoming = await run(lambda: IncomingFile(volume, uuid7(), {"sha-256": file.sha256}))
        try:
            async with repository.reading(snapshot_id, path) as running:
                while piece := await running.stdout.read(_READ_BYTES):
                    await run(incoming.append, [piece])
                await repository.check(running)
            await run(incoming.seal)
            if await run(inventory.facts_of, volume, file.file_path) is not None:
                await run(inventory.set_aside, volume, file.file_path)
            await run(incoming.publish, file.file_path)
        except (ResticFailed, DigestMismatch):  # it is not there, or was damaged then already
            await run(incoming.discard)
            continue
        except BaseException:
            await run(incoming.discard)
            raise
        await damages.unmark_damaged(desk.db, file)
        await _look_again(desk, volume, file)
        return True
    return False


def _places(file: StoredFile, backup: BackupSet) -> list[tuple[str, str]]:
    """Where the bytes may lie in a backup, the likeliest place first.

    Links may have been revoked since, which renames a file to its next generation; and it may have been on another volume then.
    """
    directory, name = file.file_path.rsplit("/", 1)
    file_id, generation, extension = name.split(".")
    names = [f"{file_id}.{number}.{extension}" for number in range(int(generation), 0, -1)][:_MOST_GENERATIONS]
    places = []
    for volume_id in dict.fromkeys((file.volume_id, *backup.volume_ids())):
        for each in names:
            places += [(sets.files_of(volume_id), f"/{directory}/{each}"), (sets.withheld_of(volume_id), f"/{WITHHELD}/{each}")]
    return places


async def _look_again(desk: Desk, volume: Volume, file: StoredFile) -> None:
    """Who deleted or replaced the file meanwhile has buried what was there; what we have put there since is nobody's."""
    now = await rows.get_stored(desk.db, [file.id])
    if not now or now[0].file_path != file.file_path:
        await desk.vault.run(volume.remove_stored, [file.file_path])
        whole = shlex.quote(str(volume.mount / file.file_path))
        raise CommandFailed(f"file {file.id} was deleted or replaced meanwhile, and {whole} was removed again", Exit.REFUSED)
