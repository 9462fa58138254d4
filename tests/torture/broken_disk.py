"""What a server must survive of its disk: calls that fail (FAULTS 4), and a file system that turns read-only (FAULTS 6)."""

import errno
import hashlib
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import httpx

from tests.recovery.journal import Journal, Load, send
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.torture.faults import Call, Fault, FaultyDisk
from tests.torture.stage import Stage, coffer, mount_again
from tests.tus.persistent import ENDPOINT, PIECE, VERSION
from tests.waiting import until

MIB = 2**20
SMALL_BYTES, LARGE_BYTES = 2_000, 3 * MIB
DISK_BYTES = 1024 * MIB
REFUSED, LOOKS = 50, 40
_READ_AGAIN_SECONDS = 1.2
_LOOK_SECONDS = 0.1  # forty are four of the server's own looks
REFUSALS = {(503, "volume_read_only"), (503, "volume_unavailable"), (507, "volume_full")}

Way = Callable[[RunningServer, str, int], tuple[httpx.Response, bytes]]


def _plainly(way: str, size_bytes: int, server: RunningServer, user_id: str, seed: int) -> tuple[httpx.Response, bytes]:
    body = image(size_bytes, seed)
    with server.client(user_id, timeout=30) as client:
        return send(client, way, body, f"{seed}.png"), body


def _resumably(server: RunningServer, user_id: str, seed: int) -> tuple[httpx.Response, bytes]:
    """In two pieces. The answer is the last one, or the first that is no success."""
    body = image(LARGE_BYTES, seed)
    with server.client(user_id, timeout=30) as client:
        answer = client.post(ENDPOINT, headers=VERSION | {"Upload-Length": str(len(body))})
        if answer.status_code != 201:
            return answer, body
        path = answer.headers["Location"]
        for at, piece in ((0, body[:MIB]), (MIB, body[MIB:])):
            answer = client.patch(path, content=piece, headers=PIECE | {"Upload-Offset": str(at)})
            if answer.status_code not in (200, 204):
                break
        return answer, body


WAYS: dict[str, Way] = {
    "small": partial(_plainly, "raw", SMALL_BYTES),
    "large": partial(_plainly, "raw", LARGE_BYTES),
    "resumable": _resumably,
}
FAULTS: dict[str, Fault] = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "short write": "short"}


def failing_calls(stage: Stage) -> str:
    """Each call that one upload makes on the volume fails, in each way, for each way in: no success that is none, no sync tried twice."""
    with stage.server_to_start(COFFER_TUS_UPLOADS_PER_USER="unlimited") as server:
        disk = FaultyDisk(server.volume)
        server.launch = disk.launch
        server.start()
        journal, strikes = Journal(), Counter[str]()
        numbers = count()
        for fault_name, fault in FAULTS.items():
            for way_name, way in WAYS.items():
                for strike_at in count(1):
                    number = next(numbers)
                    user_id = f"user-{number}"  # a new one each time, whose directories are made
                    disk.arm(strike_at, fault)
                    answer, body = way(server, user_id, number)
                    struck, calls = disk.struck, list(disk.calls)
                    told = f"{fault_name} at call {strike_at} of {way_name}, {struck}: {answer.status_code} {answer.text[:200]}"
                    if answer.is_success:
                        _acknowledge(server, journal, user_id, answer, body)
                        assert struck is None or fault == "short" or struck.name == "unlinkat", told
                    else:
                        assert struck is not None and (answer.status_code, answer.json()["code"]) in REFUSALS, told
                    if struck is None and len(calls) < strike_at:
                        break
                    if struck is None:
                        continue  # a call that is no write cannot be a short one
                    strikes[fault_name] += 1
                    _check_no_sync_again(calls, struck, told)
                    if fault == errno.EIO or struck.name in ("fsync", "fdatasync"):
                        assert answer.is_success or _state(server) == "read_only", f"{told}: the volume is still open"
                    disk.arm(0, 0)
                    _reopen(server)
        journal.check(server)
        garbage = _clean(server)
        tried = ", ".join(f"{strikes[name]} x {name}" for name in FAULTS)
        return f"{tried}: 0 false successes, 0 syncs tried again, closed before the answer, {garbage} files without a row set aside"


def _acknowledge(server: RunningServer, journal: Journal, user_id: str, answer: httpx.Response, body: bytes) -> None:
    if answer.status_code == 201:
        journal.acknowledged(user_id, answer, body)
        return
    with server.client(user_id) as client:  # a resumable one answers 204, and the list has it
        listed = client.get("/api/files")
        (file,) = listed.json()["files"]
        journal.acknowledged(user_id, httpx.Response(201, json=file), body)


def _check_no_sync_again(calls: list[Call], struck: Call, told: str) -> None:
    after = calls[calls.index(struck) + 1 :]
    if struck.name in ("fsync", "fdatasync"):
        assert not any(call.name in ("fsync", "fdatasync") and call.path == struck.path for call in after), f"{told}: synced again"


def _state(server: RunningServer) -> str:
    with server.client() as client:
        (volume,) = client.get("/health/ready").json()["volumes"]
    state: str = volume["state"]
    return state


def _reopen(server: RunningServer) -> None:
    """As `coffer volume reopen` by a sysadmin, who is slower than the second after which a server reads what it has written itself."""
    while _state(server) != "open":
        if execute(server.database_url, "select from volumes where state = 'read_only'"):
            time.sleep(_READ_AGAIN_SECONDS)
            execute(server.database_url, "update volumes set state = 'open'")
        time.sleep(0.1)


def _clean(server: RunningServer) -> int:
    """What the audit sets aside; then nothing is left to find."""
    coffer(server, "audit", "--repair", "--older-than", "0")
    told = coffer(server, "audit", "--repair", "--older-than", "0")
    assert told.code == 0, told
    assert {finding["kind"] for finding in told.findings} <= {"garbage"}, told.findings[:3]
    again = coffer(server, "audit", "--older-than", "0")
    assert again.findings == [], again.findings[:3]
    return len(told.findings)


def turns_read_only(stage: Stage) -> str:
    """Remounted by a sysadmin, and by ext4 itself after an error, each under load: writes answer 503, reads go on, nothing answers 500."""
    told = []
    for how, make_read_only in (("remounted", _remount), ("after an error of the file system", _break_file_system)):
        with stage.server_on_disk(DISK_BYTES) as server:
            with Load(server, clients=8, sizes=(1_000, 20_000, 300_000)) as load:
                load.wait_for(lambda load=load: load.count >= 100)  # type: ignore[misc]
                make_read_only(server)
                until(lambda server=server: _state(server) == "read_only", timeout_seconds=10)  # type: ignore[misc]
                with server.client("writer") as client:
                    refused = Counter(_answered(client.post("/api/files/upload", content=image(2_000, seed))) for seed in range(REFUSED))
                assert refused == {(503, "volume_read_only"): REFUSED}, f"{how}: {refused}"
                seen = set()
                for _ in range(LOOKS):
                    seen.add(_state(server))
                    time.sleep(_LOOK_SECONDS)
                assert seen == {"read_only"}, f"{how}: {seen}"
                reads = _read_all(server, load.journal)
                if how == "remounted":
                    subprocess.run(["mount", "-o", "remount,rw", server.volume], check=True)
                else:
                    server.stop()
                    subprocess.run(["umount", server.volume], check=True)
                    subprocess.run(["e2fsck", "-p", server.volume.with_name("disk.img")], check=False, capture_output=True)
                    mount_again(server.volume)
                    server.start(wait_ready=False)  # nor is it before the volume is open again
                    _reopen(server)
                written = load.count
                load.wait_for(lambda load=load, written=written: load.count >= written + 50)  # type: ignore[misc]
            load.journal.check(server)
        told.append(f"{how}: {REFUSED} of {REFUSED} writes refused, {reads} of {reads} reads right")
    return "; ".join(told) + "; no 500, and uploads went on afterwards"


def _remount(server: RunningServer) -> None:
    """The kernel refuses while anything is open for writing, so this takes its time."""
    command = ["mount", "-o", "remount,ro", str(server.volume)]
    until(lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0)


def _break_file_system(server: RunningServer) -> None:
    """ext4 is told that it has met an error, and does what it was mounted to do then."""
    device = subprocess.run(["findmnt", "-no", "SOURCE", server.volume], check=True, capture_output=True, text=True).stdout.strip()
    Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("a test")


def _answered(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, "" if answer.is_success else answer.json()["code"]


def _read_all(server: RunningServer, journal: Journal) -> int:
    with journal.lock:
        stored = {user_id: dict(files) for user_id, files in journal.stored.items()}
    for user_id, files in stored.items():
        with server.client(user_id) as client:
            for file_id, digest in files.items():
                answer = client.get(f"/api/files/{file_id}/download")
                assert hashlib.sha256(answer.content).hexdigest() == digest, f"{answer.status_code} {answer.text[:200]}"
    return sum(map(len, stored.values()))
