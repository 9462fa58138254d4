"""Conditional requests, their order of precedence, and If-Range (RFC 9110, section 13)."""

import hashlib
import itertools
import timeit
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.delivery.conditions import Outcome, evaluate, evaluate_if_match, http_date, range_applies
from server.delivery.headers import etag, last_modified
from server.errors import PreconditionFailed

SHA256 = hashlib.sha256(b"these bytes").digest()
OURS = etag(SHA256)
OTHER = etag(hashlib.sha256(b"other bytes").digest())
CHANGED = datetime(1994, 11, 6, 8, 49, 37, 654_321, tzinfo=UTC)
SAME = "Sun, 06 Nov 1994 08:49:37 GMT"
EARLIER = "Sun, 06 Nov 1994 08:49:36 GMT"
LATER = "Sun, 06 Nov 1994 08:49:38 GMT"


def outcome(method: str = "GET", **headers: str) -> str:
    try:
        return evaluate(method, {name.replace("_", "-"): value for name, value in headers.items()}, etag(SHA256), CHANGED).value
    except PreconditionFailed:
        return "failed"


def test_without_conditions() -> None:
    assert outcome() == "proceed"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (OURS, True),
        ("*", True),
        (" * ", True),
        (f"{OTHER}, {OURS}", True),
        (f'"a,b" ,,\t{OURS} , "c"', True),
        (f'"", {OURS}', True),
        (f'"caf\xe9", {OURS}', True),
        (OTHER, False),
        ("", False),
        (OURS.strip('"'), False),
        (OURS.upper(), False),
        (OURS[:-1], False),
        (f"{OTHER}, *", False),
        (f"{OTHER} {OURS}", False),
        (f"w/{OURS}", False),
        (f"W/ {OURS}", False),
        (f"'a', {OURS}", False),
    ],
)
def test_lists_of_entity_tags(value: str, names: bool) -> None:
    """A malformed list names nothing: If-Match then refuses and If-None-Match sends, the safe side of each."""
    assert evaluate_if_match(value, etag(SHA256)) is names
    assert outcome(if_match=value) == ("proceed" if names else "failed")
    assert outcome(if_none_match=value) == ("not modified" if names else "proceed")
    assert outcome("PUT", if_none_match=value) == ("failed" if names else "proceed")


def test_weak_tags_match_weakly_only() -> None:
    """Section 8.8.3.2; a proxy that compressed on the way weakens our ETag."""
    assert outcome(if_none_match=f"W/{OURS}") == "not modified"
    assert outcome(if_match=f"W/{OURS}") == "failed"
    assert outcome(if_match=f"W/{OURS}, {OURS}") == "proceed"


@pytest.mark.parametrize(("date", "modified_since"), [(EARLIER, True), (SAME, False), (LATER, False)])
def test_dates(date: str, modified_since: bool) -> None:
    """The bytes changed 0.65 s after the second that Last-Modified names; that fraction must not count."""
    assert outcome(if_modified_since=date) == ("proceed" if modified_since else "not modified")
    assert outcome("HEAD", if_modified_since=date) == ("proceed" if modified_since else "not modified")
    assert outcome("PUT", if_modified_since=date) == "proceed"
    assert outcome(if_unmodified_since=date) == ("failed" if modified_since else "proceed")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "yesterday",
        f"{SAME}, {SAME}",
        "784111777",
        "1994-11-06T08:49:37Z",
        "Sun, 31 Feb 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 +0000",
    ],
)
def test_what_is_no_date_is_ignored(value: str) -> None:
    assert http_date(value) is None
    assert outcome(if_modified_since=value) == "proceed"
    assert outcome(if_unmodified_since=value) == "proceed"


@pytest.mark.parametrize("value", [SAME, "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994", f" {SAME}\t"])
def test_the_three_forms_of_a_date(value: str) -> None:
    assert http_date(value) == CHANGED.replace(microsecond=0)


@given(st.datetimes(min_value=datetime(1000, 1, 1), max_value=datetime(9000, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001 - hypothesis wants them so
def test_our_own_dates_come_back(moment: datetime) -> None:
    assert http_date(last_modified(moment)) == moment.replace(microsecond=0)


def test_precedence() -> None:
    """Every combination of the four headers, against section 13.2.2 written out as a table of its own."""
    tags, dates = (None, OURS, OTHER), (None, EARLIER, LATER)
    for match, unmodified, none_match, modified in itertools.product(tags, dates, tags, dates):
        sent = {"if_match": match, "if_unmodified_since": unmodified, "if_none_match": none_match, "if_modified_since": modified}
        first_holds = match == OURS if match else unmodified != EARLIER
        unchanged = none_match == OURS if none_match else modified == LATER
        expected = "failed" if not first_holds else "not modified" if unchanged else "proceed"
        assert outcome(**{name: value for name, value in sent.items() if value}) == expected, sent


@pytest.mark.parametrize(
    ("if_range", "strong_date", "applies"),
    [
        (None, False, True),
        (OURS, False, True),
        (f" {OURS} ", False, True),
        (SAME, True, True),
        ("Sunday, 06-Nov-94 08:49:37 GMT", True, True),
        (SAME, False, False),
        (OTHER, True, False),
        (f"W/{OURS}", True, False),
        (f"{OURS}, {OTHER}", True, False),
        ("*", True, False),
        ("", True, False),
        ("nonsense", True, False),
        (EARLIER, True, False),
        (LATER, True, False),
    ],
)
def test_if_range(if_range: str | None, strong_date: bool, applies: bool) -> None:
    """Only the very same bytes may be continued; a later date is no proof either (section 13.1.5: an exact match)."""
    assert range_applies(if_range, etag(SHA256), CHANGED, date_is_strong=strong_date) is applies


@given(st.text(max_size=60), st.sampled_from(["GET", "HEAD", "PUT"]), st.timedeltas(timedelta(0), timedelta(days=1)))
def test_noise_never_raises(value: str, method: str, ago: timedelta) -> None:
    for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since"):
        try:
            assert evaluate(method, {name: value}, etag(SHA256), CHANGED - ago) in Outcome
        except PreconditionFailed:
            assert name in {"if-match", "if-none-match"}
    range_applies(value, etag(SHA256), CHANGED, date_is_strong=True)


def test_hostile_values_cost_little() -> None:
    for value in ('"a",' * 15_000, '"' * 60_000, "," * 60_000 + "x", '"a" ' * 15_000, "Sun, " + " " * 60_000 + "x", '"' + "a" * 60_000):
        for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since"):
            seconds = min(timeit.repeat(lambda name=name, value=value: outcome(**{name.replace("-", "_"): value}), number=1, repeat=3))  # type: ignore[misc]
            assert seconds < 0.1, (name, value[:10])
