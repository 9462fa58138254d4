"""Uploads under a virus scanner: what it refuses is never stored, and without its verdict nothing is."""

import asyncio
import hashlib
import io
import json
import socket
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from server.errors import Infected, ScannerUnavailable
from server.intake import Scanner
from server.metrics import Metrics
from server.settings import SettingError, Settings
from tests.access.test_download_links import code
from tests.access.test_upload_links import upload_link, usage
from tests.access.ways_in import WAYS_IN, chunked, form, raw
from tests.api.test_metrics import scraped
from tests.clamd import (
    EICAR,
    LONGEST_SCANNED_BYTES,
    LONGEST_STREAM_BYTES,
    MARKER,
    Behaviour,
    Clamd,
    FalseClamd,
    clamd_running,
    infected,
    read_stream,
    silent,
)
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

MIB = 2**20
SMALL, LARGE = 5_000, 2 * MIB + 5  # waits in memory; goes to the disk
SIGNATURE = "Coffer.Marker.UNOFFICIAL"
FOUND = (422, "infected")
AWAY = (503, "scanner_unavailable")


@pytest.fixture(scope="module")
def clamd() -> Iterator[Clamd]:
    with clamd_running() as running:
        yield running


@pytest.fixture
def scanned(start_server: ServerFactory, clamd: Clamd) -> RunningServer:
    return start_server(COFFER_CLAMD=clamd.unix)


@pytest.fixture
def falsely(start_server: ServerFactory) -> Iterator[Callable[..., tuple[RunningServer, FalseClamd]]]:
    """Starts a server whose clamd behaves like that."""
    started: list[FalseClamd] = []

    def start(behave: Behaviour, *, timeout_seconds: int = 1, scans_at_once: int = 4) -> tuple[RunningServer, FalseClamd]:
        false = FalseClamd(behave)
        started.append(false)
        server = start_server(
            COFFER_CLAMD=false.address,
            COFFER_CLAMD_TIMEOUT_SECONDS=str(timeout_seconds),
            COFFER_CLAMD_SCANS_AT_ONCE=str(scans_at_once),
        )
        return server, false

    yield start
    for each in started:
        each.close()


def assert_nothing_is_left(server: RunningServer, client: httpx.Client, used_bytes: int = 0) -> None:
    assert usage(client) == (used_bytes, 0)
    assert server.incoming() == []
    assert execute(server.database_url, "select count(*) from uploads")[0]["count"] == 0


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("way_in", WAYS_IN)
def test_infected_is_refused_and_clean_is_stored(scanned: RunningServer, way_in: Callable[..., httpx.Response], size: int) -> None:
    clean = image(size)
    with scanned.client("ada") as ada:
        answer = way_in(ada, infected(clean))
        assert (code(answer), answer.json()["signature"]) == (FOUND, SIGNATURE)
        assert_nothing_is_left(scanned, ada)
        assert scanned.stored_paths() == []
        stored = way_in(ada, clean)
        assert stored.status_code == 201, stored.text
        assert ada.get(f"/api/files/{stored.json()['id']}/download").content == clean
        assert_nothing_is_left(scanned, ada, size)


def test_infected_is_recorded(scanned: RunningServer) -> None:
    with scanned.client("ada") as ada:
        for body in (infected(image(SMALL)), infected(video(LARGE))):
            assert code(raw(ada, body)) == FOUND
    events = execute(scanned.database_url, "select user_id, type, payload from events order by id")
    assert [(event["user_id"], event["type"]) for event in events] == [("ada", "file.infected")] * 2
    for event, (mime, body) in zip(events, (("image/png", infected(image(SMALL))), ("video/mp4", infected(video(LARGE)))), strict=True):
        assert json.loads(event["payload"]) == {
            "signature": SIGNATURE,
            "mime_type": mime,
            "file_size": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
    found = scraped(scanned)
    assert found['coffer_scans_total{result="infected"}'] == found["coffer_scan_duration_seconds_count"] == 2
    assert '"message":"refused an infected upload"' in scanned.logged()


def test_an_infected_archive(scanned: RunningServer) -> None:
    """The test file that every scanner knows, where only unpacking shows it."""
    archives = []
    for content in (EICAR, b"as long and harmless".ljust(len(EICAR))):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("scene.json", b"{}")
            archive.writestr("eicar.com", content * 3)
        archives.append(packed.getvalue())
    assert EICAR not in archives[0]
    with scanned.client("ada") as ada:
        answers = [ada.post("/api/files/upload?type=project", content=archive) for archive in archives]
        assert (code(answers[0]), answers[0].json()["signature"], answers[1].status_code) == (FOUND, "Eicar.UNOFFICIAL", 201)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_replacing_with_infected_bytes_leaves_the_old_ones(scanned: RunningServer, size: int) -> None:
    old, new = image(SMALL), image(size, seed=1)
    with scanned.client("ada") as ada:
        path = f"/api/files/{raw(ada, old).json()['id']}"
        assert code(ada.put(f"{path}/content", content=infected(new))) == FOUND
        assert ada.get(f"{path}/download").content == old
        assert_nothing_is_left(scanned, ada, len(old))
        assert ada.put(f"{path}/content", content=new).status_code == 200
        assert ada.get(f"{path}/download").content == new


def test_one_infected_file_of_a_form_leaves_the_others(scanned: RunningServer) -> None:
    bodies = [image(SMALL), infected(image(LARGE)), video(LARGE), infected(image(SMALL))]
    with scanned.client("ada") as ada:
        answer = ada.post("/api/files/upload", files=[("file", (f"{number}.bin", body)) for number, body in enumerate(bodies)])
        assert answer.status_code == 207
        results = answer.json()["results"]
        assert [result["status"] for result in results] == [201, 422, 201, 422]
        assert results[1]["problem"]["code"] == results[3]["problem"]["code"] == "infected"
        assert_nothing_is_left(scanned, ada, SMALL + LARGE)
    assert len(scanned.stored_paths()) == 2


def test_a_copy_is_scanned_too(start_server: ServerFactory, clamd: Clamd) -> None:
    """So that a virus which got in before its signature does not multiply."""
    unscanned = start_server()
    with unscanned.client("ada") as ada:
        file = raw(ada, infected(image(SMALL))).json()
    server = start_server(COFFER_CLAMD=clamd.unix)  # on the same database, so it knows the volume of the first
    with server.client("ada") as ada:
        assert code(ada.post(f"/api/files/{file['id']}/copy")) == FOUND
        assert_nothing_is_left(unscanned, ada, SMALL)


def test_a_link_can_be_used_again_after_an_infected_upload(scanned: RunningServer) -> None:
    with scanned.client("ada") as ada:
        link = upload_link(ada, max_bytes=LARGE)
        url = f"{scanned.url}{link['url']}"
        assert code(httpx.put(url, content=infected(image(LARGE)))) == FOUND
        assert httpx.put(url, content=image(LARGE)).status_code == 201


def test_over_tcp(start_server: ServerFactory, clamd: Clamd) -> None:
    server = start_server(COFFER_CLAMD=clamd.tcp)
    with server.client("ada") as ada:
        assert [raw(ada, body).status_code for body in (image(LARGE), infected(image(LARGE)))] == [201, 422]


# What cannot be scanned


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_what_is_too_large_is_refused(start_server: ServerFactory, clamd: Clamd, way_in: Callable[..., httpx.Response]) -> None:
    server = start_server(COFFER_CLAMD=clamd.unix, COFFER_CLAMD_MAX_BYTES=str(LARGE))
    with server.client("ada") as ada:
        answer = way_in(ada, image(LARGE + 1))
        assert (code(answer), answer.json()["reason"], answer.json()["limit_bytes"]) == ((422, "not_scannable"), "size", LARGE)
        assert_nothing_is_left(server, ada)
        assert way_in(ada, image(LARGE)).status_code == 201


def test_what_is_too_large_is_refused_before_it_has_come(start_server: ServerFactory, clamd: Clamd) -> None:
    server = start_server(COFFER_CLAMD=clamd.unix, COFFER_CLAMD_MAX_BYTES=str(LARGE))
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: ada\r\n"
        connection.sendall(f"{head}Content-Length: {LARGE + 1}\r\n\r\n".encode() + image(MIB + 1))
        assert connection.recv(4096).startswith(b"HTTP/1.1 422")


def test_what_is_too_large_is_stored_where_that_is_wanted(start_server: ServerFactory, clamd: Clamd) -> None:
    server = start_server(COFFER_CLAMD=clamd.unix, COFFER_CLAMD_MAX_BYTES=str(LARGE), COFFER_SCAN_OVERSIZE="accept")
    with server.client("ada") as ada:
        assert raw(ada, infected(image(LARGE + 1))).status_code == 201
        assert code(raw(ada, infected(image(LARGE)))) == FOUND
    assert scraped(server)['coffer_scans_total{result="skipped"}'] == 1


@pytest.mark.parametrize("policy", ["refuse", "accept"])
@pytest.mark.parametrize("size", [LONGEST_SCANNED_BYTES + 1, LONGEST_STREAM_BYTES + MIB])
def test_clamds_own_limits_refuse(start_server: ServerFactory, clamd: Clamd, size: int, policy: str) -> None:
    """clamd is set to less than we are told: `accept` says nothing about what clamd was asked and did not answer."""
    server = start_server(COFFER_CLAMD=clamd.unix, COFFER_SCAN_OVERSIZE=policy)
    with server.client("ada") as ada:
        answer = raw(ada, image(size))
        assert (code(answer), answer.json()["reason"]) == ((422, "not_scannable"), "limits")
        assert_nothing_is_left(server, ada)


def test_exempt_types_are_stored_unscanned(start_server: ServerFactory, clamd: Clamd) -> None:
    server = start_server(COFFER_CLAMD=clamd.unix, COFFER_SCAN_EXEMPT_TYPES="video/*, image/jpeg", COFFER_CLAMD_MAX_BYTES=str(SMALL))
    with server.client("ada") as ada:
        for body in (infected(video(SMALL)), infected(video(LARGE))):
            assert raw(ada, body).status_code == 201
        assert code(raw(ada, infected(image(SMALL)))) == FOUND


@pytest.mark.parametrize("wrong", ["video", "video/", "video/*/x", "*/*"])
def test_an_exempt_type_must_be_one(wrong: str) -> None:
    with pytest.raises(SettingError, match="COFFER_SCAN_EXEMPT_TYPES"):
        Settings.load({"COFFER_DATABASE_URL": "postgresql://x/x", "COFFER_SCAN_EXEMPT_TYPES": wrong})


@pytest.mark.parametrize("unknown", ["video/mp5", "text/*"])
def test_an_exempt_type_must_be_known(unknown: str) -> None:
    with pytest.raises(SettingError, match=r"COFFER_SCAN_EXEMPT_TYPES: no file is of type"):
        Scanner(Settings(clamd="unix:/x", scan_exempt_types=(unknown,)), Metrics())


@pytest.mark.parametrize("address", ["/run/clamd", "unix:run/clamd", "tcp:host", "tcp:host:0", "tcp:host:65536", "tcp:a..b:1", "tcp:a@b:1"])
def test_an_address_must_be_one(address: str) -> None:
    with pytest.raises(SettingError, match="COFFER_CLAMD"):
        Settings.load({"COFFER_DATABASE_URL": "postgresql://x/x", "COFFER_CLAMD": address})


@pytest.mark.parametrize("address", ["", "unix:/run/clamav/clamd.ctl", "tcp:127.0.0.1:3310", "tcp:[::1]:3310", "tcp:clamd.example:1"])
def test_an_address_is_taken(address: str) -> None:
    assert Settings.load({"COFFER_DATABASE_URL": "postgresql://x/x", "COFFER_CLAMD": address}).clamd == address


# When clamd fails


def deaf(false: FalseClamd, connection: socket.socket) -> bytes:
    false.release.wait()
    return b""


def hangs_up(false: FalseClamd, connection: socket.socket) -> bytes:
    return b""


def answering(reply: bytes) -> Behaviour:
    def behave(false: FalseClamd, connection: socket.socket) -> bytes:
        read_stream(connection)
        return reply

    return behave


FAILURES = {
    "silent": silent,
    "deaf": deaf,
    "hangs up": hangs_up,
    "says nothing": answering(b""),
    "cut short": answering(b"stream: OK"),
    "an error": answering(b"stream: Can't allocate memory ERROR\0"),
    "of another": answering(b"HTTP/1.1 200 OK\0"),
    "not quite": answering(b"stream: NOT OK\0"),
    "two": answering(b"stream: OK\0stream: OK\0"),
    "no text": answering(b"stream: \xff\n\0 FOUND\0"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_without_a_verdict_nothing_is_stored(falsely: Callable[..., tuple[RunningServer, FalseClamd]], failure: str) -> None:
    server, _ = falsely(FAILURES[failure])
    with server.client("ada") as ada:
        for size in (SMALL, LARGE):
            answer = raw(ada, image(size))
            assert (code(answer), answer.headers["Retry-After"]) == (AWAY, "10")
        link = upload_link(ada, max_bytes=SMALL)
        assert code(httpx.put(f"{server.url}{link['url']}", content=image(SMALL))) == AWAY
        ada.delete(f"/api/uploads/links/{link['file_id']}")
        assert_nothing_is_left(server, ada)
    assert server.stored_paths() == []


def test_an_endless_reply_is_not_read_to_its_end(falsely: Callable[..., tuple[RunningServer, FalseClamd]]) -> None:
    def endless(false: FalseClamd, connection: socket.socket) -> bytes:
        read_stream(connection)
        while True:
            connection.sendall(b"stream: OK" * 100)

    server, _ = falsely(endless, timeout_seconds=600)
    with server.client("ada") as ada:
        assert code(raw(ada, image(SMALL))) == AWAY


def test_a_verdict_before_the_end_is_none(falsely: Callable[..., tuple[RunningServer, FalseClamd]]) -> None:
    def hasty(false: FalseClamd, connection: socket.socket) -> bytes:
        connection.sendall(b"stream: OK\0")
        read_stream(connection)
        return b""

    server, _ = falsely(hasty)
    with server.client("ada") as ada:  # larger than what the sockets hold, so that we are still sending when it comes
        assert code(raw(ada, image(6 * MIB - 1))) == AWAY
        assert_nothing_is_left(server, ada)


def test_clamd_gets_every_byte_once(falsely: Callable[..., tuple[RunningServer, FalseClamd]]) -> None:
    lengths: list[int] = []

    def counting(false: FalseClamd, connection: socket.socket) -> bytes:
        lengths.append(read_stream(connection))
        return b"stream: OK\0"

    server, _ = falsely(counting)
    sizes = [100, MIB, MIB + 1, LARGE, 5 * MIB]
    with server.client("ada") as ada:
        for size in sizes:
            assert chunked(ada, image(size)).status_code == form(ada, image(size)).status_code == 201
    assert lengths == [size for size in sizes for _ in range(2)]


@pytest.mark.anyio
async def test_an_empty_piece_does_not_end_the_stream(clamd: Clamd) -> None:
    scanner = Scanner(Settings(clamd=clamd.unix), Metrics())
    try:
        with pytest.raises(Infected):
            await scanner.check("image/png", 1 + len(MARKER), lambda: [b"x", b"", MARKER])
        await scanner.check("image/png", 2, lambda: [b"x", b"", b"y"])
        with pytest.raises(ScannerUnavailable):  # fewer bytes than the file has are not the file
            await scanner.check("image/png", 3, lambda: [b"x", b"y"])
    finally:
        scanner.close()


@pytest.mark.anyio
async def test_clamd_is_asked_once_for_all_who_want_to_know() -> None:
    """Readiness is anybody's to ask for."""
    with socket.create_server(("127.0.0.1", 0)) as silent_clamd:  # its kernel accepts, and nobody answers
        address = f"tcp:127.0.0.1:{silent_clamd.getsockname()[1]}"
        scanner = Scanner(Settings(clamd=address), Metrics())
        assert await asyncio.gather(*[scanner.answers() for _ in range(20)]) == [False] * 20
        silent_clamd.setblocking(False)
        silent_clamd.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent_clamd.accept()
        assert not await scanner.answers()  # and anew for who comes later
        silent_clamd.accept()[0].close()
        scanner.close()


def test_clamd_goes_and_comes_back(start_server: ServerFactory) -> None:
    with clamd_running() as clamd:
        clamd.stop()
        server = start_server(COFFER_CLAMD=clamd.unix)  # which is ready all the same
        assert "clamd does not answer" in server.logged()
        with server.client("ada") as ada:
            assert ada.get("/health/ready").json()["scanner"] == {"ok": False}
            assert code(raw(ada, image(SMALL))) == AWAY
            clamd.start()
            assert ada.get("/health/ready").json()["scanner"] == {"ok": True}
            file = raw(ada, image(SMALL)).json()
            clamd.stop()
            assert code(raw(ada, image(LARGE))) == AWAY
            assert ada.get(f"/api/files/{file['id']}/download").content == image(SMALL)
            assert_nothing_is_left(server, ada, SMALL)
    found = scraped(server)
    results = ("clean", "scanner_unavailable")
    assert [found[f'coffer_scans_total{{result="{result}"}}'] for result in results] == [1, 2]


def test_without_the_setting_nothing_is_scanned(server: RunningServer) -> None:
    with server.client("ada") as ada:
        assert raw(ada, infected(image(SMALL))).status_code == 201
        assert ada.get("/health/ready").json()["scanner"] is None


def test_scans_take_their_turn(falsely: Callable[..., tuple[RunningServer, FalseClamd]]) -> None:
    def patient(false: FalseClamd, connection: socket.socket) -> bytes:
        read_stream(connection)
        false.release.wait()
        return b"stream: OK\0"

    server, false = falsely(patient, timeout_seconds=60, scans_at_once=2)
    with server.client("ada", timeout=60) as ada, ThreadPoolExecutor(6) as pool:
        uploads = [pool.submit(raw, ada, image(size)) for size in (SMALL, LARGE) * 3]
        until(lambda: false.now == 2 and scraped(server)["coffer_http_requests_in_flight"] == 7)  # six and the scrape
        assert ada.get("/api/files").status_code == ada.get("/health/ready").status_code == 200  # nobody else waits
        false.release.set()
        assert [upload.result().status_code for upload in uploads] == [201] * 6
    assert (false.count, false.most) == (6, 2)


def test_a_slow_client_keeps_no_scan(falsely: Callable[..., tuple[RunningServer, FalseClamd]]) -> None:
    server, false = falsely(silent)
    with socket.create_connection((server.host, server.port)) as connection:
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: ada\r\n"
        connection.sendall(f"{head}Content-Length: {LARGE}\r\n\r\n".encode() + image(LARGE)[:-1])
        until(server.incoming)
        with server.client("ada") as ada:
            assert code(raw(ada, image(SMALL))) == AWAY
        assert false.count == 1
        connection.sendall(b"x")
        until(lambda: false.count == 2)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_killed_in_mid_scan(falsely: Callable[..., tuple[RunningServer, FalseClamd]], size: int) -> None:
    server, false = falsely(silent, timeout_seconds=60)
    with server.client("ada") as ada, ThreadPoolExecutor(1) as pool:
        upload = pool.submit(raw, ada, image(size))
        until(lambda: false.now == 1)
        assert server.stored_paths() == []
        server.kill()
        assert isinstance(upload.exception(), httpx.TransportError)
        server.start()
        server.settle()
        until(lambda: server.incoming() == [])
        assert_nothing_is_left(server, ada)
        assert server.stored_paths() == [] and ada.get("/api/files").json()["files"] == []


def test_the_client_goes_in_mid_scan(falsely: Callable[..., tuple[RunningServer, FalseClamd]]) -> None:
    server, false = falsely(silent)
    body = image(LARGE)
    with socket.create_connection((server.host, server.port)) as connection:
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: ada\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: false.now == 1)
    with server.client("ada") as ada:
        until(lambda: usage(ada) == (0, 0) and server.incoming() == [])


def test_a_long_signature_is_shortened(falsely: Callable[..., tuple[RunningServer, FalseClamd]]) -> None:
    server, _ = falsely(answering(b"stream: " + b"Long." * 600 + b" FOUND\0"))
    with server.client("ada") as ada:
        answer = raw(ada, image(SMALL))
        assert (code(answer), answer.json()["signature"]) == (FOUND, "Long." * 40)
        assert_nothing_is_left(server, ada)
