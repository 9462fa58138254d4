"""9: URLs that lead inward: no packet reaches an internal address, whatever the URL, its name or its redirects say. No body is too much.

The internet is played by 127.0.0.2, which is permitted explicitly where a part needs it; every other address of loopback is internal.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import httpx

from server.errors import UrlRefused
from server.fetching import Download, Fetcher, FetchFailed, Rules
from server.fetching.rules import Address
from server.generation.messages import is_fetchable
from tests.attack.target import Tally, Target
from tests.fetching.peer import Asked, Peer, Say, always, head, in_thread
from tests.generation.speaking import NEW_SECRET, status, tell
from tests.serving import RunningServer
from tests.waiting import until
from tests.working import working

OUTSIDE = "127.0.0.2"
INTERNAL = ("127.0.0.1", "127.0.0.3", "::1")
FETCHER = "fetcher"  # a user of this attack alone: for others' uploads, bytes are reserved, and given back at any time
NETWORKS = {"COFFER_FETCH_PRIVATE_NETWORKS": f"{OUTSIDE}/32"}
MOST_BYTES_SENT = 32 * 2**20  # of an endless body, whose file may have 6 MiB: what a socket's buffers hold comes on top
_ADDRESSES = ("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1", "0.0.0.0", "224.0.0.1")


def attack(target: Target, tally: Tally) -> str:
    with ExitStack() as stack:
        port = 0
        internal = []
        for host in INTERNAL:
            peer = stack.enter_context(in_thread(Peer(always(200, b"secret"), host, port)))
            port = peer.port
            internal.append(peer)
        tried = _at_the_door(target, tally, port)
        names = _by_name(target, tally, port)
        redirects, sent = _from_outside(target, tally, port)
        rebound = asyncio.run(_rebinding(target, tally, port))
        for peer in internal:
            tally.check(peer.connections == 0, f"{peer.url} was connected to {peer.connections} times")
    return (
        f"0 connections inward by {tried} URLs at the door, {names} names, {redirects} redirects, {rebound} names that rebind; "
        f"{sent / 2**20:.0f} MiB of an endless body taken"
    )


def encoded(address: str, port: int) -> Iterator[str]:
    """Hosts that some reader takes for this IPv4 address."""
    number = int(IPv4Address(address))
    a, b, c, d = (int(each) for each in address.split("."))
    words = f"{number >> 16:x}:{number & 0xFFFF:x}"
    for host in (
        address,
        f"{number}",
        f"0x{number:x}",
        f"0{number:o}",
        f"0x{a:x}.0x{b:x}.0x{c:x}.0x{d:x}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"{a}.{b * 65536 + c * 256 + d}",
        f"{a}.{b}.{c * 256 + d}",
        f"0x{a:x}.{b * 65536 + c * 256 + d}",
        f"{a:03}.{b:03}.{c:03}.{d:03}",
        f"{address}.",
        f"[::ffff:{address}]",
        f"[::ffff:{words}]",
        f"[::{address}]",
        f"[64:ff9b::{words}]",
        f"[64:ff9b:1::{words}]",
        f"[2002:{words}::]",
        f"[2001:0:{words}::1]",
        f"[fe80::{words}%25lo]",
        f"[fd00::{words}]",
        f"[fec0::{words}]",
        address.replace(".", "\u3002"),
        address.translate({ord(digit): 0xFF10 + int(digit) for digit in "0123456789"}),
        f"example.com@{address}",
        f"{address}%00.example.com",
        f"{address}\\.example.com",
    ):
        yield f"{host}:{port}"
        yield host


def _at_the_door(target: Target, tally: Tally, port: int) -> int:
    hosts = target.some([host for address in _ADDRESSES for host in encoded(address, port)], 60)
    asset = target.ada.post("/api/assets/link", json={"url": "https://app.example.com/a"}).json()
    for host in [*hosts, "[::1]", "[::]"]:
        for scheme in ("http", "https"):
            body = {"url": f"{scheme}://{host}/latest/meta-data/"}
            for method, path in (("POST", "/api/assets/link"), ("PUT", f"/api/assets/{asset['id']}/replace"), ("POST", "/api/webhooks")):
                answer = target.ada.request(method, path, json=body)
                tally.check((answer.status_code, answer.json().get("code")) == (400, "url_refused"), f"{path} {body}: {answer.text[:100]}")
            wish = {"outputs": [{"max_bytes": 10}], "callback": body | {"secret": NEW_SECRET}}
            answer = target.ada.post("/api/generate", json=wish)
            tally.check((answer.status_code, answer.json().get("code")) == (400, "url_refused"), f"callback {body}: {answer.text[:100]}")
    for url in (
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "dict://127.0.0.1:11211/",
        "ftp://127.0.0.1/",
        "https://app.example.com:6379/\r\nSET",
    ):
        answer = target.ada.post("/api/assets/link", json={"url": url})
        tally.check(answer.status_code == 400, f"{url}: {answer.status_code}")
    target.ada.delete(f"/api/assets/{asset['id']}")
    return len(hosts) * 8


def _by_name(target: Target, tally: Tally, port: int) -> int:
    """Names whose addresses are internal, which only the worker finds out."""
    names = ("localhost", "LOCALHOST", "ip6-localhost", "localhost.localdomain")
    # Not every machine has all of these names, and one without an address might have one later.
    with working(target.server, target.scratch / "fetching-worker.log", COFFER_FETCH_SECONDS="1"):
        hooks = [target.ada.post("/api/webhooks", json={"url": f"https://{name}:{port}/"}).json() for name in names]
        target.upload(target.ada)
        for name in names:
            asset = _imported(target.ada, f"https://{name}:{port}/")
            told = asset["state"], asset["reason"] in ("refused", "resolve"), asset["import_state"]
            tally.check(told == ("unreachable", True, "failed"), f"{name}: {asset}")
        for hook in hooks:
            failed = until(lambda path=f"/api/webhooks/{hook['id']}": target.ada.get(path).json()["last_failure"])  # type: ignore[misc]
            tally.check(failed in ("refused", "resolve"), f"a webhook to {hook['url']}: {failed}")
            target.ada.delete(f"/api/webhooks/{hook['id']}")
    return len(names)


def _from_outside(target: Target, tally: Tally, port: int) -> tuple[int, int]:
    """Redirects inward, and bodies that are too much, from a server that may be fetched from."""
    locations = [
        f"http://{host}/" for address in ("127.0.0.1", "127.0.0.3") for host in encoded(address, port) if host.endswith(f":{port}")
    ]
    locations = [each for each in locations if each.isascii()]
    locations += [
        f"http://localhost:{port}/",
        f"//127.0.0.1:{port}/",
        f"http://[::1]:{port}/",
        f"https://127.0.0.1:{port}/",
        "file:///etc/passwd",
    ]
    locations = target.some(locations, 12)
    sent = 0

    async def outside(asked: Asked, say: Say) -> None:
        nonlocal sent
        kind, _, number = asked.path.strip("/").partition("/")
        if kind == "redirect":
            await always(302, location=locations[int(number)])(asked, say)
        elif kind == "loop":
            await always(302, location=f"/loop/{int(number) + 1}")(asked, say)
        elif kind == "endless":
            await say(head(200, transfer_encoding="chunked", content_type="image/png"))
            while True:
                await say(b"10000\r\n" + bytes.fromhex("89504e470d0a1a0a0000000d49484452").ljust(0x10000, b"\0") + b"\r\n")
                sent += 0x10000
        elif kind == "huge":
            await say(head(200, content_length=2**60, content_type="image/png"))
        elif kind == "bomb":
            await say(head(200, content_length=100, content_encoding="gzip", content_type="image/png") + bytes(100))

    with (
        target.another_server(**NETWORKS) as server,
        server.client(FETCHER, timeout=30) as fetcher,
        in_thread(Peer(outside, OUTSIDE)) as peer,
    ):
        with working(server, target.scratch / "outside-worker.log", **NETWORKS):
            for number, location in enumerate(locations):
                asset = _imported(fetcher, f"{peer.url}/redirect/{number}")
                told = asset["reason"], asset["import_reason"]
                tally.check(told == ("refused", "url_refused"), f"a redirect to {location}: {told}")
            for path, reason in (("loop/0", "redirects"), ("endless", "too_large"), ("huge", "too_large"), ("bomb", "encoded")):
                asset = _imported(fetcher, f"{peer.url}/{path}")
                tally.check(asset["import_reason"] == reason, f"{path}: {asset['import_reason']}")
            inward = [f"http://{host}/" for host in encoded("127.0.0.1", port) if is_fetchable(f"http://{host}/")]
            inward += [f"https://localhost:{port}/", *(f"{peer.url}/redirect/{number}" for number in range(len(locations)))]
            _outputs(server, tally, inward, "url_refused")
            _outputs(server, tally, [f"{peer.url}/{path}" for path in ("endless", "huge")], "too_large")
        loops = sum(asked.path.startswith("/loop") for asked in peer.asked)
        tally.check(loops == 12, f"{loops} requests for a redirect without end, looked at once and imported once")
    tally.check(sent < MOST_BYTES_SENT, f"{sent:,} bytes of an endless body were taken")
    with target.user(FETCHER) as fetcher:
        left = fetcher.get("/api/storage/usage").json()["reserved_bytes"]
    tally.check(left == 0, f"{left} bytes stay reserved")
    return len(locations), sent


def _outputs(server: RunningServer, tally: Tally, urls: list[str], reason: str) -> None:
    """A pipeline says that a job's outputs lie there; each must fail for that reason."""
    with server.client(FETCHER) as fetcher, httpx.Client(base_url=server.url) as pipeline:
        job = fetcher.post("/api/generate", json={"outputs": [{"max_bytes": 1_000}] * len(urls)}).json()
        outputs = [{"index": index, "url": url} for index, url in enumerate(urls)]
        answer = tell(pipeline, job, "job.completed", outputs=outputs)
        tally.check(answer.status_code == 200, f"a message of {len(urls)} URLs: {answer.text[:200]}")
        until(lambda: status(fetcher, job["job_id"])["finished_at"], timeout_seconds=120)
        for url, output in zip(urls, status(fetcher, job["job_id"])["outputs"], strict=True):
            told = output["state"], output["reason"]
            tally.check(told == ("failed", reason), f"an output at {url}: {told}")


def _imported(client: httpx.Client, url: str) -> dict[str, Any]:
    """An asset once it was looked at and its import has ended, which is then forgotten."""
    made = client.post("/api/assets/link", json={"url": url})
    assert made.status_code == 201, made.text
    path = f"/api/assets/{made.json()['id']}"
    client.post(f"{path}/import")

    def ended() -> dict[str, Any] | None:
        asset: dict[str, Any] = client.get(path).json()
        return asset if asset["state"] != "unchecked" and asset["import_state"] != "pending" else None

    asset = until(ended)
    assert asset is not None
    client.delete(path)
    return asset


async def _rebinding(target: Target, tally: Tally, port: int) -> int:
    """Names with another address each time that they are looked up, some of them inward."""
    chance = random.Random(9)
    fetcher = Fetcher(Rules(private_networks=(ip_network(f"{OUTSIDE}/32"),)), resolve=lambda host, port: _answers(chance))
    tries = target.many(2_000, 100)
    outcomes = set()
    async with Peer(always(200, b"outside"), OUTSIDE, port):
        for _ in range(tries):
            try:
                async with Download(fetcher, f"http://rebinding.example:{port}/", most_bytes=100) as download:
                    body = b"".join([chunk async for chunk in download.chunks()])
                outcomes.add("outside")
                tally.check(body == b"outside", f"a name that rebinds gave {body!r}")
            except UrlRefused:
                outcomes.add("refused")
            except FetchFailed as problem:
                tally.check(False, f"a name that rebinds: {problem.reason}")
    tally.check(outcomes == {"outside", "refused"}, f"only {outcomes} were met")
    return tries


async def _answers(chance: random.Random) -> list[Address]:
    addresses = [OUTSIDE] * 3 + [*INTERNAL, "::ffff:127.0.0.1"]
    return [ip_address(each) for each in chance.sample(addresses, chance.choice((1, 1, 2)))]
