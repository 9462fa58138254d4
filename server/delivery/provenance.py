"""Tells what a file says of its making. A worker reads it, once; here it is waited for."""

import asyncio

import msgspec

from server import ledger
from server.errors import NoPreview, PreviewPending, VolumeUnavailable
from server.ledger import Database, File, Notices
from server.previews.statements import NAME, Statements
from server.vault import Vault, Volume
from server.vault.layout import preview_path

_REQUESTS = 2  # it may have given way to others before we read it, but not twice


class Provenance:
    """Lives in one event loop of a server."""

    def __init__(self, db: Database, vault: Vault, notices: Notices, wait_seconds: float, stopping: asyncio.Event) -> None:
        self._db = db
        self._vault = vault
        self._notices = notices
        self._wait_seconds = wait_seconds
        self._stopping = stopping

    async def of(self, file: File) -> Statements:
        """Raises `PreviewPending` when it takes long (asking again is right), `NoPreview` when the file cannot be read for it, and
        `VolumeUnavailable`.
        """
        if (found := await self._known(file)) is not None:
            return found
        try:
            async with asyncio.timeout(self._wait_seconds):
                for _ in range(_REQUESTS):
                    await self._request(file)
                    if (found := await self._known(file)) is not None:
                        return found
        except TimeoutError:
            raise PreviewPending from None
        raise NoPreview(file.preview_state, file.preview_reason)

    async def _request(self, file: File) -> None:
        with self._notices.of(ledger.variant_key(file.id, NAME)) as noticed:
            await ledger.request_variant(self._db, file.id, NAME)
            while await ledger.variant_is_requested(self._db, file.id, NAME):
                if self._stopping.is_set():
                    raise PreviewPending
                await ledger.time_to_look(noticed)

    async def _known(self, file: File) -> Statements | None:
        if not any(each.file_name == NAME for each in await ledger.get_previews(self._db, file.user_id, file.id)):
            return None
        volume = self._vault.volume(file.volume_id)
        try:
            content = await self._vault.run(_read, volume, preview_path(file.file_path, file.id, NAME))
        except FileNotFoundError:
            await ledger.forget_preview(self._db, file.id, NAME)
            return None
        await ledger.touch_preview(self._db, file.id, NAME)
        return msgspec.json.decode(content, type=Statements)


def _read(volume: Volume, path: str) -> bytes:
    try:
        with volume.stored_file(path).open("rb") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise VolumeUnavailable from problem
