"""Contact sheets: each picture in its cell, in the order that was asked for, on the background that was asked for."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import pyvips

from server.previews.decoders import Decoders
from server.previews.making import Unmakeable
from server.previews.sheets import MOST_PICTURES, Sheet
from tests.previews.decoding import Studio
from tests.previews.pictures import photo

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
PNG = "image/png"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    decoders = Decoders(1)
    yield Studio(decoders, tmp_path_factory.mktemp("studio"))
    decoders.close()


def plain(colour: list[int], width: int = 100, height: int = 100) -> tuple[bytes, str]:
    image = (pyvips.Image.black(width, height, bands=len(colour)) + colour).cast("uchar").copy(interpretation="srgb")
    return bytes(image.pngsave_buffer()), PNG


def at(image: Any, x: int, y: int) -> list[int]:
    return [round(each) for each in image.getpoint(x, y)]


def test_pictures_stand_in_rows_with_padding_between_and_around(studio: Studio) -> None:
    sheet = Sheet(columns=2, cell_width=100, cell_height=100, padding=10, background="#010203", format="png")
    image = studio.sheet([plain(RED), plain(GREEN), plain(BLUE)], sheet)
    assert (image.width, image.height) == (230, 230)
    assert [at(image, x, y) for x, y in ((60, 60), (170, 60), (60, 170))] == [RED, GREEN, BLUE]
    # The first and last pixel of a cell, those beside it, and the cell that nobody has.
    assert [at(image, x, 60) for x in (9, 10, 109, 110, 119, 120)] == [[1, 2, 3], RED, RED, [1, 2, 3], [1, 2, 3], GREEN]
    assert [at(image, 60, y) for y in (9, 10, 109, 110, 119, 120)] == [[1, 2, 3], RED, RED, [1, 2, 3], [1, 2, 3], BLUE]
    assert at(image, 170, 170) == [1, 2, 3]


def test_contain_shows_all_and_cover_fills(studio: Studio) -> None:
    wide = plain(RED, 200, 100)
    contained = studio.sheet([wide], Sheet(columns=1, cell_width=100, cell_height=100, padding=0, format="png"))
    assert [at(contained, 50, y) for y in (24, 25, 74, 75)] == [WHITE, RED, RED, WHITE]
    covered = studio.sheet([wide], Sheet(columns=1, cell_width=100, cell_height=100, padding=0, format="png", fit="cover"))
    assert [at(covered, *corner) for corner in ((0, 0), (99, 99))] == [RED, RED]


def test_small_pictures_stay_small_in_the_middle(studio: Studio) -> None:
    image = studio.sheet([plain(RED, 20, 20)], Sheet(columns=1, cell_width=60, cell_height=60, padding=0, format="png"))
    assert [at(image, each, each) for each in (19, 20, 39, 40)] == [WHITE, RED, RED, WHITE]


def test_what_is_seen_through_shows_the_background(studio: Studio) -> None:
    half = plain([255, 0, 0, 0])
    on_blue = studio.sheet([half], Sheet(columns=1, cell_width=100, cell_height=100, padding=0, background="#0000ff", format="png"))
    assert at(on_blue, 50, 50) == BLUE
    sheet = Sheet(columns=2, cell_width=100, cell_height=100, padding=4, background="transparent", format="png")
    through = studio.sheet([half, plain(GREEN)], sheet)
    assert [at(through, x, 50)[-1] for x in (1, 50)] == [0, 0]
    assert at(through, 150, 50) == [*GREEN, 255]


@pytest.mark.parametrize("form", ["webp", "png", "jpeg"])
def test_all_kinds_of_pictures_go_on_all_kinds_of_sheets(studio: Studio, form: Any) -> None:
    grey = bytes(photo().colourspace("b-w").pngsave_buffer())
    grey_alpha = bytes(photo().colourspace("b-w").bandjoin(255).pngsave_buffer())
    pictures = [
        (grey, PNG),
        (grey_alpha, PNG),
        (bytes(photo().jpegsave_buffer()), "image/jpeg"),
        (bytes(photo().webpsave_buffer()), "image/webp"),
    ]
    backgrounds = ["#ffffff"] if form == "jpeg" else ["#ffffff", "transparent"]
    for background in backgrounds:
        image = studio.sheet(pictures, Sheet(columns=4, cell_width=64, cell_height=64, format=form, background=background))
        assert image.get("vips-loader").startswith(form)


def test_as_many_as_there_may_be(studio: Studio) -> None:
    image = studio.sheet([plain(RED)] * MOST_PICTURES, Sheet(columns=6, cell_width=16, cell_height=16, padding=0, format="png"))
    assert at(image, 95, 95) == RED


def test_a_picture_that_cannot_be_read_is_named(studio: Studio) -> None:
    with pytest.raises(Unmakeable, match="damaged") as refused:
        studio.sheet([plain(RED), (b"\x89PNG\r\n\x1a\nno", PNG), plain(BLUE)], Sheet(columns=3))
    assert refused.value.number == 1


@pytest.mark.parametrize("background", ["#fff", "white", "#ffffffff", "#gggggg", ""])
def test_a_background_is_a_colour_or_none(background: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"columns": 1, "background": background}, type=Sheet)
