"""Makes the variants that somebody waits for. A job names one; where it has been made already, there is nothing to do."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

from server import ledger
from server.ledger import Database, File, PreviewRow
from server.previews.making import read_statements
from server.previews.models import MadeFile, Unmakeable
from server.previews.scratch import scratch_directory
from server.previews.statements import NAME as STATEMENTS_NAME
from server.previews.variants import Variant
from server.vault import Vault
from server.vault.layout import preview_path, previews_directory

MakeVariant = Callable[[Path, str, Path, Variant], Awaitable[MadeFile]]
ReadStatements = Callable[[Path, str, Path], Awaitable[MadeFile]]

log = logging.getLogger("coffer.previews")


class OnDemand:
    """The part of a worker process that makes variants. Lives in one event loop."""

    def __init__(
        self, db: Database, vault: Vault, make: MakeVariant, most_bytes: int, read_statements: ReadStatements = read_statements
    ) -> None:
        """`most_bytes` is what the variants of one user may take together: those not used for the longest time give way."""
        self._db = db
        self._vault = vault
        self._make = make
        self._most_bytes = most_bytes
        self._read_statements = read_statements

    async def handle(self, file_id: UUID, name: str) -> None:
        """Makes the variant called `name` of a file that has previews, or reads what any file says of its making, and tells who waits. What
        it raises may be tried again.

        A crash leaves previews without rows, the new one or evicted ones: garbage that the next making replaces.
        """
        file = await ledger.find_file_anywhere(self._db, file_id)
        if file is not None and (make := self._maker(file, name)) is not None:
            try:
                await self._make_one(file, make)
            except Unmakeable as problem:
                log.info("no variant: %s", problem.reason, extra={"file_id": str(file_id), "mime_type": file.mime_type})
        await ledger.notify_variant(self._db, file_id, name)

    def _maker(self, file: File, name: str) -> "Callable[[Path], Awaitable[MadeFile]] | None":
        """What makes it in a directory; None when there is no such thing of that file."""
        if name == STATEMENTS_NAME:
            return lambda output: self._from(file, file.file_path, lambda source: self._read_statements(source, file.mime_type, output))
        if (variant := Variant.of_name(name)) is None or file.preview_state != "ready":
            return None

        async def make(output: Path) -> MadeFile:
            path, mime_type = await still_of(self._db, file)
            return await self._from(file, path, lambda source: self._make(source, mime_type, output, variant))

        return make

    async def _from(self, file: File, path: str, make: Callable[[Path], Awaitable[MadeFile]]) -> MadeFile:
        return await make(await self._vault.run(self._vault.volume(file.volume_id).stored_file, path))

    async def _make_one(self, file: File, make: Callable[[Path], Awaitable[MadeFile]]) -> None:
        volume = self._vault.volume(file.volume_id)
        await self._vault.check_writable(volume, 0)
        directory = previews_directory(file.file_path, file.id)
        with scratch_directory() as output:
            made = await make(Path(output))
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
