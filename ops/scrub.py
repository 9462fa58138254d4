"""`coffer scrub`: reads stored bytes again, those verified the longest time ago first, and marks what is not what was stored.

A file was verified when it came, and files are read in the order in which they came: so the next one is always the one whose last look is
the longest ago, and all that must be remembered is where the last run stopped.
"""

import asyncio
import signal
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from ops.audit import LEAST_SUSPICIOUS, SUSPICIOUS_SHARE
from ops.tool import Desk, Finding
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes
from server.errors import CofferError
from server.ledger import audit as rows
from server.ledger import scrub as rounds
from server.ledger.models import StoredFile
from server.vault import Volume, inventory

ROUND_SECONDS = 30 * 86_400.0
_HEADROOM = 1.2  # the store grows, and the machine is switched off now and then
_SLOWEST_BYTES_PER_SECOND = 2.0**20
_BYTES_PER_FILE = 16 * 2**10  # what looking one up costs the disk, besides its bytes
_PAGE = 1_000
_REMEMBER_SECONDS = 5.0

Wrong = Literal["missing", "length", "sha256", "unreadable"]

_LONGEST_AGO = datetime.min.replace(tzinfo=UTC)


async def run(desk: Desk) -> str:
    """One round over each volume, from where the last run stopped; or the files that were asked for."""
    files, size_bytes = await rows.count_stored(desk.db)
    rate: float | None = desk.arguments.rate
    scrub = _Scrub(desk, rate or max(_SLOWEST_BYTES_PER_SECOND, (size_bytes + files * _BYTES_PER_FILE) * _HEADROOM / ROUND_SECONDS))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, scrub.stopping.set)
    with desk.progress("scrub", size_bytes, "B") as scrub.bar:
        if desk.arguments.file:
            await scrub.verify_these(desk.arguments.file)
        elif desk.arguments.damaged:
            await scrub.verify_damaged()
        else:
            await scrub.verify_all()
    damaged, after = 0, None
    while page := await rounds.page_of_damaged(desk.db, after, _PAGE):
        damaged, after = damaged + len(page), page[-1].id
    desk.figures |= {"files": scrub.files, "bytes": scrub.bytes, "damaged_files": damaged, "is_complete": not scrub.stopping.is_set()}
    stopped = ", stopped before the end," if scrub.stopping.is_set() else ""
    return f"{scrub.files:,} files ({human_bytes(scrub.bytes)}) read again{stopped}"


class _Scrub:
    def __init__(self, desk: Desk, bytes_per_second: float) -> None:
        self.desk = desk
        self.bar = desk.progress("scrub", 0, "B")
        self.stopping = asyncio.Event()
        self.files = self.bytes = 0
        self._wrong = 0
        self._rate = bytes_per_second
        self._due = time.monotonic()

    async def verify_all(self) -> None:
        """Volumes whose last round is the longest ago come first, so that a run that is stopped cannot starve one."""
        ended = await rounds.last_rounds(self.desk.db)
        for volume in sorted(self.desk.vault.volumes, key=lambda each: ended.get(each.id) or _LONGEST_AGO):
            if volume.state == "unavailable":
                self._tell_away(volume)
            elif not self.stopping.is_set():
                await self._round(volume)

    async def _round(self, volume: Volume) -> None:
        db = self.desk.db
        after = await rounds.begin_scrub(db, volume.id)
        remembered_at = time.monotonic()
        while (page := await rounds.page_to_scrub(db, volume.id, after, _PAGE)).last is not None:
            for file in page.files:
                if not await self._verify(volume, file):
                    if after is not None:
                        await rounds.remember_scrub(db, volume.id, after)
                    return
                after = file.id
                if time.monotonic() - remembered_at > _REMEMBER_SECONDS:
                    await rounds.remember_scrub(db, volume.id, after)
                    remembered_at = time.monotonic()
            after = page.last
            await self.desk.lock.check()
        await rounds.finish_scrub(db, volume.id)

    async def verify_these(self, ids: list[UUID]) -> None:
        """Raises `CommandFailed` for ids that are no files', when the others have been verified."""
        found = await rows.get_stored(self.desk.db, ids)
        await self._verify_each(found)
        if missing := set(ids) - {file.id for file in found}:
            raise CommandFailed(f"there is no file {', '.join(map(str, sorted(missing)))}", Exit.NOT_FOUND)

    async def verify_damaged(self) -> None:
        """Those that are marked, to see whether they were put back."""
        after: UUID | None = None
        while page := await rounds.page_of_damaged(self.desk.db, after, _PAGE):
            after = page[-1].id
            await self._verify_each(page)

    async def _verify_each(self, files: list[StoredFile]) -> None:
        volumes = {volume.id: volume for volume in self.desk.vault.volumes}
        for file in files:
            volume = volumes.get(file.volume_id)
            if volume is None or volume.state == "unavailable":
                self._tell(file, volume, "file_unread", "its volume is unavailable")
            elif not await self._verify(volume, file):
                return

    async def _verify(self, volume: Volume, file: StoredFile) -> bool:
        """Reads a file and does what is to be done. False when the run has been told to stop, or must."""
        wrong = await self._look(volume, file, file.file_path)
        if self.stopping.is_set():
            return False
        self.files += 1
        if wrong is None:
            if file.damaged_at is not None and await rounds.unmark_damaged(self.desk.db, file):
                self._tell_recovered(file)
            return True
        return await self._look_again(volume, file, wrong)

    async def _look_again(self, volume: Volume, seen: StoredFile, first: Wrong) -> bool:
        """Nothing is damaged before its volume, its row and its bytes have been looked at once more."""
        await self.desk.vault.run(volume.probe)
        if volume.state == "unavailable":
            self._tell_away(volume)
            return False
        now = await rows.get_stored(self.desk.db, [seen.id])
        if not now or (now[0].volume_id, now[0].file_path, now[0].sha256) != (seen.volume_id, seen.file_path, seen.sha256):
            return True  # deleted, replaced or moved meanwhile
        file = now[0]
        wrong = await self._look(volume, file, file.file_path)
        if self.stopping.is_set():
            return False
        if wrong is None:
            self._tell(file, volume, "unsteady", f"was read wrong ({first}), and then right: look at memory, cables and the disk's own log")
            return True
        if file.damaged_at is not None:
            return await self._look_aside(volume, file, wrong)
        self._wrong += 1
        if self._wrong > max(LEAST_SUSPICIOUS, self.files * SUSPICIOUS_SHARE):
            text = f"{self._wrong} of {self.files} files are damaged: the scrub stops, for rather the volume or the machine is"
            self.desk.found(Finding(kind="volume", state="look", text=text, volume_id=volume.id, command="coffer volume list"))
            return False
        if await rounds.mark_damaged(self.desk.db, file, wrong):
            if wrong != "missing":
                await self._set_aside(volume, file)
            self._tell(file, volume, "damaged", _MEANING[wrong])
        return True

    async def _look_aside(self, volume: Volume, file: StoredFile, wrong: Wrong) -> bool:
        """A file that was found damaged and is not in its place: perhaps its bytes are right after all."""
        if wrong == "missing" and await self._look(volume, file, file.file_path + inventory.DAMAGED) is None:
            if self.stopping.is_set():
                return False
            await self.desk.vault.run(inventory.set_back, volume, file.file_path)
            if await rounds.unmark_damaged(self.desk.db, file):
                self._tell_recovered(file)
        else:
            if wrong != "missing":
                await self._set_aside(volume, file)
            self._tell(file, volume, "damaged", "is still damaged")
        return not self.stopping.is_set()

    async def _set_aside(self, volume: Volume, file: StoredFile) -> None:
        vault = self.desk.vault
        try:
            await vault.run(inventory.set_aside, volume, file.file_path)
        except FileNotFoundError:  # deleted meanwhile
            return
        except FileExistsError:  # what was put back is damaged, too
            await vault.run(inventory.quarantine, volume, file.file_path, f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}")
        except CofferError as problem:  # read-only: its row keeps it from being read all the same, but for an edge that has its name
            self._tell(file, volume, "file_served", f"is damaged, and could not be renamed: {problem}")

    async def _look(self, volume: Volume, file: StoredFile, path: str) -> Wrong | None:
        """Reads the file at the pace. None: it is what was stored, or the run has been told to stop."""
        run = self.desk.vault.run
        try:
            digest = await run(inventory.begin_digest, volume, path)
            if digest.length_bytes != file.file_size:
                return "length"
            self.bytes += digest.read_bytes
            await self._pace(_BYTES_PER_FILE + digest.read_bytes)
            while digest.read_bytes < file.file_size and not self.stopping.is_set():
                read_bytes = await run(digest.read)
                if not read_bytes:
                    return "length"
                self.bytes += read_bytes
                await self._pace(read_bytes)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: somebody has changed the row's path by hand
            return "missing"
        except OSError as problem:
            if not inventory.is_of_the_file(problem):
                raise
            return "unreadable"
        return None if self.stopping.is_set() or digest.sha256 == file.sha256 else "sha256"

    async def _pace(self, read_bytes: int) -> None:
        self.bar.update(read_bytes)
        now = time.monotonic()
        self._due = max(self._due, now - 1) + read_bytes / self._rate  # what was missed is not made up for
        if self._due > now:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), self._due - now)

    def _tell(self, file: StoredFile, volume: Volume | None, kind: str, what: str) -> None:
        self.desk.found(
            Finding(
                kind=kind,
                state="look",
                text=f"file {file.id} of user {file.user_id!r} {what}",
                user_id=file.user_id,
                file_id=file.id,
                volume_id=file.volume_id,
                path=file.file_path,
                command=f"coffer restore file {file.id}" if kind == "damaged" else None,
            )
        )

    def _tell_recovered(self, file: StoredFile) -> None:
        text = f"file {file.id} of user {file.user_id!r} is right again"
        self.desk.found(Finding(kind="damaged", state="repaired", text=text, user_id=file.user_id, file_id=file.id, path=file.file_path))

    def _tell_away(self, volume: Volume) -> None:
        text = f"volume {volume.id} at {volume.mount} is unavailable: {volume.reason}"
        self.desk.found(Finding(kind="volume", state="look", text=text, volume_id=volume.id, command="coffer volume list"))


_MEANING: dict[Wrong, str] = {
    "missing": "is missing",
    "length": "has another length than was stored",
    "sha256": "has other bytes than were stored",
    "unreadable": "cannot be read: its disk fails",
}
