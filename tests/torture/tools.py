"""What the tools must survive, and must find: rot (FAULTS 13), load (14), the loss of everything (15), and their like at work (18)."""

import hashlib
import os
import random
import shlex
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.commands.failures import Exit
from tests.ops.conftest import Told
from tests.previews import stub_worker
from tests.recovery.journal import Load
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.torture.stage import Stage, Tool, coffer, look_at
from tests.waiting import until
from tests.working import BackgroundWorker

MIB = 2**20
FILES, ROTTEN, RESTORED = 2_000, 100, 12
SIZES = (500, 4_000, 60_000, 1_000_000)
FAST = ("scrub", "--rate", "unlimited")
LOAD_SECONDS = 60.0
STORED_BEFORE = 600
AT_ONCE, ROUNDS = 4, 20


def repository(directory: Path) -> dict[str, str]:
    """The settings of a repository for backups."""
    return {
        "COFFER_BACKUP_REPOSITORY": str(directory / "repository"),
        "COFFER_BACKUP_PASSWORD": "the password of the torture",
        "RESTIC_CACHE_DIR": str(directory / "cache"),
    }


# Rot


def rot(stage: Stage) -> str:
    """Bits fall, files are cut, swapped, gone: one scrub finds all and names them, and the command that it tells brings them back."""
    with stage.server() as server:
        files = _store(server, FILES)
        settings = repository(server.log.parent)
        saved = coffer(server, "backup", "--init", **settings)
        assert saved.code == Exit.OK, saved.stderr
        rotten = random.Random(13).sample(sorted(files), ROTTEN)
        _rot(server, rotten)
        began = time.monotonic()
        told = coffer(server, *FAST)
        seconds = time.monotonic() - began
        found = Counter(finding["file_id"] for finding in told.findings)
        assert (told.code, found) == (Exit.FOUND, Counter(rotten)), f"{len(found)} found; {told.stderr[-500:]}"
        with server.client("ada") as client:
            for file_id, digest in files.items():
                answer = client.get(f"/api/files/{file_id}/download")
                if file_id in found:
                    assert (answer.status_code, answer.json()["code"]) == (410, "damaged"), answer.text
                else:
                    assert hashlib.sha256(answer.content).hexdigest() == digest
            for finding in told.findings[:RESTORED]:
                command = shlex.split(finding["command"])[1:]
                restored = coffer(server, *command, **settings)
                assert restored.code == Exit.OK, f"{finding['command']}: {restored.stderr}"
                content = client.get(f"/api/files/{finding['file_id']}/download").content
                assert hashlib.sha256(content).hexdigest() == files[finding["file_id"]], finding
        left = coffer(server, *FAST, "--damaged").states
        assert left == [("damaged", "look")] * (ROTTEN - RESTORED), Counter(left)
        rate = told.summary["bytes"] / MIB / seconds
        return (
            f"one scrub of {FILES:,} files found {ROTTEN} of {ROTTEN} and no other, {rate:.0f} MiB/s with its start;"
            f" {RESTORED} of {RESTORED} came back by the command that it told"
        )


def _store(server: RunningServer, count: int) -> dict[str, str]:
    """Ids of ada's new files, with their SHA-256."""

    def upload(seeds: range) -> dict[str, str]:
        stored = {}
        with server.client("ada", timeout=60) as client:
            for seed in seeds:
                body = image(SIZES[seed % len(SIZES)] + seed, seed)
                stored[client.post("/api/files/upload", content=body).json()["id"]] = hashlib.sha256(body).hexdigest()
        return stored

    with ThreadPoolExecutor(4) as pool:
        return {
            file_id: digest for part in pool.map(upload, (range(each, count, 4) for each in range(4))) for file_id, digest in part.items()
        }


def _rot(server: RunningServer, rotten: list[str]) -> None:
    paths = {path.name[:36]: path for path in server.stored_paths()}
    swapped, cut, removed, flipped = (rotten[start:end] for start, end in ((0, 24), (24, 49), (49, 74), (74, ROTTEN)))
    for one, other in zip(swapped[::2], swapped[1::2], strict=True):
        aside = paths[one].with_name("aside")
        paths[one].rename(aside)
        paths[other].rename(paths[one])
        aside.rename(paths[other])
    for file_id in cut:
        os.truncate(paths[file_id], paths[file_id].stat().st_size - 1)
    for file_id in removed:
        paths[file_id].unlink()
    for file_id in flipped:
        with paths[file_id].open("r+b") as file:
            file.seek(random.Random(file_id).randrange(paths[file_id].stat().st_size))
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))


# Load


def audited(stage: Stage) -> str:
    """Audits and scrubs, one after the other, while 16 clients upload and delete."""
    with stage.server() as server:
        runs: Counter[str] = Counter()
        with Load(server, clients=16, deleting=True, sizes=(1_000, 50_000, 1_500_000)) as load:
            until_then = time.monotonic() + LOAD_SECONDS
            while time.monotonic() < until_then or not runs["scrub"]:
                for command in (("audit", "--repair"), FAST):
                    told = coffer(server, *command)
                    assert (told.code, told.findings) == (Exit.OK, []), f"{command}: {told}"
                    runs[command[0]] += 1
        load.journal.check(server)
        deleted = len(load.journal.delete_answered)
        return f"{runs['audit']} audits and {runs['scrub']} scrubs during {load.count:,} uploads and {deleted:,} deletes: 0 findings"


# Restore


def restored(stage: Stage) -> str:
    """Saved under load, then the machine is gone: everything that was acknowledged before is there on another one."""
    with stage.server() as server:
        settings = repository(server.log.parent)
        with Load(server, clients=8, deleting=True, sizes=(1_000, 30_000, 500_000)) as load:
            load.wait_for(lambda: load.count >= STORED_BEFORE)
            journal = load.journal
            with journal.lock:
                before = {
                    file_id: digest
                    for files in journal.stored.values()
                    for file_id, digest in files.items()
                    if file_id not in journal.delete_asked
                }
            began = time.monotonic()
            saved = coffer(server, "backup", "--init", **settings)
            saved_seconds = time.monotonic() - began
            with journal.lock:
                deleted = set(journal.delete_asked)
        assert (saved.code, saved.findings) == (Exit.OK, []), saved.stderr
        server.kill()
        shutil.rmtree(server.volume)
        server.database_url, directory = stage.database()
        began = time.monotonic()
        told = coffer(server, "restore", "all", "--to", str(directory / "restored"), **settings)
        assert (told.code, told.findings) == (Exit.OK, []), told.stderr
        seconds = time.monotonic() - began
        (server.volume,) = (directory / "restored").iterdir()
        server.start()
        with server.client("ada") as client:
            answer = client.post("/api/files/upload", content=image())
            assert (answer.status_code, answer.json()["code"]) == (503, "uploads_stopped"), answer.text
            assert coffer(server, "restore", "clear").code == Exit.OK
            answer = client.post("/api/files/upload", content=image())
            assert answer.status_code == 201, answer.text
        wanted = {file_id: digest for file_id, digest in before.items() if file_id not in deleted}
        look_at(server, wanted, may_leave_garbage=True)  # what came between the rows and the files
        assert coffer(server, "audit").findings == []
        files, size_bytes = told.summary["restored_files"], told.summary["restored_bytes"]
        assert files == saved.summary["files"] >= len(wanted)
        return (
            f"{files:,} files ({size_bytes / MIB:.0f} MiB), saved under load in {saved_seconds:.1f} s, restored in {seconds:.1f} s;"
            f" {len(wanted):,} of {len(wanted):,} acknowledged before are right, uploads were refused until they were cleared"
        )


# Two of everything


def twice(stage: Stage) -> str:
    """Several of each tool at once, several migrations, two workers: one does the work, and the others say so, or wait."""
    with stage.server() as server:
        _store(server, 300)
        settings = repository(server.log.parent)
        assert coffer(server, "backup", "--init", **settings).code == Exit.OK
        told = []
        for command in (["audit", "--repair"], list(FAST), ["purge", "--for-real"], ["usage"], ["backup"], ["drill"]):
            codes = _at_once(server, command, settings)
            told.append(f"{command[0]} {codes[Exit.OK]} worked and {codes[Exit.BUSY]} said that one does")
        snapshots = execute(server.database_url, "select state from backups where state <> 'done'")
        assert not snapshots, snapshots
        told.append(_migrations(stage, server))
        told.append(_workers(server))
        look_at(server, {})
        return ", ".join(told)


def _at_once(server: RunningServer, command: list[str], settings: dict[str, str]) -> Counter[int]:
    """Starts several together, again until they have met."""
    codes: Counter[int] = Counter()
    for _ in range(ROUNDS):
        tools = [Tool(server, command, settings) for _ in range(AT_ONCE)]
        outcomes: list[Told] = [tool.wait() for tool in tools]
        codes += Counter(each.code for each in outcomes)
        assert set(codes) <= {Exit.OK, Exit.BUSY} and codes[Exit.OK], f"{command}: {outcomes}"
        assert all("at work already" in each.stderr for each in outcomes if each.code == Exit.BUSY)
        if codes[Exit.BUSY]:
            return codes
    raise AssertionError(f"{ROUNDS} times {AT_ONCE} of {command[0]} have never met")


def _migrations(stage: Stage, server: RunningServer) -> str:
    url, _ = stage.database()
    kept, server.database_url = server.database_url, url
    try:
        outcomes = [tool.wait() for tool in [Tool(server, ["migrate"], as_json=False) for _ in range(AT_ONCE)]]
        again = Tool(server, ["migrate"], as_json=False).wait()
    finally:
        server.database_url = kept
    idle = sum("there was nothing to do" in each.stderr for each in outcomes)
    assert {each.code for each in [*outcomes, again]} == {Exit.OK} and idle == AT_ONCE - 1, outcomes
    return f"of {AT_ONCE} migrations 1 worked"


def _workers(server: RunningServer) -> str:
    logs = [server.log.with_name(f"worker-{number}") for number in range(2)]
    execute(server.database_url, "update user_files set preview_state = 'pending'")
    workers = [BackgroundWorker(server, log, {}, stub_worker.main, ["0.01"]) for log in logs]
    try:
        until(lambda: not execute(server.database_url, "select from user_files where preview_state = 'pending' limit 1"), 120)
        for worker in workers:
            worker.stop()
    finally:
        for worker in workers:
            worker.kill()
    twice_begun = execute(server.database_url, "select from user_files where preview_tries <> 1 or preview_state <> 'ready'")
    assert not twice_begun, f"{len(twice_begun)} previews were not made once"
    (row,) = execute(server.database_url, "select count(*) as files from user_files")
    return f"2 workers made {row['files']} previews once each"
