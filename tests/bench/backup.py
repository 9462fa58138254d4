"""backup: the first one, one of an unchanged store, and one of a changed hundredth, beside `tar -czf` of the same tree.

COFFER_BENCH_FILES says how many files (20,000), of COFFER_BENCH_KIB (50) of noise each; they are added by SQL, with every trigger on.
A backup of an unchanged store takes what the number of files takes, and the first one what their bytes take, too: a media store of
`COFFER_BENCH_FILES=100000 COFFER_BENCH_KIB=256` wants a quarter of an hour and 60 GB of disk. tar is given a tenth of the users, and
its time counts ten times.
"""

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256, shake_256
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from tests.bench import servers
from tests.bench.harness import GIB, KIB, MIB, Stage, elapsed, say, verdict
from tests.bench.processes import BenchError

FILES = int(os.environ.get("COFFER_BENCH_FILES", "20000"))
SIZE_BYTES = int(os.environ.get("COFFER_BENCH_KIB", "50")) * KIB
USERS = 40
TAR_SHARE = 10
ROUNDS = 3
BATCH = 2_000
_COLUMNS = ["id", "user_id", "file_name", "file_type", "mime_type", "file_size", "sha256", "volume_id", "file_path"]


def measure(stage: Stage) -> None:
    needed_bytes = FILES * SIZE_BYTES * (2 + 2 / TAR_SHARE) + 2 * GIB  # the store and the repository, an archive, what is added, the rows
    if stage.free_bytes() < needed_bytes:
        raise BenchError(f"this needs {needed_bytes / GIB:.0f} GiB of disk, and there are {stage.free_bytes() / GIB:.0f}")
    with servers.coffer(stage.scratch, "backed-up") as coffer:
        began = time.monotonic()
        asyncio.run(_fill(coffer.database_url, coffer.directory, FILES))
        say(f"added {FILES:,} rows and files ({FILES * SIZE_BYTES / MIB:.0f} MiB) in {elapsed(began)}")
        repository = stage.scratch / "repository"
        first = _coffer(coffer.database_url, repository, "backup", "--init")
        unchanged = [_coffer(coffer.database_url, repository, "backup") for _ in range(ROUNDS)]
        tar = _tar(coffer.directory, stage.scratch / "store.tar.gz") * TAR_SHARE
        asyncio.run(_fill(coffer.database_url, coffer.directory, FILES // 100, users="late"))
        changed = _coffer(coffer.database_url, repository, "backup")
        drill = _coffer(coffer.database_url, repository, "drill")
    second = statistics.median(each["duration_seconds"] for each in unchanged)
    say(f"first {first['duration_seconds']:.1f} s, unchanged {second:.1f} s, 1 % more {changed['duration_seconds']:.1f} s, tar {tar:.1f} s")
    say(f"added bytes: first {first['added_bytes'] / MIB:.0f} MiB, unchanged {unchanged[-1]['added_bytes'] / MIB:.2f} MiB")
    say(f"drill {drill['duration_seconds']:.1f} s")
    cpu = statistics.median(each["cpu_seconds"] for each in unchanged)
    say(f"processors: first {first['cpu_seconds']:.1f} s, unchanged {cpu:.1f} s, 1 % more {changed['cpu_seconds']:.1f} s")
    verdict("an unchanged store's backup / the first", second / first["duration_seconds"], at_most=0.05)
    verdict("the same in processor time, without PostgreSQL's", cpu / first["cpu_seconds"], at_most=0.05)
    verdict("an unchanged store's backup / tar -czf", second / tar)
    verdict("the first backup / tar -czf", first["duration_seconds"] / tar)


def _coffer(database_url: str, repository: Path, *command: str) -> dict[str, Any]:
    environment = os.environ | {
        "DATABASE_URL": database_url,
        "COFFER_BACKUP_REPOSITORY": str(repository),
        "COFFER_BACKUP_PASSWORD": "bench",
        "RESTIC_CACHE_DIR": str(repository.with_name("cache")),
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", *command, "--json"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"{command}: {done.stdout[-500:]}{done.stderr[-500:]}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["summary"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # with restic and pg_dump, whom it has waited for
    summary["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return summary


def _tar(volume: Path, archive: Path) -> float:
    users = [f"users/user_{number}" for number in range(USERS // TAR_SHARE)]
    began = time.perf_counter()
    subprocess.run(["tar", "-czf", str(archive), "-C", str(volume), *users], check=True)
    seconds = time.perf_counter() - began
    archive.unlink()
    return seconds


async def _fill(database_url: str, volume: Path, files: int, users: str = "user") -> None:
    connection = await asyncpg.connect(database_url)
    try:
        volume_id = await connection.fetchval("select id from volumes")
        for number in range(USERS):
            insert = "insert into user_storage (user_id, max_bytes, volume_id) values ($1, null, $2)"
            await connection.execute(insert, f"{users}_{number}", volume_id)
            (volume / "users" / f"{users}_{number}" / "images").mkdir(parents=True)
        rows = _stored(volume, volume_id, files, users)
        while batch := list(islice(rows, BATCH)):
            await connection.copy_records_to_table("user_files", records=batch, columns=_COLUMNS)
    finally:
        await connection.close()


def _stored(volume: Path, volume_id: UUID, files: int, users: str) -> Iterator[tuple[Any, ...]]:
    """The rows of new files, whose bytes are there."""
    for number in range(files):
        file_id, user = uuid7(), f"{users}_{number % USERS}"
        path, content = f"users/{user}/images/{file_id}.1.png", _noise(file_id)
        (volume / path).write_bytes(content)
        yield file_id, user, f"{number}.png", "image", "image/png", SIZE_BYTES, sha256(content).digest(), volume_id, path


def _noise(file_id: UUID) -> bytes:
    """What no compression helps, and no two files share."""
    return shake_256(file_id.bytes).digest(SIZE_BYTES)
