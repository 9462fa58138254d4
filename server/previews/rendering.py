"""Decodes images with libvips and draws their previews: `render`. For the jailed child of `images`, and for nobody else.

All of libvips' loaders are blocked when this is imported, and those of the one expected type are allowed again. Its own switch for
untrusted input would leave TIFF on, and whatever a later release calls safe.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pyvips

from server.previews import sheets
from server.previews.images import FRAME, LOADERS, MOST_FRAMES, Answer, Job
from server.previews.models import Made, MadeFile, Reason, Wishes
from server.previews.scenes import SCENES, Refused, embedded
from server.previews.sheets import TRANSPARENT, Sheet
from server.previews.thumbhash import average_of, thumbhash
from server.previews.variants import MIME_TYPES, Fit, Variant

_MOST_BYTES = 512 * 2**20  # some loaders map the whole file into their memory
_LONGEST_SIDE = 16_383  # WebP's, and enough for the others
_TALLEST = 4  # times the width that is asked for; beyond, a preview is narrower than that
_THUMB = 32
_EVEN = 1.0  # standard deviation of 8-bit values
_ANIMATED_WIDTH = 320
_ANIMATED_FRAMES = 100
_ANIMATED_MS = 5_000
_ANIMATED_PIXELS = 100_000_000  # of all its frames at the size they are decoded in

_PICTURES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
"""What a scene may carry, by its first bytes."""

_PIXMAP = re.compile(rb"P6\n(\d{1,5}) (\d{1,5})\n255\n")

_OUT_OF_MEMORY = re.compile(
    r"out of memory|unable to allocate|memory allocation|insufficient memory|unable to mmap|mmap failed", re.IGNORECASE
)
_UNSUPPORTED = re.compile(r"unsupported (feature|codec|jpeg|image type|file-?type)|has not been built in|no decoding plugin", re.IGNORECASE)

Draw = Callable[["_Drawing"], Answer]

pyvips.operation_block_set("VipsForeignLoad", True)
pyvips.cache_set_max(0)


def render(image_fds: Sequence[int], job: Job) -> Answer:
    """Makes what the job asks for. Raises MemoryError when Python itself ran out of it."""
    if job.sheet is not None:
        return _render_sheet(image_fds, job, job.sheet)
    return _open(
        image_fds[0],
        job.mime_types[0],
        lambda drawing: drawing.variant(job.variant) if job.variant else drawing.previews(job.wishes or Wishes()),
    )


def _open(image_fd: int, mime_type: str, draw: Draw) -> Answer:
    """What is drawn of one image, or why nothing is."""
    if mime_type in SCENES:
        return _open_scene(image_fd, mime_type, draw)
    if os.fstat(image_fd).st_size > _MOST_BYTES:
        return Answer(reason="too_large")
    if mime_type == FRAME:
        return _open_frame(image_fd, draw)
    return _load(pyvips.Source.new_from_descriptor(image_fd), mime_type, draw)


def _render_sheet(image_fds: Sequence[int], job: Job, sheet: Sheet) -> Answer:
    """All of the images, in their order, or the first reason why not."""
    is_transparent = sheet.background == TRANSPARENT
    colour = [255, 255, 255] if is_transparent else list(bytes.fromhex(sheet.background[1:]))
    width, height = sheet.size(len(image_fds))
    bands = [0, 0, 0, 0] if is_transparent else colour
    drawn = pyvips.Image.black(1, 1).bandjoin_const([0] * (len(bands) - 1)) + bands
    drawn = drawn.cast("uchar").copy(interpretation="srgb").embed(0, 0, width, height, extend="copy").copy_memory()
    for number, (image_fd, mime_type) in enumerate(zip(image_fds, job.mime_types, strict=True)):
        cells: list[Any] = []

        def draw(drawing: "_Drawing", cells: list[Any] = cells) -> Answer:
            cells.append(drawing.fitted(sheet.cell_width, sheet.cell_height, sheet.fit))
            return Answer()

        answer = _open(image_fd, mime_type, draw)
        if answer.reason is not None:
            return msgspec.structs.replace(answer, number=number)
        cell = cells[0]
        if is_transparent:
            cell = cell if cell.hasalpha() else cell.bandjoin(255)
        elif cell.hasalpha():
            cell = cell.flatten(background=colour)
        left, top = sheet.cell(number)
        left, top = left + (sheet.cell_width - cell.width) // 2, top + (sheet.cell_height - cell.height) // 2
        # Into memory each time: a chain of as many operations as images would be worked through for every row of pixels.
        drawn = drawn.insert(_rgb(cell), left, top).copy_memory()
    try:
        if sheet.format == "webp":
            content = _webp(drawn, sheet.quality)
        elif sheet.format == "png":
            content = bytes(drawn.pngsave_buffer(compression=6, keep="none"))
        else:
            content = bytes(drawn.jpegsave_buffer(Q=sheet.quality, optimize_coding=True, keep="none"))
    except pyvips.Error as error:
        return _refusal(f"{error.message} {error.detail}")
    file = MadeFile(variant=sheet.name, name=sheet.name, mime_type=sheets.MIME_TYPES[sheet.format], width=width, height=height)
    return Answer(made=Made(files=[file], width=width, height=height), contents=[content])


def _open_frame(frame_fd: int, draw: Draw) -> Answer:
    """A film's frame as ffmpeg wrote it, from a jail where it saw untrusted bytes itself."""
    with open(frame_fd, "rb", closefd=False) as file:
        content = memoryview(file.read())
    start = _PIXMAP.match(content)
    if start is None:
        return Answer(reason="damaged")
    width, height = int(start[1]), int(start[2])
    pixels = content[start.end() :]
    if not pixels or len(pixels) != 3 * width * height:
        return Answer(reason="damaged", detail=f"{width} x {height}")
    return draw(_Drawing(None, pyvips.Image.new_from_memory(pixels, width, height, 3, "uchar").copy(interpretation="srgb")))


def _open_scene(scene_fd: int, mime_type: str, draw: Draw) -> Answer:
    """The picture that it carries, which says nothing of its own size."""
    try:
        picture = embedded(scene_fd, mime_type)
    except Refused as problem:
        return Answer(reason=msgspec.convert(str(problem), Reason))
    for picture_type, start in _PICTURES.items():
        if start.match(picture):
            answer = _load(pyvips.Source.new_from_memory(picture), picture_type, draw)
            return msgspec.structs.replace(answer, made=msgspec.structs.replace(answer.made, width=None, height=None))
    return Answer(reason="unsupported")


def _load(source: Any, mime_type: str, draw: Draw) -> Answer:
    loader, most_pixels = LOADERS[mime_type]
    pyvips.operation_block_set(loader, False)
    try:
        header = pyvips.Image.new_from_source(source, "", access="sequential")
        if header.width * header.height > most_pixels or _field(header, "n-pages", 1) > MOST_FRAMES:
            return Answer(reason="too_large", detail=f"{header.width} x {header.height}")
        return draw(_Drawing(source, header))
    except pyvips.Error as error:
        return _refusal(f"{error.message} {error.detail}")


def _refusal(detail: str) -> Answer:
    if _OUT_OF_MEMORY.search(detail):
        return Answer(reason="too_large", detail=detail[-500:])
    return Answer(reason="unsupported" if _UNSUPPORTED.search(detail) else "damaged", detail=detail[-500:])


class _Drawing:
    """One image, of a source or, without one, in memory. Sizes are as it is seen: upright."""

    def __init__(self, source: Any, header: Any) -> None:
        self._is_jpeg = source is not None and header.get("vips-loader").startswith("jpegload")
        self._source = source
        self._header = header
        self._width, self._height = header.width, header.height
        if _field(header, "orientation", 1) >= 5:  # turned by a quarter
            self._width, self._height = self._height, self._width

    def previews(self, wishes: Wishes) -> Answer:
        files: list[MadeFile] = []
        contents: list[bytes] = []
        boxes = [_box(width) for width in sorted(set(wishes.image_widths))]
        # Past the first that holds the whole original, larger ones would be copies of it.
        enough = next((number for number, (w, h) in enumerate(boxes, 1) if w >= self._width and h >= self._height), len(boxes))
        # The largest is decoded, at reduced size where the format can, and each of the others is made from the one before.
        image = None
        for box in reversed(boxes[:enough]):
            image = _reduced(image, *box).copy_memory() if image else self._still(*box)
            files.insert(0, _file(str(box[0]), f"{box[0]}.webp", image.width, image.height))
            contents.insert(0, _webp(image, wishes.quality))
        small = _reduced(image, _THUMB, _THUMB)
        if wishes.animated and (frames := self._frames()) > 1:
            image = self._thumbnail(*_box(_ANIMATED_WIDTH), f"n={frames}")
            page_height = _field(image, "page-height", image.height)
            files.append(_file("animated", "animated.webp", image.width, page_height))
            contents.append(_webp(image, wishes.quality, page_height=page_height))
        pixels = bytes((small if small.hasalpha() else small.bandjoin(255)).write_to_memory())
        average = average_of(pixels)
        return Answer(
            made=Made(
                files=files,
                width=self._width,
                height=self._height,
                thumbhash=thumbhash(small.width, small.height, pixels),
                average_color=average and "#" + bytes(round(255 * each) for each in average).hex(),
            ),
            contents=contents,
        )

    def variant(self, wanted: Variant) -> Answer:
        width, height = (min(side or _LONGEST_SIDE, _LONGEST_SIDE) for side in (wanted.width, wanted.height))
        image = self.fitted(width, height, wanted.fit if wanted.width and wanted.height else "contain")
        if wanted.format == "webp":
            content = _webp(image, wanted.quality)
        elif wanted.format == "avif":
            content = image.heifsave_buffer(Q=wanted.quality, compression="av1", effort=1, bitdepth=8, keep="none")
        else:
            flat = image.flatten(background=255) if image.hasalpha() else image
            content = flat.jpegsave_buffer(Q=wanted.quality, optimize_coding=True, keep="none")
        file = MadeFile(variant=wanted.name, name=wanted.name, mime_type=MIME_TYPES[wanted.format], width=image.width, height=image.height)
        return Answer(made=Made(files=[file], width=self._width, height=self._height), contents=[content])

    def fitted(self, width: int, height: int, fit: Fit) -> Any:
        """In memory, within the box or, to cover it, as large as it. Where the original is too small for that, a smaller box of the same
        shape is covered.
        """
        if fit == "contain":
            return self._still(width, height)
        scale = min(1.0, self._width / width, self._height / height)
        return self._still(max(1, round(scale * width)), max(1, round(scale * height)), crop="centre")

    def _still(self, width: int, height: int, **options: Any) -> Any:
        """In memory, as large as fits in the box. Of an image that breaks off, what there is, as browsers show it; but not nothing."""
        image = self._thumbnail(width, height, **options).copy_memory()
        if self._source is not None and image.deviate() < _EVEN:
            # One colour: that of the image, or where only its header came, of what stands for the rest.
            self._thumbnail(width, height, "fail_on=truncated", **options).copy_memory()
        return image

    def _thumbnail(self, width: int, height: int, load_options: str = "", **options: Any) -> Any:
        """Upright, in sRGB with 8 bits, never enlarged. `load_options` are the loader's: as keywords they would be ignored.

        libvips itself would have JPEG decoded at twice the size or more: for a photo of 12 megapixels twice the work, and no sharper.
        """
        if self._source is None:
            return _srgb(self._header.thumbnail_image(width, height=height, size="down", **options))
        if self._header.get_typeof("icc-profile-data") or self._header.interpretation == "cmyk":
            # Only where there is something to convert: from sRGB to sRGB it would take 100 ms a megapixel.
            options |= {"output_profile": "srgb", "intent": "perceptual"}
        if self._is_jpeg:
            shrunk = {"shrink": self._shrink(width, height, covers="crop" in options), "access": "sequential"}
            loaded = pyvips.Image.new_from_source(self._source, load_options, **shrunk)
            return _srgb(loaded.thumbnail_image(width, height=height, size="down", **options))
        image = pyvips.Image.thumbnail_source(self._source, width, option_string=load_options, height=height, size="down", **options)
        return _srgb(image)

    def _shrink(self, width: int, height: int, *, covers: bool) -> int:
        """The most that JPEG's decoder may shrink by itself, 1, 2, 4 or 8, and still give no less than is wanted."""
        ratios = (self._width / width, self._height / height)
        most = min(ratios) if covers else max(ratios)
        return next((shrink for shrink in (8, 4, 2) if shrink <= most), 1)

    def _frames(self) -> int:
        """How many frames a short animation takes from the image's start."""
        frames: int = min(
            _field(self._header, "n-pages", 1), _ANIMATED_FRAMES, _ANIMATED_PIXELS // (self._header.width * self._header.height)
        )
        if frames > 1 and self._header.get_typeof("delay"):
            shown_ms = 0
            for number, delay_ms in enumerate(self._header.get("delay")[:frames], 1):
                shown_ms += max(delay_ms, 10)
                if shown_ms >= _ANIMATED_MS:
                    return number
        return frames


def _box(width: int) -> tuple[int, int]:
    return min(width, _LONGEST_SIDE), min(width * _TALLEST, _LONGEST_SIDE)


def _file(variant: str, name: str, width: int, height: int) -> MadeFile:
    return MadeFile(variant=variant, name=name, mime_type="image/webp", width=width, height=height)


def _webp(image: Any, quality: int, **options: Any) -> bytes:
    return bytes(image.webpsave_buffer(Q=quality, effort=2, keep="none", **options))


def _reduced(image: Any, width: int, height: int) -> Any:
    return _srgb(image.thumbnail_image(width, height=height, size="down"))


def _rgb(image: Any) -> Any:
    """A grey picture in three bands, its alpha kept."""
    if image.bands >= 3:
        return image
    grey = image.extract_band(0)
    return grey.bandjoin([grey, grey, *([image.extract_band(1)] if image.hasalpha() else [])]).copy(interpretation="srgb")


def _srgb(image: Any) -> Any:
    if image.interpretation != "srgb":
        image = image.colourspace("srgb")
    return image if image.format == "uchar" else image.cast("uchar")


def _field(image: Any, name: str, default: int) -> int:
    found: int = image.get(name) if image.get_typeof(name) else default
    return found
