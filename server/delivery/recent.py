"""Links and public files that were answered a moment ago, so that whoever shows the same again costs no look at its row, nor an opening."""

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from server.delivery.service import Answer, Body
from server.vault.volume import Handle

KEPT_SECONDS = 1.0
"""The longest that revoking a user's links, or ending a public file, takes to be seen here when another process did it (P4)."""
_MOST_KEPT = 1_024  # each keeps a file open, and a preview's its original, too
NEVER = 2**63
"""The end of what does not expire, in Unix seconds."""


@dataclass(slots=True)
class Recent:
    """A whole answer, with its file open. `prepared` is for whoever sends it, to keep what it would else make again each time."""

    file: Handle
    size_bytes: int
    prepared: object
    _headers: list[tuple[str, str]]
    _cache_control: Callable[[], str]
    _volume_id: UUID
    path: str
    _expires_at: int  # the link's end, in Unix seconds
    _kept_until: float
    _stamps: list[tuple[Handle, tuple[int, int]]]  # of the file, and of a preview's original

    def answer(self) -> Answer:
        """The answer as it would be given at this moment."""
        fresh = ("cache-control", self._cache_control())
        headers = [fresh if each[0] == "cache-control" else each for each in self._headers]
        return Answer(200, headers, Body(self.file, 0, self.size_bytes, b"", self._volume_id, self.path))

    def holds_at(self, now: float) -> bool:
        """Whether it is still the answer, `now` by the clock of its `RecentLinks`."""
        if now >= self._kept_until or time.time() >= self._expires_at:
            return False
        return all(_stamp(file) == stamp for file, stamp in self._stamps)


class RecentLinks:
    """The links and public files answered within the last second, by their paths as they were sent. Lives in one event loop.

    A file whose inode has changed since is none of them any more, in whichever process that happened: deleting, replacing and revoking a
    file's links all take its name away, which is such a change. What does not touch the file (a user's epoch, what a public file is called)
    is found in the row, after `KEPT_SECONDS` at most, or at once by `clear`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._kept: dict[str, Recent] = {}  # oldest first
        self._cleared_at = -math.inf
        self._sweep: asyncio.TimerHandle | None = None

    def now(self) -> float:
        """The moment to give to `keep`: taken before the row was asked."""
        return self._clock()

    def find(self, path: str) -> Recent | None:
        """The answer to a GET without conditions for this path, if one was given a moment ago."""
        found = self._kept.get(path)
        if found is not None and not found.holds_at(self._clock()):
            del self._kept[path]
            return None
        return found

    def keep(
        self,
        path: str,
        answer: Answer,
        *,
        asked_at: float,
        expires_at: int,
        cache_control: Callable[[], str],
        original: Handle | None = None,
    ) -> None:
        """Remembers a good answer. `asked_at` is `now` as it was before its row was asked; only whole files are kept.

        `cache_control` makes that header anew; `original` is the file whose name revokes the link, where that is another one than it gives.
        """
        if asked_at <= self._cleared_at or answer.status != 200 or answer.body is None or answer.body.file is None:
            return
        self._kept.pop(path, None)
        if len(self._kept) >= _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        body, file = answer.body, answer.body.file
        self._kept[path] = Recent(
            file=file,
            size_bytes=body.length,
            prepared=None,
            _headers=answer.headers,
            _cache_control=cache_control,
            _volume_id=body.volume_id,
            path=body.path,
            _expires_at=expires_at,
            _kept_until=asked_at + KEPT_SECONDS,
            _stamps=[(each, _stamp(each)) for each in (file, original) if each is not None],
        )
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget)

    def clear(self) -> None:
        """Forgets all: somebody's links have been revoked, or a public file is none any more, or has another name."""
        self._kept.clear()
        self._cleared_at = self._clock()  # what was asked before, and is answered only now, may say what was true before

    def _forget(self) -> None:
        """Closes what nobody asked for again: an open file keeps its volume from being unmounted, and a deleted one its space."""
        now = self._clock()
        self._kept = {path: each for path, each in self._kept.items() if now < each._kept_until}
        self._sweep = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget) if self._kept else None


def _stamp(file: Handle) -> tuple[int, int]:
    """What changes with every name that a file gains or loses, and its length."""
    facts = os.fstat(file.fd)
    return facts.st_ctime_ns, facts.st_size
