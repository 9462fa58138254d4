"""What may be asked for on demand, and what it is called."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.api.signing import VariantWish, signed_name
from server.errors import InvalidRequest
from server.previews.variants import Variant, negotiated, rounded
from server.settings import Settings
from server.vault.layout import PREVIEW_NAME

SIZES = st.none() | st.integers(1, 65_535)


@given(SIZES, SIZES, st.sampled_from(("contain", "cover")), st.sampled_from(("webp", "avif", "jpeg")), st.integers(1, 100))
def test_a_variant_is_known_by_its_name(width: int | None, height: int | None, fit: str, form: str, quality: int) -> None:
    variant = Variant(width=width, height=height, fit=fit, format=form, quality=quality)  # type: ignore[arg-type] # drawn from the right words
    known = Variant.of_name(variant.name)
    assert known == (variant if width or height else None)
    assert len(variant.name) <= 36
    assert PREVIEW_NAME.fullmatch(variant.name)


@given(st.text(max_size=40))
@example("320.webp")
@example("x-contain-q80.webp")
@example("640x-contain-q80.auto")
@example("0640x-contain-q80.webp")
@example("640x-contain-q080.webp")
@example("640x-contain-q80.webp\n")
@example("storyboard.vtt")
def test_nothing_else_is_the_name_of_a_variant(name: str) -> None:
    variant = Variant.of_name(name)
    assert variant is None or variant.name == name


def test_what_is_asked_for_is_rounded_up_to_the_steps() -> None:
    settings = Settings()
    assert signed_name(settings, VariantWish(width=639)) == "640x-contain-q80.webp"
    assert signed_name(settings, VariantWish(width=640, height=1, quality=81, format="jpeg", fit="cover")) == "640x64-cover-q90.jpeg"
    assert (
        signed_name(settings, VariantWish(height=65_535, quality=100, fit="cover")) == "x2560-contain-q90.webp"
    )  # one side: no box to fill
    assert signed_name(settings, VariantWish(width=1, format="auto")) == "64x-contain-q80.auto"
    with pytest.raises(InvalidRequest):
        signed_name(settings, VariantWish())


@given(st.integers(1, 10_000), st.sets(st.integers(1, 5_000), min_size=1))
def test_rounding_goes_up_and_ends_at_the_largest(wanted: int, steps: set[int]) -> None:
    ascending = tuple(sorted(steps))
    found = rounded(wanted, ascending)
    assert found in steps
    assert found == max(steps) if wanted > max(steps) else found == min(each for each in steps if each >= wanted)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "jpeg"),
        ("*/*", "jpeg"),
        ("image/*", "jpeg"),
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "avif"),
        ("image/webp, */*", "webp"),
        ("IMAGE/WEBP;q=0.5", "webp"),
        ("image/avif;q=0, image/webp", "webp"),
        ("image/avif;q=0.000, image/webp;q=0", "jpeg"),
        ("image/avif;q=banana", "jpeg"),
        ("text/html;x=image/avif", "jpeg"),
        ("", "jpeg"),
    ],
)
def test_auto_takes_the_best_format_that_is_named(accept: str | None, chosen: str) -> None:
    assert negotiated("640x-contain-q80.auto", accept) == (f"640x-contain-q80.{chosen}", "Accept")
    assert negotiated("640x-contain-q80.webp", accept) == ("640x-contain-q80.webp", None)
