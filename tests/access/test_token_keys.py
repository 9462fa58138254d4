"""Where the keys of user tokens come from: an issuer's JWKS over HTTP, however it behaves, and files."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from server.auth import token_keys
from server.auth.token_keys import FRESH_SECONDS, LARGEST_JWKS_BYTES, FileKeys, JwksKeys, new_client
from server.errors import TokenKeysUnavailable
from server.setting_values import TokenIssuer
from server.settings import SettingError, Settings
from tests.access.issuers import Issuer, SigningKey, listener, reply

pytestmark = pytest.mark.anyio

FIRST, SECOND = SigningKey("ES256", "first"), SigningKey("ES256", "second")
RSA = SigningKey("RS256", "rsa")
REFETCH_SECONDS, MAX_AGE_SECONDS = 10, 3_600


class Keys:
    """`JwksKeys` of an issuer, on a clock that the test moves."""

    def __init__(self, issuer: Issuer) -> None:
        self.now = 1_000.0
        self.client = new_client()
        settings = TokenIssuer(issuer=issuer.url, jwks_url=issuer.jwks_url, algorithms=("ES256", "RS256"), audiences=("app",))
        self.keys = JwksKeys(
            settings, self.client, refetch_seconds=REFETCH_SECONDS, max_age_seconds=MAX_AGE_SECONDS, clock=lambda: self.now
        )

    async def knows(self, kid: str | None, algorithm: str = "ES256") -> bool:
        return await self.keys.find(kid, algorithm) is not None

    async def fetched(self) -> None:
        """When the fetch under way has ended."""
        if self.keys._fetching is not None:
            await asyncio.wait([self.keys._fetching])


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer(FIRST)
    yield issuer
    issuer.down()


@pytest.fixture
async def keys(issuer: Issuer) -> AsyncIterator[Keys]:
    keys = Keys(issuer)
    yield keys
    await keys.keys.close()
    await keys.client.aclose()


async def test_keys_are_fetched_once_for_everybody(keys: Keys, issuer: Issuer) -> None:
    assert all(await asyncio.gather(*(keys.knows("first") for _ in range(50))))
    assert issuer.fetches == 1
    assert await keys.knows(None)  # there is but one
    keys.now += FRESH_SECONDS - 1
    assert await keys.knows("first")
    await keys.fetched()
    assert issuer.fetches == 1


async def test_unknown_keys_are_asked_for_at_most_once_per_interval(keys: Keys, issuer: Issuer) -> None:
    for interval in range(1, 4):
        found = await asyncio.gather(*(keys.knows(f"unknown-{number}") for number in range(200)))
        assert not any(found)
        assert not await keys.knows("unknown") and not await keys.knows(None, "RS256")
        assert issuer.fetches == interval
        keys.now += REFETCH_SECONDS
    assert await keys.knows("first") and issuer.fetches == 3


async def test_a_rotated_key_is_found_and_the_old_one_ends(keys: Keys, issuer: Issuer) -> None:
    assert await keys.knows("first")
    issuer.keys = [SECOND, FIRST]
    keys.now += REFETCH_SECONDS
    assert await keys.knows("second") and await keys.knows("first")
    assert not await keys.knows(None)  # which of them?
    issuer.keys = [SECOND]
    keys.now += FRESH_SECONDS + 1
    assert await keys.knows("first")  # fetched anew beside this answer
    await keys.fetched()
    assert not await keys.knows("first") and await keys.knows("second")
    assert issuer.fetches == 3


async def test_keys_survive_an_outage_until_they_are_too_old(keys: Keys, issuer: Issuer) -> None:
    assert await keys.knows("first")
    issuer.down()
    for _ in range(3):
        keys.now += FRESH_SECONDS + 1
        assert await keys.knows("first")
        assert not await keys.knows("second")
        await keys.fetched()
    keys.now = 1_000 + MAX_AGE_SECONDS
    assert await keys.knows("first")
    await keys.fetched()
    keys.now += REFETCH_SECONDS
    with pytest.raises(TokenKeysUnavailable):
        await keys.knows("first")
    issuer.up()
    keys.now += REFETCH_SECONDS
    assert await keys.knows("first")


async def test_without_any_key_nothing_can_be_judged(keys: Keys, issuer: Issuer) -> None:
    issuer.down()
    for _ in range(3):
        with pytest.raises(TokenKeysUnavailable):
            await keys.knows("first")
    issuer.up()
    keys.now += REFETCH_SECONDS
    assert await keys.knows("first")
    assert issuer.fetches == 1


Answer = Callable[[BaseHTTPRequestHandler], None]


def bad_answers() -> dict[str, Answer]:
    def of(body: bytes, status: int = 200, **headers: str) -> Answer:
        return lambda handler: reply(handler, body, status, **headers)

    good = json.dumps({"keys": [SECOND.jwk()]}).encode()
    return {
        "error": of(good, 500),
        "not found": of(good, 404),
        "no JSON": of(b"<html>"),
        "no set": of(b"[]"),
        "nesting": of(b"[" * 100_000),
        "empty": of(b'{"keys": []}'),
        "nothing": of(b""),
        "too large": of(good + b" " * LARGEST_JWKS_BYTES),
        "compressed": of(good, Content_Encoding="gzip"),
        "only strange keys": of(b'{"keys": [1, {}, {"kty": "EC", "kid": "second"}, {"kty": "XX", "kid": "second", "x": "!"}]}'),
    }


@pytest.mark.parametrize("name", bad_answers())
async def test_a_bad_answer_leaves_the_last_keys(keys: Keys, issuer: Issuer, name: str) -> None:
    assert await keys.knows("first")
    issuer.answer = bad_answers()[name]
    keys.now += REFETCH_SECONDS
    assert not await keys.knows("second")
    assert issuer.fetches == 2
    assert await keys.knows("first")


async def test_a_redirect_is_not_followed(keys: Keys, issuer: Issuer) -> None:
    with listener() as (url, called):
        issuer.answer = lambda handler: reply(handler, b"", 302, Location=url)
        with pytest.raises(TokenKeysUnavailable):
            await keys.knows("first")
        assert issuer.fetches == 1 and not called()


async def test_an_issuer_that_takes_too_long_is_given_up(keys: Keys, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_keys, "FETCH_SECONDS", 0.2)
    given_up = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        """Good keys, after three seconds of spaces: no single one of them takes too long."""
        body = json.dumps({"keys": [FIRST.jwk()]}).encode()
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(100):
                if given_up.wait(0.03):
                    return
                handler.wfile.write(b" ")
            handler.wfile.write(body)

    issuer.answer = drip
    with pytest.raises(TokenKeysUnavailable):
        await keys.knows("first")
    given_up.set()


async def test_keys_that_do_not_suit_are_left_out(keys: Keys, issuer: Issuer) -> None:
    published = [
        {"kty": "oct", "kid": "secret", "k": "AAAA", "alg": "HS256"},
        SECOND.jwk(kid="encryption", use="enc"),
        SECOND.jwk(kid="signing only", key_ops=["sign"]),
        SECOND.jwk(kid="other algorithm", alg="ES384"),
        SECOND.jwk(kid="private", d=SECOND.private_member()),
        SigningKey("RS256", "short", rsa_bits=1024).jwk(),
        RSA.jwk(),
        SECOND.jwk(kid="first"),
        FIRST.jwk(),  # the name is taken
    ]
    issuer.answer = lambda handler: reply(handler, json.dumps({"keys": published}).encode())
    assert await keys.knows("rsa", "RS256") and not await keys.knows("rsa", "ES256")
    assert await keys.knows("first") and not await keys.knows("first", "RS256")
    for kid in ("encryption", "signing only", "other algorithm", "private"):
        assert not await keys.knows(kid), kid
    assert not await keys.knows("short", "RS256")
    assert not await keys.knows("secret", "RS256")
    found = await keys.keys.find("first", "ES256")
    assert found is not None and found.public_numbers() == SECOND.private.public_key().public_numbers()


# Files


def offline(path: Path, *algorithms: Any) -> FileKeys:
    return FileKeys(TokenIssuer(issuer="i", public_key_file=str(path), algorithms=algorithms or ("RS256",), audiences=("app",)))


async def test_a_pem_file_is_one_key_for_every_kid(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(RSA.pem())
    keys = offline(path, "RS256", "PS256")
    for kid in (None, "any"):
        assert await keys.find(kid, "RS256") is not None and await keys.find(kid, "PS256") is not None


async def test_a_jwks_file_knows_keys_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [FIRST.jwk(), RSA.jwk()]}))
    keys = offline(path, "ES256", "RS256")
    assert await keys.find("first", "ES256") is not None
    assert await keys.find("rsa", "RS256") is not None
    assert await keys.find("second", "ES256") is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"nonsense", "holds no PEM public key for RS256"),
        (FIRST.pem(), "holds no PEM public key for RS256"),
        (SigningKey("RS256", "short", rsa_bits=1024).pem(), "holds no PEM public key for RS256"),
        (b"-----BEGIN PRIVATE KEY-----\n", "holds a private key"),
        (b'{"keys": []}', "no key for the algorithms"),
        (b"{", "truncated"),
        (b"\xff\xfe", "holds no PEM public key for RS256"),
    ],
)
async def test_a_key_file_that_is_none_says_so(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match=complaint) as refused:
        offline(path)
    assert "COFFER_TOKEN_ISSUERS" in str(refused.value)


# The setting

GOOD: dict[str, Any] = {"issuer": "https://i.example.com", "jwks_url": "https://i.example.com/keys", "authorized_parties": ["https://app"]}


def issuers(*entries: object) -> tuple[TokenIssuer, ...]:
    text = json.dumps(entries)
    return Settings.load({"DATABASE_URL": "postgresql://h/x", "COFFER_TOKEN_ISSUERS": text}).token_issuers


def test_issuers_come_as_json() -> None:
    (one, two) = issuers(GOOD, GOOD | {"issuer": "https://j.example.com", "algorithms": ["ES256", "EdDSA"], "leeway_seconds": 0})
    assert (one.algorithms, one.leeway_seconds, one.authorized_parties) == (("RS256",), 5, ("https://app",))
    assert two.algorithms == ("ES256", "EdDSA")
    assert Settings.load({"DATABASE_URL": "postgresql://h/x", "COFFER_TOKEN_ISSUERS": " "}).token_issuers == ()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"algorithms": ["HS256"]}, r"`\[0\].algorithms\[0\]`"),
        ({"algorithms": ["none"]}, r"algorithms"),
        ({"algorithms": []}, r"algorithms"),
        ({"jwks_url": "http://i.example.com/keys"}, "must be an https URL"),
        ({"jwks_url": "https://a:b@i.example.com/keys"}, "must be an https URL"),
        ({"jwks_url": "file:///etc/passwd"}, "must be an https URL"),
        ({"public_key_file": "/x"}, "either this or public_key_file"),
        ({"jwks_url": None}, "either this or public_key_file"),
        ({"authorized_parties": []}, "say whom tokens must be for"),
        ({"audience": "x"}, "unknown field `audience`"),
        ({"leeway_seconds": 301}, "leeway_seconds"),
        ({"issuer": ""}, "issuer"),
    ],
)
def test_issuers_that_are_not_safe_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SettingError, match=complaint) as refused:
        issuers(GOOD | change)
    assert str(refused.value).startswith("COFFER_TOKEN_ISSUERS: ")


def test_other_wrong_settings_of_issuers() -> None:
    with pytest.raises(SettingError, match="is named twice"):
        issuers(GOOD, GOOD)
    for text in ("{}", "[", "clerk", "[1]"):
        with pytest.raises(SettingError, match="COFFER_TOKEN_ISSUERS"):
            Settings.load({"DATABASE_URL": "postgresql://h/x", "COFFER_TOKEN_ISSUERS": text})
