"""Whom a request comes from: forwarding headers count from trusted proxies alone, and internal ones from nobody."""

import json
from ipaddress import ip_network
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from server.api.proxies import Proxies
from server.settings import SettingError, Settings
from tests.samples import image
from tests.serving import RunningServer, ServerFactory
from tests.waiting import until

XFF, PROTO, FORWARDED = "X-Forwarded-For", "X-Forwarded-Proto", "Forwarded"


def trusting(header: str = "x-forwarded-for") -> Settings:
    return Settings(trusted_proxies=tuple(map(ip_network, ("10.0.0.0/8", "fd00::/8", "127.0.0.1/32"))), proxy_header=header)


def settled(settings: Settings, peer: str | None, *headers: tuple[str, str], scheme: str = "http") -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"client": None if peer is None else (peer, 4711), "scheme": scheme, "headers": raw}
    Proxies(settings).settle(scope)
    return scope


def client(peer: str, *values: str, header: str = "x-forwarded-for") -> str:
    """The client's address, with these values of the header from a peer."""
    name = XFF if header == "x-forwarded-for" else FORWARDED
    settings = trusting(header)
    found: str = settled(settings, peer, *((name, value) for value in values))["client"][0]
    return found


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("192.0.2.1",), "192.0.2.1"),
        ((" 192.0.2.1 ",), "192.0.2.1"),
        (("203.0.113.9, 192.0.2.1",), "192.0.2.1"),  # what stands further left, the client may have written
        (("203.0.113.9", "192.0.2.1"), "192.0.2.1"),
        (("192.0.2.1, 10.2.3.4, 10.0.0.9",), "192.0.2.1"),
        (("203.0.113.9, 192.0.2.1, fd00::7",), "192.0.2.1"),
        (("10.2.3.4, 10.0.0.9",), "10.2.3.4"),  # someone in the trusted network itself
        (("192.0.2.1:8080",), "192.0.2.1"),
        (("2001:db8::1",), "2001:db8::1"),
        (("2001:DB8:0::1",), "2001:db8::1"),
        (("[2001:db8::1]:443",), "2001:db8::1"),
        (("[2001:db8::1]",), "2001:db8::1"),
        (("::ffff:192.0.2.1",), "192.0.2.1"),
        (("192.0.2.1, ::ffff:10.0.0.9",), "192.0.2.1"),
        (("nonsense, 192.0.2.1",), "192.0.2.1"),  # nobody gets the proxy's address by writing nonsense before their own
        (("x" * 60_000 + ", 192.0.2.1",), "192.0.2.1"),
        (("," * 60_000 + "192.0.2.1",), "192.0.2.1"),
        (("192.0.2.1, nonsense",), None),
        (("192.0.2.1, nonsense, 10.0.0.9",), None),
        (("192.0.2.1,",), None),
        (("",), None),
        (("unknown",), None),
        (("192.0.2.999",), None),
        (("192.0.2.1.",), None),
        (("0300.0.2.1",), None),
        (("3221225985",), None),
        (("192.0.2.1:port",), None),
        (("[2001:db8::1",), None),
        (("1" * 60_000,), None),
        (("192.0.2.1\x00",), None),
        (("é",), None),
    ],
)
def test_x_forwarded_for(values: tuple[str, ...], expected: str | None) -> None:
    assert client("10.0.0.1", *values) == (expected or "10.0.0.1")


def test_a_long_row_of_proxies_is_not_followed_for_ever() -> None:
    assert client("10.0.0.1", "192.0.2.1" + ", 10.0.0.2" * 15) == "192.0.2.1"
    assert client("10.0.0.1", "192.0.2.1" + ", 10.0.0.2" * 16) == "10.0.0.2"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("for=192.0.2.1",), "192.0.2.1"),
        (("For=192.0.2.1;proto=https;by=203.0.113.43",), "192.0.2.1"),
        (('for="[2001:db8:cafe::17]:4711"',), "2001:db8:cafe::17"),
        (('for="192.0.2.1:80" ; host=example.com',), "192.0.2.1"),
        (("for=203.0.113.9, for=192.0.2.1, for=10.0.0.9",), "192.0.2.1"),
        (("for=203.0.113.9", "for=192.0.2.1"), "192.0.2.1"),
        (('for="203.0.113.9, for=192.0.2.1',), "192.0.2.1"),  # an open quote of the client's takes nothing of the proxy's in
        (("for=_hidden",), None),
        (("for=unknown",), None),
        (("proto=https",), None),
        (("for=192.0.2.1;for=203.0.113.9",), None),
        (("for=192.0.2.1;proto",), None),
        (("192.0.2.1",), None),
        (('for="192.0.2.1',), None),
        (("for=192.0.2.1;x=" + "y" * 60_000,), None),
    ],
)
def test_forwarded(values: tuple[str, ...], expected: str | None) -> None:
    assert client("10.0.0.1", *values, header="forwarded") == (expected or "10.0.0.1")


def test_only_the_configured_header_counts() -> None:
    """A proxy that writes one passes a client's other one on."""
    both = ((XFF, "192.0.2.1"), (FORWARDED, "for=192.0.2.2"))
    assert settled(trusting(), "10.0.0.1", *both)["client"][0] == "192.0.2.1"
    assert settled(trusting("forwarded"), "10.0.0.1", *both)["client"][0] == "192.0.2.2"
    assert settled(trusting(), "10.0.0.1", both[1])["client"][0] == "10.0.0.1"


@pytest.mark.parametrize("peer", ["192.0.2.7", "11.0.0.1", "::1", "nonsense", None])
def test_others_are_not_believed(peer: str | None) -> None:
    for header in ("x-forwarded-for", "forwarded"):
        settings = trusting(header)
        scope = settled(settings, peer, (XFF, "1.2.3.4"), (PROTO, "https"), (FORWARDED, "for=1.2.3.4;proto=https"))
        assert scope == {"client": peer and (peer, 4711), "scheme": "http", "headers": []}


def test_a_peer_may_have_its_ipv4_address_inside_ipv6() -> None:
    """As on a socket that listens to both. It is one client, however it came."""
    assert client("::ffff:10.0.0.1", "192.0.2.1") == "192.0.2.1"
    assert client("::ffff:192.0.2.7") == "192.0.2.7"


@pytest.mark.parametrize(
    ("value", "scheme"),
    [("https", "https"), ("HTTPS", "https"), ("https, http", "http"), ("http, https", "https"), ("ftp", "http"), ("", "http")],
)
def test_the_scheme(value: str, scheme: str) -> None:
    assert settled(trusting(), "10.0.0.1", (PROTO, value))["scheme"] == scheme
    quoted = (FORWARDED, ", ".join(f'for=10.0.0.2;proto="{each.strip()}"' for each in value.split(",")))
    assert settled(trusting("forwarded"), "10.0.0.1", quoted)["scheme"] == scheme


def test_internal_headers_reach_no_handler() -> None:
    kept = [("Host", "x"), ("X-User-Id", "ada"), ("X-Request-Id", "r"), ("Content-Type", "image/png"), ("X-HTTP-Method-Override", "PATCH")]
    internal = ["X-Accel-Redirect", "X-Accel-Buffering", "X-Sendfile", "X-Sendfile-Type", "X-Coffer-File", "X-Real-IP", "X-Original-URL"]
    internal += ["X-Rewrite-URL", "X-HTTP-Method", "X-Method-Override", "X-Forwarded-Host", "X-Forwarded-User", XFF, PROTO, FORWARDED]
    for peer in ("10.0.0.1", "192.0.2.7"):
        scope = settled(trusting(), peer, *kept, *((name, "1.2.3.4") for name in internal))
        assert scope["headers"] == [(name.lower().encode(), value.encode()) for name, value in kept]


@pytest.mark.parametrize("text", ["10.0.0.1/8", "nonsense", "0.0.0.0/0", "10.0.0.0/8 ::/0", "example.com", "10.0.0.0/33"])
def test_networks_that_are_none(text: str) -> None:
    with pytest.raises(SettingError, match="COFFER_TRUSTED_PROXIES"):
        Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_TRUSTED_PROXIES": text})


def test_networks() -> None:
    loaded = Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8 ::1"})
    assert list(map(str, loaded.trusted_proxies)) == ["127.0.0.1/32", "10.0.0.0/8", "::1/128"]
    with pytest.raises(SettingError, match="COFFER_PROXY_HEADER: say x-forwarded-for or forwarded"):
        Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_PROXY_HEADER": "x-real-ip"})


# Over HTTP: the log tells whom the server saw


def logged_client(server: RunningServer, request_id: str, headers: dict[str, str]) -> tuple[str, bool]:
    """The address in the log, and whether the server took the request for one by TLS."""
    answer = httpx.get(f"{server.url}/health/live", headers={"X-Request-Id": request_id, **headers})
    assert answer.status_code == 200
    (line,) = until(lambda: [json.loads(line) for line in server.logged().splitlines() if f'"{request_id}"' in line])
    return line["client"], "strict-transport-security" in answer.headers


CLAIMS = {XFF: "192.0.2.1", PROTO: "https", FORWARDED: "for=192.0.2.2;proto=https", "X-Real-IP": "192.0.2.3"}


def test_without_trusted_proxies_nobody_is_believed(server: RunningServer) -> None:
    """Loopback neither, which uvicorn by itself would believe."""
    assert logged_client(server, "claims", CLAIMS) == ("127.0.0.1", False)


def test_a_trusted_proxy_is_believed(start_server: ServerFactory) -> None:
    server = start_server(COFFER_TRUSTED_PROXIES="127.0.0.0/8")
    assert logged_client(server, "claims", CLAIMS) == ("192.0.2.1", True)
    assert logged_client(server, "spoofed", {XFF: "203.0.113.9, 192.0.2.1"}) == ("192.0.2.1", False)
    assert logged_client(server, "malformed", {XFF: "nonsense"}) == ("127.0.0.1", False)
    assert logged_client(server, "silent", {}) == ("127.0.0.1", False)


def test_nobody_makes_the_server_send_an_internal_header(start_server: ServerFactory) -> None:
    """nginx would obey it and hand out any file below an internal location."""
    server = start_server(COFFER_TRUSTED_PROXIES="127.0.0.1")
    lure = "x\r\nX-Accel-Redirect: /etc/passwd"
    claims = {"X-Accel-Redirect": "/etc/passwd", "X-Sendfile": "/etc/passwd", "X-Coffer-File": "x"}
    answers = []
    with server.client("ada") as ada:
        ada.headers.update(claims)
        answers += [
            ada.post("/api/files/upload", params={"name": name}, content=image(seed=seed)) for seed, name in enumerate((lure, "x.png"))
        ]
        file_id = answers[-1].json()["id"]
        answers.append(
            ada.patch(f"/api/files/{file_id}", json={"metadata": {"X-Accel-Redirect": lure}, "file_name": "X-Accel-Redirect: x"})
        )
        answers.append(ada.get(f"/api/files/{file_id}/download"))
        linked = ada.post(f"/api/files/{file_id}/link", json={"name": 'x"; X-Accel-Redirect: y'})
        answers += [linked, ada.get(linked.json()["url"]), ada.get("/api/files", params={lure: lure}), ada.get(f"/f/{quote(lure)}")]
        answers.append(ada.get("/health/live", headers={"X-Request-Id": "X-Accel-Redirect: x"}))
    assert [answer.status_code for answer in answers] == [400, 201, 200, 200, 200, 200, 400, 403, 200]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith(("x-accel", "x-sendfile", "x-coffer"))]
