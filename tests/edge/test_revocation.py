"""What was revoked, deleted or replaced is gone at the edge within a second, and nginx answers nothing when it cannot know."""

import time
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from tests.edge.conftest import StartEdge
from tests.edge.nginx import Edge
from tests.edge.test_links import both
from tests.linking import BODY, link, stored
from tests.previews.pictures import photo
from tests.samples import image
from tests.serving import execute
from tests.waiting import until
from tests.working import BackgroundWorker

AT_MOST_SECONDS = 1.0


def seconds_until_gone(browser: httpx.Client, url: str) -> float:
    began = time.monotonic()
    until(lambda: browser.get(url).status_code == 404)
    return time.monotonic() - began


@pytest.mark.parametrize("how", ["file", "user", "deleted", "replaced", "erased"])
def test_links_end_within_a_second(edge: Edge, how: str) -> None:
    user = f"user_{how}"
    with edge.client(user) as app, edge.browser() as browser, edge.client("other") as other:
        file_id = stored(app)
        url, others = link(app, file_id), link(other, stored(other))
        answered = edge.nginx.counted("answered")
        (path,) = (edge.server.volume / "users" / user).glob("*/*")
        until(lambda: browser.get(url).content == BODY and edge.nginx.holds(path))  # what is asked for again stays open
        assert edge.nginx.counted("answered") >= answered + 2
        match how:
            case "file":
                assert app.post(f"/api/files/{file_id}/revoke-links").status_code == 200
            case "user":
                assert app.post("/api/links/revoke").status_code == 204
            case "deleted":
                assert app.delete(f"/api/files/{file_id}").status_code == 204
            case "replaced":
                assert app.put(f"/api/files/{file_id}/content", content=image(700, seed=3)).status_code == 200
            case "erased":
                assert app.delete(f"/api/users/{user}").status_code in {200, 202, 204}
        if how in {"file", "deleted", "replaced"}:
            assert browser.get(url).status_code == 404  # at once: the name is gone from the disk
        assert seconds_until_gone(browser, url) < AT_MOST_SECONDS
        assert browser.get(others).status_code == 200
        if how in {"file", "user", "replaced"}:
            again, answered = link(app, file_id), edge.nginx.counted("answered")
            until(lambda: edge.nginx.counted("answered") > answered or browser.get(again).status_code != 200)
            assert browser.get(again).status_code == 200
        if how != "user":  # whose files stay
            until(lambda: browser.get(others).status_code == 200 and not edge.nginx.holds(path))


@pytest.mark.parametrize("who", ["owner", "anybody"])
def test_what_nginx_keeps_open_is_not_sent_once_the_server_says_no(start_edge: StartEdge, who: str) -> None:
    edge = start_edge(COFFER_ACCEL_REDIRECT_PREFIX="/coffer-files")
    with edge.client("ada") as app, edge.browser() as browser:
        file_id = stored(app)
        url = f"/api/files/{file_id}/download"
        if who == "anybody":
            url = app.put(f"/api/files/{file_id}/public", json={"is_public": True}).json()["url"]
        (path,) = edge.server.stored_paths()
        reader = app if who == "owner" else browser
        until(lambda: reader.get(url).content == BODY and edge.nginx.holds(path))
        assert app.put(f"/api/files/{file_id}/content", content=image(700, seed=3)).status_code == 200
        assert reader.get(url).content == image(700, seed=3)
        assert app.delete(f"/api/files/{file_id}").status_code == 204
        assert reader.get(url).status_code == 404


def test_many_links_revoked_at_once_stay_revoked(edge: Edge) -> None:
    """A look at the database that began before must not bring one back."""
    with edge.client("often") as app, edge.browser() as browser:
        file_id = stored(app)
        for _ in range(5):
            url = link(app, file_id)
            assert browser.get(url).status_code == 200
            assert app.post("/api/links/revoke").status_code == 204
            assert seconds_until_gone(browser, url) < AT_MOST_SECONDS
            assert {browser.get(url).status_code for _ in range(20)} == {404}


def test_a_user_who_is_being_erased_has_no_links(edge: Edge) -> None:
    with edge.client("leaving") as app, edge.browser() as browser:
        url = link(app, stored(app))
        assert browser.get(url).status_code == 200
        # As between the two halves of an erasure: the row says so, and the files are still there.
        execute(edge.server.database_url, "update user_storage set erasing_at = clock_timestamp() where user_id = 'leaving'")
        until(lambda: browser.get(url).status_code == 404)


def test_nginx_answers_nothing_once_it_does_not_know_whose_links_were_revoked(start_edge: StartEdge) -> None:
    edge = start_edge()
    with edge.client("ada") as ada, edge.browser() as browser:
        url = link(ada, stored(ada))
        assert browser.get(url).status_code == 200
        edge.server.kill()
        until(lambda: browser.get(url).status_code == 503, timeout_seconds=20)  # the server is asked, and is away
        answer = browser.get(url)
        assert (answer.headers["content-type"], answer.json()["code"]) == ("application/problem+json", "server_unavailable")
        edge.server.start()
        answered = edge.nginx.counted("answered")
        until(lambda: browser.get(url).status_code == 200 and edge.nginx.counted("answered") > answered)


def test_with_reads_recorded_nginx_answers_nothing(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_AUDIT_READS="true")
    with edge.client("ada") as ada, edge.browser() as browser:
        url = link(ada, stored(ada))
        assert browser.get(url).content == BODY
    assert edge.nginx.counted("answered") == 0
    recorded = execute(edge.server.database_url, "select count(*) as n from audit_log where action = 'file.downloaded'")
    assert recorded[0]["n"] == 1


@pytest.mark.parametrize("taken", ["quarantined", "marked"])
def test_bytes_that_were_set_aside_are_told_as_damaged(start_edge: StartEdge, taken: str) -> None:
    """Their name is gone from the disk, so nginx asks the server, whose row says that they should be there."""
    edge = start_edge(COFFER_ACCEL_REDIRECT_PREFIX="/coffer-files")
    with edge.client("ada") as ada, edge.browser() as browser:
        file_id = stored(ada)
        url = link(ada, file_id)
        assert browser.get(url).status_code == 200
        (path,) = edge.server.stored_paths()
        aside = edge.server.volume / "quarantine" / "2026-01-02" / path.name if taken == "quarantined" else Path(f"{path}.damaged")
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
        passed = edge.nginx.counted("passed")
        for answer in (browser.get(url), browser.get(url, headers={"Range": "bytes=0-1"}), ada.get(f"/api/files/{file_id}/download")):
            assert (answer.status_code, answer.json()["code"]) == (410, "damaged")
        assert edge.nginx.counted("passed") == passed + 2
        for place in (aside.relative_to(edge.server.volume), f"coffer-files/quarantine/2026-01-02/{path.name}"):
            assert browser.get(f"/{place}").status_code in {401, 404}
        aside.rename(path)
        assert both(edge, browser, url).content == BODY
        assert edge.nginx.counted("passed") == passed + 2


def test_a_variant_that_nginx_sends_counts_as_used(edge: Edge) -> None:
    """Else those that are looked at most would be the first to give way. Once an hour the server is asked, and notes it."""
    worker = BackgroundWorker(edge.server, edge.nginx.directory / "variants.log", {})
    try:
        with edge.client("viewed") as app, edge.browser() as browser:
            file_id = stored(app, photo().jpegsave_buffer())
            urls = [link(app, file_id, preview={"width": width, "format": "webp"}) for width in (64, 96)]
            for url in urls:
                until(lambda url=url: browser.get(url).status_code == 200)  # type: ignore[misc]
    finally:
        worker.kill()
    age = "update previews set last_used_at = now() - interval '2 days' where file_id = $1"
    execute(edge.server.database_url, age, UUID(file_id))
    lately = "select count(*) as n from previews where file_id = $1 and last_used_at > now() - interval '1 hour'"
    with edge.browser() as browser:
        passed, answered = edge.nginx.counted("passed"), edge.nginx.counted("answered")
        assert browser.get(urls[0]).status_code == 200  # the first that nginx could have sent
        assert edge.nginx.counted("passed") == passed + 1
        until(lambda: execute(edge.server.database_url, lately, UUID(file_id))[0]["n"] == 1)
        for _ in range(5):
            assert browser.get(urls[0]).status_code == 200
        assert (edge.nginx.counted("passed"), edge.nginx.counted("answered")) == (passed + 1, answered + 5)
        both(edge, browser, urls[0])


def test_previews_end_with_their_original(edge: Edge) -> None:
    worker = BackgroundWorker(edge.server, edge.nginx.directory / "worker.log", {})
    try:
        with edge.client("ada") as ada, edge.browser() as browser:
            file_id = stored(ada, photo().jpegsave_buffer())
            until(lambda: ada.get(f"/api/files/{file_id}").json()["preview_state"] == "ready", timeout_seconds=60)
            url = link(ada, file_id, preview="320")
            answered = edge.nginx.counted("answered")
            until(lambda: browser.get(url).is_success and edge.nginx.counted("answered") > answered)  # a young one is the server's to send
            shown = both(edge, browser, url)
            assert (shown.status_code, shown.headers["content-type"]) == (200, "image/webp")
            assert shown.headers["etag"].startswith("W/")
            for value in ("bytes=1-5", "bytes=-3", "bytes=99999999-"):
                both(edge, browser, url, headers={"Range": value})
                both(edge, browser, url, headers={"Range": value, "If-Range": shown.headers["etag"]})
            both(edge, browser, url, headers={"If-None-Match": shown.headers["etag"]})
            both(edge, browser, url, "HEAD")
            variant = link(ada, file_id, preview={"width": 64, "format": "auto"})
            made = browser.get(variant, headers={"Accept": "image/avif"})
            assert (made.status_code, made.headers["content-type"], made.headers["vary"]) == (200, "image/avif", "Accept")
            assert ada.post(f"/api/files/{file_id}/revoke-links").status_code == 200
            assert seconds_until_gone(browser, url) < AT_MOST_SECONDS
            assert (edge.server.volume / "users" / "ada" / "previews" / file_id).is_dir()  # it is still there, for new links
    finally:
        worker.kill()


def test_links_to_the_trash_end_within_a_second(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_TRASH_DAYS="30")
    with edge.client("ada") as app, edge.browser() as browser:
        file_id = stored(app)
        url = link(app, file_id)
        answered = edge.nginx.counted("answered")
        assert browser.get(url).content == BODY
        assert edge.nginx.counted("answered") == answered + 1
        assert app.delete(f"/api/files/{file_id}").status_code == 204
        assert seconds_until_gone(browser, url) < AT_MOST_SECONDS
        assert app.post(f"/api/files/{file_id}/restore").status_code == 200
        assert browser.get(url).status_code == 404
        assert browser.get(link(app, file_id)).content == BODY
