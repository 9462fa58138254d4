"""All volumes, and the threads that do their blocking work."""

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple
from uuid import UUID

from server.errors import VolumeUnavailable
from server.vault.volume import Volume

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

_THREADS = 16  # enough to keep a disk's queue busy with syncs; more only add memory and switches

_PROBE_SECONDS = 1.0  # how long a round waits for them
_HANGS_SECONDS = 5.0  # and for how long a disk may not answer: a machine may be that busy


class Row(Protocol):
    """What a row of `volumes` says (`server.ledger.VolumeRow`)."""

    @property
    def id(self) -> UUID: ...
    @property
    def mount_path(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def is_draining(self) -> bool: ...
    @property
    def reserved_for(self) -> str | None: ...


class _Threads(ThreadPoolExecutor):
    """Threads of which a disk that does not answer may hold all: then there are others for the other disks."""

    def __init__(self) -> None:
        super().__init__(_THREADS, thread_name_prefix="vault")

    def make_up(self) -> None:
        """Begins one for all that waits, which may be for the same disk, and as many as there should be besides."""
        more = _THREADS + self._work_queue.qsize()
        self._max_workers = len(self._threads) + more
        for _ in range(more):
            self.submit(lambda: None)

    def settle(self) -> None:
        """No more than there should be are begun again. Those that were stay, and cost a little memory."""
        self._max_workers = _THREADS


class Vault:
    """The volumes of this server. Lives in one event loop; made by the composition root."""

    def __init__(self, reserve_bytes: int | None) -> None:
        self._reserve_bytes = reserve_bytes
        self._volumes: dict[UUID, Volume] = {}
        self._threads = _Threads()
        self._probes: dict[Volume, tuple[asyncio.Future[None], float]] = {}  # and when each began, by the loop's clock
        self._silent: set[Volume] = set()  # do not answer

    @property
    def volumes(self) -> list[Volume]:
        """All that the rows name, in the order in which they came."""
        return list(self._volumes.values())

    def volume(self, volume_id: UUID | None) -> Volume:
        """The volume of that id. Raises `VolumeUnavailable` when no row names it."""
        found = self._volumes.get(volume_id) if volume_id else None
        if found is None:
            raise VolumeUnavailable
        return found

    def place_for(self, user_id: str) -> Volume:
        """Where a new user is placed: on the volume that is reserved for the user, or else on the shared one with the most room.

        One that is draining takes nobody; one that is not open takes users only when all are so. Raises `VolumeUnavailable`.
        """
        for volume in self.volumes:
            if volume.reserved_for == user_id:
                return volume
        shared = [volume for volume in self.volumes if volume.reserved_for is None and not volume.is_draining]
        candidates = [volume for volume in shared if volume.state == "open"] or [v for v in shared if v.state != "unavailable"]
        if not candidates:
            raise VolumeUnavailable
        return max(candidates, key=lambda volume: volume.free_bytes_seen())

    async def check_writable(self, volume: Volume, needed_bytes: int) -> None:
        """As `Volume.check_writable`. Looks at the disk only when the last look found too little: room may have been made since."""
        if not volume.had_room(needed_bytes):
            await self.run(volume.check_writable, needed_bytes)

    async def refresh(self, rows: Iterable[Row] | None) -> None:
        """Takes over the rows of `volumes`, then probes each volume. With None it only probes.

        Called at start and every second, so a volume that goes away, comes back or turns read-only is known within two; a volume that does
        not answer holds up nobody: one round waits for it, and those after it do not.
        """
        if rows is not None:
            self._take_over(rows)
        begun = [self._probe(volume) for volume in self.volumes if volume not in self._probes]
        if begun:
            await asyncio.wait(begun, timeout=_PROBE_SECONDS)
        for volume, (probe, began) in list(self._probes.items()):
            if not probe.done() and asyncio.get_running_loop().time() - began > _HANGS_SECONDS:
                volume.give_up()
                if volume not in self._silent:
                    self._silent.add(volume)
                    self._threads.make_up()

    def _take_over(self, rows: Iterable[Row]) -> None:
        named: dict[UUID, Volume] = {}
        for row in rows:
            volume = self._volumes.get(row.id)
            if volume is None or volume.mount != Path(row.mount_path):
                volume = Volume(row.id, Path(row.mount_path), self._reserve_bytes)
            volume.apply_row(row.state)
            volume.is_draining, volume.reserved_for = row.is_draining, row.reserved_for
            named[row.id] = volume
        self._volumes = named

    def _probe(self, volume: Volume) -> asyncio.Future[None]:
        """Of each volume one is under way at a time, in a thread of its own, which no end of the process waits for."""
        loop = asyncio.get_running_loop()
        probe: asyncio.Future[None] = loop.create_future()
        self._probes[volume] = probe, loop.time()

        def answered() -> None:
            self._answered(volume)
            probe.set_result(None)

        def look() -> None:
            volume.probe()
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(answered)

        threading.Thread(target=look, name="probe", daemon=True).start()
        return probe

    def _answered(self, volume: Volume) -> None:
        self._probes.pop(volume, None)
        if volume in self._silent:
            self._silent.remove(volume)
            if not self._silent:
                self._threads.settle()

    async def run(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Runs blocking file work in one of the vault's threads. Cancelling the wait does not stop the work."""
        return await self.start(work, *arguments)

    def start(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> asyncio.Future[Result]:
        """As `run`, for those who need to know later whether the work is over."""
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def close(self) -> None:
        """Waits for work under way, ends the threads, and lets go of the mounts, so that they may be unmounted."""
        self._threads.shutdown(wait=not self._silent)
        for volume in self.volumes:
            volume.let_go()
