"""Backups as plain `tar -czf` has them: one file with the dump, a manifest and everybody's files, not encrypted and never incremental."""

import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec

from ops import sets
from ops.children import Pipe, child, pipe
from ops.loading import Source
from ops.sets import DUMP, MANIFEST, Manifest
from server.commands.failures import CommandFailed, Exit
from server.settings import Settings
from server.vault import Volume
from server.vault.layout import PREVIEWS, USERS, WITHHELD

_NAME = re.compile(r"coffer-(\d{8}T\d{6}\.\d{6}Z)\.tar\.gz")
_TIME = "%Y%m%dT%H%M%S.%fZ"
_LEFT_OVER_SECONDS = 86_400
_SOME_DIFFER = 1  # files came or went while it read
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


class Tarball:
    """One archive. In it are manifest.json, coffer.dump, and each volume's users/ below the path that its mount had."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def write(self, beside: Path, volumes: list[Volume], *, with_previews: bool) -> tuple[dict[UUID, int], list[str]]:
        """Archives the dump and manifest that lie in `beside`, then the volumes. Returns files by volume, and what could not be read.

        Whole or not at all. Raises `CommandFailed`.
        """
        draft = self.path.with_name(f".{self.path.name}.draft")
        command = ["tar", "--create", "--gzip", "--verbose", "--quoting-style=literal", "--ignore-failed-read", f"--file={draft}"]
        command += ["--anchored", "--wildcards", "--no-wildcards-match-slash"]
        if not with_previews:
            command += [f"--exclude={literal(_inside(volume.mount / USERS))}/*/{PREVIEWS}" for volume in volumes]
        command += [f"--directory={beside}", MANIFEST, DUMP, "--directory=/"]
        # In this order: what leaves its place while the first is read is found in the second.
        places = {_inside(volume.mount / name): volume.id for volume in volumes for name in (USERS, WITHHELD)}
        try:
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))  # everybody's files are in it
            async with child(*command, *places, environment=_ENVIRONMENT) as running:
                files = dict.fromkeys((volume.id for volume in volumes), 0)
                async for line in running.stdout:
                    name = line.decode(errors="surrogateescape").rstrip("\n")
                    place = next((place for place in places if name.startswith(f"{place}/")), None)
                    if place is not None and not name.endswith("/"):
                        files[places[place]] += 1
                if await running.ended() not in (0, _SOME_DIFFER):
                    raise CommandFailed(f"tar: {' '.join(running.complaints[-2:])}")
            _sync(draft)
            draft.rename(self.path)
            _sync(self.path.parent)
        finally:
            draft.unlink(missing_ok=True)
        unread = [each[1] for each in (re.match(r"tar: (.+): [^:]+: Warning: Cannot ", line) for line in running.complaints) if each]
        return files, [f"/{path}" for path in unread]

    async def manifest(self) -> Manifest:
        """What the backup says of itself. Raises `CommandFailed`."""
        async with child(*self._reading(MANIFEST), "--occurrence=1", environment=_ENVIRONMENT) as running:
            said = await running.stdout.read()
            await running.ended()
        try:
            return msgspec.json.decode(said, type=Manifest)
        except msgspec.DecodeError:
            raise CommandFailed(f"{self.path} is no backup: {' '.join(running.complaints[-1:])}", Exit.NOT_FOUND) from None

    def dump(self) -> Source:
        """The rows, as `ops.loading` wants them."""
        return self._piped(*self._reading(DUMP), "--occurrence=1")

    def members(self) -> Source:
        """All of it, unpacked no further than to a tar archive: each volume's users/ and withheld/ below the path that its mount had."""
        return self._piped("gzip", "--decompress", "--stdout", "--", str(self.path))

    @asynccontextmanager
    async def _piped(self, *command: str) -> AsyncIterator[tuple[Pipe, Callable[[], Awaitable[None]]]]:
        with pipe() as stream:
            async with child(*command, environment=_ENVIRONMENT, stdout=stream.write) as running:
                stream.close_write()

                async def check() -> None:
                    if await running.ended() != 0:
                        raise CommandFailed(f"{command[0]}: {' '.join(running.complaints[-2:]) or 'it ended without a word'}")

                yield stream, check

    def _reading(self, member: str) -> tuple[str, ...]:
        return ("tar", "--extract", "--gzip", "--to-stdout", f"--file={self.path}", member)

    async def restore(self, mount_path: str, target: Path) -> None:
        """Writes a volume's files below `target`. Raises `CommandFailed`."""
        inside = _inside(Path(mount_path))
        command = [
            "tar",
            "--extract",
            "--gzip",
            f"--file={self.path}",
            f"--directory={target}",
            f"--strip-components={len(Path(inside).parts)}",
        ]
        async with child(*command, f"{inside}/{USERS}", f"{inside}/{WITHHELD}", environment=_ENVIRONMENT) as running:
            if await running.ended() != 0:
                raise CommandFailed(f"tar: {' '.join(running.complaints[-2:])}")


def new_tarball(place: Path, at: datetime) -> Tarball:
    """In a directory, under a name of its own; else at that very path. Raises `CommandFailed`."""
    place = place.absolute()
    if place.is_dir():
        return Tarball(place / f"coffer-{at.astimezone(UTC).strftime(_TIME)}.tar.gz")
    if not place.parent.is_dir():
        raise CommandFailed(f"there is no directory {place.parent}", Exit.NOT_FOUND)
    return Tarball(place)


def forget_old(directory: Path, settings: Settings) -> int:
    """Removes those of a directory that are not kept, unless all are, and what killed ones left there; tells how many are."""
    for path in directory.glob(".coffer-*"):
        if path.stat().st_mtime < time.time() - _LEFT_OVER_SECONDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    names = ((path, _NAME.fullmatch(path.name)) for path in directory.iterdir())
    found = {datetime.strptime(name[1], _TIME).replace(tzinfo=UTC): path for path, name in names if name}
    keep = (
        set(found)
        if not settings.backup_forget
        else sets.kept(
            list(found), daily=settings.backup_keep_daily, weekly=settings.backup_keep_weekly, monthly=settings.backup_keep_monthly
        )
    )
    for at, path in found.items():
        if at not in keep:
            path.unlink(missing_ok=True)
    return len(keep)


def literal(path: str | Path) -> str:
    """As a pattern that means only itself: of tar, and of Go's path/filepath.Match."""
    return re.sub(r"([\\*?\[])", r"\\\1", str(path))


def _inside(path: Path) -> str:
    return str(path).lstrip("/")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
