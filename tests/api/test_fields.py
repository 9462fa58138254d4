"""What clients may put into fields: refused with the field's name, or stored exactly as sent."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from server import fields
from server.errors import InvalidRequest

NAMES = [
    "a",
    "x" * 500,
    "🐬" * 500,
    "e\u0301",
    "\u00e9",
    "../../etc/passwd",
    "CON",
    "-rf",
    "%2e%2e",
    ".hidden",
    "a/b\\c",
    " ",
    "\u202egpj.exe",
    "\ufeff",
]
NOT_NAMES = ["", "x" * 501, "a\nb", "a\rb", "a\0", "\x1f", "\x7f", "\x85", "\u2028", "\u2029", "\ud800", "\udcff", None, 7, b"bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_as_they_were(name: str) -> None:
    assert fields.clean_name(name) == name


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        fields.clean_name(name, "file_name")
    assert refused.value.field == "file_name"


def test_limits_of_the_other_texts() -> None:
    assert fields.clean_user_id("ü/%" * 85) == "ü/%" * 85
    assert fields.clean_package_name("p" * 255) == "p" * 255
    assert fields.clean_package_name(None) is None and fields.clean_package_name("") is None
    bad: list[tuple[Callable[[object], object], str]] = [
        (fields.clean_user_id, "u" * 256),
        (fields.clean_user_id, ""),
        (fields.clean_package_name, "p" * 256),
    ]
    for clean, text in bad:
        with pytest.raises(InvalidRequest):
            clean(text)


def test_tags_keep_their_order_and_lose_repetitions() -> None:
    assert fields.clean_tags(["b", "a", "b", "A"]) == ["b", "a", "A"]
    assert fields.parse_tags(" b, a ,,b,") == ["b", "a"]
    assert fields.parse_tags("") == []
    assert len(fields.clean_tags([str(number) for number in range(64)])) == 64


@pytest.mark.parametrize("tags", [[str(number) for number in range(65)], ["x" * 101], [""], ["a\0"], [7], ["\ud800"]])
def test_bad_tags_are_refused(tags: list[object]) -> None:
    with pytest.raises(InvalidRequest):
        fields.clean_tags(tags)


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "metadata",
    [{}, {"a": [1, 2.5, None, True, "ü"]}, {"a": "x" * 65_000}, {"n": 1e30, "m": -1e-30, "z": 0, "y": 0.0}, nested(32), {"": {"": []}}],
)
def test_metadata_comes_back_as_it_was(metadata: dict[str, Any]) -> None:
    assert fields.clean_metadata(metadata) == metadata
    assert fields.parse_metadata(json.dumps(metadata)) == metadata


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        [],
        "text",
        {"a": "x" * 65_536},
        {"a": "\0"},
        {"a\0": 1},
        {"a": ["\ud800"]},
        {"a": math.nan},
        {"a": math.inf},
        {"a": 1e31},
        {"a": 10**31},
        {"a": 1e-31},
        {"a": object()},
        {1: 2},
        nested(40),
    ],
)
def test_what_is_no_metadata_is_refused(metadata: object) -> None:
    with pytest.raises(InvalidRequest):
        fields.clean_metadata(metadata)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"a":1e999}',
        '{"a":"\\u0000"}',
        '{"a":"\\ud800"}',
        "[" * 60_000,
        '{"a":' * 10_000 + "1" + "}" * 10_000,
        '{"a":"' + "é" * 40_000 + '"}',
        b"\xff",
    ],
    ids=lambda text: text[:12],
)
def test_text_that_is_no_metadata_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidRequest):
        fields.parse_metadata(text)


@pytest.mark.parametrize("clean", [fields.clean_name, fields.clean_user_id, fields.clean_package_name])
def test_every_text_refuses_control_characters(clean: Callable[[object], object]) -> None:
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0xD800, 0xDFFF):
        with pytest.raises(InvalidRequest):
            clean(f"a{chr(code)}b")
