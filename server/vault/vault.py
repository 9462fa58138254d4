"""All volumes, and the threads that do their blocking work."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple
from uuid import UUID

from server.errors import VolumeUnavailable
from server.vault.volume import Volume

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

_THREADS = 16  # enough to keep a disk's queue busy with syncs; more only add memory and switches


class Vault:
    """The volumes of this server. Lives in one event loop; made by the composition root."""

    def __init__(self, reserve_bytes: int | None) -> None:
        self._reserve_bytes = reserve_bytes
        self._volumes: dict[UUID, Volume] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="vault")

    @property
    def volumes(self) -> list[Volume]:
        """All that rows have named since the start, in the order in which they came."""
        return list(self._volumes.values())

    def volume(self, volume_id: UUID | None) -> Volume:
        """The volume of that id. Raises `VolumeUnavailable` when no row names it."""
        found = self._volumes.get(volume_id) if volume_id else None
        if found is None:
            raise VolumeUnavailable
        return found

    def roomiest(self) -> Volume:
        """Where a new user is placed: the open volume with the most room. Raises `VolumeUnavailable`."""
        candidates = [volume for volume in self.volumes if volume.state == "open"] or [v for v in self.volumes if v.state != "unavailable"]
        if not candidates:
            raise VolumeUnavailable
        return max(candidates, key=lambda volume: volume.free_bytes())

    async def refresh(self, rows: Iterable[tuple[UUID, str, str]] | None) -> None:
        """Takes over the rows of `volumes` (id, mount path, state), then probes each volume. With None it only probes.

        Called at start and every second, so a volume that goes away, comes back or turns read-only is known within a second.
        """
        for volume_id, mount, state in rows or ():
            known = self._volumes.get(volume_id)
            if known is None or known.mount != Path(mount):
                known = self._volumes[volume_id] = Volume(volume_id, Path(mount), self._reserve_bytes)
            known.apply_row(state)
        await asyncio.gather(*(self.run(volume.probe) for volume in self.volumes))

    async def run(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Runs blocking file work in one of the vault's threads. Cancelling the wait does not stop the work."""
        return await self.start(work, *arguments)

    def start(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> asyncio.Future[Result]:
        """As `run`, for those who need to know later whether the work is over."""
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def close(self) -> None:
        """Waits for work under way and ends the threads."""
        self._threads.shutdown(wait=True)
