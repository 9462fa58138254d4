"""Marks outputs as made by AI, once they are stored: the marked bytes become a new version of the file.

A file that says itself how it was made, by a manifest of its own or the IPTC's source type, is left as it came: it knows more, and a change
would break its manifest.
"""

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec

from server import ledger
from server.errors import (
    CofferError,
    FileTooLarge,
    Infected,
    LegalHold,
    NotScannable,
    PreconditionFailed,
    QuotaExceeded,
    TypeMismatch,
    UnsupportedType,
)
from server.generation.credentials import Credentials
from server.intake import Intake
from server.ledger import Database, File
from server.ledger import generation as rows
from server.ledger.models import Marking
from server.ledger.queue import Retry
from server.previews.decoders import Sign
from server.previews.making import mark, read_statements
from server.previews.marks import MOST_BYTES, MOST_GROWTH_BYTES, TYPES, Kind, Mark
from server.previews.models import MadeFile, Unmakeable
from server.previews.scratch import scratch_directory
from server.previews.statements import Statements
from server.vault.volume import Handle, Volume

MOST_TRIES = 3
FIRST_DELAY_SECONDS = 2.0
LONGEST_DELAY_SECONDS = 300.0
_PIECE_BYTES = 256 * 1024

_REFUSALS = (FileTooLarge, Infected, LegalHold, NotScannable, QuotaExceeded, TypeMismatch, UnsupportedType)
"""What keeps the marked version of a file from being stored, for good: it stays as it came, for this reason."""

MakeMark = Callable[[Path, str, int, Mark, Sign], Awaitable[None]]
ReadStatements = Callable[[Path, str, Path], Awaitable[MadeFile]]

log = logging.getLogger("coffer.generation")


class Marker:
    """The part of a worker process that marks outputs. Lives in one event loop."""

    def __init__(
        self,
        db: Database,
        intake: Intake,
        credentials: Credentials | None,
        make_mark: MakeMark = mark,
        read_statements: ReadStatements = read_statements,
    ) -> None:
        """Without `credentials` it signs nothing: files that are to be signed wait."""
        self._db = db
        self._intake = intake
        self._credentials = credentials
        self._make_mark = make_mark
        self._read_statements = read_statements

    async def handle(self, file_id: UUID, put_off: int) -> None:
        """Marks one output, if it waits for that, and ends its job, if nothing else is open. Raises `Retry`. Repeating it is safe.

        A crash leaves the one version or the other, and bytes that housekeeping or the audit removes.
        """
        reason = None
        try:
            while (wanted := await rows.find_marking(self._db, file_id)) is not None:
                file = await ledger.find_file_anywhere(self._db, file_id)
                if file is None or file.deleted_at is not None:
                    reason = "deleted"
                    break
                try:
                    reason = await self._mark(file, wanted)
                    break
                except (FileNotFoundError, PreconditionFailed):
                    if await ledger.find_file_anywhere(self._db, file_id) == file:
                        raise
                    # Its bytes were replaced, its links revoked, or it was moved: look again.
            await rows.settle_marking(self._db, file_id, reason)
        except CofferError as problem:  # of the database or the volume: not the output's fault
            raise _later(FIRST_DELAY_SECONDS * 2 ** min(put_off, 10), problem) from problem
        except Retry:
            raise
        except Exception as problem:
            if put_off + 1 < MOST_TRIES:
                raise _later(FIRST_DELAY_SECONDS * 4**put_off, problem) from problem
            log.exception("not marked", extra={"file_id": str(file_id)})
            with suppress(CofferError):
                await rows.settle_marking(self._db, file_id, "error")
        if reason is not None:
            log.info("not marked: %s", reason, extra={"file_id": str(file_id)})

    async def _mark(self, file: File, wanted: Marking) -> str | None:
        """Stores the marked version, or tells why there is none. Raises `PreconditionFailed` when the file is another by now."""
        volume = self._intake.vault.volume(file.volume_id)
        await self._intake.vault.check_writable(volume, 2 * (file.file_size + MOST_GROWTH_BYTES))
        source = await self._intake.vault.run(volume.stored_file, file.file_path)
        try:
            if (reason := await self._says_itself(file, source)) is not None:
                return reason
            marked, marks, reason = await self._marked(file, source, volume, wanted)
            if marked is None:
                return reason
            await self._store(file, marked, marks)
        except Unmakeable as problem:
            return problem.reason
        except _REFUSALS as refused:
            return refused.code
        return None

    async def _says_itself(self, file: File, source: Path) -> str | None:
        with scratch_directory() as output:
            made = await self._read_statements(source, file.mime_type, Path(output))
            said = msgspec.json.decode((Path(output) / made.name).read_bytes(), type=Statements)
        if said.content_credentials is not None:
            return "unreadable_credentials" if "error" in said.content_credentials else "has_credentials"
        return "has_source_type" if said.digital_source_type is not None else None

    async def _marked(self, file: File, source: Path, volume: Volume, wanted: Marking) -> tuple[Handle | None, list[str], str]:
        """The bytes with as many of the marks as they take, and which those are; without any, the reason of the last."""
        marked, marks, reason = None, list[str](), "unsupported"
        kinds: tuple[Kind, ...] = ("iptc", "c2pa")
        for kind in kinds:
            if kind not in wanted.marks or file.mime_type not in TYPES[kind]:
                continue
            size_bytes = file.file_size if marked is None else os.fstat(marked.fd).st_size
            if size_bytes > MOST_BYTES[kind]:
                reason = "too_large"
                continue
            one = Mark(kind=kind, most_bytes=size_bytes + MOST_GROWTH_BYTES, model=wanted.model_used)
            sign: Sign = _refuse
            if kind == "c2pa":
                credentials = self._valid_credentials()
                one = msgspec.structs.replace(one, certificates=credentials.certificates)
                sign = credentials.sign
            target = await self._intake.vault.run(volume.nameless)
            try:
                await self._make_mark(source, file.mime_type, target.fd, one, sign)
            except Unmakeable as problem:
                reason = problem.reason
                continue
            marked, source = target, Path(f"/proc/self/fd/{target.fd}")
            marks.append(kind)
        return marked, marks, reason

    def _valid_credentials(self) -> Credentials:
        if self._credentials is None or self._credentials.expires_at <= datetime.now(UTC):
            log.error("outputs wait to be signed: there is no certificate for it that is valid")
            raise Retry(LONGEST_DELAY_SECONDS, "no valid certificate")
        return self._credentials

    async def _store(self, file: File, marked: Handle, marks: list[str]) -> None:
        size_bytes, at = os.fstat(marked.fd).st_size, 0
        upload = await self._intake.begin(file.user_id, declared_bytes=size_bytes, replacing=file)
        try:
            while piece := await self._intake.vault.run(os.pread, marked.fd, _PIECE_BYTES, at):
                await upload.write(piece)
                at += len(piece)
            await upload.replace(file, marks=marks)
        finally:
            await upload.abort()


def _refuse(_content: bytes) -> bytes:
    raise ValueError("nothing is to be signed")


def _later(delay_seconds: float, problem: Exception) -> Retry:
    log.info("will try again to mark: %s", type(problem).__name__)
    return Retry(min(delay_seconds, LONGEST_DELAY_SECONDS), f"{type(problem).__name__}: {problem}")
