"""What resumable uploads must survive."""

import asyncio
import hashlib
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from server.ledger import add_volume, migrate
from server.vault.sentinel import init_volume
from tests.attack.wire import Wire, request
from tests.samples import image
from tests.serving import RunningServer
from tests.torture.stage import Stage, look_at
from tests.tus import test_recovery
from tests.tus.crashes import serving
from tests.tus.persistent import ENDPOINT, VERSION, PersistentUpload
from tests.tus.proxy import Proxy

MB = 1_000_000
MIB = 2**20

FAULTS, UPLOADS, UPLOAD_BYTES = 300, 20, 50 * MB
KILLS, CLIENTS, KILLED_BYTES = 100, 16, 10 * MB
LONGEST_LIFE_SECONDS = 3.5
PARALLEL = 100
SMALL_BYTES, LARGE_BYTES = 2 * MIB, 32 * MIB
MOST_GROWTH_BYTES = 32 * MIB
BEGUN, CAP = 10_000, 100
MANY = {"COFFER_TUS_UPLOADS_PER_USER": "unlimited", "COFFER_UPLOADS_AT_ONCE_PER_USER": "unlimited"}


def bad_network(stage: Stage) -> str:
    """Every upload ends with the bytes that were sent, however often its connections fail."""
    with stage.server(**MANY) as server:
        proxy = Proxy(server.host, server.port, faults=FAULTS, within_bytes=UPLOADS * UPLOAD_BYTES // FAULTS // 2, seed=1)
        with proxy, ThreadPoolExecutor(UPLOADS) as pool:
            bodies = [image(UPLOAD_BYTES, seed) for seed in range(UPLOADS)]
            uploads = [
                PersistentUpload([proxy.url], headers_of(server, number % 4), body, piece_bytes=5 * MB, timeout_seconds=5)
                for number, body in enumerate(bodies)
            ]
            list(pool.map(PersistentUpload.run, uploads))
            for upload in uploads:
                upload.close()
        assert proxy.done.total() == FAULTS, f"only {proxy.done.total()} faults struck"
        digests = {upload.file_id: hashlib.sha256(body).hexdigest() for upload, body in zip(uploads, bodies, strict=True)}
        assert len(digests) == UPLOADS
        look_at(server, digests)
        answers = sum((upload.answers for upload in uploads), Counter[int]())
        waited = max(upload.waited_seconds for upload in uploads)
        done = ", ".join(f"{count} {fault}" for fault, count in sorted(proxy.done.items()))
        return (
            f"{UPLOADS} of {UPLOADS} files are right after {FAULTS} faults ({done}), quota exact;"
            f" {answers[423]} x 423, {answers[409]} x 409, resumed in {waited:.1f} s at most"
        )


def killed_server(stage: Stage) -> str:
    """Clients that upload one file after the other do not notice more than delays when their server is killed again and again."""
    chance = random.Random(2)
    with stage.server(**MANY) as server:
        over = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(_upload_until, over, server, number) for number in range(CLIENTS)]
            try:
                slowest = 0.0
                for _ in range(KILLS):
                    time.sleep(chance.uniform(0.1, LONGEST_LIFE_SECONDS))
                    server.kill()
                    began = time.monotonic()
                    server.start()
                    slowest = max(slowest, time.monotonic() - began)
            finally:
                over.set()
            outcomes = [client.result() for client in clients]
        digests = {file_id: digest for files, _, _ in outcomes for file_id, digest in files.items()}
        left_bytes = look_at(server, digests)
        answers = sum((each for _, each, _ in outcomes), Counter[int]())
        waited = max(each for _, _, each in outcomes)
        return (
            f"{KILLS} kills, {CLIENTS} of {CLIENTS} clients finished, {len(digests)} files are right, 0 bytes of drift, {answers[0]} broken"
            f" requests, {answers[423]} x 423, resumed in {waited:.1f} s at most, ready again in {slowest:.1f} s at most,"
            f" {left_bytes:,} bytes are of uploads that nobody heard of"
        )


def _upload_until(over: threading.Event, server: RunningServer, number: int) -> tuple[dict[str, str], Counter[int], float]:
    files: dict[str, str] = {}
    answers: Counter[int] = Counter()
    waited_seconds, serial = 0.0, 0
    while not over.is_set():
        body = image(KILLED_BYTES, seed=number * 10_000 + serial)
        upload = PersistentUpload([server.url], headers_of(server, number % 4), body, piece_bytes=3 * MB, give_up_seconds=600)
        upload.run().close()
        files[upload.file_id] = hashlib.sha256(body).hexdigest()
        answers += upload.answers
        waited_seconds = max(waited_seconds, upload.waited_seconds)
        serial += 1
    return files, answers, waited_seconds


def memory(stage: Stage) -> str:
    """A hundred large uploads at once take no more than a hundred small ones."""
    with stage.server(**MANY) as server:
        peaks = []
        for size_bytes in (SMALL_BYTES, LARGE_BYTES):
            body = image(size_bytes)
            with ThreadPoolExecutor(PARALLEL) as pool:
                uploads = [
                    PersistentUpload([server.url], headers_of(server, number % 4), body, timeout_seconds=60) for number in range(PARALLEL)
                ]
                list(pool.map(PersistentUpload.run, uploads))
                for upload in uploads:
                    upload.close()
            peaks.append(server.peak_memory_bytes())
        look_at(server, {})
        growth = peaks[1] - peaks[0]
        assert growth < MOST_GROWTH_BYTES, f"resident memory grew by {growth / MIB:.0f} MiB"
        return (
            f"{peaks[0] / MIB:.0f} MiB at most with {PARALLEL} of {SMALL_BYTES // MIB} MiB at once,"
            f" {peaks[1] / MIB:.0f} MiB with {PARALLEL} of {LARGE_BYTES // MIB} MiB"
        )


def begun_by_the_thousand(stage: Stage) -> str:
    """No more are admitted than one user may have, through two connections at once, and the rest is told so."""
    with stage.server(COFFER_TUS_UPLOADS_PER_USER=str(CAP)) as server:
        sent = request("POST", ENDPOINT, [*headers_of(server, 0).items(), *VERSION.items(), ("Upload-Length", "1000")])

        def begin(_: int) -> Counter[tuple[int, str]]:
            wire = Wire(server.host, server.port)
            try:
                return Counter((answer.status, answer.code) for answer in (wire.expect(sent) for _ in range(BEGUN // 2)))
            finally:
                wire.close()

        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            answers = sum(pool.map(begin, range(2)), Counter[tuple[int, str]]())
        assert answers == {(201, ""): CAP, (429, "too_many_uploads"): BEGUN - CAP}, f"{answers}"
        look_at(server, {})
        with server.client("user-0") as client:
            assert client.get("/api/storage/usage").json()["reserved_bytes"] == CAP * 1_000
        return f"{CAP} of {BEGUN:,} admitted, the others refused, {BEGUN / (time.monotonic() - began):,.0f} answers/s"


def every_step(stage: Stage) -> str:
    """Each statement and each call that changes the volume, before and after it."""
    database_url, directory = stage.database()
    mount = directory / "volume"
    mount.mkdir()

    async def set_up() -> None:
        await migrate(database_url)
        async with serving(database_url) as service:
            await add_volume(service.db, init_volume(mount), str(mount))

    asyncio.run(set_up())
    steps = {}
    for is_power_cut in (False, True):
        for work, recover in (
            (test_recovery.upload, test_recovery.go_on),
            (test_recovery.upload_checked, test_recovery.go_on),
            (test_recovery.join, test_recovery.join_again),
            (test_recovery.give_up, test_recovery.end_again),
        ):
            steps[work.__name__] = test_recovery.each_crash(database_url, mount, work, recover, 1, is_power_cut=is_power_cut) - 1
    told = ", ".join(f"{count} of {name}" for name, count in steps.items())
    return f"{sum(steps.values())} steps ({told}), each by a kill and by a power cut: nothing acknowledged is lost, nothing is left"


def headers_of(server: RunningServer, number: int) -> dict[str, str]:
    """The credentials with which a backend acts for one of the users."""
    return {"Authorization": f"Bearer {server.api_key}", "X-User-Id": f"user-{number}"}
