"""One mounted file system, and whether it may be read and written right now."""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import UUID, uuid4

from server.errors import CofferError, Damaged, VolumeFull, VolumeReadOnly, VolumeUnavailable
from server.vault.cached import open_cached
from server.vault.layout import (
    INCOMING,
    QUARANTINE,
    USERS,
    WITHHELD,
    checked,
    checked_preview_name,
    checked_previews,
    checked_readable,
    is_previews,
)
from server.vault.sentinel import read_sentinel

State = Literal["open", "full", "read_only", "unavailable"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SMALLEST_RESERVE_BYTES = 2**30
_SMALLEST_RESERVE_INODES = 1_000  # and 1 %: what is under way, with its directories and previews, still gets its own
_MOST_REMEMBERED_DIRECTORIES = 100_000  # about 100 bytes each: 10 MB

log = logging.getLogger("coffer.vault")


class Handle:
    """A directory's file descriptor, closed when nobody holds it any more.

    A thread that still writes through a volume that has just gone keeps the descriptor alive; closing it by hand would
    let its number be reused for something else under that thread.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)

    def fileno(self) -> int:
        """As files have it."""
        return self.fd


@dataclass(frozen=True, slots=True)
class Room:
    """A file system's size. `inodes` is 0 where it makes them as it needs them (btrfs)."""

    size_bytes: int
    inodes: int
    free_inodes: int


class Volume:
    """A volume that a row of `volumes` names. All methods but the properties and `open_at_once` may block: run them in the vault's threads.

    Its state is looked at by `probe`, every second. Paths are opened relative to a handle held since it was found to be
    mounted, component by component and never through a symbolic link. Several threads may use a volume at once.
    """

    def __init__(self, volume_id: UUID, mount: Path, reserve_bytes: int | None) -> None:
        self.id = volume_id
        self.mount = mount
        self.state: State = "unavailable"
        self.reason = "not looked at yet"
        self.promised_bytes = 0  # declared by uploads under way here and not yet written; changed by the event loop only
        self.is_draining = False  # takes no new users; like the next, as its row says
        self.reserved_for: str | None = None  # the one user who is placed here
        self._reserve_bytes = reserve_bytes
        self._root: Handle | None = None
        self._seen: os.statvfs_result | None = None  # by the last look
        self._durable: dict[str, int] = {}  # directories whose entry in their parent is known to be synced, by path: inode
        self._closed_by_row = False
        self._fault: str | None = None
        self._fault_recorded = False

    # State

    def probe(self) -> None:
        """Looks whether the volume is mounted, is the right one, and has room. Never raises."""
        try:
            root = Handle(os.open(self.mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            found = read_sentinel(root.fd)
            if found != self.id:
                raise ValueError(f"the sentinel is that of volume {found}")
            if self._root is None or not os.path.sameopenfile(self._root.fd, root.fd):
                self._durable = {}
                self._root = root
            facts = os.statvfs(root.fd)
            has_failed = _has_failed(root)
        except (OSError, ValueError) as problem:
            self.let_go()  # of a file system that was unmounted lazily
            self._become("unavailable", str(problem))
            return
        self._seen = facts
        if facts.f_flag & os.ST_RDONLY:
            self._become("read_only", "mounted read-only")
        elif has_failed:
            self._become("read_only", "the file system has met an error and takes no writes until it is checked (e2fsck) and mounted again")
        elif self._fault or self._closed_by_row:
            self._become("read_only", self._fault or "set read-only by a sysadmin or another process")
        elif facts.f_bavail * facts.f_frsize < self._reserve(facts):
            self._become("full", "free space is below the reserve")
        elif _lacks_inodes(facts):
            self._become("full", "free inodes are below the reserve")
        else:
            self._become("open", "")

    def give_up(self) -> None:
        """To be told that `probe` takes too long: what the disk holds cannot be had, until it returns."""
        self.let_go()
        self._become("unavailable", "it does not answer")

    def apply_row(self, state: str) -> None:
        """Takes over what the volume's row says. A row reopened by a sysadmin clears a fault that had been recorded in it."""
        self._closed_by_row = state != "open"
        if self._closed_by_row:
            self._fault_recorded = self._fault is not None
        elif self._fault_recorded:
            self._fault, self._fault_recorded = None, False

    @property
    def unrecorded_fault(self) -> str | None:
        """Why this process closed the volume, while the row does not say so yet."""
        return None if self._fault_recorded else self._fault

    def _become(self, state: State, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            level = logging.INFO if state == "open" else logging.ERROR
            log.log(level, "volume is %s", state, extra={"volume_id": str(self.id), "mount": str(self.mount), "reason": reason})
        self.state, self.reason = state, reason

    def _reserve(self, facts: os.statvfs_result) -> int:
        if self._reserve_bytes is not None:
            return self._reserve_bytes
        return max(facts.f_blocks * facts.f_frsize // 100, _SMALLEST_RESERVE_BYTES)

    def free_bytes(self) -> int:
        """Bytes that uploads may still take: free space less the reserve and less what running uploads have announced.

        Raises `VolumeUnavailable`.
        """
        return self._free_bytes(os.statvfs(self.root().fd))

    def free_bytes_seen(self) -> int:
        """As `free_bytes`, by the last look at the disk, and so without one: for the event loop, and for those who must not wait."""
        return self._free_bytes(self._last_seen())

    def used_bytes(self) -> int:
        """Bytes that are taken, by whatever. Raises `VolumeUnavailable`."""
        facts = os.statvfs(self.root().fd)
        return (facts.f_blocks - facts.f_bfree) * facts.f_frsize

    def free_inodes(self) -> int | None:
        """New files that uploads may still make, as `free_bytes`; None where the file system has no fixed number."""
        return _free_inodes(os.statvfs(self.root().fd))

    def _free_bytes(self, facts: os.statvfs_result) -> int:
        return facts.f_bavail * facts.f_frsize - self._reserve(facts) - self.promised_bytes

    def room(self) -> Room:
        """How large the file system is, by the last look at it. Raises `VolumeUnavailable`."""
        facts = self._last_seen()
        return Room(facts.f_blocks * facts.f_frsize, facts.f_files, facts.f_favail)

    def root(self) -> Handle:
        """The mount's handle; hold it for as long as descriptors derived from it are being opened."""
        if self._root is None:
            raise VolumeUnavailable
        return self._root

    def let_go(self) -> None:
        """Holds the mount no longer; the volume is unavailable until the next look."""
        self._root = self._seen = None

    def _last_seen(self) -> os.statvfs_result:
        if self._seen is None:
            raise VolumeUnavailable
        return self._seen

    def check_writable(self, needed_bytes: int) -> None:
        """Raises `VolumeUnavailable`, `VolumeReadOnly` or `VolumeFull` unless that many more bytes, in a new file, may be written now."""
        self.check_state()
        facts = os.statvfs(self.root().fd)
        if self._free_bytes(facts) < needed_bytes or _lacks_inodes(facts):
            raise VolumeFull

    def had_room(self, needed_bytes: int) -> bool:
        """As `check_writable`, by the last look at the disk, for the event loop: False for too full. What was written since is not seen."""
        self.check_state()
        facts = self._last_seen()
        return self._free_bytes(facts) >= needed_bytes and not _lacks_inodes(facts)

    def check_state(self) -> None:
        """Raises `VolumeUnavailable` or `VolumeReadOnly` when the last look or write found it so. Costs nothing."""
        if self.state == "unavailable":
            raise VolumeUnavailable
        if self.state == "read_only":
            raise VolumeReadOnly

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Translates an `OSError` of a write. An I/O error closes the volume for writes until a sysadmin acts.

        `FileExistsError` and `FileNotFoundError` pass: they tell of names, not of the disk.
        """
        try:
            yield
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as problem:
            raise self._failure(problem) from problem

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """As `writing`, for fsync: after *any* error the kernel may have dropped the pages, so none is retried."""
        try:
            yield
        except OSError as problem:
            self._trip(f"sync failed: {problem.strerror}")
            raise VolumeReadOnly from problem

    def _failure(self, problem: OSError) -> CofferError:
        match problem.errno:
            case errno.ENOSPC | errno.EDQUOT:
                return VolumeFull()
            case errno.EROFS:
                self._become("read_only", "mounted read-only")
                return VolumeReadOnly()
            case errno.EIO | errno.EUCLEAN | errno.ENXIO | errno.ENODEV:
                self._trip(f"write failed: {problem.strerror}")
                return VolumeReadOnly()
            case _:
                log.error("unexpected error on volume", extra={"volume_id": str(self.id), "errno": problem.errno}, exc_info=problem)
                return VolumeUnavailable()

    def _trip(self, reason: str) -> None:
        self._fault, self._fault_recorded = reason, False
        self._become("read_only", reason)

    # Directories

    def incoming(self, root: Handle) -> int:
        """A new descriptor of incoming/, which the caller closes."""
        return os.open(INCOMING, _DIRECTORY, dir_fd=root.fd)

    def directory(self, root: Handle, path: str, *, make: bool) -> int:
        """A new descriptor of the directory `path`, which the caller closes.

        With `make`, missing directories are made, and every one on the way is durably entered in its parent before this
        returns, also where another process made it and may have died before its sync. Without it, `FileNotFoundError`.
        """
        if make and (known := self._durable.get(f"/{path}")) is not None:
            # The directory that an earlier walk found is the same one however we get to it, so one look replaces nine calls.
            with suppress(OSError):
                fd = os.open(path, _DIRECTORY, dir_fd=root.fd)
                if os.fstat(fd).st_ino == known:
                    return fd
                os.close(fd)
        fd, walked = os.dup(root.fd), ""
        try:
            for part in path.split("/"):
                walked = f"{walked}/{part}"
                fd = self._step(fd, part, walked, make)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _step(self, parent: int, name: str, walked: str, make: bool) -> int:
        made = False
        try:
            child = os.open(name, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
            with suppress(FileExistsError):  # another upload may make it between our two looks
                os.mkdir(name, 0o750, dir_fd=parent)
            made = True
            child = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            if make and name != USERS:
                inode = os.fstat(child).st_ino
                if made or self._durable.get(walked) != inode:
                    with self.syncing():
                        os.fsync(parent)
                    if len(self._durable) >= _MOST_REMEMBERED_DIRECTORIES:
                        self._durable = {}
                    self._durable[walked] = inode
        except BaseException:
            os.close(child)
            raise
        os.close(parent)
        return child

    # Stored files

    def open_stored(self, path: str) -> int:
        """A read-only descriptor of a stored file or of a preview, which the caller closes.

        Raises `FileNotFoundError` when it is not there, `VolumeUnavailable` when its volume is not.
        """
        root = self.root()
        directory, name = checked_readable(path).rsplit("/", 1)
        parent = self.directory(root, directory, make=False)
        try:
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)

    def open_at_once(self, path: str) -> int | None:
        """As `open_stored`, for the event loop: None when the disk or a closer look is needed, whatever it may find.

        Raises `VolumeUnavailable`, and `ValueError` for what is no path of ours.
        """
        return open_cached(self.root().fd, checked_readable(path))

    def name_again(self, path: str, new_path: str) -> None:
        """Gives a stored file a second name, in the same directory, durably. Raises `FileExistsError` and `FileNotFoundError`.

        A crash before the caller's commit leaves a second name without a row: garbage that harms nobody (P2).
        """
        root = self.root()
        directory, name = checked(path).rsplit("/", 1)
        new_directory, new_name = checked(new_path).rsplit("/", 1)
        if new_directory != directory:
            raise ValueError("a stored file stays in its directory")
        parent = self.directory(root, directory, make=False)
        try:
            with self.writing():
                os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
            with self.syncing():
                os.fsync(parent)
        finally:
            os.close(parent)

    def name_all_again(self, names: list[tuple[str, str]]) -> list[Literal["named", "exists", "missing"]]:
        """As `name_again` for many files, each with the name it is to get, and tells what became of each. A directory is synced once."""
        root = self.root()
        by_directory: dict[str, list[int]] = {}
        for place, (path, new_path) in enumerate(names):
            directory = checked(path).rsplit("/", 1)[0]
            if checked(new_path).rsplit("/", 1)[0] != directory:
                raise ValueError("a stored file stays in its directory")
            by_directory.setdefault(directory, []).append(place)
        outcomes: list[Literal["named", "exists", "missing"]] = ["missing"] * len(names)
        for directory, places in by_directory.items():
            try:
                parent = self.directory(root, directory, make=False)
            except FileNotFoundError:
                continue
            try:
                for place in places:
                    name, new_name = (each.rsplit("/", 1)[1] for each in names[place])
                    try:
                        with self.writing():
                            os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
                    except FileExistsError:
                        outcomes[place] = "exists"
                    except FileNotFoundError:
                        continue
                    else:
                        outcomes[place] = "named"
                with self.syncing():
                    os.fsync(parent)
            finally:
                os.close(parent)
        return outcomes

    def remove_stored(self, paths: list[str]) -> None:
        """Unlinks stored files, withheld ones too, and syncs their directories, once each; removes directories of previews with all that
        is in them.

        Files that are gone already are fine: repeating is safe.

        A crash half-way leaves files whose tombstones still name them.
        """
        root = self.root()
        by_directory = self._without_previews(paths)
        for directory, names in by_directory.items():
            try:
                parent = self.directory(root, directory, make=False)
            except FileNotFoundError:
                continue
            try:
                with self.writing():
                    for name in names:
                        _unlink_if_there(name, parent)
                        _unlink_if_there(f"{name}.damaged", parent)  # so called since the scrub found it so
                with self.syncing():
                    os.fsync(parent)
            finally:
                os.close(parent)
        self._remove_withheld(root, [name for names in by_directory.values() for name in names])

    def _without_previews(self, paths: list[str]) -> dict[str, list[str]]:
        """Removes the directories of previews that are among these, and gives the names of the rest by their directories."""
        by_directory: dict[str, list[str]] = {}
        for path in paths:
            if is_previews(path):
                self.remove_previews(path)
                continue
            directory, name = checked(path).rsplit("/", 1)
            by_directory.setdefault(directory, []).append(name)
        return by_directory

    def _remove_withheld(self, root: Handle, names: list[str]) -> None:
        try:
            withheld = self.directory(root, WITHHELD, make=False)
        except FileNotFoundError:
            return
        try:
            with self.writing():
                gone = [_unlink_if_there(name, withheld) for name in names]
            if any(gone):
                with self.syncing():
                    os.fsync(withheld)
        finally:
            os.close(withheld)

    def withhold(self, paths: list[str]) -> None:
        """Takes stored files out of their places, durably, and keeps their bytes in withheld/ until `remove_stored`. Repeating is safe.

        For while a backup wants bytes that nobody may be served any more. A file is in at least one of the two places at any moment:
        whoever looks for it there first and here afterwards finds it. Previews are removed at once.
        """
        root = self.root()
        by_directory = self._without_previews(paths)
        withheld = Handle(self.directory(root, WITHHELD, make=True))
        for directory, names in by_directory.items():
            try:
                parent = Handle(self.directory(root, directory, make=False))
            except FileNotFoundError:
                continue
            with self.writing():
                for name in names:
                    with suppress(FileExistsError, FileNotFoundError):  # withheld already, or gone
                        os.link(name, name, src_dir_fd=parent.fd, dst_dir_fd=withheld.fd, follow_symlinks=False)
            with self.syncing():
                os.fsync(withheld.fd)
            with self.writing():
                for name in names:
                    _unlink_if_there(name, parent.fd)
            with self.syncing():
                os.fsync(parent.fd)

    # Previews

    def stored_file(self, path: str) -> Path:
        """The absolute path of a stored file, for a decoder that is to be shown it. Raises as `open_stored`."""
        os.close(self.open_stored(path))
        return self.mount / path

    def store_previews(self, directory: str, made: Path, names: list[str], *, keep_others: bool = False) -> list[int]:
        """Replaces a file's previews by those that lie in the directory `made`, durably, and returns their sizes in bytes.

        With `keep_others`, only those of the same names.

        The decoder that made them saw untrusted bytes: nothing but its plain files is taken. Call it before the rows are committed; a
        crash leaves previews without rows, which the next making replaces. Raises `ValueError` for what is not a plain file.
        """
        root = self.root()
        sizes = []
        to = self.directory(root, checked_previews(directory), make=True)
        try:
            with self.writing():
                for name in names:
                    sizes.append(_copy_plain(made / checked_preview_name(name), f".{name}", to, self))
                    os.rename(f".{name}", name, src_dir_fd=to, dst_dir_fd=to)
                for old in () if keep_others else set(os.listdir(to)) - set(names):  # noqa: PTH208 - a descriptor has no path
                    _unlink_if_there(old, to)
            with self.syncing():
                os.fsync(to)
        finally:
            os.close(to)
        return sizes

    def remove_preview(self, path: str) -> None:
        """Removes one preview of a file. Repeating is safe. Not synced: one that a crash brings back has no row, and is garbage."""
        directory, name = checked_readable(path).rsplit("/", 1)
        try:
            parent = self.directory(self.root(), checked_previews(directory), make=False)
        except FileNotFoundError:
            return
        try:
            with self.writing():
                _unlink_if_there(name, parent)
        finally:
            os.close(parent)

    def remove_previews(self, directory: str) -> None:
        """Removes a file's previews and their directory. Repeating is safe."""
        self._remove_previews(checked_previews(directory))

    def remove_late_previews(self, directory: str) -> None:
        """As `remove_previews`, of a file that was deleted before its previews were stored. Its user may have been erased meanwhile, whose
        directory the storing has made again: it goes too, when nothing else is in it.
        """
        self._remove_previews(checked_previews(directory))
        root = self.root()
        above = directory.rsplit("/", 1)[0]
        while "/" in above:  # users/<user_dir>/previews, then users/<user_dir>
            parent_path, name = above.rsplit("/", 1)
            try:
                parent = self.directory(root, parent_path, make=False)
            except FileNotFoundError:
                return
            try:
                os.rmdir(name, dir_fd=parent)
                with self.syncing():
                    os.fsync(parent)
            except FileNotFoundError:
                pass
            except OSError as problem:
                if problem.errno != errno.ENOTEMPTY:
                    raise self._failure(problem) from problem
                return
            finally:
                os.close(parent)
            self._durable.pop(f"/{above}", None)
            above = parent_path

    def _remove_previews(self, directory: str) -> None:
        parent_path, name = directory.rsplit("/", 1)
        try:
            parent = self.directory(self.root(), parent_path, make=False)
        except FileNotFoundError:
            return
        try:
            with self.writing():
                remove_tree(name, parent)
            with self.syncing():
                os.fsync(parent)
        finally:
            os.close(parent)
        self._durable.pop(f"/{directory}", None)

    def remove_user(self, user_directory: str) -> None:
        """Removes a user's directory with everything under it, here and in the quarantine. Repeating after a crash is safe."""
        root = self.root()
        places = [USERS]
        with suppress(FileNotFoundError):
            quarantine = self.directory(root, QUARANTINE, make=False)
            try:
                with os.scandir(quarantine) as entries:
                    places += [f"{QUARANTINE}/{entry.name}/{USERS}" for entry in entries]
            finally:
                os.close(quarantine)
        for place in places:
            try:
                users = self.directory(root, place, make=False)
            except (FileNotFoundError, NotADirectoryError):  # in the quarantine, where anybody may have put anything
                continue
            try:
                with self.writing():
                    remove_tree(user_directory, users)
                with self.syncing():
                    os.fsync(users)
            finally:
                os.close(users)

    # Incoming leftovers

    def remove_incoming(self, upload_ids: list[UUID]) -> None:
        """Unlinks what uploads that are over left in incoming/."""
        directory = self.incoming(self.root())
        try:
            with self.writing():
                for upload_id in upload_ids:
                    _unlink_if_there(str(upload_id), directory)
        finally:
            os.close(directory)

    def nameless(self) -> Handle:
        """A new file that may be read and written, and is gone when its handle is: for what is to become an upload. Raises as `writing`.

        A crash while it is made leaves an empty one in incoming/, as of an upload that nobody claims.
        """
        directory = Handle(self.incoming(self.root()))
        name = str(uuid4())
        with self.writing():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = Handle(os.open(name, flags, 0o600, dir_fd=directory.fd))
            os.unlink(name, dir_fd=directory.fd)
        return file

    def pieces_of_incoming(self, name: UUID, size_bytes: int, *, at: int = 0, piece_bytes: int = 2**20) -> Iterator[bytes]:
        """The bytes from `at` to `size_bytes` of a file in incoming/, one piece in memory at a time. Raises `Damaged` when it is gone or
        shorter, else as `writing`.
        """
        directory = self.incoming(self.root())
        try:
            with self.writing():
                file = Handle(os.open(str(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))
        except FileNotFoundError as problem:
            raise Damaged from problem
        finally:
            os.close(directory)
        while at < size_bytes:
            with self.writing():
                piece = os.pread(file.fd, min(piece_bytes, size_bytes - at), at)
            if not piece:
                raise Damaged
            at += len(piece)
            yield piece

    def old_incoming(self, older_than: float, limit: int) -> list[UUID]:
        """Up to `limit` uploads whose bytes in incoming/ were last written before `older_than` (Unix time)."""
        found: list[UUID] = []
        directory = self.incoming(self.root())
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if len(found) >= limit:
                        break
                    try:
                        if entry.stat(follow_symlinks=False).st_mtime < older_than:
                            found.append(UUID(entry.name))
                    except (ValueError, FileNotFoundError):
                        continue  # not ours to judge, or finished while we looked
        finally:
            os.close(directory)
        return found


def _has_failed(root: Handle) -> bool:
    """Whether ext4 has made itself read-only after an error (errors=remount-ro). Newer kernels tell so in the options of the mount, not
    by statvfs(3).
    """
    device = os.fstat(root.fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:  # noqa: PTH123 - each second, for each volume
        return any("emergency_ro" in line and line.split(" ", 3)[2] == wanted for line in mounts)


def _free_inodes(facts: os.statvfs_result) -> int | None:
    """File systems without a fixed number of inodes say 0."""
    return facts.f_favail - max(facts.f_files // 100, _SMALLEST_RESERVE_INODES) if facts.f_files else None


def _lacks_inodes(facts: os.statvfs_result) -> bool:
    free = _free_inodes(facts)
    return free is not None and free < 0


def _copy_plain(source: Path, name: str, directory: int, volume: Volume) -> int:
    """Copies a plain file to a new name in `directory`, synced. Returns its size in bytes."""
    read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(read)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{source.name} is no plain file")
        _unlink_if_there(name, directory)  # what a crash left, or somebody planted: nothing that exists is written to
        written = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640, dir_fd=directory)
        try:
            offset = 0
            while offset < facts.st_size and (sent := os.sendfile(written, read, offset, facts.st_size - offset)):
                offset += sent
            with volume.syncing():
                os.fsync(written)
        except BaseException:
            _unlink_if_there(name, directory)  # a full volume is not made fuller
            raise
        finally:
            os.close(written)
        return offset
    finally:
        os.close(read)


def _unlink_if_there(name: str, directory: int) -> bool:
    """Whether it was."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
        return True
    return False


def remove_tree(name: str, parent: int) -> None:
    """Removes a directory with all that is in it; nothing when there is none.

    Others may be removing the same, or a worker that does not know yet may be storing its last preview there."""
    with suppress(FileNotFoundError):
        while True:
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            remove_tree(entry.name, fd)
                        else:
                            _unlink_if_there(entry.name, fd)
            finally:
                os.close(fd)
            try:
                os.rmdir(name, dir_fd=parent)
            except OSError as problem:
                if problem.errno != errno.ENOTEMPTY:
                    raise
            else:
                return
