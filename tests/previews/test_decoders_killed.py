"""Decoders of the real worker that are killed, run out of memory or hang: the original stays, tries end, and the queue goes on."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

from server.previews import images
from tests.previews.conftest import RealWorkerFactory
from tests.previews.pictures import photo
from tests.previews.test_gallery import upload
from tests.previews.test_queue import coffer, states
from tests.processes import command_of, has_ended
from tests.serving import RunningServer, execute
from tests.waiting import until
from tests.working import BackgroundWorker

DECODER_MEMORY_BYTES = images.LIMITS.memory_bytes


def descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def decoding(worker: BackgroundWorker) -> list[int]:
    """The children in which a decoder has an image in hand, once they have their limits: from then on they end with their decoder."""
    decoders = [pid for pid in descendants(worker.pid) if "server.previews.images" in command_of(pid)]
    return [child for decoder in decoders for child in descendants(decoder) if memory_limit(child) == DECODER_MEMORY_BYTES]


def memory_limit(pid: int) -> int | None:
    try:
        return resource.prlimit(pid, resource.RLIMIT_AS)[0]
    except ProcessLookupError:
        return None


@contextlib.contextmanager
def hunting(worker: BackgroundWorker, strike: Callable[[int], object]) -> Iterator[set[int]]:
    """Strikes every child that has an image in hand, until the end. Gives who was struck."""
    enough, struck = threading.Event(), set[int]()

    def hunt() -> None:
        while not enough.is_set():
            for pid in decoding(worker):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    strike(pid)
                    struck.add(pid)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield struck
    finally:
        enough.set()
        hunter.join()


def starve(pid: int) -> None:
    """Leaves a decoder little more memory than it has."""
    most = resource.getpagesize() * int(Path(f"/proc/{pid}/statm").read_text().split()[0]) + 24 * 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))


def large() -> bytes:
    """Takes long enough to be caught at it."""
    return bytes(photo(5000, 4000).jpegsave_buffer(Q=90, interlace=True))


def facts(server: RunningServer, file_id: str) -> tuple[str, str | None, int]:
    (row,) = execute(
        server.database_url, "select preview_state, preview_reason, preview_tries from user_files where id = $1", UUID(file_id)
    )
    return row["preview_state"], row["preview_reason"], row["preview_tries"]


def check_after(server: RunningServer, file_id: str, body: bytes, reason: str) -> None:
    """The failure is told, the original is as it was, and there is nothing on the volume but that."""
    listed = [json.loads(line) for line in coffer(server, "previews", "list-failed", "--json").stdout.splitlines()]
    assert [(each["id"], each["reason"]) for each in listed] == [(file_id, reason)]
    with server.client("ada") as client:
        assert client.get(f"/api/files/{file_id}/download").content == body
    assert hashlib.sha256(body).hexdigest() in server.stored_files()
    assert not list((server.volume / "users" / "ada" / "previews" / file_id).glob("*"))


def test_a_decoder_that_is_always_killed_gets_three_tries(server: RunningServer, start_real_worker: RealWorkerFactory) -> None:
    body, small = large(), bytes(photo(200, 100).pngsave_buffer())
    with server.client("ada") as client:
        file_id = upload(client, body, "large.jpg")
        worker = start_real_worker(COFFER_PREVIEWS_AT_ONCE="1")
        with hunting(worker, lambda pid: os.kill(pid, signal.SIGKILL)) as struck:
            until(lambda: facts(server, file_id)[0] != "pending")
        assert facts(server, file_id) == ("failed", "error", 3)
        assert len(struck) == 3
        upload(client, small, "small.png")
        until(lambda: states(server) == {"failed": 1, "ready": 1})
    check_after(server, file_id, body, "error")


def test_a_decoder_that_is_killed_once_is_tried_again(server: RunningServer, start_real_worker: RealWorkerFactory) -> None:
    with server.client("ada") as client:
        file_id = upload(client, large(), "large.jpg")
        worker = start_real_worker()
        pid = until(lambda: decoding(worker))[0]
        os.kill(pid, signal.SIGKILL)
        until(lambda: states(server) == {"ready": 1})
    assert facts(server, file_id)[2] == 2


def test_an_image_that_needs_more_memory_than_there_is_fails_at_once(server: RunningServer, start_real_worker: RealWorkerFactory) -> None:
    body = large()
    with server.client("ada") as client:
        file_id = upload(client, body, "large.jpg")
        worker = start_real_worker(COFFER_PREVIEWS_AT_ONCE="1")

        with hunting(worker, starve) as struck:
            until(lambda: facts(server, file_id)[0] != "pending")
        assert struck
    assert facts(server, file_id) == ("failed", "too_large", 1)
    check_after(server, file_id, body, "too_large")


def test_a_decoder_that_hangs_is_given_up(server: RunningServer, start_real_worker: RealWorkerFactory) -> None:
    """Its wall-clock time is up; meanwhile the other decoder goes on with the queue."""
    body, small = large(), bytes(photo(200, 100).pngsave_buffer())
    with server.client("ada") as client:
        file_id = upload(client, body, "large.jpg")
        worker = start_real_worker(impatient=True)
        (pid,) = until(lambda: decoding(worker))
        os.kill(pid, signal.SIGSTOP)
        for _ in range(5):
            upload(client, small, "small.png")
        until(lambda: states(server) == {"failed": 1, "ready": 5})
    assert facts(server, file_id) == ("failed", "too_slow", 1)
    until(lambda: has_ended(pid))
    check_after(server, file_id, body, "too_slow")
