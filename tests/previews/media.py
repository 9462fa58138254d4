"""Films and sounds made on the spot by the very ffmpeg that will read them, and a look at what became of them."""

import asyncio
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pyvips

from server.previews import making
from server.previews.models import Made, Wishes

TEST_CARD = "testsrc2=s=320x180:r=25:d=2"
TONE = "sine=f=440:r=44100:d=2"


def ffmpeg(*arguments: str | Path) -> str:
    """Runs ffmpeg as nobody should with strangers' files; returns what it said."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace").stderr


def record(path: Path, source: str = TEST_CARD, *options: str, sound: str | None = None) -> Path:
    """Encodes `source` (a description of libavfilter's) into the file `path` and returns it; `options` as on ffmpeg's command line."""
    inputs = ["-f", "lavfi", "-i", source, *(["-f", "lavfi", "-i", sound] if sound else [])]
    ffmpeg("-v", "error", *inputs, *options, path)
    return path


def make(source: Path, mime_type: str, wishes: Wishes | None = None) -> tuple[Made, Path]:
    """The previews, as the worker has them made, and the directory where they are. It holds nothing else."""
    output = source.with_name(source.name + "-previews")
    output.mkdir()
    made = asyncio.run(making.make(source, mime_type, output, wishes or Wishes()))
    assert sorted(path.name for path in output.iterdir()) == sorted(each.name for each in made.files)
    return made, output


def color_at(image: Path, x: float, y: float) -> tuple[int, ...]:
    """Red, green and blue at a place given in parts of the image's width and height."""
    picture = pyvips.Image.new_from_file(str(image))
    return tuple(round(each) for each in picture.getpoint(int(x * picture.width), int(y * picture.height))[:3])


def is_near(color: tuple[int, ...], other: tuple[int, ...], most: int = 40) -> bool:
    """Whether no channel differs by more than `most`: lossy codecs and their colours are not exact."""
    return all(abs(one - two) <= most for one, two in zip(color, other, strict=True))
