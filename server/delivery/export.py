"""All that a user has stored, as one tar archive that is made while it is sent: for whoever moves away, or asks what is kept about them.

The archive holds every file under a name for people, `metadata.json`, which has the user's generation jobs, media and linked assets too,
and a page, `index.html`, that links to the files. Those two come last, for they tell what became of each file: they grow in temporary
files on the disk, and so memory does with neither the number of files nor their size. A connection to the database is held for one
page's query at a time, so the archive is no snapshot: server/decisions/0020.
"""

import asyncio
import hashlib
import html
import os
import re
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from tempfile import TemporaryFile
from typing import IO, Any, Literal, TypeVar
from urllib.parse import quote
from uuid import UUID

import msgspec

from server import ledger
from server.errors import DatabaseUnavailable, NotFound, VolumeUnavailable
from server.kinds import DIRECTORIES
from server.ledger import Database, File, User
from server.ledger.export import RECORD_KINDS, Record, RecordKind, page_of_user_records
from server.vault import Vault
from server.vault.volume import Handle, Volume

MEDIA_TYPE = "application/x-tar"
FILE_NAME = "coffer-export.tar"

Status = Literal["whole", "damaged", "missing", "deleted"]
Result = TypeVar("Result")

_FORMAT = "coffer export 1"
_TOP = "coffer-export"
_PAGE = 200
_PIECE_BYTES = 256 * 1024
_BLOCK_BYTES = 512
_LOOKS = 5  # at a file whose name changes while we look
_DATABASE_TRIES, _DATABASE_PAUSE_SECONDS = 15, 2.0  # an export of hours outlives a restart of PostgreSQL
_STEM_BYTES = 120  # with an id and an extension, within the 255 of any file system

_REFUSED = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029/\\:*?"<>|]')
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,10}")

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}"
)


class Export:
    """One export of one user's files. `pieces` may be asked for once. Lives in one event loop."""

    def __init__(self, db: Database, vault: Vault, user: User, *, audit_reads: bool = False) -> None:
        """With `audit_reads` each file's record precedes its bytes, as for a download."""
        self._db = db
        self._vault = vault
        self._user = user
        self._audit_reads = audit_reads
        self._began_at: datetime | None = None
        self._counts: dict[Status, int] = {"whole": 0, "damaged": 0, "missing": 0, "deleted": 0}

    async def begin(self) -> None:
        """Records the export. Call it before anything is sent: raises `VolumeUnavailable`, `DatabaseUnavailable` and `NotFound`."""
        if self._user.volume_id is not None:
            self._vault.volume(self._user.volume_id).root()
        self._began_at = await ledger.record_export(self._db, self._user.user_id)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The archive. A file that is deleted meanwhile is left out, unless it is open already; one that cannot be read is filled up with
        zeros: `metadata.json` tells which. Raises `VolumeUnavailable`, and `DatabaseUnavailable` when that lasts for half a minute.
        """
        began_at = self._began_at
        if began_at is None:
            raise RuntimeError("an export begins with `begin`")
        with TemporaryFile() as about, TemporaryFile() as index:
            _begin_about(about, self._user, began_at)
            _begin_index(index, self._user, began_at)
            after: File | None = None
            is_first = True
            while page := await self._page(after, began_at):
                after = page[-1]
                for seen in page:
                    file, opened, status = await self._open(seen)
                    path = None
                    if opened is not None:
                        path = _path_of(file)
                        yield _header(path, file.file_size, file.content_changed_at)
                        digest = hashlib.sha256()
                        async for piece in self._bytes(opened, file.file_size, digest):
                            yield piece
                        del opened
                        yield _padding(file.file_size)
                        status = "whole" if digest.digest() == file.sha256 else "damaged"
                    self._counts[status] += 1
                    about.write((b"" if is_first else b",\n") + msgspec.json.encode(_facts(file, path, status)))
                    index.write(_row(file, path, status).encode())
                    is_first = False
            about.write(b"\n]")
            for kind in RECORD_KINDS:
                await self._tell(about, kind, began_at)
            _end_about(about, self._counts)
            _end_index(index)
            for name, spool in (("metadata.json", about), ("index.html", index)):
                size_bytes = spool.tell()
                yield _header(f"{_TOP}/{name}", size_bytes, began_at)
                spool.seek(0)
                while piece := spool.read(_PIECE_BYTES):
                    yield piece
                yield _padding(size_bytes)
            yield bytes(2 * _BLOCK_BYTES)

    async def _page(self, after: File | None, until: datetime) -> list[File]:
        page = await _patiently(lambda: ledger.page_of_user_files(self._db, self._user.user_id, after, until, _PAGE))
        if self._audit_reads and page:
            await ledger.record_reads(self._db, "file.downloaded", self._user.user_id, [file.id for file in page])
        return page

    async def _tell(self, about: IO[bytes], kind: RecordKind, began_at: datetime) -> None:
        about.write(f',"{kind}":[\n'.encode())
        after: Record | None = None
        while page := await _patiently(partial(page_of_user_records, self._db, kind, self._user.user_id, after, began_at, _PAGE)):
            about.write(((",\n" if after else "") + ",\n".join(each.json for each in page)).encode())
            after = page[-1]
        about.write(b"\n]")

    async def _open(self, file: File) -> tuple[File, Handle | None, Status]:
        """The file as its row is now, opened. Deleting, replacing and renaming change the row before they take the old name away."""
        for _ in range(_LOOKS):
            if file.damaged_at is not None:
                return file, None, "damaged"
            volume = self._vault.volume(file.volume_id)
            try:
                opened = await self._vault.run(_opened, volume, file.file_path)
            except FileNotFoundError:
                found = await self._look(file.id)
                if found is None:
                    return file, None, "deleted"
                if found.file_path == file.file_path and found.damaged_at is None:
                    return file, None, "missing"
                file = found
            else:
                return file, opened, "whole"
        return file, None, "missing"

    async def _look(self, file_id: UUID) -> File | None:
        try:
            return await _patiently(lambda: ledger.get_exported_file(self._db, self._user.user_id, file_id))
        except NotFound:
            return None

    async def _bytes(self, opened: Handle, size_bytes: int, digest: Any) -> AsyncIterator[bytes]:
        """As many bytes as were promised, whatever the disk can read."""
        at = 0
        while at < size_bytes:
            wanted_bytes = min(_PIECE_BYTES, size_bytes - at)
            piece = await self._vault.run(_read, opened, wanted_bytes, at, digest)
            piece += bytes(wanted_bytes - len(piece))
            at += wanted_bytes
            yield piece


async def _patiently(ask: Callable[[], Awaitable[Result]]) -> Result:
    for _ in range(_DATABASE_TRIES - 1):
        try:
            return await ask()
        except DatabaseUnavailable:
            await asyncio.sleep(_DATABASE_PAUSE_SECONDS)
    return await ask()


def _opened(volume: Volume, path: str) -> Handle:
    try:
        return Handle(volume.open_stored(path))
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise VolumeUnavailable from problem


def _read(file: Handle, length: int, offset: int, digest: Any) -> bytes:
    try:
        piece = os.pread(file.fd, length, offset)
    except OSError:  # what the disk cannot read is missing from the digest, and so the file is told to be damaged
        return b""
    digest.update(piece)
    return piece


# The archive


def _header(path: str, size_bytes: int, at: datetime) -> bytes:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mtime, entry.mode = size_bytes, int(at.timestamp()), 0o640
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _BLOCK_BYTES)


def _path_of(file: File) -> str:
    """A name for people that any file system takes; the id keeps it apart from all others."""
    name = _REFUSED.sub("_", file.file_name)
    stem, dot, last = name.rpartition(".")
    extension = dot + last
    if not (stem and _EXTENSION.fullmatch(extension)):
        stem, extension = name, "." + file.file_path.rpartition(".")[2]
    stem = stem.encode()[:_STEM_BYTES].decode(errors="ignore").strip(" .") or "file"
    place = "files" if file.deleted_at is None else "trash"
    return f"{_TOP}/{place}/{DIRECTORIES[file.file_type]}/{stem} {file.id}{extension}"


# What it tells of itself


def _facts(file: File, path: str | None, status: Status) -> dict[str, Any]:
    """All that the row tells of a file, but where its bytes lie here."""
    hidden = {"user_id", "volume_id", "file_path", "generation", "thumbnail_path", "public_id", "preview_tries", "thumbhash", "sha256"}
    facts = {name: getattr(file, name) for name in File.__struct_fields__ if name not in hidden}
    own_path = None if path is None else path.removeprefix(f"{_TOP}/")
    return {"path": own_path, "status": status, "sha256": file.sha256.hex(), "is_public": file.public_id is not None, **facts}


def _begin_about(about: IO[bytes], user: User, began_at: datetime) -> None:
    names = ("user_id", "tier", "max_bytes", "total_bytes", "file_count", "preview_bytes", "created_at", "updated_at")
    head = {"format": _FORMAT, "began_at": began_at, "user": {name: getattr(user, name) for name in names}}
    about.write(msgspec.json.encode(head).removesuffix(b"}") + b',"files":[\n')


def _end_about(about: IO[bytes], counts: dict[Status, int]) -> None:
    tail = msgspec.json.encode({"ended_at": datetime.now(UTC), "counts": counts})
    about.write(b"," + tail.removeprefix(b"{") + b"\n")


def _begin_index(index: IO[bytes], user: User, began_at: datetime) -> None:
    title = f"Files of {html.escape(user.user_id)}, {began_at:%Y-%m-%d}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # whatever a name holds, it runs nothing
    index.write(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1><p>All that is known of them: "
        '<a href="metadata.json">metadata.json</a></p><table><tr><th>Name<th>Type<th>Bytes<th>Uploaded<th>Tags\n'.encode()
    )


def _row(file: File, path: str | None, status: Status) -> str:
    name = html.escape(file.file_name)
    if path is not None:
        name = f'<a href="{quote(path.removeprefix(f"{_TOP}/"))}">{name}</a>'
    if status != "whole":
        name += f" ({status})"
    elif file.deleted_at is not None:
        name += " (in the trash)"
    facts = (file.mime_type, f"{file.file_size:,}", f"{file.upload_date:%Y-%m-%d %H:%M}", html.escape(", ".join(file.tags)))
    return f"<tr><td>{name}{''.join(f'<td>{each}' for each in facts)}\n"


def _end_index(index: IO[bytes]) -> None:
    index.write(b"</table></body></html>\n")
