"""What a client may put into a file's fields: names, tags, package names, metadata, user ids.

Every door and `server/intake` clean their input here, so a value that one way in refuses is refused by all. Each
function returns the value to store, never a normalised one (no Unicode folding, no trimming: what was sent is what
comes back), or raises `InvalidRequest` naming the field.

Refused in every text: control characters (Unicode category Cc, which holds NUL, CR and LF), the line and paragraph
separators U+2028 and U+2029 (they break lines in logs and scripts as LF does), and lone surrogates (not text:
PostgreSQL and UTF-8 have no place for them). Accepted on purpose: format characters, among them the bidirectional marks
and overrides, because right-to-left names and emoji need such characters and no decision of Coffer rests on a name:
the type comes from the bytes, and no name is ever part of a path.
"""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from server.errors import InvalidRequest

NAME_CHARACTERS = 500
USER_ID_CHARACTERS = 255
PACKAGE_NAME_CHARACTERS = 255
TAGS = 64
TAG_CHARACTERS = 100
METADATA_BYTES = 64 * 1024
METADATA_DEPTH = 32
# PostgreSQL keeps a JSON number as a decimal and prints it in full: 1e300 comes back as 301 digits. Within these bounds the
# largest metadata (64 KiB of `1e30,`) prints as 0.4 MiB; without them a list of such files could fill the memory.
METADATA_NUMBER_LARGEST = 1e30
METADATA_NUMBER_SMALLEST = 1e-30

_REFUSED_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NOT_IN_PROSE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_IN_JSON = re.compile("[\x00\ud800-\udfff]")


def clean_name(text: object, field: str = "name") -> str:
    """A file's name: 1 to 500 characters."""
    return _text(text, field, NAME_CHARACTERS)


def clean_user_id(text: object, field: str = "user_id") -> str:
    """A user's id: 1 to 255 characters. Any text, so it may hold `/` and `%`."""
    return _text(text, field, USER_ID_CHARACTERS)


def clean_package_name(text: object, field: str = "package_name") -> str | None:
    """A package name: up to 255 characters. None and the empty text both mean that the file belongs to no package."""
    return None if text is None or text == "" else _text(text, field, PACKAGE_NAME_CHARACTERS)


def clean_text(text: str, field: str, most: int) -> str:
    """Prose: up to so many characters, line breaks and tabs among them."""
    if len(text) > most:
        raise InvalidRequest(field, f"may have at most {most} characters")
    if _NOT_IN_PROSE.search(text):
        raise InvalidRequest(field, "must not contain control characters but line breaks and tabs, nor lone surrogates")
    return text


def clean_tags(tags: Iterable[object], field: str = "tags") -> list[str]:
    """Up to 64 tags of 1 to 100 characters, in their order, each once."""
    cleaned = list(dict.fromkeys(_text(tag, field, TAG_CHARACTERS) for tag in tags))
    if len(cleaned) > TAGS:
        raise InvalidRequest(field, f"a file may have at most {TAGS} tags")
    return cleaned


def clean_metadata(value: object, field: str = "metadata") -> dict[str, Any]:
    """A JSON object of at most 64 KiB encoded, 32 levels deep, with numbers that are zero or within 1e-30 and 1e30."""
    if not isinstance(value, dict):
        raise InvalidRequest(field, "must be a JSON object")
    _check_json(value, field, METADATA_DEPTH)
    if len(msgspec.json.encode(value)) > METADATA_BYTES:
        raise InvalidRequest(field, f"may be at most {METADATA_BYTES} bytes of JSON")
    return value


def parse_tags(text: str, field: str = "tags") -> list[str]:
    """Tags as a form or a query string carries them: separated by commas, with the spaces around each left out."""
    return clean_tags([tag.strip(" ") for tag in text.split(",") if tag.strip(" ")], field)


def parse_metadata(text: str | bytes, field: str = "metadata") -> dict[str, Any]:
    """Metadata as a form or a query string carries it: the text of a JSON object."""
    if len(text) > METADATA_BYTES:
        raise InvalidRequest(field, f"may be at most {METADATA_BYTES} bytes of JSON")
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(field, "must be a JSON object") from None
    return clean_metadata(value, field)


def _text(text: object, field: str, most: int) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(field, "must be text")
    if not 1 <= len(text) <= most:
        raise InvalidRequest(field, f"must have 1 to {most} characters")
    if _REFUSED_CHARACTERS.search(text):
        raise InvalidRequest(field, "must not contain control characters, line separators or lone surrogates")
    return text


def _check_json(value: object, field: str, levels: int) -> None:
    if levels < 0:
        raise InvalidRequest(field, f"may be at most {METADATA_DEPTH} levels deep")
    match value:
        case None | bool():
            pass
        case str():
            if _NOT_IN_JSON.search(value):
                raise InvalidRequest(field, "must not contain NUL characters or lone surrogates")
        case int() | float():
            if value and not METADATA_NUMBER_SMALLEST <= abs(value) <= METADATA_NUMBER_LARGEST:
                raise InvalidRequest(field, "numbers must be zero or between 1e-30 and 1e30 in size")
        case dict():
            for key, each in value.items():
                if not isinstance(key, str):
                    raise InvalidRequest(field, "must be a JSON object")
                _check_json(key, field, levels)
                _check_json(each, field, levels - 1)
        case list():
            for each in value:
                _check_json(each, field, levels - 1)
        case _:
            raise InvalidRequest(field, "must be a JSON object")
