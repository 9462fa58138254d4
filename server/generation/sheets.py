"""Contact sheets: several of a user's pictures on one, for a pipeline that takes only one reference.

A server asks for one and waits (`Sheets`), a worker makes it (`sheet_maker.py`), and it is stored as any file of the user's. Its
idempotency key is made of the pictures' bytes and the layout, so the same is made once, for as long as its file is there.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
from uuid_utils.compat import uuid7

from server import errors, ledger
from server.errors import CofferError, InvalidRequest, NotFound, PreviewPending
from server.intake import Details
from server.ledger import Database, File, Notices
from server.ledger import sheets as rows
from server.previews.sheets import Sheet

JOB = "sheet"
"""What a job of the previews' queue is called that is to make a sheet, in the place of a variant's name."""


REFUSALS: dict[str, type[CofferError]] = {
    each.code: each
    for each in (
        errors.QuotaExceeded,
        errors.TooManyUploads,
        errors.FileTooLarge,
        errors.UnsupportedType,
        errors.Infected,
        errors.NotScannable,
        errors.UserErasing,
        NotFound,
        InvalidRequest,
    )
}
"""What may become of a wish, for good."""


class Sheets:
    """Asks for sheets. Lives in one event loop of a server."""

    def __init__(self, db: Database, notices: Notices, wait_seconds: float, stopping: asyncio.Event) -> None:
        self._db = db
        self._notices = notices
        self._wait_seconds = wait_seconds
        self._stopping = stopping

    async def compose(self, files: Sequence[File], sheet: Sheet, details: Details) -> tuple[File, bool]:
        """The file that shows these files of one user in their order, and whether it was there already.

        Raises `PreviewPending` when it takes long (asking again is right), `InvalidRequest` for a picture that cannot be shown, and what
        storing a file raises.
        """
        user_id = files[0].user_id
        digest = digest_of(files, sheet)
        key = key_of(digest)
        if (stored := await rows.find_sheet_file(self._db, user_id, key)) is not None:
            return stored, True
        sheet_id = await rows.wish_for_sheet(
            self._db,
            UUID(int=uuid7().int),
            user_id,
            digest,
            [file.id for file in files],
            sheet=msgspec.json.encode(sheet).decode(),
            details=msgspec.json.encode(details).decode(),
            idempotency_key=key,
        )
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._until_settled(sheet_id)
        except TimeoutError:
            raise PreviewPending from None
        if (stored := await rows.find_sheet_file(self._db, user_id, key)) is None:
            raise PreviewPending  # made, and deleted since
        return stored, False

    async def _until_settled(self, sheet_id: UUID) -> None:
        with self._notices.of(ledger.variant_key(sheet_id, JOB)) as noticed:
            await ledger.request_variant(self._db, sheet_id, JOB)
            while (row := await rows.get_sheet(self._db, sheet_id)) is not None:
                if row.problem is not None:
                    raise _problem_of(row.problem)
                if self._stopping.is_set():
                    raise PreviewPending
                await ledger.time_to_look(noticed)
                if not await ledger.variant_is_requested(self._db, sheet_id, JOB):
                    await ledger.request_variant(self._db, sheet_id, JOB)


def digest_of(files: Sequence[File], sheet: Sheet) -> bytes:
    """What stands for a sheet: the bytes of its files, their order, and the layout."""
    layout = msgspec.structs.replace(sheet, background=sheet.background.lower())
    return hashlib.sha256(msgspec.json.encode([[file.sha256.hex() for file in files], layout])).digest()


def key_of(digest: bytes) -> str:
    """The idempotency key of a sheet's file. With a space, which no client's key has."""
    return f"{JOB} {digest.hex()}"


def _problem_of(told: str) -> CofferError:
    problem: dict[str, Any] = msgspec.json.decode(told)
    return REFUSALS[problem["code"]](**problem["fields"])
