"""Upload links against a running server: the right to bring one file, once."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.access.test_download_links import code
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

BODY = image(300_000)


def upload_link(client: httpx.Client, **wish: Any) -> dict[str, Any]:
    answer = client.post("/api/uploads/links", json={"max_bytes": 400_000} | wish)
    assert answer.status_code == 201, answer.text
    link: dict[str, Any] = answer.json()
    return link


def usage(client: httpx.Client) -> tuple[int, int]:
    answer = client.get("/api/storage/usage").json()
    return answer["used_bytes"], answer["reserved_bytes"]


@pytest.fixture
def browser(server: RunningServer) -> Iterator[httpx.Client]:
    """Nobody: no key, no user."""
    with httpx.Client(base_url=server.url) as client:
        yield client


def test_a_link_takes_one_file(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        link = upload_link(ada, package_name="p", tags=["a", "b"], metadata={"k": 1})
        assert usage(ada) == (0, 400_000)
        answer = browser.put(link["url"], content=BODY, params={"name": "Mein Bild.png"})
        assert answer.status_code == 201, answer.text
        file = answer.json()
        assert file["id"] == link["file_id"] and file == ada.get(f"/api/files/{file['id']}").json()
        assert (file["file_name"], file["package_name"], file["tags"], file["metadata"]) == ("Mein Bild.png", "p", ["a", "b"], {"k": 1})
        assert usage(ada) == (len(BODY), 0)
        for body in (BODY, image(5)):
            assert code(browser.put(link["url"], content=body)) == (409, "link_used")
        assert ada.get(f"/api/files/{file['id']}/download").content == BODY
        events = execute(server.database_url, "select type, file_id::text from events")
        assert [tuple(row) for row in events] == [("file.created", file["id"])]
    assert len(server.stored_files()) == 1 and server.incoming() == []


def test_a_large_file_in_pieces_of_unknown_length(server: RunningServer, browser: httpx.Client) -> None:
    body = video(3_000_000)
    with server.client("ada") as ada:
        link = upload_link(ada, max_bytes=3_000_000, file_name="the backend's name.mp4")
        answer = browser.put(link["url"], content=(body[at : at + 100_000] for at in range(0, len(body), 100_000)), params={"name": "no"})
        assert (answer.status_code, answer.json()["file_name"]) == (201, "the backend's name.mp4")
        assert ada.get(f"/api/files/{link['file_id']}/download").content == body


@pytest.mark.parametrize("declared", [True, False])
def test_more_than_allowed_is_refused_and_the_link_stays(server: RunningServer, browser: httpx.Client, declared: bool) -> None:
    with server.client("ada") as ada:
        for size, limit in ((1_001, 1_000), (2_000_001, 2_000_000)):
            link = upload_link(ada, max_bytes=limit)
            body = image(size)
            refused = browser.put(link["url"], content=body if declared else iter([body]))
            assert (code(refused), refused.json()["limit_bytes"]) == ((413, "file_too_large"), limit)
            assert browser.put(link["url"], content=image(limit)).status_code == 201
        assert usage(ada) == (2_001_000, 0)
    assert server.incoming() == []


def test_a_length_that_is_too_large_is_refused_before_the_body(server: RunningServer) -> None:
    with server.client("ada") as ada, socket.create_connection((server.host, server.port)) as connection:
        link = upload_link(ada, max_bytes=100)
        connection.sendall(f"PUT {link['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: 101\r\n\r\n".encode())
        assert connection.makefile("rb").readline().split()[1] == b"413"


def test_types_are_those_of_the_link(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        for types in (["image"], ["image/png"], ["video/mp4", "image"]):
            link = upload_link(ada, types=types)
            if "video/mp4" not in types:
                refused = browser.put(link["url"], content=video(5_000))
                assert (code(refused), refused.json()["allowed"]) == ((415, "unsupported_type"), types)
            assert browser.put(link["url"], content=b"plain text").status_code == 415
            assert browser.put(link["url"], content=image(5_000)).status_code == 201
        assert code(browser.put(upload_link(ada, type="video")["url"], content=image())) == (415, "type_mismatch")
        refused = ada.post("/api/uploads/links", json={"max_bytes": 1, "types": ["text/html"]})
        assert (code(refused), refused.json()["field"]) == ((400, "invalid_request"), "types")


def test_the_quota_is_held_from_the_start(server: RunningServer, browser: httpx.Client) -> None:
    server.set_quota("ada", 500_000)
    with server.client("ada") as ada:
        link = upload_link(ada)
        assert code(ada.post("/api/uploads/links", json={"max_bytes": 100_001})) == (413, "quota_exceeded")
        assert code(ada.post("/api/files/upload", content=image(100_001))) == (413, "quota_exceeded")
        assert ada.post("/api/files/upload", content=image(100_000)).status_code == 201
        server.set_quota("ada", 0)  # what was promised is kept
        assert browser.put(link["url"], content=image(400_000)).status_code == 201
        assert usage(ada) == (500_000, 0)


def test_an_unused_link_gives_its_quota_back(start_server: ServerFactory) -> None:
    server = start_server(COFFER_RESERVATION_LEASE_SECONDS="5")
    with server.client("ada") as ada, server.client("bob") as bob, httpx.Client(base_url=server.url) as browser:
        link, given_up = upload_link(ada, ttl_seconds=1), upload_link(ada)
        assert bob.delete(f"/api/uploads/links/{given_up['file_id']}").status_code == 404
        assert ada.delete(f"/api/uploads/links/{given_up['file_id']}").status_code == 204
        assert code(browser.put(given_up["url"], content=BODY)) == (403, "link_expired")
        assert ada.delete(f"/api/uploads/links/{given_up['file_id']}").status_code == 404
        assert usage(ada) == (0, 400_000)
        execute(server.database_url, "update uploads set expires_at = now()")
        until(lambda: usage(ada) == (0, 0))
        until(lambda: code(browser.put(link["url"], content=BODY)) == (403, "link_expired"))


def test_two_at_once_bring_one_file(server: RunningServer) -> None:
    with server.client("ada") as ada, ThreadPoolExecutor(8) as pool:
        link = upload_link(ada, max_bytes=3_000_000)
        bodies = [image(2_500_000, seed=n) for n in range(8)]
        answers = list(pool.map(lambda body: httpx.put(server.url + link["url"], content=body, timeout=30), bodies))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [201] + [409] * 7
        winner = next(body for body, answer in zip(bodies, answers, strict=True) if answer.status_code == 201)
        assert ada.get(f"/api/files/{link['file_id']}/download").content == winner
        assert usage(ada) == (len(winner), 0)
    assert len(server.stored_files()) == 1 and server.incoming() == []


def test_a_cut_upload_leaves_the_link_to_be_tried_again(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        link = upload_link(ada, max_bytes=3_000_000)
        for sent in (10, 2_000_000):
            with socket.create_connection((server.host, server.port)) as connection:
                head = f"PUT {link['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
                connection.sendall(head.encode() + image(3_000_000)[:sent])
                until(lambda: execute(server.database_url, "select count(*) from uploads where claimed_until is not null")[0]["count"] == 1)
            until(lambda: execute(server.database_url, "select count(*) from uploads where claimed_until is null")[0]["count"] == 1)
        assert usage(ada) == (0, 3_000_000)
        assert browser.put(link["url"], content=image(3_000_000)).status_code == 201
    assert server.incoming() == []


def test_while_one_upload_runs_another_is_refused_at_once_and_the_link_keeps_its_life(start_server: ServerFactory) -> None:
    server = start_server(COFFER_RESERVATION_LEASE_SECONDS="5")
    body = image(3_000_000)

    def row(column: str) -> Any:
        return execute(server.database_url, f"select {column} as value from uploads")[0]["value"]

    with server.client("ada") as ada:
        link = upload_link(ada, max_bytes=3_000_000, ttl_seconds=3_600)
        with socket.create_connection((server.host, server.port)) as connection:
            head = f"PUT {link['url']} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n"
            connection.sendall(head.encode() + body[:2_000_000])
            until(lambda: row("claimed_until") is not None)
            claimed_until = row("claimed_until")
            assert code(httpx.put(server.url + link["url"], content=image(5))) == (409, "link_used")
            assert ada.delete(f"/api/uploads/links/{link['file_id']}").status_code == 404
            until(lambda: row("claimed_until") > claimed_until)  # renewed by housekeeping
            assert row("expires_at > now() + interval '50 minutes'")
            connection.sendall(body[2_000_000:])
            assert connection.makefile("rb").readline().split()[1] == b"201"
        assert ada.get(f"/api/files/{link['file_id']}/download").content == body


def test_a_killed_server_leaves_the_link_to_be_tried_again(start_server: ServerFactory) -> None:
    server = start_server(COFFER_RESERVATION_LEASE_SECONDS="5")
    with server.client("ada") as ada:
        link = upload_link(ada, max_bytes=3_000_000)
        with socket.create_connection((server.host, server.port)) as connection:
            head = f"PUT {link['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
            connection.sendall(head.encode() + image(3_000_000)[:2_000_000])
            until(lambda: len(server.incoming()) == 1)
            server.kill()
        server.start()
        until(lambda: httpx.put(server.url + link["url"], content=image(3_000_000)).status_code == 201)
        assert usage(ada) == (3_000_000, 0)
        assert ada.get(f"/api/files/{link['file_id']}/download").content == image(3_000_000)


def test_what_is_changed_or_wrong_is_refused(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        link = upload_link(ada)
        url = link["url"]
        for changed in (url[:-1], url + "A", "/u/" + url[3:].swapcase(), "/u/", "/u/x", url + "/", url.replace("/u/", "/f/") + "/x"):
            answer = browser.put(changed, content=BODY)
            assert (answer.status_code, answer.json()["code"]) in {(403, "link_invalid"), (405, "method_not_allowed")}, changed
        for method in ("GET", "POST", "DELETE"):
            assert browser.request(method, url).status_code == 405
        assert code(browser.put(url, content=BODY, params={"tags": "x"})) == (400, "invalid_request")
        assert code(browser.put(url, content=BODY, headers={"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="})) == (400, "digest_mismatch")
        for wish in ({}, {"max_bytes": 0}, {"max_bytes": 10**12}, {"max_bytes": 1, "ttl_seconds": 10**9}, {"max_bytes": 1, "type": "x"}):
            assert ada.post("/api/uploads/links", json=wish).status_code in (400, 413), wish
        assert browser.put(url, content=BODY).status_code == 201


def test_a_link_of_an_erased_user_is_dead(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada, server.client() as admin:
        link = upload_link(ada)
        assert admin.delete("/api/users/ada").status_code == 204
        assert code(browser.put(link["url"], content=BODY)) == (403, "link_expired")
    assert server.stored_paths() == []
