"""huge: by how much one upload of 10 GiB raises the server's resident memory. Needs 30 GiB of free space."""

import threading
from pathlib import Path

from tests.bench.clients import send_large
from tests.bench.harness import GIB, MIB, MP4_START, Stage, say, verdict
from tests.bench.processes import BenchError, resident_bytes

BODY_BYTES = 10 * GIB
NEEDED_BYTES = 30 * GIB
_LOOK_SECONDS = 0.05


def measure(stage: Stage) -> None:
    if stage.free_bytes() < NEEDED_BYTES:
        raise BenchError(f"left out: fewer than {NEEDED_BYTES // GIB} GiB are free")
    coffer = stage.coffer
    body = _sparse(stage.scratch / "huge")
    before = resident_bytes(coffer.pid)
    most, over = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(_LOOK_SECONDS):
            most = max(most, resident_bytes(coffer.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        seconds = send_large(coffer, [coffer.upload("huge", "video/mp4")], body)
    finally:
        over.set()
        watcher.join()
        coffer.erase("huge")
        body.unlink()
    say(f"{BODY_BYTES / MIB / seconds:,.0f} MiB/s, resident before {before / MIB:.0f} MiB")
    verdict("growth of resident memory during the upload", (most - before) / MIB, at_most=32, unit=" MiB")


def _sparse(path: Path) -> Path:
    """A file of zeros that takes no space and costs the client nothing to read."""
    with path.open("wb") as file:
        file.write(MP4_START)
        file.truncate(BODY_BYTES)
    return path
