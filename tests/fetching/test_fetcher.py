"""The client against real servers: what it connects to, how long, and what it makes of cuts. `127.0.0.0/8` is permitted explicitly."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.errors import UrlRefused
from server.fetching import Download, Fetcher, FetchFailed, Rules
from server.fetching import client as client_module
from server.fetching import download as download_module
from server.fetching.rules import Address
from tests.fetching.peer import Asked, Authority, Peer, Say, always, head, listening, ranged

pytestmark = pytest.mark.anyio

OUTSIDE = "127.0.0.2"
"""What is permitted stands here for the internet; all other addresses of loopback are internal."""
RULES = Rules(private_networks=(ip_network(f"{OUTSIDE}/32"),))
BODY = bytes(range(256)) * 1_000


class Names:
    """A resolver that gives each name's answers one after the other, the last for ever. Counts."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self._answers = {name.replace("_", "."): list(each) for name, each in answers.items()}
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[Address]:
        self.asked += 1
        answers = self._answers.get(host)
        if not answers:
            raise OSError("no such name")
        return [ip_address(each) for each in (answers.pop(0) if len(answers) > 1 else answers[0])]


async def fetched(fetcher: Fetcher, url: str, most_bytes: int = 10**7, **options: float) -> bytes:
    async with Download(fetcher, url, most_bytes=most_bytes, first_pause_seconds=0, **options) as download:  # type: ignore[arg-type]
        return b"".join([chunk async for chunk in download.chunks()])


async def reason_of(fetcher: Fetcher, url: str, most_bytes: int = 10**7) -> str:
    with pytest.raises((FetchFailed, UrlRefused)) as caught:
        await fetched(fetcher, url, most_bytes)
    return caught.value.reason if isinstance(caught.value, FetchFailed) else "refused"


@pytest.fixture
async def internal() -> AsyncIterator[tuple[int, list[Peer]]]:
    async with listening("127.0.0.1", "127.0.0.3", "::1") as (port, peers):
        yield port, peers
        assert [peer.connections for peer in peers] == [0, 0, 0]


async def test_a_whole_body(tmp_path: Path) -> None:
    async with Peer(ranged(BODY), OUTSIDE) as peer:
        assert await fetched(Fetcher(RULES), f"{peer.url}/a?b") == BODY
    (asked,) = peer.asked
    assert (asked.method, asked.path, asked.headers["accept-encoding"]) == ("GET", "/a?b", "identity")
    assert asked.headers["host"] == peer.url.removeprefix("http://")
    assert not {"cookie", "authorization", "referer", "range"} & asked.headers.keys()


async def test_nothing_is_connected_to_that_is_not_permitted(internal: tuple[int, list[Peer]]) -> None:
    port, _ = internal
    fetcher = Fetcher(RULES)
    for host in ("127.0.0.1", "127.0.0.3", "[::1]", "[::ffff:127.0.0.1]", "127.1", "0x7f.1", "2130706433", "localhost", "0.0.0.0", "[::]"):
        for scheme in ("http", "https"):
            assert await reason_of(fetcher, f"{scheme}://{host}:{port}/") == "refused", host


async def test_redirects_to_internal_addresses_are_refused(internal: tuple[int, list[Peer]]) -> None:
    port, _ = internal
    for host in ("127.0.0.1", "[::1]", "[::ffff:7f00:1]", "127.1", "localhost", "user@127.0.0.1"):
        async with Peer(always(302, location=f"http://{host}:{port}/"), OUTSIDE) as peer:
            assert await reason_of(Fetcher(RULES), peer.url) == "refused", host
            assert peer.connections == 1


async def test_names_that_rebind(internal: tuple[int, list[Peer]]) -> None:
    port, _ = internal
    # Permitted when it is looked at, internal when it is looked at again: it is looked at once, and that answer is connected to.
    names = Names(
        rebinding_example=[[OUTSIDE], ["127.0.0.1"]], mixed_example=[[OUTSIDE, "127.0.0.1"]], mapped_example=[["::ffff:127.0.0.1"]]
    )
    fetcher = Fetcher(RULES, resolve=names)
    async with Peer(ranged(BODY), OUTSIDE, port) as peer:
        assert await fetched(fetcher, f"http://rebinding.example:{port}/") == BODY
        assert names.asked == 1
        for host in ("rebinding", "mixed", "mapped"):
            assert await reason_of(fetcher, f"http://{host}.example:{port}/") == "refused"
        assert peer.connections == 1


async def test_a_name_that_rebinds_between_a_cut_and_the_rest(internal: tuple[int, list[Peer]]) -> None:
    port, _ = internal
    fetcher = Fetcher(RULES, resolve=Names(rebinding_example=[[OUTSIDE], ["127.0.0.1"]]))
    async with Peer(ranged(BODY, cut_after=1_000), OUTSIDE, port):
        assert await reason_of(fetcher, f"http://rebinding.example:{port}/") == "refused"


async def test_a_name_without_an_address() -> None:
    assert await reason_of(Fetcher(RULES, resolve=Names()), "https://nobody.example/") == "resolve"
    assert await reason_of(Fetcher(RULES, resolve=Names(empty_example=[[]])), "https://empty.example/") == "resolve"


async def test_the_second_address_when_nobody_is_at_the_first() -> None:
    rules = Rules(private_networks=(ip_network("127.0.0.0/8"),))
    async with Peer(ranged(BODY), OUTSIDE) as peer:
        fetcher = Fetcher(rules, resolve=Names(two_example=[["127.0.0.9", OUTSIDE]]))
        assert await fetched(fetcher, f"http://two.example:{peer.port}/") == BODY
    assert await reason_of(fetcher, f"http://two.example:{peer.port}/") == "connect"


async def test_redirects_are_followed_and_counted() -> None:
    async def answer(asked: Asked, say: Say) -> None:
        left = int(asked.path[1:])
        await say(head(302, location=f"/{left - 1}", content_length=0) if left else head(200, content_length=2) + b"ok")

    async with Peer(answer, OUTSIDE) as peer:
        assert await fetched(Fetcher(RULES), f"{peer.url}/5") == b"ok"
        assert await reason_of(Fetcher(RULES), f"{peer.url}/6") == "redirects"


async def test_headers_for_a_host_are_not_told_to_another() -> None:
    secret = {"Authorization": "Bearer secret"}
    async with (
        Peer(ranged(BODY), OUTSIDE) as second,
        Peer(always(307, location=f"{second.url}/b"), OUTSIDE) as first,
        Download(Fetcher(RULES), first.url, most_bytes=10**7, headers=secret) as download,
    ):
        assert download.url == f"{second.url}/b"
    assert first.asked[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in second.asked[0].headers


async def test_the_environment_is_not_asked_for_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Peer(always(200), "127.0.0.1") as proxy, Peer(ranged(BODY), OUTSIDE) as peer:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert await fetched(Fetcher(RULES), peer.url) == BODY
        assert proxy.connections == 0


async def test_certificates_are_those_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    names = Names(files_example=[[OUTSIDE]], other_example=[[OUTSIDE]])
    async with Peer(ranged(BODY), OUTSIDE, tls=authority.server("files.example")) as peer:
        stranger = Fetcher(RULES, resolve=names)
        assert await reason_of(stranger, f"https://files.example:{peer.port}/") == "tls"
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        fetcher = Fetcher(RULES, resolve=names)
        assert await fetched(fetcher, f"https://files.example:{peer.port}/") == BODY
        assert await reason_of(fetcher, f"https://other.example:{peer.port}/") == "tls"
        assert await reason_of(fetcher, f"https://{OUTSIDE}:{peer.port}/") == "tls"


async def test_a_cut_body_goes_on_where_it_was() -> None:
    async with Peer(ranged(BODY, cut_after=100_000), OUTSIDE) as peer:
        assert hashlib.sha256(await fetched(Fetcher(RULES), peer.url)).digest() == hashlib.sha256(BODY).digest()
    assert [asked.headers.get("range") for asked in peer.asked] == [None, "bytes=100000-", "bytes=200000-"]
    assert {asked.headers.get("if-range") for asked in peer.asked[1:]} == {'"one"'}


async def test_a_cut_body_goes_on_behind_a_redirect_to_another_host() -> None:
    async with Peer(ranged(BODY, cut_after=200_000), OUTSIDE) as second, Peer(always(302, location=f"{second.url}/b"), OUTSIDE) as first:
        assert await fetched(Fetcher(RULES), first.url) == BODY
    assert [asked.headers.get("range") for asked in second.asked] == [None, "bytes=200000-"]


async def test_only_strong_validators_are_gone_on_with() -> None:
    for etag in ('W/"one"', "one", ""):
        async with Peer(ranged(BODY, etag, cut_after=1_000), OUTSIDE) as peer:
            assert await reason_of(Fetcher(RULES), peer.url) == "interrupted"
            assert peer.connections == 1, etag


async def test_bytes_that_change_meanwhile_are_noticed() -> None:
    for change in ("another etag", "another length", "another place", "all of it again"):
        async with Peer(ranged(BODY, cut_after=1_000), OUTSIDE) as peer:
            first = peer.answering

            async def answer(asked: Asked, say: Say, change: str = change, first: object = first) -> None:
                if "range" not in asked.headers:
                    await first(asked, say)  # type: ignore[operator]
                    return
                start, size, etag = 1_000, len(BODY), '"one"'
                match change:
                    case "another etag":
                        etag = '"two"'
                    case "another length":
                        size += 1
                    case "another place":
                        start -= 1
                    case _:
                        await say(head(200, content_length=size, etag='"two"') + BODY)
                        return
                facts: dict[str, str | int] = {
                    "content_range": f"bytes {start}-{size - 1}/{size}",
                    "content_length": size - start,
                    "etag": etag,
                }
                await say(head(206, **facts) + BODY[start:])

            peer.answering = answer
            assert await reason_of(Fetcher(RULES), peer.url) == "changed", change


async def test_a_server_that_never_gets_further_is_given_up() -> None:
    async with Peer(ranged(BODY, cut_after=1_000), OUTSIDE) as peer:
        first = peer.answering

        async def answer(asked: Asked, say: Say) -> None:
            if "range" in asked.headers:
                await say(head(503, content_length=0))
            else:
                await first(asked, say)

        peer.answering = answer
        assert await reason_of(Fetcher(RULES), peer.url) == "interrupted"
        assert peer.connections == 6


async def test_sizes_are_capped_before_and_while_they_come() -> None:
    async def endless(asked: Asked, say: Say) -> None:
        await say(head(transfer_encoding="chunked"))
        while True:
            await say(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    async with Peer(ranged(BODY), OUTSIDE) as peer:
        assert await reason_of(Fetcher(RULES), peer.url, len(BODY) - 1) == "too_large"
        assert await fetched(Fetcher(RULES), peer.url, len(BODY)) == BODY
    async with Peer(endless, OUTSIDE) as peer:
        assert await reason_of(Fetcher(RULES), peer.url, 10**6) == "too_large"


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity", "x-bomb"])
async def test_compressed_answers_are_not_taken(encoding: str) -> None:
    async with Peer(always(200, b"bomb", content_encoding=encoding), OUTSIDE) as peer:
        assert await reason_of(Fetcher(RULES), peer.url) == "encoded"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nno end can be told", "unbounded"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "protocol"),
        (b"", "interrupted"),
        (head(404, content_length=0), "status_404"),
        (head(204), "status_204"),
        (head(302, content_length=0), "status_302"),
        (head(200, content_length=10) + b"five!", "interrupted"),
    ],
)
async def test_answers_that_are_none(said: bytes, reason: str) -> None:
    async def answer(asked: Asked, say: Say) -> None:
        await say(said)

    async with Peer(answer, OUTSIDE) as peer:
        assert await reason_of(Fetcher(RULES), peer.url) == reason


async def test_who_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_SECONDS", 0.05)
    hanging = asyncio.Event()

    async def silent(asked: Asked, say: Say) -> None:
        if asked.path == "/body":
            await say(head(content_length=10) + b"five!")
        await hanging.wait()

    async with Peer(silent, OUTSIDE) as peer:
        assert await reason_of(Fetcher(RULES), f"{peer.url}/head") == "timeout"
        assert await reason_of(Fetcher(RULES), f"{peer.url}/body") == "timeout"
        hanging.set()


async def test_who_trickles_is_given_up() -> None:
    async def trickling(asked: Asked, say: Say) -> None:
        await say(head(content_length=1_000))
        while True:
            await say(b".")
            await asyncio.sleep(0.01)

    async with Peer(trickling, OUTSIDE) as peer:
        with pytest.raises(FetchFailed, match="too_slow"):
            await fetched(Fetcher(RULES), peer.url, pace_seconds=0.1)


async def test_a_pace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(download_module, "asyncio", SimpleNamespace(sleep=pause))
    monkeypatch.setattr(download_module, "time", SimpleNamespace(monotonic=lambda: 7.0))  # where it stands still, all is ahead
    async with Peer(ranged(BODY), OUTSIDE) as peer:
        assert await fetched(Fetcher(RULES), peer.url, most_bytes_per_second=len(BODY) // 4) == BODY
    assert pauses == sorted(pauses) and pauses[-1] == 4.0
