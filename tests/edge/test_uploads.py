"""Uploads through nginx: as the server takes them, and cut where the client cuts them."""

import hashlib
import socket
from contextlib import closing

import httpx

from tests.edge.conftest import StartEdge
from tests.edge.nginx import Edge
from tests.linking import link, stored
from tests.samples import image
from tests.serving import execute
from tests.tus.speaking import create, head, offset, patch, post
from tests.waiting import until

BODY = image(4_000_000)
HALF = len(BODY) // 2


def test_plain_uploads_of_every_form(edge: Edge) -> None:
    digest = hashlib.sha256(BODY).hexdigest()
    with edge.client("ada") as ada:
        raw = ada.post("/api/files/upload", content=BODY, params={"name": "a.png"})
        form = ada.post("/api/files/upload", files={"file": ("a.png", BODY)})
        chunked = ada.post("/api/files/upload", content=iter([BODY[:HALF], BODY[HALF:]]), params={"name": "a.png"})
        assert [(answer.status_code, answer.json()["sha256"]) for answer in (raw, form, chunked)] == [(201, digest)] * 3
        replaced = ada.put(f"/api/files/{raw.json()['id']}/content", content=image(900))
        assert replaced.status_code == 200
        by_link = ada.post("/api/uploads/links", json={"max_bytes": len(BODY)}).json()["url"]
    with edge.browser() as browser:
        assert browser.put(by_link, content=BODY).status_code == 201


def test_a_resumable_upload_is_cut_and_goes_on(edge: Edge) -> None:
    with edge.client("resumes") as client:
        created = post(client, len(BODY))
        assert created.headers["location"].startswith(edge.nginx.url)  # where its client reached it, not where nginx reached the server
        path = httpx.URL(created.headers["location"]).path
        assert patch(client, path, 0, BODY[:1_000_000]).headers["upload-offset"] == "1000000"
        with closing(socket.create_connection(("127.0.0.1", edge.nginx.port))) as connection:
            asked = [
                *(f"PATCH {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {edge.server.api_key}", "X-User-Id: resumes"),
                *("Tus-Resumable: 1.0.0", "Content-Type: application/offset+octet-stream", "Upload-Offset: 1000000"),
                f"Content-Length: {len(BODY) - 1_000_000}",
            ]
            connection.sendall("".join(f"{line}\r\n" for line in [*asked, ""]).encode() + BODY[1_000_000:HALF])
        at = until(lambda: (now := offset(client, path)) > 1_000_000 and now)
        assert at <= HALF
        finished = patch(client, path, at, BODY[at:])
        assert (finished.status_code, finished.headers["upload-offset"]) == (204, str(len(BODY)))
        assert head(client, path).headers["upload-offset"] == str(len(BODY))
        (file,) = client.get("/api/files").json()["files"]
        assert file["sha256"] == hashlib.sha256(BODY).hexdigest()
        deferred = create(client)
        assert patch(client, deferred, 0, BODY, Upload_Length=str(len(BODY))).status_code == 204


def test_a_server_that_ends_in_mid_upload_is_told_of_once(start_edge: StartEdge) -> None:
    """nginx never sends a request a second time, and says itself that nobody answers."""
    edge = start_edge()
    with edge.client("resumes") as client:
        path = create(client, len(BODY))
        assert patch(client, path, 0, BODY[:HALF]).status_code == 204
        edge.server.kill()
        away = patch(client, path, HALF, BODY[HALF:])
        assert (away.status_code, away.json()["code"], away.headers["retry-after"]) == (503, "server_unavailable", "5")
        edge.server.start()
        assert offset(client, path) == HALF
        assert patch(client, path, HALF, BODY[HALF:]).status_code == 204
        assert client.get("/api/files").json()["files"][0]["sha256"] == hashlib.sha256(BODY).hexdigest()


def test_what_was_uploaded_through_nginx_is_charged_once(edge: Edge) -> None:
    with edge.client("counted") as client:
        url = link(client, stored(client, BODY))
        assert httpx.get(f"{edge.nginx.url}{url}").content == BODY
    (row,) = execute(edge.server.database_url, "select total_bytes, reserved_bytes from user_storage where user_id = 'counted'")
    assert tuple(row) == (len(BODY), 0)
