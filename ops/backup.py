"""`coffer backup`: rows and files as one pair, encrypted and deduplicated. server/decisions/0021 says why it is one."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import msgspec
from uuid_utils.compat import uuid7

from ops import postgres_tools, sets
from ops.audit import LEAST_SUSPICIOUS, SUSPICIOUS_SHARE
from ops.children import child, pipe
from ops.hooks import run_hook
from ops.restic import Repository, ResticFailed, ResticLocked, Saved, Snapshot
from ops.sets import DUMP, MANIFEST, Manifest, VolumeManifest
from ops.tarball import forget_old, literal, new_tarball
from ops.tool import Desk, Finding
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes
from server.errors import CofferError, CommitUnknown, DatabaseUnavailable, VolumeUnavailable
from server.ledger import audit as rows
from server.ledger import backups
from server.ledger.backups import Moment
from server.vault import Volume, inventory
from server.vault.layout import PREVIEWS, USERS, WITHHELD, is_previews

_RENEW_SECONDS = 30.0
_TRY_AGAIN_SECONDS = 2.0
_STOPPED = "it was told to stop"


async def run(desk: Desk) -> str:
    """Takes one backup. What fails says so in `backups`, in its exit code and metrics, and to COFFER_BACKUP_FAILED (ops/tool.py)."""
    settings = desk.settings
    repository = None if desk.arguments.tar else Repository(settings)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]
    try:
        await run_hook(settings.backup_before, "COFFER_BACKUP_BEFORE")  # first of all: it may bring the repository
        manifest = await (_to_archive(desk, desk.arguments.tar) if repository is None else _to_repository(desk, repository))
        await run_hook(settings.backup_after, "COFFER_BACKUP_AFTER")
    except asyncio.CancelledError:
        raise CommandFailed(_STOPPED, Exit.INTERRUPTED) from None
    return f"{manifest.files:,} files ({human_bytes(manifest.size_bytes)})"


async def _to_repository(desk: Desk, repository: Repository) -> Manifest:
    if desk.arguments.init:
        await repository.initialise()
    before = await repository.snapshots(sets.MARK)  # before anything is held: is it there, and is the password right?
    backup = Backup(desk, "restic")
    way = _ToRepository(desk, repository, backup)
    manifest = await backup.take(way)
    await _forget(desk, repository, before + way.saved)
    return manifest


async def _to_archive(desk: Desk, place: Path) -> Manifest:
    backup = Backup(desk, "tar")
    manifest = await backup.take(_ToArchive(desk, place, backup))
    if place.is_dir():
        desk.figures["backups"] = forget_old(place, desk.settings)
    return manifest


class _Way(Protocol):
    """How a backup is stored."""

    async def rows(self, moment: Moment) -> None:
        """Stores a dump of that moment."""

    async def files(self, moment: Moment) -> Manifest:
        """Stores what the rows of that moment name, releases the hold, and makes the backup a whole one."""

    def close(self) -> None:
        """Removes what was only on the way, however it ended."""


class Backup:
    """One backup, however it is stored: its row, its hold on bytes, and what it must look after."""

    def __init__(self, desk: Desk, way: str) -> None:
        self.id: UUID = uuid7()
        self._desk = desk
        self._way = way
        self._released = False

    async def take(self, way: _Way) -> Manifest:
        """Holds bytes, then looks at the rows, then has both saved; whatever fails leaves nothing held."""
        desk = self._desk
        for volume in desk.vault.volumes:
            check_mounted(volume)
        await backups.begin_backup(desk.db, self.id, self._way)
        try:
            manifest = await self._holding(way)
            if not await backups.finish_backup(desk.db, self.id, manifest.at, manifest.files, manifest.size_bytes):
                raise _lost()
        except BaseException as problem:
            reason = _STOPPED if isinstance(problem, asyncio.CancelledError) else str(problem) or type(problem).__name__
            with suppress(CofferError):  # then the hold ends by itself
                await backups.fail_backup(desk.db, self.id, reason)
            raise
        desk.figures |= {
            "files": manifest.files,
            "bytes": manifest.size_bytes,
            "snapshot_timestamp_seconds": manifest.at.timestamp(),
        }
        return manifest

    async def _holding(self, way: _Way) -> Manifest:
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(self._keep())
                async with backups.moment(self._desk.settings) as moment:  # not for longer: vacuum waits for it
                    await way.rows(moment)
                manifest = await way.files(moment)
                keeping.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            way.close()
        return manifest

    async def _keep(self) -> None:
        while not self._released:
            pause = _RENEW_SECONDS
            try:
                if not await backups.renew_hold(self._desk.db, self.id) and not self._released:
                    raise _lost()
            except (DatabaseUnavailable, CommitUnknown):
                pause = _TRY_AGAIN_SECONDS
            await asyncio.sleep(pause)

    async def release(self) -> None:
        """All bytes have been read. Raises when some may have gone before."""
        self._released = True
        if not await backups.release_hold(self._desk.db, self.id):
            raise _lost()

    def manifest(self, moment: Moment) -> Manifest:
        """What this backup says of itself."""
        volumes = [
            VolumeManifest(each.id, str(each.mount), moment.files.get(each.id, 0), moment.size_bytes.get(each.id, 0))
            for each in self._desk.vault.volumes
        ]
        return Manifest(
            id=self.id,
            at=moment.at,
            server_version=moment.server_version,
            has_previews=self._desk.settings.backup_previews,
            volumes=volumes,
        )

    async def weigh(self, volume: Volume, moment: Moment, found: int, unread: list[str]) -> None:
        """Is what was read of a volume what the rows say? Raises for a volume that was not itself; single files are told."""
        check_mounted(volume)
        expected = moment.files.get(volume.id, 0)
        if expected - found > max(LEAST_SUSPICIOUS, expected * SUSPICIOUS_SHARE):
            raise CommandFailed(f"volume {volume.id} at {volume.mount} has {found} files, and the rows name {expected}: this is no backup")
        if found < expected:
            text = f"volume {volume.id} at {volume.mount} has {found} files, and the rows name {expected}"
            self._desk.found(Finding(kind="file_missing", state="look", text=text, volume_id=volume.id, command="coffer audit"))
        names = {path: path.removeprefix(f"{volume.mount}/") for path in unread}
        ids = {name: UUID(name.rsplit("/", 1)[1][:36]) for name in names.values() if inventory.is_stored(name)}
        wanted = {file.file_path for file in await rows.get_stored(self._desk.db, list(ids.values())) if file.damaged_at is None}
        for path, name in names.items():
            if name in wanted or (name not in ids and not is_previews(name)):
                text = f"{path} could not be read and is not in this backup"
                self._desk.found(
                    Finding(kind="file_unread", state="look", text=text, volume_id=volume.id, path=name, command="coffer audit")
                )


def check_mounted(volume: Volume) -> None:
    """Raises `CommandFailed` unless it is the volume that its row names: a backup of an empty mountpoint would look like one."""
    try:
        inventory.check_sentinel(volume)
    except VolumeUnavailable:
        raise CommandFailed(f"volume {volume.id} at {volume.mount} is unavailable: {volume.reason}", Exit.UNAVAILABLE) from None


def _lost() -> CommandFailed:
    return CommandFailed("the backup lost its hold on the files (was it stopped for minutes?), so it may lack some; start it again")


class _ToRepository:
    def __init__(self, desk: Desk, repository: Repository, backup: Backup) -> None:
        self._desk, self._repository, self._backup = desk, repository, backup
        self.saved: list[Snapshot] = []
        self._added_bytes = 0

    async def rows(self, moment: Moment) -> None:
        with pipe() as stream:
            async with dumping(self._desk, moment, stream.write) as check:
                stream.close_write()
                self._note(await self._repository.save_stream(stream.read, DUMP, sets.tags(self._backup.id, "dump")))
                await check()

    async def files(self, moment: Moment) -> Manifest:
        for volume in self._desk.vault.volumes:
            leave_out = [] if self._desk.settings.backup_previews else [f"{literal(volume.mount)}/{USERS}/*/{PREVIEWS}"]
            found, unread = await self._save(volume, USERS, sets.files_of(volume.id), leave_out)
            # After the files: what left its place meanwhile is here.
            if (volume.mount / WITHHELD).exists() and any((volume.mount / WITHHELD).iterdir()):
                more_found, more_unread = await self._save(volume, WITHHELD, sets.withheld_of(volume.id), [])
                found, unread = found + more_found, unread + more_unread
            await self._backup.weigh(volume, moment, found, unread)
        await self._backup.release()
        manifest = self._backup.manifest(moment)
        with pipe() as stream:
            stream.say(msgspec.json.encode(manifest).decode())  # far less than the 64 KiB that a pipe holds, but for hundreds of volumes
            stream.close_write()
            self._note(await self._repository.save_stream(stream.read, MANIFEST, sets.tags(self._backup.id, "manifest", moment.at)))
        self._desk.figures["added_bytes"] = self._added_bytes
        return manifest

    async def _save(self, volume: Volume, name: str, part: str, leave_out: list[str]) -> tuple[int, list[str]]:
        saved = await self._repository.save_tree(volume.mount, name, sets.tags(self._backup.id, part), leave_out=leave_out)
        self._note(saved)
        return saved.files, saved.unread

    def _note(self, saved: Saved) -> None:
        self.saved.append(saved.snapshot)
        self._added_bytes += saved.added_bytes

    def close(self) -> None:
        pass


class _ToArchive:
    """The dump lies beside the archive meanwhile, which is not encrypted either: tar must know a file's length before it writes it."""

    def __init__(self, desk: Desk, place: Path, backup: Backup) -> None:
        self._desk, self._place, self._backup = desk, place, backup
        self._beside: tempfile.TemporaryDirectory[str] | None = None

    async def rows(self, moment: Moment) -> None:
        self._archive = new_tarball(self._place, moment.at)
        self._beside = tempfile.TemporaryDirectory(dir=self._archive.path.parent, prefix=".coffer-")
        file = os.open(Path(self._beside.name, DUMP), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            async with dumping(self._desk, moment, file) as check:
                await check()
        finally:
            os.close(file)

    async def files(self, moment: Moment) -> Manifest:
        assert self._beside is not None  # noqa: S101 - the rows come first
        beside, manifest, volumes = Path(self._beside.name), self._backup.manifest(moment), self._desk.vault.volumes
        (beside / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        for volume in volumes:  # tar wants it to be there before anything is in it
            await self._desk.vault.run(volume.withhold, [])
        found, unread = await self._archive.write(beside, volumes, with_previews=self._desk.settings.backup_previews)
        try:
            for volume in volumes:
                of_volume = [path for path in unread if path.startswith(f"{volume.mount}/")]
                await self._backup.weigh(volume, moment, found[volume.id], of_volume)
            await self._backup.release()
        except BaseException:
            self._archive.path.unlink()  # nobody is to take it for one
            raise
        return manifest

    def close(self) -> None:
        if self._beside is not None:
            self._beside.cleanup()


@asynccontextmanager
async def dumping(desk: Desk, moment: Moment, to: int) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """pg_dump of that moment, into a descriptor. Gives what waits for its end and raises `CommandFailed` unless the dump is whole."""
    pg_dump = await postgres_tools.program("pg_dump", moment.server_version)
    url, environment = postgres_tools.connection(desk.settings.database_url)
    options = postgres_tools.dump_options(moment.snapshot)
    async with child(pg_dump, *options, f"--dbname={url}", environment=environment, stdout=to) as running:

        async def check() -> None:
            if await running.ended() != 0:
                raise CommandFailed(f"pg_dump: {' '.join(running.complaints[-2:]) or 'it ended without a word'}")

        yield check


async def _forget(desk: Desk, repository: Repository, there: list[Snapshot]) -> None:
    """A backup that cannot tidy is still one."""
    settings = desk.settings
    found = sets.sets_of(there)
    gone = (
        []
        if not settings.backup_forget
        else sets.to_forget(
            found,
            datetime.now(UTC),
            daily=settings.backup_keep_daily,
            weekly=settings.backup_keep_weekly,
            monthly=settings.backup_keep_monthly,
        )
    )
    try:
        if gone:
            await repository.forget(gone, prune=True)
    except ResticLocked as problem:  # a drill, say: the next backup removes them
        desk.found(Finding(kind="old_backups", state="waiting", text=f"old backups were not removed: {problem}"))
    except ResticFailed as problem:
        text = f"old backups could not be removed: {problem}"
        desk.found(Finding(kind="old_backups", state="look", text=text, command="restic check && coffer backup"))
    else:
        desk.figures["backups"] = len(sets.whole(each for each in found if not {one.id for one in each.snapshots} & set(gone)))
