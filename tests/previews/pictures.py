"""Images to preview, made with libvips in the test's own process, and how alike two of them are."""

import struct
import zlib
from typing import Any

import pyvips


def photo(width: int = 600, height: int = 400) -> Any:
    """Soft colours everywhere, a red square top left and a blue one bottom right: it shows which way is up."""
    x, y = (pyvips.Image.xyz(width, height)[band] for band in range(2))
    red = (x * (360 / width)).sin() * 70 + 128
    green = (y * (300 / height)).cos() * 60 + 120
    blue = ((x + y) * (540 / (width + height))).sin() * 50 + 110
    image = red.bandjoin([green, blue]).cast("uchar").copy(interpretation="srgb")
    side = max(1, min(width, height) // 5)
    image = image.draw_rect([220, 30, 30], 0, 0, side, side, fill=True)
    return image.draw_rect([20, 40, 210], width - side, height - side, side, side, fill=True).copy_memory()


def moving(frames: int, width: int = 100, height: int = 60, delay_ms: int = 100) -> Any:
    """Frames of plain greys that get lighter, one above the other."""
    pages = [(pyvips.Image.black(width, height, bands=3) + 10 + 240 * number / frames).cast("uchar") for number in range(frames)]
    image = pyvips.Image.arrayjoin(pages, across=1).copy(interpretation="srgb")
    image.set_type(pyvips.GValue.gint_type, "page-height", height)
    image.set_type(pyvips.GValue.array_int_type, "delay", [delay_ms] * frames)
    image.set_type(pyvips.GValue.gint_type, "loop", 0)
    return image


def reduced_in_full(image: Any, width: int) -> Any:
    """The reference: all pixels, in linear light, by one high-quality resize; none of libvips' short cuts."""
    scale = min(1.0, width / image.width)
    return (
        image.colourspace("scrgb")
        .resize(scale, vscale=max(1, round(image.height * scale)) / image.height)
        .colourspace("srgb")
        .cast("uchar")
    )


def difference(one: Any, other: Any) -> float:
    """The mean of CIEDE2000 over all pixels: below 1 the eye sees none."""
    assert (one.width, one.height) == (other.width, other.height)
    return float(one.colourspace("lab").dE00(other.colourspace("lab")).avg())


def png_that_claims(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of so many pixels by its header, in RGB with 8 bits; all of them black unless `data` is given."""
    scanlines = zlib.compressobj(9)
    packed = data or b"".join(scanlines.compress(bytes(3 * width + 1)) for _ in range(min(height, 100))) + scanlines.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b"")]
    written = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def gif_of(frames: int) -> bytes:
    """So many frames of one pixel."""
    frame = b"\x21\xf9\x04\0\x0a\0\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    return b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


def webp_that_claims(width: int, height: int) -> bytes:
    """A WebP whose header alone is whole (VP8X, with a lossless image of that size)."""
    bits = (width - 1) | (height - 1) << 14
    body = b"\x2f" + struct.pack("<I", bits) + bytes(20)
    chunks = b"WEBPVP8L" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def heic() -> bytes:
    """A HEIF file whose one item is HEVC, by its boxes (ISO/IEC 23008-12); the coded bytes are none."""
    coded = struct.pack(">I", 8) + b"\x26\x01" + bytes(6)
    hvcc = b"\x01\x01\x60\0\0\0\x90\0\0\0\0\0\x5d\xf0\0\xfc\xfd\xf8\xf8\0\0\x0f\0"

    def box(kind: bytes, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return struct.pack(">I", 8 + len(body)) + kind + body

    def full(kind: bytes, *parts: bytes, version: int = 0) -> bytes:
        return box(kind, bytes([version, 0, 0, 0]), *parts)

    def meta(offset: int) -> bytes:
        return full(
            b"meta",
            full(b"hdlr", bytes(4), b"pict", bytes(13)),
            full(b"pitm", struct.pack(">H", 1)),
            full(b"iloc", b"\x44\0", struct.pack(">HHHHII", 1, 1, 0, 1, offset, len(coded))),
            full(b"iinf", struct.pack(">H", 1), full(b"infe", struct.pack(">HH", 1, 0), b"hvc1\0", version=2)),
            box(
                b"iprp",
                box(b"ipco", box(b"hvcC", hvcc), full(b"ispe", struct.pack(">II", 64, 64)), full(b"pixi", b"\x03\x08\x08\x08")),
                full(b"ipma", struct.pack(">IHB", 1, 1, 3), b"\x81\x82\x03"),
            ),
        )

    start = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", coded)
