"""What each fault has before it: a database and a volume of its own, and afterwards the look at all that was stored."""

import asyncio
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

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
        database_url, directory = self.database()
        server = new_server(database_url, directory, None, {"COFFER_MAX_FILE_BYTES": str(2**30)} | environment)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def look_at(server: RunningServer, acknowledged: Mapping[str, str]) -> int:
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
    assert len(server.stored_paths()) == len(rows), "there are files without a row"
    wrong = asyncio.run(_drift(server.database_url))
    assert not wrong, f"the quota has drifted: {wrong[:3]}"
    return sum(path.stat().st_size for path in (server.volume / "incoming").iterdir())


async def _drift(database_url: str) -> list[tuple[str, str]]:
    connection = await asyncpg.connect(database_url)
    try:
        return await drift(connection)
    finally:
        await connection.close()
