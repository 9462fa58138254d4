"""ThumbHash: an image's blurred likeness in about 25 bytes (https://evanw.github.io/thumbhash/).

The image is split into lightness, two colour differences and transparency; of each the lowest frequencies of a cosine transform are
kept, 4 bits each, after a header with their averages and scales.
"""

from collections.abc import Sequence
from math import cos, pi
from typing import NamedTuple


class _Channel(NamedTuple):
    average: float
    scale: float
    details: list[float]  # 0 to 1


def average_of(pixels: Sequence[int]) -> tuple[float, float, float] | None:
    """Red, green and blue from 0 to 1, averaged over RGBA bytes by their opacity; None where all is transparent."""
    alphas = pixels[3::4]
    opacity = sum(alphas)
    if not opacity:
        return None
    red, green, blue = (
        sum(value * alpha for value, alpha in zip(pixels[band::4], alphas, strict=True)) / opacity / 255 for band in range(3)
    )
    return red, green, blue


def thumbhash(width: int, height: int, pixels: Sequence[int]) -> bytes:
    """The hash of RGBA bytes, row by row. Meant for at most 100 by 100 pixels; 32 lose nothing that it could keep."""
    average = average_of(pixels) or (0.0, 0.0, 0.0)
    opacity = [alpha / 255 for alpha in pixels[3::4]]
    # Transparent parts take the average colour: they cost no detail then.
    red, green, blue = (
        [average[band] * (1 - alpha) + value / 255 * alpha for value, alpha in zip(pixels[band::4], opacity, strict=True)]
        for band in range(3)
    )
    lightness = [(r + g + b) / 3 for r, g, b in zip(red, green, blue, strict=True)]
    yellowness = [(r + g) / 2 - b for r, g, b in zip(red, green, blue, strict=True)]
    redness = [r - g for r, g in zip(red, green, strict=True)]
    has_alpha = sum(pixels[3::4]) < 255 * width * height
    most, longer = (5 if has_alpha else 7), max(width, height)
    across, down = max(1, _rounded(most * width / longer)), max(1, _rounded(most * height / longer))
    lights = _transform(lightness, width, height, max(3, across), max(3, down))
    yellows, reds = _transform(yellowness, width, height, 3, 3), _transform(redness, width, height, 3, 3)
    channels = [lights, yellows, reds]
    is_landscape = width > height
    head = (
        _rounded(63 * lights.average)
        | _rounded(31.5 + 31.5 * yellows.average) << 6
        | _rounded(31.5 + 31.5 * reds.average) << 12
        | _rounded(31 * lights.scale) << 18
        | has_alpha << 23
    )
    scales = (down if is_landscape else across) | _rounded(63 * yellows.scale) << 3 | _rounded(63 * reds.scale) << 9 | is_landscape << 15
    result = head.to_bytes(3, "little") + scales.to_bytes(2, "little")
    if has_alpha:
        channels.append(_transform(opacity, width, height, 5, 5))
        result += bytes([_rounded(15 * channels[3].average) | _rounded(15 * channels[3].scale) << 4])
    nibbles = [_rounded(15 * detail) for channel in channels for detail in channel.details]
    nibbles += [0] * (len(nibbles) % 2)
    return result + bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))


def _transform(values: list[float], width: int, height: int, across: int, down: int) -> _Channel:
    """The cosine transform's corner of low frequencies, a triangle. Rows first, then columns of what they gave: O(n), not O(n²)."""
    row_waves = [[cos(pi / width * frequency * (x + 0.5)) for x in range(width)] for frequency in range(across)]
    column_waves = [[cos(pi / height * frequency * (y + 0.5)) for y in range(height)] for frequency in range(down)]
    rows = [values[y * width : (y + 1) * width] for y in range(height)]
    partial = [[sum(map(float.__mul__, wave, row)) for row in rows] for wave in row_waves]
    found = [
        sum(map(float.__mul__, column_waves[y], partial[x])) / (width * height)
        for y in range(down)
        for x in range(across)
        if x * down < across * (down - y)
    ]
    average, details = found[0], found[1:]
    scale = max(map(abs, details))
    return _Channel(average, scale, [0.5 + 0.5 / scale * detail for detail in details] if scale else details)


def _rounded(number: float) -> int:
    """To the nearest, halves up, as the reference does; Python rounds halves to the even."""
    return int(number + 0.5)
