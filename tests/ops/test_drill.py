"""A backup is proven by restoring it, and a broken one is found (P5)."""

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from ops import scratch
from server.commands.failures import Exit
from tests.ops.conftest import Tool, store
from tests.ops.test_scrub import flip
from tests.serving import RunningServer, execute


def test_a_drill_proves_a_good_backup_and_finds_a_broken_one(server: RunningServer, repository: Path, tool: Tool) -> None:
    store(server, "ada", 12, size_bytes=300_000)
    assert tool("backup").code == Exit.OK
    told = tool("drill", "--sample", "5")
    assert (told.code, told.findings) == (Exit.OK, []), told.stderr
    assert (told.summary["passed"], told.summary["rows_compared"], told.summary["files"]) == (True, 12, 5)
    full = tool("drill", "--full")
    assert (full.code, full.findings) == (Exit.OK, []), full.stderr
    assert (full.summary["files"], full.summary["bytes"]) == (12, 12 * 300_000)
    largest = max((path for path in (repository / "data").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.chmod(0o600)
    flip(largest)  # for one that is missing, restic asks again and again for a minute
    broken = tool("drill", "--full")
    assert broken.code == Exit.FOUND
    assert broken.summary["passed"] is False
    drills = execute(server.database_url, "select passed, is_full, error from drills order by id")
    assert [(row["passed"], row["is_full"]) for row in drills] == [(True, False), (True, True), (False, True)]
    assert drills[-1]["error"]


def test_what_no_drill_has_restored_lately_is_unproven(server: RunningServer, repository: Path, tool: Tool) -> None:
    def gauge(name: str) -> float | None:
        with server.client() as client:
            lines = [line.split() for line in client.get("/metrics").text.splitlines()]
        return next((float(line[1]) for line in lines if line[0] == name), None)

    store(server, "ada", 2)
    assert gauge("coffer_backups_are_proven") == 0
    assert gauge("coffer_backups_last_good_timestamp_seconds") is None
    assert tool("backup").code == Exit.OK
    saved_at = gauge("coffer_backups_last_good_timestamp_seconds")
    assert saved_at is not None
    assert gauge("coffer_backups_are_proven") == 0
    assert tool("drill").code == Exit.OK
    assert gauge("coffer_backups_are_proven") == 1
    execute(server.database_url, "update drills set ended_at = now() - interval '8 days 1 hour'")
    assert gauge("coffer_backups_are_proven") == 0
    assert tool("drill").code == Exit.OK
    assert gauge("coffer_backups_are_proven") == 1
    execute(server.database_url, "update drills set passed = false where id = (select max(id) from drills)")
    assert gauge("coffer_backups_are_proven") == 0


def test_without_the_embedded_postgresql_the_server_lends_a_database(
    server: RunningServer, repository: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(server, "ada", 2)
    assert tool("backup").code == Exit.OK

    async def none() -> int:
        return 0

    monkeypatch.setattr(scratch, "_embedded_version", none)
    assert tool("drill").code == Exit.OK
    assert execute(server.database_url, "select from pg_database where datname like 'coffer\\_drill%'") == []


def test_what_a_killed_drill_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def look() -> set[str]:
        async with scratch.scratch_directory() as living:
            (living / "rows").touch()
            for path in (living, *tmp_path.iterdir()):
                os.utime(path, (0, 0))
            (tmp_path / "coffer-scratch-young").mkdir()
            async with scratch.scratch_directory() as other:
                assert (living / "rows").exists()
                return {path.name for path in tmp_path.iterdir()} - {living.name, other.name}

    left_over = tmp_path / "coffer-scratch-dead" / "postgres"
    left_over.mkdir(parents=True)
    (tmp_path / "coffer-scratch-link").symlink_to(tmp_path / "others")
    (tmp_path / "others").mkdir()
    assert asyncio.run(look()) == {"coffer-scratch-young", "coffer-scratch-link", "others"}
    assert {path.name for path in tmp_path.iterdir()} == {"coffer-scratch-young", "coffer-scratch-link", "others"}
