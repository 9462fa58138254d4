"""How many requests are let in, by whom and from where; clients are told by `RateLimit-Policy`, `RateLimit` and `Retry-After`.

The first two are of draft-ietf-httpapi-ratelimit-headers (11 was the newest; no RFC yet), as lists of structured fields (RFC 9651).

Four policies, each with a setting and a bucket of its own per partition:

- `user`: requests per API key and user acted for, or per user with a token of their own; `key`: per API key alone.
- `links`: requests of links and public files, which carry no credentials, per address.
- `failures`: requests that are answered 401, per address. Past it, credentials from there are refused before they are looked at.

An address is the client's as the front knows it. Of IPv6 it is the /64, which is what one customer gets.
"""

from collections.abc import MutableMapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, NamedTuple

from server.errors import RateLimited
from server.rates import Buckets, Standing
from server.setting_values import Rate
from server.settings import Settings

ASGIScope = MutableMapping[str, Any]

_MOST_ADDRESSES_REMEMBERED = 4_096  # their text and what it stands for; parsing one costs more than the rest of a check
_STATE = "rate_limits"


class _Policy(NamedTuple):
    name: str
    rate: Rate
    advertised: bytes


class Limits:
    """The limits of requests. One per process; the counts are those of all processes of the machine."""

    def __init__(self, settings: Settings, buckets: Buckets) -> None:
        self._buckets = buckets
        self._user = _policy("user", settings.rate_per_user)
        self._key = _policy("key", settings.rate_per_key)
        self._links = _policy("links", settings.rate_links_per_address)
        self._failures = _policy("failures", settings.rate_failures_per_address)
        exempt = settings.rate_exempt_addresses
        self._partition = lru_cache(_MOST_ADDRESSES_REMEMBERED)(lambda address: _partition_of(address, exempt))

    def check_failures(self, scope: ASGIScope) -> None:
        """Before credentials are looked at. Raises `RateLimited` when too many from this address were wrong."""
        if self._failures and (address := self._address(scope)):
            standing = self._buckets.look(f"failures {address}", self._failures.rate)
            if not standing.admitted:
                self._tell(scope, self._failures, standing)

    def count_failure(self, scope: ASGIScope) -> None:
        """After credentials were found wrong. Raises `RateLimited` in place of that answer when there have been too many meanwhile."""
        if self._failures and (address := self._address(scope)):
            self._tell(scope, self._failures, self._buckets.take(f"failures {address}", self._failures.rate))

    def count_request(self, scope: ASGIScope, key_id: str | None, user_id: str | None) -> None:
        """A request with good credentials, whatever comes of it; `key_id` None is a user's own token. Raises `RateLimited`."""
        if self._key and key_id is not None:
            self._tell(scope, self._key, self._buckets.take(f"key {key_id}", self._key.rate))
        if self._user:
            # A key's id holds no space, so no two pairs give the same name; a user with a token has none.
            self._tell(scope, self._user, self._buckets.take(f"user {key_id or ''} {user_id}", self._user.rate))

    def count_link(self, scope: ASGIScope) -> None:
        """A request of a link's holder. Raises `RateLimited`."""
        if self._links and (address := self._address(scope)):
            standing = self._buckets.take(f"links {address}", self._links.rate)
            if not standing.admitted:  # otherwise nothing is told: caches keep these answers, for others too
                self._tell(scope, self._links, standing)

    def _address(self, scope: ASGIScope) -> str | None:
        client = scope.get("client")
        return self._partition(client[0]) if client else None

    def _tell(self, scope: ASGIScope, policy: _Policy, standing: Standing) -> None:
        scope.setdefault("state", {}).setdefault(_STATE, []).append((policy, standing))
        if not standing.admitted:
            raise RateLimited(policy.name, standing.more_in_seconds)


def rate_headers(scope: ASGIScope) -> list[tuple[bytes, bytes]]:
    """What the answer says of the limits that its request was counted against."""
    told: list[tuple[_Policy, Standing]] | None = scope["state"].get(_STATE)
    if told is None:
        return []
    standings = [f'"{policy.name}";r={standing.remaining};t={standing.more_in_seconds}' for policy, standing in told]
    return [
        (b"ratelimit-policy", b", ".join([policy.advertised for policy, _ in told])),
        (b"ratelimit", ", ".join(standings).encode("ascii")),
    ]


def _policy(name: str, rate: Rate | None) -> _Policy | None:
    return None if rate is None else _Policy(name, rate, f'"{name}";q={rate.requests};w={rate.seconds}'.encode("ascii"))


def _partition_of(text: str, exempt: tuple[IPv4Network | IPv6Network, ...]) -> str | None:
    """What counts as one address, or None for one that is not limited, or is none: a Unix socket's peer, say."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    if any(address in network for network in exempt):
        return None
    return str(IPv6Network((int(address) >> 64 << 64, 64))) if isinstance(address, IPv6Address) else str(address)
