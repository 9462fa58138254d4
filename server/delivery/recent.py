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


@dataclass(frozen=True, slots=True)
class _Recent:
    expires_at: int  # the link's end, in Unix seconds
    kept_until: float
    headers: list[tuple[str, str]]
    file: Handle
    size_bytes: int
    stamps: list[tuple[Handle, tuple[int, int]]]  # of the file, and of a preview's original
    volume_id: UUID
    path: str


class RecentLinks:
    """The files of links (by their text) and public files (by their ids) answered within the last second. Lives in one event loop.

    A file whose inode has changed since is none of them any more, in whichever process that happened: deleting, replacing and revoking a
    file's links all take its name away, which is such a change. What does not touch the file (a user's epoch, what a public file is called)
    is found in the row, after `KEPT_SECONDS` at most, or at once by `clear`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._kept: dict[str, _Recent] = {}  # oldest first
        self._cleared_at = -math.inf
        self._sweep: asyncio.TimerHandle | None = None

    def now(self) -> float:
        """The moment to give to `keep`: taken before the row was asked."""
        return self._clock()

    def find(self, text: str, cache_control: Callable[[int], str]) -> Answer | None:
        """The answer to a GET without conditions for the link that reads like this, if one was given a moment ago.

        `cache_control` makes that header of the link's expiry.
        """
        found = self._kept.get(text)
        if found is None:
            return None
        changed = any(_stamp(file) != stamp for file, stamp in found.stamps)
        if self._clock() >= found.kept_until or time.time() >= found.expires_at or changed:
            del self._kept[text]
            return None
        fresh = ("cache-control", cache_control(found.expires_at))
        headers = [fresh if each[0] == "cache-control" else each for each in found.headers]
        return Answer(200, headers, Body(found.file, 0, found.size_bytes, b"", found.volume_id, found.path))

    def keep(self, text: str, expires_at: int, asked_at: float, answer: Answer, original: Handle | None = None) -> None:
        """Remembers the answer to a good link. `asked_at` is `now` as it was before its row was asked; only whole files are kept.

        `original` is the file whose name revokes the link, where that is another one than it gives.
        """
        if asked_at <= self._cleared_at or answer.status != 200 or answer.body is None or answer.body.file is None:
            return
        self._kept.pop(text, None)
        if len(self._kept) >= _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        body, file = answer.body, answer.body.file
        stamps = [(each, _stamp(each)) for each in (file, original) if each is not None]
        self._kept[text] = _Recent(
            expires_at, asked_at + KEPT_SECONDS, answer.headers, file, body.length, stamps, body.volume_id, body.path
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
        self._kept = {text: each for text, each in self._kept.items() if now < each.kept_until}
        self._sweep = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget) if self._kept else None


def _stamp(file: Handle) -> tuple[int, int]:
    """What changes with every name that a file gains or loses, and its length."""
    facts = os.fstat(file.fd)
    return facts.st_ctime_ns, facts.st_size
