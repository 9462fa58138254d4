"""Turns the credentials of a request into a `Principal`."""

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from server.auth import api_keys
from server.auth.principal import USER_TOKEN_SCOPES, Principal, Scope
from server.auth.token_users import TokenUsers
from server.auth.user_tokens import UserTokens
from server.errors import CofferError, Forbidden, Unauthenticated
from server.fields import clean_user_id
from server.ledger import ApiKeyRow, Database, find_api_key, note_api_keys_used

_MOST_CACHED_KEYS = 1024  # about 1 KB each
_NOTE_USE_SECONDS = 60.0

log = logging.getLogger("coffer.auth")

Recognised = Callable[[str | None, str | None], None]
"""Told the id of the API key, None for a user token, and the user whom the request names."""


class Authenticator:
    """Checks credentials: API keys against the ledger, user tokens against their issuers. Lives in one event loop.

    A good key is remembered for `cache_seconds`, a bad one never. So a revoked key works for at most that long after its
    revocation, in each process. Without `tokens` and `token_users`, API keys alone are taken.
    """

    def __init__(
        self,
        db: Database,
        cache_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        tokens: UserTokens | None = None,
        token_users: TokenUsers | None = None,
    ) -> None:
        self._db = db
        self._cache_seconds = cache_seconds
        self._clock = clock
        self._tokens = tokens
        self._token_users = token_users
        self._cache: dict[tuple[str, bytes], tuple[float, ApiKeyRow]] = {}  # oldest first
        self._used: dict[str, datetime] = {}  # keys whose last use is not written yet
        self._noting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts what runs beside the requests."""
        self._noting = asyncio.create_task(self._note_uses())
        if self._tokens is not None:
            self._tokens.start()

    async def stop(self) -> None:
        """Ends it, and writes the keys' last use. A crash loses a minute of that."""
        if self._noting is not None:
            self._noting.cancel()
            with suppress(asyncio.CancelledError):
                await self._noting
            await self.note_uses()
        if self._tokens is not None:
            await self._tokens.close()

    async def principal(
        self,
        authorization: str | None,
        acting_user: str | None,
        needed: Scope,
        client: str | None = None,
        recognised: Recognised = lambda _key_id, _user: None,
    ) -> Principal:
        """Who sent these headers (`Authorization`, `X-User-Id`) from the address `client`, provided that they may do what is needed.

        `recognised` is called once the credentials are known to be good, before it is judged what they are good for.
        Raises `Unauthenticated` (which part was wrong is not told), `Forbidden` without the scope and for what the credentials
        are not good for, `InvalidRequest` for a user id that is malformed, or missing where files are concerned,
        `TokenKeysUnavailable` and `DatabaseUnavailable`.
        """
        scheme, _, credentials = (authorization or "").partition(" ")
        credentials = credentials.strip(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated
        presented = api_keys.parse(credentials)
        if presented is not None:
            row = await self._api_key(*presented)
            recognised(row.key_id, acting_user)
            return self._by_key(row, acting_user, needed, client)
        if self._tokens is None or self._token_users is None:
            raise Unauthenticated
        user_id = await self._tokens.user_id(credentials)
        recognised(None, user_id)
        return _by_token(user_id, acting_user, needed)

    def remembered(self, authorization: str | None, acting_user: str | None, needed: Scope) -> Principal | None:
        """The principal whom `principal` would tell, and `admit_user` admit, where both have the answer in memory and it is a plain yes.

        None says nothing of the credentials, and leaves no trace.
        """
        scheme, _, credentials = (authorization or "").partition(" ")
        credentials = credentials.strip(" ")
        if scheme.lower() != "bearer":
            return None
        try:
            presented = api_keys.parse(credentials)
            if presented is not None:
                row = self._remembered_key(presented)
                # Where the client is decides for those with networks, and is told to the log when it is the wrong place.
                return None if row is None or row.networks is not None else self._by_key(row, acting_user, needed, None)
            if self._tokens is None or self._token_users is None:
                return None
            user_id = self._tokens.remembered(credentials)
            return None if user_id is None or not self._token_users.is_known(user_id) else _by_token(user_id, acting_user, needed)
        except CofferError:
            return None

    async def admit_user(self, principal: Principal) -> None:
        """Sees to it that a user who came with a token has a row. Raises `UserUnknown` and `DatabaseUnavailable`.

        Apart from `principal`, so that who makes the user is known, for the audit trail, and counted, before the user is made.
        """
        if principal.key_id is None and principal.user_id is not None and self._token_users is not None:
            await self._token_users.admit(principal.user_id)

    def _by_key(self, row: ApiKeyRow, acting_user: str | None, needed: Scope, client: str | None) -> Principal:
        if row.networks is not None and not _is_within(client, row.networks):
            log.warning("an API key was used outside of its networks", extra={"key_id": row.key_id, "client": client})
            raise Forbidden(needed)
        # Users and kinds say nothing of an admin's routes. No such key can be made; by hand in the database, it is no admin's.
        if needed not in row.scopes or (needed is Scope.ADMIN and not (row.user_ids is None and row.kinds is None)):
            raise Forbidden(needed)
        user_id = None if acting_user is None else clean_user_id(acting_user, "X-User-Id")
        if user_id is not None and row.user_ids is not None and user_id not in row.user_ids:
            raise Forbidden(needed)
        kinds = None if row.kinds is None else frozenset(row.kinds)
        principal = Principal(user_id=user_id, key_id=row.key_id, scopes=frozenset(row.scopes), kinds=kinds)
        if needed is not Scope.ADMIN:
            _ = principal.owner
        self._used[row.key_id] = datetime.now(UTC)
        return principal

    async def _api_key(self, key_id: str, secret_sha256: bytes) -> ApiKeyRow:
        # The digest is part of the cache's key, so a hit means that this very secret was found right. Whoever times the
        # look-up learns about a digest, from which no secret follows.
        presented = (key_id, secret_sha256)
        now = self._clock()
        row = self._remembered_key(presented)
        if row is None:
            row = await find_api_key(self._db, key_id)
            # An unknown id is compared too, so that both kinds of bad key take the same way.
            if not hmac.compare_digest(secret_sha256, row.secret_sha256 if row else bytes(32)) or row is None:
                raise Unauthenticated
            # The age counts from before the query: a revocation during it must not be outlived any longer.
            self._remember(presented, now + self._cache_seconds, row)
        if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= datetime.now(UTC)):
            raise Unauthenticated
        return row

    def _remembered_key(self, presented: tuple[str, bytes]) -> ApiKeyRow | None:
        """None for one that has expired since."""
        until, row = self._cache.get(presented, (-math.inf, None))
        if row is None or self._clock() >= until or (row.expires_at is not None and row.expires_at <= datetime.now(UTC)):
            return None
        return row

    def _remember(self, presented: tuple[str, bytes], until: float, row: ApiKeyRow) -> None:
        self._cache.pop(presented, None)
        if len(self._cache) >= _MOST_CACHED_KEYS:
            del self._cache[next(iter(self._cache))]
        if row.revoked_at is None:
            self._cache[presented] = (until, row)

    async def _note_uses(self) -> None:
        while True:
            await asyncio.sleep(_NOTE_USE_SECONDS)
            await self.note_uses()

    async def note_uses(self) -> None:
        """Writes when keys were last used, all in one statement. Never raises; what cannot be written now is written later."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            await note_api_keys_used(self._db, used)
        except CofferError as problem:
            self._used = used | self._used
            log.warning("could not write when keys were last used; will try again: %s", problem)
        except Exception:
            log.exception("could not write when keys were last used")


def _by_token(user_id: str, acting_user: str | None, needed: Scope) -> Principal:
    if needed not in USER_TOKEN_SCOPES or acting_user not in (None, user_id):
        raise Forbidden(needed)
    return Principal(user_id=user_id, key_id=None, scopes=USER_TOKEN_SCOPES)


def _is_within(client: str | None, networks: list[IPv4Network | IPv6Network]) -> bool:
    """An address that is not known, as behind a Unix socket, is within no network."""
    try:
        address = ip_address(client or "")
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # an IPv4 client of a socket that listens on both
    return any(address in network for network in networks)
