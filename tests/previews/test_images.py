"""Images and their previews: the same picture, upright, in sRGB, with nothing else in it, and none of what is refused."""

import functools
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import cos, pi
from typing import Any

import pytest
import pyvips

from server.previews.decoders import Decoders
from server.previews.images import LOADERS
from server.previews.making import Unmakeable, Variant, Wishes
from tests.previews.decoding import Studio
from tests.previews.pictures import (
    difference,
    gif_of,
    heic,
    moving,
    photo,
    png_that_claims,
    reduced_in_full,
    webp_that_claims,
)

MIB = 2**20
ALIKE = 2.0
"""Mean CIEDE2000 of a WebP of quality 80 and the reference, where below 1 is invisible. Wrong colours or turns give 10 and more."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    decoders = Decoders(1)
    yield Studio(decoders, tmp_path_factory.mktemp("studio"))
    decoders.close()


def jpeg(image: Any, **options: Any) -> bytes:
    return bytes(image.jpegsave_buffer(Q=95, **options))


def cmyk(image: Any) -> Any:
    """In the colours of a press, which has fewer."""
    return image.icc_transform("cmyk", input_profile="srgb")


def flat(image: Any) -> Any:
    return image.flatten(background=255) if image.hasalpha() else image


# The same picture


STORED: dict[int, Callable[[Any], Any]] = {
    1: lambda upright: upright,
    2: lambda upright: upright.fliphor(),
    3: lambda upright: upright.rot180(),
    4: lambda upright: upright.flipver(),
    5: lambda upright: upright.rot90().fliphor(),
    6: lambda upright: upright.rot270(),
    7: lambda upright: upright.rot270().fliphor(),
    8: lambda upright: upright.rot90(),
}
"""By the EXIF orientation: how a camera stores the pixels of an upright picture (EXIF 2.32, 4.6.4 A)."""


@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_upright(studio: Studio, orientation: int) -> None:
    image = STORED[orientation](photo()).copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    found = studio.previews(jpeg(image), "image/jpeg")
    assert (found.made.width, found.made.height) == (600, 400)
    assert difference(found.image(), reduced_in_full(photo(), 320)) < ALIKE
    assert not found.image().get_typeof("orientation")
    _, variant = studio.variant(jpeg(image), "image/jpeg", Variant(width=300, height=300, fit="cover", format="jpeg"))
    middle = photo().crop(100, 0, 400, 400)
    assert difference(pyvips.Image.new_from_buffer(variant, ""), reduced_in_full(middle, 300)) < ALIKE


FORMATS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "jpeg": ("image/jpeg", jpeg),
    "progressive jpeg": ("image/jpeg", functools.partial(jpeg, interlace=True)),
    "jpeg without subsampling": ("image/jpeg", functools.partial(jpeg, subsample_mode="off")),
    "cmyk": ("image/jpeg", lambda image: jpeg(cmyk(image))),
    "cmyk without its profile": ("image/jpeg", lambda image: jpeg(cmyk(image), keep="none")),
    "wide gamut": ("image/jpeg", lambda image: jpeg(image.icc_transform("p3", input_profile="srgb"))),
    "gain map": ("image/jpeg", lambda image: bytes(image.colourspace("scrgb").uhdrsave_buffer(Q=95))),
    "png": ("image/png", lambda image: bytes(image.pngsave_buffer())),
    "png of 16 bits": (
        "image/png",
        lambda image: bytes((image.cast("ushort") * 257).cast("ushort").copy(interpretation="rgb16").pngsave_buffer()),
    ),
    "interlaced png": ("image/png", lambda image: bytes(image.pngsave_buffer(interlace=True))),
    "wide gamut png of 16 bits": (
        "image/png",
        lambda image: bytes(image.icc_transform("p3", input_profile="srgb", depth=16).pngsave_buffer()),
    ),
    "palette": ("image/png", lambda image: bytes(image.pngsave_buffer(palette=True, dither=0))),
    "webp": ("image/webp", lambda image: bytes(image.webpsave_buffer(Q=95))),
    "lossless webp": ("image/webp", lambda image: bytes(image.webpsave_buffer(lossless=True))),
    "gif": ("image/gif", lambda image: bytes(image.gifsave_buffer(dither=0))),
    "avif": ("image/avif", lambda image: bytes(image.heifsave_buffer(compression="av1", Q=90, effort=1))),
    "avif of 10 bits": ("image/avif", lambda image: bytes(image.heifsave_buffer(compression="av1", Q=90, effort=1, bitdepth=10))),
}


SHOWN: dict[str, Callable[[Any], Any]] = {
    "cmyk": lambda image: cmyk(image).icc_transform("srgb", input_profile="cmyk", intent="perceptual"),
    # Nothing says how its press rounds colours off: libvips' own choice.
    "cmyk without its profile": lambda image: cmyk(image).icc_transform("srgb", input_profile="cmyk"),
    # The picture for screens that know nothing of gain maps.
    "gain map": lambda image: pyvips.Image.jpegload_buffer(FORMATS["gain map"][1](image)).icc_transform("srgb", embedded=True),
}
"""What is to be seen where it isn't the photo."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_preview_looks_like_its_image(studio: Studio, name: str) -> None:
    mime_type, save = FORMATS[name]
    found = studio.previews(save(photo()), mime_type)
    assert (found.made.width, found.made.height) == (600, 400)
    assert [(each.variant, each.width, each.height) for each in found.made.files] == [("320", 320, 213), ("640", 600, 400)]
    shown = SHOWN[name](photo()) if name in SHOWN else photo()
    assert difference(found.image(), reduced_in_full(shown, 320)) < ALIKE
    assert difference(found.image("640.webp"), shown) < ALIKE
    assert found.image().get("vips-loader") == "webpload_buffer"


def test_wide_gamut_unconverted_would_be_seen() -> None:
    """That the comparison can fail: the numbers of Display P3 taken for sRGB are further away than what is let pass."""
    assert difference(photo().icc_transform("p3", input_profile="srgb"), photo()) > ALIKE


@pytest.mark.parametrize("sixteen", [False, True])
def test_grey_images(studio: Studio, sixteen: bool) -> None:
    grey = photo().colourspace("b-w")
    stored = (grey.cast("ushort") * 257).cast("ushort").copy(interpretation="grey16") if sixteen else grey
    found = studio.previews(bytes(stored.pngsave_buffer()), "image/png")
    assert difference(found.image(), reduced_in_full(grey.colourspace("srgb"), 320)) < ALIKE


@pytest.mark.parametrize("save", [lambda image: bytes(image.pngsave_buffer()), lambda image: bytes(image.webpsave_buffer(lossless=True))])
def test_transparency_is_kept(studio: Studio, save: Callable[[Any], bytes]) -> None:
    across = pyvips.Image.xyz(600, 400)[0]
    image = photo().bandjoin((across * (255 / 600)).cast("uchar")).copy(interpretation="srgb")
    mime_type = "image/png" if save(image)[:4] == b"\x89PNG" else "image/webp"
    found = studio.previews(save(image), mime_type)
    assert found.image().hasalpha()
    assert (found.image()[3] - (pyvips.Image.xyz(320, 213)[0] * (255 / 320))).abs().avg() < 3
    assert difference(flat(found.image()), flat(image).thumbnail_image(320)) < ALIKE
    _, as_jpeg = studio.variant(save(image), mime_type, Variant(width=320, format="jpeg"))
    assert difference(pyvips.Image.new_from_buffer(as_jpeg, ""), flat(image).thumbnail_image(320)) < ALIKE
    assert found.made.thumbhash
    assert found.made.thumbhash[2] & 0x80  # it says that there is transparency


def test_one_pixel(studio: Studio) -> None:
    image = pyvips.Image.black(1, 1).bandjoin([200, 30]).linear(1, [10, 0, 0]).cast("uchar").copy(interpretation="srgb")
    found = studio.previews(bytes(image.pngsave_buffer()), "image/png")
    assert [(each.variant, each.width, each.height) for each in found.made.files] == [("320", 1, 1)]
    assert (found.made.width, found.made.height, found.made.average_color) == (1, 1, "#0ac81e")
    assert found.made.thumbhash


@pytest.mark.parametrize(("width", "height", "sizes"), [(16_000, 3, (1280, 1)), (3, 16_000, (1, 5120)), (20_000, 1, (1280, 1))])
def test_extreme_shapes(studio: Studio, width: int, height: int, sizes: tuple[int, int]) -> None:
    image = photo(width, height)
    found = studio.previews(bytes(image.pngsave_buffer()), "image/png")
    assert (found.made.width, found.made.height) == (width, height)
    assert [(each.width, each.height) for each in found.made.files][-1] == sizes
    assert found.made.thumbhash


def test_nothing_is_enlarged(studio: Studio) -> None:
    small = bytes(photo(90, 60).pngsave_buffer())
    assert [(each.variant, each.width, each.height) for each in studio.previews(small, "image/png").made.files] == [("320", 90, 60)]
    for variant, size in (
        (Variant(width=500), (90, 60)),
        (Variant(height=500, fit="cover"), (90, 60)),
        (Variant(width=500, height=500), (90, 60)),
        (Variant(width=500, height=500, fit="cover"), (60, 60)),
        (Variant(width=45, height=500, fit="cover"), (5, 60)),
        (Variant(width=99_999, height=99_999), (90, 60)),
    ):
        made, content = studio.variant(small, "image/png", variant)
        image = pyvips.Image.new_from_buffer(content, "")
        assert (image.width, image.height) == (made.width, made.height) == size


@pytest.mark.parametrize("fit", ["contain", "cover"])
@pytest.mark.parametrize("form", ["webp", "avif", "jpeg"])
def test_variants(studio: Studio, form: Any, fit: Any) -> None:
    image = photo(900, 600)
    made, content = studio.variant(jpeg(image), "image/jpeg", Variant(width=200, height=200, fit=fit, format=form, quality=90))
    assert made.mime_type == f"image/{form}"
    expected = reduced_in_full(image.crop(150, 0, 600, 600), 200) if fit == "cover" else reduced_in_full(image, 200)
    found = pyvips.Image.new_from_buffer(content, "")
    assert found.get("vips-loader") == {"webp": "webpload_buffer", "avif": "heifload_buffer", "jpeg": "jpegload_buffer"}[form]
    assert (made.width, made.height) == (expected.width, expected.height)
    assert difference(found, expected) < ALIKE


# Animations


@pytest.mark.parametrize("mime_type", ["image/gif", "image/webp"])
def test_animations_have_a_still_and_a_short_animation(studio: Studio, mime_type: str) -> None:
    image = moving(80, delay_ms=100)
    content = bytes(image.gifsave_buffer() if mime_type == "image/gif" else image.webpsave_buffer(lossless=True))
    found = studio.previews(content, mime_type)
    assert (found.made.width, found.made.height) == (100, 60)
    assert [(each.variant, each.width, each.height) for each in found.made.files] == [("320", 100, 60), ("animated", 100, 60)]
    assert (found.image().height, found.image().avg()) == (60, pytest.approx(10, abs=2))
    animated = found.image("animated.webp", n=-1)
    assert sum(animated.get("delay")) == 5_000  # equal neighbours became one
    shown_ms = 0
    for number, delay_ms in enumerate(animated.get("delay")):
        assert animated.crop(0, 60 * number, 100, 60).avg() == pytest.approx(10 + 240 * shown_ms / 8_000, abs=4)
        shown_ms += delay_ms
    assert [each.variant for each in studio.previews(content, mime_type, Wishes(animated=False)).made.files] == ["320"]
    _, still = studio.variant(content, mime_type, Variant(width=50))
    assert pyvips.Image.new_from_buffer(still, "", n=-1).height == 30


def test_fast_animations_are_cut_by_frames(studio: Studio) -> None:
    flicker = pyvips.Image.arrayjoin([moving(2, 20, 10)] * 65, across=1).copy()
    flicker.set_type(pyvips.GValue.array_int_type, "delay", [20] * 130)
    found = studio.previews(bytes(flicker.gifsave_buffer()), "image/gif")
    assert sum(found.image("animated.webp", n=-1).get("delay")) == 100 * 20


# Nothing else in it

CANARY = "canary"


def test_metadata_is_gone(studio: Studio) -> None:
    image = photo(1400, 900).icc_transform("p3", input_profile="srgb")
    image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    for name in ("exif-ifd0-Make", "exif-ifd2-UserComment", "exif-ifd0-Artist"):
        image.set_type(pyvips.GValue.gstr_type, name, f"{CANARY} ({CANARY}, ASCII, 7 components, 7 bytes)")
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd3-GPSLatitude", "48/1 8/1 0/1 (48, 8, 0, Rational, 3 components, 24 bytes)")
    image.set_type(pyvips.GValue.blob_type, "xmp-data", f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{CANARY}</x:xmpmeta>".encode())
    image.set_type(pyvips.GValue.blob_type, "iptc-data", CANARY.encode())
    for mime_type, content in (
        ("image/jpeg", jpeg(image)),
        ("image/png", bytes(image.pngsave_buffer())),
        ("image/webp", bytes(image.webpsave_buffer())),
        ("image/avif", bytes(image.heifsave_buffer(compression="av1", effort=1))),
    ):
        original = pyvips.Image.new_from_buffer(content, "")
        assert {"exif-data", "xmp-data", "icc-profile-data"} <= set(original.get_fields())
        assert any(name.startswith("exif-ifd3-GPS") for name in original.get_fields())
        made = studio.previews(content, mime_type).contents
        for form in ("webp", "avif", "jpeg"):
            variant = Variant(width=300, format=form)
            made[variant.name] = studio.variant(content, mime_type, variant)[1]
        assert len(made) == 6
        for content_made in made.values():
            fields = pyvips.Image.new_from_buffer(content_made, "").get_fields()
            assert [name for name in fields if name.startswith(("exif", "xmp", "iptc", "icc", "png-comment", "orientation"))] == []
            for mark in (CANARY.encode(), b"Exif", b"EXIF", b"XMP", b"ICC", b"GPS", b"http://ns.adobe", b"Photoshop"):
                assert mark not in content_made


# ThumbHash and average colour


def test_the_thumbhash_is_a_blurred_likeness(studio: Studio) -> None:
    for image in (photo(400, 700), photo(600, 400)):
        found = studio.previews(jpeg(image), "image/jpeg").made
        assert found.thumbhash
        assert 5 <= len(found.thumbhash) <= 25
        likeness = from_thumbhash(found.thumbhash)
        blurred = image.thumbnail_image(likeness.width, height=likeness.height, size="force").gaussblur(2)
        assert difference(likeness, blurred) < 8
        assert difference(likeness, blurred.rot180()) > 12
        assert found.average_color
        average = bytes.fromhex(found.average_color[1:])
        assert list(average) == pytest.approx([image[band].avg() for band in range(3)], abs=2)


def from_thumbhash(found: bytes) -> Any:
    """Decodes an opaque hash by its description, term by term."""
    head, scales = int.from_bytes(found[:3], "little"), int.from_bytes(found[3:5], "little")
    assert not head >> 23
    l_average, p_average, q_average = (head & 63) / 63, (head >> 6 & 63) / 31.5 - 1, (head >> 12 & 63) / 31.5 - 1
    landscape, limit = scales >> 15, scales & 7
    across, down = (7, max(3, limit)) if landscape else (max(3, limit), 7)
    nibbles = iter([nibble for byte in found[5:] for nibble in (byte & 15, byte >> 4)])

    def terms(nx: int, ny: int, scale: float) -> list[tuple[int, int, float]]:
        return [
            (cx, cy, (next(nibbles) / 7.5 - 1) * scale)
            for cy in range(ny)
            for cx in range(nx)
            if (cx, cy) != (0, 0) and cx * ny < nx * (ny - cy)
        ]

    channels = [
        (l_average, terms(across, down, (head >> 18 & 31) / 31)),
        (p_average, terms(3, 3, (scales >> 3 & 63) / 63 * 1.25)),
        (q_average, terms(3, 3, (scales >> 9 & 63) / 63 * 1.25)),
    ]
    ratio = 7 / limit if landscape else limit / 7
    width, height = (32, round(32 / ratio)) if ratio > 1 else (round(32 * ratio), 32)
    rgb = []
    for y in range(height):
        for x in range(width):
            l, p, q = (  # noqa: E741 - as the description calls it
                average + sum(2 * value * cos(pi / width * (x + 0.5) * cx) * cos(pi / height * (y + 0.5) * cy) for cx, cy, value in each)
                for average, each in channels
            )
            blue = l - 2 / 3 * p
            red = (3 * l - blue + q) / 2
            rgb += [round(255 * min(1, max(0, value))) for value in (red, red - q, blue)]
    return pyvips.Image.new_from_memory(bytes(rgb), width, height, 3, "uchar").copy(interpretation="srgb")


# What is refused


def test_an_image_that_breaks_off_is_shown_as_far_as_it_goes(studio: Studio) -> None:
    for mime_type, content in (("image/jpeg", jpeg(photo())), ("image/png", bytes(photo().pngsave_buffer()))):
        found = studio.previews(content[: 2 * len(content) // 3], mime_type)
        assert (found.made.width, found.made.height) == (600, 400)
        assert difference(found.image().crop(0, 0, 320, 90), reduced_in_full(photo(), 320).crop(0, 0, 320, 90)) < ALIKE


@pytest.mark.parametrize("mime_type", LOADERS)
def test_headers_alone_and_noise_are_damaged(studio: Studio, mime_type: str) -> None:
    save = {"image/jpeg": "jpeg", "image/png": "png", "image/webp": "webp", "image/gif": "gif"}.get(mime_type, "avif")
    whole = FORMATS[save][1](photo())
    for content in (b"", whole[:1], whole[:4], whole[:40], b"\xff" * 4096, whole[:32] + b"\x55" * 4096):
        assert studio.refusal(content, mime_type) in {"damaged", "unsupported"}
    assert studio.previews(photo().pngsave_buffer(), "image/png").made.width == 600


def test_an_image_of_one_colour_is_not_damaged(studio: Studio) -> None:
    black = pyvips.Image.black(500, 400, bands=3).copy(interpretation="srgb")
    for mime_type, content in (("image/jpeg", jpeg(black)), ("image/png", bytes(black.pngsave_buffer()))):
        assert studio.previews(content, mime_type).made.average_color == "#000000"


def test_an_image_cut_after_its_header_is_damaged(studio: Studio) -> None:
    for mime_type, content in (("image/jpeg", jpeg(photo())), ("image/png", bytes(photo().pngsave_buffer()))):
        body = content.index(b"IDAT") + 4 if mime_type == "image/png" else content.index(b"\xff\xda") + 14
        assert studio.refusal(content[:body], mime_type) == "damaged"


def test_hevc_is_unsupported_without_its_decoder(studio: Studio) -> None:
    assert studio.refusal(heic(), "image/heic") == "unsupported"


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png of 50,000 x 50,000": ("image/png", lambda: png_that_claims(50_000, 50_000)),
    "png of 10,001 x 10,000": ("image/png", lambda: png_that_claims(10_001, 10_000)),
    "gif of 10,000 frames": ("image/gif", lambda: gif_of(10_000)),
    "gif of 65,535 x 65,535": ("image/gif", lambda: gif_of(1).replace(b"\x01\0\x01\0", b"\xff\xff\xff\xff")),
    "webp of 16,383 x 16,383": ("image/webp", lambda: webp_that_claims(16_383, 16_383)),
    "jpeg of 65,500 x 65,500": ("image/jpeg", lambda: with_jpeg_size(jpeg(photo()), 65_500, 65_500)),
    "avif of 60,000 x 60,000": ("image/avif", lambda: with_avif_size(FORMATS["avif"][1](photo()), 60_000, 60_000)),
}


def with_jpeg_size(content: bytes, width: int, height: int) -> bytes:
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def with_avif_size(content: bytes, width: int, height: int) -> bytes:
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", width, height) + content[at + 8 :]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_without_their_memory(studio: Studio, name: str) -> None:
    mime_type, content = BOMBS[name][0], BOMBS[name][1]()
    decoders = Decoders(1)
    try:
        assert Studio(decoders, studio.directory).refusal(content, mime_type) == "too_large"
        assert 0 < decoders.peak_bytes < 64 * MIB
    finally:
        decoders.close()


# Which loaders run


@pytest.mark.parametrize("mime_type", LOADERS)
def test_only_the_loader_of_the_declared_type_runs(studio: Studio, mime_type: str) -> None:
    """Another's bytes are refused, even where that other would be allowed by its own name."""
    for name, (its_type, save) in FORMATS.items():
        if LOADERS[its_type] != LOADERS[mime_type]:
            assert (name, studio.refusal(save(photo()), mime_type)) == (name, "damaged")


def foreign_samples() -> dict[str, bytes]:
    """Bytes of the formats that libvips would load and Coffer must not, by the loader's class."""
    image = photo(64, 48)
    grey = image.colourspace("b-w")
    return {
        "VipsForeignLoadCsv": b"1,2,3\n4,5,6\n",
        "VipsForeignLoadMatrix": b"2 2\n1 2\n3 4\n",
        "VipsForeignLoadRaw": bytes(300),
        "VipsForeignLoadVips": bytes.fromhex("08f2a6b6") + struct.pack("<IIIIIII", 4, 4, 3, 0, 0, 0, 22) + bytes(100),
        "VipsForeignLoadSvg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
        "VipsForeignLoadUhdr": bytes(image.colourspace("scrgb").uhdrsave_buffer()),
        "VipsForeignLoadTiff": bytes(image.tiffsave_buffer()),
        "VipsForeignLoadPpm": b"P6 2 2 255\n" + bytes(12),
        "VipsForeignLoadPfm": b"PF\n1 1\n-1.0\n" + bytes(12),
        "VipsForeignLoadFits": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(2800),
        "VipsForeignLoadRad": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n" + bytes(4),
        "VipsForeignLoadPdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        "VipsForeignLoadOpenexr": bytes.fromhex("762f310102000000") + bytes(60),
        "VipsForeignLoadJxl": bytes.fromhex("ff0a") + bytes(60),
        "VipsForeignLoadJp2k": bytes.fromhex("0000000c6a5020200d0a870a") + bytes(60),
        "VipsForeignLoadMat": b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM" + bytes(40),
        "VipsForeignLoadNifti": struct.pack("<I", 348) + bytes(340) + b"n+1\0",
        "VipsForeignLoadMagick": b"BM" + struct.pack("<IIIIiiHH", 70, 0, 54, 40, 2, 2, 1, 24) + bytes(40),
        "VipsForeignLoadAnalyze": struct.pack("<I", 348) + bytes(344),
        "grey": bytes(grey.tiffsave_buffer(compression="lzw")),
        "a script": b"#!/bin/sh\nid\n",
        "HTML": b"<!doctype html><script>alert(1)</script>",
    }


def subclasses(name: str) -> list[str]:
    found: list[str] = []

    def note(kind: Any, *_: object) -> Any:
        found.append(pyvips.type_name(kind))
        return pyvips.ffi.NULL

    pyvips.type_map(pyvips.type_from_name(name), note)
    return found


@pytest.mark.parametrize("mime_type", LOADERS)
def test_no_other_format_is_decoded(studio: Studio, mime_type: str) -> None:
    samples = foreign_samples()
    ours = {loader for loader, _ in LOADERS.values()}
    assert set(subclasses("VipsForeignLoad")) <= samples.keys() | ours  # a new one needs a sample here
    if mime_type == "image/jpeg":
        del samples["VipsForeignLoadUhdr"]  # it is a JPEG, and `test_a_preview_looks_like_its_image` has it decoded as one
    reasons = {name: studio.refusal(content, mime_type) for name, content in samples.items()}
    assert set(reasons.values()) <= {"damaged", "unsupported"}, reasons


PROBE = """
import pathlib
import sys
import pyvips
from server.previews import rendering
for name in sys.argv[2:]:
    pyvips.operation_block_set(name, False)
leaves = []
def walk(kind, *_):
    children = []
    pyvips.type_map(kind, lambda child, *_: children.append(child) or pyvips.ffi.NULL)
    for child in children:
        walk(child)
    if not children:
        leaves.append(kind)
walk(pyvips.type_from_name("VipsForeignLoad"))
for kind in leaves:
    operation = pyvips.nickname_find(kind)
    arguments = [10, 10, 1] if operation == "rawload" else []
    first = sys.argv[1]
    if operation.endswith("_buffer"):
        first = pathlib.Path(first).read_bytes()
    elif operation.endswith("_source"):
        first = pyvips.Source.new_from_file(first)
    try:
        pyvips.Operation.call(operation, first, *arguments)
        print(operation)
    except pyvips.Error as error:
        if "blocked" not in str(error):
            print(operation)
"""


@pytest.mark.parametrize("loader", [None, *sorted({loader for loader, _ in LOADERS.values()})])
def test_every_other_loader_is_blocked(studio: Studio, loader: str | None) -> None:
    """Asked by name, as no sniffing of bytes would: each answers that it is blocked, but those of the one class."""
    path = studio.directory / "image"
    path.write_bytes(FORMATS["avif"][1](photo()))  # HEIF's looks at the header first when it is called by name
    command = [sys.executable, "-c", PROBE, str(path), *([loader] if loader else [])]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    start = {None: "none", "VipsForeignLoadNsgif": "gif"}.get(loader, (loader or "").removeprefix("VipsForeignLoad").lower())
    usable = run.stdout.split()
    assert all(name.startswith(f"{start}load") for name in usable)
    assert len(usable) == (3 if loader else 0)


def test_unknown_types_are_unsupported(studio: Studio) -> None:
    from server.previews.making import make, make_variant  # noqa: PLC0415

    for mime_type in ("image/svg+xml", "image/tiff", "application/pdf", "image/x-portable-pixmap", ""):
        for made in (
            make(studio.directory, mime_type, studio.directory, Wishes()),
            make_variant(studio.directory, mime_type, studio.directory, Variant(width=1)),
        ):
            with pytest.raises(Unmakeable, match="unsupported"):
                made.send(None)
