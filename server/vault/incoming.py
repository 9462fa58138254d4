"""A file on its way in: from the first byte under incoming/ to its final name."""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from uuid import UUID

from server.errors import Conflict, DigestMismatch, VolumeFull
from server.vault.layout import INCOMING, checked
from server.vault.volume import Volume

_CLOSED = -1
_WRITE_BACK_BYTES = 8 * 2**20
_READ_BYTES = 256 * 1024
DIGEST_NAMES = {"sha-256": "sha256", "sha-512": "sha512", "md5": "md5"}  # RFC 9530's names, and Content-MD5's


class IncomingFile:
    """Bytes being received under `incoming/<upload_id>`. Every method blocks; one thread at a time may use it.

    Until `publish` has returned, the file is nobody's: a crash leaves it in incoming/, where housekeeping removes it.
    `expected` holds digests that the client sent, by RFC 9530 name; they are checked before anything is published.
    """

    def __init__(self, volume: Volume, upload_id: UUID, expected: dict[str, bytes], *, exclusive: bool = True) -> None:
        """Makes the file; without `exclusive` one that is there is opened instead."""
        self._volume = volume
        self._name = str(upload_id)
        self._root = volume.root()
        self._written_bytes = self._started_bytes = 0
        self._sha256 = hashlib.sha256()
        self._expected = expected
        self._others = {name: hashlib.new(DIGEST_NAMES[name], usedforsecurity=False) for name in expected if name != "sha-256"}
        with volume.writing():
            flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if exclusive else 0) | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(f"{INCOMING}/{self._name}", flags, 0o640, dir_fd=self._root.fd)

    @property
    def sha256(self) -> bytes:
        """The SHA-256 of the bytes appended so far."""
        return self._sha256.digest()

    def append(self, chunks: Sequence[bytes | memoryview]) -> None:
        """Writes and hashes. Raises `VolumeFull` when the volume's reserve or its end is reached, or as `Volume.writing`."""
        for chunk in chunks:
            self._sha256.update(chunk)
            for other in self._others.values():
                other.update(chunk)
        self._append_unhashed(chunks)

    def _append_unhashed(self, chunks: Sequence[bytes | memoryview]) -> None:
        if self._volume.free_bytes() + self._volume.promised_bytes < 0:  # promised bytes are these: only the reserve counts
            raise VolumeFull
        with self._volume.writing():
            _write_all(self._fd, chunks)
            self._written_bytes += sum(map(len, chunks))
            if self._written_bytes - self._started_bytes >= _WRITE_BACK_BYTES:
                # Starts writing these pages out and forgets them once they are: the sync at the end then has little left to do
                # (a third faster), and a large upload does not push everybody's files out of the page cache.
                os.posix_fadvise(self._fd, self._started_bytes, self._written_bytes - self._started_bytes, os.POSIX_FADV_DONTNEED)
                self._started_bytes = self._written_bytes

    def pieces(self) -> Iterator[bytes]:
        """What has been appended so far, read back, one piece in memory at a time. Raises as `Volume.writing`."""
        at = 0
        while at < self._written_bytes:
            with self._volume.writing():
                piece = os.pread(self._fd, min(_READ_BYTES, self._written_bytes - at), at)
                if not piece:
                    raise OSError(errno.EIO, "the file is shorter than what was written to it")
            at += len(piece)
            yield piece

    def seal(self) -> None:
        """Checks the client's digests and syncs the bytes. Raises `DigestMismatch` or `VolumeReadOnly`.

        fdatasync suffices: it covers the length too, being needed to read the data back (POSIX), and link counts and
        times are not part of the promise.
        """
        for name, digest in self._expected.items():
            ours = self.sha256 if name == "sha-256" else self._others[name].digest()
            if ours != digest:
                raise DigestMismatch(name)
        with self._volume.syncing():
            os.fdatasync(self._fd)
        os.close(self._fd)
        self._fd = _CLOSED

    def publish(self, path: str) -> None:
        """Gives the sealed file its final name, durably. Raises `FileExistsError`, never overwriting anything.

        A crash before the caller's commit leaves a file without a row: garbage that harms nobody (P2).
        """
        directory, name = checked(path).rsplit("/", 1)
        self._volume.root()  # a volume that is gone by now takes no file, though the old handle still would
        with self._volume.writing():
            parent = self._volume.directory(self._root, directory, make=True)
        try:
            with self._volume.writing():
                os.link(f"{INCOMING}/{self._name}", name, src_dir_fd=self._root.fd, dst_dir_fd=parent, follow_symlinks=False)
                os.unlink(f"{INCOMING}/{self._name}", dir_fd=self._root.fd)
            with self._volume.syncing():
                os.fsync(parent)
        except FileNotFoundError as problem:
            raise Conflict from problem  # housekeeping took the upload for abandoned, or the user was erased meanwhile
        finally:
            os.close(parent)

    def discard(self) -> None:
        """Removes what is in incoming/. Safe to repeat; a failure leaves a leftover that housekeeping removes."""
        if self._fd != _CLOSED:
            os.close(self._fd)
            self._fd = _CLOSED
        with suppress(OSError):
            os.unlink(f"{INCOMING}/{self._name}", dir_fd=self._root.fd)


def _write_all(fd: int, chunks: Sequence[bytes | memoryview]) -> None:
    """writev until everything is written: it may write less than asked."""
    views = [memoryview(chunk) for chunk in chunks if chunk]
    while views:
        written = os.writev(fd, views[:1024])  # IOV_MAX
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views and written:
            views[0] = views[0][written:]
