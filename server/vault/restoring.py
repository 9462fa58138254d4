"""A volume that is being filled from a backup: it becomes one, by its sentinel, when all is there. Everything here blocks."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from uuid_utils.compat import uuid7

from server.vault.incoming import IncomingFile
from server.vault.inventory import Digest
from server.vault.layout import SENTINEL, USERS, WITHHELD
from server.vault.sentinel import init_volume
from server.vault.volume import Volume

_RESTORING = ".coffer-restoring"
"""While a directory is filled: the id of the backup, so that only the same one goes on."""
_STAGING = ".coffer-staging"
_PIECE_BYTES = 2**20
_NOT_OURS = frozenset({"lost+found"})


def begin_restoring(directory: Path, backup_id: UUID) -> None:
    """Takes an empty directory, or one that the same backup has begun to fill. Raises `FileExistsError` for any other."""
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / _RESTORING
    if not mark.exists():
        if {each.name for each in directory.iterdir()} - _NOT_OURS:
            raise FileExistsError(f"{directory} is not empty")
        mark.write_text(str(backup_id))
    elif mark.read_text() != str(backup_id):
        raise FileExistsError(f"{directory} holds half of another backup, {mark.read_text()}")


def is_restored(directory: Path, volume_id: UUID) -> bool:
    """Whether it is that volume already."""
    try:
        return (directory / SENTINEL).read_text().strip() == str(volume_id)
    except OSError:
        return False


def put_back(directory: Path, paths: dict[str, str]) -> None:
    """Moves withheld files, by name, to the paths that the rows name, and removes what no row names."""
    withheld = directory / WITHHELD
    if not withheld.exists():
        return
    for each in list(withheld.iterdir()):
        path = paths.get(each.name)
        if path is not None and not (directory / path).exists():
            (directory / path).parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            each.rename(directory / path)
        else:
            each.unlink()
    withheld.rmdir()


def finish_restoring(directory: Path, volume_id: UUID) -> None:
    """Syncs everything, and makes it the volume. Raises `OSError`."""
    (directory / USERS).mkdir(mode=0o750, exist_ok=True)
    subprocess.run(["sync", "--file-system", str(directory)], check=True)
    init_volume(directory, volume_id)
    (directory / _RESTORING).unlink()


def make_staging(volume: Volume) -> Path:
    """An empty directory on the volume, beside what is stored: what a restore that was killed has left there goes."""
    staging = volume.mount / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    return staging


def adopt(volume: Volume, staged: Path, paths: Callable[[int], str], generation: int, sha256: bytes) -> int:
    """Makes a file that was restored to `make_staging` a stored one, verified, synced and published as an upload is (P1).

    It gets the first of `paths`, from `generation` on, that is free; returns which. Raises `DigestMismatch`, `FileNotFoundError` and as
    `IncomingFile`.
    """
    with staged.open("rb") as source:
        incoming = IncomingFile(volume, uuid7(), {"sha-256": sha256})
        try:
            while piece := source.read(_PIECE_BYTES):
                incoming.append([piece])
            incoming.seal()
            while True:
                try:
                    incoming.publish(paths(generation))
                    break
                except FileExistsError:
                    generation += 1
        finally:
            incoming.discard()
    staged.unlink()
    return generation


def remove_staging(volume: Volume) -> None:
    """Repeating is safe."""
    shutil.rmtree(volume.mount / _STAGING, ignore_errors=True)


def digest_of(volume: Volume, path: str) -> tuple[int, bytes]:
    """Length and SHA-256 of a stored file, read from the disk. Raises `FileNotFoundError` and `OSError`."""
    digest = Digest(volume, path)
    while digest.read():
        pass
    return digest.length_bytes, digest.sha256


def withheld_names(directory: Path) -> list[str]:
    """What was withheld of a volume that is being restored."""
    return [each.name for each in (directory / WITHHELD).iterdir()] if (directory / WITHHELD).exists() else []
