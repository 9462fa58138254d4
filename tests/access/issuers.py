"""Issuers of user tokens for tests: real keys, and real JWKS on a loopback port."""

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

APP = "https://app.example.com"


class SigningKey:
    """A key pair of an issuer. RSA keys take a while to make: share them."""

    def __init__(self, algorithm: str, kid: str, *, rsa_bits: int = 2048) -> None:
        self.algorithm = algorithm
        self.kid = kid
        self.private: Any
        if algorithm == "RS256":
            self.private = rsa.generate_private_key(65537, rsa_bits)
        elif algorithm == "ES256":
            self.private = ec.generate_private_key(ec.SECP256R1())
        else:
            self.private = ed25519.Ed25519PrivateKey.generate()

    def jwk(self, **members: Any) -> dict[str, Any]:
        """The public half, as an issuer publishes it."""
        jwk: dict[str, Any] = get_default_algorithms()[self.algorithm].to_jwk(self.private.public_key(), as_dict=True)
        return jwk | {"kid": self.kid, "alg": self.algorithm, "use": "sig"} | members

    def private_member(self) -> str:
        """What makes a JWK a private key."""
        return str(get_default_algorithms()[self.algorithm].to_jwk(self.private, as_dict=True)["d"])

    def pem(self) -> bytes:
        pem: bytes = self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return pem

    def sign(self, claims: dict[str, Any], **headers: Any) -> str:
        """A token with any claims and further headers: a library for tokens would refuse to make many of them."""
        return self.sign_texts(json.dumps({"alg": self.algorithm, "kid": self.kid} | headers), json.dumps(claims))

    def sign_texts(self, header: str, claims: str) -> str:
        """A good signature over any two texts."""
        signed = f"{part(header)}.{part(claims)}"
        signature = get_default_algorithms()[self.algorithm].sign(signed.encode(), self.private)
        return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def part(text: str) -> str:
    """One part of a token."""
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


class Issuer:
    """An OIDC issuer's JWKS. Counts how often it is fetched, and can answer anything else, or be down."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys = list(keys)
        self.fetches = 0
        self.answer: Callable[[BaseHTTPRequestHandler], None] = self._publish
        self._server: ThreadingHTTPServer | None = None
        self._address = ("127.0.0.1", 0)
        self.up()

    @property
    def url(self) -> str:
        return f"http://{self._address[0]}:{self._address[1]}"

    @property
    def jwks_url(self) -> str:
        return f"{self.url}/.well-known/jwks.json"

    def up(self) -> None:
        """Listens, on the same port as before."""
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                issuer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(self._address, Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._address = ("127.0.0.1", self._server.server_port)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def down(self) -> None:
        """Nobody listens any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Those of a good token, with changes; None leaves a claim out."""
        now = int(time.time())
        claims = {"iss": self.url, "sub": "user_2abc", "iat": now, "exp": now + 300, "azp": APP} | changes
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, **changes: Any) -> str:
        return self.keys[0].sign(self.claims(**changes))

    def _publish(self, handler: BaseHTTPRequestHandler) -> None:
        reply(handler, json.dumps({"keys": [key.jwk() for key in self.keys]}).encode())


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """Answers a request; `_` in the names of headers is `-`."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def listener() -> Iterator[tuple[str, Callable[[], bool]]]:
    """The URL of a port where nobody should call, and whether somebody has."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)

        def called() -> bool:
            try:
                listening.accept()
            except BlockingIOError:
                return False
            return True

        yield f"http://127.0.0.1:{listening.getsockname()[1]}/keys.json", called
