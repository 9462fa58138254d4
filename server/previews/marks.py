"""What an output is to be marked with, and which types can be (`marking` does it)."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from server.previews import statements, xmp

Kind = Literal["iptc", "c2pa"]

TYPES: Mapping[str, frozenset[str]] = {"iptc": frozenset(xmp.TYPES), "c2pa": statements.MIME_TYPES}
"""By kind, in the order in which they are made: a manifest vouches for all else that stands in the file."""

MOST_BYTES = {"iptc": 2**40, "c2pa": 256 * 2**20}
"""libc2pa holds what it writes in memory, and up to as much of what it hashes: 0.5 GiB here, of the 1.5 GiB of the jail."""

LONGEST_CERTIFICATES = 32 * 2**10
"""Characters. They go to the jail in one message, and into every file."""

MOST_GROWTH_BYTES = 2**20 + 2**18
"""A manifest has the certificates, a claim and what it holds room for: about 13 KiB more than they. A packet of XMP may be moved within."""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """One mark of one file, which may become `most_bytes` long by it. `model` and `certificates` (PEM) are for `c2pa`."""

    kind: Kind
    most_bytes: int
    model: str | None = None
    certificates: str = ""
