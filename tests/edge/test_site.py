"""What stands around the links: uploads as they come, logs without secrets, headers from outside, and the state of the server told."""

import json
import re
import socket
import ssl
import subprocess
import time
from pathlib import Path
from uuid import UUID

import httpx

from tests.edge.conftest import StartEdge
from tests.edge.nginx import Edge
from tests.edge.stub import stubbed_nginx
from tests.edge.test_links import both
from tests.linking import BODY, link, stored
from tests.samples import image
from tests.serving import execute
from tests.waiting import until


def test_bytes_reach_the_server_while_the_client_still_sends(edge: Edge) -> None:
    """And who goes away in the middle gives up at once what it held."""
    body = image(3 * 2**20)
    head = (
        f"POST /api/files/upload?name=a.png HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {edge.server.api_key}\r\nX-User-Id: slow\r\n"
        f"Content-Length: {len(body)}\r\nContent-Type: image/png\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", edge.nginx.port)) as connection:
        connection.sendall(head.encode() + body[: 2 * 2**20])
        until(lambda: any((edge.server.volume / "incoming" / name).stat().st_size > 2**20 for name in edge.server.incoming()))
    began = time.monotonic()
    until(lambda: not edge.server.incoming())
    assert time.monotonic() - began < 4, "the lease ended, not the connection"
    uploads = execute(edge.server.database_url, "select count(*) as n from uploads")
    assert uploads[0]["n"] == 0


def test_nothing_of_an_upload_waits_on_nginxs_disk(edge: Edge) -> None:
    with edge.client("ada") as ada:
        stored(ada, image(5 * 2**20))
    assert not [path for name in ("client_body", "proxy") for path in (edge.nginx.directory / name).rglob("*") if path.is_file()]


def test_a_file_over_the_servers_limit_is_refused_by_the_server(edge: Edge) -> None:
    with edge.client("ada") as ada:
        answer = ada.post("/api/files/upload", content=image(6 * 2**20 + 1), params={"name": "a.png"})
    assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")


def test_the_client_is_who_nginx_says_it_is(edge: Edge) -> None:
    claims = {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9", "X-Real-IP": "203.0.113.9", "X-Forwarded-Proto": "https"}
    with edge.client("ada") as ada:
        ada.get("/api/files", headers={**claims, "X-Request-Id": "who.am.i"}).raise_for_status()
    (line,) = until(lambda: [line for line in edge.server.logged().splitlines() if "who.am.i" in line])
    assert json.loads(line)["client"] == "127.0.0.1"


def test_a_named_proxy_in_front_says_who_the_client_is(start_edge: StartEdge) -> None:
    """And of IPv6 a /64 is one client, as in the server's own limits."""
    edge = start_edge(COFFER_RATE_LINKS_PER_ADDRESS="5/60")

    def seen_as(forwarded: str) -> str:
        with edge.client("ada") as ada:
            request_id = f"seen.{time.monotonic_ns()}"
            ada.get("/api/files", headers={"X-Forwarded-For": forwarded, "X-Request-Id": request_id}).raise_for_status()
        (line,) = until(lambda: [line for line in edge.server.logged().splitlines() if request_id in line])
        return str(json.loads(line)["client"])

    assert seen_as("203.0.113.9") == "127.0.0.1"
    done = edge.coffer("install", "--for-real", "--trusted-proxy", "127.0.0.1", "--trusted-proxy", "198.51.100.0/24")
    assert done.returncode == 0, done.stderr
    until(lambda: seen_as("203.0.113.9") == "203.0.113.9")
    assert seen_as("10.9.9.9, 203.0.113.9") == "203.0.113.9"  # what the client says of itself stands to the left
    assert seen_as("203.0.113.9, 198.51.100.7") == "203.0.113.9"
    assert seen_as("2001:db8:1:2::9") == "2001:db8:1:2::9"
    with edge.client("ada") as ada, edge.browser() as browser:
        url = link(ada, stored(ada))

        def statuses(addresses: list[str]) -> set[int]:
            return {browser.get(url, headers={"X-Forwarded-For": each}).status_code for each in addresses}

        assert 429 in statuses([f"2001:db8:0:7:{number:x}::1" for number in range(12)])
        assert statuses(["2001:db8:0:7:ffff::9"]) == {429}
        assert statuses([f"2001:db8:0:{number:x}::1" for number in range(8, 20)]) == {200}
        assert statuses([f"192.0.2.{number}" for number in range(12)]) == {200}
        assert 429 in statuses(["192.0.2.77"] * 12)


def test_internal_headers_reach_nobody(tmp_path: Path) -> None:
    """The server's own `X-Accel-Redirect` is obeyed, a client's is not even handed on."""
    names = "accel_redirect accel_buffering accel_limit_rate accel_expires accel_charset sendfile real_ip forwarded_host forwarded_port"
    told = [*names.split(), "original_url", "rewrite_url"]
    nginx = stubbed_nginx(
        tmp_path, 'return 200 "[' + "".join(f"$http_x_{name}" for name in told) + ']$http_x_forwarded_for $http_forwarded";'
    )
    nginx.start()
    try:
        claims = {f"X-{name.replace('_', '-')}": "claimed" for name in told} | {"X-Forwarded-For": "claimed", "Forwarded": "for=claimed"}
        for path in ("/api/files", "/f/x", "/api/files/events", "/u/x", "/p/x"):
            assert httpx.get(f"{nginx.url}{path}", headers=claims).text == "[]127.0.0.1 ", path
    finally:
        nginx.stop()


def test_internal_headers_and_places_are_not_for_outside(edge: Edge) -> None:
    with edge.client("ada") as ada, edge.browser() as browser:
        file_id = stored(ada)
        path = next(path for path in edge.server.stored_paths() if file_id in path.name).relative_to(edge.server.volume)
        volume = execute(edge.server.database_url, "select id from volumes")[0]["id"]
        for inside in (
            *(f"/coffer-files/{volume}/{path}", f"/coffer-files/{volume}/users/../{path}", f"//coffer-files/{volume}/{path}"),
            *(f"/coffer-files/{volume}/users/..%2f..%2fetc/passwd", f"/coffer-files/{volume}/users../.coffer-volume", f"/{path}"),
            *("/metrics", "/health/ready", "/health", "/f/../coffer-files/x", f"/f/..%2f{path}"),
        ):
            answer = browser.get(inside, headers={"X-Accel-Redirect": f"/coffer-files/{volume}/{path}", "X-Sendfile": str(path)})
            assert answer.status_code in {400, 403, 404}, inside
            assert len(answer.content) < 1_000, inside


def test_logs_tell_the_route_and_no_secret(start_edge: StartEdge) -> None:
    edge = start_edge()
    with edge.client("ada") as ada, edge.browser() as browser:
        urls = [link(ada, stored(ada)), link(ada, stored(ada), ttl_seconds=1)]
        for url in (*urls, f"{urls[0]}x", f"{urls[0]}?a=b"):
            browser.get(url)
        stored_again = next(path for path in edge.server.stored_paths())
        moved = stored_again.with_suffix(".away")
        stored_again.rename(moved)
        browser.get(urls[0])
        moved.rename(stored_again)
        edge.server.kill()
        assert browser.get(f"{urls[0]}y").status_code == 503  # what nginx has to say of that quotes the request
    log = edge.nginx.directory / "coffer.log"
    until(lambda: log.read_text().count('"route":"/f/{token}/{name}"') == 6)  # it is written once a second
    logs = [log, edge.nginx.directory / "coffer-error.log", edge.nginx.directory / "error.log"]
    text = "".join(path.read_text() for path in logs)
    for url in urls:
        assert url.split("/")[2].split(".")[1] not in text
    assert edge.server.api_key not in text
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert not [line for line in lines if re.search(r"[0-9]", line["route"])]
    assert {"/f/{token}/{name}", "/api/files/upload"} <= {line["route"] for line in lines}


def test_events_come_as_they_happen(edge: Edge) -> None:
    with edge.client("listener") as app, app.stream("GET", "/api/files/events", headers={"Accept": "text/event-stream"}) as events:
        assert events.status_code == 200
        with edge.client("listener") as other:
            file_id = stored(other)
        ready = "with done as (update user_files set preview_state = 'ready' where id = $1 returning id, user_id) "
        execute(edge.server.database_url, f"{ready} select pg_notify('coffer_notice', id || ' ' || user_id) from done", UUID(file_id))
        assert any(file_id in line for line in events.iter_lines())


def test_who_asks_too_often_is_told_so(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_RATE_LINKS_PER_ADDRESS="5/60")
    with edge.client("ada") as ada, edge.browser() as browser:
        url = link(ada, stored(ada))
        answers = [browser.get(url) for _ in range(20)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and answers[0].status_code == 200
    assert refused[0].json()["code"] == "rate_limited" and refused[0].headers["retry-after"]
    assert refused[0].headers["content-type"] == "application/problem+json"


def test_pages_of_other_origins(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_CORS_ORIGINS="https://app.example.com https://b.example.com:8443")
    with edge.client("ada") as ada, edge.browser() as browser:
        url = link(ada, stored(ada))
        for origin in ("https://app.example.com", "https://b.example.com:8443", "https://evil.example.com", "null"):
            both(edge, browser, url, headers={"Origin": origin})
        both(edge, browser, url)
    assert edge.nginx.counted("passed") == 0


def test_any_origin(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_CORS_ORIGINS="*", COFFER_LINK_CACHE="public", COFFER_LINK_RESOURCE_POLICY="same-site")
    with edge.client("ada") as ada, edge.browser() as browser:
        url = link(ada, stored(ada))
        answer = both(edge, browser, url, headers={"Origin": "https://anywhere.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["cache-control"].startswith("public, ")
        both(edge, browser, url)
    assert edge.nginx.counted("passed") == 0


def test_over_tls(start_edge: StartEdge, tmp_path: Path) -> None:
    edge = start_edge()
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    options = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", *subject]
    subprocess.run(["openssl", *options, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    done = edge.coffer("install", "--for-real", "--certificate", str(certificate), "--certificate-key", str(key))
    assert done.returncode == 0, done.stderr
    trusted = ssl.create_default_context(cafile=str(certificate))
    url = f"https://127.0.0.1:{edge.nginx.port}"
    with edge.server.client("ada") as ada:
        path = link(ada, stored(ada))

    def answered_over_tls() -> httpx.Response | None:
        try:
            return httpx.get(f"{url}{path}", verify=trusted)
        except httpx.TransportError:
            return None

    answer = until(answered_over_tls)
    assert answer is not None
    assert answer.status_code == 200
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert httpx.get(f"{url}/api/files", verify=trusted).headers["strict-transport-security"]  # from the server: it was told of TLS
    by_http_2 = [
        "curl",
        "--silent",
        "--show-error",
        "--http2",
        "--cacert",
        str(certificate),
        "--write-out",
        "%{http_version} %{size_download}",
    ]
    curl = subprocess.run([*by_http_2, "--output", str(tmp_path / "got"), f"{url}{path}"], capture_output=True, text=True, check=True)
    assert curl.stdout == f"2 {len(BODY)}" and (tmp_path / "got").read_bytes() == BODY
