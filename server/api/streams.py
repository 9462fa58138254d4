"""Event streams that are open: how many a user has, and their end when the server stops."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import TooManyStreams

MOST_STREAMS_PER_USER = 10
"""In one server process; it bounds what a process holds. With several, a user may have as many in each."""

LONGEST_SECONDS = 300.0
HEARTBEAT_SECONDS = 15.0

STREAMS = "streams"  # under this name the application's state, which the server hands to every connection, holds `Streams`


class Streams:
    """One per process. uvicorn waits for answers under way before it tells the application that it stops, so these are told first."""

    def __init__(self, longest_seconds: float = LONGEST_SECONDS, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        """After `longest_seconds` a client must connect again, and its credentials are looked at anew. When nothing has been sent for
        `heartbeat_seconds` a comment is, so that whoever is gone is noticed and no proxy loses patience.
        """
        self.longest_seconds, self.heartbeat_seconds = longest_seconds, heartbeat_seconds
        self.stopping = asyncio.Event()
        self._open: Counter[str] = Counter()

    @contextmanager
    def opened(self, user_id: str) -> Iterator[None]:
        """Counts a stream of the user while it is open. Raises `TooManyStreams`."""
        if self._open[user_id] >= MOST_STREAMS_PER_USER:
            raise TooManyStreams(MOST_STREAMS_PER_USER)
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]
