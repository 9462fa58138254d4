"""The tools, run as a timer runs them, beside a server with some files."""

import asyncio
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from ops import cli
from server.commands.failures import Exit
from tests.ops.cheap_repository import PASSWORD, make_cheap_repository
from tests.ops.slow_restic import SlowRestic
from tests.quota.rows import drift
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.waiting import until


@dataclass(frozen=True)
class Told:
    """What a tool told."""

    code: int
    findings: list[dict[str, Any]]
    summary: dict[str, Any]
    stderr: str

    @property
    def states(self) -> list[tuple[str, str]]:
        return sorted((each["kind"], each["state"]) for each in self.findings)


Tool = Callable[..., Told]


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a sysadmin who uses the test's database."""
    for name in list(os.environ):
        if name.startswith(("COFFER_", "DATABASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", database_url)
    return database_url


@pytest.fixture
def tool(database: str, capfd: pytest.CaptureFixture[str]) -> Tool:
    """Runs `coffer` with --json, unless a command has nothing to tell, and reads what it tells."""

    def run(*arguments: str, as_json: bool = True) -> Told:
        assert threading.current_thread() is threading.main_thread()
        capfd.readouterr()
        code = cli.run([*arguments, "--json"] if as_json else arguments)
        stdout, stderr = capfd.readouterr()
        lines = [json.loads(line) for line in stdout.splitlines()] if as_json else []
        summary = lines.pop()["summary"] if lines and "summary" in lines[-1] else {}
        return Told(code, lines, summary, stderr)

    return run


def store(server: RunningServer, user_id: str, count: int, *, size_bytes: int = 2_000, seed: int = 0) -> list[str]:
    """Uploads files and returns their ids."""
    with server.client(user_id) as client:
        return [
            client.post("/api/files/upload", content=image(size_bytes, seed + number), params={"name": f"{number}.png"}).json()["id"]
            for number in range(count)
        ]


def path_of(server: RunningServer, file_id: str) -> Path:
    """Where a file of the server lies; not what was wrong with it, unless there is nothing else."""
    paths = [path for path in server.stored_paths() if path.name.startswith(file_id)]
    return min(paths, key=lambda path: path.suffix == ".damaged")


def drifted(database_url: str) -> list[tuple[str, str]]:
    """What the counters say that the rows do not."""

    async def look() -> list[tuple[str, str]]:
        connection = await asyncpg.connect(database_url)
        try:
            return await drift(connection)
        finally:
            await connection.close()

    return asyncio.run(look())


@pytest.fixture
def no_repository(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where backups go, once somebody has made a repository there."""
    directory = tmp_path / "repository"
    monkeypatch.setenv("COFFER_BACKUP_REPOSITORY", str(directory))
    monkeypatch.setenv("COFFER_BACKUP_PASSWORD", PASSWORD)
    monkeypatch.setenv("RESTIC_CACHE_DIR", str(tmp_path / "cache"))
    return directory


@pytest.fixture(scope="session")
def cheap_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("restic") / "repository"
    make_cheap_repository(directory)
    return directory


@pytest.fixture
def repository(no_repository: Path, cheap_repository: Path) -> Path:
    """Where backups go: there are none."""
    shutil.copytree(cheap_repository, no_repository)
    return no_repository


@pytest.fixture
def slow_restic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowRestic:
    return SlowRestic(tmp_path / "slow", monkeypatch)


# Two volumes


class Second:
    """Another volume of the server, beside its first."""

    def __init__(self, server: RunningServer, mount: Path) -> None:
        self.mount = mount
        self.id: UUID = execute(server.database_url, "select id from volumes where mount_path = $1", str(mount))[0]["id"]
        self.first: UUID = execute(server.database_url, "select id from volumes where mount_path = $1", str(server.volume))[0]["id"]

    def files(self) -> set[str]:
        """The SHA-256 of every stored file's bytes."""
        return digests(self.mount)


def digests(mount: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in (mount / "users").glob("*/*/*") if path.is_file()}


@pytest.fixture
def second(server: RunningServer, tool: Tool, tmp_path: Path) -> Second:
    (tmp_path / "second").mkdir()
    assert tool("volume", "init", str(tmp_path / "second")).code == Exit.OK
    with server.client() as client:  # `rebalance` waits some seconds instead
        until(lambda: len(client.get("/health/ready").json()["volumes"]) == 2)
    execute(server.database_url, "update volumes set created_at = created_at - interval '1 minute'")
    return Second(server, tmp_path / "second")


def place_on_first(server: RunningServer, second: Second) -> None:
    """New users go to the emptiest volume, and here both are one disk."""
    execute(server.database_url, "insert into user_storage (user_id, volume_id) values ('ada', $1)", second.first)


def where(server: RunningServer, user_id: str = "ada") -> set[UUID]:
    return {row["volume_id"] for row in execute(server.database_url, "select volume_id from user_files where user_id = $1", user_id)}
