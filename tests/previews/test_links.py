"""Signed links to previews, those that every file has and those made on demand, against a running server and a stub worker."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ops.embedded_postgres import EmbeddedPostgres
from tests.previews import stub_worker
from tests.previews.conftest import WorkerFactory
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until
from tests.working import BackgroundWorker

SMALL = {"width": 200}
SMALL_NAME = "240x-contain-q80.webp"


@pytest.fixture
def browser(server: RunningServer) -> Iterator[httpx.Client]:
    """Nobody: no key, no user."""
    with httpx.Client(base_url=server.url, timeout=40) as client:
        yield client


def stored(client: httpx.Client, seed: int = 1, body: bytes | None = None, **query: str) -> str:
    answer = client.post("/api/files/upload", content=image(5_000, seed) if body is None else body, params={"name": "Sonne.png", **query})
    assert answer.status_code == 201, answer.text
    file_id: str = answer.json()["id"]
    return file_id


def ready(client: httpx.Client, file_id: str, state: str = "ready") -> None:
    assert client.get(f"/api/files/{file_id}", params={"wait": "preview"}, timeout=40).json()["preview_state"] == state


def link(client: httpx.Client, file_id: str, preview: Any) -> str:
    answer = client.post(f"/api/files/{file_id}/link", json={"preview": preview})
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["url"]
    return url


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def made(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if '"made ' in line]


def test_a_page_of_files_comes_with_links_to_their_pictures(
    server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory
) -> None:
    start_worker()
    with server.client("ada") as ada:
        ids = [stored(ada, seed) for seed in range(3)]
        for each in ids:
            ready(ada, each)
        without = stored(ada, 9, b'{"unknown": 1}', type="scene")
        ready(ada, without, "unsupported")
        page = ada.get("/api/files", params={"links": 1}).json()["files"]
        one = ada.get(f"/api/files/{ids[0]}", params={"links": 1}).json()
        plain = ada.get("/api/files").json()["files"]
    assert [each["id"] for each in page] == [without, *reversed(ids)]
    assert page[0]["previews"] == {} and "previews" not in plain[0]
    for file in page[1:]:
        assert list(file["previews"]) == ["320", "640"]
        for width, preview in file["previews"].items():
            assert (preview["mime_type"], preview["width"], preview["size_bytes"]) == ("image/webp", int(width), 1_000)
            answer = browser.get(preview["url"])
            assert (answer.status_code, answer.headers["content-type"], len(answer.content)) == (200, "image/webp", 1_000)
    assert one["previews"].keys() == {"320", "640"} and one["link"]


def test_a_preview_is_served_like_a_file_but_with_a_weak_etag(
    server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory
) -> None:
    start_worker()
    with server.client("ada") as ada:
        file_id = stored(ada)
        ready(ada, file_id)
        url = link(ada, file_id, "320")
        digest = ada.get(f"/api/files/{file_id}").json()["sha256"]
    answer = browser.get(url)
    assert answer.status_code == 200
    assert answer.headers["etag"] == f'W/"{digest}-320.webp"'
    assert answer.headers["content-disposition"] == 'inline; filename="Sonne-320.webp"'
    assert "repr-digest" not in answer.headers and answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"].endswith("immutable, no-transform")
    assert browser.get(url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    part = browser.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, answer.content[10:20], "bytes 10-19/1000")
    whole = browser.get(url, headers={"Range": "bytes=10-19", "If-Range": answer.headers["etag"]})
    assert whole.status_code == 200  # a weak ETag does not tell that the parts are of the same bytes
    assert browser.head(url).headers["content-length"] == "1000"


def test_a_variant_is_made_once_for_all_who_ask_at_once(server: RunningServer, start_worker: WorkerFactory) -> None:
    worker = start_worker(0.05)
    with server.client("ada") as ada:
        file_id = stored(ada)
        ready(ada, file_id)
        url = link(ada, file_id, SMALL)
    with (
        httpx.Client(base_url=server.url, timeout=40, limits=httpx.Limits(max_connections=100)) as browser,
        ThreadPoolExecutor(100) as pool,
    ):
        answers = list(pool.map(lambda _: browser.get(url), range(100)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert answers[0].content.startswith(f"image/png {SMALL_NAME}".encode())
        assert answers[0].headers["content-disposition"] == f'inline; filename="Sonne-{SMALL_NAME}"'
        assert len(made(worker.log)) == 1
        assert browser.get(url).content == answers[0].content
        assert len(made(worker.log)) == 1


def test_a_variant_is_made_once_across_processes(server: RunningServer, start_worker: WorkerFactory, tmp_path: Path) -> None:
    other = RunningServer(server.database_url, server.volume, tmp_path / "other.log", server.api_key, {})
    other.start()
    try:
        worker = start_worker(0.3)
        with server.client("ada") as ada:
            file_id = stored(ada)
            ready(ada, file_id)
            url = link(ada, file_id, SMALL)
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda base: httpx.get(base + url, timeout=40), [server.url, other.url] * 10))
    finally:
        other.kill()
    assert {answer.status_code for answer in answers} == {200}
    assert len(made(worker.log)) == 1


def test_auto_varies_by_what_the_client_accepts(server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada") as ada:
        file_id = stored(ada)
        ready(ada, file_id)
        url = link(ada, file_id, {**SMALL, "format": "auto"})
    found = {}
    for accept in ("image/avif,image/webp,*/*", "image/webp", "*/*"):
        answer = browser.get(url, headers={"Accept": accept})
        assert "Accept" in answer.headers.get_list("vary")
        assert answer.headers["content-disposition"].endswith(f'.{answer.headers["content-type"].removeprefix("image/")}"')
        found[answer.headers["content-type"]] = answer.headers["etag"]
    assert list(found) == ["image/avif", "image/webp", "image/jpeg"] and len(set(found.values())) == 3


def test_a_preview_is_saved_under_the_name_that_its_link_gives_it(
    server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory
) -> None:
    start_worker()
    with server.client("ada") as ada:
        file_id = stored(ada)
        ready(ada, file_id)
        for preview in ("320", SMALL, {**SMALL, "format": "auto"}):
            answer = ada.post(f"/api/files/{file_id}/link", json={"preview": preview, "name": "Meer.webp"}).json()
            assert browser.get(answer["url"]).headers["content-disposition"] == 'inline; filename="Meer.webp"'


def test_a_link_asked_for_before_the_file_has_its_previews_waits_for_them(
    server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory
) -> None:
    with server.client("ada") as ada:
        file_id = stored(ada)
        url = link(ada, file_id, SMALL)
        assert code(ada.post(f"/api/files/{file_id}/link", json={"preview": "320"})) == (404, "no_preview")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(browser.get, url)
        until(lambda: "coffer notices" in str(execute(server.database_url, "select application_name from pg_stat_activity")))
        start_worker()
        assert answer.result().status_code == 200


def test_who_waits_too_long_is_told_to_come_back(start_server: ServerFactory) -> None:
    server = start_server(COFFER_PREVIEW_WAIT_SECONDS="1")
    with server.client("ada") as ada, httpx.Client(base_url=server.url, timeout=40) as browser:
        file_id = stored(ada)
        answer = browser.get(link(ada, file_id, SMALL))
    assert (code(answer), answer.headers["retry-after"]) == ((503, "preview_pending"), "2")


def test_a_server_that_stops_does_not_wait_for_variants(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        url = link(ada, stored(ada), SMALL)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(browser.get, url)
        until(lambda: "coffer notices" in str(execute(server.database_url, "select application_name from pg_stat_activity")))
        server.stop()
        assert code(answer.result()) == (503, "preview_pending")


def test_there_is_no_variant_of_what_has_no_picture(server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada") as ada:
        fails = stored(ada, body=b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"never")
        url = link(ada, fails, SMALL)  # while nobody knows yet
        ready(ada, fails, "failed")
        answer = browser.get(url)
        assert (*code(answer), answer.json()["preview_reason"]) == (404, "no_preview", "damaged")
        assert code(ada.post(f"/api/files/{fails}/link", json={"preview": SMALL})) == (404, "no_preview")
        scene = stored(ada, 9, b'{"unknown": 1}', type="scene")
        ready(ada, scene, "unsupported")
        bad = stored(ada, body=b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"no picture")
        ready(ada, bad)
        assert code(browser.get(link(ada, bad, SMALL))) == (404, "no_preview")
        results = ada.post("/api/links", json={"ids": [bad, fails, scene, "x"], "preview": SMALL}).json()["links"]
        assert [each["status"] for each in results] == ["linked", "no_preview", "no_preview", "not_found"]
        assert [each.get("preview") for each in results] == [SMALL_NAME, None, None, None]
        for wish in (
            {},
            {"width": 0},
            {"width": 70_000},
            {"width": 10, "format": "gif"},
            {"width": 10, "quality": 0},
            {"width": 1, "x": 1},
        ):
            assert ada.post(f"/api/files/{bad}/link", json={"preview": wish}).status_code == 400, wish


def test_revoking_deleting_and_replacing_end_links_to_previews(
    server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory
) -> None:
    start_worker()
    with server.client("ada", timeout=40) as ada:
        ends: list[Callable[[str], httpx.Response]] = [
            lambda file_id: ada.post(f"/api/files/{file_id}/revoke-links"),
            lambda file_id: ada.put(f"/api/files/{file_id}/content", content=image(7_000, 7)),
            lambda file_id: ada.delete(f"/api/files/{file_id}"),
            lambda _: ada.post("/api/links/revoke"),
        ]
        for end in ends:
            file_id = stored(ada)
            ready(ada, file_id)
            urls = [link(ada, file_id, each) for each in ("320", SMALL, {"width": 1000})]
            assert [browser.get(url).status_code for url in urls[:2]] == [200, 200]
            assert end(file_id).is_success
            assert [code(browser.get(url)) for url in urls] == [(404, "not_found")] * 3


def test_what_was_not_used_for_longest_gives_way(
    server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory, database_url: str
) -> None:
    worker = start_worker(COFFER_VARIANT_CACHE_BYTES="300")
    with server.client("ada") as ada, server.client("bob") as bob:
        file_id, other = stored(ada), stored(bob)
        ready(ada, file_id)
        ready(bob, other)
        assert browser.get(link(bob, other, SMALL)).status_code == 200
        urls = {width: link(ada, file_id, {"width": width}) for width in (64, 96, 128)}  # about 130 bytes each
        for width in (64, 96):
            assert browser.get(urls[width]).status_code == 200
        execute(database_url, "update previews set last_used_at = now() - interval '2 hours' where variant ~ '^64x'")
        execute(database_url, "update previews set last_used_at = now() - interval '3 hours' where variant ~ '^96x'")
        assert browser.get(urls[64]).status_code == 200
        until(lambda: execute(database_url, "select from previews where variant ~ '^64x' and last_used_at > now() - interval '1 minute'"))
        assert browser.get(urls[128]).status_code == 200
        kept = {row["variant"] for row in execute(database_url, "select variant from previews where on_demand and user_id = 'ada'")}
        assert {each.split("x")[0] for each in kept} == {"64", "128"}
        directory = server.volume / "users" / "ada" / "previews" / file_id
        assert {path.name for path in directory.iterdir()} == {"320.webp", "640.webp", *kept}
        usage = ada.get("/api/storage/usage").json()["preview_bytes"]
        assert usage == sum(path.stat().st_size for path in directory.iterdir())
        before = len(made(worker.log))
        assert browser.get(urls[96]).status_code == 200  # made once more
        assert len(made(worker.log)) == before + 1
        assert execute(database_url, "select from previews where on_demand and user_id = 'bob'")


def test_lost_bytes_are_made_again(server: RunningServer, browser: httpx.Client, start_worker: WorkerFactory) -> None:
    start_worker()
    with server.client("ada") as ada:
        file_id = stored(ada)
        ready(ada, file_id)
        urls = [link(ada, file_id, each) for each in (SMALL, "320")]
        before = [browser.get(url).content for url in urls]
    directory = server.volume / "users" / "ada" / "previews" / file_id
    for lose in (lambda: shutil.rmtree(directory), lambda: [path.write_bytes(b"") for path in directory.iterdir()]):
        lose()
        assert [browser.get(url).content for url in reversed(urls)] == before[::-1]


def test_previews_are_served_while_the_database_is_away(start_server: ServerFactory, tmp_path: Path) -> None:
    """Those that have been made; and none once its original has another generation on the disk."""
    postgres = EmbeddedPostgres(tmp_path / "postgres")
    server = start_server(database_url=postgres.start())
    worker = BackgroundWorker(server, tmp_path / "worker.log", {}, stub_worker.main, ["0"])
    try:
        with server.client("ada") as ada, httpx.Client(base_url=server.url, timeout=40) as browser:
            one, two = stored(ada, 1), stored(ada, 2)
            for each in (one, two):
                ready(ada, each)
            fixed, variant = link(ada, one, "320"), link(ada, one, SMALL)
            revoked, unmade = link(ada, two, "320"), link(ada, one, {"width": 1000})
            before = {url: browser.get(url) for url in (fixed, variant, revoked)}
            ada.post(f"/api/files/{two}/revoke-links").raise_for_status()
            postgres.stop()
            for url in (fixed, variant):
                answer = browser.get(url)
                assert (answer.status_code, answer.content) == (200, before[url].content)
                for name in before[url].headers.keys() - {"date", "cache-control", "x-request-id"}:
                    assert answer.headers[name] == before[url].headers[name], name
            for url in (revoked, unmade):
                assert code(browser.get(url)) == (404, "not_found")
    finally:
        worker.kill()
        server.stop()
        postgres.stop()


def test_previews_are_never_left_to_nginx(start_server: ServerFactory, tmp_path: Path) -> None:
    """Which may have the one open that had the name before the contents were replaced."""
    server = start_server(COFFER_ACCEL_REDIRECT_PREFIX="/coffer-files", COFFER_TRUSTED_PROXIES="127.0.0.1")
    worker = BackgroundWorker(server, tmp_path / "worker.log", {}, stub_worker.main, ["0"])
    through = {"X-Forwarded-For": "192.0.2.1"}
    try:
        with server.client("ada") as ada, httpx.Client(base_url=server.url, headers=through, timeout=40) as browser:
            file_id = stored(ada)
            ready(ada, file_id)
            original, preview = ada.post(f"/api/files/{file_id}/link", json={}).json()["url"], link(ada, file_id, "320")
            for _ in range(3):  # the second is answered where it is read
                assert "x-accel-redirect" in browser.get(original).headers
                shown = browser.get(preview)
                assert "x-accel-redirect" not in shown.headers and len(shown.content) == 1_000
    finally:
        worker.kill()
