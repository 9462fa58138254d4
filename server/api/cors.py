"""Pages of other origins: what browsers let them ask and read (the Fetch standard, "CORS protocol").

Coffer has no cookies, so credentials in the sense of that standard are never allowed: a page that has no key or link gets nothing.
"""

from collections.abc import Mapping
from typing import Any

from server.settings import Settings

Headers = tuple[tuple[bytes, bytes], ...]

_PATHS = ("/api/", "/f/", "/p/", "/u/")
_MAX_AGE_SECONDS = 7_200  # what Chromium keeps at most
_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
_REQUEST_HEADERS = (
    "Authorization, Content-Type, X-User-Id, X-Request-Id, Idempotency-Key, Content-Digest, Repr-Digest, Content-MD5, "
    "Range, If-Range, If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since, "
    "Tus-Resumable, Upload-Length, Upload-Defer-Length, Upload-Offset, Upload-Metadata, Upload-Checksum, Upload-Concat, Upload-Link, "
    "X-HTTP-Method-Override, X-Requested-With"
)
ANSWER_HEADERS = (
    "ETag, Location, Content-Length, Content-Range, Accept-Ranges, Content-Disposition, Repr-Digest, Idempotency-Replayed, "
    "X-Request-Id, RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, "
    "Tus-Resumable, Tus-Version, Tus-Extension, Tus-Max-Size, Tus-Checksum-Algorithm, Upload-Length, Upload-Defer-Length, Upload-Offset, "
    "Upload-Metadata, Upload-Expires, Upload-Concat, Coffer-File-Id"
)
_VARY = (b"vary", b"Origin")


class Cors:
    """Which headers tell a browser that a page may. An unknown origin is not refused: its browser keeps the answer from it."""

    def __init__(self, settings: Settings) -> None:
        origins = [each.encode("ascii") for each in settings.cors_origins]
        self._any = origins == [b"*"]
        self._allowed: dict[bytes, Headers] = {each: self._headers(each) for each in origins}
        # One answer for all origins needs no Vary, and a CDN keeps it once. Otherwise it is there also without an Origin: a cache
        # must not hand what <img> fetched to a page's script, which would be refused it.
        self._unknown: Headers = (_VARY,) if origins and not self._any else ()

    def _headers(self, origin: bytes) -> Headers:
        always = ((b"access-control-allow-origin", origin), (b"access-control-expose-headers", ANSWER_HEADERS.encode()))
        return always if self._any else (*always, _VARY)

    def headers(self, scope: Mapping[str, Any]) -> Headers:
        """What to add to the answer to this request, whatever that answer is: a page must be able to read a 413 as well."""
        if not self._allowed or not scope["path"].startswith(_PATHS):
            return ()
        if self._any:
            return self._allowed[b"*"]
        return self._allowed.get(_header(scope, b"origin"), self._unknown)

    def preflight(self, scope: Mapping[str, Any]) -> Headers | None:
        """What to add to a preflight's answer besides; None when this request is none, or its origin is unknown."""
        asks = scope["method"] == "OPTIONS" and _header(scope, b"access-control-request-method")
        if not asks or self.headers(scope) in ((), self._unknown):
            return None
        return (
            (b"access-control-allow-methods", _METHODS.encode()),
            (b"access-control-allow-headers", _REQUEST_HEADERS.encode()),
            (b"access-control-max-age", str(_MAX_AGE_SECONDS).encode()),
        )


def _header(scope: Mapping[str, Any], wanted: bytes) -> bytes:
    """The only header of that name; empty when there is none, or several, of which no browser is the author."""
    found = [value for name, value in scope["headers"] if name == wanted]
    return found[0] if len(found) == 1 else b""
