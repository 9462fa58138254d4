"""Finds the preview that a link names, and waits for it where it is still to be made: by the workers, never here."""

import asyncio
from contextlib import suppress
from datetime import datetime
from uuid import UUID
from weakref import WeakValueDictionary

import msgspec

from server import ledger
from server.delivery.links import LinkedFile
from server.errors import NoPreview, PreviewPending
from server.ledger import Database, File, LinkedPreview, Notices
from server.previews.variants import MIME_TYPES, Variant
from server.vault.layout import preview_path

_REQUESTS = 2  # of one variant: it may have been evicted before anybody read it, but not twice
_ASKED_AT_ONCE = 8
"""Variants that one process asks for on behalf of one user at a time, so that a user's gallery does not keep others waiting."""

PREVIEW_MIME_TYPES: dict[str, str] = {**MIME_TYPES, "mp4": "video/mp4", "vtt": "text/vtt", "json": "application/json"}


class PreviewFile(msgspec.Struct, frozen=True, kw_only=True):
    """A preview whose bytes can be sent. `sha256`, `generation` and `content_changed_at` are those of the file that it was made from.

    `file_size` None: not known while the database is away.
    """

    id: UUID
    user_id: str
    volume_id: UUID
    file_path: str
    file_name: str
    mime_type: str
    file_size: int | None
    sha256: bytes
    content_changed_at: datetime
    generation: int


def from_link(link: LinkedFile, name: str) -> PreviewFile:
    """What a link alone says of the preview called `name`."""
    extension = name.rpartition(".")[2]
    return PreviewFile(
        id=link.id,
        user_id="",
        volume_id=link.volume_id,
        file_path=preview_path(link.file_path, link.id, name),
        file_name=name,
        mime_type=PREVIEW_MIME_TYPES.get(extension, "application/octet-stream"),
        file_size=None,
        sha256=link.sha256,
        content_changed_at=link.content_changed_at,
        generation=link.generation,
    )


class AwaitedPreviews:
    """Knows which previews there are. Lives in one event loop."""

    def __init__(self, db: Database, notices: Notices, wait_seconds: float, stopping: asyncio.Event) -> None:
        """`wait_seconds` is how long a request waits for a preview that is being made, or till `stopping`."""
        self._stopping = stopping
        self._db = db
        self._notices = notices
        self._wait_seconds = wait_seconds
        self._awaited: dict[str, asyncio.Task[None]] = {}
        self._asking: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._touching: set[asyncio.Task[None]] = set()

    async def find(self, link: LinkedFile, name: str) -> PreviewFile:
        """The preview called `name` of the file that a link names, made first if it is made on demand.

        Raises `NotFound` when the link was revoked or its file is gone, `NoPreview` when there is none and will be none, `PreviewPending`
        when it took too long, and `DatabaseUnavailable`.
        """
        found = await self._look(link, name)
        if found.preview is None and (found.file.preview_state == "pending" or Variant.of_name(name)):
            await self._await(found.file, name)
            found = await self._look(link, name)
        file, preview = found.file, found.preview
        if preview is None:
            raise NoPreview(file.preview_state, file.preview_reason)
        if found.is_unused:
            self._touch(file.id, name)
        return PreviewFile(
            id=file.id,
            user_id=file.user_id,
            volume_id=file.volume_id,
            file_path=preview_path(file.file_path, file.id, name),
            file_name=name,
            mime_type=preview.mime_type,
            file_size=preview.size_bytes,
            sha256=file.sha256,
            content_changed_at=file.content_changed_at,
            generation=file.generation,
        )

    async def make_again(self, lost: PreviewFile) -> None:
        """To be told that a preview has a row, but not its bytes: it is made once more."""
        await ledger.forget_preview(self._db, lost.id, lost.file_name)

    async def _look(self, link: LinkedFile, name: str) -> LinkedPreview:
        return await ledger.get_linked_preview(self._db, link.id, link.generation, link.link_epoch, name)

    async def _await(self, file: File, name: str) -> None:
        """All who want the same wait for one, which goes on when one of them goes away."""
        key = ledger.variant_key(file.id, name)
        if key not in self._awaited:
            self._awaited[key] = asyncio.create_task(self._await_one(file, name, key))
            self._awaited[key].add_done_callback(lambda task: self._end(key, task))
        made, stopped = self._awaited[key], asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({made, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if not made.done():
            raise PreviewPending
        made.result()

    def _end(self, key: str, task: asyncio.Task[None]) -> None:
        del self._awaited[key]
        if not task.cancelled():
            task.exception()  # is told to those who wait, if anybody still does

    async def _await_one(self, file: File, name: str, key: str) -> None:
        """Raises `PreviewPending` when it takes too long."""
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._until_known(file)
                if Variant.of_name(name) is not None:
                    async with self._asking.setdefault(file.user_id, asyncio.Semaphore(_ASKED_AT_ONCE)):
                        await self._until_made(file, name, key)
        except TimeoutError:
            raise PreviewPending from None

    async def _until_known(self, file: File) -> None:
        """What a variant is made from is there once the previews that every file has are made."""
        with self._notices.of(file.id) as noticed:
            while (now := await ledger.find_file_anywhere(self._db, file.id)) is not None and now.preview_state == "pending":
                await ledger.time_to_look(noticed)

    async def _until_made(self, file: File, name: str, key: str) -> None:
        with self._notices.of(key) as noticed:
            for _ in range(_REQUESTS):
                await ledger.request_variant(self._db, file.id, name)
                while await ledger.variant_is_requested(self._db, file.id, name):
                    await ledger.time_to_look(noticed)
                if any(each.file_name == name for each in await ledger.get_previews(self._db, file.user_id, file.id)):
                    return

    def _touch(self, file_id: UUID, name: str) -> None:
        """In the background: a reader need not wait for it."""

        async def touch() -> None:
            with suppress(Exception):  # it then gives way a little sooner
                await ledger.touch_preview(self._db, file_id, name)

        task = asyncio.create_task(touch())
        self._touching.add(task)
        task.add_done_callback(self._touching.discard)
