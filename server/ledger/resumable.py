"""Resumable uploads as rows: what is known of one between its requests, and who writes it.

A writer holds the row by a lease and names its fence in every statement, so one that was given up for dead changes nothing any more. No
transaction lasts longer than its statement.
"""

import secrets
from collections.abc import Collection, Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from server.errors import NotFound
from server.ledger.database import COMMIT_PATIENCE_SECONDS, LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import ResumableUpload, UploadLink
from server.ledger.statements import statement

_ROW = ", ".join(f"r.{name}" for name in ResumableUpload.__struct_fields__)
_CREATE = statement("create_resumable_upload")
_CREATE_LINKED = statement("create_linked_upload")
_GET = statement("get_resumable_upload", row=_ROW)
_CLAIM = statement("claim_resumable_upload", row=_ROW)
_RENEW = statement("renew_resumable_uploads")
_CHECKPOINT = statement("checkpoint_resumable_upload")
_DECLARE = statement("declare_resumable_length")
_LEAVE = statement("leave_resumable_upload")
_END = statement("end_resumable_upload")
_FORGET = statement("forget_published_upload")
_MEASURE_PARTS = statement("measure_parts")
_FIND_JOINED = statement("find_joined_upload", row=_ROW)
_JOIN = statement("join_resumable_uploads")
_END_PARTS = statement("end_parts")
_USER_OF_LINK = statement("user_of_upload_link")
_LIST_BYTES = statement("list_resumable_bytes")
_WANT = statement("want_resumable_upload")
_PURGE = statement("purge_resumable_uploads")


class ResumableState(msgspec.Struct, frozen=True, kw_only=True):
    """An upload, whether it still holds quota, whether its file has been published, and whether a writer has it or had it and died
    (`is_held`), or has it for sure (`is_written`).
    """

    upload: ResumableUpload
    has_reservation: bool
    has_file: bool
    is_held: bool
    is_written: bool
    is_expired: bool

    @property
    def is_over(self) -> bool:
        """Whether nobody will write to it any more: it was published, or is part of another one."""
        return self.has_file or self.upload.joined_as is not None


class ClaimedUpload(msgspec.Struct, frozen=True, kw_only=True):
    """An upload in its writer's hands, the quota it holds, and the boot in which the writer before wrote beyond the offset."""

    upload: ResumableUpload
    reserved_bytes: int
    boot_id_before: str | None


async def create_resumable_upload(
    db: Database,
    *,
    upload_id: UUID,
    user_id: str,
    volume_id: UUID,
    length_bytes: int | None,
    reserved_bytes: int,
    upload_metadata: str,
    details: str,
    kinds: Collection[str] | None,
    is_partial: bool,
    lifetime_seconds: float,
    most: int | None,
) -> datetime:
    """Reserves quota and remembers the upload; returns when it expires. `most` limits the user's unfinished ones.

    Raises `QuotaExceeded`, `TooManyUploads`, `UserErasing`, `NotFound` (no such user).
    """
    rows = await db.write(
        _CREATE,
        upload_id,
        user_id,
        volume_id,
        length_bytes,
        reserved_bytes,
        upload_metadata,
        details,
        None if kinds is None else sorted(kinds),
        is_partial,
        lifetime_seconds,
        most,
    )
    expires_at: datetime = rows[0]["expires_at"]
    return expires_at


async def create_linked_upload(
    db: Database,
    *,
    upload_id: UUID,
    length_bytes: int | None,
    upload_metadata: str,
    details: str,
    link: UploadLink,
    lifetime_seconds: float,
    incoming_name: UUID,
) -> datetime:
    """Remembers an upload by an upload link that was claimed for it; returns when it expires. Raises `NotFound` when the link is gone."""
    rows = await db.write(
        _CREATE_LINKED,
        upload_id,
        length_bytes,
        upload_metadata,
        details,
        link.kinds,
        lifetime_seconds,
        incoming_name,
        msgspec.json.encode(link).decode(),
    )
    if not rows:
        raise NotFound
    expires_at: datetime = rows[0]["expires_at"]
    return expires_at


async def get_resumable_upload(db: Database, user_id: str, upload_id: UUID) -> ResumableState:
    """One upload of the user. Raises `NotFound`."""
    rows = await db.read(_GET, upload_id, user_id)
    if not rows:
        raise NotFound
    told = {name: rows[0][name] for name in ResumableState.__struct_fields__ if name != "upload"}
    return ResumableState(upload=_upload(rows[0]), **told)


async def claim_resumable_upload(
    db: Database, user_id: str, upload_id: UUID, holder: UUID, lease_seconds: float, boot_id: str | None
) -> ClaimedUpload | None:
    """Takes an upload for one writer, who writes beyond its offset in this boot of the machine.

    None while another has it, and when it is over.
    """
    rows = await db.write(_CLAIM, upload_id, user_id, holder, lease_seconds, boot_id, secrets.randbits(63))
    if not rows:
        return None
    row = rows[0]
    return ClaimedUpload(upload=_upload(row), reserved_bytes=row["reserved_bytes"], boot_id_before=row["boot_id_before"])


async def renew_resumable_uploads(db: Database, held: Collection[tuple[UUID, int]], lease_seconds: float) -> set[tuple[UUID, int]]:
    """Keeps uploads for their writers, each named with its fence. Returns those that are still theirs."""
    rows = await db.write(_RENEW, [upload_id for upload_id, _ in held], [fence for _, fence in held], lease_seconds)
    return {(row["id"], row["fence"]) for row in rows}


async def checkpoint_resumable_upload(
    db: Database, upload: ResumableUpload, offset_bytes: int, incoming_name: UUID, lifetime_seconds: float, *, release: bool
) -> datetime | None:
    """Records that so many bytes are synced; with `release` lets go of the upload. Returns when it expires, None when it is another's."""
    rows = await db.write(
        _CHECKPOINT, upload.id, upload.fence, offset_bytes, incoming_name, lifetime_seconds, release, patience=COMMIT_PATIENCE_SECONDS
    )
    return rows[0]["expires_at"] if rows else None


async def declare_resumable_length(db: Database, upload: ResumableUpload, length_bytes: int) -> bool:
    """Says how long an upload is going to be. False when another writer has it, or somebody has said so before."""
    return bool(await db.write(_DECLARE, upload.id, upload.fence, length_bytes))


async def leave_resumable_upload(db: Database, upload: ResumableUpload, *, is_doubtful: bool) -> None:
    """Ends the lease without recording anything. What lies beyond the offset does not count if it is doubtful."""
    await db.write(_LEAVE, upload.id, upload.fence, is_doubtful)


async def end_resumable_upload(db: Database, upload: ResumableUpload) -> list[tuple[UUID, UUID]]:
    """Forgets an upload with its parts and gives its quota back, or its link. Returns volume and name of all their bytes, which are the
    caller's to remove; nothing when another writer has it.
    """
    return [(row["volume_id"], row["incoming_name"]) for row in await db.write(_END, upload.id, upload.fence)]


async def forget_published_upload(db: Database, user_id: str, upload_id: UUID) -> None:
    """Forgets an upload whose file has been published; the file stays. Repeating is safe."""
    await db.write(_FORGET, upload_id, user_id)


async def measure_parts(db: Database, user_id: str, parts: Sequence[UUID]) -> int:
    """How many bytes these uploads of the user are to have together."""
    total_bytes: int = (await db.read(_MEASURE_PARTS, user_id, list(parts)))[0]["total_bytes"]
    return total_bytes


async def find_joined_upload(db: Database, user_id: str, parts: Sequence[UUID]) -> ResumableUpload | None:
    """The upload that was made of these parts."""
    rows = await db.read(_FIND_JOINED, user_id, list(parts))
    return _upload(rows[0]) if rows else None


async def join_resumable_uploads(
    db: Database,
    *,
    upload_id: UUID,
    user_id: str,
    parts: Sequence[UUID],
    upload_metadata: str,
    details: str,
    kinds: Collection[str] | None,
    lifetime_seconds: float,
) -> datetime | None:
    """Makes one upload of whole partial ones, which gets their quota. None unless every part is there, whole, and held by nobody."""
    rows = await db.write(
        _JOIN, upload_id, user_id, list(parts), upload_metadata, details, None if kinds is None else sorted(kinds), lifetime_seconds
    )
    expires_at: datetime | None = rows[0]["expires_at"]
    return expires_at


async def end_parts(db: Database, upload_id: UUID) -> list[tuple[UUID, UUID]]:
    """Forgets the parts of a published upload. Returns volume and name of each one's bytes, which are the caller's to remove."""
    return [(row["volume_id"], row["incoming_name"]) for row in await db.write(_END_PARTS, upload_id)]


async def list_resumable_bytes(db: Database, user_id: str) -> list[tuple[UUID, UUID]]:
    """Volume and name in incoming/ of the bytes of all the user's uploads."""
    return [(row["volume_id"], row["incoming_name"]) for row in await db.read(_LIST_BYTES, user_id)]


async def user_of_upload_link(db: Database, upload_id: UUID) -> str | None:
    """Whose the reservation of an upload link is, or the resumable upload that used it."""
    rows = await db.read(_USER_OF_LINK, upload_id)
    return rows[0]["user_id"] if rows else None


async def want_resumable_upload(db: Database, upload_id: UUID) -> None:
    """Asks whoever writes an upload at this moment to let go of it: notifies `wanted/<id>/<fence>`."""
    await db.write(_WANT, upload_id)


async def purge_resumable_uploads(db: Database, older_than_seconds: float, limit: int) -> list[tuple[UUID, UUID]]:
    """Forgets up to `limit` uploads that expired so long ago, and as many parts that a crash left.

    Returns volume and name of their bytes, which are the caller's to remove.
    """
    rows = await db.write(_PURGE, older_than_seconds, limit, patience=LONG_PATIENCE_SECONDS)
    return [(row["volume_id"], row["incoming_name"]) for row in rows]


def _upload(row: Row) -> ResumableUpload:
    return ResumableUpload(**{name: row[name] for name in ResumableUpload.__struct_fields__})
