"""Server-sent events (HTML, section 9.2) as bare ASGI: how many streams a user has, how one is answered, and when it ends.

A stream that a client does not read keeps little; its connection is judged as that of any slow reader (`pace.py`).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

from server.api.problems import RAW_COMMON_HEADERS
from server.errors import CofferError, TooManyStreams, TooSlow

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_STREAMS_PER_USER = 10
"""In one server process; it bounds what a process holds. With several, a user may have as many in each."""

LONGEST_SECONDS = 300.0
HEARTBEAT_SECONDS = 15.0
HEARTBEAT = b":\n\n"

_HELLO = b"retry: 2000\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back
    *RAW_COMMON_HEADERS,
]
_FAREWELL_SECONDS = 1.0  # for a client that reads nothing to take the end of its stream

STREAMS = "streams"  # under this name the application's state, which the server hands to every connection, holds `Streams`


class Stream:
    """One that is open."""

    def __init__(self, send: Send, ends: set[asyncio.Task[Any]], heartbeat_seconds: float) -> None:
        self._send, self._ends, self._heartbeat_seconds = send, ends, heartbeat_seconds

    async def tell(self, body: bytes) -> None:
        """Sends it, unless the end comes first: a client that does not read must not keep a server from stopping."""
        sending = asyncio.ensure_future(self._send({"type": "http.response.body", "body": body, "more_body": True}))
        try:
            await asyncio.wait({sending, *self._ends}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not sending.done():
                sending.cancel()
        if sending.done():
            sending.result()

    async def wait(self, news: Coroutine[Any, Any, Any]) -> bool:
        """Returns when there is news or a heartbeat is due; False when the stream is to end: the client has gone, or the server stops."""
        waiting = asyncio.create_task(news)
        try:
            await asyncio.wait({waiting, *self._ends}, timeout=self._heartbeat_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        return not any(end.done() for end in self._ends)


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

    async def answer(self, receive: Receive, send: Send, tell: Callable[[Stream], Awaitable[None]]) -> None:
        """Answers with a stream until `tell` returns, its time is over, or the database is lost."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": _HELLO, "more_body": True})
        ends = {asyncio.create_task(disconnected(receive)), asyncio.create_task(self.stopping.wait())}
        try:
            with suppress(TimeoutError, CofferError):
                async with asyncio.timeout(self.longest_seconds):
                    await tell(Stream(send, ends, self.heartbeat_seconds))
        finally:
            for end in ends:
                end.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await send({"type": "http.response.body", "body": b""})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    with suppress(TooSlow):  # a body that a GET announced and never sent: nobody who means it
        while (await receive())["type"] != "http.disconnect":
            pass
