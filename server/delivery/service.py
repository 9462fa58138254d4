"""The journey of bytes out: find the row, weigh the conditions, open the file."""

import asyncio
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import msgspec

from server import ledger
from server.delivery.conditions import Outcome, evaluate, range_applies
from server.delivery.edge import write_state
from server.delivery.headers import Disposition, Presentation, etag, representation_headers, validator_headers
from server.delivery.links import LinkedFile
from server.delivery.previews import AwaitedPreviews, PreviewFile, from_link
from server.delivery.ranges import ByteRange, requested_range
from server.errors import Damaged, DatabaseUnavailable, NotFound, VolumeUnavailable
from server.ledger import Database, File
from server.previews.variants import negotiated
from server.vault import Vault
from server.vault.layout import user_directory
from server.vault.volume import Handle, Volume

Stored = File | LinkedFile | PreviewFile

log = logging.getLogger("coffer.delivery")

READ_BYTES = 256 * 1024
"""Bytes per thread hop, and what a stalled client keeps in memory.

Measured on 2 cores, uvicorn, 4 clients, 256 MiB each from the page cache: 64 KiB 0.8 GB/s, 128 KiB 1.4, 256 KiB 2.0,
512 KiB and 1 MiB 2.2. Twice the memory of each slow client was not worth the last tenth, beyond what a network card carries.
"""


@dataclass(slots=True)
class Body:
    """Which bytes to send, from a file that stays open until `close`.

    `first` are its first bytes, at most `READ_BYTES`, read in the same hop that opened the file: for small files that
    saved a fifth of all time, and a disk that cannot read is known before the answer has begun. There are none for a caller who has the
    file sent without reading it.
    """

    file: Handle | None
    offset: int
    length: int
    first: bytes
    volume_id: UUID
    path: str

    def close(self) -> None:
        """Lets go of the file and of the bytes. A thread that is still reading keeps the file open until it is done."""
        self.file, self.first = None, b""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and headers (lower-case names) of an answer; a body, for the caller to close, only where bytes follow."""

    status: int
    headers: list[tuple[str, str]]
    body: Body | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request asks for, and how its answer takes the bytes."""

    method: str
    headers: Mapping[str, str]
    unread: bool


class Delivery:
    """Answers requests for stored bytes. Knows no HTTP server; lives in one event loop."""

    def __init__(
        self,
        db: Database,
        vault: Vault,
        previews: AwaitedPreviews,
        link_resource_policy: str = "cross-origin",
        *,
        audit_reads: bool = False,
        edge_state: Path | None = None,
    ) -> None:
        """`link_resource_policy` is the Cross-Origin-Resource-Policy of what links and public files give.

        With `audit_reads`, bytes are given only once the audit trail says so. `edge_state` is where nginx reads whose links were revoked.
        """
        self.link_epochs: dict[str, int] = {}  # by user directory, as last heard from the database
        self._db = db
        self._lookups = ledger.FileLookups(db)
        self._vault = vault
        self._previews = previews
        self._link_resource_policy = link_resource_policy
        self._audit_reads = audit_reads
        self._edge_state = None if audit_reads else edge_state  # nginx records nothing, so it must not answer then

    async def open(
        self,
        user_id: str,
        file_id: UUID,
        method: str,
        headers: Mapping[str, str],
        disposition: Disposition | None = None,
        *,
        unread: bool = False,
        row: File | None = None,
    ) -> Answer:
        """The answer to a GET or HEAD of a user's file. `headers` are the request's, names in lower case, repeats joined by `, `.

        With `unread` the body holds no bytes yet, for a caller who needs the file alone. `row` is the file's, if it is known.
        Raises `NotFound`, `PreconditionFailed`, `RangeNotSatisfiable`, `Damaged` when the row's file is missing or has
        another length, `VolumeUnavailable` and `DatabaseUnavailable`.
        """
        how = Presentation(disposition)
        return await self._open(lambda: self._lookups.owned(user_id, file_id), _Asked(method, headers, unread), how, row)

    def row_of(self, user_id: str, file_id: UUID) -> "asyncio.Future[File | None]":
        """The row of a user's file, for `whole_at_once`. None: there is none. Nobody cancels it."""
        return self._lookups.owned_soon(user_id, file_id)

    def whole_at_once(self, file: File) -> Handle | None:
        """A user's file, to be sent as a whole, if nothing has to be waited for and all is as it should be.

        None says nothing of the file: `open` finds out.
        """
        if file.damaged_at is not None or self._audit_reads:
            return None
        try:
            return _open_at_once(self._vault.volume(file.volume_id), file, file.file_size)
        except VolumeUnavailable:
            return None

    async def open_linked(
        self, link: LinkedFile, method: str, headers: Mapping[str, str], cache_control: str, *, unread: bool = False
    ) -> Answer:
        """The answer to the holder of a signed link. Never other bytes than those that the link was made for.

        While the database is away the link itself says what the row would, so links are served all the same; a file that is
        gone from the disk or whose user has revoked links is `NotFound` then too. Raises as `open`; for a preview that is not there,
        `NoPreview` and `PreviewPending`.
        """
        how = Presentation(link.disposition, link.file_name, cache_control, self._link_resource_policy)
        asked = _Asked(method, headers, unread)
        if link.preview is not None:
            return await self._open_preview(link, link.preview, asked, how)
        try:
            return await self._open(lambda: self._lookups.linked(link.id, link.generation, link.link_epoch), asked, how)
        except DatabaseUnavailable:
            if (trusted := await self._without_database(link)) is None:
                raise
            try:
                return await self._answer(trusted, asked, how)
            except FileNotFoundError as problem:
                raise NotFound from problem

    async def _open_preview(self, link: LinkedFile, signed: str, asked: "_Asked", how: Presentation) -> Answer:
        name, varies = negotiated(signed, asked.headers.get("accept"))
        saved_as = link.file_name
        if saved_as.endswith(signed):  # unless whoever made the link has named it otherwise
            saved_as = saved_as.removesuffix(signed) + name
        how = replace(how, name=saved_as, preview=name, varies=varies)
        try:
            found = await self._previews.find(link, name)
            try:
                return await self._recorded(found, await self._answer(found, asked, how))
            except (FileNotFoundError, Damaged):
                again = await self._previews.find(link, name)
                if again.volume_id == found.volume_id:  # else it has been moved to another volume meanwhile
                    log.warning(
                        "a preview is missing and will be made again", extra={"file_id": str(link.id), "file_path": found.file_path}
                    )
                    await self._previews.make_again(found)
            found = await self._previews.find(link, name)
            try:
                return await self._recorded(found, await self._answer(found, asked, how))
            except FileNotFoundError as problem:
                raise Damaged from problem
        except DatabaseUnavailable:
            if (trusted := await self._without_database(link)) is None:
                raise
            try:
                # The original's generation is what revokes its links, so it must be there.
                volume = self._vault.volume(trusted.volume_id)
                volume.root()
                if not await self._vault.run(_is_stored, volume, trusted.file_path):
                    raise NotFound from None
                return await self._answer(from_link(trusted, name), asked, how)
            except FileNotFoundError as problem:
                raise NotFound from problem

    def original(self, link: LinkedFile) -> Handle | None:
        """The file that a link to a preview hangs on, under the very name that the link has, where that can be opened without waiting."""
        volume = next((volume for volume in self._vault.volumes if volume.id.bytes[:4] == link.volume_prefix), None)
        if volume is None:
            return None
        with suppress(ValueError, VolumeUnavailable):
            if (fd := volume.open_at_once(link.file_path)) is not None:
                return Handle(fd)
        return None

    async def _without_database(self, link: LinkedFile) -> LinkedFile | None:
        """The link, when it may be trusted although no row can be asked: then with its volume, or that to which the file has been moved
        since: what its name says is the same on all.
        """
        named = next((volume for volume in self._vault.volumes if volume.id.bytes[:4] == link.volume_prefix), None)
        if self._audit_reads or link.link_epoch < self.link_epochs.get(link.user_directory, 0):
            return None
        others = [volume for volume in self._vault.volumes if volume is not named and volume.state != "unavailable"]
        for volume in others if named is None else [named, *others]:
            if await self._vault.run(_is_stored, volume, link.file_path):
                return msgspec.structs.replace(link, volume_id=volume.id)
        return None if named is None else msgspec.structs.replace(link, volume_id=named.id)

    async def open_public(
        self, public_id: str, method: str, headers: Mapping[str, str], cache_control: str, *, unread: bool = False
    ) -> Answer:
        """The answer to whoever knows a public file's URL. Raises as `open`."""
        how = Presentation(None, None, cache_control, self._link_resource_policy)
        return await self._open(lambda: ledger.get_public_file(self._db, public_id), _Asked(method, headers, unread), how)

    async def refresh_link_epochs(self) -> None:
        """Remembers whose links have been revoked, for when the database cannot be asked, and tells nginx. Called by housekeeping."""
        looked_at = time.time()
        self.link_epochs = {user_directory(user_id): epoch for user_id, epoch in (await ledger.link_epochs(self._db)).items()}
        if self._edge_state is not None:
            try:
                await asyncio.to_thread(write_state, self._edge_state, self.link_epochs, looked_at)
            except OSError:
                log.exception("cannot tell nginx whose links were revoked; it passes all links on", extra={"path": str(self._edge_state)})

    async def _open(self, find: Callable[[], Awaitable[File]], asked: "_Asked", how: Presentation, row: File | None = None) -> Answer:
        file = row or await find()
        if file.damaged_at is not None:
            raise Damaged
        try:
            return await self._recorded(file, await self._answer(file, asked, how))
        except FileNotFoundError:
            # Replaced or deleted between the look at the row and the look at the disk: then the row says so by now.
            again = await find()
        if again.damaged_at is not None:
            raise Damaged
        try:
            if (again.volume_id, again.file_path) != (file.volume_id, file.file_path):
                return await self._recorded(again, await self._answer(again, asked, how))
        except FileNotFoundError:
            pass
        log.error(
            "a stored file is missing", extra={"file_id": str(file.id), "volume_id": str(again.volume_id), "file_path": again.file_path}
        )
        raise Damaged

    async def _recorded(self, file: File | PreviewFile, answer: Answer) -> Answer:
        if self._audit_reads and answer.body is not None:
            try:
                await ledger.record_reads(self._db, "file.downloaded", file.user_id, [file.id])
            except BaseException:
                answer.body.close()
                raise
        return answer

    async def _answer(self, file: Stored, asked: "_Asked", how: Presentation) -> Answer:
        method, headers = asked.method, asked.headers
        tag = etag(file.sha256, how.preview)
        if evaluate(method, headers, tag, file.content_changed_at) is Outcome.NOT_MODIFIED:
            return Answer(304, validator_headers(file, how), None)
        size_bytes = file.file_size
        if size_bytes is None:
            size_bytes = await self._vault.run(_size_of, self._vault.volume(file.volume_id), file.file_path)
        part = self._part(file, size_bytes, tag, method, headers)
        whole = part is None
        part = part or ByteRange(0, size_bytes)
        first_bytes = min(part.length, READ_BYTES) if method == "GET" and not asked.unread else 0
        volume = self._vault.volume(file.volume_id)
        opened, first = _open_at_once(volume, file, size_bytes) if asked.unread else None, b""
        if opened is None:
            opened, first = await self._vault.run(_open, volume, file, size_bytes, part.offset, first_bytes)
        body = Body(opened, part.offset, part.length, first, volume.id, file.file_path)
        if opened is None or len(first) != first_bytes:
            body.close()
            raise Damaged
        headers_sent = [*representation_headers(file, how), ("content-length", str(part.length))]
        if not whole:
            headers_sent.append(("content-range", part.content_range(size_bytes)))
        if method != "GET":
            body.close()
        return Answer(200 if whole else 206, headers_sent, body if method == "GET" else None)

    async def read(self, body: Body, offset: int) -> bytes:
        """The body's bytes from `offset` of the file on, at most `READ_BYTES`. Raises `Damaged` when there are fewer than promised."""
        if body.file is None:
            raise ValueError("this body was closed")
        wanted_bytes = min(READ_BYTES, body.offset + body.length - offset)
        chunk = await self._vault.run(_read, body.file, wanted_bytes, offset)
        # The kernel returns fewer bytes from a regular file only at its end.
        if len(chunk) != wanted_bytes:
            raise Damaged
        return chunk

    @staticmethod
    def _part(file: Stored, size_bytes: int, tag: str, method: str, headers: Mapping[str, str]) -> ByteRange | None:
        wanted = headers.get("range")
        if wanted is None or method != "GET":  # section 14.2: Range has a meaning for GET alone
            return None
        # A file that was never replaced nor renamed has had one content only, so its date is as good as its ETag.
        date_is_strong = file.generation == 1
        if not range_applies(headers.get("if-range"), tag, file.content_changed_at, date_is_strong=date_is_strong):
            return None
        return requested_range(wanted, size_bytes)


# What runs in a thread does not raise once a file is open: a traceback would hold the handle, and the file open, for as long
# as anybody keeps the exception.


def _is_stored(volume: Volume, path: str) -> bool:
    try:
        os.close(volume.open_stored(path))
    except (FileNotFoundError, VolumeUnavailable):
        return False
    return True


def _size_of(volume: Volume, path: str) -> int:
    opened = Handle(volume.open_stored(path))
    return os.fstat(opened.fd).st_size


def _open_at_once(volume: Volume, file: Stored, expected_bytes: int) -> Handle | None:
    """The file, if it is what its row says and nothing needs to be waited for. Otherwise `_open` finds out, and tells."""
    with suppress(ValueError, VolumeUnavailable):
        if (fd := volume.open_at_once(file.file_path)) is not None:
            opened = Handle(fd)
            facts = os.fstat(fd)
            return opened if facts.st_size == expected_bytes and stat.S_ISREG(facts.st_mode) else None
    return None


def _open(volume: Volume, file: Stored, expected_bytes: int, offset: int, length: int) -> tuple[Handle | None, bytes]:
    """Opens the file and reads. No handle when the stored file is not what its row says.

    The handle closes itself, also when the request was cancelled while this ran and nobody takes it.
    """
    facts = {"file_id": str(file.id), "volume_id": str(file.volume_id)}
    try:
        opened = Handle(volume.open_stored(file.file_path))
    except FileNotFoundError:
        raise
    except ValueError:
        log.exception("a row's path is not that of a stored file", extra=facts)
        return None, b""
    except OSError as problem:
        log.exception("a stored file cannot be opened", extra=facts)
        raise VolumeUnavailable from problem
    size_bytes = os.fstat(opened.fd).st_size
    if size_bytes != expected_bytes:
        log.error("a stored file has another length than its row", extra={**facts, "size_bytes": size_bytes})
        return None, b""
    return opened, _read(opened, length, offset)


def _read(file: Handle, length: int, offset: int) -> bytes:
    """That many bytes, or fewer when the file ends before or its disk fails."""
    try:
        return os.pread(file.fd, length, offset)
    except OSError as problem:
        log.error("a stored file cannot be read", extra={"errno": problem.errno})  # noqa: TRY400 - see above: no traceback
        return b""
