"""One upload, from its first byte to its committed row."""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, cast
from uuid import UUID

from uuid_utils.compat import uuid7

from server import ledger
from server.errors import (
    CofferError,
    CommitUnknown,
    Conflict,
    DatabaseUnavailable,
    FileTooLarge,
    IncompleteBody,
    Infected,
    KindRequired,
    NotFound,
    QuotaExceeded,
    TypeMismatch,
    UnsupportedType,
)
from server.intake.scanner import Scanner
from server.kinds import HEAD_BYTES, MP4, TAIL_BYTES, Allowed, FileType, detect, resolve
from server.ledger.generation import mark_content
from server.ledger.models import ClaimedLink, File, NewFile, ReplacedContent
from server.previews.statements import NAME as STATEMENTS_NAME
from server.vault import IncomingFile
from server.vault.layout import previews_directory, stored_path

if TYPE_CHECKING:
    from server.intake.service import Intake, Placement

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

BATCH_BYTES = 256 * 1024  # per thread hop; less costs more hops, more leaves the processor's cache (decisions/0002)
MOST_GENERATIONS_TRIED = 1_000  # names that crashed replacements may have left taken

log = logging.getLogger("coffer.intake")


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What the client says about a file, already cleaned (`server/fields.py`). No name: the file's id and extension serve."""

    file_name: str | None = None
    kind: str | None = None
    package_name: str | None = None
    tags: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


class Upload:
    """An upload under way. Made by `Intake.begin`; then `write` per chunk, and `finish` or `replace`; `abort` on any failure.

    Making one raises `TooManyUploads` when the user has as many.
    Memory is bounded: up to `buffered_body_bytes` wait in memory and go to disk in one hop at the end, charged at the commit
    alone. Anything longer, or of a length not declared and grown past that, holds a reservation and streams to the volume, at
    most one batch in memory. After a crash its reservation expires and its bytes in incoming/ are removed by housekeeping.
    """

    def __init__(
        self,
        intake: "Intake",
        upload_id: UUID,
        user_id: str,
        placement: "Placement",
        *,
        declared_bytes: int | None,
        likely_bytes: int,
        free_of_charge_bytes: int,
        expected: dict[str, bytes],
        idempotency_key: str | None,
        allowed: Allowed,
        claimed: ClaimedLink | None = None,
    ) -> None:
        self._load = intake.enter(user_id)
        self.id = upload_id
        self.user_id = user_id
        self.received_bytes = 0
        self._intake = intake
        self._volume = placement.volume
        self._user_since = placement.since
        self._declared_bytes = declared_bytes
        self._likely_bytes = likely_bytes
        self._free_of_charge_bytes = free_of_charge_bytes
        self._expected = expected
        self._idempotency_key = idempotency_key
        self._allowed = allowed
        self._claimed = claimed
        self._max_bytes = intake.settings.max_file_bytes if claimed is None else claimed.reserved_bytes
        self._reserved_bytes: int | None = None if claimed is None else claimed.reserved_bytes
        self._promised_bytes = declared_bytes or 0
        self._volume.promised_bytes += self._promised_bytes
        self._chunks: list[bytes | memoryview] = []
        self._chunks_bytes = 0
        self._head = b""
        self._recent: deque[bytes | memoryview] = deque()  # the last chunks, at least TAIL_BYTES of them where there are as many
        self._recent_bytes = 0
        self._buffering = True
        self._file: IncomingFile | None = None
        self._working: asyncio.Future[Any] | None = None  # the one thread that may be using the file
        self._landed_path: str | None = None
        self._fence: int | None = None  # of a resumable upload: only its writer publishes it
        self._over = False

    # Reserving

    async def reserve(self, size_bytes: int) -> None:
        """Holds quota for exactly that many bytes of content. Raises `QuotaExceeded` with nothing changed, and as `open_reservation`."""
        charge = max(0, size_bytes - self._free_of_charge_bytes)
        try:
            if self._reserved_bytes is None:
                await ledger.open_reservation(
                    self._intake.db,
                    upload_id=self.id,
                    user_id=self.user_id,
                    volume_id=self._volume.id,
                    reserved_bytes=charge,
                    idempotency_key=self._idempotency_key,
                    lease_seconds=self._intake.settings.reservation_lease_seconds,
                    most=self._intake.settings.uploads_at_once_per_user,
                )
                self._intake.live.add(self.id)
            elif charge != self._reserved_bytes:
                await ledger.resize_reservation(self._intake.db, self.id, charge)
        except NotFound as problem:  # the user was erased since we looked, or the lease ran out: what we remember is stale
            self._intake.forget(self.user_id)
            raise Conflict from problem
        except CommitUnknown as problem:
            self._reserved_bytes = self._reserved_bytes or 0  # it may exist: `abort` releases it
            raise DatabaseUnavailable from problem
        self._reserved_bytes = charge

    async def _reserve_for_received(self) -> None:
        """Grows in steps, so that an upload of unknown length asks the database once per step; near the limit, by what is needed."""
        covered = -1 if self._reserved_bytes is None else self._reserved_bytes + self._free_of_charge_bytes
        if self.received_bytes <= covered:
            return
        if self._declared_bytes is not None:
            await self.reserve(self._declared_bytes)
            return
        step = self._likely_bytes if covered < 0 else self.received_bytes + self._intake.settings.reservation_step_bytes
        try:
            await self.reserve(max(self.received_bytes, min(step, self._intake.settings.max_file_bytes)))
        except QuotaExceeded:
            await self.reserve(self.received_bytes)

    # Receiving

    async def write(self, chunk: bytes | memoryview) -> None:
        """Takes the next bytes. Raises `FileTooLarge`, `QuotaExceeded`, `UnsupportedType`, `VolumeFull` and the like."""
        if not chunk:
            return
        if self.received_bytes + len(chunk) > self._max_bytes:  # and what is not taken must not be counted: a reservation grows by it
            raise FileTooLarge(self._max_bytes)
        self.received_bytes += len(chunk)
        if len(self._head) < HEAD_BYTES:
            self._head += chunk[: HEAD_BYTES - len(self._head)]
        self._recent.append(chunk)
        self._recent_bytes += len(chunk)
        while self._recent_bytes - len(self._recent[0]) >= TAIL_BYTES:
            self._recent_bytes -= len(self._recent.popleft())
        self._chunks.append(chunk)
        self._chunks_bytes += len(chunk)
        if self._buffering:
            has_room = self._intake.buffer(self._load, len(chunk))
            if self.received_bytes > self._intake.settings.buffered_body_bytes or not has_room:
                await self._spill()
        elif self._chunks_bytes >= BATCH_BYTES:
            await self._flush()

    async def pause(self) -> None:
        """All bytes have come, but other files of the same request follow: holds no more quota than these bytes need."""
        if not self._buffering:
            await self.reserve(self.received_bytes)

    async def _spill(self) -> None:
        """Leaves memory for the disk. The bytes' type is judged first: no need to receive a gigabyte of what is refused anyway."""
        self._stop_buffering()
        with suppress(KindRequired, TypeMismatch):  # a later field may name the kind, and the file's end may show another type
            file_type, _ = self._resolve(None)
            if self._intake.scanner is not None and file_type is not MP4:  # whose end may show that it is M4A
                self._intake.scanner.refuse_oversize(file_type.mime_type, self._declared_bytes or 0)
        await self._reserve_for_received()
        await self._flush()

    def _stop_buffering(self) -> None:
        if self._buffering:
            self._buffering = False
            self._intake.buffer(self._load, -self._chunks_bytes)

    async def _flush(self) -> None:
        """Hands the batch to a thread and waits: with several uploads at a time the cores are busy anyway."""
        await self._reserve_for_received()
        chunks, size_bytes = self._chunks, self._chunks_bytes
        self._chunks, self._chunks_bytes = [], 0
        await self._in_thread(self._append, chunks)
        self._keep_promise(min(self._promised_bytes, size_bytes))

    def _append(self, chunks: list[bytes | memoryview]) -> None:
        self._incoming().append(chunks)

    def _incoming(self) -> IncomingFile:
        if self._file is None:
            # Each try of an upload link has a name of its own: a process that was thought dead must not link another's bytes.
            name = self.id if self._claimed is None else uuid7()
            self._file = IncomingFile(self._volume, name, self._expected)
        return self._file

    async def _in_thread(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Shielded: when this request is cancelled, the thread still has the file, and `abort` waits for it."""
        working = self._working = self._intake.vault.start(work, *arguments)
        return await asyncio.shield(working)

    def _keep_promise(self, size_bytes: int) -> None:
        """Keeps the volume's account of bytes that are announced and not yet written."""
        self._promised_bytes -= size_bytes
        self._volume.promised_bytes -= size_bytes

    # Finishing

    async def finish(self, details: Details) -> File:
        """Publishes the bytes as a new file: type, scan, sync, link, sync, commit, in that order. Returns the committed row.

        Raises what is wrong with the bytes with nothing stored, or `CommitUnknown` with the bytes kept.
        """
        file_type, kind = await self._complete(details.kind)

        def path(generation: int) -> str:
            return stored_path(self.user_id, kind, self.id, generation, file_type.extension)

        generation, sha256 = await self._in_thread(self._land, path, 1)
        new = NewFile(
            id=self.id,
            user_id=self.user_id,
            file_name=details.file_name or f"{self.id}.{file_type.extension}",
            file_type=kind,
            mime_type=file_type.mime_type,
            file_size=self.received_bytes,
            sha256=sha256,
            volume_id=self._volume.id,
            file_path=path(generation),
            generation=generation,
            package_name=details.package_name,
            tags=details.tags,
            metadata=details.metadata,
            idempotency_key=self._idempotency_key,
            user_since=self._user_since,
            fence=self._fence,
            needs_reservation=self._claimed is not None,
        )
        file = await self._commit(lambda: self._publish(new), self.id, new.file_path)
        self._tell_of(file)
        return file

    async def replace(self, old: File, *, marks: Sequence[str] | None = None) -> File:
        """Publishes the bytes as the new content of `old`, whose bytes live until the commit. Its kind stays.

        With `marks` they are the same, marked: an output that waits for that, of the same type. Raises `PreconditionFailed` when the file
        has been replaced meanwhile, else as `finish`.
        """
        file_type, kind = await self._complete(old.file_type)
        if marks is not None and file_type.mime_type != old.mime_type:
            raise TypeMismatch(declared=old.mime_type, detected=file_type.mime_type)

        def path(generation: int) -> str:
            return stored_path(self.user_id, kind, old.id, generation, file_type.extension)

        generation, sha256 = await self._in_thread(self._land, path, old.generation + 1)
        new = ReplacedContent(
            upload_id=self.id,
            mime_type=file_type.mime_type,
            file_size=self.received_bytes,
            sha256=sha256,
            volume_id=self._volume.id,
            file_path=path(generation),
            generation=generation,
        )

        def statement() -> Awaitable[File]:
            if marks is not None:
                return mark_content(
                    self._intake.db,
                    user_id=self.user_id,
                    file_id=old.id,
                    expected_generation=old.generation,
                    new=new,
                    marks=marks,
                    statements_name=STATEMENTS_NAME,
                )
            return ledger.replace_content(
                self._intake.db, user_id=self.user_id, file_id=old.id, expected_generation=old.generation, new=new
            )

        file = await self._commit(statement, old.id, new.file_path)
        self._tell_of(file)
        await self._intake.bury_generation(old)
        if old.volume_id != file.volume_id:  # else making the new previews replaces them
            vault = self._intake.vault
            try:
                await vault.run(vault.volume(old.volume_id).remove_previews, previews_directory(old.file_path, old.id))
            except CofferError as problem:
                log.warning("previews of replaced bytes are left to the audit: %s", problem)
        return file

    def _resolve(self, kind: str | None) -> tuple[FileType, str]:
        detected = detect(self._head, b"".join(self._recent)[-TAIL_BYTES:])
        decided = resolve(self._allowed, detected, kind)
        known = cast("FileType", detected)  # `resolve` refuses None
        wanted = self._claimed.link.types if self._claimed else ()
        if wanted and known.mime_type not in wanted and decided not in wanted:
            raise UnsupportedType(detected=known.mime_type, allowed=list(wanted))
        return known, decided

    async def _complete(self, kind: str | None) -> tuple[FileType, str]:
        if self._declared_bytes is not None and self.received_bytes != self._declared_bytes:
            raise IncompleteBody
        decided = self._resolve(kind)
        if not self._buffering:
            await self._reserve_for_received()
        if self._intake.scanner is not None:
            await self._scan(self._intake.scanner, decided[0].mime_type)
        self._volume.check_state()
        self._stop_buffering()  # not before: what waits for its scan holds memory
        return decided

    async def _scan(self, scanner: Scanner, mime_type: str) -> None:
        """Shows the bytes to the virus scanner: from memory where they are still there as a whole, else read back from incoming/.

        Not while they come: clamd hangs up on a stream that stands still, as that of a slow client does, and has few threads.
        """
        if self._file is not None and self._chunks:
            await self._flush()
        file, chunks = self._file, self._chunks
        check = scanner.check(mime_type, self.received_bytes, lambda: chunks if file is None else file.pieces())
        self._working = asyncio.create_task(check)
        try:
            await asyncio.shield(self._working)
        except Infected as found:
            await self._record(found, mime_type, hashlib.sha256(b"".join(chunks)).digest() if file is None else file.sha256)
            raise

    async def _record(self, found: Infected, mime_type: str, sha256: bytes) -> None:
        facts = {"signature": found.signature, "mime_type": mime_type, "size_bytes": self.received_bytes, "sha256": sha256.hex()}
        log.warning("refused an infected upload", extra={"upload_id": str(self.id), "user_id": self.user_id, **facts})
        try:
            await ledger.record_infected(
                self._intake.db,
                user_id=self.user_id,
                upload_id=self.id,
                signature=found.signature,
                mime_type=mime_type,
                size_bytes=self.received_bytes,
                sha256=sha256,
            )
        except CofferError as problem:  # the refusal stands, and the log has it
            log.warning("could not append the event of an infected upload: %s", problem)

    def _land(self, path: Callable[[int], str], generation: int) -> tuple[int, bytes]:
        """In a thread: the last bytes, the sync, and the first free name from `generation` on."""
        file = self._incoming()
        file.append(self._chunks)
        self._chunks = []
        file.seal()
        for candidate in range(generation, generation + MOST_GENERATIONS_TRIED):
            try:
                file.publish(path(candidate))
            except FileExistsError:
                continue
            self._landed_path = path(candidate)
            return candidate, file.sha256
        raise Conflict

    def _tell_of(self, file: File) -> None:
        if file.preview_state == "pending":
            self._intake.waker.wake()
        if self._claimed is not None and self._claimed.link.job_id is not None:
            self._intake.job_teller.tell(self._claimed.link.job_id)

    async def _publish(self, new: NewFile) -> File:
        try:
            if self._reserved_bytes is None:
                return await self._intake.publisher.publish(new)
            return await ledger.publish_file(self._intake.db, new)
        except NotFound as problem:  # erased since the upload began, perhaps with the bytes that we have just landed
            self._intake.forget(self.user_id)
            raise Conflict from problem

    async def _commit(self, statement: Callable[[], Awaitable[File]], file_id: UUID, path: str) -> File:
        try:
            file = await statement()
        except CommitUnknown:
            settled = await self._settle(file_id, path)
            if settled is None:
                self._leave()
                log.warning("outcome of a commit is unknown; the bytes stay", extra={"file_id": str(file_id)})
                raise
            file = settled
        except CofferError:
            raise  # refused for certain: `abort` takes the bytes away again
        except BaseException:
            self._leave()  # cancelled in mid-commit: as unknown as a lost answer
            raise
        self._leave()
        return file

    async def _settle(self, file_id: UUID, path: str) -> File | None:
        try:
            found = await ledger.find_file_anywhere(self._intake.db, file_id)
        except CofferError:
            return None
        return found if found is not None and found.file_path == path else None

    # Ending

    def _leave(self) -> None:
        """Over: the row has taken the reservation's place, or time will settle it."""
        self._over = True
        self._intake.live.discard(self.id)
        self._intake.leave(self.user_id, self._load)
        self._keep_promise(self._promised_bytes)

    async def abort(self) -> None:
        """Gives back bytes and quota. Safe to call at any time and again; does nothing to a finished upload. Never raises.

        What cannot be given back now is given back later: quota when the lease expires, bytes by housekeeping or the audit.
        """
        if self._over:
            return
        self._stop_buffering()
        self._leave()
        self._chunks = []
        if self._working is not None:
            await asyncio.wait([self._working])  # its failure, if any, is the one that led here
            self._working.cancelled() or self._working.exception()
        try:
            if self._file is not None:
                await self._intake.vault.run(self._file.discard)
            if self._landed_path is not None:
                await self._intake.vault.run(self._volume.remove_stored, [self._landed_path])
        except (CofferError, OSError):
            log.warning("could not remove the bytes of a refused upload", extra={"upload_id": str(self.id)}, exc_info=True)
        if self._reserved_bytes is not None:
            try:
                if self._claimed is None:
                    await ledger.release_reservation(self._intake.db, self.id)
                else:
                    await ledger.unclaim_link(self._intake.db, self.id)
            except CofferError:
                log.warning("could not release a reservation; its lease will run out", extra={"upload_id": str(self.id)})
