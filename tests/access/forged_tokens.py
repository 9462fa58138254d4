"""Three issuers as one sets them up, and every kind of token that must not be believed by who trusts them."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jwt

from tests.access.issuers import APP, Issuer, SigningKey, part

RSA = SigningKey("RS256", "ins_1")
EC, ED = SigningKey("ES256", "ec"), SigningKey("EdDSA", "ed")
OFFLINE = SigningKey("RS256", "offline")


def entry(issuer: Issuer, **changes: Any) -> dict[str, Any]:
    """An issuer of COFFER_TOKEN_ISSUERS, as one sets up Clerk."""
    return {"issuer": issuer.url, "jwks_url": issuer.jwks_url, "authorized_parties": [APP], "leeway_seconds": 0} | changes


class Issuers(AbstractContextManager["Issuers"]):
    """One like Clerk, one with audiences and other algorithms, and one that is offline: its key is a file in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.clerk, self.other = Issuer(RSA), Issuer(EC, ED)
        key = directory / "key.pem"
        key.write_bytes(OFFLINE.pem())
        entries = [
            entry(self.clerk),
            entry(self.other, authorized_parties=[], audiences=["coffer", "media"], algorithms=["ES256", "EdDSA"]),
            {"issuer": "offline", "public_key_file": str(key), "audiences": ["coffer"], "leeway_seconds": 30},
        ]
        self.environment = {"COFFER_TOKEN_ISSUERS": json.dumps(entries)}

    def __exit__(self, *_: object) -> None:
        self.clerk.down()
        self.other.down()

    @property
    def fetches(self) -> tuple[int, int]:
        """How often the keys of either issuer were fetched."""
        return self.clerk.fetches, self.other.fetches


def unsigned(header: dict[str, Any], claims: dict[str, Any]) -> str:
    return f"{part(json.dumps(header))}.{part(json.dumps(claims))}"


def hmac_of(text: str, secret: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.digest(secret, text.encode(), hashlib.sha256)).rstrip(b"=").decode()


def refused_tokens(issuers: Issuers) -> Iterator[tuple[str, str]]:
    """Every token that is not to be believed, by its name. Each differs from a good one in one thing."""
    clerk, other = issuers.clerk, issuers.other
    now = int(time.time())
    claims, good = clerk.claims(), clerk.token()
    head, body, signature = good.split(".")

    def headers(**changes: Any) -> str:
        return RSA.sign(claims, **changes)

    # Signatures
    yield "none", unsigned({"alg": "none"}, claims) + "."
    yield "none with a signature", unsigned({"alg": "none", "kid": RSA.kid}, claims) + "." + signature
    yield "none in capitals", unsigned({"alg": "NONE", "kid": RSA.kid}, claims) + ".AA"
    for name, secret in (("the public key", RSA.pem()), ("the JWK", json.dumps(RSA.jwk()).encode()), ("nothing", b"")):
        text = unsigned({"alg": "HS256", "kid": RSA.kid, "typ": "JWT"}, claims)
        yield f"HS256 with {name}", f"{text}.{hmac_of(text, secret)}"
    text = unsigned({"alg": "HS256", "kid": "whatever"}, claims | {"iss": "offline", "aud": "coffer"})
    yield "HS256 with the PEM of the file", f"{text}.{hmac_of(text, OFFLINE.pem())}"
    yield "another algorithm of the same key", jwt.encode(claims, RSA.private, "PS256", {"kid": RSA.kid})
    yield "no algorithm", f"{unsigned({'kid': RSA.kid}, claims)}.{signature}"
    yield "an algorithm that is no text", f"{unsigned({'alg': ['RS256'], 'kid': RSA.kid}, claims)}.{signature}"
    yield "another's key", SigningKey("RS256", RSA.kid).sign(claims)
    yield "a changed claim", f"{head}.{part(json.dumps(claims | {'sub': 'eve'}))}.{signature}"
    yield "no signature", f"{head}.{body}."
    yield "two parts", f"{head}.{body}"
    yield "four parts", f"{good}.AA"
    yield "padding", f"{good}=="
    yield "an unknown kid", headers(kid="unknown")
    yield "a kid that is no text", headers(kid=1)
    yield "a key of another issuer", EC.sign(claims)
    yield "another issuer's token with our key", RSA.sign(other.claims(aud="coffer"))
    # Headers
    yield "its own key", jwt.encode(claims, EC.private, "ES256", {"kid": "mine", "jwk": EC.jwk()})
    for name in ("jwk", "jku", "x5u", "x5c"):
        yield f"a good signature and {name}", headers(**{name: "x"})
    for name, value in (("crit", ["exp"]), ("crit", []), ("crit", ["b64"]), ("b64", True), ("b64", False)):
        yield f"{name} {value}", headers(**{name: value})
    for kind in ("logout+jwt", "dpop+jwt", "JWE", 1):
        yield f"type {kind}", headers(typ=kind)
    # Claims
    changes: list[tuple[str, dict[str, Any]]] = [
        ("no exp", {"exp": None}),
        ("no iat", {"iat": None}),
        ("no sub", {"sub": None}),
        ("no iss", {"iss": None}),
        ("expired", {"iat": now - 600, "exp": now - 1}),
        ("from the future", {"iat": now + 120}),
        ("not yet valid", {"nbf": now + 120}),
        ("exp as text", {"exp": str(now + 300)}),
        ("exp true", {"exp": True}),
        ("exp beyond all dates", {"exp": 10**300}),
        ("iat negative", {"iat": -1}),
        ("wrong iss", {"iss": "https://elsewhere.example.com"}),
        ("iss with a slash more", {"iss": clerk.url + "/"}),
        ("iss a list", {"iss": [clerk.url]}),
        ("wrong azp", {"azp": "https://evil.example.com"}),
        ("no azp", {"azp": None}),
        ("azp a list", {"azp": [APP]}),
        ("an aud where none is allowed", {"aud": "coffer"}),
        ("pending", {"sts": "pending"}),
        ("sub a number", {"sub": 7}),
        ("sub empty", {"sub": ""}),
        ("sub too long", {"sub": "x" * 256}),
        ("sub with a control character", {"sub": "a\nb"}),
        ("too long", {"sub": "ada", "filling": "x" * 8_192}),
    ]
    for name, change in changes:
        yield name, RSA.sign(clerk.claims(**change))
    for aud in ("elsewhere", None, ["a", "b"], [], 1, ["coffer", 1], {"coffer": 1}):
        yield f"aud {aud}", EC.sign(other.claims(aud=aud))
    yield "offline and ended longer ago", OFFLINE.sign(clerk.claims(iss="offline", aud="coffer", exp=now - 60))
    # Texts
    header, members = '{"alg":"RS256","kid":"ins_1"', json.dumps(claims)[:-1]
    yield "sub twice", RSA.sign_texts(header + "}", members + ',"sub":"eve"}')
    yield "sub twice, alike", RSA.sign_texts(header + "}", members + ',"sub":"user_2abc"}')
    yield "something nested twice", RSA.sign_texts(header + "}", members + ',"x":{"a":1,"a":2}}')
    yield "alg twice", RSA.sign_texts(header + ',"alg":"none"}', members + "}")
    yield "claims that are a list", RSA.sign_texts(header + "}", f"[{members}}}]")
    yield "claims that are text", RSA.sign_texts(header + "}", "ada")
    yield "a header that is a list", RSA.sign_texts(f"[{header}}}]", members + "}")
    yield "NaN", RSA.sign_texts(header + "}", members + ',"nbf":NaN}')
    yield "deep nesting", RSA.sign_texts(header + "}", members + ',"x":' + "[" * 2_000 + "]" * 2_000 + "}")
    yield "a long number", RSA.sign_texts(header + "}", members + ',"x":' + "9" * 5_000 + "}")
    yield "half a surrogate pair", RSA.sign_texts(header + "}", members.replace("user_2abc", "a\\ud800") + "}")
    for name, text in (("dots", ".."), ("words", "a.b.c"), ("a long text", "x" * 60_000), ("Unicode", "ü.ü.ü")):
        yield name, text
