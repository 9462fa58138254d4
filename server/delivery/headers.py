"""The headers of an answer that carries stored bytes. Every value is printable ASCII on one line, whatever the file's name."""

import base64
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from typing import Literal, Protocol
from urllib.parse import quote

from server.kinds import KNOWN

Disposition = Literal["inline", "attachment"]


class Described(Protocol):
    """What the headers of a file's bytes are made of: a row of the ledger, or what a link says of it."""

    @property
    def file_name(self) -> str: ...
    @property
    def mime_type(self) -> str: ...
    @property
    def sha256(self) -> bytes: ...
    @property
    def content_changed_at(self) -> datetime: ...


# Bytes that users uploaded are shown, never run: no scripts, no forms, no frames, an origin of their own. Images, media and
# the browser's own style for showing them remain, so that a picture or a video opened in a tab is still seen.
CONTENT_SECURITY_POLICY = "sandbox; default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'"

# For owners: kept by their own browser only, and asked again each time, so a deleted file is gone everywhere at once.
# No proxy may recompress the bytes: they would no longer be those of the ETag and of the digest.
OWNER_CACHE_CONTROL = "private, no-cache, no-transform"

# nginx passes on a head of 4 KiB in all (`proxy_buffer_size`) and answers 502 for more. The other headers take under 1 KiB.
# Per character a name takes 1 byte in the plain form and up to 12 in the exact one: 500 ASCII characters always fit, 150 emoji too.
MOST_DISPOSITION_BYTES = 2_048

_SHOWN_BY_BROWSERS = frozenset(mime_type for mime_type in KNOWN if mime_type.startswith(("image/", "video/", "audio/")))
_ATTRIBUTE_CHARACTERS = "!#$&+-.^_`|~"  # RFC 8187, besides letters and digits
_MIME_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+")
# An ending that is worth keeping: what tells programs the type. Longer ones are part of the name.
_EXTENSION = re.compile(r"(?<=.)\.[^.]{1,16}\Z", re.DOTALL)
_NOT_PLAIN = re.compile(r"[^ !#$&'()+,\-.0-9;=@A-Z\[\]^_`a-z{}~]")


@dataclass(frozen=True, slots=True)
class Presentation:
    """How an answer presents a file's bytes. The defaults are the owner's; `name` None is the file's own.

    `preview` names the preview whose bytes they are, if they are not the file's. `varies` is the request's header that it was chosen by.
    """

    disposition: Disposition | None = None
    name: str | None = None
    cache_control: str = OWNER_CACHE_CONTROL
    resource_policy: str = "same-origin"
    preview: str | None = None
    varies: str | None = None


_OWNERS = Presentation()


def etag(sha256: bytes, preview: str | None = None) -> str:
    """The ETag, quotes included: a strong one of bytes with this digest, a weak one of a preview of them.

    A preview made again is the same picture, but other bytes when the encoder is another by then.
    """
    return f'"{sha256.hex()}"' if preview is None else f'W/"{sha256.hex()}-{preview}"'


@lru_cache(4_096)
def last_modified(changed_at: datetime) -> str:
    """An aware time as an HTTP-date, rounded down to the second."""
    return format_datetime(changed_at.astimezone(UTC), usegmt=True)


def content_disposition(disposition: Disposition, name: str) -> str:
    """RFC 6266: the name as it is for everyone who reads `filename*`, and one in plain ASCII for the rest.

    The plain one has `_` for whatever an old browser could misread: quotes, backslashes, slashes, percent signs, control
    and non-ASCII characters. At most `MOST_DISPOSITION_BYTES`: a longer name loses characters before its extension, in both forms.
    """
    return _named(disposition, fitting_name(name, MOST_DISPOSITION_BYTES, lambda each: _named(disposition, each)))


def _named(disposition: Disposition, name: str) -> str:
    plain = _NOT_PLAIN.sub("_", name)
    value = f'{disposition}; filename="{plain}"'
    if plain == name:
        return value
    exact = quote(name, safe=_ATTRIBUTE_CHARACTERS, encoding="utf-8", errors="replace")
    return f"{value}; filename*=UTF-8''{exact}"


def fitting_name(name: str, most_bytes: int, written: Callable[[str], str]) -> str:
    """As much of a name as takes at most `most_bytes` when `written` (ASCII), cut before its extension."""
    if len(written(name)) <= most_bytes:
        return name
    found = _EXTENSION.search(name)
    extension = found[0] if found else ""
    shorter = [name[:kept] + extension for kept in range(len(name) - len(extension))]
    fitting = bisect_right(shorter, most_bytes, key=lambda each: len(written(each)))
    return shorter[fitting - 1]


def disposition_of(mime_type: str, wanted: Disposition | None) -> Disposition:
    """How a browser is told to treat bytes of this type. `inline` counts only for what it shows without running it.

    Without a wish, pictures, video and sound are shown. Everything else is saved, always: HTML, SVG, XML and PDF among it,
    should a row ever hold them.
    """
    return (wanted or "inline") if mime_type in _SHOWN_BY_BROWSERS else "attachment"


def representation_headers(file: Described, how: Presentation = _OWNERS) -> list[tuple[str, str]]:
    """The headers of a 200 or 206 answer except those of its length. Names are lower-case."""
    digest = [] if how.preview else [("repr-digest", f"sha-256=:{base64.b64encode(file.sha256).decode('ascii')}:")]
    return [
        # Rows that Coffer wrote hold plain types; one written by hand must not be able to split the header.
        ("content-type", file.mime_type if _MIME_TYPE.fullmatch(file.mime_type) else "application/octet-stream"),
        ("content-disposition", content_disposition(disposition_of(file.mime_type, how.disposition), how.name or file.file_name)),
        ("accept-ranges", "bytes"),
        *digest,
        *validator_headers(file, how),
    ]


def validator_headers(file: Described, how: Presentation = _OWNERS) -> list[tuple[str, str]]:
    """The headers of a 304 answer, a part of those of a 200."""
    return [
        ("etag", etag(file.sha256, how.preview)),
        *([("vary", how.varies)] if how.varies else []),
        ("last-modified", last_modified(file.content_changed_at)),
        ("cache-control", how.cache_control),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", CONTENT_SECURITY_POLICY),
        ("cross-origin-resource-policy", how.resource_policy),
        ("referrer-policy", "no-referrer"),
    ]
