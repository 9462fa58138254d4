"""restic, as far as backups need it. What a repository is and how it is reached is restic's own business (restic 0.14 or later)."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from ops.children import Child, Pipe, child, pipe
from server.commands.failures import CommandFailed, Exit
from server.commands.output import say
from server.settings import Settings, variable

HOST = "coffer"
"""Not the machine's: on another one, a backup goes on with what the last one has stored."""

_INCOMPLETE = 3  # "some source files could not be read"
_LOCKED = 11  # since restic 0.17; before, only words tell
_LOCKED_WORDS = "is already locked"
_PATIENCE_SECONDS = 600.0
_TRY_AGAIN_SECONDS = 5.0


class Snapshot(msgspec.Struct, frozen=True):
    """A tree that is stored. `id` names no other one, and may be a short one."""

    id: str
    time: datetime
    tags: list[str] = []


@dataclass(frozen=True)
class Saved:
    """What one run has stored. `unread` are the absolute paths that could not be read."""

    snapshot: Snapshot
    files: int
    added_bytes: int
    unread: list[str]


class Node(msgspec.Struct, frozen=True):
    """An entry of a snapshot's tree; `path` begins with a slash, at the root of the snapshot."""

    struct_type: str = ""
    type: str = ""
    path: str = ""
    size: int = 0


class ResticFailed(CommandFailed):
    """restic has said no. The message is its own last words, which hold no password."""


class ResticLocked(ResticFailed):
    """Somebody else needs the repository to stay as it is, or changes it."""


class Repository:
    """The configured repository. Every method raises `ResticFailed`.

    Each run of restic takes half a second, for the key that it derives from the password: what one run can do is not done by two.
    """

    def __init__(self, settings: Settings) -> None:
        for name in ("backup_repository", "backup_password"):
            if not getattr(settings, name):
                raise CommandFailed(f"{variable(name)} is not set: see Backup, restore, drill in the README", Exit.USAGE)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        self.environment |= {
            "RESTIC_REPOSITORY": settings.backup_repository,
            "RESTIC_PASSWORD": settings.backup_password,
            "RESTIC_PROGRESS_FPS": "0.1",
        }
        for other in ("RESTIC_REPOSITORY_FILE", "RESTIC_PASSWORD_FILE", "RESTIC_PASSWORD_COMMAND"):
            self.environment.pop(other, None)

    async def initialise(self) -> None:
        """Makes the repository."""
        await self._say("init")

    async def snapshots(self, *tags: str) -> list[Snapshot]:
        """All that have all of these tags, oldest first. While old ones are being removed, this waits."""
        command = ("snapshots", "--json", *(["--tag", ",".join(tags)] if tags else []))
        said = await self._say_unlocked(*command, patience_seconds=_PATIENCE_SECONDS)
        return sorted(msgspec.json.decode(said or b"[]", type=list[Snapshot] | None) or [], key=lambda each: each.time)

    async def save_tree(self, directory: Path, name: str, tags: Sequence[str], *, leave_out: Sequence[str] = ()) -> Saved:
        """Stores `directory`/`name`, as `/name` of the snapshot. `leave_out` are restic's patterns of absolute paths."""
        options = [f"--exclude={pattern}" for pattern in leave_out]
        async with child("restic", *self._save(tags), *options, name, environment=self.environment, directory=directory) as running:
            return await self._saved(running, tags)

    async def save_stream(self, source: int, name: str, tags: Sequence[str]) -> Saved:
        """Stores what comes from a descriptor as `/name`. What breaks off is stored, too: it is for the caller to know."""
        command = (*self._save(tags), "--stdin", "--stdin-filename", name)
        async with child("restic", *command, environment=self.environment, stdin=source) as running:
            return await self._saved(running, tags)

    async def entries(self, snapshot_id: str) -> AsyncIterator[Node]:
        """The tree of a snapshot."""
        async with child("restic", "ls", "--json", snapshot_id, environment=self.environment) as running:
            async for line in running.stdout:
                node = msgspec.json.decode(line, type=Node)
                if node.struct_type == "node":
                    yield node
            await self._check(running)

    def reading(self, snapshot_id: str, path: str) -> AbstractAsyncContextManager[Child]:
        """Within it, `stdout` gives the bytes of a file of the snapshot, or of a directory as a tar archive. Ask `check` at its end."""
        return child("restic", "dump", snapshot_id, path, environment=self.environment)

    async def check(self, running: Child) -> None:
        """Waits for the end of what `reading` gave."""
        await self._check(running)

    @asynccontextmanager
    async def piped(self, snapshot_id: str, path: str) -> AsyncIterator[tuple[Pipe, Child]]:
        """As `reading`, with a pipe that another program can read from."""
        with pipe() as stream:
            async with child("restic", "dump", snapshot_id, path, environment=self.environment, stdout=stream.write) as running:
                stream.close_write()
                yield stream, running

    async def restore(self, snapshot_id: str, target: Path, only: Sequence[str] = ()) -> None:
        """Writes a snapshot's tree below `target`; `only` these paths of it, if any are named. restic checks blobs and syncs nothing."""
        await self._say("restore", snapshot_id, "--target", str(target), *(f"--include={path}" for path in only))

    async def forget(self, snapshot_ids: Sequence[str], *, prune: bool) -> None:
        """Removes snapshots, and with `prune` what no other one needs. Raises `ResticLocked` while somebody reads or writes."""
        await self._say_unlocked("forget", *(["--prune"] if prune else []), *snapshot_ids)

    async def _say_unlocked(self, *command: str, patience_seconds: float = 0) -> bytes:
        """As `_say`, without the locks of the dead, whom restic knows on its own machine, or after half an hour."""
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                return await self._say(*command)
            except ResticLocked:
                await self._say("unlock")
            try:
                return await self._say(*command)
            except ResticLocked as problem:
                if time.monotonic() > deadline:
                    raise
                say(f"waiting for the repository: {problem}")
                await asyncio.sleep(_TRY_AGAIN_SECONDS)

    async def _say(self, *command: str) -> bytes:
        async with child("restic", *command, environment=self.environment) as running:
            said = await running.stdout.read()
            await self._check(running)
            return said

    def _save(self, tags: Sequence[str]) -> list[str]:
        return ["backup", "--json", "--host", HOST, "--tag", ",".join(tags)]

    async def _saved(self, running: Child, tags: Sequence[str]) -> Saved:
        summary: dict[str, Any] = {}
        async for line in running.stdout:
            if b'"summary"' in line:
                summary = msgspec.json.decode(line)
        await self._check(running, also_good=_INCOMPLETE)
        if not summary:
            raise ResticFailed("restic told nothing of what it stored")
        unread = [each["item"] for each in map(_error_in, running.complaints) if each is not None and each.get("item")]
        snapshot = Snapshot(summary["snapshot_id"], datetime.now(UTC), list(tags))
        return Saved(snapshot, summary["total_files_processed"], summary["data_added"], unread)

    async def _check(self, running: Child, also_good: int = 0) -> None:
        status = await running.ended()
        if status not in (0, also_good):
            locked = [line for line in running.complaints if _LOCKED_WORDS in line]
            if locked or status == _LOCKED:
                raise ResticLocked(f"restic: {(locked or running.complaints)[0]}")
            raise ResticFailed(f"restic: {_last_words(running.complaints)}")


def _error_in(line: str) -> dict[str, Any] | None:
    try:
        said = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    return said if isinstance(said, dict) and said.get("message_type") == "error" else None


def _last_words(complaints: Sequence[str]) -> str:
    told = [each for each in complaints if each]
    fatal = [each for each in told if each.startswith("Fatal")]
    return (fatal or told or ["it ended without a word"])[-1]
