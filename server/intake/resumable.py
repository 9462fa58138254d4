"""Uploads that come in several requests: what every door to them shares (tus is one).

What is on disk counts. A writer takes the upload by a lease, goes on where the synced file ends, and lets go when it is done, cut off, or
somebody else asks for it. Three things keep two writers from ever writing to one file: the lease, which a writer that cannot renew it
does not outlive; the fence that its statements name; and the kernel's lock on the file. A file that a hung process keeps locked is copied.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import msgspec
from uuid_utils.compat import uuid7

from server import ledger
from server.errors import (
    CofferError,
    Conflict,
    FileTooLarge,
    Infected,
    InvalidRequest,
    KindRequired,
    LinkExpired,
    LinkUsed,
    NotFound,
    NotScannable,
    OffsetMismatch,
    TypeMismatch,
    UnsupportedType,
    UploadExpired,
    UploadLocked,
    VolumeReadOnly,
)
from server.intake.upload import Details, Upload
from server.kinds import HEAD_BYTES
from server.ledger.models import ClaimedLink, File, ResumableUpload, UploadLink
from server.vault import Volume
from server.vault.resumed import Hashed, InUse, ResumedFile

if TYPE_CHECKING:
    from server.intake.service import Intake, Placement
    from server.ledger import Notices

LEASE_SECONDS = 4.0
"""How long a dead writer keeps an upload: who resumes it is to have it within 5 s."""
_RENEW_SECONDS = 1.0
_MARGIN_SECONDS = 1.0  # by which a writer stops before its lease ends
_TAKEOVER_SECONDS = 8.0
_ASK_SECONDS = 0.5
_MOST_HASHED = 1_000  # uploads whose SHA-256 so far a process remembers: some 400 bytes each

_REFUSALS = (UnsupportedType, TypeMismatch, KindRequired, Infected, NotScannable, FileTooLarge)
"""What more bytes, or the same ones once more, would not mend: the upload ends."""


log = logging.getLogger("coffer.intake")


class Resumable(msgspec.Struct, frozen=True, kw_only=True):
    """An upload as its client sees it. `file` once it was published, `is_whole` also when it is a whole part of another."""

    id: UUID
    offset_bytes: int
    length_bytes: int | None
    upload_metadata: str
    expires_at: datetime
    is_partial: bool = False
    parts: list[UUID] | None = None
    is_finished: bool = False


class ResumableUploads:
    """One per process; lives in one event loop. Doors authorise first, then call it."""

    def __init__(self, intake: "Intake", notices: "Notices", stopping: asyncio.Event) -> None:
        """At `stopping` all writers let go, and their clients go on with the next server."""
        self._intake = intake
        self._settings = intake.settings
        self._db = intake.db
        self._notices = notices
        self._stopping = stopping
        self._hashed: OrderedDict[UUID, Hashed] = OrderedDict()
        self._holds: set[Hold] = set()
        self._renewing: asyncio.Task[None] | None = None

    # Beginning and ending

    async def create(
        self,
        user_id: str,
        *,
        length_bytes: int | None,
        upload_metadata: str,
        details: Details,
        kinds: frozenset[str] | None,
        is_partial: bool = False,
    ) -> Resumable:
        """A new upload, whose quota is held from now on; of one whose length is not declared, as it grows.

        Raises `FileTooLarge`, `QuotaExceeded`, `TooManyUploads`, `VolumeFull` and the like, `UserErasing`, `DatabaseUnavailable`.
        """
        self._check_length(length_bytes)
        placement = await self._intake.placed(user_id)
        await self._intake.vault.check_writable(placement.volume, length_bytes or 0)
        upload_id = uuid7()
        try:
            expires_at = await ledger.create_resumable_upload(
                self._db,
                upload_id=upload_id,
                user_id=user_id,
                volume_id=placement.volume.id,
                length_bytes=length_bytes,
                reserved_bytes=length_bytes or 0,
                upload_metadata=upload_metadata,
                details=_encoded(details),
                kinds=kinds,
                is_partial=is_partial,
                lifetime_seconds=self._settings.tus_lifetime_seconds,
                most=self._settings.tus_uploads_per_user,
            )
        except NotFound as problem:  # erased since we looked
            self._intake.forget(user_id)
            raise Conflict from problem
        return Resumable(
            id=upload_id,
            offset_bytes=0,
            length_bytes=length_bytes,
            upload_metadata=upload_metadata,
            expires_at=expires_at,
            is_partial=is_partial,
        )

    async def create_linked(self, upload_id: UUID, *, length_bytes: int | None, upload_metadata: str, details: Details) -> Resumable:
        """The one upload of an upload link. What the link says goes before what the client says.

        Raises `LinkUsed`, `LinkExpired`, and as `create`.
        """
        claimed = await ledger.claim_link(self._db, upload_id, self._settings.tus_lifetime_seconds, self._settings.uploads_at_once_per_user)
        if claimed is None:
            if await ledger.live_uploads(self._db, [upload_id]) or await ledger.find_file_anywhere(self._db, upload_id):
                raise LinkUsed
            raise LinkExpired
        try:
            if length_bytes is not None and length_bytes > claimed.reserved_bytes:
                raise FileTooLarge(claimed.reserved_bytes)
            link = claimed.link
            expires_at = await ledger.create_linked_upload(
                self._db,
                upload_id=upload_id,
                length_bytes=length_bytes,
                upload_metadata=upload_metadata,
                details=_encoded(
                    Details(
                        file_name=link.file_name or details.file_name,
                        kind=link.kind,
                        package_name=link.package_name,
                        tags=link.tags,
                        metadata=link.metadata,
                    )
                ),
                link=link,
                lifetime_seconds=self._settings.tus_lifetime_seconds,
                incoming_name=uuid7(),
            )
        except BaseException:
            await ledger.unclaim_link(self._db, upload_id)
            raise
        return Resumable(id=upload_id, offset_bytes=0, length_bytes=length_bytes, upload_metadata=upload_metadata, expires_at=expires_at)

    async def join(
        self, user_id: str, parts: Sequence[UUID], *, upload_metadata: str, details: Details, kinds: frozenset[str] | None
    ) -> Resumable:
        """Publishes a file made of whole partial uploads, in this order. Asked again with the same ones, it is the same file.

        While it is made the parts' bytes are on the volume twice. Raises `InvalidRequest` when a part is missing, not whole, or is being
        written, `FileTooLarge`, and as `Writer.finish_upload`.
        """
        upload_id = uuid7()
        joined = await ledger.find_joined_upload(self._db, user_id, parts)
        if joined is None:
            self._check_length(await ledger.measure_parts(self._db, user_id, parts))
            expires_at = await ledger.join_resumable_uploads(
                self._db,
                upload_id=upload_id,
                user_id=user_id,
                parts=parts,
                upload_metadata=upload_metadata,
                details=_encoded(details),
                kinds=kinds,
                lifetime_seconds=self._settings.tus_lifetime_seconds,
            )
            # The same request may have come twice, and the other one was first.
            if expires_at is None and (joined := await ledger.find_joined_upload(self._db, user_id, parts)) is None:
                raise InvalidRequest("Upload-Concat", "must name whole partial uploads of this user, each once")
        return await self._brought_on(user_id, upload_id if joined is None else joined.id)

    async def end(self, user_id: str, upload_id: UUID) -> None:
        """Gives up an upload, with its bytes and its quota; a finished one is only forgotten, its file stays.

        Raises `Conflict` for a part of another one, which is ended with that, and as `look`.
        """
        hold = await self._claim(user_id, upload_id, None)
        if isinstance(hold, ledger.ResumableState):
            if not hold.has_file:
                raise Conflict
            await ledger.forget_published_upload(self._db, user_id, upload_id)
            return
        if not (ended := await ledger.end_resumable_upload(self._db, hold.upload)):
            raise UploadLocked
        self._hashed.pop(hold.upload.incoming_name, None)
        await self.remove(ended)

    async def user_of_link(self, upload_id: UUID) -> str:
        """Whose the upload of an upload link is. Raises `LinkExpired` when the link's reservation and its upload are gone."""
        user_id = await ledger.user_of_upload_link(self._db, upload_id)
        if user_id is None:
            raise LinkExpired
        return user_id

    # Going on

    async def look(self, user_id: str, upload_id: UUID) -> Resumable:
        """How far an upload is. Whoever was writing lets go, so that the offset told stays right. One that is whole is published now, if
        it has not been: its client takes it for done. Of one that is being made of its parts it tells how far that is.

        Raises `NotFound`, `UploadExpired`, `UploadLocked`, and as `Writer.finish_upload`.
        """
        state = await self._state(user_id, upload_id)
        upload = state.upload
        is_whole = upload.offset_bytes == upload.length_bytes and not upload.is_partial
        is_to_be_left = state.is_written if upload.parts is not None else not state.is_held and not is_whole
        if state.is_over or is_to_be_left:
            return _seen(state)
        return await self._brought_on(user_id, upload_id)

    async def _brought_on(self, user_id: str, upload_id: UUID) -> Resumable:
        """Takes the upload from whoever has it, and publishes it if it is whole."""
        try:
            async with self.writing(user_id, upload_id, is_fed=False) as writer:
                if writer.is_whole and not writer.upload.is_partial:
                    await writer.finish_upload()
        except OffsetMismatch:  # it is over: published by the one who had it
            return _seen(await self._state(user_id, upload_id))
        return writer.seen

    @asynccontextmanager
    async def writing(self, user_id: str, upload_id: UUID, *, is_checked: bool = False, is_fed: bool = True) -> AsyncIterator["Writer"]:
        """Takes an upload to write to it, from whoever has it; at the end what has come is synced, recorded, and let go of.

        With `is_checked`, what comes does not count before `Writer.keep`, not even after a crash. Without `is_fed` nothing more will come.
        Raises `OffsetMismatch` for one that is over, `NotFound`, `UploadExpired`, `UploadLocked`, what opening a file on a volume does,
        and what keeps that which has come from being recorded.
        """
        hold = await self._claim(user_id, upload_id, None if is_checked else _boot_id())
        if isinstance(hold, ledger.ResumableState):
            raise OffsetMismatch(hold.upload.length_bytes or 0)
        self._holds.add(hold)
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        try:
            with self._notices.only_heard(f"wanted/{upload_id}/{hold.upload.fence}") as wanted:
                watching = asyncio.create_task(_when_any(hold.let_go.set, wanted, self._stopping))
                try:
                    writer = await self._writer(hold, is_checked=is_checked, is_fed=is_fed)
                    try:
                        if hold.upload.parts is not None:
                            await writer.take_parts(await self._parts(hold.upload))
                        yield writer
                    except BaseException:
                        await _finished(self._let_go_quietly(writer))
                        raise
                    await _finished(writer.let_go())
                finally:
                    watching.cancel()
        finally:
            self._holds.discard(hold)

    async def _let_go_quietly(self, writer: "Writer") -> None:
        try:
            await writer.let_go()
        except (CofferError, OSError) as problem:
            log.warning("could not record how far an upload is: %s", problem, extra={"upload_id": str(writer.id)})

    async def _writer(self, hold: "Hold", *, is_checked: bool, is_fed: bool) -> "Writer":
        upload = hold.upload
        try:
            placement = await self._intake.placed(upload.user_id)
            volume = self._intake.vault.volume(upload.volume_id)
            needed_bytes = max(0, (upload.length_bytes or 0) - upload.offset_bytes) if is_fed else 0
            await self._intake.vault.check_writable(volume, needed_bytes)
            keep_bytes = upload.offset_bytes if hold.boot_id_before != _boot_id() else None
            file, head, tail = await self._intake.vault.run(self._open, volume, upload, keep_bytes)
            try:
                return Writer(self, self._intake, placement, hold, file, head, tail, is_checked=is_checked)
            except BaseException:
                file.close()
                raise
        except BaseException as problem:
            with suppress(CofferError):  # then the lease runs out
                await ledger.leave_resumable_upload(self._db, upload, is_doubtful=isinstance(problem, VolumeReadOnly))
            raise

    async def _parts(self, upload: ResumableUpload) -> list[ResumableUpload]:
        return [(await ledger.get_resumable_upload(self._db, upload.user_id, part)).upload for part in upload.parts or ()]

    async def _state(self, user_id: str, upload_id: UUID) -> ledger.ResumableState:
        state = await ledger.get_resumable_upload(self._db, user_id, upload_id)
        if not state.has_file and (state.is_expired or not state.has_reservation):
            raise NotFound if state.upload.joined_as is not None else UploadExpired
        return state

    async def _claim(self, user_id: str, upload_id: UUID, boot_id: str | None) -> "Hold | ledger.ResumableState":
        """Takes the lease, asking whoever has it to let go. Of an upload that is over, returns what has become of it.

        Raises `NotFound`, `UploadExpired`, and `UploadLocked` when nobody lets go for too long.
        """
        holder = uuid7()
        give_up_at = time.monotonic() + _TAKEOVER_SECONDS
        with self._notices.of(f"released/{upload_id}") as released:
            while True:
                released.clear()
                began = time.monotonic()
                claimed = await ledger.claim_resumable_upload(self._db, user_id, upload_id, holder, LEASE_SECONDS, boot_id)
                if claimed is not None:
                    return Hold(claimed, began)
                state = await self._state(user_id, upload_id)
                if state.is_over:
                    return state
                if time.monotonic() > give_up_at:
                    raise UploadLocked
                await ledger.want_resumable_upload(self._db, upload_id)
                with suppress(TimeoutError):
                    await asyncio.wait_for(released.wait(), _ASK_SECONDS)

    def _open(self, volume: Volume, upload: ResumableUpload, keep_bytes: int | None) -> tuple[ResumedFile, bytes, bytes]:
        """In a thread: the file and its ends, or a copy of it where a process that does not answer still has it open."""
        hashed = self._hashed.pop(upload.incoming_name, None) or Hashed()
        try:
            file = ResumedFile(volume, upload.incoming_name, keep_bytes, hashed, upload.offset_bytes)
        except InUse:
            file = ResumedFile(volume, uuid7(), 0, Hashed())
            try:
                file.begin_with(upload.incoming_name, upload.offset_bytes, keep_bytes)
            except BaseException:
                file.discard()
                raise
        if file.size_bytes < upload.offset_bytes:
            # Under another name, as what other processes remember of its hash is wrong from here on.
            log.error("synced bytes of an upload are gone; it begins anew", extra={"upload_id": str(upload.id)})
            file.discard()
            file = ResumedFile(volume, uuid7(), 0, Hashed())
        return file, *file.ends()

    async def _renew(self) -> None:
        """Keeps the leases of this process, as long as it has any."""
        try:
            while self._holds:
                await asyncio.sleep(_RENEW_SECONDS)
                holds = {hold.key: hold for hold in self._holds}
                began = time.monotonic()
                try:
                    kept = await ledger.renew_resumable_uploads(self._db, holds.keys(), LEASE_SECONDS)
                except CofferError as problem:
                    log.warning("could not renew the leases of %d uploads: %s", len(holds), problem)
                    kept = {key for key, hold in holds.items() if not hold.is_over}
                else:
                    for key in kept:
                        holds[key].renewed(began)
                for key in holds.keys() - kept:
                    holds[key].let_go.set()
        finally:
            self._renewing = None

    async def still_holds(self, hold: "Hold") -> bool:
        """Whether nobody else has, or may soon have, the upload. A lease that ran out while this process or the database stood still is
        taken up again if nobody has come in between."""
        if hold.is_over and not hold.let_go.is_set():
            began = time.monotonic()
            with suppress(CofferError):
                if await ledger.renew_resumable_uploads(self._db, [hold.key], LEASE_SECONDS):
                    hold.renewed(began)
        return not hold.is_over

    async def remove(self, names: Sequence[tuple[UUID, UUID]]) -> None:
        """Removes bytes whose row is gone, by volume and name. What cannot be removed now is left to housekeeping."""
        for volume_id, name in names:
            try:
                await self._intake.vault.run(self._intake.vault.volume(volume_id).remove_incoming, [name])
            except (CofferError, OSError) as problem:
                log.warning("bytes of an upload that is over will go later: %s", problem)

    def remember(self, name: UUID, hashed: Hashed) -> None:
        """Keeps what is known of a file's SHA-256 for its next request."""
        self._hashed[name] = hashed
        while len(self._hashed) > _MOST_HASHED:
            self._hashed.popitem(last=False)

    def _check_length(self, length_bytes: int | None) -> None:
        if length_bytes is not None and length_bytes > self._settings.max_file_bytes:
            raise FileTooLarge(self._settings.max_file_bytes)


class Hold:
    """A lease on an upload, from its claim on. `let_go` is set when somebody else wants it, when it is lost, and when the server stops."""

    def __init__(self, claimed: ledger.ClaimedUpload, began: float) -> None:
        """`began` is `time.monotonic()` before the lease was asked for."""
        self.upload = claimed.upload
        self.reserved_bytes = claimed.reserved_bytes
        self.boot_id_before = claimed.boot_id_before
        self.let_go = asyncio.Event()
        self.renewed(began)

    @property
    def key(self) -> tuple[UUID, int]:
        """What its statements name."""
        return self.upload.id, self.upload.fence

    @property
    def is_over(self) -> bool:
        """Whether somebody else may have the upload soon: nothing must be written any more."""
        return time.monotonic() > self._until

    def renewed(self, began: float) -> None:
        """It holds from `began` on once more."""
        self._until = began + LEASE_SECONDS - _MARGIN_SECONDS


class Writer(Upload):
    """One request's hold on an upload. Made by `ResumableUploads.writing`, which also lets go of it."""

    def __init__(
        self,
        uploads: ResumableUploads,
        intake: "Intake",
        placement: "Placement",
        hold: Hold,
        file: ResumedFile,
        head: bytes,
        tail: bytes,
        *,
        is_checked: bool,
    ) -> None:
        """`head` and `tail` are the ends of the file."""
        upload = hold.upload
        link = None if upload.link is None else msgspec.json.decode(upload.link, type=UploadLink)
        super().__init__(
            intake,
            upload.id,
            upload.user_id,
            placement._replace(volume=intake.vault.volume(upload.volume_id)),
            declared_bytes=upload.length_bytes,
            likely_bytes=0,
            free_of_charge_bytes=0,
            expected={},
            idempotency_key=None,
            allowed=intake.allowed.only(None if upload.kinds is None else frozenset(upload.kinds)),
            claimed=None if link is None else ClaimedLink(user_id=upload.user_id, reserved_bytes=hold.reserved_bytes, link=link),
        )
        self.upload = upload
        self._fence = upload.fence
        self._hold = hold
        self._uploads = uploads
        self._file = self._resumed = file
        self._stop_buffering()
        self._head = head
        self._recent.append(tail)
        self._recent_bytes = len(tail)
        self.received_bytes = self._safe_bytes = file.size_bytes
        self._safe_hashed = file.hashed
        self._is_checked = is_checked
        self._is_judged = False
        self._reserved_bytes = hold.reserved_bytes
        self._max_bytes = self._max_bytes if upload.length_bytes is None else upload.length_bytes
        self._keep_promise(min(self._promised_bytes, file.size_bytes))
        self._expires_at = upload.expires_at
        self._is_closed = self._is_forgotten = False
        self.file: File | None = None  # once it was published

    @property
    def is_whole(self) -> bool:
        """Whether all bytes have come."""
        return self.received_bytes == self._declared_bytes

    @property
    def seen(self) -> Resumable:
        """The upload as its client sees it: before the writer lets go, with the bytes that came; afterwards, with those that are safe."""
        return _told(
            msgspec.structs.replace(
                self.upload,
                length_bytes=self._declared_bytes,
                offset_bytes=self._safe_bytes if self._is_closed else self.received_bytes,
                expires_at=self._expires_at,
            ),
            is_finished=self.file is not None,
        )

    # Writing

    async def take(self, body: AsyncIterator[bytes]) -> None:
        """Writes what comes. Raises `UploadLocked` when somebody else takes the upload over, and as `write`; what has come stays."""
        async with self._until_wanted():
            async for chunk in body:
                await self.write(chunk)

    async def take_parts(self, parts: Sequence[ResumableUpload]) -> None:
        """Writes the bytes of these uploads, as far as they are not there yet. Raises `Damaged`, and as `take`."""
        begins_at = 0
        async with self._until_wanted():
            for part in parts:
                volume = self._intake.vault.volume(part.volume_id)
                at = max(0, self.received_bytes - begins_at)
                pieces = volume.pieces_of_incoming(part.incoming_name, part.offset_bytes, at=at)
                while at < part.offset_bytes and (piece := await self._in_thread(next, pieces, b"")):
                    await self.write(piece)
                begins_at += part.offset_bytes

    @asynccontextmanager
    async def _until_wanted(self) -> AsyncIterator[None]:
        """Ends what is done within at once when the upload is to be let go of, and raises `UploadLocked`."""
        task = asyncio.current_task()
        if self._hold.let_go.is_set() or task is None:
            raise UploadLocked
        is_cancelled = False

        def cancel() -> None:
            nonlocal is_cancelled
            is_cancelled = True
            task.cancel()

        watching = asyncio.create_task(_when_any(cancel, self._hold.let_go))
        try:
            yield
        except asyncio.CancelledError:
            # Ours, unless somebody else has cancelled the request as well: then that counts.
            if not is_cancelled or task.uncancel() > 0:
                raise
            raise UploadLocked from None
        finally:
            watching.cancel()

    async def write(self, chunk: bytes | memoryview) -> None:
        """As `Upload.write`; the type is judged as soon as the first bytes are there. Raises `UploadLocked` once the lease was lost."""
        if not await self._uploads.still_holds(self._hold):
            raise UploadLocked
        await super().write(chunk)
        if not self._is_judged and not self.upload.is_partial and len(self._head) >= HEAD_BYTES:
            self._is_judged = True
            try:
                self._resolve(_decoded(self.upload.details).kind)
            except (KindRequired, TypeMismatch):
                pass  # the file's end may show another type
            except UnsupportedType:
                await self.forget()
                raise
        if not self._is_checked and self.received_bytes - self._safe_bytes > self._intake.settings.tus_sync_bytes:
            await self.keep()

    async def declare_length(self, length_bytes: int) -> None:
        """Says how long the upload is going to be, and holds quota for it.

        Raises `InvalidRequest` when another length was declared or more has come, `FileTooLarge` and `QuotaExceeded`.
        """
        if self._declared_bytes == length_bytes:
            return
        if self._declared_bytes is not None:
            raise InvalidRequest("Upload-Length", "was declared already, and differs")
        if length_bytes < self.received_bytes:
            raise InvalidRequest("Upload-Length", "is less than what has come")
        if length_bytes > self._max_bytes:
            raise FileTooLarge(self._max_bytes)
        if self._claimed is None:
            await self.reserve(length_bytes)
        if not await ledger.declare_resumable_length(self._intake.db, self.upload, length_bytes):
            raise UploadLocked
        self._declared_bytes = self._max_bytes = length_bytes

    async def keep(self) -> None:
        """Syncs all that has come, and records it: it will not be asked for again. Raises `UploadLocked` when the upload is another's."""
        await self._flush()
        size_bytes = await self._in_thread(self._resumed.sync)
        self._safe_hashed = self._resumed.hashed
        await self._checkpoint(size_bytes, release=False)

    async def take_back(self) -> None:
        """Cuts off what has come since the last `keep`."""
        await self._settle_thread()
        self._chunks, self._chunks_bytes = [], 0
        if self._resumed.size_bytes != self._safe_bytes:
            await self._in_thread(self._resumed.cut, self._safe_bytes, self._safe_hashed.copy())
        self.received_bytes = self._safe_bytes

    async def finish_upload(self) -> File:
        """Publishes a whole upload, by the same steps as any. What is refused ends it, as more bytes would not mend it; after any other
        failure it stays whole, and is published when its client looks at it again.

        Until the row is committed the bytes keep their name in incoming/, whoever has linked them: a crash or a lost answer in between
        loses nothing, and a name that has got no row is what the next try finds.
        """
        await self.keep()
        while not await self._in_thread(self._resumed.catch_up):
            pass
        try:
            self.file = await self.finish(_decoded(self.upload.details))
        except _REFUSALS:
            await self.forget()
            raise
        left = [(self.upload.volume_id, self._resumed.name)]
        with suppress(CofferError):  # housekeeping does it
            left += await ledger.end_parts(self._intake.db, self.upload.id)
        await self._uploads.remove(left)
        return self.file

    async def forget(self) -> None:
        """Ends the upload: bytes, quota and all."""
        self._is_closed = self._is_forgotten = True
        await self._settle_thread()
        with suppress(CofferError):  # its lease runs out, and later its life
            await self._uploads.remove(await ledger.end_resumable_upload(self._intake.db, self.upload))
        self._reserved_bytes = None  # given back with the row
        await self.abort()

    async def let_go(self) -> None:
        """Syncs and records what has come, unless the upload is over or another's. Raises what keeps it from that.

        What is not recorded is not lost for that: whoever comes next finds it in the file.
        """
        try:
            if self._is_forgotten:
                return
            await self._settle_thread()
            problem: CofferError | None = None
            if not self._resumed.is_closed:
                problem = await self._keep_what_counts() if await self._uploads.still_holds(self._hold) else UploadLocked()
            self._is_closed = True
            is_known = self._resumed.size_bytes == self._safe_bytes
            # Before anybody is told that the upload is free: who finds the file locked makes a copy of it.
            self._resumed.close()
            if is_known:
                await self._checkpoint(self._safe_bytes, release=True)
                if self.file is None:
                    self._uploads.remember(self._resumed.name, self._safe_hashed)
            else:
                await ledger.leave_resumable_upload(self._intake.db, self.upload, is_doubtful=self._resumed.is_suspect)
            if problem is not None:
                raise problem
        except (CofferError, OSError):
            if self.file is None:  # else the upload is over, and what is left goes by itself
                raise
        finally:
            self._is_closed = True
            self._resumed.close()
            if not self._over:
                self._leave()

    async def _keep_what_counts(self) -> CofferError | None:
        """Has the file end where the client will be told that it does. Returns why a part of what came is not in it."""
        try:
            if self._is_checked:
                await self.take_back()
                return None
            problem = None
            try:
                await self._flush()
            except CofferError as kept_out:
                problem = kept_out
            size_bytes = await self._in_thread(self._resumed.sync)
        except CofferError as failed:
            return failed
        self._safe_bytes, self._safe_hashed = size_bytes, self._resumed.hashed
        return problem

    async def _checkpoint(self, offset_bytes: int, *, release: bool) -> None:
        expires_at = await ledger.checkpoint_resumable_upload(
            self._intake.db,
            self.upload,
            offset_bytes,
            self._resumed.name,
            self._intake.settings.tus_lifetime_seconds,
            release=release,
        )
        if expires_at is None:
            raise UploadLocked
        self._expires_at, self._safe_bytes = expires_at, offset_bytes

    async def _settle_thread(self) -> None:
        """Waits for the thread that may still be writing: a request that was cut off leaves it at work."""
        if self._working is not None:
            await asyncio.wait([self._working])
            self._working.cancelled() or self._working.exception()


def _seen(state: ledger.ResumableState) -> Resumable:
    upload = state.upload
    if state.is_over:
        upload = msgspec.structs.replace(upload, offset_bytes=upload.length_bytes or 0)
    return _told(upload, is_finished=state.has_file)


def _told(upload: ResumableUpload, *, is_finished: bool) -> Resumable:
    return Resumable(
        id=upload.id,
        offset_bytes=upload.offset_bytes,
        length_bytes=upload.length_bytes,
        upload_metadata=upload.upload_metadata,
        expires_at=upload.expires_at,
        is_partial=upload.is_partial,
        parts=upload.parts,
        is_finished=is_finished,
    )


async def _when_any(then: Callable[[], object], *events: asyncio.Event) -> None:
    """Calls `then` once one of the events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        then()
    finally:
        for each in waiting:
            each.cancel()


async def _finished(work: Coroutine[Any, Any, None]) -> None:
    """Shielded: a request that is cancelled must not leave its bytes unrecorded."""
    await asyncio.shield(asyncio.create_task(work))


def _encoded(details: Details) -> str:
    return msgspec.json.encode(details).decode()


def _decoded(details: str) -> Details:
    return msgspec.json.decode(details, type=Details)


@cache
def _boot_id() -> str:
    """Names this boot of this machine (random(4)): what was written since is in the file, synced or not.

    Where nobody may know it, it names this process instead, and no more is believed to be in the file than was recorded.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid4())
