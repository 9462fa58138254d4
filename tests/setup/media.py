"""A real photo and a real film, made with the ffmpeg that Coffer brings along."""

import subprocess
from pathlib import Path

import imageio_ffmpeg


def make_photo(path: Path) -> bytes:
    return _make(path, "-f", "lavfi", "-i", "testsrc2=size=1920x1080", "-frames:v", "1")


def make_video(path: Path) -> bytes:
    """Two seconds of H.264 with sound, a few hundred KiB."""
    picture, sound = "testsrc2=size=640x360:rate=25:duration=2", "sine=frequency=440:duration=2"
    return _make(path, "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound, "-pix_fmt", "yuv420p", "-c:a", "aac")


def _make(path: Path, *arguments: str) -> bytes:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, path], check=True)
    return path.read_bytes()
