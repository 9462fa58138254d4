"""Prompts that are made of fields."""

from hypothesis import given
from hypothesis import strategies as st

from server.generation.prompts import animation_prompt, character_prompt, moodboard_prompt

TEXTS = st.none() | st.text(max_size=40)


def test_a_character() -> None:
    assert character_prompt(
        name="Mira",
        appearance="tall, grey eyes.",
        clothing="red coat\nand boots",
        accessories=["a lantern", " ", "two rings", "a map"],
        style="watercolour",
    ) == (
        "Character portrait of Mira. Appearance: tall, grey eyes. Clothing: red coat and boots. "
        "Accessories: a lantern, two rings and a map. Full body, front view, neutral pose, plain background. Style: watercolour."
    )
    assert character_prompt() == "Character portrait. Full body, front view, neutral pose, plain background."


def test_a_moodboard() -> None:
    assert moodboard_prompt(
        characters=["Mira", "Tom"], action="they argue", pose="back to back", scene="a pier at dusk", universe="Harbour", style="noir"
    ) == (
        "Scene with Mira and Tom. Action: they argue. Pose: back to back. Setting: a pier at dusk. Universe: Harbour. Style: noir. "
        "Keep each character as in its reference image, in the order given."
    )
    assert moodboard_prompt(characters=["Mira"], scene="a pier") == "Scene with Mira. Setting: a pier."
    assert moodboard_prompt() == ""


def test_an_animation() -> None:
    assert animation_prompt(motion="the sea rises", camera="slow pan") == "Animate the image: the sea rises. Camera: slow pan."
    assert animation_prompt() == "Animate the image."


@given(name=TEXTS, appearance=TEXTS, accessories=st.lists(st.text(max_size=20), max_size=5), style=TEXTS)
def test_whatever_is_written_it_is_one_line_and_the_same_each_time(
    name: str | None, appearance: str | None, accessories: list[str], style: str | None
) -> None:
    made = character_prompt(name=name, appearance=appearance, accessories=accessories, style=style)
    assert made == character_prompt(name=name, appearance=appearance, accessories=accessories, style=style)
    assert made.splitlines() == [made] and made.startswith("Character portrait") and made.endswith(".") and "  " not in made
