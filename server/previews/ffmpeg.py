"""How Coffer calls ffmpeg on a file that nobody vouches for, and reads what it says of it.

The jail already keeps ffmpeg from everything but the file. These options keep it from trying: the file's type picks the one demuxer, nested
ones included; only the inherited descriptor can be opened; only the decoders named here run; and there are caps on streams and pixels.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg
import msgspec

from server.previews import jail
from server.previews.commands import INPUT_FD
from server.previews.confinement import Limits
from server.previews.jail import DECODER_LIMITS, Finished
from server.previews.models import Unmakeable

Stream = Any
"""ffmpeg-python has no types."""

_ISO = ("mov", {"enable_drefs": 0, "use_absolute_path": 0})
DEMUXERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("video/mp4", "video/quicktime", "video/3gpp", "video/3gpp2", "audio/mp4"), _ISO),
    **dict.fromkeys(("video/webm", "video/x-matroska", "audio/webm", "audio/x-matroska"), ("matroska", {})),
    **dict.fromkeys(("video/ogg", "audio/ogg"), ("ogg", {})),
    "video/x-msvideo": ("avi", {}),
    "audio/mpeg": ("mp3", {}),
    "audio/wav": ("wav", {}),
    "audio/flac": ("flac", {}),
    "audio/aac": ("aac", {}),
}
"""The one demuxer of each type, with its own options. Those of ISO media keep it from other files that the file names."""

VIDEO_CODECS = frozenset({"av1", "h263", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "prores", "theora", "vp8", "vp9"})
_VIDEO_DECODERS = sorted(VIDEO_CODECS - {"av1"} | {"libdav1d"})
_AUDIO_DECODERS = [
    *("aac", "ac3", "adpcm_ima_wav", "adpcm_ms", "alac", "amrnb", "amrwb", "eac3", "flac", "mp2float", "mp3float", "opus", "vorbis"),
    *("pcm_alaw", "pcm_f32be", "pcm_f32le", "pcm_f64be", "pcm_f64le", "pcm_mulaw", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le"),
    *("pcm_s32be", "pcm_s32le", "pcm_s8", "pcm_u8"),
]
AUDIO_CODECS = frozenset(name.removesuffix("float") for name in _AUDIO_DECODERS) - {"amrnb", "amrwb"} | {"amr_nb", "amr_wb"}

MOST_PIXELS = 8192 * 4352
"""Of a frame: 8K with a margin for whole blocks. In 10 bits it takes 107 MB, and H.265 keeps at least six of that size."""

MOST_STREAMS = 100

_MOST_SECONDS = 1e7  # four months; what claims to be longer has no known duration


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What ffmpeg found in a file. `video_codec` is that of moving pictures, not of a cover."""

    duration_seconds: float | None = None
    frame_rate: float | None = None
    video_codec: str | None = None
    audio_codec: str | None = None
    sample_rate: int | None = None
    cover_codec: str | None = None
    is_estimate: bool = False
    """Whether the duration is only guessed, from the bit rate of the file's beginning."""
    is_hdr: bool = False

    @classmethod
    def read(cls, stderr: bytes) -> "Report":
        """Reads the summary that ffmpeg writes about its input (av_dump_format), the same since 2012 but for what stands in brackets.

        A file that forges lines of it, by metadata with line breaks, lies about nobody but itself: all are bounded numbers and words.
        """
        text = stderr.decode(errors="replace")
        found: dict[str, Any] = {"is_estimate": "Estimating duration from bitrate" in text}
        text = text[max(0, text.find("Input #0, ")) :].partition("\nStream mapping:")[0].partition("\nOutput #0, ")[0]
        if match := _DURATION.search(text):
            seconds = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
            found["duration_seconds"] = seconds if 0 < seconds < _MOST_SECONDS else None
        for kind, codec, rest in _STREAM.findall(text):
            if kind == "Audio":
                if "audio_codec" not in found:
                    found["audio_codec"] = codec
                    found["sample_rate"] = int(match[1]) if (match := _SAMPLE_RATE.search(rest)) else None
            elif "(attached pic)" in rest or "(timed thumbnails)" in rest:
                found.setdefault("cover_codec", codec)
            elif "video_codec" not in found:
                found["video_codec"] = codec
                found["is_hdr"] = "smpte2084" in rest or "arib-std-b67" in rest
                found["frame_rate"] = float(match[1]) * (1000 if match[2] else 1) if (match := _FRAME_RATE.search(rest)) else None
        return cls(**found)


_DURATION = re.compile(r"^  Duration: (\d{2,5}):(\d\d):(\d\d\.\d\d), ", re.MULTILINE)
_STREAM = re.compile(r"^  Stream #0:\d+(?:\[0x[0-9a-f]+\])?(?:\([^)\n]*\))?: (Video|Audio): (\w{1,32})(.*)$", re.MULTILINE)
_SAMPLE_RATE = re.compile(r", (\d{1,7}) Hz")
_FRAME_RATE = re.compile(r", (\d{1,6}(?:\.\d\d?)?)(k?) fps")


def opened(mime_type: str, **options: Any) -> Stream:
    """The file as ffmpeg's input; `options` are further ones of it. A `mime_type` that is not in `DEMUXERS` raises `Unmakeable`."""
    if mime_type not in DEMUXERS:
        raise Unmakeable("unsupported")
    demuxer, special = DEMUXERS[mime_type]
    return ffmpeg.input(
        "fd:",
        f=demuxer,
        format_whitelist=demuxer,
        codec_whitelist=",".join([*_VIDEO_DECODERS, *_AUDIO_DECODERS]),
        max_streams=MOST_STREAMS,
        max_pixels=MOST_PIXELS,
        **special,
        **_COMMON,
        **options,
    )


def opened_raw(width: int, height: int) -> Stream:
    """As input, frames that an earlier run wrote as `rawvideo` in yuv420p."""
    return ffmpeg.input("fd:", f="rawvideo", pix_fmt="yuv420p", s=f"{width}x{height}", **_COMMON)


_COMMON = {"protocol_whitelist": "fd", "threads": 1, "fd": INPUT_FD}


async def run(outputs: Stream, source: Path, scratch: Path, *, limits: Limits = DECODER_LIMITS) -> Finished:
    """Runs ffmpeg in the jail, in the directory `scratch`. Raises what `jail.run` raises."""
    command = outputs.global_args("-nostdin", "-hide_banner", "-nostats", "-y", "-filter_threads", "1").compile(cmd=_program())
    return await jail.run(command, source, scratch, limits=limits)


async def measured_seconds(source: Path, mime_type: str, stream: str, scratch: Path) -> float | None:
    """Reads through a stream whose file does not say how long it is, as a live recording does not; decodes nothing."""
    outputs = opened(mime_type)[stream].output("-", f="null", c="copy").global_args("-progress", "pipe:1")
    with contextlib.suppress(Unmakeable):
        return seconds_done((await run(outputs, source, scratch)).stdout)
    return None


def seconds_done(progress: bytes) -> float | None:
    """How far ffmpeg came, by what it writes for `-progress`."""
    times_us = re.findall(rb"^out_time_us=(\d{1,13})$", progress, re.MULTILINE)
    return int(times_us[-1]) / 1e6 or None if times_us else None


def _program() -> str:
    return str(imageio_ffmpeg.get_ffmpeg_exe())
