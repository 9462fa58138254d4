"""Makes the variants that somebody waits for. A job names one; where it has been made already, there is nothing to do."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

from server import ledger
from server.ledger import Database, File, PreviewRow
from server.previews.models import MadeFile, Unmakeable
from server.previews.scratch import scratch_directory
from server.previews.variants import Variant
from server.vault import Vault
from server.vault.layout import preview_path, previews_directory

MakeVariant = Callable[[Path, str, Path, Variant], Awaitable[MadeFile]]

log = logging.getLogger("coffer.previews")


class OnDemand:
    """The part of a worker process that makes variants. Lives in one event loop."""

    def __init__(self, db: Database, vault: Vault, make: MakeVariant, most_bytes: int) -> None:
        """`most_bytes` is what the variants of one user may take together: those not used for the longest time give way."""
        self._db = db
        self._vault = vault
        self._make = make
        self._most_bytes = most_bytes

    async def handle(self, file_id: UUID, name: str) -> None:
        """Makes the variant called `name` of a file that has previews, and tells who waits. What it raises may be tried again.

        A crash leaves previews without rows, the new one or evicted ones: garbage that the next making replaces.
        """
        variant = Variant.of_name(name)
        file = await ledger.find_file_anywhere(self._db, file_id)
        if variant is not None and file is not None and file.preview_state == "ready":
            try:
                await self._variant(file, variant)
            except Unmakeable as problem:
                log.info("no variant: %s", problem.reason, extra={"file_id": str(file_id), "mime_type": file.mime_type})
        await ledger.notify_variant(self._db, file_id, name)

    async def _variant(self, file: File, variant: Variant) -> None:
        volume = self._vault.volume(file.volume_id)
        await self._vault.check_writable(volume, 0)
        path, mime_type = await still_of(self._db, file)
        source = await self._vault.run(volume.stored_file, path)
        directory = previews_directory(file.file_path, file.id)
        with scratch_directory() as output:
            made = await self._make(source, mime_type, Path(output), variant)
            (size,) = await self._vault.run(lambda: volume.store_previews(directory, Path(output), [made.name], keep_others=True))
        row = PreviewRow(
            variant=made.name, file_name=made.name, mime_type=made.mime_type, width=made.width, height=made.height, size_bytes=size
        )
        evicted = await ledger.add_variant(self._db, file, row, self._most_bytes)
        if evicted is None:  # replaced or deleted meanwhile: what we made is of the bytes of before
            if await ledger.find_file_anywhere(self._db, file.id) is None:
                await self._vault.run(volume.remove_late_previews, directory)
            else:
                await self._vault.run(volume.remove_preview, f"{directory}/{made.name}")
            return
        for each in evicted:
            evicted_path = preview_path(each.file_path, each.file_id, each.file_name)
            await self._vault.run(self._vault.volume(each.volume_id).remove_preview, evicted_path)


async def still_of(db: Database, file: File) -> tuple[str, str]:
    """The stored path and the type of a still picture of a file. An image is one itself; of everything else, its largest preview is.

    Raises `Unmakeable` "unsupported" where there is none.
    """
    if file.file_type == "image":
        return file.file_path, file.mime_type
    pictures = [
        each for each in await ledger.get_previews(db, file.user_id, file.id) if each.mime_type == "image/webp" and each.variant.isdecimal()
    ]
    if not pictures:
        raise Unmakeable("unsupported")
    largest = max(pictures, key=lambda each: int(each.variant))
    return preview_path(file.file_path, file.id, largest.file_name), largest.mime_type
