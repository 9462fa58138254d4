"""What really lies on a volume: listings, sizes, digests, and setting files aside. For the audit and the scrub; everything here blocks.

A listing that could not be read to its end raises: nobody may take what is missing from it for gone.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import AnyStr, NamedTuple

from server.errors import VolumeUnavailable
from server.kinds import DIRECTORIES
from server.vault.layout import INCOMING, PREVIEW_NAME, PREVIEWS, QUARANTINE, USERS, checked, checked_readable
from server.vault.sentinel import read_sentinel
from server.vault.volume import Handle, Volume, remove_tree

DAMAGED = ".damaged"
"""Added to the name of a stored file whose bytes are wrong, so that nobody who knows the name, such as an edge, can serve it."""

_BATCH = 10_000
_READ_BYTES = 2**20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = frozenset(DIRECTORIES.values())
_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_FILE_NAME = re.compile(_ID + r"\.[0-9]{1,9}\.[a-z0-9]{1,10}(?:\.damaged)?")
_FILE_NAMES = re.compile(rf"(?:{_FILE_NAME.pattern}/)*+")  # many at once, each with what no name has in it
_FILE_ID = re.compile(_ID)
_USER_DIRECTORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}|~[0-9a-f]{64}")


@dataclass(slots=True)
class Batch:
    """Some thousand entries of a listing: the paths of stored files, with their ids in the same order; previews (path, id of the file, own
    name); and what has no place there.
    """

    paths: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    previews: list[tuple[str, str, str]] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)

    def entries(self) -> int:
        """How many of all kinds."""
        return len(self.paths) + len(self.previews) + len(self.strange)

    def take(self, other: "Batch") -> None:
        """Adds another's."""
        self.paths += other.paths
        self.ids += other.ids
        self.previews += other.previews
        self.strange += other.strange


class Facts(NamedTuple):
    """A file as the disk has it. `changed_at` (Unix time) is the later of its last write and its last change of name or links."""

    size_bytes: int
    changed_at: float


def check_sentinel(volume: Volume) -> None:
    """Looks once more whether this is the volume. Raises `VolumeUnavailable`."""
    root = volume.root()
    try:
        found = read_sentinel(root.fd)
    except (OSError, ValueError) as problem:
        raise VolumeUnavailable from problem
    if found != volume.id:
        raise VolumeUnavailable


def walk(volume: Volume) -> Iterator[Batch]:
    """Everything below users/, in no order. Memory is that of one batch, whatever the directories hold. Raises `OSError`.

    Directories that go meanwhile, with their user or file, are left out. What is no plain file or no directory where the layout has one is
    strange; so is every name that Coffer does not give. Nothing is opened through a symbolic link.
    """
    root = volume.root()
    batch = Batch()
    users = Handle(os.open(USERS, _DIRECTORY, dir_fd=root.fd))
    for user in _entries(users):
        user_path = f"{USERS}/{user.name}"
        if not (_USER_DIRECTORY.fullmatch(user.name) and user.is_dir(follow_symlinks=False)):
            batch.strange.append(user_path)
            continue
        if (below := _opened(users, user.name)) is None:
            continue
        for kind in _entries(below):
            path = f"{user_path}/{kind.name}"
            if (kind.name not in _KINDS and kind.name != PREVIEWS) or not kind.is_dir(follow_symlinks=False):
                batch.strange.append(path)
                continue
            if (directory := _opened(below, kind.name)) is None:
                continue
            for found in _previews(directory, path) if kind.name == PREVIEWS else _files(directory, path):
                batch.take(found)
                if batch.entries() >= _BATCH:
                    yield batch
                    batch = Batch()
    if batch.entries():
        yield batch


def _files(directory: Handle, path: str) -> Iterator[Batch]:
    prefix, entries = f"{path}/", _entries(directory)
    while some := list(islice(entries, _BATCH)):
        names = [entry.name for entry in some if entry.is_file(follow_symlinks=False)]
        if not _FILE_NAMES.fullmatch("/".join((*names, ""))):
            names = [name for name in names if _FILE_NAME.fullmatch(name)]
        batch = Batch(paths=[prefix + name for name in names], ids=[name[:36] for name in names])
        if len(names) < len(some):
            good = set(names)
            batch.strange = [prefix + entry.name for entry in some if entry.name not in good]
        yield batch


def _previews(directory: Handle, path: str) -> Iterator[Batch]:
    for entry in _entries(directory):
        inner = f"{path}/{entry.name}"
        batch = Batch()
        if not (_FILE_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)):
            batch.strange.append(inner)
        elif (below := _opened(directory, entry.name)) is not None:
            for preview in _entries(below):
                name = f"{inner}/{preview.name}"
                # One that is being written has a dot before its name.
                if PREVIEW_NAME.fullmatch(preview.name.removeprefix(".")) and preview.is_file(follow_symlinks=False):
                    batch.previews.append((name, entry.name, preview.name))
                else:
                    batch.strange.append(name)
        yield batch


def _entries(directory: Handle) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory.fd) as entries:
        yield from entries


def _opened(parent: Handle, name: str) -> Handle | None:
    try:
        return Handle(os.open(name, _DIRECTORY, dir_fd=parent.fd))
    except FileNotFoundError:  # erased meanwhile
        return None


def is_stored(path: str) -> bool:
    """Whether a path has the form of a stored file's."""
    try:
        return bool(checked(path))
    except ValueError:
        return False


def wrong_sizes(volume: Volume, paths: Sequence[AnyStr], sizes: Sequence[int]) -> list[AnyStr]:
    """Those of the paths where no plain file of that many bytes lies. Raises `OSError` for what says nothing about the file.

    Paths of bytes take a tenth less time: Python need not encode each for the system.
    """
    fd, look = volume.root().fd, os.lstat
    found = []
    for path, size_bytes in zip(paths, sizes, strict=True):
        try:
            facts = look(path, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            found.append(path)
            continue
        if facts.st_size != size_bytes or not stat.S_ISREG(facts.st_mode):
            found.append(path)
    return found


def facts_of(volume: Volume, path: str) -> Facts | None:
    """The file of that path, as the disk has it now; None when there is none."""
    try:
        found = os.stat(path, dir_fd=volume.root().fd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Facts(found.st_size, max(found.st_mtime, found.st_ctime))


def incoming(volume: Volume) -> Iterator[tuple[str, Facts]]:
    """Everything in incoming/. Raises `OSError`."""
    directory = Handle(volume.incoming(volume.root()))
    for entry in _entries(directory):
        with suppress(FileNotFoundError):
            found = entry.stat(follow_symlinks=False)
            yield f"{INCOMING}/{entry.name}", Facts(found.st_size, max(found.st_mtime, found.st_ctime))


# Setting aside


def quarantined(volume: Volume) -> list[str]:
    """The names in quarantine/: of times, as `quarantine` was given them, and what else somebody has put there."""
    try:
        return sorted(entry.name for entry in _entries(Handle(volume.directory(volume.root(), QUARANTINE, make=False))))
    except FileNotFoundError:
        return []


def measure_quarantined(volume: Volume, date: str, keep: Set[str] = frozenset()) -> tuple[int, int, int]:
    """Files and bytes below quarantine/<date>/ that are not of the users whose directories are to be kept, and the files that are."""
    directory = Handle(volume.directory(volume.root(), f"{QUARANTINE}/{date}", make=False))
    files, size_bytes = _measure(directory)
    kept = 0
    users = _opened(directory, USERS)
    for name in _names(users) & keep:
        theirs = _measure(Handle(volume.directory(volume.root(), f"{QUARANTINE}/{date}/{USERS}/{name}", make=False)))
        files, size_bytes, kept = files - theirs[0], size_bytes - theirs[1], kept + theirs[0]
    return files, size_bytes, kept


def _names(directory: Handle | None) -> set[str]:
    return set() if directory is None else {entry.name for entry in _entries(directory)}


def _measure(directory: Handle) -> tuple[int, int]:
    files = size_bytes = 0
    for entry in _entries(directory):
        if entry.is_dir(follow_symlinks=False):
            below = _opened(directory, entry.name)
            more = (0, 0) if below is None else _measure(below)
        else:
            more = (1, entry.stat(follow_symlinks=False).st_size)
        files, size_bytes = files + more[0], size_bytes + more[1]
    return files, size_bytes


def remove_quarantined(volume: Volume, date: str, keep: Set[str] = frozenset()) -> None:
    """Removes quarantine/<date>/ with all that is in it, but for the directories of the users to be kept. Repeating is safe.

    Raises as `Volume.writing`.
    """
    if "/" in date or date in ("", ".", ".."):
        raise ValueError("not a name in the quarantine")
    parent = Handle(volume.directory(volume.root(), QUARANTINE, make=False))
    directory = _opened(parent, date)
    users = _opened(directory, USERS) if directory else None
    there = _names(users)
    with volume.writing():
        if users is not None and there & keep:
            for name in there - keep:
                remove_tree(name, users.fd)
            parent = users
        else:
            remove_tree(date, parent.fd)
    with volume.syncing():
        os.fsync(parent.fd)


def quarantine(volume: Volume, path: str, date: str) -> None:
    """Moves a stored file or a preview to quarantine/<date>/, under its own path, durably and never over another.

    A crash leaves it in one of the two places, or in both as one file. Raises `FileNotFoundError`, `FileExistsError`, and as
    `Volume.writing`.
    """
    directory, name = path.rsplit("/", 1)
    _move(volume, _checked_listed(path), f"{QUARANTINE}/{date}/{directory}", name)


def take_back(volume: Volume, path: str, date: str) -> None:
    """Undoes `quarantine`. Raises as it does."""
    directory, name = _checked_listed(path).rsplit("/", 1)
    _move(volume, f"{QUARANTINE}/{date}/{path}", directory, name)


def set_aside(volume: Volume, path: str) -> None:
    """Gives a stored file whose bytes are wrong a name under which nobody serves it, where it is. Raises as `quarantine`."""
    directory, name = checked(path).rsplit("/", 1)
    _move(volume, path, directory, name + DAMAGED)


def set_back(volume: Volume, path: str) -> None:
    """Undoes `set_aside`. Raises as it does."""
    directory, name = checked(path).rsplit("/", 1)
    _move(volume, path + DAMAGED, directory, name)


def _checked_listed(path: str) -> str:
    plain = path.removesuffix(DAMAGED)
    directory, name = plain.rsplit("/", 1)
    checked_readable(f"{directory}/{name.removeprefix('.')}")
    return path


def _move(volume: Volume, path: str, to: str, new_name: str) -> None:
    root = volume.root()
    directory, name = path.rsplit("/", 1)
    source = Handle(volume.directory(root, directory, make=False))
    with volume.writing():
        target = Handle(volume.directory(root, to, make=True))
        os.link(name, new_name, src_dir_fd=source.fd, dst_dir_fd=target.fd, follow_symlinks=False)  # unlike rename, never over another
    with volume.syncing():
        os.fsync(target.fd)
    with volume.writing():
        os.unlink(name, dir_fd=source.fd)
    with volume.syncing():
        os.fsync(source.fd)


# Digests


class Digest:
    """Reads a stored file from the disk, piece by piece, and leaves the page cache to the users. Closes itself.

    What the cache holds of it is dropped before, too: it would say nothing about the disk. `length_bytes` is what the disk says.
    Raises `FileNotFoundError`.
    """

    def __init__(self, volume: Volume, path: str) -> None:
        directory, name = path.rsplit("/", 1)
        checked(path.removesuffix(DAMAGED))
        parent = Handle(volume.directory(volume.root(), directory, make=False))
        self._file = Handle(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent.fd))
        os.posix_fadvise(self._file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(self._file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._sha256 = hashlib.sha256()
        self.length_bytes = os.fstat(self._file.fd).st_size
        self.read_bytes = 0

    @property
    def sha256(self) -> bytes:
        """Of what was read so far."""
        return self._sha256.digest()

    def read(self) -> int:
        """Reads one more piece. Returns its bytes, 0 at the end. Raises `OSError` where the disk cannot read."""
        piece = os.pread(self._file.fd, _READ_BYTES, self.read_bytes)
        self._sha256.update(piece)
        os.posix_fadvise(self._file.fd, self.read_bytes, len(piece), os.POSIX_FADV_DONTNEED)
        self.read_bytes += len(piece)
        return len(piece)


def begin_digest(volume: Volume, path: str) -> Digest:
    """Opens a stored file and reads its first piece, which of most files is all."""
    digest = Digest(volume, path)
    digest.read()
    return digest


def is_of_the_file(problem: OSError) -> bool:
    """Whether an error of reading tells of this file's bytes, and not of the machine or the whole volume."""
    return problem.errno in (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.ELOOP, errno.EISDIR)
