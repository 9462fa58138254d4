"""`coffer rebalance`: moves users between volumes while they upload and download. server/decisions/0019 says why nobody notices.

A user is placed on the new volume first, so that what is left to move only gets less. Then each file is copied, synced and verified, given
its name, and its row switched. Where a run stops, or is killed, the next one goes on: the rows say what is where.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from ops.tool import Desk, Finding, State
from server import ledger
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes
from server.errors import (
    CofferError,
    CommitUnknown,
    Damaged,
    DatabaseUnavailable,
    DigestMismatch,
    VolumeFull,
    VolumeReadOnly,
    VolumeUnavailable,
)
from server.ledger import audit as rows
from server.ledger import moves
from server.ledger.models import ResumableUpload
from server.ledger.moves import MovedFile, MovedUser
from server.vault import Volume, inventory
from server.vault.moving import Copy, FileCopy, IncomingCopy, copy_previews, make_directories, publish_all

KEEP_OLD_SECONDS = 15.0
"""How long the old names stay when a file has been moved, for requests that were told of them; and how long a move lasts at least, for a
server hears only after a second or two where the user's uploads go from now on."""

_YOUNGEST_VOLUME_SECONDS = 5.0  # by then every server process knows it
_PAGE = 500
_BATCH_FILES, _BATCH_BYTES = 16, 64 * 2**20  # switched together; a kill repeats so much
_LOOK_AGAIN_SECONDS = 1.0
_MOST_MOVES = 1_000  # of users, to even out, in one run
_EVEN = 0.05  # shares of what volumes can hold that differ by less are even

_FOR_REAL = "coffer rebalance --for-real"


class Want(NamedTuple):
    """A user who is to go to another volume."""

    user: MovedUser
    to: Volume
    why: str


class _Stop(Exception):
    """Nothing more can be moved to, or from, where this user is being moved; it has been told."""


async def run(desk: Desk) -> str:
    """Everything that the rules demand, or what was asked for. Returns what was looked at."""
    mover = _Mover(desk)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, mover.stopping.set)
    if desk.arguments.for_real:
        await mover.wait_for_servers()
    async for want in mover.wants():
        if mover.stopping.is_set():
            break
        if desk.arguments.for_real:
            await mover.move(want)
        else:
            mover.rehearse(want)
    if desk.arguments.for_real:
        await mover.finish()
    else:
        await mover.rehearse_rest()
    desk.figures |= {"users": mover.users, "files": mover.files, "bytes": mover.bytes, "is_complete": not mover.stopping.is_set()}
    stopped = ", stopped before the end," if mover.stopping.is_set() else ""
    return f"{mover.files:,} files ({human_bytes(mover.bytes)}) of {mover.users:,} users moved{stopped}"


@dataclass
class _Room:
    """What a volume holds and can hold, as the plan goes on."""

    volume: Volume
    free_bytes: int
    used_bytes: int

    @property
    def share(self) -> float:
        return self.used_bytes / max(1, self.used_bytes + self.free_bytes)


class _Mover:
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.db = desk.db
        self.run = desk.vault.run
        self.stopping = asyncio.Event()
        self.files = self.bytes = 0
        self.users = 0
        self._looked_at = 0.0
        self._volumes = {volume.id: volume for volume in desk.vault.volumes}
        self._rate: float = desk.arguments.rate or float("inf")
        self._due = time.monotonic()
        self._keep_old: float = desk.arguments.keep_old
        self._told: set[str] = set()

    # The plan

    async def wants(self) -> AsyncIterator[Want]:
        """Who is to go where, one after the other: what was asked for, or what the rules demand."""
        arguments = self.desk.arguments
        if arguments.user is not None:
            async for want in self._one(arguments.user, arguments.to):
                yield want
            return
        if arguments.to is not None:
            raise CommandFailed("say who is to go there: --user ID", Exit.USAGE)
        rooms = self._rooms()
        async for want in self._astray(rooms):
            yield want
        for volume in self._volumes.values():
            if volume.is_draining:
                async for want in self._drained(volume, rooms):
                    yield want
        if arguments.evenly:
            async for want in self._evened():
                yield want

    async def _one(self, user_id: str, to: UUID | None) -> AsyncIterator[Want]:
        user = await moves.user_to_move(self.db, user_id)
        if user is None:
            raise CommandFailed(f"there is no user {user_id!r}, or not any more", Exit.NOT_FOUND)
        if to is None:
            raise CommandFailed("say where to: --to VOLUME", Exit.USAGE)
        target = self._volumes.get(to)
        if target is None:
            raise CommandFailed(f"there is no volume {to}", Exit.NOT_FOUND)
        if target.state != "open" or target.is_draining:
            state = "being drained" if target.is_draining else f"{target.state}: {target.reason}"
            raise CommandFailed(f"volume {to} takes no user: it is {state}", Exit.REFUSED)
        if target.reserved_for not in (None, user_id):
            raise CommandFailed(f"volume {to} is reserved for user {target.reserved_for!r}", Exit.REFUSED)
        if user.volume_id == to:
            if await moves.page_to_move(self.db, user_id, None, 1):  # came to the old volume when the move was over
                yield Want(user, target, "what is left follows")
            return
        if target.free_bytes() < user.bytes:
            raise CommandFailed(f"volume {to} has no room for the {human_bytes(user.bytes)} of user {user_id!r}", Exit.REFUSED)
        yield Want(user, target, "as asked")

    def _rooms(self) -> list[_Room]:
        """Of the volumes that users may be moved to."""
        shared = [each for each in self._volumes.values() if each.state == "open" and not each.is_draining and each.reserved_for is None]
        return [_Room(each, each.free_bytes(), each.used_bytes()) for each in shared]

    async def _astray(self, rooms: list[_Room]) -> AsyncIterator[Want]:
        """Users with a volume of their own go there, and from there all others go away."""
        after = ""
        while page := await moves.users_astray(self.db, after, _PAGE):
            after = page[-1].user_id
            for user in page:
                own = next((each for each in self._volumes.values() if each.reserved_for == user.user_id), None)
                if own is None:
                    if want := self._to_roomiest(user, rooms, "its volume is reserved for somebody else"):
                        yield want
                elif own.state != "open" or own.free_bytes() < user.bytes:
                    self._tell_no_room(user)
                else:
                    yield Want(user, own, "the volume is reserved for this user")

    async def _drained(self, volume: Volume, rooms: list[_Room]) -> AsyncIterator[Want]:
        """Everybody of whom anything is on a volume that is being drained."""
        after = ""
        while page := await moves.users_to_move(self.db, volume.id, after, _PAGE):
            after = page[-1].user_id
            for user in page:
                if user.volume_id != volume.id:  # what is left of them follows them
                    target = self._volumes.get(user.volume_id) if user.volume_id else None
                    if target is not None:
                        yield Want(user, target, "the volume is being drained")
                elif want := self._to_roomiest(user, rooms, "the volume is being drained"):
                    yield want

    def _to_roomiest(self, user: MovedUser, rooms: list[_Room], why: str) -> Want | None:
        room = max(rooms, key=lambda each: each.free_bytes, default=None)
        if room is None or room.free_bytes < user.bytes:
            self._tell_no_room(user)
            return None
        room.free_bytes -= user.bytes
        room.used_bytes += user.bytes
        return Want(user, room.volume, why)

    async def _evened(self) -> AsyncIterator[Want]:
        """The largest user that fits goes from the fullest volume to the emptiest, until all are about as full as each other."""
        rooms, seen = self._rooms(), list[str]()
        while len(rooms) > 1 and len(seen) < _MOST_MOVES:
            emptiest, fullest = min(rooms, key=lambda each: each.share), max(rooms, key=lambda each: each.share)
            if fullest.share - emptiest.share < _EVEN:
                return
            # So many that the two do not change places.
            most = int((fullest.share - emptiest.share) / 2 * min(each.used_bytes + each.free_bytes for each in (emptiest, fullest)))
            user = await moves.largest_user(self.db, fullest.volume.id, min(most, emptiest.free_bytes), seen)
            if user is None:
                return
            seen.append(user.user_id)
            for room, size_bytes in ((fullest, -user.bytes), (emptiest, user.bytes)):
                room.used_bytes += size_bytes
                room.free_bytes -= size_bytes
            yield Want(user, emptiest.volume, "to even out")

    def rehearse(self, want: Want) -> None:
        """Tells what would be done."""
        self._found("move", "repairable", self._sentence(want, "would go"), want.user.user_id, command=self._command())

    async def rehearse_rest(self) -> None:
        """Tells what an earlier run has left to do."""
        after = ""
        while page := await moves.users_being_moved(self.db, after, _PAGE):
            after = page[-1]
            for user_id in page:
                self._found("move", "repairable", f"the move of user {user_id!r} has begun and not ended", user_id, command=_FOR_REAL)
        copies, _ = await moves.count_copies(self.db)
        if copies:
            self._found("copies", "repairable", f"{copies} old copies of moved files are left to remove", command=_FOR_REAL)

    def _command(self) -> str:
        arguments = self.desk.arguments
        if arguments.user is None:
            return f"{_FOR_REAL} --evenly" if arguments.evenly else _FOR_REAL
        return f"coffer rebalance --user {arguments.user!r} --to {arguments.to} --for-real"

    def _sentence(self, want: Want, verb: str) -> str:
        user = want.user
        return f"user {user.user_id!r} ({user.file_count:,} files, {human_bytes(user.bytes)}) {verb} to volume {want.to.id}: {want.why}"

    # Moving

    async def wait_for_servers(self) -> None:
        """A volume that was added a moment ago is not known to all servers."""
        youngest = max((row.created_at for row in await ledger.list_volumes(self.db)), default=None)
        if youngest is not None:
            await self._sleep(_YOUNGEST_VOLUME_SECONDS - (datetime.now(UTC) - youngest).total_seconds())

    async def move(self, want: Want) -> None:
        """Places the user there and moves what there is. What comes to the old place meanwhile follows in `finish`."""
        user_id = want.user.user_id
        if want.user.volume_id != want.to.id:
            await self.desk.lock.check()
            if not await moves.begin_move(self.db, user_id, want.to.id):
                return  # erased, or the volume's rules have changed
            self._found("move", "repaired", self._sentence(want, "goes"), user_id)
        else:
            await moves.resume_move(self.db, user_id)
        await self._bring(user_id)

    async def finish(self) -> None:
        """Goes on with every move that has begun until nothing is left of it but what somebody is sending at this moment, and removes old
        copies once nobody can be reading them.
        """
        deadline = time.monotonic() + self._keep_old + 2 * _LOOK_AGAIN_SECONDS
        while not self.stopping.is_set():
            files = self.files
            left = [user_id async for user_id in self._being_moved() if not await self._is_finished(user_id)]
            await self._remove_old_copies()
            copies, _ = await moves.count_copies(self.db)
            if not left and not copies:
                return
            if self.files != files:
                deadline = time.monotonic() + self._keep_old + 2 * _LOOK_AGAIN_SECONDS
            if time.monotonic() > deadline:
                self._tell_left(left, copies)
                return
            await self._sleep(_LOOK_AGAIN_SECONDS)

    async def _being_moved(self) -> AsyncIterator[str]:
        after = ""
        while page := await moves.users_being_moved(self.db, after, _PAGE):
            after = page[-1]
            for user_id in page:
                yield user_id

    async def _is_finished(self, user_id: str) -> bool:
        await self._bring(user_id)
        if not await moves.finish_move(self.db, user_id, self._keep_old):
            return False
        self.users += 1
        return True

    def _tell_left(self, left: Sequence[str], copies: int) -> None:
        for user_id in left:
            text = f"user {user_id!r} still has an upload under way, or a file that cannot be moved, on the old volume"
            self._found("move", "waiting", text, user_id, command=_FOR_REAL)
        if copies:
            self._found("copies", "waiting", f"{copies} old copies of moved files could not be removed yet", command=_FOR_REAL)

    async def _bring(self, user_id: str) -> None:
        """One pass over what a user has on other volumes."""
        try:
            await self._look()
            user = await moves.user_to_move(self.db, user_id)
            target = self._volumes.get(user.volume_id) if user is not None and user.volume_id else None
            if target is None:
                return
            after: MovedFile | None = None
            while page := await moves.page_to_move(self.db, user_id, after, _PAGE):
                after = page[-1]
                for batch in _batches(page):
                    if self.stopping.is_set():
                        return
                    await self._bring_files(batch, target)
                    await self._remove_old_copies()
            await self._bring_uploads(user_id, target)
            await moves.relabel_uploads(self.db, user_id)
        except _Stop:
            return

    async def _look(self) -> None:
        """At the volumes, once a second."""
        if time.monotonic() - self._looked_at > _LOOK_AGAIN_SECONDS:
            await self.desk.vault.refresh(await ledger.list_volumes(self.db))
            self._looked_at = time.monotonic()

    async def _bring_files(self, batch: Sequence[MovedFile], target: Volume) -> None:
        """Moves some files of one user from one volume."""
        source = self._volumes.get(batch[0].volume_id)
        if source is None or source.state == "unavailable":
            self._tell_volume(batch[0].volume_id, "it is unavailable")
            raise _Stop
        try:
            async with AsyncExitStack() as copying:
                copying_each = (self._copied(file, source, target, copying) for file in batch)
                # All come to their end, also when one fails: what a thread is still writing to must not be closed.
                made = await asyncio.gather(*copying_each, return_exceptions=True)
                for each in made:
                    if isinstance(each, BaseException):
                        raise each
                copies = {file.id: copy for file, copy in zip(batch, made, strict=True) if isinstance(copy, FileCopy)}
                if copies and not self.stopping.is_set():
                    await self.desk.lock.check()
                    # A row that somebody holds for long, or an answer that was lost: the next pass finds how it is.
                    with suppress(DatabaseUnavailable, CommitUnknown):
                        await self._switch([file for file in batch if file.id in copies], copies, source, target)
        except (VolumeFull, VolumeReadOnly, VolumeUnavailable) as problem:
            await self._tell_fault(source, target, problem)
            raise _Stop from problem

    async def _copied(self, file: MovedFile, source: Volume, target: Volume, copying: AsyncExitStack) -> FileCopy | None:
        """A sealed and verified copy; None when there is none to be had, which is told unless the file has just gone."""
        if file.damaged_at is not None:
            self._tell_unmoved(file, "damaged", "is damaged: restore it, or delete it")
            return None
        try:
            target.check_writable(file.file_size)
            copy = await self.run(FileCopy, source, target, file.file_path, file.sha256)
            copying.push_async_callback(self.run, copy.discard)
            if copy.size_bytes == file.file_size and await self._written(copy):
                return copy
            if self.stopping.is_set():
                return None
        except FileNotFoundError:
            pass
        except DigestMismatch:
            pass
        except OSError as problem:
            if not inventory.is_of_the_file(problem):
                raise VolumeUnavailable from problem
        now = await rows.get_stored(self.db, [file.id])
        if now and (now[0].volume_id, now[0].file_path, now[0].sha256) == (file.volume_id, file.file_path, file.sha256):
            self._tell_unmoved(file, "damaged", "is missing, or has other bytes than were stored")
        return None

    async def _written(self, copy: Copy) -> bool:
        """Copies at the pace, syncs and verifies. False when it was told to stop."""
        while not self.stopping.is_set() and (copied_bytes := await self.run(copy.step)):
            self.bytes += copied_bytes
            await self._pace(copied_bytes)
        if self.stopping.is_set():
            return False
        await self.run(copy.seal)
        try:
            await self.run(copy.verify)
        except (Damaged, OSError) as problem:
            raise VolumeReadOnly from problem  # the disk has other bytes than it says that it synced
        return True

    async def _switch(self, files: Sequence[MovedFile], copies: dict[UUID, FileCopy], source: Volume, target: Volume) -> None:
        """Gives copies their names and switches the rows. Killed anywhere, each file is where its row says, and its other name is known."""
        await self._clear(files, target)
        announced = await moves.announce_copies(self.db, target.id, files)
        files = [file for file in files if file.id in announced]
        if not files:
            return
        await self.run(make_directories, target, [file.file_path for file in files])
        lost = await self._bring_previews(files, source, target)

        async def publish(ids: list[UUID]) -> None:
            await self.run(publish_all, target, [copies[file_id] for file_id in ids])

        switched = await moves.switch_files(self.db, source.id, target.id, files, publish)
        self.files += len(switched)
        await self._clear([file for file in files if file.id not in switched], target)
        for file_id, name in lost:
            if file_id in switched:
                await ledger.forget_preview(self.db, file_id, name)

    async def _clear(self, files: Sequence[MovedFile], target: Volume) -> None:
        """Removes what is left there under these files' names: by an earlier move, or one that was cut off."""
        left = await moves.copies_on(self.db, target.id, [file.id for file in files])
        if left:
            await self.run(target.remove_stored, [each.file_path for each in left])
            await ledger.drop_tombstones(self.db, [each.id for each in left])

    async def _bring_previews(self, files: Sequence[MovedFile], source: Volume, target: Volume) -> list[tuple[UUID, str]]:
        """Copies the previews of files, and returns those that could not be: they are made again."""
        sizes: dict[UUID, dict[str, int]] = {file.id: {} for file in files}
        for preview in await moves.previews_to_move(self.db, list(sizes)):
            sizes[preview.file_id][preview.file_name] = preview.size_bytes
        lost: list[tuple[UUID, str]] = []
        for file in files:
            if wanted := sizes[file.id]:
                copied = await self.run(copy_previews, source, target, file.file_path, file.id, wanted)
                lost += [(file.id, name) for name in wanted.keys() - copied]
        return lost

    async def _bring_uploads(self, user_id: str, target: Volume) -> None:
        """Moves what came of uploads that will go on another time."""
        for upload in await moves.resumables_to_move(self.db, user_id):
            source = self._volumes.get(upload.volume_id)
            if source is not None and source.state != "unavailable" and not self.stopping.is_set():
                try:
                    await self._bring_upload(upload, source, target)
                except (VolumeFull, VolumeReadOnly, VolumeUnavailable) as problem:
                    await self._tell_fault(source, target, problem)
                    raise _Stop from problem

    async def _bring_upload(self, upload: ResumableUpload, source: Volume, target: Volume) -> None:
        target.check_writable(upload.offset_bytes)
        try:
            copy = await self.run(IncomingCopy, source, target, upload.incoming_name, upload.offset_bytes)
        except FileNotFoundError:
            if upload.offset_bytes == 0:  # nothing has come yet
                await moves.switch_resumable_upload(self.db, upload, target.id, upload.incoming_name)
            return
        switched = False
        try:
            if await self._written(copy):
                await self.desk.lock.check()
                switched = await moves.switch_resumable_upload(self.db, upload, target.id, copy.incoming_id)
        except OSError as problem:
            raise VolumeUnavailable from problem
        except CofferError:
            switched = True  # perhaps: what is left is a file in incoming/ that housekeeping removes
            raise
        finally:
            if not switched:
                await self.run(copy.discard)
        if switched:
            with suppress(CofferError):
                await self.run(source.remove_incoming, [upload.incoming_name])

    async def _remove_old_copies(self) -> None:
        if await ledger.unlinks_are_held(self.db):
            return  # a backup that began before the move knows the files by their old places
        while found := await moves.old_copies(self.db, self._keep_old, _PAGE):
            await self.desk.lock.check()
            removed = []
            for volume in self._volumes.values():
                here = [each for each in found if each.volume_id == volume.id]
                if here:
                    with suppress(CofferError):
                        await self.run(volume.remove_stored, [each.file_path for each in here])
                        removed += [each.id for each in here]
            if removed:
                await ledger.drop_tombstones(self.db, removed)
            if len(removed) < len(found) or len(found) < _PAGE:
                return

    async def _pace(self, copied_bytes: int) -> None:
        now = time.monotonic()
        self._due = max(self._due, now - 1) + copied_bytes / self._rate  # what was missed is not made up for
        await self._sleep(self._due - now)

    async def _sleep(self, seconds: float) -> None:
        """Until then, or until it is told to stop."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)

    # Telling

    def _found(self, kind: str, state: State, text: str, user_id: str | None = None, command: str | None = None) -> None:
        """Each pass finds again what keeps a file or a user from being moved; it is told once."""
        if state == "look":
            if text in self._told:
                return
            self._told.add(text)
        self.desk.found(Finding(kind=kind, state=state, text=text, user_id=user_id, command=command))

    def _tell_no_room(self, user: MovedUser) -> None:
        text = f"no open volume has room for user {user.user_id!r} ({human_bytes(user.bytes)})"
        self._found("no_room", "look", text, user.user_id, command="coffer volume list")

    async def _tell_fault(self, source: Volume, target: Volume, problem: CofferError) -> None:
        """A volume that failed here is closed for all."""
        for volume in (source, target):
            if volume.unrecorded_fault:
                await ledger.set_volume_state(self.db, volume.id, "read_only")
        self._tell_volume(target.id, str(problem))

    def _tell_volume(self, volume_id: UUID, why: str) -> None:
        self._found(
            "volume", "look", f"nothing can be moved to or from volume {volume_id}: {why}", command=f"coffer volume verify {volume_id}"
        )

    def _tell_unmoved(self, file: MovedFile, kind: str, what: str) -> None:
        text = f"file {file.id} of user {file.user_id!r} is not moved: it {what}"
        self._found(kind, "look", text, file.user_id, command=f"coffer scrub --file {file.id}")


def _batches(page: Sequence[MovedFile]) -> list[list[MovedFile]]:
    """Neighbours of one volume, few and small enough to be switched together."""
    batches: list[list[MovedFile]] = []
    size_bytes = 0
    for file in page:
        last = batches[-1] if batches else []
        if not last or len(last) == _BATCH_FILES or size_bytes + file.file_size > _BATCH_BYTES or last[0].volume_id != file.volume_id:
            last, size_bytes = [], 0
            batches.append(last)
        last.append(file)
        size_bytes += file.file_size
    return batches
