"""million: the audit, a whole list, and what a backup reads before restic does, of a store and of one ten times as large.

COFFER_BENCH_FILES says how many files the large one has (1,000,000). Rows are added by SQL, with every trigger on; files are hard links to
a few, of some bytes each.
"""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from tests.bench import servers
from tests.bench.clients import Connection
from tests.bench.harness import MIB, Stage, elapsed, peak_memory_bytes, run_python, say, verdict
from tests.bench.servers import Coffer, Request

FILES = int(os.environ.get("COFFER_BENCH_FILES", "1000000"))
SHARE = 10
USERS = 40
PAGE = 200
BATCH = 50_000
CONTENT = b"bytes"
MOST_GROWTH_MIB = 16  # of one process, by ten times as many files
_NAMES_OF_ONE = 50_000  # ext4 allows a file 65,000
_COLUMNS = ["id", "user_id", "file_name", "file_type", "mime_type", "file_size", "sha256", "volume_id", "file_path"]


class Figures(NamedTuple):
    """Seconds, and the most memory that was ever resident."""

    seconds: float
    peak_mib: float


def measure(stage: Stage) -> None:
    with servers.coffer(stage.scratch, "million") as coffer:
        found: list[dict[str, Figures]] = []
        filled = 0
        for size in (FILES // SHARE, FILES):
            began = time.monotonic()
            asyncio.run(_fill(coffer.database_url, coffer.directory, filled, size))
            say(f"{size:,} files: added {size - filled:,} in {elapsed(began)}")
            filled = size
            found.append({"audit": _audit(coffer, size), "list": _list(coffer, size), "plan of a backup": _plan(coffer)})
            for what, figures in found[-1].items():
                say(f"  {what}: {figures.seconds:.1f} s, {figures.peak_mib:.0f} MiB at most")
        for what in found[0]:
            growth = found[1][what].peak_mib - found[0][what].peak_mib
            verdict(f"{what}: memory for {SHARE} times as many, more", growth, at_most=MOST_GROWTH_MIB, unit=" MiB")


def _audit(coffer: Coffer, files: int) -> Figures:
    told, peak_bytes = run_python("from ops import cli; code = cli.run(['audit', '--json'])", coffer.database_url)
    summary = json.loads(told.splitlines()[-1])["summary"]
    if (summary["listed_files"], summary["rows_files"], summary["findings"]) != (files, files, []):
        raise AssertionError(f"the audit saw something else: {told[-500:]}")
    return Figures(summary["duration_seconds"], peak_bytes / MIB)


def _list(coffer: Coffer, files: int) -> Figures:
    """Every page of the user who has half of all files; the server's memory."""
    connection = Connection(coffer.port)
    seen = 0
    cursor: str | None = ""
    pages: list[float] = []
    while cursor is not None:
        query = f"/api/files?limit={PAGE}" + (f"&cursor={cursor}" if cursor else "")
        began = time.perf_counter()
        page = json.loads(connection.ask(Request("GET", query, coffer.headers("user_0"))))
        pages.append(time.perf_counter() - began)
        seen, cursor = seen + len(page["files"]), page["next_cursor"]
    if seen != files // 2:
        raise AssertionError(f"the list has {seen:,} files")
    told = ", ".join(
        f"{name} {seconds * 1000:.1f} ms" for name, seconds in (("first", pages[0]), ("last", pages[-1]), ("slowest", max(pages)))
    )
    say(f"  {len(pages):,} pages of {PAGE}: {told}")
    return Figures(sum(pages), peak_memory_bytes(coffer.pid) / MIB)


def _plan(coffer: Coffer) -> Figures:
    """The moment, its counts and its dump."""
    code = """
import asyncio, os, time
from types import SimpleNamespace
from ops.backup import dumping
from server.ledger.backups import moment
from server.settings import Settings
async def plan():
    settings = Settings.load()
    async with moment(settings) as now:
        with open(os.devnull, "wb") as nowhere:
            async with dumping(SimpleNamespace(settings=settings), now, nowhere.fileno()) as check:
                await check()
began = time.perf_counter()
asyncio.run(plan())
print(time.perf_counter() - began)
code = 0
"""
    told, peak_bytes = run_python(code, coffer.database_url)
    return Figures(float(told.splitlines()[-1]), peak_bytes / MIB)


async def _fill(database_url: str, volume: Path, first: int, after_last: int) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        volume_id = await connection.fetchval("select id from volumes")
        for number in range(USERS):
            insert = "insert into user_storage (user_id, max_bytes, volume_id) values ($1, null, $2) on conflict do nothing"
            await connection.execute(insert, f"user_{number}", volume_id)
            (volume / "users" / f"user_{number}" / "images").mkdir(parents=True, exist_ok=True)
        rows = _rows(volume_id, first, after_last)
        linked, one = 0, volume
        while batch := list(islice(rows, BATCH)):
            await connection.copy_records_to_table("user_files", records=batch, columns=_COLUMNS)
            for row in batch:
                path = volume / row[-1]
                if linked % _NAMES_OF_ONE == 0:
                    one = path
                    one.write_bytes(CONTENT)
                else:
                    os.link(one, path)
                linked += 1
        await connection.execute("vacuum (analyze)")
    finally:
        await connection.close()


def _rows(volume_id: UUID, first: int, after_last: int) -> Iterator[tuple[Any, ...]]:
    """Of every two files one is the first user's."""
    for number in range(first, after_last):
        file_id, user = uuid7(), f"user_{number // 2 % (USERS - 1) + 1 if number % 2 else 0}"
        path = f"users/{user}/images/{file_id}.1.png"
        yield file_id, user, f"{number}.png", "image", "image/png", len(CONTENT), bytes(32), volume_id, path
