"""The public keys that an issuer signs user tokens with: fetched from its JWKS (RFC 7517), or read from a file.

Only `jwks_url` of the settings is ever fetched, never anything that a token names.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from jwt.algorithms import Algorithm, get_default_algorithms
from jwt.exceptions import PyJWTError

from server.errors import TokenKeysUnavailable
from server.setting_values import TokenIssuer
from server.settings import SettingError

FRESH_SECONDS = 300.0
"""Age at which keys are fetched anew while the old ones serve on. So long does a key serve that its issuer has withdrawn."""
FETCH_SECONDS = 5.0
"""Longest fetch, all of it. A request with an unknown key waits for it; the others do not."""
LARGEST_JWKS_BYTES = 128 * 1024
"""An issuer with 20 keys of 4,096 bits and their certificates sends some 60 KB."""
MOST_KEYS = 100

Key = Any
"""A public key as PyJWT takes it."""
Keys = dict[tuple[str | None, str], Key]
"""Keys by `kid`, where they have one, and algorithm."""

log = logging.getLogger("coffer.auth")

_ALGORITHMS: dict[str, Algorithm] = get_default_algorithms()


class TokenKeys(Protocol):
    """Where an issuer's keys come from."""

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        """The key for a token's `kid` and `alg`, which the issuer's settings allow. It suits that algorithm. None: unknown.

        Raises `TokenKeysUnavailable` when no key of the issuer is known at all.
        """
        ...


class FileKeys:
    """Public keys in a file, read once: for issuers that cannot be reached.

    The file is a JWKS, or one key as PEM, for which a token's `kid` is not looked at.
    """

    def __init__(self, issuer: TokenIssuer) -> None:
        """Raises `SettingError` for a file that cannot be read, or holds no public key for the algorithms."""
        where = f"COFFER_TOKEN_ISSUERS: public_key_file of {issuer.issuer}"
        try:
            with Path(issuer.public_key_file or "").open("rb") as file:
                data = file.read(LARGEST_JWKS_BYTES)
        except (OSError, ValueError) as problem:
            raise SettingError(f"{where} cannot be read: {problem}") from None
        if b"PRIVATE KEY" in data:
            raise SettingError(f"{where} holds a private key, which does not belong here")
        self._is_jwks = data.lstrip().startswith(b"{")
        try:
            self._keys = _parsed(data, issuer.algorithms) if self._is_jwks else _parsed_pem(data, issuer.algorithms)
        except (ValueError, msgspec.DecodeError) as problem:
            raise SettingError(f"{where}: {problem}") from None

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        return _look_up(self._keys, kid if self._is_jwks else None, algorithm)


class JwksKeys:
    """The keys that an issuer publishes at `jwks_url`. Lives in one event loop.

    They are fetched anew in the background when they are no longer fresh, and at once for a key that is not among them;
    both at most once per `refetch_seconds`, and never twice at a time. While the issuer fails, the last keys serve on until
    they are `max_age_seconds` old.
    """

    def __init__(
        self,
        issuer: TokenIssuer,
        client: httpx.AsyncClient,
        *,
        refetch_seconds: float,
        max_age_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._client = client
        self._refetch_seconds = refetch_seconds
        self._max_age_seconds = max_age_seconds
        self._clock = clock
        self._keys: Keys = {}
        self._fetched_at = 0.0
        self._tried_at: float | None = None
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        age_seconds = self._clock() - self._fetched_at
        if age_seconds > self._max_age_seconds:
            self._keys = {}
        key = _look_up(self._keys, kid, algorithm)
        if key is None:
            fetching = self.refetch()
            if fetching is not None:
                await asyncio.wait([fetching])  # which goes on when this request ends
            key = _look_up(self._keys, kid, algorithm)
            if not self._keys:
                raise TokenKeysUnavailable
        elif age_seconds > FRESH_SECONDS:
            self.refetch()
        return key

    def refetch(self) -> asyncio.Task[None] | None:
        """Starts a fetch, unless one is under way or the last began too recently. Returns the one that is under way, if any."""
        if self._fetching is None or self._fetching.done():
            now = self._clock()
            if self._tried_at is not None and now - self._tried_at < self._refetch_seconds:
                return None
            self._tried_at = now
            self._fetching = asyncio.create_task(self._fetch(now))
        return self._fetching

    async def close(self) -> None:
        """Ends a fetch that is under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])

    async def _fetch(self, began_at: float) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                body = await self._read()
            # In a thread, because hundreds of keys take tens of milliseconds.
            self._keys, self._fetched_at = await asyncio.to_thread(_parsed, body, self._issuer.algorithms), began_at
        except Exception as problem:  # noqa: BLE001 - whatever is wrong with an issuer, its last keys serve on
            log.warning(
                "could not fetch the keys of an issuer",
                extra={"issuer": self._issuer.issuer, "problem": str(problem) or type(problem).__name__, "known_keys": len(self._keys)},
            )
        else:
            log.info("fetched the keys of an issuer", extra={"issuer": self._issuer.issuer, "known_keys": len(self._keys)})

    async def _read(self) -> bytes:
        """The JWKS, in bounded memory. Redirects are not followed, and compressed answers not taken: they could grow."""
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        async with self._client.stream("GET", self._issuer.jwks_url or "", headers=headers, follow_redirects=False) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise ValueError("the answer is compressed")
            body = bytearray()
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > LARGEST_JWKS_BYTES:
                    raise ValueError(f"more than {LARGEST_JWKS_BYTES} bytes")
            return bytes(body)


def new_client() -> httpx.AsyncClient:
    """What `JwksKeys` fetches with. Making it reads the machine's certificates, which takes some milliseconds."""
    return httpx.AsyncClient(follow_redirects=False, timeout=FETCH_SECONDS)


class _JsonWebKey(msgspec.Struct):
    """The members of a JWK (RFC 7517, section 4; RFC 7518, section 6) that are looked at, all others left out."""

    kty: str
    kid: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    alg: str | None = None
    n: str | None = None
    e: str | None = None
    crv: str | None = None
    x: str | None = None
    y: str | None = None
    d: str | None = None


class _KeySet(msgspec.Struct):
    keys: list[msgspec.Raw]


def _look_up(keys: Keys, kid: str | None, algorithm: str) -> Key | None:
    if kid is not None:
        return keys.get((kid, algorithm))
    # A token need not name its key (RFC 7515, section 4.1.4); which one is meant is plain only where there is but one.
    suited = [key for (_, suits), key in keys.items() if suits == algorithm]
    return suited[0] if len(suited) == 1 else None


def _parsed_pem(data: bytes, algorithms: Iterable[str]) -> Keys:
    """One key, for each of the algorithms. Raises ValueError when it does not suit all of them."""
    found: Keys = {}
    for algorithm in algorithms:
        key = _suited(data, algorithm)
        if key is None:
            raise ValueError(f"holds no PEM public key for {algorithm} (RSA keys need 2048 bits)")
        found[None, algorithm] = key
    return found


def _parsed(body: bytes, algorithms: Iterable[str]) -> Keys:
    """The keys for signatures by these algorithms, by `kid` and algorithm. Others are left out, as RFC 7517 (section 5) has it.

    Raises ValueError for a body that is no JWKS, or holds no such key.
    """
    found: Keys = {}
    for raw in msgspec.json.decode(body, type=_KeySet).keys[:MOST_KEYS]:
        try:
            jwk = msgspec.json.decode(raw, type=_JsonWebKey)
        except msgspec.ValidationError:
            continue
        # A private key in public is nobody's any more.
        if jwk.use not in (None, "sig") or (jwk.key_ops is not None and "verify" not in jwk.key_ops) or jwk.d is not None:
            continue
        members = {name: value for name, value in msgspec.structs.asdict(jwk).items() if isinstance(value, str)}
        for algorithm in algorithms:
            key = _suited(members, algorithm) if jwk.alg in (None, algorithm) else None
            if key is not None:
                found.setdefault((jwk.kid, algorithm), key)
    if not found:
        raise ValueError("no key for the algorithms of the settings")
    return found


def _suited(source: bytes | dict[str, str], algorithm: str) -> Key | None:
    """The key in a PEM text or a JWK, if it is one for this algorithm and long enough (RFC 7518, section 3.3: 2048 bits)."""
    known = _ALGORITHMS[algorithm]
    try:
        key = known.prepare_key(known.from_jwk(source) if isinstance(source, dict) else source)
        return None if known.check_key_length(key) else key
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, KeyError):
        return None
