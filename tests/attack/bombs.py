"""3: little files that unpack to much: each is refused or previewed within its caps, and those who use the server hardly notice."""

import statistics
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.attack.previewing import stored, worker_beside
from tests.attack.target import Tally, Target
from tests.attack.wire import Wire, request
from tests.previews.media import TEST_CARD, TONE, ffmpeg, record
from tests.previews.pictures import gif_of, photo, png_that_claims, webp_that_claims

SETTLE_SECONDS = 75
MOST_RESIDENT_BYTES = 640 * 2**20
"""Less than half of what the sandbox would still allow: none of these has a claim to more."""
WORST_MEDIAN_RATIO = 3.0
LEAST_ASKED = 200
MIB = 2**20

TOO_LARGE = ("failed too_large",)
REFUSED = ("failed damaged", "failed too_large", "failed too_slow", "unsupported unsupported")
ANY = ("ready None", *REFUSED)
"""Whose picture is small, whatever stands beside it: it may be shown."""


def attack(target: Target, tally: Tally) -> str:
    directory = target.scratch / "bombs"
    directory.mkdir()
    made = {what: (body(directory), expected) for what, (body, expected) in target.some(BOMBS.items(), 5)}
    with target.user("bomber") as client:
        before = _measured(target, tally, lambda count: count < LEAST_ASKED)
        ids = {stored(client, body, what): (what, expected) for what, (body, expected) in made.items()}
        with worker_beside(target) as worker:
            began = time.monotonic()
            during = _measured(
                target,
                tally,
                lambda count: (count % 50 or worker.pending("bomber") > 0) and time.monotonic() < began + SETTLE_SECONDS,
            )
            seconds = time.monotonic() - began
            tally.check(worker.settle("bomber", 0.0), f"{worker.pending('bomber')} previews are not settled after {seconds:.0f} s")
            found = worker.found("bomber")
            peak_bytes = worker.stop(tally)
    for file_id, (what, expected) in ids.items():
        outcome = f"{found[file_id].state} {found[file_id].reason}"
        tally.check(outcome in expected, f"{what}: {outcome}")
    tally.check(peak_bytes <= MOST_RESIDENT_BYTES, f"a decoder had {peak_bytes / MIB:.0f} MiB resident")
    (median, p99), (median_before, p99_before) = during, before
    if target.thorough:  # a short run has too few requests to judge by
        tally.check(median <= WORST_MEDIAN_RATIO * median_before, f"others' requests take {median / median_before:.1f} times as long")
    refused = sum(found[each].state != "ready" for each in ids)
    return (
        f"{refused} of {len(ids)} refused, the others shown, all in {seconds:.0f} s with at most {peak_bytes / MIB:.0f} MiB; "
        f"others' time is that of before times {median / median_before:.2f} (p99 {p99 / p99_before:.2f})"
    )


def _measured(target: Target, tally: Tally, goes_on: Callable[[int], object]) -> tuple[float, float]:
    """Median and 99th percentile of the seconds that another user's lists take."""
    sent = request("GET", "/api/files?limit=20", target.headers_of("ada"))
    seconds: list[float] = []
    with closing(Wire(target.server.host, target.server.port)) as wire:
        while goes_on(len(seconds)):
            began = time.perf_counter()
            answer = wire.expect(sent)
            seconds.append(time.perf_counter() - began)
            tally.check(answer.status == 200, f"another user's list: {answer.status}")
    return statistics.median(seconds), statistics.quantiles(seconds, n=100)[-1]


# Images


def _png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    written = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in written
    )


def _zeros(length: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(min(MIB, length - at))) for at in range(0, length, MIB)) + packer.flush()


_PIXEL = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
_PIXELS = zlib.compress(b"".join(b"\0" + bytes(range(48)) for _ in range(16)))


def _whole_png(directory: Path) -> bytes:
    """Not only its header: all of its 2,500,000,000 pixels are there."""
    side = 50_000
    return _png(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), (b"IDAT", _zeros(side * (side // 8 + 1))))


def _apng(directory: Path) -> bytes:
    frames = 10_000
    control = struct.pack(">IIIIIHHBB", 0, 16, 16, 0, 0, 1, 100, 0, 0)
    rest = [
        each
        for number in range(1, frames)
        for each in ((b"fcTL", struct.pack(">I", 2 * number - 1) + control[4:]), (b"fdAT", struct.pack(">I", 2 * number) + _PIXELS))
    ]
    return _png(_PIXEL, (b"acTL", struct.pack(">II", frames, 0)), (b"fcTL", control), (b"IDAT", _PIXELS), *rest)


def _png_with(kind: bytes, head: bytes, times: int) -> bytes:
    """Chunks of which each unpacks to 100 MB."""
    return _png(_PIXEL, *[(kind, head + _zeros(100_000_000))] * times, (b"IDAT", _PIXELS))


def _jpeg(**options: object) -> bytes:
    return bytes(photo(200, 150).jpegsave_buffer(Q=80, **options))


def _jpeg_with(marker: int, body: bytes, times: int) -> bytes:
    content = _jpeg()
    return content[:2] + (b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body) * times + content[2:]


def _jpeg_of_scans(directory: Path) -> bytes:
    """A progressive JPEG of 8,000 x 8,000 whose last scan, which refines what is there, comes 5,000 times."""
    import pyvips  # noqa: PLC0415

    content = bytes(pyvips.Image.black(8000, 8000).jpegsave_buffer(Q=50, interlace=True))
    last = content.rindex(b"\xff\xda")
    scan = content[last:-2]
    return content[:-2] + scan * min(5_000, 5 * MIB // len(scan)) + content[-2:]


def _exif(directory: Path) -> bytes:
    """Directories of tags that follow each other in a circle, whose entries claim four thousand million values each."""
    entries = b"".join(struct.pack("<HHII", 0x9286, 7, 0xFFFFFFF0, 26) for _ in range(2_000))
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2_000) + entries + struct.pack("<I", 8)
    return _jpeg_with(0xE1, b"Exif\0\0" + tiff, 60)


def _xmp(directory: Path) -> bytes:
    """The billion laughs, sixty times over."""
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    text = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]><x:xmpmeta xmlns:x="adobe:ns:meta/">&l11;</x:xmpmeta>'
    return _jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text.encode(), 60)


def _jpeg_of_size(directory: Path) -> bytes:
    content = _jpeg()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", 65_500, 65_500) + content[at + 4 :]


def _avif(directory: Path) -> bytes:
    content = bytes(photo(64, 64).heifsave_buffer(compression="av1", effort=0))
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", 60_000, 60_000) + content[at + 8 :]


# Films and sounds

_H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")


def _day(directory: Path) -> bytes:
    return record(directory / "day.mp4", "testsrc2=s=64x64:r=1/30:d=86400", *_H264, "-g", "10").read_bytes()


def _silent_day(directory: Path) -> bytes:
    return record(directory / "day.flac", "anullsrc=r=1000:cl=mono:d=86400", "-frame_size", "1024").read_bytes()


def _h264_of_16k(directory: Path) -> bytes:
    """By its sequence parameters 16,384 x 8,192, the most that ffmpeg's muxer takes; there is no picture in it that could be."""

    def bits(value: int) -> str:  # Exp-Golomb (H.264, 9.1)
        code = f"{value + 1:b}"
        return "0" * (len(code) - 1) + code

    # Baseline, level 6.2; ids, frame numbers and order counts short; one reference; 1,024 by 512 macroblocks; frames only; no cropping.
    fields = [0, 0, 0, 0, 1]
    text = "".join(map(bits, fields)) + "0" + bits(1023) + bits(511) + "1" + "1" + "0" + "0" + "1"
    text += "0" * (-len(text) % 8)
    sequence = bytes([0x67, 66, 0, 62]) + int(text, 2).to_bytes(len(text) // 8, "big")
    start = b"\0\0\0\1"
    raw = directory / "a.h264"
    raw.write_bytes(
        (start + sequence + start + bytes([0x68, 0xCE, 0x3C, 0x80]) + start + bytes([0x65, 0x88, 0x84]) + b"\x21\xa0" * 500) * 3
    )
    ffmpeg("-v", "error", "-f", "h264", "-i", raw, "-c", "copy", directory / "16k.mp4")
    return (directory / "16k.mp4").read_bytes()


def _vp9_of_64k(directory: Path) -> bytes:
    film = bytearray(record(directory / "a.webm", TEST_CARD, "-c:v", "libvpx-vp9", "-cpu-used", "8", "-frames:v", "1").read_bytes())
    at = film.index(bytes.fromhex("498342"))  # a key frame's sync code; half a byte on are two 16-bit numbers
    film[at + 3 : at + 8] = bytes([film[at + 3] | 0x0F]) + b"\xff\xff\xff" + bytes([film[at + 7] | 0xF0])
    return bytes(film)


def _streams(directory: Path) -> bytes:
    sound = record(directory / "tone.m4a", TONE, "-t", "0.1")
    ffmpeg("-i", sound, *["-map", "0:a"] * 1_000, "-c", "copy", directory / "streams.mp4")
    return (directory / "streams.mp4").read_bytes()


def _chapters(directory: Path) -> bytes:
    text = ";FFMETADATA1\n" + "".join(f"[CHAPTER]\nTIMEBASE=1/1000\nSTART={n}\nEND={n + 1}\ntitle={n}\n" for n in range(20_000))
    (directory / "chapters.txt").write_text(text)
    film = record(directory / "short.mp4", TEST_CARD, *_H264)
    ffmpeg("-i", film, "-i", directory / "chapters.txt", "-map_metadata", "1", "-c", "copy", directory / "chapters.mkv")
    return (directory / "chapters.mkv").read_bytes()


def _subtitles(directory: Path) -> bytes:
    (directory / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nha\n")
    film = record(directory / "plain.mp4", TEST_CARD, *_H264)
    ffmpeg("-i", film, "-i", directory / "a.srt", "-map", "0:v", *["-map", "1:s"] * 999, "-c:v", "copy", directory / "subtitles.mkv")
    return (directory / "subtitles.mkv").read_bytes()


BOMBS: dict[str, tuple[Callable[[Path], bytes], tuple[str, ...]]] = {
    "a PNG of 50,000 x 50,000, every pixel there": (_whole_png, TOO_LARGE),
    "a GIF of 10,000 frames": (lambda _: gif_of(10_000), TOO_LARGE),
    "a film of a day": (_day, ANY),
    "a PNG of 50,000 x 50,000 in colour": (lambda _: png_that_claims(50_000, 50_000), TOO_LARGE),
    "a GIF of 65,535 x 65,535": (lambda _: gif_of(1).replace(b"\x01\0\x01\0", b"\xff\xff\xff\xff"), TOO_LARGE),
    "a WebP of 16,383 x 16,383": (lambda _: webp_that_claims(16_383, 16_383), TOO_LARGE),
    "an AVIF of 60,000 x 60,000": (_avif, TOO_LARGE),
    "a JPEG of 65,500 x 65,500": (_jpeg_of_size, TOO_LARGE),
    "an APNG of 10,000 frames": (_apng, ANY),
    "a PNG whose colour profile unpacks to 100 MB": (lambda _: _png_with(b"iCCP", b"a\0\0", 1), ANY),
    "a PNG with 2 GB of comments": (lambda _: _png_with(b"zTXt", b"a\0\0", 20), ANY),
    "a JPEG of thousands of scans": (_jpeg_of_scans, REFUSED),
    "a JPEG with Exif that goes in circles": (_exif, ANY),
    "a JPEG with a billion laughs for XMP": (_xmp, ANY),
    "a silence of a day": (_silent_day, ANY),
    "H.264 of 16,384 x 8,192": (_h264_of_16k, REFUSED),
    "VP9 of 65,536 x 65,536": (_vp9_of_64k, REFUSED),
    "a film of 1,000 streams": (_streams, REFUSED),
    "a film of 20,000 chapters": (_chapters, ANY),
    "a film of 999 subtitles": (_subtitles, ANY),
}
