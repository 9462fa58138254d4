"""Prompts from fields, for apps that do not write their own. Pure functions: the same fields give the same text.

A field that is None or blank is left out. What a user wrote goes in as it is, on one line, without the punctuation that would double ours.
"""

from collections.abc import Sequence


def character_prompt(
    *,
    name: str | None = None,
    appearance: str | None = None,
    clothing: str | None = None,
    accessories: Sequence[str] = (),
    style: str | None = None,
) -> str:
    """One character alone, as a reference for later pictures: whole, from the front, before nothing."""
    parts = [
        _sentence("Character portrait of", name) or "Character portrait",
        _sentence("Appearance:", appearance),
        _sentence("Clothing:", clothing),
        _sentence("Accessories:", _listed(accessories)),
        "Full body, front view, neutral pose, plain background",
        _sentence("Style:", style),
    ]
    return _joined(parts)


def moodboard_prompt(
    *,
    characters: Sequence[str] = (),
    action: str | None = None,
    pose: str | None = None,
    scene: str | None = None,
    universe: str | None = None,
    style: str | None = None,
) -> str:
    """Characters in a scene. With several, each is to look as in its own reference, which come in the same order."""
    names = [name for each in characters if (name := _line(each))]
    together = " Keep each character as in its reference image, in the order given" if len(names) > 1 else ""
    parts = [
        _sentence("Scene with", _listed(names)),
        _sentence("Action:", action),
        _sentence("Pose:", pose),
        _sentence("Setting:", scene),
        _sentence("Universe:", universe),
        _sentence("Style:", style),
        together.strip(),
    ]
    return _joined(parts)


def animation_prompt(*, motion: str | None = None, camera: str | None = None, style: str | None = None) -> str:
    """An image that begins to move."""
    parts = [_sentence("Animate the image:", motion) or "Animate the image", _sentence("Camera:", camera), _sentence("Style:", style)]
    return _joined(parts)


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).rstrip(" .,;")


def _sentence(head: str, text: str | None) -> str:
    line = _line(text)
    return f"{head} {line}" if line else ""


def _listed(words: Sequence[str]) -> str:
    lines = [line for each in words if (line := _line(each))]
    return " and ".join([", ".join(lines[:-1]), lines[-1]]) if len(lines) > 1 else "".join(lines)


def _joined(parts: Sequence[str]) -> str:
    return ". ".join(part for part in parts if part) + "." if any(parts) else ""
