"""The intake as doors see it: begin an upload, copy, delete, erase."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from uuid_utils.compat import uuid7

from server import ledger
from server.errors import (
    CofferError,
    Damaged,
    DigestMismatch,
    FileTooLarge,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    IncompleteBody,
)
from server.intake.upload import Details, Upload
from server.kinds import Allowed
from server.ledger import Database, Publisher
from server.ledger.models import File, Tombstone
from server.settings import Settings
from server.vault import Vault, Volume
from server.vault.layout import user_directory

_PLACEMENT_SECONDS = 60.0  # how long a process remembers a user's volume; a stale one only puts a file on the old volume
_MOST_PLACEMENTS = 10_000
_NOWHERE = (-1.0, None, datetime.min)  # noqa: DTZ901 - compared with nothing
_COPY_BYTES = 2**20
_ERASE_BATCH_FILES = 1_000

log = logging.getLogger("coffer.intake")


class Placement(NamedTuple):
    """Where a user's bytes go. `since` tells the user from an earlier one of the same id, erased meanwhile."""

    volume: Volume
    since: datetime


class Intake:
    """Bytes in. One per process; lives in one event loop. Doors authorise first, then call it."""

    def __init__(self, settings: Settings, db: Database, vault: Vault) -> None:
        self.settings = settings
        self.db = db
        self.vault = vault
        self.publisher = Publisher(db)
        self.allowed = Allowed.from_settings(settings)
        self.live: set[UUID] = set()  # uploads of this process that hold a reservation; housekeeping renews their leases
        self.buffered_bytes = 0  # held in memory by small uploads together
        self._placements: dict[str, tuple[float, UUID | None, datetime]] = {}

    @property
    def buffered_is_full(self) -> bool:
        """Whether small uploads together hold as much memory as they may; the next ones go to disk at once."""
        return self.buffered_bytes > self.settings.buffered_total_bytes

    async def placed(self, user_id: str) -> Placement:
        """The user's place; makes the user with the default quota, on the roomiest volume, when there is none.

        Raises `VolumeUnavailable`, `DatabaseUnavailable`.
        """
        now = time.monotonic()
        until, volume_id, since = self._placements.get(user_id, _NOWHERE)
        if until < now:
            user = await ledger.ensure_user(
                self.db, user_id, max_bytes=self.settings.default_quota_bytes, volume_id=self.vault.roomiest().id
            )
            if len(self._placements) >= _MOST_PLACEMENTS:
                self._placements.clear()
            volume_id, since = user.volume_id, user.created_at
            self._placements[user_id] = (now + _PLACEMENT_SECONDS, volume_id, since)
        return Placement(self.vault.volume(volume_id), since)

    def forget(self, user_id: str) -> None:
        """The user's row is not what we remember."""
        self._placements.pop(user_id, None)

    async def begin(
        self,
        user_id: str,
        *,
        declared_bytes: int | None,
        likely_bytes: int = 0,
        expected: dict[str, bytes] | None = None,
        replacing: File | None = None,
    ) -> Upload:
        """Starts an upload, before a byte of it is read.

        `declared_bytes` is binding, `likely_bytes` a guess at an undeclared length (0: none), `expected` digests by RFC 9530
        name. A file that is being replaced pays only for what it grows by. Raises `FileTooLarge`, `QuotaExceeded`,
        `VolumeFull`, `VolumeReadOnly`, `VolumeUnavailable`, `UserErasing`, `DatabaseUnavailable`.
        """
        upload = await self._prepare(user_id, declared_bytes, likely_bytes, expected, replacing, None)
        if declared_bytes is not None and declared_bytes > self.settings.buffered_body_bytes:
            async with _aborting(upload):
                await upload.reserve(declared_bytes)
        return upload

    async def begin_once(
        self,
        user_id: str,
        idempotency_key: str,
        *,
        declared_bytes: int | None,
        likely_bytes: int = 0,
        expected: dict[str, bytes] | None = None,
    ) -> Upload | File:
        """As `begin`; or returns the file that this key has stored already.

        Of many requests with the same key one gets the reservation that carries it; the others wait for its outcome, before
        their bodies are read. When the first fails, the next takes over. Raises also `IdempotencyInProgress` after waiting,
        and `IdempotencyKeyReused`.
        """
        stored = await ledger.find_file_by_idempotency_key(self.db, user_id, idempotency_key)
        if stored is None:
            upload = await self._prepare(user_id, declared_bytes, likely_bytes, expected, None, idempotency_key)
            async with _aborting(upload):
                stored = await self._claim(upload, idempotency_key, declared_bytes or 0)
                if stored is None:
                    return upload
                await upload.abort()
        if declared_bytes is not None and stored.generation == 1 and declared_bytes != stored.file_size:
            raise IdempotencyKeyReused
        return stored

    async def _claim(self, upload: Upload, key: str, size_bytes: int) -> File | None:
        """Gets the reservation that carries the key, or the file that somebody else stored with it while we waited."""
        deadline = time.monotonic() + self.settings.idempotency_wait_seconds
        pause = 0.05
        while True:
            try:
                await upload.reserve(size_bytes)
            except IdempotencyInProgress:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 0.5)
                stored = await ledger.find_file_by_idempotency_key(self.db, upload.user_id, key)
                if stored is not None:
                    return stored
            else:
                # Whoever held the key before us may have published since our last look; nobody can from here on.
                return await ledger.find_file_by_idempotency_key(self.db, upload.user_id, key)

    async def _prepare(
        self,
        user_id: str,
        declared_bytes: int | None,
        likely_bytes: int,
        expected: dict[str, bytes] | None,
        replacing: File | None,
        idempotency_key: str | None,
    ) -> Upload:
        if declared_bytes is not None and declared_bytes > self.settings.max_file_bytes:
            raise FileTooLarge(self.settings.max_file_bytes)
        placement = await self.placed(user_id)
        placement.volume.check_writable(declared_bytes or 0)
        return Upload(
            self,
            uuid7(),
            user_id,
            placement,
            declared_bytes=declared_bytes,
            likely_bytes=likely_bytes,
            free_of_charge_bytes=replacing.file_size if replacing else 0,
            expected=expected or {},
            idempotency_key=idempotency_key,
        )

    async def copy(self, user_id: str, file_id: UUID) -> File:
        """A second file with the same bytes and fields, charged to the same user. The bytes are verified on the way.

        Raises `NotFound`, `Damaged`, and what `begin` and `Upload.finish` raise.
        """
        source = await ledger.get_file(self.db, user_id, file_id)
        volume = self.vault.volume(source.volume_id)
        try:
            fd = await self.vault.run(volume.open_stored, source.file_path)
        except FileNotFoundError as problem:
            raise Damaged from problem
        try:
            upload = await self.begin(user_id, declared_bytes=source.file_size, expected={"sha-256": source.sha256})
            try:
                offset = 0
                while chunk := await self.vault.run(os.pread, fd, _COPY_BYTES, offset):
                    await upload.write(chunk)
                    offset += len(chunk)
                return await upload.finish(
                    Details(
                        file_name=source.file_name,
                        kind=source.file_type,
                        package_name=source.package_name,
                        tags=source.tags,
                        metadata=source.metadata,
                    )
                )
            except (DigestMismatch, IncompleteBody) as problem:
                raise Damaged from problem
            finally:
                await upload.abort()
        finally:
            os.close(fd)

    async def delete(self, user_id: str, ids: list[UUID]) -> set[UUID]:
        """Deletes the user's files among `ids` and returns which they were. Their quota is free when this returns.

        The bytes are unlinked at once where the volume allows; otherwise the tombstones keep them for housekeeping.
        """
        deleted = await ledger.delete_files(self.db, user_id, ids)
        try:
            await self.bury([tombstone for _, tombstone in deleted])
        except CofferError as problem:
            log.warning("bytes of deleted files will go later: %s", problem)
        return {file_id for file_id, _ in deleted}

    async def bury(self, tombstones: list[Tombstone]) -> None:
        """Unlinks the bytes of deleted rows, then drops the tombstones. What it raises on leaves them for the next housekeeping."""
        by_volume: dict[UUID, list[Tombstone]] = {}
        for tombstone in tombstones:
            by_volume.setdefault(tombstone.volume_id, []).append(tombstone)
        for volume_id, group in by_volume.items():
            volume = self.vault.volume(volume_id)
            await self.vault.run(volume.remove_stored, [tombstone.file_path for tombstone in group])
            await ledger.drop_tombstones(self.db, [tombstone.id for tombstone in group])

    async def erase_user(self, user_id: str) -> None:
        """Erases every byte and row of a user. From its first step on the user takes no new bytes.

        Interrupted anywhere, housekeeping goes on where it stopped. Raises `NotFound`.
        """
        user = await ledger.begin_erasing(self.db, user_id)
        while tombstones := await ledger.erase_batch(self.db, user_id, limit=_ERASE_BATCH_FILES):
            await self.bury(tombstones)

        async def remove_bytes() -> None:
            for volume in self.vault.volumes if user.volume_id is None else [self.vault.volume(user.volume_id)]:
                await self.vault.run(volume.remove_user, user_directory(user_id))

        await ledger.finish_erasing(self.db, user_id, remove_bytes)
        self.forget(user_id)


@asynccontextmanager
async def _aborting(upload: Upload) -> AsyncIterator[None]:
    """What fails before anybody else holds the upload is tidied here."""
    try:
        yield
    except BaseException:
        await upload.abort()
        raise
