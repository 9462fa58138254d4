"""Makes contact sheets, in a worker, and stores them (`sheets.py`)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from pathlib import Path
from uuid import UUID

import msgspec

from server import ledger
from server.actor import Actor, act_as
from server.errors import CofferError, InvalidRequest
from server.generation.sheets import JOB, REFUSALS, digest_of, key_of
from server.intake import Details, Intake, Upload
from server.ledger import Database, File
from server.ledger import sheets as rows
from server.ledger.queue import Retry
from server.previews.models import MadeFile, Unmakeable
from server.previews.on_demand import still_of
from server.previews.scratch import scratch_directory
from server.previews.sheets import Sheet
from server.vault import Vault

MOST_TRIES = 5
FIRST_DELAY_SECONDS = 1.0
"""Before the second try; each further one waits twice as long."""

_WHY_NOT = {
    "unsupported": "has no picture",
    "damaged": "is damaged",
    "too_large": "has too many pixels, or the sheet takes too many bytes",
    "too_slow": "takes too long to decode",
}

MakeSheet = Callable[[Sequence[tuple[Path, str]], Path, Sheet], Awaitable[MadeFile]]

log = logging.getLogger("coffer.generation")


class SheetMaker:
    """Makes them. Lives in one event loop of a worker."""

    def __init__(self, db: Database, vault: Vault, intake: Intake, make: MakeSheet) -> None:
        self._db = db
        self._vault = vault
        self._intake = intake
        self._make = make

    async def handle(self, sheet_id: UUID, put_off: int) -> None:
        """Makes one sheet, if it is still wished for, and tells who waits. Raises `Retry`. Repeating it is safe."""
        try:
            row = await rows.get_sheet(self._db, sheet_id)
            if row is None or row.problem is not None:
                return
            try:
                await self._settle(row)
            except tuple(REFUSALS.values()) as refusal:
                await rows.refuse_sheet(self._db, row.id, _told(refusal))
            except Exception as problem:
                if put_off + 1 < MOST_TRIES or isinstance(problem, CofferError):
                    raise
                log.exception("a contact sheet cannot be made", extra={"sheet_id": str(row.id)})
                await rows.refuse_sheet(self._db, row.id, _told(InvalidRequest("files", "cannot be put on one sheet")))
            await ledger.notify_variant(self._db, sheet_id, JOB)
        except Retry:
            raise
        except Exception as problem:
            raise Retry(FIRST_DELAY_SECONDS * 2 ** min(put_off, 6), f"{type(problem).__name__}: {problem}") from problem

    async def _settle(self, row: rows.SheetRow) -> None:
        act_as(msgspec.json.decode(row.actor, type=Actor))
        sheet = msgspec.json.decode(row.sheet, type=Sheet)
        details = msgspec.json.decode(row.details, type=Details)
        files = [await ledger.get_file(self._db, row.user_id, file_id) for file_id in row.pictures]
        if digest_of(files, sheet) != row.digest:  # what is stored under this key is what everybody gets who asks for those bytes
            raise InvalidRequest("files", "have been replaced since; ask again")
        pictures = [await self._picture(number, file) for number, file in enumerate(files)]
        with scratch_directory() as output:
            try:
                made = await self._make(pictures, Path(output), sheet)
            except Unmakeable as problem:
                raise _unusable(problem.number, problem.reason) from problem
            await self._store(row, Path(output) / made.name, details)
        await rows.end_sheet(self._db, row.id)

    async def _picture(self, number: int, file: File) -> tuple[Path, str]:
        if file.file_type != "image" and file.preview_state == "pending":
            raise Retry(FIRST_DELAY_SECONDS, "the picture of a file is still to be made")
        try:
            path, mime_type = await still_of(self._db, file)
        except Unmakeable as problem:
            raise _unusable(number, problem.reason) from problem
        return await self._vault.run(self._vault.volume(file.volume_id).stored_file, path), mime_type

    async def _store(self, row: rows.SheetRow, made: Path, details: Details) -> None:
        content = await asyncio.to_thread(made.read_bytes)
        upload = await self._intake.begin_once(row.user_id, key_of(row.digest), declared_bytes=len(content))
        if not isinstance(upload, Upload):
            return  # a worker that died had got so far
        try:
            await upload.write(content)
            await upload.finish(details)
        finally:
            await upload.abort()


def _unusable(number: int, reason: str) -> InvalidRequest:
    return InvalidRequest(f"files[{number}]", _WHY_NOT[reason])


def _told(refusal: CofferError) -> str:
    said = {each.name: getattr(refusal, each.name) for each in fields(refusal) if each.init}
    return msgspec.json.encode({"code": refusal.code, "fields": said}).decode()
