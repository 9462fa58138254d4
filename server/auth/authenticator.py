"""Turns the credentials of a request into a `Principal`."""

import hmac
import time
from collections.abc import Callable
from datetime import UTC, datetime

from server.auth import api_keys
from server.auth.principal import Principal, Scope
from server.errors import Forbidden, Unauthenticated
from server.fields import clean_user_id
from server.ledger import ApiKeyRow, Database, find_api_key

_MOST_CACHED_KEYS = 1024  # about 1 KB each


class Authenticator:
    """Checks credentials against the ledger. A good key is remembered for `cache_seconds`, a bad one never.

    So a revoked key works for at most that long after its revocation, in each process. Lives in one event loop.
    """

    def __init__(self, db: Database, cache_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._cache_seconds = cache_seconds
        self._clock = clock
        self._cache: dict[tuple[str, bytes], tuple[float, ApiKeyRow]] = {}  # oldest first

    async def principal(self, authorization: str | None, acting_user: str | None, needed: Scope) -> Principal:
        """Who sent these headers (`Authorization`, `X-User-Id`), provided that they may do what is needed.

        Raises `Unauthenticated` (which part was wrong is not told), `Forbidden` without the scope, `InvalidRequest` for a
        user id that is malformed, or missing where files are concerned, and `DatabaseUnavailable`.
        """
        scheme, _, credentials = (authorization or "").partition(" ")
        presented = api_keys.parse(credentials.strip(" ")) if scheme.lower() == "bearer" else None
        if presented is None:
            raise Unauthenticated
        row = await self._api_key(*presented)
        if needed not in row.scopes:
            raise Forbidden(needed)
        user_id = None if acting_user is None else clean_user_id(acting_user, "X-User-Id")
        principal = Principal(user_id=user_id, key_id=row.key_id, scopes=frozenset(row.scopes))
        if needed is not Scope.ADMIN:
            _ = principal.owner
        return principal

    async def _api_key(self, key_id: str, secret_sha256: bytes) -> ApiKeyRow:
        # The digest is part of the cache's key, so a hit means that this very secret was found right. Whoever times the
        # look-up learns about a digest, from which no secret follows.
        presented = (key_id, secret_sha256)
        now = self._clock()
        known = self._cache.get(presented)
        if known is not None and now < known[0]:
            row = known[1]
        else:
            found = await find_api_key(self._db, key_id)
            # An unknown id is compared too, so that both kinds of bad key take the same way.
            if not hmac.compare_digest(secret_sha256, found.secret_sha256 if found else bytes(32)) or found is None:
                raise Unauthenticated
            row = found
            # The age counts from before the query: a revocation during it must not be outlived any longer.
            self._remember(presented, now + self._cache_seconds, row)
        if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= datetime.now(UTC)):
            raise Unauthenticated
        return row

    def _remember(self, presented: tuple[str, bytes], until: float, row: ApiKeyRow) -> None:
        self._cache.pop(presented, None)
        if len(self._cache) >= _MOST_CACHED_KEYS:
            del self._cache[next(iter(self._cache))]
        if row.revoked_at is None:
            self._cache[presented] = (until, row)
