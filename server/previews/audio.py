"""Sound: how long it is, its waveform as numbers and as a picture, and its cover where there is one."""

import math
import re
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from server.previews import decoders
from server.previews.ffmpeg import AUDIO_CODECS, Report, measured_seconds, opened, run, seconds_done
from server.previews.models import Made, MadeFile, Unmakeable, Wishes

PEAKS = 1000
"""About how many a waveform has, however long the sound."""

_MOST_WAVEFORM_SECONDS = 12 * 3600  # of which decoding takes a minute or less
_UNKNOWN_LENGTH_WINDOW_SECONDS = 1.0
_WIDTH, _HEIGHT = 640, 120
_WAVE_COLOR = (0x4F, 0x6D, 0x8F)
_COVERS = {"mjpeg": "image/jpeg", "png": "image/png"}


async def make(source: Path, mime_type: str, output: Path, wishes: Wishes) -> Made:
    """Like `making.make`, for sound in any of the types in `ffmpeg.DEMUXERS`.

    Sound of more than twelve hours gets no waveform, only its facts.
    """
    with tempfile.TemporaryDirectory(dir=output) as directory:
        scratch = Path(directory)
        looked = await run(opened(mime_type)["a:0"].output("-", f="null", c="copy", t=0.1), source, scratch)
        report = Report.read(looked.stderr)
        if report.audio_codec is None:
            raise Unmakeable("damaged" if report.video_codec is None else "unsupported")
        if report.audio_codec not in AUDIO_CODECS:
            raise Unmakeable("unsupported")
        if report.sample_rate is None:
            raise Unmakeable("damaged")
        if report.duration_seconds is None or report.is_estimate:
            report = msgspec.structs.replace(report, duration_seconds=await measured_seconds(source, mime_type, "a:0", scratch))
        made = Made(duration_seconds=report.duration_seconds, audio_codec=report.audio_codec)
        if (report.duration_seconds or 0) <= _MOST_WAVEFORM_SECONDS:
            made = await _with_waveform(source, mime_type, scratch, output, wishes, report, made)
        if report.cover_codec in _COVERS:
            made = await _with_cover(source, mime_type, scratch, output, wishes, _COVERS[report.cover_codec], made)
        return made


async def _with_waveform(source: Path, mime_type: str, scratch: Path, output: Path, wishes: Wishes, report: Report, made: Made) -> Made:
    """`peaks.json` is what BBC's audiowaveform writes (its format version 2): pairs of the lowest and highest sample as 8-bit numbers."""
    assert report.sample_rate is not None  # noqa: S101 - the caller has seen to it
    window_seconds = report.duration_seconds / PEAKS if report.duration_seconds else _UNKNOWN_LENGTH_WINDOW_SECONDS
    samples = max(1, math.ceil(window_seconds * report.sample_rate))
    sound = opened(mime_type)["a:0"]
    statistics = "metadata=1:reset=1:measure_perchannel=none:measure_overall=Min_level+Max_level"
    decode = sound.output(
        "-",
        f="null",
        # As floats, so that the levels go from -1 to 1 whatever the sound is stored as.
        af=f"aformat=sample_fmts=fltp,asetnsamples=n={samples}:p=0,astats={statistics},ametadata=print:file=levels",
        t=_MOST_WAVEFORM_SECONDS + 1,
        threads=1,
    ).global_args("-progress", "pipe:1")
    finished = await run(decode, source, scratch)
    levels = scratch / "levels"
    pairs = _pairs(levels.read_text(errors="replace")) if levels.exists() else []
    if not pairs:
        raise Unmakeable("damaged")
    while len(pairs) > 2 * PEAKS:
        pairs, samples = _halved(pairs), samples * 2
    (output / "peaks.json").write_bytes(
        msgspec.json.encode(
            {
                "version": 2,
                "channels": 1,
                "sample_rate": report.sample_rate,
                "samples_per_pixel": samples,
                "bits": 8,
                "length": len(pairs),
                "data": [level for pair in pairs for level in pair],
            }
        )
    )
    (scratch / "waveform.png").write_bytes(_drawn(pairs))
    picture = await decoders.shared().make(
        scratch / "waveform.png", "image/png", scratch, Wishes(image_widths=(_WIDTH,), quality=wishes.quality, animated=False)
    )
    (scratch / picture.files[0].name).rename(output / "waveform.webp")
    return msgspec.structs.replace(
        made,
        duration_seconds=seconds_done(finished.stdout) or made.duration_seconds,
        files=[
            MadeFile(variant="peaks", name="peaks.json", mime_type="application/json"),
            MadeFile(variant="waveform", name="waveform.webp", mime_type="image/webp", width=_WIDTH, height=_HEIGHT),
        ],
    )


async def _with_cover(source: Path, mime_type: str, scratch: Path, output: Path, wishes: Wishes, cover_type: str, made: Made) -> Made:
    """The cover's bytes are only copied out here; a cover that cannot be decoded is as none."""
    cover = opened(mime_type)["disp:attached_pic"].output("cover", f="image2pipe", c="copy", vframes=1)
    await run(cover, source, scratch)
    if not (scratch / "cover").exists():
        return made
    try:
        picture = await decoders.shared().make(scratch / "cover", cover_type, output, wishes)
    except Unmakeable:
        return made
    return msgspec.structs.replace(made, files=made.files + picture.files, thumbhash=picture.thumbhash, average_color=picture.average_color)


_LEVELS = re.compile(r"^lavfi\.astats\.Overall\.M(?:in|ax)_level=(\S+)$", re.MULTILINE)


def _pairs(printed: str) -> list[tuple[int, int]]:
    """Lowest and highest level of each window, from -128 to 127."""
    levels = [_level(each) for each in _LEVELS.findall(printed)]
    return [(min(pair), max(pair)) for pair in zip(levels[::2], levels[1::2], strict=False)]


def _level(printed: str) -> int:
    try:
        level = float(printed)
    except ValueError:
        return 0
    return max(-128, min(127, round(level * 127))) if math.isfinite(level) else 0


def _halved(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(min(low for low, _ in each), max(high for _, high in each)) for each in (pairs[at : at + 2] for at in range(0, len(pairs), 2))]


def _drawn(pairs: Sequence[tuple[int, int]]) -> bytes:
    """The waveform as PNG, on a transparent ground."""
    columns = [pairs[x * len(pairs) // _WIDTH : max((x + 1) * len(pairs) // _WIDTH, x * len(pairs) // _WIDTH + 1)] for x in range(_WIDTH)]
    spans = []
    for column in columns:
        low, high = min(pair[0] for pair in column), max(pair[1] for pair in column)
        top = round((127 - high) / 255 * (_HEIGHT - 1))
        spans.append((top, max(top, round((127 - low) / 255 * (_HEIGHT - 1)))))
    ink, paper = bytes((*_WAVE_COLOR, 255)), bytes(4)
    rows = b"".join(b"\0" + b"".join(ink if top <= y <= bottom else paper for top, bottom in spans) for y in range(_HEIGHT))
    header = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
