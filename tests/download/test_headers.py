"""Headers of stored bytes: names survive, nothing splits a line, nothing active is shown."""

import re
from datetime import UTC, datetime, timedelta, timezone
from email.message import Message
from email.utils import collapse_rfc2231_value
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.delivery.headers import (
    MOST_DISPOSITION_BYTES,
    Disposition,
    content_disposition,
    disposition_of,
    etag,
    last_modified,
    representation_headers,
    validator_headers,
)
from server.kinds import KNOWN
from tests.download.samples import a_file

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# RFC 6266, section 4.1, with the ext-value of RFC 8187, section 3.2.1: stricter than any browser.
GRAMMAR = re.compile(
    rf'(?P<type>{TOKEN}); filename="(?P<plain>(?:[ !#-\[\]-~])*)"'
    r"(?:; filename\*=UTF-8''(?P<exact>(?:%[0-9A-F]{2}|[!#$&+\-.^_`|~0-9A-Za-z])*))?"
)

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=500)


def parsed(value: str) -> tuple[str, str, str]:
    """Disposition, plain name, and the name that a reader of RFC 6266 uses."""
    match = GRAMMAR.fullmatch(value)
    assert match, value
    exact = match["exact"]
    return match["type"], match["plain"], match["plain"] if exact is None else unquote_to_bytes(exact).decode("utf-8")


@given(NAMES, st.sampled_from(["inline", "attachment"]))
@example("photo.jpg", "inline")
@example('a "quoted\\" name.jpg', "inline")
@example("naïve file € 😀.jpg", "attachment")
@example("../../etc/passwd", "attachment")
@example("50% off%41;x=y.png", "inline")
@example("\u202egpj.exe", "inline")
@example(" ", "inline")
@example("UTF-8''x*", "inline")
@example("%" * 500, "attachment")
@example("🌅" * 149 + ".jpeg", "attachment")
@example("🌅" * 500, "attachment")
@example("🌅" * 495 + ".jpeg", "inline")
@example("é" * 400 + ".🌅é", "inline")
@example("🌅." + "é" * 498, "inline")
@example("." + "🌅" * 499, "inline")
def test_the_name_comes_back(name: str, disposition: Disposition) -> None:
    check(name, disposition)


@given(st.text(alphabet="a%é日🌅. ", min_size=300, max_size=500), st.sampled_from(["inline", "attachment"]))
def test_long_names_too(name: str, disposition: Disposition) -> None:
    """Such as Hypothesis seldom makes by itself; most of them are too long for the header."""
    check(name, disposition)


def check(name: str, disposition: Disposition) -> None:
    """Whole where it fits into the header, else a beginning of it and its extension."""
    value = content_disposition(disposition, name)
    kind, plain, exact = parsed(value)
    assert kind == disposition
    assert not set(plain) & set('"\\/%:*?<>|')
    assert len(plain) == len(exact)
    assert len(value) <= MOST_DISPOSITION_BYTES == 2_048
    if exact != name:
        check_a_shortened_name(exact, name, disposition)

    # A second opinion: the standard library's parser of RFC 2231, on which RFC 8187 builds.
    message = Message()
    message["Content-Disposition"] = value
    found = [each for key, each in message.get_params([], header="Content-Disposition") if key == "filename"][-1]
    assert collapse_rfc2231_value(found) == exact


def check_a_shortened_name(exact: str, name: str, disposition: str) -> None:
    """Nothing was cut that would have fitted."""
    stem, dot, extension = name.rpartition(".")
    ending = dot + extension if stem and 1 <= len(extension) <= 16 else ""
    assert exact.endswith(ending)
    kept = exact.removesuffix(ending)
    assert name.startswith(kept) and 0 < len(kept) < len(name) - len(ending)
    one_more = name[: len(kept) + 1] + ending
    # Every character counts once in the plain form and, percent-encoded, once in the exact one.
    frame_bytes = len(f"{disposition}; filename=\"\"; filename*=UTF-8''")
    assert frame_bytes + len(one_more) + len(quote(one_more, safe="!#$&+-.^_`|~")) > MOST_DISPOSITION_BYTES


@given(st.text(max_size=100))
@example("a\r\nSet-Cookie: b=c")
@example("a\0b\x7f\x85\u2028")
@example("\ud800")
def test_no_name_splits_a_line(name: str) -> None:
    """Such names are refused on their way in; should one be in a row all the same, it stays one line of plain ASCII."""
    value = content_disposition("attachment", name)
    parsed(value)
    assert value.isascii()
    assert value.isprintable()


def test_known_values() -> None:
    assert content_disposition("inline", "EURO rates.txt") == 'inline; filename="EURO rates.txt"'
    # RFC 6266, section 5
    assert content_disposition("attachment", "€ rates") == "attachment; filename=\"_ rates\"; filename*=UTF-8''%E2%82%AC%20rates"


@pytest.mark.parametrize(
    "mime_type", ["text/html", "image/svg+xml", "application/xml", "application/pdf", "text/xml", "application/json", "x"]
)
def test_what_is_not_just_shown_is_always_saved(mime_type: str) -> None:
    assert disposition_of(mime_type, None) == disposition_of(mime_type, "inline") == disposition_of(mime_type, "attachment") == "attachment"


@pytest.mark.parametrize("mime_type", [mime for mime in KNOWN if mime.startswith(("image/", "video/", "audio/"))])
def test_media_is_shown_unless_asked_otherwise(mime_type: str) -> None:
    assert disposition_of(mime_type, None) == disposition_of(mime_type, "inline") == "inline"
    assert disposition_of(mime_type, "attachment") == "attachment"


def test_a_picture() -> None:
    file = a_file(b"abc", file_name="Büro.jpg", content_changed_at=datetime(1994, 11, 6, 8, 49, 37, 999_999, tzinfo=UTC))
    assert dict(representation_headers(file)) == {
        "content-type": "image/jpeg",
        "content-disposition": "inline; filename=\"B_ro.jpg\"; filename*=UTF-8''B%C3%BCro.jpg",
        "accept-ranges": "bytes",
        "repr-digest": "sha-256=:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=:",
        "etag": '"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"',
        "last-modified": "Sun, 06 Nov 1994 08:49:37 GMT",
        "cache-control": "private, no-cache, no-transform",
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox; default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
    }
    assert set(validator_headers(file)) < set(representation_headers(file))


@pytest.mark.parametrize(
    "mime_type", ["image/jpeg\r\nSet-Cookie: a=b", "text/html; charset=utf-8", "", "image", "image/jpég", "image/jpeg\n"]
)
def test_a_row_written_by_hand_cannot_split_a_header(mime_type: str) -> None:
    assert dict(representation_headers(a_file(b"", mime_type=mime_type)))["content-type"] == "application/octet-stream"


@given(st.text(max_size=50), st.text(max_size=50))
def test_every_value_is_one_line_of_ascii(name: str, mime_type: str) -> None:
    for header, value in representation_headers(a_file(b"x", file_name=name, mime_type=mime_type)):
        assert re.fullmatch("[a-z-]+", header)
        assert re.fullmatch("[!-~](?:[ -~]*[!-~])?", value), (header, value)


def test_other_time_zones() -> None:
    assert last_modified(datetime(1994, 11, 6, 9, 49, 37, tzinfo=timezone(timedelta(hours=1)))) == "Sun, 06 Nov 1994 08:49:37 GMT"


def test_etags_are_strong() -> None:
    assert etag(bytes(32)) == '"' + "00" * 32 + '"'
