"""Videos: a poster, and if wished a storyboard and a short clip. Nothing decodes a whole film: what is looked at is found by seeking."""

import contextlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ffmpeg
import msgspec

from server.previews import audio, decoders
from server.previews.ffmpeg import VIDEO_CODECS, Report, Stream, measured_seconds, opened, run
from server.previews.images import FRAME
from server.previews.jail import DECODER_LIMITS, MIB, Finished
from server.previews.models import Made, MadeFile, Unmakeable, Wishes
from server.previews.storyboard import add_storyboard

_TALLEST = 4  # times the width that is asked for; beyond, a poster is narrower than that

_GLANCE_WIDTH, _GLANCE_HEIGHT = 48, 27
_GLANCE_BYTES = _GLANCE_WIDTH * _GLANCE_HEIGHT
_MOST_GLANCES = 12
_GLANCE_LIMITS = msgspec.structs.replace(DECODER_LIMITS, cpu_seconds=30)
_POSTER_LIMITS = msgspec.structs.replace(DECODER_LIMITS, file_bytes=112 * MIB)  # 8K, which is `MOST_PIXELS`, at three bytes a pixel
_BLACK, _UNIFORM_RANGE = 32, 10  # of 255

# Otherwise ffmpeg would drop what seeking found before the time that was asked for, and decode on.
_AS_DECODED = {"fps_mode": "passthrough", "threads": 1}

_CLIP_SECONDS, _CLIP_PX = 3, 480

# From PQ or HLG to what all screens show: 203 nits are white (ITU-R BT.2408), and what is brighter is bent, not cut.
_TONE_MAP = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius,zscale=t=bt709:m=bt709:r=tv,format=yuv420p"


class Spot(NamedTuple):
    """Frame `number` of those that are seen from `start_seconds` on: the key frames, or two each second if `every` is set."""

    start_seconds: float = 0.0
    every: bool = False
    number: int = 0

    def input(self, mime_type: str) -> Stream:
        """The file from there on, for no longer than is looked for a poster: a few frames' worth of decoding."""
        seek = {"ss": round(self.start_seconds, 3), "noaccurate_seek": None} if self.start_seconds else {}
        return opened(mime_type, **({"t": 6} if self.every else {"t": 12, "skip_frame": "nokey"}), **seek)

    def filters(self) -> str:
        """Before others."""
        return "fps=2," if self.every else ""


async def make(source: Path, mime_type: str, output: Path, wishes: Wishes) -> Made:
    """Like `making.make`, for the `video/` types in `ffmpeg.DEMUXERS`; those that hold sound only are `audio`'s.

    The poster is the first frame that is neither black nor of one colour, if a few looks find one, or else the film's first frame.
    """
    with tempfile.TemporaryDirectory(dir=output) as directory:
        scratch = Path(directory)
        width_px = max(wishes.image_widths, default=320)
        first = Spot()
        finished = await _shoot(source, mime_type, scratch, first, width_px)
        report = Report.read(finished.stderr)
        if report.video_codec is None and report.audio_codec is not None:
            return await audio.make(source, mime_type, output, wishes)
        glance = _glances(scratch)
        if not glance:
            raise Unmakeable(_why_not(finished, report))
        size = _size(finished.stdout)
        if report.duration_seconds is None:
            report = msgspec.structs.replace(report, duration_seconds=await measured_seconds(source, mime_type, "V:0", scratch))
        spot = first if not is_dull(glance[0]) else await _brighter(source, mime_type, scratch, report.duration_seconds) or first
        if report.is_hdr or spot != first:
            await _shoot(source, mime_type, scratch, spot, width_px, is_hdr=report.is_hdr)
        made = await decoders.shared().make(scratch / "poster.ppm", FRAME, output, msgspec.structs.replace(wishes, animated=False))
        files = list(made.files)
        tone_map = f"{_TONE_MAP}," if report.is_hdr else ""
        if wishes.storyboard and report.duration_seconds is not None:
            files += await add_storyboard(source, mime_type, scratch, output, report.duration_seconds, size, tone_map)
        if wishes.clip:
            files += await _add_clip(source, mime_type, scratch, output, spot, tone_map)
        return Made(
            files=files,
            width=size[0],
            height=size[1],
            duration_seconds=report.duration_seconds,
            frame_rate=report.frame_rate,
            video_codec=report.video_codec,
            audio_codec=report.audio_codec,
            thumbhash=made.thumbhash,
            average_color=made.average_color,
        )


async def _shoot(source: Path, mime_type: str, scratch: Path, spot: Spot, width_px: int, *, is_hdr: bool = False) -> Finished:
    """Writes the frame to `poster.ppm`, small and grey to `glances`, and its description to the standard output.

    No frame, no files; that is for the caller to see.
    """
    pick = f"{spot.filters()}select=eq(n\\,{spot.number}),"
    tone_map = f",{_TONE_MAP}" if is_hdr else ""
    # First to square pixels; ffmpeg itself has turned the frame by then.
    square = f"scale=w='clip(iw*sar,1,{width_px})':h='clip(ow/dar,1,{_TALLEST * width_px})',setsar=1"
    film, one = spot.input(mime_type)["V:0"], {"vframes": 1, **_AS_DECODED}
    outputs = ffmpeg.merge_outputs(
        film.output("poster.ppm", vf=f"{pick}{square}{tone_map},format=rgb24", update=1, **one),
        film.output("glances", vf=pick + _GLANCE, f="rawvideo", **one),
        film.output("pipe:1", vf=pick[:-1], f="framecrc", vcodec="wrapped_avframe", **one),
    )
    return await run(outputs, source, scratch, limits=_POSTER_LIMITS)


_GLANCE = f"scale={_GLANCE_WIDTH}:{_GLANCE_HEIGHT}:flags=area,format=gray"


def _glances(scratch: Path) -> list[bytes]:
    try:
        pixels = (scratch / "glances").read_bytes()
    except FileNotFoundError:
        return []
    return [pixels[at : at + _GLANCE_BYTES] for at in range(0, len(pixels) - _GLANCE_BYTES + 1, _GLANCE_BYTES)]


def is_dull(pixels: bytes) -> bool:
    """Whether a frame, as grey pixels, is black or all the same, but for two pixels in a hundred at each end."""
    ordered = sorted(pixels)
    margin = len(ordered) // 50
    dark, bright = ordered[margin], ordered[-1 - margin]
    return bright < _BLACK or bright - dark < _UNIFORM_RANGE


async def _brighter(source: Path, mime_type: str, scratch: Path, duration_seconds: float | None) -> Spot | None:
    """The first spot that is not dull: among the first key frames, in the first seconds, and from a tenth and a half of the film on."""
    spots = [Spot(), Spot(every=True)]
    if duration_seconds is not None:
        spots += [Spot(duration_seconds * part) for part in (0.1, 0.5)]
    for spot in spots:
        film = spot.input(mime_type)["V:0"]
        look = film.output("glances", vf=spot.filters() + _GLANCE, vframes=_MOST_GLANCES, f="rawvideo", **_AS_DECODED)
        (scratch / "glances").unlink(missing_ok=True)
        with contextlib.suppress(Unmakeable):  # a look that takes too long is not worth it
            await run(look, source, scratch, limits=_GLANCE_LIMITS)
            for number, glance in enumerate(_glances(scratch)):
                if not is_dull(glance):
                    return spot._replace(number=number)
    return None


def _size(description: bytes) -> tuple[int, int]:
    """Width and height of a turned frame in square pixels, from ffmpeg's framecrc header."""
    header = dict(re.findall(rb"^#(dimensions|sar) 0: (\S+)$", description, re.MULTILINE))
    width, height = (int(each) for each in header[b"dimensions"].split(b"x"))
    shape = [int(each) for each in header.get(b"sar", b"0/1").split(b"/")]
    aspect = shape[0] / shape[1] if all(shape) else 1.0
    # Pixels that are no pixels' shape are a mistake, or meant to be.
    return (max(1, round(width * aspect)), height) if 1 / 8 <= aspect <= 8 else (width, height)


def _why_not(finished: Finished, report: Report) -> str:
    if report.video_codec is not None and report.video_codec not in VIDEO_CODECS:
        return "unsupported"
    if re.search(rb"Picture size \d+x\d+ (exceeds|is invalid)|Cannot allocate memory", finished.stderr):
        return "too_large"
    return "damaged"


async def _add_clip(source: Path, mime_type: str, scratch: Path, output: Path, spot: Spot, tone_map: str) -> Sequence[MadeFile]:
    """Three seconds without sound from the poster's neighbourhood, playable everywhere, with nothing of the file's metadata."""
    seek = {"ss": round(spot.start_seconds, 3)} if spot.start_seconds else {}
    box = f"scale=w='trunc(min(1,min({_CLIP_PX}/(iw*sar),{_CLIP_PX}/ih))*iw*sar/2)*2':h='max(2,trunc(ow/dar/2)*2)',setsar=1"
    film = opened(mime_type, t=_CLIP_SECONDS, **seek)["V:0"]
    clip = film.output(
        "clip.mp4",
        vf=f"{box},{tone_map}format=yuv420p",
        r=30,
        vcodec="libx264",
        preset="veryfast",
        crf=28,
        threads=1,
        movflags="+faststart",
        map_metadata=-1,
        map_chapters=-1,
    )
    finished = await run(clip, source, scratch)
    made = scratch / "clip.mp4"
    if finished.status != 0 or not made.exists():
        return []
    made.rename(output / "clip.mp4")
    return [MadeFile(variant="clip", name="clip.mp4", mime_type="video/mp4")]
