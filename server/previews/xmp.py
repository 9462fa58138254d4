"""Puts the IPTC's digital source type into a file as XMP, without touching a byte of its pictures: `edits_of` says what is to change.

Containers by ISO/IEC 10918-1 (JPEG), the PNG specification, RFC 9649 (WebP) and ISO/IEC 14496-12 (MP4); where XMP stands in them by Adobe's
XMP specification, part 3. Only the containers' own structure is read: lengths are checked against the file's, nothing is held but one
packet, and what does not fit is `Damaged`.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""What has been made by a model alone (https://cv.iptc.org/newscodes/digitalsourcetype/)."""

_DESCRIPTION = (
    b'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    b'Iptc4xmpExt:DigitalSourceType="' + GENERATED.encode() + b'"/>'
)
_PROPERTY = b"DigitalSourceType"
_END = b"</rdf:RDF>"
_PACKET = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">' + _DESCRIPTION + _END + b'</x:xmpmeta><?xpacket end="w"?>'
)
_LONGEST_PACKET_BYTES = 2**20
_MOST_PARTS = 300_000
"""Segments, chunks or boxes: a PNG of 2 GiB in pieces of 8 KiB has 262,144."""
_PIECE_BYTES = 2**20


class Damaged(Exception):
    """The container is not what its type says."""


class NoRoom(Exception):
    """It is whole, and has no place for the statement: what says something else, or nothing more, must stay."""


class Edit(NamedTuple):
    """`new` takes the place of the `old_bytes` bytes from `at` on."""

    at: int
    old_bytes: int
    new: bytes


class Part(NamedTuple):
    """One segment, chunk or box with its header: where it is, how long, what it is called, and where what it holds begins."""

    at: int
    size_bytes: int
    name: bytes
    content_at: int

    @property
    def end(self) -> int:
        return self.at + self.size_bytes


def edits_of(file: BinaryIO, mime_type: str) -> list[Edit]:
    """What states the source type in a file of one of `TYPES`, in the order of the file. Raises `Damaged` and `NoRoom`."""
    return TYPES[mime_type](file, os.fstat(file.fileno()).st_size)


def write(file: BinaryIO, edits: list[Edit], target: BinaryIO) -> None:
    """Writes the file with the edits to `target`, a piece at a time."""
    file.seek(0)
    for edit in edits:
        _copy(file, target, edit.at - file.tell())
        target.write(edit.new)
        file.seek(edit.old_bytes, os.SEEK_CUR)
    _copy(file, target, os.fstat(file.fileno()).st_size - file.tell())


def _copy(file: BinaryIO, target: BinaryIO, size_bytes: int) -> None:
    while size_bytes > 0:
        piece = file.read(min(_PIECE_BYTES, size_bytes))
        if not piece:
            raise Damaged
        target.write(piece)
        size_bytes -= len(piece)


def _read(file: BinaryIO, at: int, size_bytes: int) -> bytes:
    file.seek(at)
    found = file.read(size_bytes)
    if len(found) < size_bytes:
        raise Damaged
    return found


def _packet_at(file: BinaryIO, at: int, size_bytes: int) -> bytes:
    if size_bytes > _LONGEST_PACKET_BYTES:
        raise NoRoom
    return _read(file, at, size_bytes)


def _with_statement(packet: bytes) -> bytes:
    """A packet that is there, with one description more."""
    if packet.count(_END) != 1 or _PROPERTY in packet:
        raise NoRoom
    return packet.replace(_END, _DESCRIPTION + _END)


def _bounded(parts: Iterator[Part], size_bytes: int) -> Iterator[Part]:
    """Parts that lie in the file, and are not too many."""
    for number, part in enumerate(parts):
        if part.end > size_bytes or number >= _MOST_PARTS:
            raise Damaged
        yield part


# JPEG: an APP1 segment, behind those that readers want first

_APP0, _APP1, _START_OF_SCAN = b"\xe0", b"\xe1", b"\xda"
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_LONGEST_SEGMENT_BYTES = 65_535
"""Its length counts itself, and not the marker."""


def _in_jpeg(file: BinaryIO, size_bytes: int) -> list[Edit]:
    if _read(file, 0, 2) != b"\xff\xd8":
        raise Damaged
    place = None
    for segment in _bounded(_segments(file), size_bytes):
        if segment.name == _START_OF_SCAN:
            break
        start = _read(file, segment.content_at, min(len(_JPEG_XMP), segment.end - segment.content_at))
        if segment.name == _APP1 and start == _JPEG_XMP:
            at = segment.content_at + len(_JPEG_XMP)
            return [Edit(segment.at, segment.size_bytes, _segment(_with_statement(_packet_at(file, at, segment.end - at))))]
        if place is None and segment.name != _APP0 and not (segment.name == _APP1 and start.startswith(b"Exif\0")):
            place = segment.at
    return [Edit(segment.at if place is None else place, 0, _segment(_PACKET))]


def _segments(file: BinaryIO) -> Iterator[Part]:
    """Up to the first scan. Every marker before it has a length (B.1.1.4); fill bytes may stand before any."""
    at = 2
    while True:
        marker = _read(file, at, 4)
        if marker[0] != 0xFF:
            raise Damaged
        if marker[1] == 0xFF:
            at += 1
            continue
        name, length = marker[1:2], int.from_bytes(marker[2:], "big")
        if length < 2 or not (0xC0 <= marker[1] <= 0xFE) or 0xD0 <= marker[1] <= 0xD9:
            raise Damaged
        yield Part(at, 2 + length, name, at + 4)
        if name == _START_OF_SCAN:
            return
        at += 2 + length


def _segment(packet: bytes) -> bytes:
    length = 2 + len(_JPEG_XMP) + len(packet)
    if length > _LONGEST_SEGMENT_BYTES:
        raise NoRoom
    return b"\xff" + _APP1 + length.to_bytes(2, "big") + _JPEG_XMP + packet


# PNG: an iTXt chunk behind the header. Some write the packet as other text, compressed even, and readers take that too.

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_XMP = b"XML:com.adobe.xmp\0"
_PNG_PLAIN = b"\0\0\0\0"
"""Not compressed, by no method, in no language, translated to nothing."""
_PNG_TEXTS = {(b"tEXt", b""): False, (b"zTXt", b"\0"): True, (b"iTXt", _PNG_PLAIN): False, (b"iTXt", b"\1\0\0\0"): True}
"""Whether it is compressed, by the chunk's name and what stands between the keyword and the text."""


def _in_png(file: BinaryIO, size_bytes: int) -> list[Edit]:
    if _read(file, 0, len(_PNG_START)) != _PNG_START:
        raise Damaged
    header = None
    for chunk in _bounded(_png_chunks(file), size_bytes):
        if header is None:
            if chunk.name != b"IHDR":
                raise Damaged
            header = chunk
        if chunk.name == b"IEND":
            return [Edit(header.end, 0, _png_chunk(_PACKET))]
        if chunk.name in {b"tEXt", b"zTXt", b"iTXt"} and (packet := _png_packet(file, chunk)) is not None:
            return [Edit(chunk.at, chunk.size_bytes, _png_chunk(_with_statement(packet)))]
    raise Damaged


def _png_packet(file: BinaryIO, chunk: Part) -> bytes | None:
    """That which a chunk of text holds; None for any other text."""
    size_bytes = chunk.size_bytes - 12
    if _read(file, chunk.content_at, min(len(_PNG_XMP), size_bytes)) != _PNG_XMP:
        return None
    text = _packet_at(file, chunk.content_at + len(_PNG_XMP), size_bytes - len(_PNG_XMP))
    for (name, between), is_compressed in _PNG_TEXTS.items():
        if chunk.name == name and text.startswith(between):
            return _inflated(text[len(between) :]) if is_compressed else text[len(between) :]
    raise NoRoom


def _inflated(compressed: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        packet = stream.decompress(compressed, _LONGEST_PACKET_BYTES)
    except zlib.error as problem:
        raise Damaged from problem
    if not stream.eof:
        raise NoRoom
    return packet


def _png_chunks(file: BinaryIO) -> Iterator[Part]:
    at = len(_PNG_START)
    while True:
        length, name = struct.unpack(">I4s", _read(file, at, 8))
        yield Part(at, 12 + length, name, at + 8)
        at += 12 + length


def _png_chunk(packet: bytes) -> bytes:
    content = b"iTXt" + _PNG_XMP + _PNG_PLAIN + packet
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


# WebP: an "XMP " chunk at the end, and the flag for it in the extended header, which a simple file has to be given

_HAS_XMP, _HAS_ALPHA = 0x04, 0x10
_WEBP_XMP = b"XMP "


def _in_webp(file: BinaryIO, size_bytes: int) -> list[Edit]:
    start, length, form = struct.unpack("<4sI4s", _read(file, 0, 12))
    end = 8 + length + length % 2
    if (start, form) != (b"RIFF", b"WEBP") or end > size_bytes:
        raise Damaged
    chunks = list(_bounded(_riff_chunks(file, end), end))
    if not chunks:
        raise Damaged
    edits = []
    first = chunks[0]
    if first.name == b"VP8X":
        flags = _read(file, first.content_at, 1)[0] if first.size_bytes == 18 else _damaged()
        edits.append(Edit(first.content_at, 1, bytes([flags | _HAS_XMP])))
    else:
        edits.append(Edit(first.at, 0, _riff_chunk(b"VP8X", _extended(file, first))))
    known = next((chunk for chunk in chunks if chunk.name == _WEBP_XMP), None)
    if known is None:
        edits.append(Edit(end, 0, _riff_chunk(_WEBP_XMP, _PACKET)))
    else:
        content_bytes = int.from_bytes(_read(file, known.at + 4, 4), "little")
        edits.append(
            Edit(known.at, known.size_bytes, _riff_chunk(_WEBP_XMP, _with_statement(_packet_at(file, known.content_at, content_bytes))))
        )
    longer = end - 8 + sum(len(edit.new) - edit.old_bytes for edit in edits)
    if longer >= 2**32 - 8:
        raise NoRoom
    return [Edit(4, 4, longer.to_bytes(4, "little")), *edits]


def _riff_chunks(file: BinaryIO, end: int) -> Iterator[Part]:
    at = 12
    while at < end:
        name, length = struct.unpack("<4sI", _read(file, at, 8))
        yield Part(at, 8 + length + length % 2, name, at + 8)
        at += 8 + length + length % 2


def _riff_chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


def _extended(file: BinaryIO, first: Part) -> bytes:
    """The extended header's content for a simple file: flags, and the size of the canvas, which is that of its one picture."""
    if first.name == b"VP8 ":
        head = _read(file, first.content_at, 10)
        if head[3:6] != b"\x9d\x01\x2a":
            raise Damaged
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        flags = _HAS_XMP
    elif first.name == b"VP8L":
        head = _read(file, first.content_at, 5)
        if head[0] != 0x2F:
            raise Damaged
        bits = int.from_bytes(head[1:], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        flags = _HAS_XMP | (_HAS_ALPHA if bits >> 28 & 1 else 0)
    else:
        raise Damaged
    if not width or not height:
        raise Damaged
    return bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


# MP4: a box of its own behind all others, so that no offset changes

_MP4_XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")


def _in_mp4(file: BinaryIO, size_bytes: int) -> list[Edit]:
    boxes = list(_bounded(_boxes(file, size_bytes), size_bytes))
    if not boxes or boxes[0].name != b"ftyp":
        raise Damaged
    for box in boxes:
        if box.name == b"uuid" and _read(file, box.content_at, min(16, box.end - box.content_at)) == _MP4_XMP:
            if box is not boxes[-1]:
                raise NoRoom
            packet = _packet_at(file, box.content_at + 16, box.end - box.content_at - 16)
            return [Edit(box.at, box.size_bytes, _box(_with_statement(packet)))]
    last = boxes[-1]
    # The index of a fragmented film is found from the file's end (ISO/IEC 14496-12, 8.8.11).
    return [Edit(last.at if last.name == b"mfra" else size_bytes, 0, _box(_PACKET))]


def _boxes(file: BinaryIO, size_bytes: int) -> Iterator[Part]:
    at = 0
    while at < size_bytes:
        length, name = struct.unpack(">I4s", _read(file, at, 8))
        content_at = at + 8
        if length == 1:
            length, content_at = int.from_bytes(_read(file, at + 8, 8), "big"), at + 16
        elif length == 0:  # up to the end, wherever that is
            raise NoRoom
        if length < content_at - at:
            raise Damaged
        yield Part(at, length, name, content_at)
        at += length


def _box(packet: bytes) -> bytes:
    return (24 + len(packet)).to_bytes(4, "big") + b"uuid" + _MP4_XMP + packet


def _damaged() -> int:
    raise Damaged


TYPES: Mapping[str, Callable[[BinaryIO, int], list[Edit]]] = {
    "image/jpeg": _in_jpeg,
    "image/png": _in_png,
    "image/webp": _in_webp,
    "video/mp4": _in_mp4,
    "audio/mp4": _in_mp4,
}
