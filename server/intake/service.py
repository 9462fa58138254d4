"""The intake as doors see it: begin an upload, copy, delete, erase."""

import asyncio
import logging
import os
import time
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
    NotFound,
)
from server.intake.upload import Details, Upload
from server.kinds import Allowed
from server.ledger import Database
from server.ledger.models import File, Tombstone
from server.settings import Settings
from server.vault import Vault, Volume
from server.vault.layout import user_directory

_PLACEMENT_SECONDS = 60.0  # how long a process remembers a user's volume; a stale one only puts a file on the old volume
_MOST_PLACEMENTS = 10_000
_COPY_BYTES = 2**20
_ERASE_BATCH_FILES = 1_000

log = logging.getLogger("coffer.intake")


class _Placement(NamedTuple):
    volume_id: UUID | None
    until: float


class Intake:
    """Bytes in. One per process; lives in one event loop. Doors authorise first, then call it."""

    def __init__(self, settings: Settings, db: Database, vault: Vault) -> None:
        self.settings = settings
        self.db = db
        self.vault = vault
        self.allowed = Allowed.from_settings(settings)
        self.live: set[UUID] = set()  # uploads of this process that hold a reservation; housekeeping renews their leases
        self.buffered_bytes = 0  # held in memory by small uploads together
        self._placements: dict[str, _Placement] = {}

    @property
    def buffered_is_full(self) -> bool:
        return self.buffered_bytes > self.settings.buffered_total_bytes

    async def placed(self, user_id: str, *, fresh: bool = False) -> Volume:
        """The user's volume; makes the user with the default quota, on the roomiest volume, when there is none.

        Raises `VolumeUnavailable`, `DatabaseUnavailable`.
        """
        now = time.monotonic()
        placement = None if fresh else self._placements.get(user_id)
        if placement is None or placement.until < now:
            user = await ledger.ensure_user(
                self.db, user_id, max_bytes=self.settings.default_quota_bytes, volume_id=self.vault.roomiest().id
            )
            if len(self._placements) >= _MOST_PLACEMENTS:
                self._placements.clear()
            placement = self._placements[user_id] = _Placement(user.volume_id, now + _PLACEMENT_SECONDS)
        return self.vault.volume(placement.volume_id)

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
            await self._open(upload, declared_bytes)
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
        upload = await self._prepare(user_id, declared_bytes, likely_bytes, expected, None, idempotency_key)
        deadline = time.monotonic() + self.settings.idempotency_wait_seconds
        pause = 0.05
        while (stored := await ledger.find_file_by_idempotency_key(self.db, user_id, idempotency_key)) is None:
            try:
                await self._open(upload, declared_bytes or 0)
            except IdempotencyInProgress:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 0.5)
                continue
            # Whoever held the key before us may have published between our two looks; nobody can from here on.
            stored = await ledger.find_file_by_idempotency_key(self.db, user_id, idempotency_key)
            if stored is None:
                return upload
            await upload.abort()
            break
        if declared_bytes is not None and stored.generation == 1 and declared_bytes != stored.file_size:
            raise IdempotencyKeyReused
        return stored

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
        volume = await self.placed(user_id)
        volume.check_writable(declared_bytes or 0)
        return Upload(
            self,
            uuid7(),
            user_id,
            volume,
            declared_bytes=declared_bytes,
            likely_bytes=likely_bytes,
            free_of_charge_bytes=replacing.file_size if replacing else 0,
            expected=expected or {},
            idempotency_key=idempotency_key,
        )

    async def _open(self, upload: Upload, size_bytes: int) -> None:
        """The first reservation of an upload that nobody else holds yet: what fails here is also tidied here."""
        try:
            try:
                await upload.reserve(size_bytes)
            except NotFound:  # the user's row went away since we last looked
                await self.placed(upload.user_id, fresh=True)
                await upload.reserve(size_bytes)
        except IdempotencyInProgress:
            raise  # nothing is held, and the caller tries again
        except BaseException:
            await upload.abort()
            raise

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
        self._placements.pop(user_id, None)
        while tombstones := await ledger.erase_batch(self.db, user_id, limit=_ERASE_BATCH_FILES):
            await self.bury(tombstones)
        for volume in self.vault.volumes if user.volume_id is None else [self.vault.volume(user.volume_id)]:
            await self.vault.run(volume.remove_user, user_directory(user_id))
        await ledger.finish_erasing(self.db, user_id)
