"""What can go wrong, in words that stay stable for clients.

A domain error has a `code` that never changes once released, a `title` for people, and typed fields. It knows
nothing of HTTP: each door maps errors to its own protocol in one table (`server/api/problems.py` for JSON).
Anything that is not a `CofferError` is a defect and is answered with a fixed sentence.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(slots=True, eq=False)
class CofferError(Exception):
    """Base of every expected failure. Subclasses declare `code`, `title` and their fields."""

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Something went wrong on our side."

    def __str__(self) -> str:
        """The sentence for people; the code and fields are for programs."""
        return self.title

    def extra(self) -> dict[str, Any]:
        """The typed fields, as they appear beside `code` in an answer."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


# Who is asking


@dataclass(slots=True, eq=False)
class Unauthenticated(CofferError):
    """No credentials, or credentials that are unknown, malformed, revoked or expired. Which one is not told."""

    code = "unauthenticated"
    title = "This request needs valid credentials."


@dataclass(slots=True, eq=False)
class Forbidden(CofferError):
    """The credentials are good but lack the scope, or are not for this user or this network. Which one is not told."""

    code = "forbidden"
    title = "These credentials may not do this."
    needed_scope: str


@dataclass(slots=True, eq=False)
class LinkInvalid(CofferError):
    """A link that we have not signed as it stands, or whose key is gone. What was changed is not told."""

    code = "link_invalid"
    title = "This link is not valid."


@dataclass(slots=True, eq=False)
class LinkExpired(CofferError):
    """A link that was ours and is past its end."""

    code = "link_expired"
    title = "This link has expired."


@dataclass(slots=True, eq=False)
class LinkUsed(CofferError):
    """An upload link that has brought its file, or is bringing one now. One whose upload fails may be used again until it expires."""

    code = "link_used"
    title = "This link has been used."


@dataclass(slots=True, eq=False)
class UserUnknown(CofferError):
    """The user token is good, but its user has no storage here and tokens do not make users."""

    code = "user_unknown"
    title = "This user has no storage here."


@dataclass(slots=True, eq=False)
class TokenKeysUnavailable(CofferError):
    """The token's issuer is ours, but none of its keys could be fetched yet, so no token of it can be judged."""

    code = "token_keys_unavailable"
    title = "The keys of the token's issuer are not available."


# What is asked


@dataclass(slots=True, eq=False)
class InvalidRequest(CofferError):
    """A parameter, header or body that cannot be accepted; `reason` says which and why, in plain words."""

    code = "invalid_request"
    title = "The request is not valid."
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


@dataclass(slots=True, eq=False)
class UrlRefused(CofferError):
    """A URL that Coffer is to fetch, or to send to, and may not: by its form, its host, or where that leads. `reason` is in plain words."""

    code = "url_refused"
    title = "This URL may not be fetched."
    reason: str

    def __str__(self) -> str:
        return f"url: {self.reason}"


@dataclass(slots=True, eq=False)
class NotFound(CofferError):
    """The thing does not exist, or belongs to somebody else: the answers are the same (P4)."""

    code = "not_found"
    title = "There is no such thing here."


@dataclass(slots=True, eq=False)
class NoPreview(CofferError):
    """There is no such preview of the file, and none will be made. `preview_state` and `preview_reason` are the file's."""

    code = "no_preview"
    title = "There is no such preview of this file."
    preview_state: str | None
    preview_reason: str | None


@dataclass(slots=True, eq=False)
class PreviewPending(CofferError):
    """The preview is still to be made. Asking again is right."""

    code = "preview_pending"
    title = "This preview is still being made."


@dataclass(slots=True, eq=False)
class PreconditionFailed(CofferError):
    """`If-Match` or `If-Unmodified-Since` does not hold for the current bytes."""

    code = "precondition_failed"
    title = "The file has changed since you last saw it."


@dataclass(slots=True, eq=False)
class RangeNotSatisfiable(CofferError):
    """The range lies beyond the end."""

    code = "range_not_satisfiable"
    title = "The requested range lies beyond the end of the file."
    size_bytes: int


@dataclass(slots=True, eq=False)
class SortNotAvailable(CofferError):
    """The combination of filter and sort has no index, so it is not offered."""

    code = "sort_not_available"
    title = "This filter cannot be combined with this sort."
    filter: str
    sort: str


# Bytes


@dataclass(slots=True, eq=False)
class QuotaExceeded(CofferError):
    """`used_bytes` includes what is reserved by uploads under way."""

    code = "quota_exceeded"
    title = "The user's storage quota has no room for this."
    used_bytes: int
    limit_bytes: int
    needed_bytes: int


@dataclass(slots=True, eq=False)
class FileTooLarge(CofferError):
    """More bytes than a single file may have. Raised before the body is read where its length is declared."""

    code = "file_too_large"
    title = "The file is larger than a single file may be."
    limit_bytes: int


@dataclass(slots=True, eq=False)
class UnsupportedType(CofferError):
    """The bytes are of no type that this server stores. `detected` is what they look like, if anything."""

    code = "unsupported_type"
    title = "Files of this type are not stored here."
    detected: str | None
    allowed: list[str]


@dataclass(slots=True, eq=False)
class TypeMismatch(CofferError):
    """The bytes are fine for another kind, but not for the declared one."""

    code = "type_mismatch"
    title = "The file's bytes are not of the declared type."
    declared: str
    detected: str | None


@dataclass(slots=True, eq=False)
class KindRequired(CofferError):
    """The bytes fit several kinds (JSON and zip serve scenes and projects), and none was declared."""

    code = "kind_required"
    title = "This file fits several types; say which with `type`."
    choices: list[str]


@dataclass(slots=True, eq=False)
class DigestMismatch(CofferError):
    """The received bytes do not have the digest that the client sent. Nothing was stored."""

    code = "digest_mismatch"
    title = "The received bytes do not match the digest sent with them."
    algorithm: str


@dataclass(slots=True, eq=False)
class IncompleteBody(CofferError):
    """The body ended before its declared length, or the client went away. Nothing was stored."""

    code = "incomplete_body"
    title = "The upload ended before all of its bytes arrived."


@dataclass(slots=True, eq=False)
class TooSlow(CofferError):
    """The request came slower than the settings permit. Nothing was stored, and the connection is closed."""

    code = "too_slow"
    title = "The request arrived too slowly."


@dataclass(slots=True, eq=False)
class Infected(CofferError):
    """The virus scanner knows these bytes by the name in `signature`. Nothing was stored; the refusal is recorded."""

    code = "infected"
    title = "The file is infected; it was not stored."
    signature: str


@dataclass(slots=True, eq=False)
class NotScannable(CofferError):
    """The virus scanner cannot judge these bytes. `reason` is `size`, more than `limit_bytes`, or `limits`, some other one of its own."""

    code = "not_scannable"
    title = "The file cannot be checked for viruses, so it was not stored."
    reason: str
    limit_bytes: int


@dataclass(slots=True, eq=False)
class Damaged(CofferError):
    """The row exists but its bytes are gone or wrong; a sysadmin must restore them."""

    code = "damaged"
    title = "The stored bytes of this file are damaged or missing."


# Repeats


@dataclass(slots=True, eq=False)
class UploadExpired(CofferError):
    """A resumable upload that was not finished in time. Its bytes and its quota are gone."""

    code = "upload_expired"
    title = "This upload has expired."


@dataclass(slots=True, eq=False)
class UploadLocked(CofferError):
    """Another request is writing to this resumable upload and did not let go, or has taken it over from this one."""

    code = "upload_locked"
    title = "Another request is writing to this upload."


@dataclass(slots=True, eq=False)
class OffsetMismatch(CofferError):
    """The client would go on elsewhere than where the upload stopped."""

    code = "offset_mismatch"
    title = "The upload is not at this offset."
    offset_bytes: int


@dataclass(slots=True, eq=False)
class ChecksumMismatch(CofferError):
    """The piece of a resumable upload that came is not what the client sent; it was not kept."""

    code = "checksum_mismatch"
    title = "The bytes do not have the checksum that was sent."


@dataclass(slots=True, eq=False)
class IdempotencyInProgress(CofferError):
    """Another request with the same key is still uploading."""

    code = "idempotency_in_progress"
    title = "A request with this Idempotency-Key is still under way."


@dataclass(slots=True, eq=False)
class IdempotencyKeyReused(CofferError):
    """The key has stored a file of another length."""

    code = "idempotency_key_reused"
    title = "This Idempotency-Key was used for a different upload."


@dataclass(slots=True, eq=False)
class Conflict(CofferError):
    """Another request changed the same thing first; asking again is safe."""

    code = "conflict"
    title = "Another request changed this at the same moment."


@dataclass(slots=True, eq=False)
class UserErasing(CofferError):
    """The user's bytes and rows are being erased; nothing new is admitted until that is over."""

    code = "user_erasing"
    title = "This user is being deleted."


@dataclass(slots=True, eq=False)
class LegalHold(CofferError):
    """A legal hold keeps the user's files: none is deleted, moved to the trash or replaced until it ends."""

    code = "legal_hold"
    title = "A legal hold keeps this user's files."


# Limits


@dataclass(slots=True, eq=False)
class RateLimited(CofferError):
    """Too many requests. `policy` names the limit, as `RateLimit-Policy` does; the next request may come after `retry_after_seconds`."""

    code = "rate_limited"
    title = "Too many requests."
    policy: str
    retry_after_seconds: int


@dataclass(slots=True, eq=False)
class TooManyUploads(CofferError):
    """The user has as many uploads under way, or unused upload links, as one user may have."""

    code = "too_many_uploads"
    title = "The user has too many uploads or upload links open."
    limit: int


@dataclass(slots=True, eq=False)
class TooManyStreams(CofferError):
    """The user follows events, or has their files exported, as often as one user may at a time."""

    code = "too_many_streams"
    title = "The user has too many event streams or exports open."
    limit: int


# The machine


@dataclass(slots=True, eq=False)
class VolumeFull(CofferError):
    """Storing this would use what the volume keeps in reserve, or the disk is full. Nothing was stored."""

    code = "volume_full"
    title = "The storage volume has no room left."


@dataclass(slots=True, eq=False)
class VolumeUnavailable(CofferError):
    """No volume, or its sentinel is missing or wrong (unmounted?). Nothing was written."""

    code = "volume_unavailable"
    title = "The storage volume is not available."


@dataclass(slots=True, eq=False)
class VolumeReadOnly(CofferError):
    """The file system is read-only, or an I/O error made us stop writing until a sysadmin acts."""

    code = "volume_read_only"
    title = "The storage volume does not accept writes."


@dataclass(slots=True, eq=False)
class UploadsStopped(CofferError):
    """The store was restored from a backup, and no sysadmin has said yet that it is the one that counts. Nothing was stored."""

    code = "uploads_stopped"
    title = "The store was restored and takes no uploads before a sysadmin has cleared it."


@dataclass(slots=True, eq=False)
class DatabaseUnavailable(CofferError):
    """PostgreSQL cannot be reached or refused to work. Nothing happened; asking again is safe."""

    code = "database_unavailable"
    title = "The database is not available."


@dataclass(slots=True, eq=False)
class ScannerUnavailable(CofferError):
    """The virus scanner is down, too slow, or answers what cannot be understood. Nothing was stored; asking again is safe."""

    code = "scanner_unavailable"
    title = "Files cannot be checked for viruses at the moment."


@dataclass(slots=True, eq=False)
class CommitUnknown(CofferError):
    """The connection broke while committing: the write may or may not have happened.

    The bytes stay. Repeating with the same Idempotency-Key, or the audit, settles it.
    """

    code = "commit_unknown"
    title = "The database connection broke while committing; the outcome is not known yet."


@dataclass(slots=True, eq=False)
class InternalError(CofferError):
    """A defect. Details are in the log under the request id, never in an answer."""
