"""`coffer drill`: restores the newest backup to scratch, and says whether it could be lived on.

All rows are restored, and every file is looked for in the backup with its length; the bytes of some, or of all with --full, are read and
compared. Nothing is restored to where anybody could take it for the store.
"""

import asyncio
import hashlib
import os
import random
import tarfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from ops import sets
from ops.loading import dump_in, load_dump
from ops.restic import Repository
from ops.restore import chosen, manifest_of
from ops.scratch import scratch_database, scratch_directory
from ops.sets import BackupSet, Manifest
from ops.tool import Desk, Finding
from server.commands.failures import CommandFailed
from server.commands.output import human_bytes
from server.errors import CofferError
from server.ledger import Database, backups, migrate, scratch
from server.ledger.models import StoredFile
from server.ledger.scratch import Listed
from server.vault.layout import WITHHELD

SAMPLE_FILES = 100
_PAGE = 10_000
_BATCH = 5_000
_PIECE_BYTES = 2**20


async def run(desk: Desk) -> str:
    """Drills one backup. A bad one is a finding; the database remembers either."""
    repository = Repository(desk.settings)
    backup = (await chosen(repository, None, desk.arguments.backup))[-1]
    assert backup.at is not None  # noqa: S101 - only whole ones are chosen
    drill = _Drill(desk, repository, backup)
    began = time.monotonic()
    failure: str | None = None
    try:
        await drill.restore()
    except (CommandFailed, CofferError) as problem:
        failure = str(problem)
        drill.bad(failure)
    seconds = time.monotonic() - began
    if failure is None and drill.faults:
        failure = f"{drill.faults} files are missing or wrong"
    await backups.record_drill(
        desk.db,
        backup.id,
        backup.at,
        is_full=desk.arguments.full,
        files=drill.files,
        size_bytes=drill.read_bytes,
        seconds=seconds,
        error=failure,
    )
    desk.figures |= {
        "passed": failure is None,
        "is_full": desk.arguments.full,
        "snapshot_timestamp_seconds": backup.at.timestamp(),
        "backup_age_seconds": time.time() - backup.at.timestamp(),
        "restore_seconds": seconds,
        "rows_compared": drill.rows,
        "files": drill.files,
        "bytes": drill.read_bytes,
    }
    verdict = "is good" if failure is None else "is NOT good"
    return (
        f"backup {backup.id} of {backup.at:%Y-%m-%dT%H:%M:%SZ} {verdict}: {drill.rows:,} rows compared, "
        f"{drill.files:,} files ({human_bytes(drill.read_bytes)}) read"
    )


class _Drill:
    def __init__(self, desk: Desk, repository: Repository, backup: BackupSet) -> None:
        self.desk = desk
        self.repository = repository
        self.backup = backup
        self.rows = self.files = self.read_bytes = self.faults = 0

    def bad(self, text: str) -> None:
        """One more reason not to trust this backup."""
        self.desk.found(Finding(kind="backup_bad", state="look", text=text, command="restic check --read-data && coffer backup"))

    def _bad_file(self, file: StoredFile, what: str) -> None:
        self.faults += 1
        text = f"file {file.id} of user {file.user_id!r} {what}"
        self.desk.found(
            Finding(
                kind="file_not_saved",
                state="look",
                text=text,
                user_id=file.user_id,
                file_id=file.id,
                volume_id=file.volume_id,
                path=file.file_path,
            )
        )

    async def restore(self) -> None:
        """Raises `CommandFailed` when the backup cannot be restored; a file that lacks is told."""
        manifest = await manifest_of(self.repository, self.backup)
        async with (
            scratch_directory() as directory,
            scratch_database(self.desk.settings, "coffer_drill", manifest.server_version, directory) as url,
        ):
            settings = replace(self.desk.settings, database_url=url)
            await load_dump(dump_in(self.repository, self.backup.part("dump") or ""), url, manifest.server_version)
            await migrate(url)  # as a restore would: it may be of an older Coffer
            db = Database(settings)
            await db.open()
            try:
                await self._compare_counts(db, manifest)
                await scratch.create_listing(db)
                for volume in manifest.volumes:
                    await self._list(db, volume.id)
                await self._compare_listing(db)
                if not self.desk.arguments.full:
                    await self._read_sample(db, directory)
            finally:
                await db.close()

    async def _compare_counts(self, db: Database, manifest: Manifest) -> None:
        found = await scratch.count_by_volume(db)
        for volume in manifest.volumes:
            files, size_bytes = found.pop(volume.id, (0, 0))
            if (files, size_bytes) != (volume.files, volume.size_bytes):
                self.faults += 1
                self.bad(f"the dump has {files} files on volume {volume.id}, and the manifest says {volume.files}")
        if found:
            self.faults += 1
            self.bad(f"the dump has files on volumes that the manifest does not know: {', '.join(map(str, found))}")

    async def _list(self, db: Database, volume_id: UUID) -> None:
        listing = self._read_all if self.desk.arguments.full else self._entries
        batch: list[Listed] = []
        for part in (sets.files_of(volume_id), sets.withheld_of(volume_id)):
            if (snapshot_id := self.backup.part(part)) is None:
                continue
            async with aclosing(listing(snapshot_id)) as entries:
                async for entry in entries:
                    batch.append(entry)
                    if len(batch) >= _BATCH:
                        await scratch.note_listing(db, volume_id, batch)
                        batch = []
        await scratch.note_listing(db, volume_id, batch)

    async def _entries(self, snapshot_id: str) -> AsyncGenerator[Listed, None]:
        async for node in self.repository.entries(snapshot_id):
            if node.type == "file":
                yield Listed(node.path.removeprefix("/"), node.size, None)

    async def _read_all(self, snapshot_id: str) -> AsyncGenerator[Listed, None]:
        """Every file of a snapshot, read as one archive: nothing comes to the disk."""
        found: asyncio.Queue[Listed | None] = asyncio.Queue(_BATCH)
        loop = asyncio.get_running_loop()

        def put(entry: Listed | None) -> None:
            asyncio.run_coroutine_threadsafe(found.put(entry), loop).result()

        is_over = True
        try:
            async with self.repository.piped(snapshot_id, "/") as (stream, running):
                is_over = False
                reading = asyncio.create_task(asyncio.to_thread(_hash_archive, os.dup(stream.read), put))
                while (entry := await found.get()) is not None:
                    self.files += 1
                    self.read_bytes += entry.size_bytes
                    yield entry
                is_over = True
                await reading
                await self.repository.check(running)
        finally:
            while not is_over:  # nobody wants the rest: restic has been stopped, and the thread comes to its end
                is_over = await found.get() is None

    async def _compare_listing(self, db: Database) -> None:
        after: UUID | None = None
        while (page := await scratch.compare_listing(db, after, _PAGE)).last is not None:
            after = page.last
            self.rows += page.looked_at
            for file in page.missing:
                self._bad_file(file, "is not in the backup with the bytes that its row names")

    async def _read_sample(self, db: Database, directory: Path) -> None:
        files = await scratch.sample(db, self.desk.arguments.sample)
        random.shuffle(files)
        for volume_id in {file.volume_id for file in files}:
            some = {file.file_path: file for file in files if file.volume_id == volume_id}
            withheld = await scratch.withheld_paths(db, volume_id, list(some))
            places = {path: f"{WITHHELD}/{path.rsplit('/', 1)[1]}" if path in withheld else path for path in some}
            target = directory / str(volume_id)
            for part, is_withheld in ((sets.files_of(volume_id), False), (sets.withheld_of(volume_id), True)):
                only = [f"/{place}" for path, place in places.items() if (path in withheld) is is_withheld]
                if only and (snapshot_id := self.backup.part(part)) is not None:
                    await self.repository.restore(snapshot_id, target, only)
            for path, file in some.items():
                digest = await asyncio.to_thread(_hash_file, target / places[path])
                if digest is None:
                    self._bad_file(file, "could not be restored")
                    continue
                self.files += 1
                self.read_bytes += file.file_size
                if digest != file.sha256:
                    self._bad_file(file, "came back with other bytes")


def _hash_file(path: Path) -> bytes | None:
    with suppress(FileNotFoundError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
    return None


def _hash_archive(source: int, put: Callable[[Listed | None], None]) -> None:
    try:
        with os.fdopen(source, "rb") as stream, tarfile.open(mode="r|", fileobj=stream) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None:
                    digest = hashlib.sha256()
                    while piece := file.read(_PIECE_BYTES):
                        digest.update(piece)
                    put(Listed(member.name.removeprefix("/"), member.size, digest.digest()))
            while stream.read(_PIECE_BYTES):  # what fills the last block
                pass
    except (tarfile.TarError, OSError):
        pass  # restic has ended too early, and says why
    finally:
        put(None)
