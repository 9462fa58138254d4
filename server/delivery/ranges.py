"""The Range header (RFC 9110, section 14): one range of bytes, or the whole file."""

import re
from dataclasses import dataclass

from server.errors import RangeNotSatisfiable

# Numbers of up to 40 digits: far beyond any file, and cheap to read. Empty list elements are allowed by section 5.6.1.
_SINGLE = re.compile(r"bytes=[ \t,]*([0-9]{0,40})-([0-9]{0,40})[ \t,]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes from `offset` on, all of them inside the file."""

    offset: int
    length: int

    def content_range(self, size_bytes: int) -> str:
        """The Content-Range of a 206 answer."""
        return f"bytes {self.offset}-{self.offset + self.length - 1}/{size_bytes}"


def requested_range(value: str, size_bytes: int) -> ByteRange | None:
    """The range that a Range header asks of a file of that size; None when the whole file is to be sent.

    Several ranges, other units and malformed values mean the whole file, which the RFC permits: nothing that a client
    asks for can make the answer longer than the file. An empty file has no range, so it is sent whole. Raises
    `RangeNotSatisfiable` for a range that lies beyond the end, and for the last 0 bytes.
    """
    match = _SINGLE.fullmatch(value)
    if match is None or size_bytes == 0:
        return None
    first, last = match.groups()
    if not first:
        if not last:
            return None
        length = min(int(last), size_bytes)
        if length == 0:
            raise RangeNotSatisfiable(size_bytes)
        return ByteRange(size_bytes - length, length)
    if last and int(last) < int(first):
        return None
    if int(first) >= size_bytes:
        raise RangeNotSatisfiable(size_bytes)
    end = min(int(last) + 1, size_bytes) if last else size_bytes
    return ByteRange(int(first), end - int(first))
