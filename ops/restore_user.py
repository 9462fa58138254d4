"""`coffer restore user`: what a user had and has no more, back into a store that runs. What is there stays as it is."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from ops import sets
from ops.loading import dump_in, load_dump
from ops.restic import Repository
from ops.restore import chosen, manifest_of
from ops.scratch import scratch_database, scratch_directory
from ops.sets import BackupSet
from ops.tool import Desk, Finding
from server import ledger
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes
from server.errors import CofferError, CommitUnknown, DigestMismatch, QuotaExceeded
from server.ledger import Database, migrate, restored
from server.ledger import audit as rows
from server.ledger.restored import SavedFile
from server.vault import Volume, restoring
from server.vault.layout import USERS, WITHHELD, stored_path, user_directory

_PAGE = 1_000


async def run(desk: Desk) -> str:
    """Restores one user's files and linked assets that are not there. Ids, names, tags, times and how files were made are those of the
    backup; signed links made before end.
    """
    user_id: str = desk.arguments.user_id
    repository = Repository(desk.settings)
    backup = (await chosen(repository, desk.arguments.at, desk.arguments.backup))[-1]
    manifest = await manifest_of(repository, backup)
    restore = _Restore(desk, repository, backup, user_id)
    async with (
        scratch_directory() as directory,
        scratch_database(desk.settings, "coffer_restore_user", manifest.server_version, directory) as url,
    ):
        await load_dump(dump_in(repository, backup.part("dump") or ""), url, manifest.server_version)
        await migrate(url)
        scratch = Database(replace(desk.settings, database_url=url))
        await scratch.open()
        try:
            await restore.run(scratch)
        finally:
            await scratch.close()
    desk.figures |= {
        "restored_files": restore.files,
        "restored_bytes": restore.size_bytes,
        "files_there": restore.there,
        "restored_assets": restore.assets,
    }
    return (
        f"{restore.files:,} files ({human_bytes(restore.size_bytes)}) and {restore.assets:,} linked assets of user {user_id!r} restored "
        f"from backup {backup.id} of {backup.at:%Y-%m-%dT%H:%M:%SZ}, {restore.there:,} files were there"
    )


class _Restore:
    def __init__(self, desk: Desk, repository: Repository, backup: BackupSet, user_id: str) -> None:
        self.desk = desk
        self.repository = repository
        self.backup = backup
        self.user_id = user_id
        self.files = self.size_bytes = self.there = self.assets = 0

    async def run(self, scratch: Database) -> None:
        """Raises `CommandFailed` for a user whom the backup does not know."""
        saved = await restored.saved_user(scratch, self.user_id)
        if saved is None:
            raise CommandFailed(f"backup {self.backup.id} has no user {self.user_id!r}", Exit.NOT_FOUND)
        wanted = await self._wanted(scratch)
        volume = await self._place(saved)
        try:
            staged = await self._stage(volume, wanted)
            for file in wanted:
                await self._restore(volume, file, staged)
        finally:
            await self.desk.vault.run(restoring.remove_staging, volume)
        if self.files:
            await ledger.raise_link_epoch(self.desk.db, self.user_id)  # those revoked since the backup must not work again
        after: UUID | None = None
        while page := await restored.saved_assets(scratch, self.user_id, after, _PAGE):
            after = page[-1].id
            for asset in page:
                self.assets += await restored.restore_asset(self.desk.db, asset)

    async def _wanted(self, scratch: Database) -> list[SavedFile]:
        wanted: list[SavedFile] = []
        after: UUID | None = None
        while page := await restored.saved_files(scratch, self.user_id, after, _PAGE):
            after = page[-1].id
            there = {file.id for file in await rows.get_stored(self.desk.db, [file.id for file in page])}
            self.there += len(there)
            wanted += [file for file in page if file.id not in there]
        return wanted

    async def _place(self, saved: restored.SavedUser) -> Volume:
        known, _ = await ledger.usage(self.desk.db, self.user_id)
        user = await ledger.ensure_user(
            self.desk.db, self.user_id, max_bytes=saved.max_bytes, volume_id=self.desk.vault.place_for(self.user_id).id
        )
        if known is None:
            await restored.set_tier(self.desk.db, self.user_id, saved.tier)
        volume = self.desk.vault.volume(user.volume_id)
        volume.check_state()
        return volume

    async def _stage(self, volume: Volume, wanted: list[SavedFile]) -> dict[UUID, Path]:
        """Has restic restore what is wanted, on the volume where it is to be. Returns where it lies, as far as it came."""
        staging = await self.desk.vault.run(restoring.make_staging, volume)
        volume.check_writable(sum(file.file_size for file in wanted))
        by_volume: defaultdict[UUID, list[SavedFile]] = defaultdict(list)
        for file in wanted:
            by_volume[file.volume_id].append(file)
        staged: dict[UUID, Path] = {}
        for volume_id, files in by_volume.items():
            target = staging / str(volume_id)
            places = ((sets.files_of(volume_id), f"/{USERS}/{user_directory(self.user_id)}"), (sets.withheld_of(volume_id), f"/{WITHHELD}"))
            for part, directory in places:
                if (snapshot_id := self.backup.part(part)) is not None:
                    await self.repository.restore(snapshot_id, target, [directory])
            for file in files:
                for place in (target / file.file_path, target / WITHHELD / file.file_path.rsplit("/", 1)[1]):
                    if place.exists():
                        staged[file.id] = place
        return staged

    async def _restore(self, volume: Volume, file: SavedFile, staged: dict[UUID, Path]) -> None:
        run, db = self.desk.vault.run, self.desk.db
        if file.id not in staged:
            self._tell(file, "is not in the backup, though its row is")
            return

        def path(generation: int) -> str:
            return stored_path(self.user_id, file.file_type, file.id, generation, file.file_path.rsplit(".", 1)[1])

        first = max(int(file.file_path.rsplit(".", 2)[1]), await restored.latest_generation(db, file.id)) + 1
        try:
            generation = await run(restoring.adopt, volume, staged[file.id], path, first, file.sha256)
        except DigestMismatch:
            self._tell(file, "came back from the backup with other bytes")
            return
        try:
            is_restored = await restored.restore_file(db, file, volume.id, path(generation), generation)
        except CommitUnknown:
            raise  # the bytes stay: the row may be there, and the audit knows
        except QuotaExceeded:
            await run(volume.remove_stored, [path(generation)])
            self._tell(file, "does not fit into the user's quota")
            return
        except CofferError:
            await run(volume.remove_stored, [path(generation)])
            raise
        if not is_restored:  # somebody else has restored it meanwhile
            await run(volume.remove_stored, [path(generation)])
            self.there += 1
            return
        self.files += 1
        self.size_bytes += file.file_size

    def _tell(self, file: SavedFile, what: str) -> None:
        text = f"file {file.id} of user {self.user_id!r} {what}"
        self.desk.found(Finding(kind="not_restored", state="look", text=text, user_id=self.user_id, file_id=file.id))
