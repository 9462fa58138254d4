"""Contact sheets: several pictures on one, as a reference for whoever takes only one picture."""

from typing import Annotated, Literal

import msgspec

from server.previews.variants import Fit

Format = Literal["webp", "png", "jpeg"]

MIME_TYPES: dict[str, str] = {"webp": "image/webp", "png": "image/png", "jpeg": "image/jpeg"}

MOST_PICTURES = 36
LONGEST_SIDE = 8_192
MOST_PIXELS = 16_777_216
"""Of a sheet: its own pixels take 64 MiB, and as PNG of noise more than a decoder may answer."""

TRANSPARENT = "transparent"


class Sheet(msgspec.Struct, frozen=True, kw_only=True):
    """A grid of cells of `cell_width` by `cell_height` pixels, in rows from the left, with `padding` pixels between and around them.

    A picture is centred in its cell: `contain` shows all of it, `cover` fills the cell; neither enlarges it. `background` is `#rrggbb`
    or `transparent`, which JPEG cannot be. `quality` is WebP's and JPEG's, 1 to 100.
    """

    columns: Annotated[int, msgspec.Meta(ge=1, le=MOST_PICTURES)]
    cell_width: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 512
    cell_height: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 512
    padding: Annotated[int, msgspec.Meta(ge=0, le=512)] = 8
    background: Annotated[str, msgspec.Meta(pattern="^(#[0-9a-fA-F]{6}|transparent)$")] = "#ffffff"
    fit: Fit = "contain"
    format: Format = "webp"
    quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 90

    @property
    def name(self) -> str:
        """What its file is called where it is made."""
        return f"sheet.{self.format}"

    def size(self, pictures: int) -> tuple[int, int]:
        """Width and height in pixels with so many pictures."""
        rows = -(-pictures // self.columns)
        return (
            self.columns * (self.cell_width + self.padding) + self.padding,
            rows * (self.cell_height + self.padding) + self.padding,
        )

    def cell(self, number: int) -> tuple[int, int]:
        """The left and upper edge of a cell, counted from 0."""
        row, column = divmod(number, self.columns)
        return (
            self.padding + column * (self.cell_width + self.padding),
            self.padding + row * (self.cell_height + self.padding),
        )
