"""What is wished for of a file's previews, and what was made. The bounds hold for what comes out of a jail, where nothing is believed."""

from typing import Annotated, Literal

import msgspec

Pixels = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
Reason = Literal["unsupported", "damaged", "too_large", "too_slow"]


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """Which previews to make. Widths are in pixels; no image is enlarged. `quality` is WebP's, 1 to 100."""

    image_widths: tuple[int, ...] = (320, 640, 1280)
    quality: int = 80
    animated: bool = True
    storyboard: bool = False
    clip: bool = False


class MadeFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file in the output directory, called `name` there."""

    variant: str
    name: str
    mime_type: str
    width: Pixels | None = None
    height: Pixels | None = None


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """The previews, and what was found out about the original: its width and height with its orientation applied."""

    files: list[MadeFile] = []
    width: Pixels | None = None
    height: Pixels | None = None
    duration_seconds: float | None = None
    frame_rate: float | None = None
    video_codec: str | None = None
    audio_codec: str | None = None
    thumbhash: Annotated[bytes, msgspec.Meta(max_length=40)] | None = None
    average_color: Annotated[str, msgspec.Meta(pattern="^#[0-9a-f]{6}$")] | None = None


class Unmakeable(Exception):
    """There will never be a preview of these bytes. `reason` is a stable word: unsupported, damaged, too_large, too_slow.

    `number` is that of the picture, where several were to make one.
    """

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.number = number
