"""`coffer audit`: are rows, files and counters one truth? server/decisions/0018 says why it may believe what it sees.

Nothing here holds more than a page of rows, a batch of a listing and 10,000 missing previews, whatever the store's size.
"""

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from tqdm import tqdm

from ops.tool import Desk, Finding, State
from server import ledger
from server.commands.output import human_bytes
from server.errors import CofferError
from server.intake.burial import bury
from server.ledger import audit as rows
from server.ledger import moves
from server.ledger import scrub as damages
from server.ledger.audit import Listed
from server.ledger.models import StoredPreview
from server.vault import Volume, inventory
from server.vault.layout import preview_path

GARBAGE_AGE_SECONDS = 24 * 3600.0
"""How old a file without a row must be to be garbage: no upload takes a day from its link to its commit."""
LEAST_SUSPICIOUS, SUSPICIOUS_SHARE = 100, 0.01
"""More than the larger of the two means that not the files are wrong but the volume, the database or the audit."""

_PAGE = 10_000
_USERS_PAGE = 500
_SUSPECTS_PAGE = 1_000
_OVERDUE_SECONDS = 600.0  # housekeeping comes round every 15 s
_MOST_PREVIEWS_AT_ONCE = 10_000  # the next audit finds the rest


@dataclass
class Look:
    """What was seen of one volume. `refusal`: why nothing may be changed on it."""

    volume: Volume
    rows: int = 0
    lost: int = 0
    listed: int = 0
    unknown: int = 0
    refusal: str | None = None

    def refuse(self, desk: Desk, why: str) -> None:
        """From here on the audit changes nothing there."""
        if self.refusal is None:
            self.refusal = why
            text = f"the audit changes nothing on volume {self.volume.id} at {self.volume.mount}: {why}"
            desk.found(Finding(kind="volume", state="look", text=text, volume_id=self.volume.id, command="coffer volume list"))


async def run(desk: Desk) -> str:
    """Everything once. Returns what was looked at."""
    files, size_bytes = await rows.count_stored(desk.db)
    audit = _Audit(desk, files)
    for volume in desk.vault.volumes:
        audit.look_at(volume)
    with desk.progress("audit", 2 * files, " files") as audit.bar:
        try:
            async with asyncio.TaskGroup() as group:  # they wait for different things: the database, the disk
                for work in (audit.compare_rows(), audit.compare_listings(), audit.compare_counters()):
                    group.create_task(work)
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
    audit.weigh()
    for look in audit.looks.values():
        if look.refusal is None:
            await audit.judge_suspects(look)
            await audit.sweep_incoming(look)
    await audit.compare_previews()
    await audit.settle_overdue()
    await audit.tell_copies()
    await audit.tell_damaged()
    listed = sum(look.listed for look in audit.looks.values())
    desk.figures |= {"rows_files": files, "rows_bytes": size_bytes, "listed_files": listed, "volumes": len(audit.looks)}
    return f"{files:,} rows ({human_bytes(size_bytes)}) and {listed:,} files on {len(audit.looks)} volumes"


def _suspicious(count: int, of: int) -> bool:
    return count > max(LEAST_SUSPICIOUS, of * SUSPICIOUS_SHARE)


class _Audit:
    def __init__(self, desk: Desk, files: int) -> None:
        self.desk = desk
        self._files = files
        self.db = desk.db
        self.looks: dict[UUID, Look] = {}
        self.bar: tqdm[Any] = tqdm(disable=True)
        self._began = datetime.now(UTC)
        self._repairs: bool = desk.arguments.repair
        age_seconds: float = desk.arguments.older_than
        # As it was asked: the same audit without its age would leave alone what this one would set aside.
        self._repair = "coffer audit --repair" + ("" if age_seconds == GARBAGE_AGE_SECONDS else f" --older-than {age_seconds / 3600:g}")
        self._oldest_young = time.time() - age_seconds

    @property
    def _state(self) -> State:
        return "repaired" if self._repairs else "repairable"

    def _found(self, kind: str, state: State, text: str, **facts: Any) -> None:
        if state == "repairable":
            facts.setdefault("command", self._repair)
        self.desk.found(Finding(kind=kind, state=state, text=text, **facts))

    def look_at(self, volume: Volume) -> None:
        """Volumes that are away or closed are told of first."""
        look = self.looks[volume.id] = Look(volume)
        if volume.state == "unavailable":
            look.refuse(self.desk, f"it is unavailable: {volume.reason}")
        elif volume.state == "read_only":
            text = f"volume {volume.id} at {volume.mount} is read-only: {volume.reason}"
            self._found("volume", "look", text, volume_id=volume.id, command=f"coffer volume reopen {volume.id}")

    # Losses: rows first, then files

    async def compare_rows(self) -> None:
        """Every row's file lies in its place and has its length."""
        page = await rows.page_of_paths(self.db, None, _PAGE)
        while page.last is not None:
            following = asyncio.ensure_future(rows.page_of_paths(self.db, page.last, _PAGE))
            try:
                for volume_id, (paths, sizes) in page.by_volume.items():
                    self.bar.update(len(paths))
                    look = self.looks.get(volume_id)
                    if look is None or look.refusal is not None:
                        continue
                    look.rows += len(paths)
                    try:
                        wrong = await self.desk.vault.run(inventory.wrong_sizes, look.volume, paths, sizes)
                    except (OSError, CofferError) as problem:
                        look.refuse(self.desk, f"it cannot be read: {problem}")
                        continue
                    if wrong:
                        await self._tell_lost(look, [path.decode() for path in wrong])
            finally:
                page = await following

    async def _tell_lost(self, look: Look, paths: Sequence[str]) -> None:
        """Looks at the files once more, then at the rows: who deletes a file removes its row first."""
        found = {path: await self.desk.vault.run(inventory.facts_of, look.volume, path) for path in paths}
        for file in await rows.get_stored(self.db, [_id_in(path) for path in paths]):
            if file.volume_id != look.volume.id or file.file_path not in found or file.damaged_at is not None:
                continue
            facts = found[file.file_path]
            if facts is not None and facts.size_bytes == file.file_size:
                continue
            look.lost += 1
            if _suspicious(look.lost, self._files):
                look.refuse(self.desk, f"{look.lost} files and more of those that have a row are missing or have another length")
                return
            whole = shlex.quote(str(look.volume.mount / file.file_path))
            self._found(
                "file_missing" if facts is None else "file_length",
                "look",
                f"file {file.id} of user {file.user_id!r}: "
                + (f"{whole} is missing" if facts is None else f"{whole} has {facts.size_bytes} bytes, and should have {file.file_size}"),
                user_id=file.user_id,
                file_id=file.id,
                volume_id=file.volume_id,
                path=file.file_path,
                command=f"coffer restore file {file.id}",
            )

    # Garbage: files first, then rows

    async def compare_listings(self) -> None:
        """Every file has its row, or is remembered as a suspect."""
        for look in self.looks.values():
            if look.refusal is None:
                await self._compare_listing(look)

    async def _compare_listing(self, look: Look) -> None:
        try:
            async for batch in self._batches(look.volume):
                look.listed += len(batch.paths) + len(batch.previews)
                self.bar.update(len(batch.paths))
                for path in batch.strange:
                    whole = shlex.quote(str(look.volume.mount / path))
                    text = f"{whole} is nothing that Coffer makes"
                    self._found("strange", "look", text, volume_id=look.volume.id, path=path, command=f"ls -lad {whole}")
                if unknown := await self._unclaimed(look, await self._unknown(look, batch)):
                    await self._suspect(look, unknown)
        except OSError as problem:
            look.refuse(self.desk, f"it could not be listed to its end: {problem}")
            return
        await rows.forget_suspects(self.db, self._began, look.volume.id)

    def weigh(self) -> None:
        """Before anything is done about garbage: may what was seen of each volume be believed?"""
        for look in self.looks.values():
            if look.rows and not look.listed:
                look.refuse(self.desk, f"its listing is empty, and {look.rows} rows say otherwise")
            elif _suspicious(look.unknown, look.listed):
                look.refuse(self.desk, f"{look.unknown} of {look.listed} files have no row, which is more than an accident leaves")

    async def _batches(self, volume: Volume) -> AsyncIterator[inventory.Batch]:
        """The listing, the next batch being read while this one is looked at."""
        listing = inventory.walk(volume)
        following = self.desk.vault.start(next, listing, None)
        try:
            while (batch := await following) is not None:
                following = self.desk.vault.start(next, listing, None)
                yield batch
        finally:
            await asyncio.wait([following])

    async def _unknown(self, look: Look, batch: inventory.Batch) -> list[Listed]:
        """Those of a listing that no row names."""
        found: set[str] = set()
        if batch.paths:
            found = await rows.files_without_rows(self.db, look.volume.id, batch.paths, batch.ids)
        if batch.previews:
            found |= await rows.previews_without_rows(self.db, look.volume.id, [Listed(*each) for each in batch.previews])
        return [_listed(path) for path in found]

    async def _without_rows(self, look: Look, listed: Sequence[Listed]) -> list[Listed]:
        """Those of some that no row names and nobody claims."""
        found = await rows.without_rows(self.db, look.volume.id, listed)
        return await self._unclaimed(look, [each for each in listed if each.path in found])

    async def _unclaimed(self, look: Look, unknown: list[Listed]) -> list[Listed]:
        claimed = await rows.claimed(self.db, look.volume.id, unknown) if unknown else set()
        return [each for each in unknown if each.path not in claimed]

    async def _suspect(self, look: Look, unknown: list[Listed]) -> None:
        """Looks at the files once more, then at the rows: who stores a file adds its row last."""
        old: dict[str, int] = {}
        for each in unknown:
            facts = await self.desk.vault.run(inventory.facts_of, look.volume, each.path)
            if facts is not None and facts.changed_at <= self._oldest_young:
                old[each.path] = facts.size_bytes
        sure = {each.path for each in await self._without_rows(look, [each for each in unknown if each.path in old])}
        look.unknown += len(sure)
        # Once there are so many that nothing will be done, there is nothing to remember either.
        if sure and not _suspicious(look.unknown, self._files):
            await rows.note_suspects(self.db, self._began, look.volume.id, {path: old[path] for path in sure})

    async def judge_suspects(self, look: Look) -> None:
        """Sets aside what two audits have seen, or tells what would be."""
        date, after = f"{self._began:%Y-%m-%dT%H%M%SZ}", ""
        while page := await rows.page_of_suspects(self.db, self._began, look.volume.id, after, _SUSPECTS_PAGE):
            after = page[-1].file_path
            twice = []
            for suspect in page:
                if suspect.seen_before:
                    twice.append(_listed(suspect.file_path))
                if not (suspect.seen_before and self._repairs):
                    text = f"{look.volume.mount / suspect.file_path} ({human_bytes(suspect.size_bytes)}) has no row"
                    state: State = "repairable" if suspect.seen_before else "waiting"
                    self._found("garbage", state, text, volume_id=look.volume.id, path=suspect.file_path)
            if twice and self._repairs:
                await self._set_aside(look, twice, date)

    async def _set_aside(self, look: Look, suspects: list[Listed], date: str) -> None:
        await self.desk.lock.check()
        vault, volume = self.desk.vault, look.volume
        await vault.run(inventory.check_sentinel, volume)
        moved: list[Listed] = []
        for each in await self._without_rows(look, suspects):
            facts = await vault.run(inventory.facts_of, volume, each.path)
            if facts is None or facts.changed_at > self._oldest_young:
                continue
            try:
                await vault.run(inventory.quarantine, volume, each.path, date)
            except FileNotFoundError:
                continue
            moved.append(each)
        # Should somebody have made it a stored file in the very moment, it is one again.
        still = {each.path for each in await self._without_rows(look, moved)}
        for each in moved:
            if each.path in still:
                text = f"{volume.mount / each.path} had no row, and is in {volume.mount}/quarantine/{date}/ now"
                self._found("garbage", "repaired", text, volume_id=volume.id, path=each.path)
            else:
                await vault.run(inventory.take_back, volume, each.path, date)
        await rows.drop_suspects(self.db, volume.id, [each.path for each in suspects])

    async def sweep_incoming(self, look: Look) -> None:
        """What lies in incoming/ belongs to an upload, or is young."""
        oldest_young = time.time() - self.desk.settings.leftover_age_seconds - _OVERDUE_SECONDS
        volume, old = look.volume, []
        entries = inventory.incoming(volume)
        while (each := await self.desk.vault.run(next, entries, None)) is not None:
            path, facts = each
            upload_id = _uuid(path.rsplit("/", 1)[1])
            if upload_id is None:
                whole = shlex.quote(str(volume.mount / path))
                text = f"{whole} is nothing that Coffer makes"
                self._found("strange", "look", text, volume_id=volume.id, path=path, command=f"ls -lad {whole}")
            elif facts.changed_at < oldest_young:
                old.append(upload_id)
            if len(old) >= _SUSPECTS_PAGE:
                await self._sweep(look, old)
                old = []
        if old:
            await self._sweep(look, old)

    async def _sweep(self, look: Look, old: list[UUID]) -> None:
        live = await ledger.live_uploads(self.db, old)
        left = [upload_id for upload_id in old if upload_id not in live]
        if left and self._repairs:
            await self.desk.lock.check()
            await self.desk.vault.run(look.volume.remove_incoming, left)
        for upload_id in left:
            path = f"incoming/{upload_id}"
            text = f"{look.volume.mount / path} was left by an upload that is over"
            self._found("leftover", self._state, text, volume_id=look.volume.id, path=path)

    # Previews

    async def compare_previews(self) -> None:
        """Every preview's row has its bytes; what is missing can be made again."""
        after: tuple[UUID, str] | None = None
        missing: list[StoredPreview] = []
        seen = lost = 0
        while page := await rows.page_of_previews(self.db, after, _PAGE):
            after = (page[-1].file_id, page[-1].variant)
            seen += len(page)
            for look in self.looks.values():
                if look.refusal is not None:
                    continue
                there = {_path_of(each): each for each in page if each.volume_id == look.volume.id}
                wrong = await self.desk.vault.run(
                    inventory.wrong_sizes, look.volume, list(there), [each.size_bytes for each in there.values()]
                )
                for path in wrong:
                    if await self._preview_is_lost(look, there[path]):
                        lost += 1
                        if len(missing) < _MOST_PREVIEWS_AT_ONCE:
                            missing.append(there[path])
        if _suspicious(lost, seen):
            text = f"{lost} of {seen} previews are missing, which is more than an accident leaves; to make them all anew takes hours"
            self._found("preview_missing", "look", text, command="coffer previews rebuild --for-real")
            return
        if missing and self._repairs:
            await self.desk.lock.check()
        for each in missing:
            if self._repairs:
                await ledger.forget_preview(self.db, each.file_id, each.file_name)
            text = f"preview {each.file_name} of file {each.file_id} is missing" + (" and will be made again" if self._repairs else "")
            self._found("preview_missing", self._state, text, user_id=each.user_id, file_id=each.file_id, volume_id=each.volume_id)

    async def _preview_is_lost(self, look: Look, preview: StoredPreview) -> bool:
        """Looks at the file, the row, and the file again: a worker may be replacing it, and its row last."""
        path = _path_of(preview)
        for _ in range(2):
            facts = await self.desk.vault.run(inventory.facts_of, look.volume, path)
            if facts is not None and (facts.size_bytes == preview.size_bytes or facts.changed_at > time.time() - _OVERDUE_SECONDS):
                return False
            if not await rows.preview_is_stored(self.db, preview):
                return False
        return True

    # Counters, and what housekeeping should have done

    async def compare_counters(self) -> None:
        """Each user's counters are the sums of their rows, which have been compared with the disk."""
        after = ""
        while page := await rows.page_of_counters(self.db, after, _USERS_PAGE):
            after = page[-1].user_id
            for each in page:
                if not each.wrong:
                    continue
                text = f"user {each.user_id!r}: {', '.join(each.wrong)} not the sum"
                if self._repairs:
                    await self.desk.lock.check()
                    was_and_became = await rows.correct_counters(self.db, each.user_id)
                    if was_and_became is None:
                        continue
                    was, became = was_and_became
                    text += "; ".join(f", {name} {was[name]} became {became[name]}" for name in was if was[name] != became[name])
                self._found("counters", self._state, text, user_id=each.user_id)

    async def settle_overdue(self) -> None:
        """Reservations and tombstones that are left although their time is over: no server is running, or its housekeeping fails."""
        while late := await rows.old_reservations(self.db, _OVERDUE_SECONDS, _SUSPECTS_PAGE):
            for upload_id, user_id, size_bytes in late:
                text = f"upload {upload_id} of user {user_id!r} is over and holds {human_bytes(size_bytes)}"
                self._found("reservation", self._state, text, user_id=user_id)
            if not self._repairs:
                break
            await self.desk.lock.check()
            released = await ledger.release_expired(self.db, _SUSPECTS_PAGE)
            for look in self.looks.values():
                if look.refusal is None:
                    await self.desk.vault.run(look.volume.remove_incoming, list(released.values()))
            if not released:
                break
        while old := await rows.old_tombstones(self.db, _OVERDUE_SECONDS, _SUSPECTS_PAGE):
            sound = {volume_id for volume_id, look in self.looks.items() if look.refusal is None}
            can = [each for each in old if each.volume_id in sound]
            for each in old:
                state: State = self._state if each in can else "waiting"
                text = f"the bytes of a deleted file are still there: {each.file_path}"
                self._found("tombstone", state, text, volume_id=each.volume_id, path=each.file_path)
            if not (self._repairs and can):
                break
            await self.desk.lock.check()
            await bury(self.db, self.desk.vault, can)
            if len(can) < len(old):
                break

    async def tell_copies(self) -> None:
        """Copies that a move between volumes has left, or is making, are known by their tombstones, and nobody's garbage."""
        copies, oldest_seconds = await moves.count_copies(self.db)
        if copies and oldest_seconds > _OVERDUE_SECONDS:
            text = f"{copies} copies of moved files are left to remove, since {oldest_seconds / 60:.0f} minutes"
            self._found("copies", "waiting", text, command="coffer rebalance --for-real")

    async def tell_damaged(self) -> None:
        """What the scrub has found stays found until it is put back."""
        after: UUID | None = None
        while page := await damages.page_of_damaged(self.db, after, _SUSPECTS_PAGE):
            after = page[-1].id
            for file in page:
                self._found(
                    "damaged",
                    "look",
                    f"file {file.id} of user {file.user_id!r} is known to be damaged",
                    user_id=file.user_id,
                    file_id=file.id,
                    volume_id=file.volume_id,
                    path=file.file_path,
                    command=f"coffer restore file {file.id}",
                )


def _path_of(preview: StoredPreview) -> str:
    return preview_path(preview.file_path or "", preview.file_id, preview.file_name)


def _listed(path: str) -> Listed:
    parts = path.split("/")
    return Listed(path, parts[3], parts[4]) if parts[2] == "previews" else Listed(path, parts[3][:36])


def _id_in(path: str) -> UUID:
    return UUID(path.rsplit("/", 1)[1].split(".", 1)[0])


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
