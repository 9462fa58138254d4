"""Waiting for a condition instead of for a time, and being in time for what ends."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def until(predicate: Callable[[], T], timeout_seconds: float = 60) -> T:
    """The first true value of `predicate`, asked again and again; AssertionError after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {predicate}"
        time.sleep(0.02)
    return value


async def eventually(look: Callable[[], Awaitable[T]], suffices: Callable[[T], object] = bool, timeout_seconds: float = 60) -> T:
    """As `until`, for what is looked at in this event loop: the first look that `suffices`."""
    deadline = time.monotonic() + timeout_seconds
    while not suffices(seen := await look()):
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s, but {seen!r}"
        await asyncio.sleep(0.02)
    return seen


def before_its_end(make: Callable[[int], T | None]) -> T:
    """What `make` gives for a lifetime in seconds. None: it came too late to use it, for machines stand still, and gets a longer one."""
    for seconds in (1, 3, 9, 27):
        if (made := make(seconds)) is not None:
            return made
    raise AssertionError(f"never in time: {make}")
