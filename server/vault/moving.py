"""Stored bytes on their way from one volume to another. Everything here blocks.

The bytes are read once, hashed, written to incoming/ of the other volume, synced, and read back from its disk before the copy is given a
name.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID, uuid4

from server.errors import Damaged
from server.vault.incoming import IncomingFile
from server.vault.layout import INCOMING, checked, previews_directory
from server.vault.volume import Handle, Volume

_PIECE_BYTES = 2**20


class Copy(IncomingFile):
    """A copy under way, of `size_bytes`. A crash leaves it in incoming/, where housekeeping removes it."""

    def __init__(self, source: Handle, size_bytes: int, target: Volume, expected: dict[str, bytes]) -> None:
        """`expected` as of `IncomingFile`. Raises as `Volume.writing`."""
        self.size_bytes = size_bytes
        self.incoming_id = uuid4()
        self._source = source
        self._at = 0
        os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        super().__init__(target, self.incoming_id, expected)

    def step(self) -> int:
        """Copies the next piece and returns its bytes, 0 at the end. Raises `OSError` where the disk cannot read, and as `append`."""
        piece = os.pread(self._source.fd, min(_PIECE_BYTES, self.size_bytes - self._at), self._at)
        if piece:
            self.append([piece])
            os.posix_fadvise(self._source.fd, self._at, len(piece), os.POSIX_FADV_DONTNEED)
            self._at += len(piece)
        return len(piece)

    def verify(self) -> None:
        """Reads the sealed copy from its disk, not from memory. Raises `Damaged` when it is not what was read and written."""
        file = Handle(os.open(f"{INCOMING}/{self._name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root.fd))
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        digest, at = hashlib.sha256(), 0
        while piece := os.pread(file.fd, _PIECE_BYTES, at):
            digest.update(piece)
            os.posix_fadvise(file.fd, at, len(piece), os.POSIX_FADV_DONTNEED)
            at += len(piece)
        if at != self.size_bytes or digest.digest() != self.sha256:
            raise Damaged


class FileCopy(Copy):
    """A copy of a stored file, which `publish_all` gives the same name on the other volume."""

    def __init__(self, source: Volume, target: Volume, path: str, sha256: bytes) -> None:
        """Sealing it checks the SHA-256. Raises `FileNotFoundError` where there is no such file, and as `Volume.writing`."""
        self.path = checked(path)
        file = Handle(source.open_stored(path))
        super().__init__(file, os.fstat(file.fd).st_size, target, {"sha-256": sha256})


class IncomingCopy(Copy):
    """A copy of the first bytes of an unfinished upload. It stays in incoming/."""

    def __init__(self, source: Volume, target: Volume, name: UUID, size_bytes: int) -> None:
        """Raises `FileNotFoundError`, and as `Volume.writing`."""
        path = f"{INCOMING}/{name}"
        super().__init__(Handle(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source.root().fd)), size_bytes, target, {})

    def seal(self) -> None:
        """As of any, and syncs its name in incoming/, too."""
        super().seal()
        directory = Handle(self._volume.incoming(self._root))
        with self._volume.syncing():
            os.fsync(directory.fd)


def publish_all(target: Volume, copies: Sequence[FileCopy]) -> None:
    """Gives sealed copies their final names, durably, with one sync for each directory: rows are locked meanwhile. Their names in incoming/
    go with `discard`.

    A name that is there already is no row's, and gives way: call it while the rows are locked. Raises as `Volume.writing`.
    """
    root = target.root()
    by_directory: dict[str, list[FileCopy]] = {}
    for each in copies:
        by_directory.setdefault(each.path.rsplit("/", 1)[0], []).append(each)
    for directory, group in by_directory.items():
        with target.writing():
            parent = Handle(target.directory(root, directory, make=True))
            for each in group:
                name = each.path.rsplit("/", 1)[1]
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=parent.fd)  # no row's, for that of this file says elsewhere
                os.link(f"{INCOMING}/{each.incoming_id}", name, src_dir_fd=root.fd, dst_dir_fd=parent.fd, follow_symlinks=False)
        with target.syncing():
            os.fsync(parent.fd)


def make_directories(target: Volume, paths: Sequence[str]) -> None:
    """Makes the directories of stored files, durably, so that `publish_all` need not. Raises as `Volume.writing`."""
    root = target.root()
    for directory in {checked(path).rsplit("/", 1)[0] for path in paths}:
        with target.writing():
            os.close(target.directory(root, directory, make=True))


def copy_previews(source: Volume, target: Volume, stored: str, file_id: UUID, sizes: dict[str, int]) -> set[str]:
    """Copies those of a file's previews that are there and have those sizes (by name), durably, and returns their names.

    What else lies there is removed. They can be made again, so whoever finds one missing has it made.
    """
    directory = previews_directory(stored, file_id)
    there = source.mount / directory
    names = []
    for name, size_bytes in sizes.items():
        with suppress(OSError):
            if (there / name).lstat().st_size == size_bytes:
                names.append(name)
    if not names:
        return set()
    made = target.store_previews(directory, there, names)
    return {name for name, size_bytes in zip(names, made, strict=True) if size_bytes == sizes[name]}
