"""What files say of their making, as it is kept beside their previews (`provenance` reads it)."""

from typing import Any

import msgspec

NAME = "provenance.json"
"""Of the file in which it is kept, and of the job that has it read, in the place of a variant's name."""

MIME_TYPES = frozenset(
    {
        "image/jpeg",
        "image/png",
        "image/webp",
        "image/gif",
        "image/avif",
        "image/heic",
        "image/heif",
        "video/mp4",
        "video/quicktime",
        "audio/mpeg",
        "audio/wav",
        "audio/x-wav",
        "audio/flac",
        "audio/mp4",
    }
)
"""Of files that may carry Content Credentials, as far as libc2pa reads them."""


class Statements(msgspec.Struct, frozen=True, kw_only=True):
    """`digital_source_type` is the IPTC's term, a URL. `content_credentials` are libc2pa's manifest store, with what came of verifying it,
    or an `error`.
    """

    digital_source_type: str | None = None
    content_credentials: dict[str, Any] | None = None
