"""Every failure as `application/problem+json` (RFC 9457). The one place where errors meet HTTP status codes.

`code` is stable and for programs, `title` and `detail` are for people, and an error's typed fields stand beside them.
Whatever is no `CofferError` is a 500 with a fixed sentence; its details are in the log under the `request_id`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

from server import errors
from server.errors import CofferError, InternalError, RangeNotSatisfiable, RateLimited, TooSlow, Unauthenticated

MEDIA_TYPE = "application/problem+json"

STATUS: dict[type[CofferError], int] = {
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.LinkInvalid: 403,
    errors.LinkExpired: 403,
    errors.LinkUsed: 409,
    errors.UserUnknown: 403,
    errors.TokenKeysUnavailable: 503,
    errors.InvalidRequest: 400,
    errors.UrlRefused: 400,
    errors.NotFound: 404,
    errors.NoPreview: 404,
    errors.PreviewPending: 503,
    errors.PreconditionFailed: 412,
    errors.RangeNotSatisfiable: 416,
    errors.SortNotAvailable: 400,
    errors.QuotaExceeded: 413,
    errors.FileTooLarge: 413,
    errors.UnsupportedType: 415,
    errors.TypeMismatch: 415,
    errors.KindRequired: 400,
    errors.DigestMismatch: 400,
    errors.IncompleteBody: 400,
    errors.TooSlow: 408,
    errors.Infected: 422,
    errors.NotScannable: 422,
    errors.Damaged: 410,
    errors.UploadExpired: 410,
    errors.UploadLocked: 423,
    errors.OffsetMismatch: 409,
    errors.ChecksumMismatch: 460,
    errors.IdempotencyInProgress: 409,
    errors.IdempotencyKeyReused: 422,
    errors.Conflict: 409,
    errors.UserErasing: 409,
    errors.LegalHold: 409,
    errors.RateLimited: 429,
    errors.TooManyUploads: 429,
    errors.TooManyStreams: 429,
    errors.VolumeFull: 507,
    errors.VolumeUnavailable: 503,
    errors.VolumeReadOnly: 503,
    errors.UploadsStopped: 503,
    errors.DatabaseUnavailable: 503,
    errors.ScannerUnavailable: 503,
    errors.CommitUnknown: 503,
    errors.InternalError: 500,
}

# The database comes back within seconds of a restart, clamd when it has read its signatures; a volume waits for a person.
RETRY_AFTER_SECONDS: dict[type[CofferError], int] = {
    errors.TokenKeysUnavailable: 10,
    errors.PreviewPending: 2,
    errors.IdempotencyInProgress: 2,
    errors.TooManyUploads: 5,
    errors.UploadLocked: 2,
    errors.TooManyStreams: 30,
    errors.VolumeUnavailable: 30,
    errors.VolumeReadOnly: 30,
    errors.UploadsStopped: 60,
    errors.DatabaseUnavailable: 5,
    errors.ScannerUnavailable: 10,
    errors.CommitUnknown: 5,
}


class HttpRefusal(Exception):
    """A failure that only HTTP knows: a method that a route does not have, a body larger than JSON routes take."""

    def __init__(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that tells of a failure, ready to be sent by any kind of handler."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception, request_id: str) -> "Problem":
        """What to answer when this was raised. Anything that nobody expected becomes `InternalError`, and tells nothing."""
        match error:
            case CofferError():
                return cls._of_error(error, request_id)
            case HttpRefusal():
                return cls._of_refusal(error, request_id)
            case _:
                return cls._of_error(InternalError(), request_id)

    @classmethod
    def _of_error(cls, error: CofferError, request_id: str) -> "Problem":
        status = STATUS[type(error)]
        headers = {}
        if seconds := RETRY_AFTER_SECONDS.get(type(error)):
            headers["retry-after"] = str(seconds)
        match error:
            case Unauthenticated():
                headers["www-authenticate"] = 'Bearer realm="coffer"'
            case RateLimited(retry_after_seconds=seconds):
                headers["retry-after"] = str(seconds)
            case RangeNotSatisfiable(size_bytes=size_bytes):
                headers["content-range"] = f"bytes */{size_bytes}"
                headers["accept-ranges"] = "bytes"
            case TooSlow():  # what is still to come of this request would be taken for the next
                headers["connection"] = "close"
        return cls(status, _body(status, error.code, error.title, str(error), request_id, **error.extra()), headers)

    @classmethod
    def _of_refusal(cls, refusal: "HttpRefusal", request_id: str) -> "Problem":
        phrase = HTTPStatus(refusal.status)
        code = {405: "method_not_allowed", 413: "body_too_large"}.get(refusal.status, "http_error")
        detail = phrase.description or phrase.phrase
        return cls(refusal.status, _body(refusal.status, code, f"{phrase.phrase}.", detail, request_id), refusal.headers)

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """As ASGI wants them, with those that every problem has."""
        headers = {**COMMON_HEADERS, "content-type": MEDIA_TYPE, "content-length": str(len(self.body)), **self.headers}
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def send(self, scope: Mapping[str, Any], send: Any) -> None:
        """Answers a bare ASGI request with it."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.raw_headers()})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else self.body})


# An answer for one user must not stay in a shared cache, nor be taken for anything but what it says it is, nor be drawn into a page
# of another origin (which asks for it by CORS instead). An address that is a link is told to nobody.
COMMON_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}
RAW_COMMON_HEADERS = [(name.encode("ascii"), value.encode("ascii")) for name, value in COMMON_HEADERS.items()]


def _body(status: int, code: str, title: str, detail: str, request_id: str, **extra: object) -> bytes:
    standard = {
        "type": f"urn:coffer:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    return msgspec.json.encode(standard | extra)
