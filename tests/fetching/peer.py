"""Somebody else's web server, which does what a test tells it to, and counts who comes."""

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Say = Callable[[bytes], Awaitable[None]]
Answering = Callable[["Asked", Say], Awaitable[None]]


class Asked:
    """A request as it came, with its headers in lower case."""

    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = first.split(" ")
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        self.body = body


class Peer:
    """Listens while it is entered. `connections` counts those that were made, `asked` keeps what they asked for."""

    def __init__(self, answering: Answering, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.answering = answering
        self.connections = 0
        self.asked: list[Asked] = []
        self.port = port
        self._where = host, port
        self._tls = tls
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "Peer":
        self._server = await asyncio.start_server(self._serve, *self._where, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://{self._where[0]}:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)

        async def say(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n")
            asked = Asked(head, b"")
            asked.body = await reader.readexactly(int(asked.headers.get("content-length", "0")))
            self.asked.append(asked)
            await self.answering(asked, say)
        writer.close()


def head(status: int = 200, **headers: str | int) -> bytes:
    """The head of an answer; `_` in names is a hyphen."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode("latin-1")


def always(status: int = 200, body: bytes = b"", **headers: str | int) -> Answering:
    """The same for everybody."""

    async def answer(asked: Asked, say: Say) -> None:
        await say(head(status, content_length=len(body), **headers) + (b"" if asked.method == "HEAD" else body))

    return answer


def ranged(body: bytes, etag: str = '"one"', *, cut_after: int | None = None) -> Answering:
    """Bytes with ranges as RFC 9110 has them. Each answer but one of the last `cut_after` bytes is cut after so many."""

    async def answer(asked: Asked, say: Say) -> None:
        start = 0
        if "range" in asked.headers and asked.headers.get("if-range", etag) == etag:
            start = int(asked.headers["range"].removeprefix("bytes=").partition("-")[0])
        part = body[start:]
        facts: dict[str, str | int] = {"content_length": len(part), "etag": etag}
        if start:
            facts["content_range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        await say(head(206 if start else 200, **facts) + (part if cut_after is None else part[:cut_after]))

    return answer


class Authority:
    """Who vouches for the names of tests: `file` is its certificate."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority of tests")])
        self.file = directory / "authority.pem"
        self.file.write_bytes(self._certificate(self._name, self._key.public_key(), is_authority=True).public_bytes(Encoding.PEM))

    def server(self, name: str) -> ssl.SSLContext:
        """For a server of that name, or of that IPv4 address."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), names=[name])
        file = self._directory / f"{name}.pem"
        file.write_bytes(certificate.public_bytes(Encoding.PEM) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, is_authority: bool = False, names: list[str] | None = None
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            self._name, subject, key, x509.random_serial_number(), now - timedelta(hours=1), now + timedelta(hours=1)
        ).add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(
                    [x509.IPAddress(IPv4Address(each)) if each[0].isdigit() else x509.DNSName(each) for each in names]
                ),
                critical=False,
            )
        return builder.sign(self._key, hashes.SHA256())


@asynccontextmanager
async def listening(*hosts: str) -> AsyncIterator[tuple[int, list[Peer]]]:
    """Internal services at these addresses, all at one port, which nobody may reach. Gives the port and the peers, which count."""
    peers: list[Peer] = []
    port = 0
    try:
        for host in hosts:
            peer = await Peer(always(200, b"secret"), host, port).__aenter__()
            peers.append(peer)
            port = peer.port
        yield port, peers
    finally:
        for peer in peers:
            await peer.__aexit__()


@contextmanager
def in_thread(peer: Peer) -> Iterator[Peer]:
    """A peer for tests that do not await: it listens in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(peer.__aenter__(), loop).result(30)
        try:
            yield peer
        finally:
            asyncio.run_coroutine_threadsafe(peer.__aexit__(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
