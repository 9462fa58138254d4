"""The intake as doors see it: begin an upload, copy, delete, erase."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import NamedTuple
from uuid import UUID

from uuid_utils.compat import uuid7

from server import ledger
from server.actor import acting
from server.errors import (
    CofferError,
    CommitUnknown,
    Conflict,
    Damaged,
    DigestMismatch,
    FileTooLarge,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    IncompleteBody,
    LinkExpired,
    LinkUsed,
    NotFound,
    TooManyUploads,
    UserUnknown,
    VolumeUnavailable,
)
from server.intake.burial import bury
from server.intake.scanner import Scanner
from server.intake.upload import MOST_GENERATIONS_TRIED, Details, Upload
from server.kinds import Allowed
from server.ledger import Database, Publisher, Waker
from server.ledger.generation import JobTeller
from server.ledger.models import File, MovedToTrash, Tombstone, UploadLink, User
from server.settings import Settings
from server.vault import Vault, Volume
from server.vault.layout import USERS, user_directory

_PLACEMENT_SECONDS = 60.0  # how long a process remembers a user's volume; a stale one only puts a file on the old volume
_MOST_PLACEMENTS = 10_000
_NOWHERE = (-1.0, None, datetime.min)  # noqa: DTZ901 - compared with nothing
_COPY_BYTES = 2**20
_ERASE_BATCH_FILES = 1_000
_TRASH_TRIES = 3
_BUFFER_SHARES = 4  # one user's small uploads hold at most one of so many parts of the memory for all

log = logging.getLogger("coffer.intake")


class Placement(NamedTuple):
    """Where a user's bytes go. `since` tells the user from an earlier one of the same id, erased meanwhile."""

    volume: Volume
    since: datetime


@dataclass(slots=True)
class Load:
    """What one user's uploads in this process weigh on it."""

    uploads: int = 0
    buffered_bytes: int = 0


class Intake:
    """Bytes in. One per process; lives in one event loop. Doors authorise first, then call it."""

    def __init__(self, settings: Settings, db: Database, vault: Vault, scanner: Scanner | None = None) -> None:
        """Without `scanner`, nothing is scanned."""
        self.scanner = scanner
        self.settings = settings
        self.db = db
        self.vault = vault
        self.publisher = Publisher(db)
        self.waker = Waker(db)
        self.job_teller = JobTeller(db)
        self.allowed = Allowed.from_settings(settings)
        self.live: set[UUID] = set()  # uploads of this process that hold a reservation; housekeeping renews their leases
        self.buffered_bytes = 0  # held in memory by small uploads together
        self._loads: dict[str, Load] = {}  # of users with an upload under way
        self._placements: dict[str, tuple[float, UUID | None, datetime]] = {}

    def buffer(self, load: Load, size_bytes: int) -> bool:
        """Counts bytes that a small upload of that user holds in memory, or (negative) no longer does.

        False when the user's uploads, or all, hold as much as they may: this one is to go to disk at once. Nobody's slow uploads can take
        the memory from everybody else's.
        """
        self.buffered_bytes += size_bytes
        load.buffered_bytes += size_bytes
        most = self.settings.buffered_total_bytes
        return self.buffered_bytes <= most and load.buffered_bytes <= most // _BUFFER_SHARES

    def enter(self, user_id: str) -> Load:
        """Counts one more upload of the user under way in this process, until `leave`.

        Raises `TooManyUploads`. The ledger counts those with a reservation for all processes together; this counts also small uploads,
        which have none before they end, so that they need not ask the ledger.
        """
        load = self._loads.setdefault(user_id, Load())
        most = self.settings.uploads_at_once_per_user
        if most is not None and load.uploads >= most:
            raise TooManyUploads(most)
        load.uploads += 1
        return load

    def leave(self, user_id: str, load: Load) -> None:
        """The upload is over. To be called once for each `enter`."""
        load.uploads -= 1
        if not load.uploads:
            del self._loads[user_id]

    async def placed(self, user_id: str) -> Placement:
        """The user's place; makes the user with the default quota, on the volume that the vault chooses, when there is none.

        Raises `VolumeUnavailable`, `DatabaseUnavailable`, and `UserUnknown` for a token's user where tokens make none.
        """
        now = time.monotonic()
        until, volume_id, since = self._placements.get(user_id, _NOWHERE)
        if until < now or self._may_have_moved(volume_id):
            user = await self._user(user_id)
            if len(self._placements) >= _MOST_PLACEMENTS:
                self._placements.clear()
            volume_id, since = user.volume_id, user.created_at
            self._placements[user_id] = (now + _PLACEMENT_SECONDS, volume_id, since)
        return Placement(self.vault.volume(volume_id), since)

    def _may_have_moved(self, volume_id: UUID | None) -> bool:
        """From a volume that is being drained users are moved away; one that is unknown may have been retired."""
        try:
            return self.vault.volume(volume_id).is_draining
        except VolumeUnavailable:
            return True

    async def _user(self, user_id: str) -> User:
        if acting() == "user_token" and not self.settings.token_users_are_created:
            # Seen when the token was let in, which may be seconds ago: whoever was erased since must not make themselves anew.
            try:
                user = await ledger.get_user(self.db, user_id)
            except NotFound as problem:
                raise UserUnknown from problem
            if user.volume_id is not None:
                return user
        volume_id = self.vault.place_for(user_id).id
        user = await ledger.ensure_user(self.db, user_id, max_bytes=self.settings.default_quota_bytes, volume_id=volume_id)
        if user.volume_id is None:  # the volume has begun to be drained, or was retired, since we looked
            await self.vault.refresh(await ledger.list_volumes(self.db))
            volume_id = self.vault.place_for(user_id).id
            user = await ledger.ensure_user(self.db, user_id, max_bytes=self.settings.default_quota_bytes, volume_id=volume_id)
        return user

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
        kinds: frozenset[str] | None = None,
    ) -> Upload:
        """Starts an upload, before a byte of it is read.

        `declared_bytes` is binding, `likely_bytes` a guess at an undeclared length (0: none), `expected` digests by RFC 9530
        name. A file that is being replaced pays only for what it grows by. Bytes of other than these `kinds` (None: all) are
        refused as if they were not stored here, as soon as they show what they are. Raises `FileTooLarge`, `QuotaExceeded`,
        `TooManyUploads`, `VolumeFull`, `VolumeReadOnly`, `VolumeUnavailable`, `UserErasing`, `DatabaseUnavailable`.
        """
        upload = await self._prepare(user_id, declared_bytes, likely_bytes, expected, replacing, None, kinds)
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
        kinds: frozenset[str] | None = None,
    ) -> Upload | File:
        """As `begin`; or returns the file that this key has stored already.

        Of many requests with the same key one gets the reservation that carries it; the others wait for its outcome, before
        their bodies are read. When the first fails, the next takes over. Raises also `IdempotencyInProgress` after waiting,
        and `IdempotencyKeyReused`.
        """
        stored = await ledger.find_file_by_idempotency_key(self.db, user_id, idempotency_key)
        if stored is None:
            upload = await self._prepare(user_id, declared_bytes, likely_bytes, expected, None, idempotency_key, kinds)
            async with _aborting(upload):
                stored = await self._claim(upload, idempotency_key, declared_bytes or 0)
                if stored is None:
                    return upload
                await upload.abort()
        if kinds is not None and stored.file_type not in kinds:
            raise IdempotencyKeyReused  # by somebody who may store what these credentials may not see
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

    async def open_link(self, user_id: str, link: UploadLink, *, max_bytes: int, ttl_seconds: int) -> UUID:
        """Holds quota for one upload of at most `max_bytes` that somebody else will send, until `ttl_seconds` from now.

        Returns the id of the reservation, which is to be that of the file. Raises as `begin` does for so many declared bytes.
        """
        if max_bytes > self.settings.max_file_bytes:
            raise FileTooLarge(self.settings.max_file_bytes)
        placement = await self.placed(user_id)
        await self.vault.check_writable(placement.volume, max_bytes)
        upload_id = uuid7()
        try:
            await ledger.open_reservation(
                self.db,
                upload_id=upload_id,
                user_id=user_id,
                volume_id=placement.volume.id,
                reserved_bytes=max_bytes,
                idempotency_key=None,
                lease_seconds=ttl_seconds,
                link=link,
                most=self.settings.upload_links_per_user,
            )
        except NotFound as problem:  # erased since we looked
            self.forget(user_id)
            raise Conflict from problem
        return upload_id

    async def begin_linked(self, upload_id: UUID, *, declared_bytes: int | None, expected: dict[str, bytes]) -> tuple[Upload, UploadLink]:
        """Starts the one upload of an upload link. If it fails, the link may be used again until it ends.

        Raises `LinkUsed` when it has been or is being used, `LinkExpired` when its reservation is gone, and as `begin`.
        """
        settings = self.settings
        claimed = await ledger.claim_link(self.db, upload_id, settings.reservation_lease_seconds, settings.uploads_at_once_per_user)
        if claimed is None:
            # In this order: the row of the reservation goes in the transaction that adds the file's.
            if await ledger.live_uploads(self.db, [upload_id]) or await ledger.find_file_anywhere(self.db, upload_id):
                raise LinkUsed
            raise LinkExpired
        try:
            if declared_bytes is not None and declared_bytes > claimed.reserved_bytes:
                raise FileTooLarge(claimed.reserved_bytes)
            placement = await self.placed(claimed.user_id)
            await self.vault.check_writable(placement.volume, declared_bytes or 0)
            upload = Upload(
                self,
                upload_id,
                claimed.user_id,
                placement,
                declared_bytes=declared_bytes,
                likely_bytes=0,
                free_of_charge_bytes=0,
                expected=expected,
                idempotency_key=None,
                allowed=self.allowed.only(claimed.link.kinds),
                claimed=claimed,
            )
        except BaseException:
            await ledger.unclaim_link(self.db, upload_id)
            raise
        self.live.add(upload_id)
        return upload, claimed.link

    async def close_link(self, user_id: str, upload_id: UUID, kinds: frozenset[str] | None = None) -> None:
        """Gives up an upload link that has not brought a file, and the quota that it holds.

        With `kinds`, only one that can bring no others. Raises `NotFound`.
        """
        if not await ledger.close_link(self.db, user_id, upload_id, kinds):
            raise NotFound

    async def revoke_links(self, user_id: str, file_id: UUID) -> File:
        """Ends every signed link to a file by renaming its bytes to the next generation. Links made afterwards work.

        A crash leaves either name with its row, and at most another name of the same bytes without one. Raises `NotFound`,
        `Conflict` when the file is replaced at this moment, `Damaged`, `VolumeReadOnly` and the like.
        """
        while True:
            old = await ledger.get_file(self.db, user_id, file_id)
            try:
                file = await self._rename(user_id, old)
            except (Conflict, Damaged):
                now = await ledger.get_file(self.db, user_id, file_id)
                if now.generation != old.generation or now.volume_id == old.volume_id:
                    raise
                continue  # moved to another volume meanwhile
            await self.bury_generation(old)
            return file

    async def _rename(self, user_id: str, old: File) -> File:
        volume = self.vault.volume(old.volume_id)
        volume.check_state()
        path = PurePosixPath(old.file_path)
        for generation in range(old.generation + 1, old.generation + MOST_GENERATIONS_TRIED):
            new_path = f"{path.parent}/{old.id}.{generation}{path.suffix}"
            try:
                await self.vault.run(volume.name_again, old.file_path, new_path)
            except FileExistsError:  # left by a crash
                continue
            except FileNotFoundError as problem:
                raise Damaged from problem
            break
        else:
            raise Conflict
        try:
            return await ledger.rename_generation(self.db, user_id, old, generation, new_path)
        except CommitUnknown:
            raise  # either name may be the row's: both stay, and the audit removes the other
        except CofferError:
            await self.vault.run(volume.remove_stored, [new_path])
            raise

    async def bury_generation(self, old: File) -> None:
        """Removes the bytes of a generation that is over, which the file had as `old`: from its place, and copies on other volumes. What
        cannot be removed now goes later, by its tombstone.
        """
        try:
            await self.bury(await ledger.tombstones_of(self.db, old.id, old.generation))
        except CofferError as problem:
            log.warning("bytes that are no file's any more will go later: %s", problem)

    async def _prepare(
        self,
        user_id: str,
        declared_bytes: int | None,
        likely_bytes: int,
        expected: dict[str, bytes] | None,
        replacing: File | None,
        idempotency_key: str | None,
        kinds: frozenset[str] | None,
    ) -> Upload:
        if declared_bytes is not None and declared_bytes > self.settings.max_file_bytes:
            raise FileTooLarge(self.settings.max_file_bytes)
        placement = await self.placed(user_id)
        await self.vault.check_writable(placement.volume, declared_bytes or 0)
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
            allowed=self.allowed.only(kinds),
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

    async def delete(self, user_id: str, ids: list[UUID], *, permanently: bool = False) -> set[UUID]:
        """Deletes the user's files among `ids` and returns which they were: to the trash where there is one, else for good.

        For good, their quota is free when this returns. Raises `LegalHold`, and for the trash as `trash`.
        """
        if self.settings.trash_days and not permanently:
            return await self.trash(user_id, ids)
        return await self.buried(await ledger.delete_files(self.db, user_id, ids))

    async def delete_from_trash(self, user_id: str, ids: list[UUID]) -> set[UUID]:
        """Deletes for good those of `ids` that are in the user's trash, and returns which they were. Raises `LegalHold`."""
        return await self.buried(await ledger.delete_files(self.db, user_id, ids, from_trash=True))

    async def buried(self, deleted: list[tuple[UUID, Tombstone]]) -> set[UUID]:
        """Has the bytes of files that the ledger has deleted leave their places, at once where the volume allows; else tombstones keep
        them for housekeeping. Returns the files.
        """
        try:
            await self.bury([tombstone for _, tombstone in deleted])
        except CofferError as problem:
            log.warning("bytes of deleted files will go later: %s", problem)
        return {file_id for file_id, _ in deleted}

    async def trash(self, user_id: str, ids: list[UUID], rule_id: int | None = None) -> set[UUID]:
        """Moves the user's files among `ids` to the trash and returns which they were. With `rule_id`, only those the rule is about.

        Their bytes get another name, that of their next generation, so that no link leads to them, neither here nor at an edge. A crash
        leaves either name with its row, and at most another name of the same bytes without one. Raises `LegalHold`, `Conflict` when a file
        is being replaced again and again, `VolumeReadOnly` and the like.
        """
        moved: set[UUID] = set()
        for _ in range(_TRASH_TRIES):  # a file may be replaced, or its links revoked, between our look at it and the move
            files = await ledger.get_files(self.db, user_id, [each for each in ids if each not in moved])
            if not files:
                return moved
            moved |= await self._trash(user_id, list(files.values()), rule_id)
            if rule_id is not None or files.keys() <= moved:
                return moved
        raise Conflict

    async def _trash(self, user_id: str, files: list[File], rule_id: int | None) -> set[UUID]:
        by_volume: dict[UUID, list[File]] = {}
        for file in files:
            by_volume.setdefault(file.volume_id, []).append(file)
        moved: set[UUID] = set()
        for volume_id, group in by_volume.items():
            volume = self.vault.volume(volume_id)
            volume.check_state()
            wanted = await self._names_in_trash(volume, group)
            try:
                done = await ledger.trash_files(self.db, user_id, volume_id, wanted, rule_id)
            except CommitUnknown:
                raise  # either name may be the row's: both stay, and the audit removes the other
            except CofferError:
                await self._unname(volume, wanted)
                raise
            await self._unname(volume, [each for each in wanted if each.id not in done])
            await self.buried([(file_id, tombstone) for file_id, tombstone in done.items() if tombstone is not None])
            moved |= done.keys()
        return moved

    async def _names_in_trash(self, volume: Volume, files: list[File]) -> list[MovedToTrash]:
        """Gives the files' bytes the names that they are to have in the trash. What has no bytes keeps its name."""
        named: list[MovedToTrash] = []
        left = files
        for step in range(1, MOST_GENERATIONS_TRIED):
            paths = [PurePosixPath(file.file_path) for file in left]
            wanted = [f"{path.parent}/{file.id}.{file.generation + step}{path.suffix}" for file, path in zip(left, paths, strict=True)]
            outcomes = await self.vault.run(
                volume.name_all_again, [(file.file_path, new_path) for file, new_path in zip(left, wanted, strict=True)]
            )
            again = []
            for file, new_path, outcome in zip(left, wanted, outcomes, strict=True):
                match outcome:
                    case "named":
                        generation = file.generation + step
                        named.append(MovedToTrash(id=file.id, old_generation=file.generation, generation=generation, file_path=new_path))
                    case "missing":
                        kept = file.generation
                        named.append(MovedToTrash(id=file.id, old_generation=kept, generation=kept, file_path=file.file_path))
                    case "exists":  # left by a crash
                        again.append(file)
            if not again:
                return named
            left = again
        await self._unname(volume, named)
        raise Conflict

    async def _unname(self, volume: Volume, named: list[MovedToTrash]) -> None:
        """Takes the new names away again."""
        await self.vault.run(volume.remove_stored, [each.file_path for each in named if each.generation != each.old_generation])

    async def bury(self, tombstones: list[Tombstone]) -> None:
        """Removes the bytes of deleted rows. What it raises on leaves them for the next housekeeping."""
        await bury(self.db, self.vault, tombstones)

    async def erase_user(self, user_id: str, unseen: ledger.Unseen | None = None) -> None:
        """Erases every byte and row of a user. From its first step on the user takes no new bytes.

        Interrupted anywhere, housekeeping goes on where it stopped. Bytes that a backup under way wants are withheld, and go when it
        is over. With `unseen`, only a user of whom that holds still. Raises `NotFound` and `LegalHold`.
        """
        user = await ledger.begin_erasing(self.db, user_id, unseen)
        while tombstones := await ledger.erase_batch(self.db, user_id, limit=_ERASE_BATCH_FILES):
            await self.bury(tombstones)

        async def remove_bytes() -> None:
            for volume_id, name in await ledger.list_resumable_bytes(self.db, user_id):
                await self.vault.run(self.vault.volume(volume_id).remove_incoming, [name])
            if await ledger.unlinks_are_held(self.db):  # what another process has just deleted may still be in its place
                await self.bury(await ledger.tombstones_below(self.db, f"{USERS}/{user_directory(user_id)}/"))
            # On other volumes only what was moved away, or came there while the user was being moved, may have left directories.
            others = [volume for volume in self.vault.volumes if volume.id != user.volume_id and volume.state in ("open", "full")]
            for volume in others if user.volume_id is None else [*others, self.vault.volume(user.volume_id)]:
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
