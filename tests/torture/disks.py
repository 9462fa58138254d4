"""How soon a volume that fails is told apart, and that whoever writes elsewhere does not notice."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from uuid import UUID

import httpx

from server.ledger import add_volume
from server.vault.sentinel import init_volume
from tests.recovery.disks import MIB, SmallDisk, stuck_mount
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.torture.stage import Stage
from tests.tus.crashes import serving
from tests.waiting import until

ROUNDS = 2
SOON_SECONDS = 2.0
SILENT_SECONDS = 7.0  # five until a disk that says nothing is given up on
_SURE = 12  # answers in a row, each of either process
_LOOK_SECONDS = 0.02

Failing = Callable[[ExitStack, SmallDisk], object]

FAULTS: dict[str, tuple[Failing, str, float]] = {
    "unmounted": (lambda _, disk: disk.unmount(), "unavailable", SOON_SECONDS),
    "mounted read-only": (lambda _, disk: disk.make_read_only(), "read_only", SOON_SECONDS),
    "full": (lambda _, disk: disk.fill(MIB // 2), "full", SOON_SECONDS),
    "failing file system": (lambda _, disk: disk.fail_file_system(), "", SOON_SECONDS),
    "dead disk": (lambda _, disk: disk.fail_device(), "unavailable", SOON_SECONDS),
    "stuck mount": (lambda stack, disk: stack.enter_context(stuck_mount(disk.mount)), "unavailable", SILENT_SECONDS),
}
"""What is done to a disk, the state that the volume then has (any but `open` when it is left out), and how soon."""


def failing(stage: Stage) -> str:
    """Each way in which a disk fails, some times, on a server of two processes: how long until both tell of it, and of no other volume."""
    with stage.server(COFFER_PROCESSES="2") as server, ExitStack() as stack:
        (bobs,) = [str(row["id"]) for row in execute(server.database_url, "select id from volumes")]
        execute(server.database_url, "insert into user_storage (user_id, volume_id) values ('bob', $1)", bobs)
        writer = stack.enter_context(_Writer(server, "bob"))
        took: dict[str, list[float]] = {name: [] for name in FAULTS}
        for number in range(ROUNDS):
            for name, (fail, state, _) in FAULTS.items():
                disk, volume_id, user_id = _volume(server, f"{name.replace(' ', '-')}-{number}")
                stack.callback(disk.unmount)
                with ExitStack() as over, _Writer(server, user_id, is_refused=True):
                    time.sleep(random.random())  # at whatever moment between two looks
                    began = time.monotonic()
                    fail(over, disk)
                    took[name].append(_told(server, volume_id, bobs, state) - began)
    assert writer.uploads and not writer.strange, f"bob, on another volume, was told: {writer.strange[:1]}"
    late = {name: max(times) for name, times in took.items() if max(times) > FAULTS[name][2]}
    figures = ", ".join(f"{name} {max(times):.2f} s" for name, times in took.items())
    assert not late, f"too late: {late}"
    return f"told within: {figures}; meanwhile {writer.uploads} uploads elsewhere, all good, the longest {writer.longest_seconds:.1f} s"


def _volume(server: RunningServer, name: str) -> tuple[SmallDisk, str, str]:
    """A volume of its own for a user who has written to it, known to both processes."""
    directory = server.volume.parent / name
    directory.mkdir()
    disk = SmallDisk(directory)
    volume_id = init_volume(disk.mount)

    async def add() -> None:
        async with serving(server.database_url) as service:
            await add_volume(service.db, volume_id, str(disk.mount), reserved_for=name)

    asyncio.run(add())
    in_a_row = 0

    def is_known() -> bool:
        nonlocal in_a_row
        in_a_row = in_a_row + 1 if _states(server).get(str(volume_id)) == "open" else 0
        return in_a_row >= _SURE

    until(is_known, timeout_seconds=30)
    return disk, str(volume_id), name


def _states(server: RunningServer) -> dict[str, str]:
    """By a connection of its own: another process may answer each."""
    answer = httpx.get(f"{server.url}/health/ready", timeout=30)
    return {each["id"]: each["state"] for each in answer.json()["volumes"]}


def _told(server: RunningServer, volume_id: str | UUID, bobs: str, state: str) -> float:
    """When the first answer was asked for that was right and followed by right ones only."""
    since, in_a_row = 0.0, 0
    deadline = time.monotonic() + 60
    while in_a_row < _SURE:
        assert time.monotonic() < deadline, f"volume {volume_id} is not {state or 'anything but open'} after a minute"
        asked = time.monotonic()
        states = _states(server)
        assert states[bobs] == "open", f"bob's volume is {states[bobs]}"
        found = states[str(volume_id)]
        if found == state or (not state and found != "open"):
            since, in_a_row = (asked if in_a_row == 0 else since), in_a_row + 1
        else:
            in_a_row = 0
        time.sleep(_LOOK_SECONDS)
    return since


class _Writer:
    """Somebody who uploads and reads back without a pause."""

    def __init__(self, server: RunningServer, user_id: str, *, is_refused: bool = False) -> None:
        """With `is_refused` any answer will do, and none: that volume fails."""
        self._server, self._user_id, self._is_refused = server, user_id, is_refused
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.uploads, self.longest_seconds = 0, 0.0
        self.strange: list[str] = []

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _write(self) -> None:
        with self._server.client(self._user_id, timeout=60) as client:
            while not self._stop.is_set():
                body, began = image(10_000, self.uploads), time.monotonic()
                try:
                    answer = client.post("/api/files/upload", content=body)
                    if answer.status_code != 201:
                        raise ValueError(answer.text)
                    if client.get(f"/api/files/{answer.json()['id']}/download").content != body:
                        raise ValueError("other bytes")
                except (ValueError, httpx.HTTPError) as problem:
                    self.strange.append(str(problem))
                    if not self._is_refused:
                        return
                    time.sleep(_LOOK_SECONDS)
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                self.uploads += 1
