"""A body fetched as a whole, however often the connection is cut on the way."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from types import TracebackType

from server.fetching.client import Answer, Fetcher, FetchFailed

MOST_CUTS_WITHOUT_A_BYTE = 5
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
LEAST_BYTES_PER_SECOND = 1_024
PACE_SECONDS = 30.0
"""Over so long that pace is measured. Who sends less is holding us up."""

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_CUTS = {"interrupted", "timeout", "connect", "resolve"}
_PASSING = {408, 425, 429, 500, 502, 503, 504}


class Download:
    """An async context manager that opens the URL; then its attributes tell of the answer, and `chunks` gives the body, once.

    A cut connection goes on where it was, by a range with `If-Range`, provided that the server has named the bytes by a strong ETag (RFC
    9110, section 13.1.5: a weak one, or a date, may stand for other bytes). Otherwise it is `interrupted`, and whoever called begins anew.
    Memory holds one chunk. Raises `UrlRefused` and `FetchFailed`, when it opens and between chunks. Bound its time with `asyncio.timeout`.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        url: str,
        *,
        most_bytes: int,
        headers: Mapping[str, str] | None = None,
        most_bytes_per_second: int | None = None,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        pace_seconds: float = PACE_SECONDS,
    ) -> None:
        self._fetcher = fetcher
        self._asked_url = url
        self._most_bytes = most_bytes
        self._headers = dict(headers or {})
        self._most_bytes_per_second = most_bytes_per_second
        self._first_pause_seconds = first_pause_seconds
        self._pace_seconds = pace_seconds
        self._stack = AsyncExitStack()
        self._answer: Answer | None = None
        self._etag: str | None = None
        self.received_bytes = 0
        self.url = url
        self.size_bytes: int | None = None

    async def __aenter__(self) -> "Download":
        answer = await self._open(self._headers)
        if answer.status != 200:
            await self._stack.aclose()
            raise failed_status(answer.status)
        try:
            self._read_head(answer)
        except FetchFailed:
            await self._stack.aclose()
            raise
        self._answer = answer
        return self

    async def __aexit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    def _read_head(self, answer: Answer) -> None:
        """What the first answer says of the bytes."""
        headers = answer.headers
        _check_encoding(answer)
        length = headers.get("content-length")
        if length is not None:
            self.size_bytes = int(length)  # h11 has seen to it that it is a number
            if self.size_bytes > self._most_bytes:
                raise FetchFailed("too_large", may_pass=False)
        elif "transfer-encoding" not in headers:
            raise FetchFailed("unbounded", may_pass=False)  # its end could not be told from a cut
        etag = headers.get("etag", "")
        if _STRONG_ETAG.fullmatch(etag) and self.size_bytes is not None and headers.get("accept-ranges", "").lower() != "none":
            self._etag = etag
        self.url = answer.url

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes, in order, each once."""
        began = time.monotonic()
        pace_began, pace_bytes = began, 0
        cuts = 0
        while True:
            try:
                if self._answer is None:
                    self._answer = await self._resume()
                async for chunk in self._answer.body:
                    cuts = 0
                    self.received_bytes += len(chunk)
                    if self.received_bytes > self._most_bytes:
                        raise FetchFailed("too_large", may_pass=False)
                    yield chunk
                    now = time.monotonic()
                    if now - pace_began >= self._pace_seconds:
                        if self.received_bytes - pace_bytes < LEAST_BYTES_PER_SECOND * (now - pace_began):
                            raise FetchFailed("too_slow", may_pass=True)
                        pace_began, pace_bytes = now, self.received_bytes
                    if self._most_bytes_per_second is not None:
                        ahead_seconds = self.received_bytes / self._most_bytes_per_second - (now - began)
                        if ahead_seconds > 0:
                            await asyncio.sleep(ahead_seconds)
                return
            except FetchFailed as problem:
                cuts += 1
                if problem.reason not in _CUTS or self._etag is None or cuts > MOST_CUTS_WITHOUT_A_BYTE:
                    raise
                await self._stack.aclose()
                self._answer = None
                await asyncio.sleep(min(self._first_pause_seconds * 2 ** (cuts - 1), LONGEST_PAUSE_SECONDS))
                pace_began, pace_bytes = time.monotonic(), self.received_bytes

    async def _resume(self) -> Answer:
        """Asks for the rest. Raises `FetchFailed`, `changed` where the bytes are not those of before."""
        answer = await self._open(self._headers | {"range": f"bytes={self.received_bytes}-", "if-range": self._etag or ""})
        if answer.status in _PASSING:
            raise FetchFailed("interrupted", may_pass=True)
        if answer.status not in (200, 206, 412, 416):
            raise failed_status(answer.status)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        wanted = (self.received_bytes, (self.size_bytes or 0) - 1, self.size_bytes)
        told = found and tuple(int(each) for each in found.groups())
        if answer.status != 206 or told != wanted or answer.headers.get("etag", self._etag) != self._etag:
            raise FetchFailed("changed", may_pass=True)
        _check_encoding(answer)
        return answer

    async def _open(self, headers: Mapping[str, str]) -> Answer:
        self._stack = AsyncExitStack()
        return await self._stack.enter_async_context(self._fetcher.request("GET", self._asked_url, headers=headers))


def failed_status(status: int) -> FetchFailed:
    """What an answer of another status than was hoped for stands for."""
    return FetchFailed(f"status_{status}", may_pass=status in _PASSING)


def _check_encoding(answer: Answer) -> None:
    """Nothing is ever decompressed, so a small answer cannot grow."""
    if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise FetchFailed("encoded", may_pass=False)
