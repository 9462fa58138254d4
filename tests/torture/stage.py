"""What each fault has before it: a database and a volume of its own, and afterwards the look at all that was stored."""

import asyncio
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from tests.ops.conftest import Told
from tests.quota.rows import drift
from tests.serving import RunningServer, execute, new_server


class Stage:
    """One PostgreSQL, with durability, and a directory."""

    def __init__(self, postgres_url: str, scratch: Path) -> None:
        self._url = postgres_url
        self._scratch = scratch
        self._numbers = itertools.count()

    def database(self) -> tuple[str, Path]:
        """A new database, and a directory for all that goes with it."""
        name = f"torture_{next(self._numbers)}"
        execute(self._url, f"create database {name} template template0")
        directory = self._scratch / name
        directory.mkdir()
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{name}")), directory

    @contextmanager
    def server(self, **environment: str) -> Iterator[RunningServer]:
        """A running server with an empty database and volume."""
        with self.server_to_start(**environment) as server:
            server.start()
            yield server

    @contextmanager
    def server_to_start(self, mount: Path | None = None, /, **environment: str) -> Iterator[RunningServer]:
        """The same, not started yet, with a volume of its own unless one is given."""
        database_url, directory = self.database()
        server = new_server(database_url, directory, mount, {"COFFER_MAX_FILE_BYTES": str(2**30)} | environment)
        try:
            yield server
        finally:
            server.kill()

    @contextmanager
    def server_on_disk(self, size_bytes: int, /, **environment: str) -> Iterator[RunningServer]:
        """As `server`, with a file system of that size of its own."""
        directory = self._scratch / f"disk_{next(self._numbers)}"
        directory.mkdir()
        with mounted(directory, size_bytes) as mount, self.server_to_start(mount, **environment) as server:
            server.start()
            yield server


@contextmanager
def mounted(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A new ext4 on a loop device, as Hetzner's volumes are mounted: errors make it read-only. Needs root."""
    picture, mount = directory / "disk.img", directory / "disk"
    mount.mkdir()
    with picture.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", picture], check=True)
    mount_again(mount)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=False)


def mount_again(mount: Path) -> None:
    """Mounts a disk of `mounted`."""
    picture = mount.with_name("disk.img")
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", picture, mount], check=True)


def coffer(server: RunningServer, *arguments: str, **environment: str) -> Told:
    """Runs a tool as a timer does, with --json, and reads what it tells."""
    return Tool(server, arguments, environment).wait()


class Tool:
    """A tool that runs."""

    def __init__(
        self, server: RunningServer, arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, as_json: bool = True
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ops.cli", *arguments, *(["--json"] if as_json else [])],
            env=inherited | {"DATABASE_URL": server.database_url} | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._is_json = as_json
        self.pid = self._process.pid

    def wait(self) -> Told:
        """Until it has ended."""
        stdout, stderr = self._process.communicate()
        lines = [json.loads(line) for line in stdout.splitlines()] if self._is_json else []
        summary = lines.pop()["summary"] if lines and "summary" in lines[-1] else {}
        return Told(self._process.returncode, lines, summary, stderr)


def look_at(server: RunningServer, acknowledged: Mapping[str, str], *, may_leave_garbage: bool = False) -> int:
    """All that clients were told is there, each file by its SHA-256, every row has its file, and the quota is exact. Returns how many
    bytes in incoming/ are of uploads whose creation nobody heard of.
    """
    rows = execute(server.database_url, "select id::text, file_path, sha256 from user_files")
    by_id = {row["id"]: row for row in rows}
    lost = acknowledged.keys() - by_id.keys()
    assert not lost, f"{len(lost)} acknowledged files have no row"
    for row in rows:
        with (server.volume / row["file_path"]).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        assert found == row["sha256"].hex(), "a file has other bytes than its row says"
        assert acknowledged.get(row["id"], found) == found, "a file has other bytes than were sent"
    assert may_leave_garbage or len(server.stored_paths()) == len(rows), "there are files without a row"
    wrong = asyncio.run(_drift(server.database_url))
    assert not wrong, f"the quota has drifted: {wrong[:3]}"
    return sum(path.stat().st_size for path in (server.volume / "incoming").iterdir())


async def _drift(database_url: str) -> list[tuple[str, str]]:
    connection = await asyncpg.connect(database_url)
    try:
        return await drift(connection)
    finally:
        await connection.close()
