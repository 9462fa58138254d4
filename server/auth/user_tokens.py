"""User tokens: JWTs (RFC 7519) that an OIDC issuer such as Clerk signed for a user of the app.

What is believed follows RFC 8725: the algorithms, the issuers and their keys come from the settings, never from the token.
"""

import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import jwt
from jwt.exceptions import PyJWTError

from server.auth.token_keys import FileKeys, JwksKeys, TokenKeys, new_client
from server.errors import InvalidRequest, Unauthenticated
from server.fields import clean_user_id
from server.setting_values import TokenIssuer
from server.settings import Settings

LONGEST_TOKEN_BYTES = 8 * 1024
"""Nothing of a longer text is decoded. Clerk's tokens, made to fit a cookie, have at most 4 KB."""

REMEMBERED_SECONDS = 60.0
"""How long a verified token is not verified again, within its own life. Saves 0.08 ms (RS256) to 0.15 ms (EdDSA) a request."""
_MOST_REMEMBERED = 4096  # some 200 bytes each

_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")  # RFC 7515, section 7.1; no empty signature
_EMBEDDED_KEYS = ("jwk", "jku", "x5u", "x5c")
_TYPES = {None, "jwt", "at+jwt", "application/jwt", "application/at+jwt"}
_REQUIRED = ["exp", "iat", "iss", "sub"]
_LAST_SECOND = 2**40  # the year 36812; beyond, dates overflow

log = logging.getLogger("coffer.auth")


class _Refused(Exception):
    """Why a token is not believed: a text of ours, with nothing of the token in it."""


class UserTokens:
    """Tells users by their tokens. Lives in one event loop."""

    def __init__(
        self,
        issuers: Mapping[str, tuple[TokenIssuer, TokenKeys]],
        client: httpx.AsyncClient | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`issuers` by the exact text of their claim `iss`; `client` is closed with this."""
        self._issuers = issuers
        self._client = client
        self._clock = clock
        self._remembered: dict[bytes, tuple[float, str]] = {}  # by the token's SHA-256, oldest first

    @classmethod
    def from_settings(cls, settings: Settings) -> "UserTokens":
        """Reads the key files and fetches nothing yet. Raises `SettingError`."""
        client = new_client() if any(each.jwks_url for each in settings.token_issuers) else None

        def keys_of(issuer: TokenIssuer) -> TokenKeys:
            if client is None or issuer.jwks_url is None:
                return FileKeys(issuer)
            return JwksKeys(
                issuer,
                client,
                refetch_seconds=settings.token_keys_refetch_seconds,
                max_age_seconds=settings.token_keys_max_age_seconds,
            )

        return cls({each.issuer: (each, keys_of(each)) for each in settings.token_issuers}, client)

    def start(self) -> None:
        """Begins to fetch the keys, so that the first request need not wait and the log tells at once of an issuer that fails."""
        for _, keys in self._issuers.values():
            if isinstance(keys, JwksKeys):
                keys.refetch()

    async def close(self) -> None:
        """Ends what is under way."""
        for _, keys in self._issuers.values():
            if isinstance(keys, JwksKeys):
                await keys.close()
        if self._client is not None:
            await self._client.aclose()

    async def user_id(self, token: str) -> str:
        """The user that the token speaks for: its subject, a clean user id.

        Raises `Unauthenticated` for a token that is not believed, for a reason that only the log tells, and `TokenKeysUnavailable`.
        """
        try:
            parts = _COMPACT.fullmatch(token) if len(token) <= LONGEST_TOKEN_BYTES else None
            if parts is None:
                raise _Refused("not three parts of base64url, or too long")
            digest, now = _digest(token), self._clock()
            if (known := self._known(digest, now)) is not None:
                return known
            user_id, expires_at = await self._verified(token, parts[1], parts[2])
        except _Refused as refusal:
            log.debug("refused a user token", extra={"reason": str(refusal)})
        except PyJWTError as refusal:
            # Only the class: a message may quote the token.
            log.debug("refused a user token", extra={"reason": type(refusal).__name__})
        else:
            self._remember(digest, now + min(REMEMBERED_SECONDS, expires_at - time.time()), user_id)
            return user_id
        raise Unauthenticated

    def remembered(self, token: str) -> str | None:
        """The user that `user_id` would tell without looking at the token again; None when it would have to."""
        if len(token) > LONGEST_TOKEN_BYTES or not token.isascii():
            return None
        return self._known(_digest(token), self._clock())

    def _known(self, digest: bytes, now: float) -> str | None:
        until, user_id = self._remembered.get(digest, (now, ""))
        return user_id if now < until else None

    def _remember(self, digest: bytes, until: float, user_id: str) -> None:
        self._remembered.pop(digest, None)
        if len(self._remembered) >= _MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = (until, user_id)

    async def _verified(self, token: str, header_part: str, claims_part: str) -> tuple[str, float]:
        """The user and when the token expires, in seconds of Unix time."""
        header, claims = _json_object(header_part), _json_object(claims_part)
        known = self._issuers.get(claims["iss"]) if isinstance(claims.get("iss"), str) else None
        if known is None:
            raise _Refused("issuer")
        issuer, keys = known
        algorithm, kid = _checked_header(header, issuer)
        _check_dates(claims)
        key = await keys.find(kid, algorithm)
        if key is None:
            raise _Refused("no such key")
        # From here on the claims are the issuer's. PyJWT judges `exp`, `nbf`, `iat`, `iss` and `aud`, and those that are missing;
        # a token with an audience is refused where none is allowed (RFC 7519, section 4.1.3).
        jwt.decode(
            token,
            key,
            algorithms=list(issuer.algorithms),
            audience=issuer.audiences or None,
            issuer=issuer.issuer,
            leeway=issuer.leeway_seconds,
            options={"require": _REQUIRED, "enforce_minimum_key_length": True},
        )
        if issuer.authorized_parties and claims.get("azp") not in issuer.authorized_parties:
            raise _Refused("authorized party")
        if claims.get("sts") == "pending":  # Clerk: signed in, but with a step left to do, such as to choose an organization
            raise _Refused("pending session")
        try:
            return clean_user_id(claims["sub"]), float(claims["exp"])
        except InvalidRequest:
            raise _Refused("subject") from None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("ascii")).digest()


def _json_object(part: str) -> dict[str, Any]:
    """A part's JSON object. A member named twice is refused: two readers could pick different ones (RFC 7515, section 4)."""
    try:
        data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _Refused("not JSON with each member once") from None
    if not isinstance(value, dict):
        raise _Refused("not a JSON object")
    return value


def _without_repeats(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) != len(members):
        raise ValueError
    return found


def _no_constant(_: str) -> None:
    raise ValueError  # NaN and Infinity are no JSON


def _checked_header(header: dict[str, Any], issuer: TokenIssuer) -> tuple[str, str | None]:
    """The token's algorithm, which is one of the issuer's, and the name of its key."""
    algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ")
    if algorithm not in issuer.algorithms:
        raise _Refused("algorithm")
    if "crit" in header or "b64" in header:  # extensions that must be understood; none is here (RFC 7515, section 4.1.11)
        raise _Refused("critical header")
    if any(name in header for name in _EMBEDDED_KEYS):
        raise _Refused("brings its own key")
    if kid is not None and not isinstance(kid, str):
        raise _Refused("key id")
    # A logout token or another statement of the issuer is no token for access (RFC 8725, section 3.11).
    if not (kind is None or isinstance(kind, str)) or (kind and kind.lower()) not in _TYPES:
        raise _Refused("type")
    return algorithm, kid


def _check_dates(claims: dict[str, Any]) -> None:
    """NumericDate is a number (RFC 7519, section 2). PyJWT would take texts too."""
    for name in ("exp", "iat", "nbf"):
        value = claims.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LAST_SECOND:
            raise _Refused(f"{name} is no date")
