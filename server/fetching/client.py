"""The client. On httpcore, the layer below httpx: it has no cookies, no redirects, no proxies from the environment, no decompression and no
credentials, so there is nothing to switch off (server/decisions/0025-fetching.md).

Each request resolves its host once, has every address judged, and connects to one of those addresses and nothing else. TLS and the
certificate are still those of the name.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address

import httpcore
import httpx

from server.fetching.rules import Address, Rules, Target

MOST_REDIRECTS = 5
RESOLVE_SECONDS = 10.0
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""A peer that takes or sends nothing for so long is given up."""

Resolve = Callable[[str, int], Awaitable[list[Address]]]
"""All addresses of a host. Raises OSError."""

_FOR_EVERYBODY = {"range", "if-range"}
_REDIRECTS = {301, 302, 303, 307, 308}
_USER_AGENT = "Coffer"


class FetchFailed(Exception):
    """A fetch came to nothing. `reason` is one stable word; `may_pass`: trying again later may help.

    Reasons: `resolve`, `connect`, `tls`, `timeout`, `protocol` (no HTTP), `interrupted`, `changed` (the bytes, while they were fetched),
    `too_large`, `too_slow`, `unbounded` (without length and chunks, so that a cut looks like its end), `encoded` (compressed, which was not
    asked for), `redirects` (too many), `status_404` and the like.
    """

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer, and its body as it comes. Header names are in lower case; of a repeated header the first counts."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


async def resolve(host: str, port: int) -> list[Address]:
    """By the system's resolver, /etc/hosts included."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(each[4][0]) for each in found))


class Fetcher:
    """One per process. Lives in one event loop; keeps no connection, and nothing of one request for the next."""

    def __init__(self, rules: Rules, *, resolve: Resolve = resolve) -> None:
        self.rules = rules
        self._resolve = resolve
        self._tls: ssl.SSLContext | None = None

    @asynccontextmanager
    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None, redirects: int = MOST_REDIRECTS
    ) -> AsyncIterator[Answer]:
        """The answer, whatever its status, after at most so many redirects, each judged as the first URL was.

        `headers`, but those of ranges, are left behind when a redirect leads to another host. Nothing is to be sent twice, so with a body
        pass no redirects: a redirect is the answer then. Bound its time with `asyncio.timeout`. Raises `UrlRefused` and `FetchFailed`, also
        from the body.
        """
        target = self.rules.read(url)
        given = dict(headers or {})
        for hop in range(redirects + 1):
            async with self._exchange(method, target, given, body) as answer:
                location = answer.headers.get("location")
                if not redirects or answer.status not in _REDIRECTS or location is None:
                    yield answer
                    return
            if hop == redirects:
                raise FetchFailed("redirects", may_pass=False)
            following = self.rules.redirected(target, location)
            if (following.scheme, following.authority) != (target.scheme, target.authority):
                given = {name: value for name, value in given.items() if name.lower() in _FOR_EVERYBODY}
            target = following

    @asynccontextmanager
    async def _exchange(self, method: str, target: Target, headers: Mapping[str, str], body: bytes | None) -> AsyncIterator[Answer]:
        addresses = await self._addresses(target)
        sent = {"host": target.authority, "user-agent": _USER_AGENT, "accept": "*/*", "accept-encoding": "identity", "connection": "close"}
        sent |= {name.lower(): value for name, value in headers.items()}
        if body is not None:
            sent["content-length"] = str(len(body))
        request = httpcore.Request(
            method,
            httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.request_path),
            headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in sent.items()],
            content=body,
            extensions={"timeout": {"connect": CONNECT_SECONDS, "read": SILENCE_SECONDS, "write": SILENCE_SECONDS}},
        )
        tls = self._tls_context() if target.scheme == "https" else None
        async with httpcore.AsyncConnectionPool(ssl_context=tls, network_backend=_Pinned(addresses)) as pool:
            with _translated():
                response = await pool.handle_async_request(request)
            try:
                found: dict[str, str] = {}
                for name, value in response.headers:
                    found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
                yield Answer(target.url, response.status, found, _pieces(response))
            finally:
                await response.aclose()

    async def _addresses(self, target: Target) -> list[Address]:
        try:
            literal = [ip_address(target.host)]
        except ValueError:
            literal = []
        if literal:
            addresses = literal
        else:
            try:
                async with asyncio.timeout(RESOLVE_SECONDS):
                    addresses = await self._resolve(target.host, target.port)
            except (OSError, UnicodeError) as problem:  # TimeoutError is an OSError
                raise FetchFailed("resolve", may_pass=True) from problem
        if not addresses:
            raise FetchFailed("resolve", may_pass=True)
        self.rules.check(target, addresses)
        return addresses

    def _tls_context(self) -> ssl.SSLContext:
        """Reads the machine's certificates, or those of SSL_CERT_FILE, once: that takes 20 ms."""
        if self._tls is None:
            self._tls = httpx.create_ssl_context()
        return self._tls


async def _pieces(response: httpcore.Response) -> AsyncIterator[bytes]:
    with _translated(in_body=True):
        async for chunk in response.aiter_stream():
            yield chunk


@contextmanager
def _translated(*, in_body: bool = False) -> Iterator[None]:
    """What httpcore raises, in our words. What it has translated itself is its error's argument; the chain of causes is cut by its pool."""
    try:
        yield
    except httpcore.TimeoutException as problem:
        raise FetchFailed("timeout", may_pass=True) from problem
    except httpcore.ConnectError as problem:
        is_tls = isinstance(_first(problem), ssl.SSLError)
        raise FetchFailed("tls" if is_tls else "connect", may_pass=not is_tls) from problem
    except (httpcore.NetworkError, ssl.SSLError) as problem:
        raise FetchFailed("interrupted", may_pass=True) from problem
    except httpcore.ProtocolError as problem:
        # An end in the middle of a body is one of these, too, and an end before any answer, which httpcore tells in words of its own.
        if in_body or isinstance(_first(problem), str):
            raise FetchFailed("interrupted", may_pass=True) from problem
        raise FetchFailed("protocol", may_pass=False) from problem


def _first(problem: Exception) -> object:
    return problem.args[0] if problem.args else None


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to these addresses alone, whatever host is asked for."""

    def __init__(self, addresses: Iterable[Address]) -> None:
        self._addresses = list(addresses)
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """To the first of the addresses that takes the connection."""
        del host
        for address in self._addresses[:-1]:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._backend.connect_tcp(str(address), port, timeout, local_address, socket_options)
        return await self._backend.connect_tcp(str(self._addresses[-1]), port, timeout, local_address, socket_options)
