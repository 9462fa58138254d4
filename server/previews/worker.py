"""Makes the previews that files wait for. The rows say which those are; a job is only a hint that one of them may be next."""

import asyncio
import errno
import heapq
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from uuid import UUID
from weakref import WeakValueDictionary

from server import ledger
from server.errors import CofferError
from server.ledger import Database, File, PreviewFacts, PreviewRow
from server.ledger.queue import Retry
from server.previews.figures import Figures
from server.previews.models import Made, Unmakeable, Wishes
from server.previews.on_demand import OnDemand
from server.previews.scratch import scratch_directory
from server.vault import Vault, Volume
from server.vault.layout import previews_directory

MOST_TRIES = 3
FIRST_DELAY_SECONDS = 2.0
"""Before the second try; each further one waits four times as long. For a volume that is away, twice as long."""
LONGEST_DELAY_SECONDS = 60.0

_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
"""Of the worker's own scratch space, descriptors, memory or processes: no file is to blame for them."""

Make = Callable[[Path, str, Path, Wishes], Awaitable[Made]]

log = logging.getLogger("coffer.previews")


class PreviewWorker:
    """Handles the jobs of one worker process. Lives in one event loop."""

    def __init__(self, db: Database, vault: Vault, make: Make, on_demand: OnDemand, wishes: Wishes, at_once: int) -> None:
        self._on_demand = on_demand
        self._at_work: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._db = db
        self._vault = vault
        self._make = make
        self._wishes = wishes
        # One more than are decoded at once: what the rows and the disk take of a preview's time is the next one's to be decoded in.
        self._turns = Turns(at_once + 1)
        self._decoding = Turns(at_once)
        self._room = Room()
        self._counted: dict[UUID, File] = {}  # whose try has been counted and goes on
        self._begun: dict[UUID, float] = {}  # when, by the loop's clock
        self.figures = Figures()

    async def handle(self, file_id: UUID, variant: str | None, put_off: int, place: tuple[int, int]) -> None:
        """Makes one file's previews, if it waits for them, or one variant. `put_off` is how often the job has been. Raises `Retry`; at the
        last try what went wrong, once the row says so.

        Repeating it is safe. After `stop` nothing is begun: the row brings a job for previews back later, and that for a variant stays.
        """
        # A file's bytes may be replaced, so what is made of the old ones must not come after what is made of the new.
        async with self._at_work.setdefault(file_id, asyncio.Lock()):
            if variant is None:
                await self._handle_previews(file_id, put_off, place)
            else:
                await self._handle_variant(file_id, variant, put_off, place)

    async def _handle_variant(self, file_id: UUID, name: str, put_off: int, place: tuple[int, int]) -> None:
        async with self._turns.taken(place) as may_go_on:
            if not may_go_on:
                raise Retry(0, "the worker is stopping")
            try:
                await self._on_demand.handle(file_id, name)
            except Exception as problem:
                if put_off + 1 < MOST_TRIES:
                    raise Retry(FIRST_DELAY_SECONDS * 4**put_off, f"{type(problem).__name__}: {problem}") from problem
                raise

    async def _handle_previews(self, file_id: UUID, put_off: int, place: tuple[int, int]) -> None:
        async with self._turns.taken(place) as may_go_on:
            while may_go_on and (file := await self._look_up(file_id, put_off)) and file.preview_state == "pending":
                if await self._try(file, put_off, place):
                    return
                # Its bytes were replaced meanwhile, or it is gone: look again.

    def stop(self) -> None:
        """Lets go of the jobs that have not begun."""
        self._turns.close()
        self._decoding.close()

    async def forgive(self) -> None:
        """Takes back the tries that go on. Call it after `stop`: whoever stops a worker may lose patience with it and kill it, and what it
        has in hand is not to blame.
        """
        while self._counted:
            _, file = self._counted.popitem()
            with suppress(CofferError):
                await ledger.uncount_preview_try(self._db, file)

    async def _look_up(self, file_id: UUID, put_off: int) -> File | None:
        try:
            return await ledger.find_file_anywhere(self._db, file_id)
        except CofferError as problem:
            raise _later(put_off, problem) from problem

    async def _try(self, file: File, put_off: int, place: tuple[int, int]) -> bool:
        """False when the row has changed meanwhile.

        A try is counted before the decoder sees the bytes. So a file that takes the whole worker along with it, which then tells nobody,
        gets no more tries than one that fails politely; and whoever was tried before is tried alone, so that no other shares its fate.
        A fault of the volume, of the database or of this machine is not the file's, and no try.
        """
        tries: int | None = 0
        try:
            volume = self._vault.volume(file.volume_id)
            await self._vault.check_writable(volume, 0)
            async with self._room.entered(alone=file.preview_tries > 0), AsyncExitStack() as decoding:
                if not await decoding.enter_async_context(self._decoding.taken(place)):
                    return True
                tries = await ledger.begin_preview(self._db, file)
                if tries is None:
                    return False
                self._counted[file.id] = file
                self._begun[file.id] = asyncio.get_running_loop().time()
                directory = previews_directory(file.file_path, file.id)
                if tries > MOST_TRIES:
                    return await self._give_up(file, volume, directory, "failed", "crashed")
                try:
                    source = await self._vault.run(volume.stored_file, file.file_path)
                except FileNotFoundError:
                    return await self._is_as_read(file) and await self._give_up(file, volume, directory, "failed", "bytes_missing")
                return await self._preview(file, volume, source, directory, decoding)
        except Exception as problem:
            if isinstance(problem, CofferError) or (isinstance(problem, OSError) and problem.errno in _MACHINE_ERRORS):
                if isinstance(problem, OSError):
                    log.warning("this machine lacks something: %s", problem, extra={"file_id": str(file.id)})
                if self._counted.pop(file.id, None):
                    with suppress(CofferError):
                        await ledger.uncount_preview_try(self._db, file)
                raise _later(put_off, problem) from problem
            if tries is None or tries < MOST_TRIES:
                raise Retry(FIRST_DELAY_SECONDS * 4 ** max(0, (tries or 0) - 1), f"{type(problem).__name__}: {problem}") from problem
            await self._fail(file, put_off)
            raise
        finally:
            self._counted.pop(file.id, None)
            self._begun.pop(file.id, None)

    async def _preview(self, file: File, volume: Volume, source: Path, directory: str, decoding: AsyncExitStack) -> bool:
        """Makes it, lets the next one be decoded, stores it, says so. False when the row has changed meanwhile."""
        with scratch_directory() as output:
            try:
                made = await self._make(source, file.mime_type, Path(output), self._wishes)
                await decoding.aclose()
            except Unmakeable as problem:
                state: ledger.PreviewState = "unsupported" if problem.reason == "unsupported" else "failed"
                return await self._give_up(file, volume, directory, state, problem.reason)
            sizes = await self._vault.run(volume.store_previews, directory, Path(output), [each.name for each in made.files])
        rows = [
            PreviewRow(
                variant=each.variant, file_name=each.name, mime_type=each.mime_type, width=each.width, height=each.height, size_bytes=size
            )
            for each, size in zip(made.files, sizes, strict=True)
        ]
        facts = PreviewFacts(**{name: getattr(made, name) for name in PreviewFacts.__struct_fields__})
        if await ledger.finish_preview(self._db, file, "ready", facts=facts, made=rows):
            self._count(file, "ready")
            return True
        await self._tidy_after(file, volume, directory)
        return False

    async def _fail(self, file: File, put_off: int) -> None:
        try:
            with suppress(ValueError):  # a row's path changed by hand leads nowhere
                directory = previews_directory(file.file_path, file.id)
                await self._give_up(file, self._vault.volume(file.volume_id), directory, "failed", "error")
                return
            await ledger.finish_preview(self._db, file, "failed", reason="error")
        except CofferError as problem:
            raise _later(put_off, problem) from problem

    async def _give_up(self, file: File, volume: Volume, directory: str, state: ledger.PreviewState, reason: str) -> bool:
        log.info("no preview: %s", reason, extra={"file_id": str(file.id), "mime_type": file.mime_type})
        await self._vault.run(volume.remove_previews, directory)  # first: who has heard the end finds none
        if await ledger.finish_preview(self._db, file, state, reason=reason):
            self._count(file, state)
            return True
        await self._tidy_after(file, volume, directory)  # those removed may have been of other bytes
        return False

    def _count(self, file: File, state: ledger.PreviewState) -> None:
        now = asyncio.get_running_loop().time()
        self.figures.count(file.file_type, state, now - self._begun.get(file.id, now))

    async def _is_as_read(self, file: File) -> bool:
        now = await ledger.find_file_anywhere(self._db, file.id)
        return now is not None and (now.volume_id, now.file_path) == (file.volume_id, file.file_path)

    async def _tidy_after(self, file: File, volume: Volume, directory: str) -> None:
        """What was just stored is not wanted: the file may be gone, or be on another volume, and what was left here have been removed
        before we stored; or it has other bytes by now, whose previews another worker may have stored before us.
        """
        now = await ledger.find_file_anywhere(self._db, file.id)
        if now is None:
            await self._vault.run(volume.remove_late_previews, directory)
        elif now.volume_id != file.volume_id:
            await self._vault.run(volume.remove_previews, directory)
        else:
            await ledger.renew_preview(self._db, file)


def _later(put_off: int, problem: Exception) -> Retry:
    """The volume, the database or what this machine has to give is away: the job waits for it, however long that takes."""
    return Retry(min(FIRST_DELAY_SECONDS * 2 ** min(put_off, 10), LONGEST_DELAY_SECONDS), type(problem).__name__)


class Room:
    """Holds many at once, or one alone, who is let in before those who come later."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._alone = False
        self._waiting_alone = 0

    @asynccontextmanager
    async def entered(self, *, alone: bool) -> AsyncIterator[None]:
        """Waits for room."""
        async with self._changed:
            if alone:
                self._waiting_alone += 1
                try:
                    await self._changed.wait_for(lambda: not self._inside)
                finally:
                    self._waiting_alone -= 1
            else:
                await self._changed.wait_for(lambda: not self._alone and not self._waiting_alone)
            self._inside += 1
            self._alone = alone
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._alone = False
                self._changed.notify_all()


class Turns:
    """Lets so many jobs run at once, and of those that wait the one with the lowest place first."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: list[tuple[tuple[int, int], int, asyncio.Future[bool]]] = []
        self._numbers = itertools.count()
        self._closed = False

    @asynccontextmanager
    async def taken(self, place: tuple[int, int]) -> AsyncIterator[bool]:
        """Waits for a turn and holds it. Gives False, at once and without one, after `close`."""
        if self._closed:
            yield False
            return
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (place, next(self._numbers), turn))
        self._hand_out()
        if not await turn:
            yield False
            return
        try:
            yield True
        finally:
            self._free += 1
            self._hand_out()

    def close(self) -> None:
        """Sends away who waits and who comes."""
        self._closed = True
        for _, _, turn in self._waiting:
            turn.set_result(False)
        self._waiting.clear()

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            heapq.heappop(self._waiting)[2].set_result(True)
