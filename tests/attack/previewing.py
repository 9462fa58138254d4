"""The real worker beside the server under attack, and files whose bytes are not what their rows say."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import httpx

from tests.attack.target import Tally, Target, errors_in
from tests.samples import image
from tests.serving import DEFAULTS, RunningServer, execute
from tests.waiting import until

STOP_SECONDS = 40
_STARTS = {  # what an upload of each type is taken for it by
    "image/jpeg": bytes.fromhex("ffd8ffe000104a46494600010100000100010000") + bytes(50),
    "image/png": image(200),
    "image/gif": b"GIF89a\x01\0\x01\0\0\0\0" + bytes(50),
    "image/webp": b"RIFF\x40\0\0\0WEBPVP8 " + bytes(60),
    "video/mp4": b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00isommp42" + bytes(50),
    "video/x-msvideo": b"RIFF\x40\0\0\0AVI LIST" + bytes(60),
}


class Found(NamedTuple):
    """What became of a preview."""

    state: str
    reason: str | None
    files: int


class Worker:
    """`coffer worker`, which makes all that can be wished for. With `traced`, each program that it runs is written down."""

    def __init__(self, target: Target, *, traced: bool = False) -> None:
        self.server: RunningServer = target.server
        number = sum(1 for _ in target.scratch.glob("worker-*.log"))
        self.log, self._trace = (target.scratch / f"worker-{number}.{ending}" for ending in ("log", "trace"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        environment |= DEFAULTS | {
            "COFFER_DATABASE_URL": self.server.database_url,
            "COFFER_PREVIEW_STORYBOARDS": "true",
            "COFFER_PREVIEW_CLIPS": "true",
        }
        tracing = ["strace", "-D", "-f", "-s", "2000", "-e", "trace=execve", "-o", str(self._trace)] if traced else []
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *tracing, sys.executable, "-m", "server.cli", "worker"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._stopped = False

    def settle(self, user_id: str, timeout_seconds: float) -> bool:
        """Waits until none of the user's files is pending; False when that takes too long."""
        deadline = time.monotonic() + timeout_seconds
        while self.pending(user_id):
            if time.monotonic() > deadline or self._process.poll() is not None:
                return False
            time.sleep(0.2)
        return True

    def pending(self, user_id: str) -> int:
        """How many of the user's files wait for their previews."""
        query = "select count(*)::integer as n from user_files where user_id = $1 and preview_state = 'pending'"
        return int(execute(self.server.database_url, query, user_id)[0]["n"])

    def found(self, user_id: str) -> dict[str, Found]:
        """By the files' ids."""
        query = """select id::text, preview_state as state, preview_reason as reason,
                          (select count(*)::integer from previews where file_id = id) as files
                   from user_files where user_id = $1"""
        return {row["id"]: Found(row["state"], row["reason"], row["files"]) for row in execute(self.server.database_url, query, user_id)}

    def programs(self) -> set[str]:
        """Every program that was run, by its resolved path. After `stop`."""
        until(lambda: f"{self._process.pid} +++ exited with 0" in re.sub(" +", " ", self._trace.read_text()))
        called = [line.partition('execve("')[2].partition('"')[0] for line in self._trace.read_text().splitlines() if " = -1 " not in line]
        return {str(Path(each).resolve()) for each in called if each}

    def stop(self, tally: Tally) -> int:
        """Ends it politely, which must work; returns the most memory that it or any decoder ever had resident, in bytes."""
        self._stopped = True
        self._process.terminate()
        try:
            until(lambda: os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), STOP_SECONDS)
        except AssertionError:
            self._stopped = False
            raise
        # It is the worker's and, by the kernel's account, that of all whose end somebody waited for.
        _, status, used = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        tally.check(self._process.returncode == 0, f"the worker ended with {self._process.returncode}")
        errors = errors_in(self.log.read_text())
        tally.check(not errors, f"{len(errors)} errors in the worker's log, the first: {errors[:1]}")
        return used.ru_maxrss * 1024

    def kill(self) -> None:
        """SIGKILL, to it and its children, unless it was stopped."""
        if not self._stopped:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def worker_beside(target: Target, *, traced: bool = False) -> Iterator[Worker]:
    """A worker that is gone afterwards."""
    worker = Worker(target, traced=traced)
    try:
        yield worker
    finally:
        worker.kill()


def stored(client: httpx.Client, body: bytes, name: str, **headers: str) -> str:
    """Uploads the bytes; the id of the file."""
    answer = client.post("/api/files/upload", content=body, params={"name": "file"}, headers=headers)
    assert answer.status_code == 201, f"{name}: {answer.status_code} {answer.text}"
    file_id: str = answer.json()["id"]
    return file_id


def plant(target: Target, client: httpx.Client, mime_type: str, body: bytes) -> str:
    """A file that is `mime_type` by its row and other bytes on the volume, as if somebody had fooled the look at its start."""
    file_id = stored(client, _STARTS[mime_type], mime_type)
    (row,) = execute(target.server.database_url, "select mime_type, file_path from user_files where id = $1", UUID(file_id))
    assert row["mime_type"] == mime_type
    path = target.server.volume / row["file_path"]
    path.unlink()
    path.write_bytes(body)
    return file_id


PLANTABLE = tuple(_STARTS)
