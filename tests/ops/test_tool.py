"""What all tools have in common (FAULTS 18)."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from ops import cli
from server.commands.failures import Exit
from server.ledger.tools import tool_lock
from server.settings import Settings
from tests.ops.conftest import Tool, path_of, store
from tests.serving import RunningServer


@pytest.mark.parametrize("name", ["audit", "purge", "rebalance", "scrub", "usage"])
def test_of_two_one_does_the_work_and_the_other_says_so(database: str, name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ops.cli", name, "--metrics-file", str(tmp_path / "metrics")]

    async def beside_another() -> subprocess.CompletedProcess[str]:
        async with tool_lock(Settings(database_url=database), name):
            return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)

    done = asyncio.run(beside_another())
    assert (done.returncode, done.stdout) == (Exit.BUSY, "")
    assert f"{name} is at work already" in done.stderr
    assert not (tmp_path / "metrics").exists()
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (alone.returncode, len(alone.stdout.splitlines())) == (Exit.OK, 1)


def test_different_tools_may_run_beside_each_other(database: str) -> None:
    async def both() -> None:
        settings = Settings(database_url=database)
        async with tool_lock(settings, "audit"), tool_lock(settings, "scrub"):
            pass

    asyncio.run(both())


def test_the_next_command_does_not_find_the_lock_held(database: str) -> None:
    async def one_after_the_other() -> None:
        watcher = await asyncpg.connect(database)
        for _ in range(20):
            async with tool_lock(Settings(database_url=database), "audit"):
                pass
            assert not await watcher.fetchval("select count(*) from pg_locks where locktype = 'advisory'")
        await watcher.close()

    asyncio.run(one_after_the_other())


def test_people_are_told_what_to_do_and_one_line_sums_up(server: RunningServer, database: str, capfd: pytest.CaptureFixture[str]) -> None:
    (file_id,) = store(server, "ada", 1)
    path = path_of(server, file_id)
    path.unlink()
    capfd.readouterr()
    assert cli.run(["audit"]) == Exit.FOUND
    stdout, stderr = capfd.readouterr()
    assert stdout.startswith("audit: 1 rows (2.0 KiB) and 0 files on 1 volumes in ")
    assert len(stdout.splitlines()) == 1
    assert f"coffer restore file {file_id}" in stderr


def test_prometheus_is_told(server: RunningServer, database: str, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file_id,) = store(server, "ada", 1)
    path_of(server, file_id).unlink()
    directory = tmp_path / "metrics"
    directory.mkdir()
    monkeypatch.setenv("COFFER_METRICS_DIRECTORY", str(directory))
    umask = os.umask(0o027)  # as the units have it
    try:
        assert tool("audit").code == Exit.FOUND
    finally:
        os.umask(umask)
    assert (directory / "coffer_audit.prom").stat().st_mode & 0o777 == 0o644
    metrics = (directory / "coffer_audit.prom").read_text()
    assert 'coffer_audit_findings{kind="file_missing",state="look"} 1.0' in metrics
    assert f"coffer_audit_exit_code {float(Exit.FOUND)}" in metrics
    assert "coffer_audit_end_timestamp_seconds" in metrics
    assert [each.name for each in directory.iterdir()] == ["coffer_audit.prom"]  # and no draft
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    assert tool("audit").code == Exit.UNAVAILABLE
    metrics = (directory / "coffer_audit.prom").read_text()
    assert f"coffer_audit_exit_code {float(Exit.UNAVAILABLE)}" in metrics
    assert "coffer_audit_findings" not in metrics


@pytest.mark.parametrize(
    "wrong",
    [
        "audit --older-than soon",
        "audit --older-than -1",
        "scrub --rate 0",
        "scrub --rate fast",
        "scrub --file x",
        "rebalance --keep-old soon",
        "rebalance --to nowhere",
        "usage --month 2026-13",
        "usage --month soon",
    ],
)
def test_wrong_options_are_refused(wrong: str, database: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(wrong.split())
    assert stopped.value.code == Exit.USAGE
