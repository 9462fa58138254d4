"""A volume's sentinel: a small file that says "this really is volume X, mounted".

Without it an unmounted volume's bare mountpoint would look like an empty volume, and uploads would fill the root disk.
"""

import os
from pathlib import Path
from uuid import UUID, uuid4

from server.vault.layout import INCOMING, QUARANTINE, SENTINEL, USERS

_LONGEST_SENTINEL_BYTES = 64


def init_volume(mount: Path, volume_id: UUID | None = None) -> UUID:
    """Makes `mount` (an existing directory) a volume and returns its id, a new one unless it is given.

    Everything is synced before the sentinel appears under its name, so a crash leaves either no volume or a whole one.
    Raises `FileExistsError` when the directory already is a volume.
    """
    if (mount / SENTINEL).exists():
        raise FileExistsError(f"{mount} already is a Coffer volume")
    volume_id = volume_id or uuid4()
    for name in (INCOMING, USERS, QUARANTINE):
        (mount / name).mkdir(mode=0o750, exist_ok=True)
    draft = mount / f"{SENTINEL}.{volume_id}"
    with draft.open("x") as file:
        file.write(f"{volume_id}\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, mount / SENTINEL)  # unlike rename, never over another's sentinel
    finally:
        draft.unlink()
    directory = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return volume_id


def read_sentinel(root_fd: int) -> UUID:
    """The id in the sentinel of an opened mount, read from the disk: what is in the page cache would be there without the disk, too.

    Raises `OSError` or `ValueError` when there is none worth the name.
    """
    fd = os.open(SENTINEL, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return UUID(os.read(fd, _LONGEST_SENTINEL_BYTES).decode("ascii").strip())
    finally:
        os.close(fd)
