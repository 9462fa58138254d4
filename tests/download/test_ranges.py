"""Which bytes a Range header asks for (RFC 9110, section 14)."""

import timeit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.delivery.ranges import ByteRange, requested_range
from server.errors import RangeNotSatisfiable


@pytest.mark.parametrize(
    ("value", "offset", "length"),
    [
        # Section 14.1.2, on its representation of 10,000 bytes
        ("bytes=0-499", 0, 500),
        ("bytes=500-999", 500, 500),
        ("bytes=-500", 9500, 500),
        ("bytes=9500-", 9500, 500),
        ("bytes=0-0", 0, 1),
        ("bytes=-1", 9999, 1),
        ("bytes=0-", 0, 10_000),
        ("bytes=9999-", 9999, 1),
        ("bytes=9999-9999", 9999, 1),
        # Beyond the end is cut to it
        ("bytes=0-10000", 0, 10_000),
        ("bytes=9990-99999999999999999999999999", 9990, 10),
        ("bytes=-10001", 0, 10_000),
        ("bytes=-99999999999999999999999999", 0, 10_000),
        # Case, leading zeros, white space and empty list elements
        ("Bytes=0-4", 0, 5),
        ("bytes=00000-0004", 0, 5),
        ("bytes= 0-4", 0, 5),
        ("bytes=,0-4 ,", 0, 5),
    ],
)
def test_single_ranges(value: str, offset: int, length: int) -> None:
    assert requested_range(value, 10_000) == ByteRange(offset, length)


@pytest.mark.parametrize("value", ["bytes=10000-", "bytes=10000-10001", "bytes=99999999999999999999999999-", "bytes=-0", "bytes=-000"])
def test_beyond_the_end(value: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        requested_range(value, 10_000)
    assert caught.value.size_bytes == 10_000


@pytest.mark.parametrize(
    "value",
    [
        *("bytes=0-0,-1", "bytes=500-600,601-999", "bytes=0-4, 0-4", "bytes=0-0,"),  # the last is one range, see below
        *("", "bytes", "bytes=", "bytes=-", "bytes= ", "bytes=5-4", "bytes=a-b", "bytes=0x0-4", "bytes=1", "bytes=--1", "bytes=0--1"),
        *(
            "seconds=0-4",
            "bytes 0-4",
            "bytes = 0-4",
            "bytes:0-4",
            "0-4",
            "bytes=0 - 4",
            "bytes=+0-4",
            "bytes=1_0-20",
            "bytes=\u0660-\u0664",
            "bytes=0-4\n",
        ),
        *("bytes=" + "9" * 41 + "-", "bytes=0-" + "0" * 100_000),
    ],
)
def test_everything_else_means_the_whole_file(value: str) -> None:
    expected = ByteRange(0, 1) if value == "bytes=0-0," else None
    assert requested_range(value, 10_000) == expected


@pytest.mark.parametrize("value", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=-0", "bytes=5-"])
def test_an_empty_file_has_no_ranges(value: str) -> None:
    assert requested_range(value, 0) is None


def test_content_range() -> None:
    assert ByteRange(42, 1192).content_range(1234) == "bytes 42-1233/1234"


NUMBERS = st.one_of(st.just(""), st.integers(0, 200).map(str), st.integers(0, 10**45).map(str))


@given(st.one_of(st.tuples(NUMBERS, NUMBERS).map(lambda ends: f"bytes={ends[0]}-{ends[1]}"), st.text(max_size=50)), st.integers(0, 150))
@example("bytes=0-", 1)
def test_a_range_lies_within_the_file(value: str, size: int) -> None:
    """Checked against the bytes themselves: Python's slices do the arithmetic a second time."""
    data = bytes(index % 256 for index in range(size))
    try:
        found = requested_range(value, size)
    except RangeNotSatisfiable:
        first, _, last = value[len("bytes=") :].strip(" \t,").partition("-")
        assert data[int(first) :] == b"" if first else int(last) == 0
        return
    if found is not None:
        assert 0 <= found.offset < found.offset + found.length <= size
        first, _, last = value[len("bytes=") :].strip(" \t,").partition("-")
        expected = data[int(first) : int(last) + 1 if last else None] if first else data[-int(last) :]
        assert data[found.offset : found.offset + found.length] == expected


def test_hostile_values_cost_little() -> None:
    for value in ("bytes=" + "0-1," * 20_000, "bytes=" + " ,\t" * 20_000, "bytes=" + "0" * 60_000, "bytes=0-1" + " " * 60_000 + "x"):
        assert min(timeit.repeat(lambda value=value: requested_range(value, 10), number=1, repeat=3)) < 0.05  # type: ignore[misc]
