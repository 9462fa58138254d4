"""Whom a request comes from when proxies stand in front, and which headers nobody outside may send.

A forwarding header is a claim. It is believed when the peer of the connection is a proxy that the settings trust, and then only in
the one form that the settings name: a proxy that writes X-Forwarded-For passes a client's own Forwarded on as it came.
"""

import re
from collections.abc import MutableMapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from server.settings import Settings

BY_PROXY = "by_proxy"  # under this name a request's state says that a trusted proxy passed it on, and said for whom

Address = IPv4Address | IPv6Address

# Read here or by nobody. No handler ever sees them, so none can come to depend on what a client may have made up.
_NOT_FROM_OUTSIDE = (
    b"forwarded",
    b"x-forwarded-",
    b"x-real-ip",
    b"x-accel-",
    b"x-sendfile",
    b"x-coffer-",
    b"x-original-",
    b"x-rewrite-url",
    b"x-http-method",
    b"x-method-override",
)
_FROM_OUTSIDE = frozenset({b"x-http-method-override"})  # tus has it, for clients that cannot send PATCH; its door alone reads it
_MOST_PROXIES = 16  # in a row; what lies behind more is not looked for
_LONGEST_HOP = 256
_MOST_REMEMBERED = 1_024  # addresses, and lists of them: reading one takes longer than all the rest

# RFC 7239, section 4: `token=token` or `token="quoted"`, separated by semicolons.
_PAIR = re.compile(r'\s*([A-Za-z]+)=(?:"([^"\\]*)"|([^\s";,=]+))\s*')
_WITH_PORT = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<v4>[0-9.]+))(?::[0-9]{1,5})?")


class Proxies:
    """Puts the true client into a request's scope, for the log, limits and keys that hold for some networks only."""

    def __init__(self, settings: Settings) -> None:
        self._trusted = settings.trusted_proxies
        self._rfc_7239 = settings.proxy_header == "forwarded"
        self._trusts = lru_cache(_MOST_REMEMBERED)(self._is_trusted)
        self._client = lru_cache(_MOST_REMEMBERED)(self._client_of)

    def settle(self, scope: MutableMapping[str, Any]) -> None:
        """Sets `client` and `scheme` to what trusted proxies say of them, and takes every forwarding and internal header out.

        The client is the right-most address that is no trusted proxy's: further left stands what the client itself may have
        written. Where that is no address the client stays the proxy. IPv4 inside IPv6 becomes IPv4.
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        kept = [each for each in headers if not each[0].startswith(_NOT_FROM_OUTSIDE) or each[0] in _FROM_OUTSIDE]
        client = scope.get("client")
        if client is not None and client[0].startswith("::ffff:"):
            client = scope["client"] = (str(_plain(ip_address(client[0]))), client[1])
        if len(kept) == len(headers):
            return
        # Who has no address (a Unix socket) cannot be told from anybody else on this machine, and is not believed.
        if self._trusted and client is not None and self._trusts(client[0]):
            self._believe(scope, headers)
            scope.setdefault("state", {})[BY_PROXY] = True
        scope["headers"] = kept

    def _believe(self, scope: MutableMapping[str, Any], headers: list[tuple[bytes, bytes]]) -> None:
        if self._rfc_7239:
            client, scheme = self._rfc_7239_client(_joined(headers, b"forwarded"))
        else:
            client = self._client(_joined(headers, b"x-forwarded-for"))
            scheme = _joined(headers, b"x-forwarded-proto").rpartition(",")[2].strip().lower()
        if client is not None:
            scope["client"] = (client, 0)
        if scheme in ("http", "https"):
            scope["scheme"] = scheme

    def _rfc_7239_client(self, value: str) -> tuple[str | None, str]:
        elements = [_pairs(element) for element in value.rsplit(",", _MOST_PROXIES)[-_MOST_PROXIES:]]
        return self._right_most([element.get("for", "") for element in elements]), elements[-1].get("proto", "").lower()

    def _client_of(self, value: str) -> str | None:
        return self._right_most(value.rsplit(",", _MOST_PROXIES)[-_MOST_PROXIES:])

    def _right_most(self, hops: list[str]) -> str | None:
        """The right-most that is no trusted proxy; if all are, the left-most. None where one that matters is no address."""
        address = None
        for hop in reversed(hops):
            address = _address(hop)
            if address is None or not self._trusts(str(address)):
                break
        return None if address is None else str(address)

    def _is_trusted(self, text: str) -> bool:
        try:
            address = _plain(ip_address(text))
        except ValueError:
            return False
        return any(address in network for network in self._trusted if network.version == address.version)


def _joined(headers: list[tuple[bytes, bytes]], wanted: bytes) -> str:
    """A repeated header is one list, in the order in which it came (RFC 9110, section 5.3)."""
    return ",".join(value.decode("latin-1") for name, value in headers if name == wanted)


def _pairs(element: str) -> dict[str, str]:
    """What one proxy says of one hop (RFC 7239). Nothing where any part is malformed, or stands there twice."""
    pairs = [_PAIR.fullmatch(pair) for pair in element.split(";") if pair.strip()] if len(element) <= _LONGEST_HOP else []
    found = {pair[1].lower(): pair[2] if pair[3] is None else pair[3] for pair in pairs if pair is not None}
    return found if len(found) == len(pairs) else {}


def _address(hop: str) -> Address | None:
    """An address, perhaps with a port, `[...]` around IPv6. None for everything else, `unknown` and `_hidden` too."""
    text = hop.strip()
    if len(text) > _LONGEST_HOP:
        return None
    if match := _WITH_PORT.fullmatch(text):
        text = match["v6"] or match["v4"] or ""
    try:
        return _plain(ip_address(text))
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
