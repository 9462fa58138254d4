"""A storyboard: small frames of a film in one image, and a WebVTT file that says which part of it shows which time."""

from itertools import pairwise
from pathlib import Path

from server.previews.ffmpeg import opened, opened_raw, run
from server.previews.models import MadeFile

_MOST_FRAMES, _COLUMNS, _FRAME_PX = 25, 5, 160


async def add_storyboard(
    source: Path, mime_type: str, scratch: Path, output: Path, duration_seconds: float, size: tuple[int, int], tone_map: str
) -> list[MadeFile]:
    """Writes `storyboard.webp` and `storyboard.vtt`. Each frame is the key frame before the middle of its time, found by seeking."""
    scale = _FRAME_PX / max(size)
    width, height = (max(2, 2 * round(each * scale / 2)) for each in size)
    count = min(_MOST_FRAMES, max(1, int(duration_seconds)))
    frame_bytes = width * height * 3 // 2
    frames: list[bytes] = []
    for number in range(count):
        at = round((number + 0.5) * duration_seconds / count, 3)
        film = opened(mime_type, ss=at, noaccurate_seek=None, skip_frame="nokey")["V:0"]
        frame = scratch / "frame"
        frame.unlink(missing_ok=True)
        await run(
            film.output(
                "frame", vf=f"scale={width}:{height},{tone_map}format=yuv420p", f="rawvideo", vframes=1, fps_mode="passthrough", threads=1
            ),
            source,
            scratch,
        )
        pixels = frame.read_bytes() if frame.exists() else b""
        if len(pixels) == frame_bytes:
            frames.append(pixels)
        elif frames:  # beyond the last key frame that can be found, or damaged: what came before stays on
            frames.append(frames[-1])
    if len(frames) < count:
        return []
    (scratch / "frames").write_bytes(b"".join(frames))
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    sprite = opened_raw(width, height).output(
        "storyboard.webp", vf=f"tile={columns}x{rows}", vframes=1, vcodec="libwebp", quality=75, threads=1
    )
    finished = await run(sprite, scratch / "frames", scratch)
    if finished.status != 0:
        raise RuntimeError(f"no storyboard: {finished.stderr[-300:].decode(errors='replace')}")
    (scratch / "storyboard.webp").rename(output / "storyboard.webp")
    (output / "storyboard.vtt").write_text(_index(count, duration_seconds, columns, width, height))
    return [
        MadeFile(variant="storyboard", name="storyboard.webp", mime_type="image/webp", width=columns * width, height=rows * height),
        MadeFile(variant="storyboard_index", name="storyboard.vtt", mime_type="text/vtt"),
    ]


def _index(count: int, duration_seconds: float, columns: int, width: int, height: int) -> str:
    """A cue for each frame (WebVTT), whose text is a media fragment of the image (Media Fragments URI 1.0, 4.2.2)."""
    cues = ["WEBVTT"]
    borders = [number * duration_seconds / count for number in range(count + 1)]
    for number, (begin, end) in enumerate(pairwise(borders)):
        x, y = number % columns * width, number // columns * height
        cues.append(f"{_stamp(begin)} --> {_stamp(end)}\nstoryboard.webp#xywh={x},{y},{width},{height}")
    return "\n\n".join(cues) + "\n"


def _stamp(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 3_600_000:02}:{milliseconds // 60_000 % 60:02}:{milliseconds // 1000 % 60:02}.{milliseconds % 1000:03}"
