"""The tools, run as a timer runs them, beside a server with some files."""

import asyncio
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ops import cli
from tests.quota.rows import drift
from tests.samples import image
from tests.serving import RunningServer


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
