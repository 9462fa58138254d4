"""A file on its way in that comes in several requests, perhaps through several processes."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from server.errors import Conflict, Damaged, VolumeFull, VolumeReadOnly
from server.kinds import HEAD_BYTES, TAIL_BYTES
from server.vault.incoming import IncomingFile
from server.vault.layout import INCOMING, checked
from server.vault.volume import Volume

_CATCH_UP_FACTOR = 4
_CATCH_UP_BYTES = 64 * 2**20
_READ_BYTES = 2**20
_COPY_BYTES = 64 * 2**20


@dataclass(slots=True)
class Hashed:
    """The SHA-256 of a file's first bytes, as far as this process has read or written them."""

    size_bytes: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def copy(self) -> "Hashed":
        return Hashed(self.size_bytes, self.sha256.copy())


class InUse(Exception):
    """Another open descriptor may still write to the file."""


class ResumedFile(IncomingFile):
    """An `IncomingFile` that goes on where an earlier request stopped. The kernel's lock on it keeps all others out while it is open.

    What another process has written is hashed by reading it again, four bytes for each that is appended, so that little is left to read
    at the end of a long upload. Its name in incoming/ outlives `publish`, and is the caller's to remove once the row is committed: a crash
    in between loses nothing, and who publishes the bytes again finds the name that they have got already.
    """

    def __init__(self, volume: Volume, name: UUID, keep_bytes: int | None, hashed: Hashed, synced_bytes: int = 0) -> None:
        """Opens `incoming/<name>`, made where it is not there, and cuts it to `keep_bytes` where it is longer; None keeps all.

        Everything kept is synced when this returns; so many of its bytes are known to be. `hashed` is what is known of its SHA-256.
        Raises `InUse`.
        """
        self._is_suspect = False
        super().__init__(volume, name, {}, exclusive=False)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            self.close()
            raise InUse from problem
        try:
            size_bytes = os.fstat(self._fd).st_size
            with volume.writing():
                if keep_bytes is not None and size_bytes > keep_bytes:
                    os.ftruncate(self._fd, keep_bytes)
                    size_bytes = keep_bytes
            if size_bytes > synced_bytes:
                with volume.syncing():
                    os.fdatasync(self._fd)
            if size_bytes == 0:
                self._sync_name()
            os.lseek(self._fd, size_bytes, os.SEEK_SET)
        except BaseException:
            self.close()
            raise
        self._written_bytes = self._started_bytes = self._synced_bytes = size_bytes
        self._hashed = hashed if hashed.size_bytes <= size_bytes else Hashed()
        self._sha256 = self._hashed.sha256

    @property
    def name(self) -> UUID:
        """Under which it lies in incoming/."""
        return UUID(self._name)

    @property
    def is_closed(self) -> bool:
        """Whether it was let go of."""
        return self._fd < 0

    @property
    def size_bytes(self) -> int:
        """How many bytes there are."""
        return self._written_bytes

    @property
    def hashed(self) -> Hashed:
        """A copy of what is known of the SHA-256."""
        return self._hashed.copy()

    def ends(self) -> tuple[bytes, bytes]:
        """The first `HEAD_BYTES` and the last `TAIL_BYTES`, or what there is."""
        with self._volume.writing():
            head = os.pread(self._fd, HEAD_BYTES, 0)
            return head, os.pread(self._fd, TAIL_BYTES, max(0, self._written_bytes - TAIL_BYTES))

    def append(self, chunks: Sequence[bytes | memoryview]) -> None:
        was_hashed = self._hashed.size_bytes == self._written_bytes
        try:
            self._append_unhashed(chunks)
        except BaseException:
            # A full disk takes the first part of a batch. Its bytes are as good as any: the file's length stays what we say it is.
            self._written_bytes = os.lseek(self._fd, 0, os.SEEK_CUR)
            raise
        if was_hashed:
            for chunk in chunks:
                self._sha256.update(chunk)
            self._hashed.size_bytes = self._written_bytes
        else:
            self.catch_up(_CATCH_UP_FACTOR * sum(map(len, chunks)))

    def begin_with(self, name: UUID, least_bytes: int, most_bytes: int | None) -> None:
        """Starts with the first bytes of another file in incoming/, unhashed; `most_bytes` None: all that are there now. The kernel copies,
        or shares the blocks where it can. Whoever has the other file open may go on appending to it.

        Raises `VolumeFull`, `Damaged` when there are fewer than `least_bytes`, and as `Volume.writing`.
        """
        try:
            with self._volume.writing():
                other = os.open(f"{INCOMING}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root.fd)
        except FileNotFoundError as problem:
            raise Damaged from problem
        try:
            size_bytes = os.fstat(other).st_size if most_bytes is None else most_bytes
            if size_bytes < least_bytes:
                raise Damaged
            if self._volume.free_bytes() < size_bytes:
                raise VolumeFull
            while (left := size_bytes - self._written_bytes) > 0:
                with self._volume.writing():
                    copied = os.copy_file_range(other, self._fd, min(left, _COPY_BYTES), self._written_bytes)
                if not copied:
                    raise Damaged
                self._written_bytes += copied
        finally:
            os.close(other)
        self.sync()

    def catch_up(self, most_bytes: int = _CATCH_UP_BYTES) -> bool:
        """Hashes bytes that are there. True when none is left; so call it until then, before `sha256` or `seal`."""
        with self._volume.writing():
            until = min(self._written_bytes, self._hashed.size_bytes + most_bytes)
            while self._hashed.size_bytes < until:
                piece = os.pread(self._fd, min(_READ_BYTES, until - self._hashed.size_bytes), self._hashed.size_bytes)
                if not piece:
                    raise OSError(errno.EIO, "the file is shorter than what was written to it")
                self._sha256.update(piece)
                self._hashed.size_bytes += len(piece)
        return self._hashed.size_bytes == self._written_bytes

    def sync(self) -> int:
        """Makes all bytes durable and returns how many those are. Raises `VolumeReadOnly`, and ever after: no failed sync is retried."""
        if self._is_suspect:
            raise VolumeReadOnly
        if self._synced_bytes < self._written_bytes:
            self._is_suspect = True
            with self._volume.syncing():
                os.fdatasync(self._fd)
            self._is_suspect = False
            self._synced_bytes = self._written_bytes
        return self._written_bytes

    @property
    def is_suspect(self) -> bool:
        """Whether a sync has failed: what was appended since the one before may be lost though it can be read."""
        return self._is_suspect

    def cut(self, size_bytes: int, hashed: Hashed) -> None:
        """Takes back what was appended past `size_bytes`, which were synced; `hashed` is what was known then.

        A crash may bring it back: it lies beyond what was recorded, then, and does not count.
        """
        if self._is_suspect:
            raise VolumeReadOnly
        with self._volume.writing():
            os.ftruncate(self._fd, size_bytes)
            os.lseek(self._fd, size_bytes, os.SEEK_SET)
        self._written_bytes = self._started_bytes = self._synced_bytes = size_bytes
        self._hashed = hashed
        self._sha256 = hashed.sha256

    def close(self) -> None:
        """Leaves the bytes as they are, and lets go of the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def seal(self) -> None:
        """Syncs the bytes, all of which are hashed, and lets go of the lock. Raises as `sync`."""
        self.sync()
        self.close()

    def publish(self, path: str) -> None:
        """As `IncomingFile.publish`, but the name in incoming/ stays, and a name that these very bytes have already is as good as new."""
        directory, name = checked(path).rsplit("/", 1)
        self._volume.root()
        with self._volume.writing():
            parent = self._volume.directory(self._root, directory, make=True)
        try:
            with self._volume.writing():
                try:
                    os.link(f"{INCOMING}/{self._name}", name, src_dir_fd=self._root.fd, dst_dir_fd=parent, follow_symlinks=False)
                except FileExistsError:
                    ours = os.stat(f"{INCOMING}/{self._name}", dir_fd=self._root.fd, follow_symlinks=False)
                    if not os.path.samestat(ours, os.stat(name, dir_fd=parent, follow_symlinks=False)):
                        raise
            with self._volume.syncing():
                os.fsync(parent)
        except FileNotFoundError as problem:
            raise Conflict from problem  # the upload expired or was ended meanwhile, or the user was erased
        finally:
            os.close(parent)

    def _sync_name(self) -> None:
        """A new file outlives a crash only if its name does (fsync(2))."""
        directory = self._volume.incoming(self._root)
        try:
            with self._volume.syncing():
                os.fsync(directory)
        finally:
            os.close(directory)
