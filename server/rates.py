"""How often something may happen: token buckets in memory that all processes of this machine share.

A bucket of a rate of `q` per `w` seconds holds `q` units and regains one every `w / q` seconds, so at most `2 q` pass in any `w` seconds,
and `q` at once. The arithmetic is GCRA (ITU-T I.371): a bucket is one number, the moment at which it will be full again.

Buckets live in a table of fixed size, so memory is bounded whatever the number of names. A process killed at any moment leaves no lock
behind: the kernel releases record locks with their process.
"""

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from server.setting_values import Rate

GROUPS = 8_192
_SLOTS = 8
# A group is the fingerprints of its buckets, then the moments (CLOCK_MONOTONIC, in ns) at which they are full. 1 MiB in all.
_GROUP = struct.Struct(f"<{2 * _SLOTS}Q")
_SLOT = struct.Struct("<Q")
_KEY_BYTES = 16  # before the groups: what fingerprints are keyed with, so that nobody can aim at a group
_MEMORY_BYTES = _KEY_BYTES + GROUPS * _GROUP.size

_VARIABLE = "COFFER_INTERNAL_RATES"
_NS = 1_000_000_000


class Standing(NamedTuple):
    """A bucket after somebody asked: how many units are left, and the seconds until there is one more (rounded up, at least 1)."""

    admitted: bool
    remaining: int
    more_in_seconds: int


class Buckets:
    """The buckets as this process sees them: one for each name, full when first asked for. Lives in one thread.

    A full bucket needs no slot. When more names are short of units than their group has slots for, the one that is nearest to being
    full is forgotten, which lets it start afresh: 65,536 names at the same time are remembered, give or take the luck of the hash.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Within `shared_by_processes`, that memory; otherwise memory of this object's own."""
        path = os.environ.get(_VARIABLE)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC) if path else _new_memory()
        self._is_shared = path is not None  # a lock of memory that nobody else has would cost more than all the rest
        self._memory = mmap.mmap(self._fd, _MEMORY_BYTES)
        self._key = self._memory[:_KEY_BYTES]
        self._clock = clock

    def take(self, name: str, rate: Rate) -> Standing:
        """Takes a unit from the bucket, if it has one."""
        return self._ask(name, rate, takes=True)

    def look(self, name: str, rate: Rate) -> Standing:
        """What `take` would say, with nothing taken."""
        return self._ask(name, rate, takes=False)

    def _ask(self, name: str, rate: Rate, *, takes: bool) -> Standing:
        unit = max(1, rate.seconds * _NS // rate.requests)
        capacity = unit * rate.requests
        number = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, key=self._key).digest(), "little")
        start = _KEY_BYTES + number % GROUPS * _GROUP.size
        if self._is_shared:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, _GROUP.size, start)
        try:
            group = _GROUP.unpack_from(self._memory, start)
            now = self._clock()
            try:
                slot = group.index(number, 0, _SLOTS)
                missing = max(0, group[_SLOTS + slot] - now)
            except ValueError:
                slot, missing = -1, 0
            admitted = missing + unit <= capacity
            if admitted and takes:
                if slot < 0:
                    fulls = group[_SLOTS:]
                    slot = fulls.index(min(fulls))
                    _SLOT.pack_into(self._memory, start + slot * _SLOT.size, number)
                missing += unit
                _SLOT.pack_into(self._memory, start + (_SLOTS + slot) * _SLOT.size, now + missing)
        finally:
            if self._is_shared:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, _GROUP.size, start)
        remaining, towards_next = divmod(capacity - missing, unit)
        return Standing(admitted, remaining, -((towards_next - unit) // _NS))


@contextmanager
def shared_by_processes() -> Iterator[None]:
    """Within it, processes that are started share their buckets. For the parent of several serving processes.

    They reach its memory through its entry in /proc, so nothing is left on any disk, however it ends.
    """
    memory = _new_memory()
    os.environ[_VARIABLE] = f"/proc/{os.getpid()}/fd/{memory}"
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        os.close(memory)


def _new_memory() -> int:
    memory = os.memfd_create("coffer-rates", os.MFD_CLOEXEC)
    os.ftruncate(memory, _MEMORY_BYTES)
    os.pwrite(memory, os.urandom(_KEY_BYTES), 0)
    return memory
