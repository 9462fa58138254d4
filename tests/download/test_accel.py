"""Downloads whose bytes a real nginx in front sends, by `X-Accel-Redirect`: the same answers as without, and no paths for anybody else."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.bench.processes import free_port, running, wait_for_port
from tests.bench.programs import debian_program
from tests.samples import image
from tests.serving import RunningServer, ServerFactory

PREFIX = "/coffer-volumes"
BODY = image(300_000)
# nginx takes over type, disposition and caching by itself; these it must be told to.
TAKEN_OVER = ("ETag", "Last-Modified", "X-Content-Type-Options", "Content-Security-Policy", "Cross-Origin-Resource-Policy",
              "Referrer-Policy", "Repr-Digest", "X-Request-Id")  # fmt: skip


class Fronted(NamedTuple):
    server: RunningServer
    nginx_url: str
    nginx_log: Path


@pytest.fixture
def fronted(start_server: ServerFactory, tmp_path: Path) -> Iterator[Fronted]:
    """A server that trusts the nginx in front of it."""
    server = start_server(COFFER_TRUSTED_PROXIES="127.0.0.1", COFFER_ACCEL_REDIRECT_PREFIX=f"{PREFIX}/")
    directory, port = tmp_path / "nginx", free_port()
    directory.mkdir()
    volume_id = (server.volume / ".coffer-volume").read_text().strip()
    headers = "\n".join(f"add_header {each} $upstream_http_{each.lower().replace('-', '_')};" for each in TAKEN_OVER)
    temporary = "\n".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (directory / "nginx.conf").write_text(f"""
        {"user root;" if os.geteuid() == 0 else ""} daemon off; worker_processes 1; pid {directory}/pid; error_log stderr;
        events {{}}
        http {{
            log_format sent "$request_method $upstream_http_x_accel_redirect $upstream_response_length $status";
            access_log {directory}/log sent;
            sendfile on; {temporary}
            server {{
                listen 127.0.0.1:{port};
                location / {{
                    proxy_pass http://127.0.0.1:{server.port}; proxy_http_version 1.1; proxy_set_header Connection "";
                    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                }}
                location {PREFIX}/{volume_id}/ {{
                    internal; alias {server.volume}/; etag off; if_modified_since off; max_ranges 1;
                    {headers}
                }}
            }}
        }}
    """)
    log = tmp_path / "nginx.log"
    program = debian_program("nginx", "usr/sbin/nginx", tmp_path)
    with running([program, "-e", "stderr", "-p", directory, "-c", directory / "nginx.conf"], log) as process:
        wait_for_port(port, process, log)
        yield Fronted(server, f"http://127.0.0.1:{port}", directory / "log")


def test_the_same_answers_by_nginx(fronted: Fronted) -> None:
    server = fronted.server
    with server.client("ada") as direct, httpx.Client(base_url=fronted.nginx_url, headers=direct.headers) as through:
        uploaded = direct.post("/api/files/upload", content=BODY, params={"name": "Sonne 🌅.png"}).json()
        owner = f"/api/files/{uploaded['id']}/download"
        link = direct.post(f"/api/files/{uploaded['id']}/link").json()["url"]
        etag, date = uploaded["etag"], direct.head(owner).headers["last-modified"]
        requests: list[dict[str, str]] = [
            {},
            {"Range": "bytes=0-0"},
            {"Range": "bytes=100000-"},
            {"Range": "bytes=-7"},
            {"Range": "bytes=0-0,5-6"},
            {"Range": f"bytes={len(BODY)}-"},
            {"Range": "bytes=7-9", "If-Range": etag},
            {"Range": "bytes=7-9", "If-Range": '"other"'},
            {"If-None-Match": etag},
            {"If-None-Match": '"other"'},
            {"If-Modified-Since": date},
            {"If-Modified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
            {"If-Match": etag, "Range": "bytes=3-4"},
            {"If-Match": '"other"'},
            {"If-Unmodified-Since": date},
            {"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
        ]
        compared = (*(each.lower() for each in TAKEN_OVER[:-1]), "content-type", "content-disposition", "cache-control", "accept-ranges")
        for target in (owner, link, link):
            for method in ("GET", "HEAD"):
                for headers in requests:
                    without = direct.request(method, target, headers=headers)
                    by_nginx = through.request(method, target, headers=headers)
                    what = (target[:3], method, headers)
                    assert by_nginx.status_code == without.status_code, what
                    if without.headers.get("content-type") == "application/problem+json":
                        assert method == "HEAD" or by_nginx.json()["code"] == without.json()["code"], what
                        continue
                    assert by_nginx.content == without.content, what
                    for name in ("content-range", *compared, *([] if without.status_code == 304 else ["content-length"])):
                        if (name == "cache-control" and target is link) or (name == "accept-ranges" and without.status_code == 206):
                            continue  # the one counts seconds, the other nginx does not say with a part
                        assert by_nginx.headers.get(name) == without.headers.get(name), (what, name)
                    assert "x-accel-redirect" not in by_nginx.headers and "x-accel-redirect" not in without.headers
    sent = [line.split() for line in fronted.nginx_log.read_text().splitlines()]
    redirected = [line for line in sent if line[1].startswith(f"{PREFIX}/")]
    assert len(redirected) == 3 * 9 and {line[2] for line in redirected} == {"0"} and {line[0] for line in redirected} == {"GET"}


def test_whoever_is_no_trusted_proxy_gets_bytes_and_no_path(start_server: ServerFactory) -> None:
    server = start_server(COFFER_TRUSTED_PROXIES="192.0.2.1", COFFER_ACCEL_REDIRECT_PREFIX=PREFIX)
    claims = {"X-Forwarded-For": "192.0.2.1", "X-Accel-Redirect": "/etc/passwd", "X-Sendfile": "/etc/passwd", "X-Accel-Mapping": "/=/x"}
    with server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=BODY).json()["id"]
        link = client.post(f"/api/files/{file_id}/link").json()["url"]
        for target in (f"/api/files/{file_id}/download", link):
            answer = client.get(target, headers=claims)
            assert answer.content == BODY and not [name for name in answer.headers if name.startswith("x-accel")]


def test_a_trusted_peer_that_names_nobody_gets_bytes(start_server: ServerFactory) -> None:
    """A program on the proxy's machine, which is no proxy. And what is damaged is told, as ever, not redirected to."""
    server = start_server(COFFER_TRUSTED_PROXIES="127.0.0.1", COFFER_ACCEL_REDIRECT_PREFIX=PREFIX)
    with server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=BODY).json()["id"]
        target = f"/api/files/{file_id}/download"
        assert client.get(target).content == BODY
        named = client.get(target, headers={"X-Forwarded-For": "203.0.113.9"})
        (path,) = server.stored_paths()
        volume_id = (server.volume / ".coffer-volume").read_text().strip()
        assert (named.status_code, named.content) == (200, b"")
        assert named.headers["x-accel-redirect"] == f"{PREFIX}/{volume_id}/{path.relative_to(server.volume)}"
        assert named.headers["etag"] == f'"{hashlib.sha256(BODY).hexdigest()}"'
        with server.client("bob") as bob:
            refused = bob.get(target, headers={"X-Forwarded-For": "203.0.113.9"})
            assert refused.status_code == 404 and "x-accel-redirect" not in refused.headers
        path.unlink()
        lost = client.get(target, headers={"X-Forwarded-For": "203.0.113.9"})
        assert (lost.status_code, lost.json()["code"]) == (410, "damaged") and "x-accel-redirect" not in lost.headers
