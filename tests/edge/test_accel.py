"""Owners' downloads: the server names the file (X-Accel-Redirect), nginx sends it under the server's headers."""

from pathlib import Path

import httpx
import pytest

from tests.edge.conftest import StartEdge
from tests.edge.make_vectors import VOLUME
from tests.edge.stub import stubbed_nginx
from tests.edge.test_links import said
from tests.linking import stored
from tests.samples import image

BODY = image(100_000)
FILE = "users/ada/images/01900000-0000-7000-8000-000000000001.1.png"
HEADERS = {
    "content-type": "image/x-told-by-the-server",
    "content-disposition": 'inline; filename="a.png"',
    "etag": '"0123"',
    "last-modified": "Fri, 02 Jan 2026 03:04:05 GMT",
    "cache-control": "private, no-cache, no-transform",
    "repr-digest": "sha-256=:abc=:",
    "content-security-policy": "sandbox",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-request-id": "the.servers",
    "ratelimit": '"user";r=1;t=1',
}


def told(path: str) -> str:
    headers = "".join(f"add_header {name} '{value}';" for name, value in HEADERS.items() if name != "content-type")
    return f"default_type {HEADERS['content-type']}; add_header X-Accel-Redirect {path}; {headers} return 200 '';"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/coffer-files/{VOLUME}/{FILE}", 200),
        (f"/coffer-files/{VOLUME}/users/../.coffer-volume", 404),
        (f"/coffer-files/{VOLUME}/users../.coffer-volume", 404),
        (f"/coffer-files/{VOLUME}/users/ada/images/link.png", 403),
        (f"/coffer-files/{VOLUME}/users/linked/images/{FILE.rpartition('/')[2]}", 404),
    ],
)
def test_nginx_sends_what_the_server_names(tmp_path: Path, path: str, status: int) -> None:
    volume = tmp_path / "volume"
    (volume / FILE).parent.mkdir(parents=True)
    (volume / FILE).write_bytes(BODY)
    (volume / ".coffer-volume").write_text("secret")
    (volume / "users" / "ada" / "images" / "link.png").symlink_to(volume / FILE)
    (volume / "users" / "linked").symlink_to(volume / "users" / "ada")
    nginx = stubbed_nginx(tmp_path, told(path))
    nginx.start()
    try:
        answer = httpx.get(f"{nginx.url}/api/files/x/download")
        assert answer.status_code == status
        if status != 200:
            assert b"secret" not in answer.content and BODY not in answer.content
            return
        assert answer.content == BODY
        for name, value in HEADERS.items():
            assert answer.headers.get_list(name) == [value], name
        part = httpx.get(f"{nginx.url}/api/files/x/download", headers={"Range": "bytes=5-9"})
        assert (part.status_code, part.content, part.headers["etag"]) == (206, BODY[5:10], HEADERS["etag"])
        assert httpx.get(f"{nginx.url}{path}").status_code == 404  # internal
    finally:
        nginx.stop()


LATER = "Wed, 01 Jan 2098 00:00:00 GMT"


def test_an_owner_gets_through_nginx_what_the_server_itself_would_say(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_ACCEL_REDIRECT_PREFIX="/coffer-files")
    with edge.client("ada") as inside, edge.server.client("ada") as direct:
        path = f"/api/files/{stored(direct, BODY, 'Sonne ☀.png')}/download"
        tag = direct.head(path).headers["etag"]
        for headers in (
            {},
            {"If-None-Match": tag},
            {"If-None-Match": '"another"', "If-Modified-Since": LATER},
            {"If-Modified-Since": LATER},
            {"If-Match": '"another"'},
            {"If-Match": tag, "Range": "bytes=5-9"},
            {"Range": "bytes=5-9"},
            {"Range": "bytes=-5"},
            {"Range": "bytes=5-9", "If-Range": tag},
            {"Range": "bytes=5-9", "If-Range": '"another"'},
            {"Range": "bytes=1-2,5-9"},
            {"Range": "bytes=100000-"},
            {"Origin": "https://elsewhere.example"},
        ):
            sent = headers | {"X-Request-Id": "the.same"}
            ours, theirs = said(direct.get(path, headers=sent)), said(inside.get(path, headers=sent))
            varying = ("ratelimit", "accept-ranges")  # what is left counts down; nginx says the other of whole files only
            for each in (ours, theirs):
                each[1][:] = [header for header in each[1] if header[0] not in varying]
            assert theirs == ours, headers
        passed_on = direct.get(path, headers={"X-Forwarded-For": "192.0.2.1"})
        assert passed_on.headers["x-accel-redirect"].startswith("/coffer-files/") and passed_on.content == b""
