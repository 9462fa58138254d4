"""Waiting for a condition instead of for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(predicate: Callable[[], T], timeout_seconds: float = 60) -> T:
    """The first true value of `predicate`, asked again and again; AssertionError after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {predicate}"
        time.sleep(0.02)
    return value
