"""10: user tokens that are forged, changed, expired or meant for others: all get one and the same 401, and nothing they name is fetched."""

import string
import time
from collections.abc import Iterator

from server.auth import Scope
from tests.access.forged_tokens import EC, ED, OFFLINE, RSA, refused_tokens
from tests.access.issuers import listener
from tests.attack.target import Tally, Target
from tests.attack.wire import Answer, request

BASE64URL = string.ascii_letters + string.digits + "-_"
OTHERS = "~.%+=/!*'();:@&$,[]{}|^`\"<>\\ #\t\xe9"  # no controls: with them it is no HTTP
REFETCH_SECONDS = 10  # the default of COFFER_TOKEN_KEYS_REFETCH_SECONDS


def attack(target: Target, tally: Tally) -> str:
    genuine = _genuine(target)
    for token in genuine:
        tally.check(_ask(target, token).status == 200, "a good token is refused")
    before = target.listed(target.ada)
    refused = dict(refused_tokens(target.issuers))
    tally.check(len(refused) > 80, "the list of forged tokens is not whole")
    _all_alike(target, tally, refused)
    called = _name_other_keys(target, tally)
    fetches, flood = _flood_with_unknown_keys(target, tally)
    mutants = _change_every_character(target, tally, genuine)
    _claim_rights(target, tally)
    for token in genuine:
        tally.check(_ask(target, token).status == 200, "a good token is refused after the attack")
    tally.check(target.listed(target.ada) == before, "ada's files are not what they were")
    return (
        f"{len(refused)} forgeries and {mutants:,} mutations of {len(genuine)} tokens: one 401; {called} connections to what they name; "
        f"issuers asked {fetches} times for {flood:,} unknown keys"
    )


def _genuine(target: Target) -> list[str]:
    """One for each algorithm, as ada's."""
    clerk, other = target.issuers.clerk, target.issuers.other
    tokens = [
        target.token("ada"),
        EC.sign(other.claims(sub="ada", aud="coffer")),
        ED.sign(other.claims(sub="ada", aud=["media"])),
        OFFLINE.sign(clerk.claims(iss="offline", sub="ada", aud="coffer")),
    ]
    for token in tokens:
        target.secrets |= {token, *token.split(".")[1:]}
    return tokens


def _request(token: str) -> bytes:
    return request("GET", "/api/files", [("Authorization", f"Bearer {token}")])


def _ask(target: Target, token: str) -> Answer:
    return target.wire.expect(_request(token))


def _all_alike(target: Target, tally: Tally, tokens: dict[str, str]) -> None:
    """The answer is that to a request without any credentials, to the last byte."""
    standard = target.get("/api/files").comparable()
    tally.check(standard[0] == 401, f"without credentials: {standard}")
    for name, answer in zip(tokens, target.wire.expect_all([_request(token) for token in tokens.values()]), strict=True):
        tally.check(answer.comparable() == standard, f"{name}: {answer.status} {answer.body[:200]!r}")


def _name_other_keys(target: Target, tally: Tally) -> int:
    """Tokens that say where their key is, as the header or the issuer, signed with a key of that place or with the right one."""
    connections = 0
    clerk = target.issuers.clerk
    with listener() as (url, called):
        names = {"jku": url, "x5u": url, "jwk": EC.jwk() | {"x5u": url}, "x5c": [url]}
        tokens = {
            f"{name} at a listener, {key.kid}, {changes}": key.sign(clerk.claims(), **changes, **{name: value})
            for name, value in names.items()
            for key in (EC, RSA)
            for changes in ({}, {"kid": "elsewhere"}, {"kid": url})
        }
        base = url.removesuffix("/keys.json")
        for iss in (base, f"{base}/", url, f"{clerk.url}@{base.removeprefix('http://')}"):
            tokens[f"iss {iss}"] = RSA.sign(clerk.claims(iss=iss))
        _all_alike(target, tally, tokens)
        while called():
            connections += 1
    tally.check(connections == 0, f"{connections} connections to what a token names")
    return connections


def _flood_with_unknown_keys(target: Target, tally: Tally) -> tuple[int, int]:
    """How often the issuers were asked for their keys meanwhile, and how often there was reason to."""
    clerk, other = target.issuers.clerk, target.issuers.other
    began, before = time.monotonic(), target.issuers.fetches
    claims = {RSA: clerk.claims(), EC: other.claims(aud="coffer")}
    tokens = {
        f"unknown {number} {key.kid}": key.sign(claims[key], kid=f"unknown-{number}")
        for key in claims
        for number in range(target.many(1_000, 40))
    }
    _all_alike(target, tally, tokens)
    most = 1 + int((time.monotonic() - began) / REFETCH_SECONDS)
    fetches = [now - then for now, then in zip(target.issuers.fetches, before, strict=True)]
    tally.check(max(fetches) <= most, f"the keys of an issuer were fetched {max(fetches)} times")
    return sum(fetches), len(tokens)


def _change_every_character(target: Target, tally: Tally, tokens: list[str]) -> int:
    """Every position replaced, removed, doubled and added to. The last character of a part has spare bits: those count too."""
    mutants = {f"token {number}, {what}": each for number, genuine in enumerate(tokens) for what, each in _mutations(target, genuine)}
    _all_alike(target, tally, mutants)
    return len(mutants)


def _mutations(target: Target, token: str) -> Iterator[tuple[str, str]]:
    lasts = {at - 1 for at, character in enumerate(token) if character == "."} | {len(token) - 1}
    for at in range(len(token)) if target.thorough else sorted(lasts | {*target.random.sample(range(len(token)), 40)}):
        replacements = BASE64URL + OTHERS if at in lasts else target.random.sample(BASE64URL, 2) + target.random.sample(OTHERS, 1)
        for other in sorted(set(replacements) - {token[at]}):
            yield f"{other!r} for {token[at]!r} at {at} of {len(token)}", token[:at] + other + token[at + 1 :]
        if token[at] != token[at - 1 : at]:
            yield f"without the character at {at}", token[:at] + token[at + 1 :]
        yield f"with the character at {at} twice", token[:at] + token[at] + token[at:]
    header, claims, signature = token.split(".")
    for more in ("=", "==", ".", "A", "AAAA", "%00", ".e30"):
        yield f"{more} at the end", token + more
    for which in ("sch", "chs", "hc", ".cs", "h.s", "hcsc"):
        parts = {"h": header, "c": claims, "s": signature, ".": ""}
        yield f"parts {which}", ".".join(parts[each] for each in which)
    for other in (token.upper(), token.lower(), token.swapcase(), token[::-1], f'"{token}"', f"{token},{token}", f"{token} {token}"):
        yield f"{other[:12]}...{other[-12:]}", other


def _claim_rights(target: Target, tally: Tally) -> None:
    """Whatever a good token claims, it is a user's: not an admin's, and nobody else's."""
    names = ("scope", "scopes", "scp", "role", "roles", "permissions", "admin", "org_role", "act", "user_id", "X-User-Id")
    token = target.token("bob", **{name: [*Scope, "ada"] if name.endswith("s") else "admin ada" for name in names})
    bearer = ("Authorization", f"Bearer {token}")
    for method, path in (("GET", "/api/users"), ("GET", "/api/users/ada"), ("DELETE", "/api/users/ada"), ("GET", "/api/audit")):
        tally.refused(target.wire.expect(request(method, path, [bearer])), f"{method} {path} with claims", {(403, "forbidden")})
    for user_id in ("ada", "Bob", "", "bob,ada", "bob\tada"):
        tally.refused(target.get("/api/files", [bearer, ("X-User-Id", user_id)]), f"bob's token for {user_id!r}", {(403, "forbidden")})
    for query in (f"access_token={token}", f"token={token}", f"jwt={token}"):
        tally.refused(target.get(f"/api/files?{query}"), "a token in the query", {(401, "unauthenticated")})
    for name, value in (
        ("Cookie", f"__session={token}"),
        ("X-Authorization", f"Bearer {token}"),
        ("Authorization", token),
        ("Authorization", f"Basic {token}"),
    ):
        tally.refused(target.get("/api/files", [(name, value)]), f"a token as {name}", {(401, "unauthenticated")})
