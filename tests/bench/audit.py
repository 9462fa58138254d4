"""audit: rows against files in both directions, and all counters, against `find -printf` over the same tree; and its memory.

COFFER_BENCH_FILES says how many files (200,000); they are added by SQL, with every trigger on, and hold a few bytes each.
"""

import asyncio
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from tests.bench import servers
from tests.bench.harness import MIB, Stage, elapsed, run_python, say, verdict

FILES = int(os.environ.get("COFFER_BENCH_FILES", "200000"))
USERS = 40
ROUNDS = 5
BATCH = 50_000
_COLUMNS = ["id", "user_id", "file_name", "file_type", "mime_type", "file_size", "sha256", "volume_id", "file_path"]
_KINDS = [("image", "images", "image/png", "png"), ("video", "videos", "video/mp4", "mp4")]


def measure(stage: Stage) -> None:
    with servers.coffer(stage.scratch, "audited") as coffer:
        began = time.monotonic()
        asyncio.run(_fill(coffer.database_url, coffer.directory))
        say(f"added {FILES:,} rows and files in {elapsed(began)}")
        find, audit, peaks = [], [], []
        for number in range(ROUNDS + 1):
            seconds = _find(coffer.directory)
            audited, peak_bytes = _audit(coffer.database_url)
            if number:
                find.append(seconds)
                audit.append(audited)
                peaks.append(peak_bytes)
    say(f"find {statistics.median(find):.2f} s, audit {statistics.median(audit):.2f} s (without the start of Python)")
    verdict("audit / find -printf, files a second", statistics.median(find) / statistics.median(audit), at_least=0.5)
    verdict("resident memory, peak", max(peaks) / MIB, unit=" MiB")


def _find(volume: Path) -> float:
    began = time.perf_counter()
    with Path(os.devnull).open("wb") as nowhere:
        subprocess.run(["find", str(volume / "users"), "-printf", "%p %s\n"], stdout=nowhere, check=True)
    return time.perf_counter() - began


def _audit(database_url: str) -> tuple[float, int]:
    """Seconds, and the most memory that was ever resident."""
    told, peak_bytes = run_python("from ops import cli; code = cli.run(['audit', '--json'])", database_url)
    summary = json.loads(told.splitlines()[-1])["summary"]
    if (summary["listed_files"], summary["findings"]) != (FILES, []):
        raise AssertionError(f"the audit saw something else: {told[-500:]}")
    return summary["duration_seconds"], peak_bytes


async def _fill(database_url: str, volume: Path) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        volume_id = await connection.fetchval("select id from volumes")
        for number in range(USERS):
            insert = "insert into user_storage (user_id, max_bytes, volume_id) values ($1, null, $2)"
            await connection.execute(insert, f"user_{number}", volume_id)
            for _, directory, _, _ in _KINDS:
                (volume / "users" / f"user_{number}" / directory).mkdir(parents=True)
        rows = _rows(volume_id)
        while batch := list(islice(rows, BATCH)):
            await connection.copy_records_to_table("user_files", records=batch, columns=_COLUMNS)
            for row in batch:
                (volume / row[-1]).write_bytes(b"bytes")
        await connection.execute("vacuum (analyze)")
    finally:
        await connection.close()


def _rows(volume_id: UUID) -> Iterator[tuple[Any, ...]]:
    for number in range(FILES):
        file_id, user = uuid7(), f"user_{number % USERS}"
        kind, directory, mime_type, extension = _KINDS[number % 3 % 2]
        path = f"users/{user}/{directory}/{file_id}.1.{extension}"
        yield file_id, user, f"{number}.{extension}", kind, mime_type, 5, bytes(32), volume_id, path
