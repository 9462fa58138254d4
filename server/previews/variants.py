"""Variants made on demand: what may be asked for, and the file name that says it, which is what a link signs.

A name is `<box>-<fit>-q<quality>.<format>`: `640x-contain-q80.webp` is 640 pixels wide or less, `640x480-cover-q65.avif` just that size.
Sizes and qualities are rounded to steps, so that a user's cache holds few files, and so that asking nearly the same gives the same link.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Literal

import msgspec

Fit = Literal["contain", "cover"]
Format = Literal["webp", "avif", "jpeg"]

MIME_TYPES: dict[str, str] = {"webp": "image/webp", "avif": "image/avif", "jpeg": "image/jpeg"}

_NAME = re.compile(r"([1-9][0-9]{0,4})?x([1-9][0-9]{0,4})?-(contain|cover)-q([1-9][0-9]{0,2})\.(webp|avif|jpeg)")


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A picture of a file within `width` and `height` pixels (one may be None: as the other and the shape give), never enlarged.

    `contain` keeps all of it, `cover` crops what stands over, from the middle. `quality` is the encoder's, 1 to 100.
    """

    width: int | None = None
    height: int | None = None
    fit: Fit = "contain"
    format: Format = "webp"
    quality: int = 80

    @property
    def name(self) -> str:
        """The name of its file, and what a link to it signs."""
        return f"{self.width or ''}x{self.height or ''}-{self.fit}-q{self.quality}.{self.format}"

    @classmethod
    def of_name(cls, name: str) -> "Variant | None":
        """The variant of that name, or None when the name is that of no variant made on demand."""
        match = _NAME.fullmatch(name)
        if match is None or (match[1] is None and match[2] is None):
            return None
        width, height = (None if each is None else int(each) for each in match.group(1, 2))
        return msgspec.convert({"width": width, "height": height, "fit": match[3], "quality": int(match[4]), "format": match[5]}, type=cls)


def negotiated(name: str, accept: str | None) -> tuple[str, str | None]:
    """The name of what to send for a link's preview, and the request's header that decided, if one did.

    A name that ends in `.auto` takes AVIF or WebP from who says that it understands them by name (RFC 9110, section 12.5.1), as browsers
    do for images, and JPEG for everyone else.
    """
    stem, dot, ending = name.rpartition(".")
    if ending != "auto":
        return name, None
    understood = {each for each, weight in _accepted(accept or "") if weight > 0}
    chosen: Format = "avif" if "image/avif" in understood else "webp" if "image/webp" in understood else "jpeg"
    return f"{stem}{dot}{chosen}", "Accept"


def _accepted(accept: str) -> Iterator[tuple[str, float]]:
    for each in accept.lower().split(","):
        media_type, *parameters = (part.strip(" \t") for part in each.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        yield media_type, float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 0.0


def rounded(wanted: int, steps: tuple[int, ...]) -> int:
    """The smallest of the ascending `steps` that is not below what is wanted, or the largest."""
    return steps[min(bisect_left(steps, wanted), len(steps) - 1)]
