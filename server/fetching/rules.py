"""Which URLs may be fetched, and which addresses may be connected to.

A URL is taken by a narrow grammar and sent on as the parts that were read: there is no second reader who could see another host in it.
What counts in the end is the address (`Rules.permits`), which is looked at after the name was resolved, right before the connection.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple
from urllib.parse import urljoin

from server.errors import UrlRefused
from server.settings import Settings

Address = IPv4Address | IPv6Address

LONGEST_URL = 2_048
_LONGEST_HOST = 253
_PORTS = {"http": 80, "https": 443}
_LEAST_OTHER_PORT = 1_024
"""Below it speak mail, shells and file systems, which must not be told anything in the words of HTTP."""

# RFC 3986 without user information, and without what readers disagree about (backslashes, blanks, percent signs in hosts).
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?(?P<query>\?[A-Za-z0-9._~!$&'()*+,;=:@%/?\[\]{}|^`\"<>-]*)?(?:\#.*)?",
    re.IGNORECASE | re.ASCII,
)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# A host whose last label is a number is an address to some readers (inet_aton: 127.1, 0x7f.1, 2130706433, 0177.0.0.1).
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

# What the IANA registries of special-purpose addresses hold, and multicast. A table of our own: what Python's `is_global` says differs
# from one release to the next.
_NOT_PUBLIC_4 = tuple(
    IPv4Network(each)
    for each in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, with clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # IETF protocol assignments, with DS-Lite and NAT64 discovery
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")
"""All that is assigned to be global. Beyond it lie loopback, mapped and compatible IPv4, NAT64, ULA, link-local, site-local, multicast."""
_NOT_PUBLIC_6 = tuple(
    IPv6Network(each)
    for each in (
        "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which holds an IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",  # 6bone
        "3fff::/20",  # documentation
    )
)


class Target(NamedTuple):
    """A URL as it was read. `host` is lower-case, an address without brackets; `request_path` is what HTTP asks for."""

    scheme: str
    host: str
    port: int
    request_path: str

    @property
    def authority(self) -> str:
        """As in a URL and in `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """In its plainest form, without fragment."""
        return f"{self.scheme}://{self.authority}{self.request_path}"


@dataclass(frozen=True, slots=True)
class Rules:
    """`hosts` are the only ones that may be named, `*.example.com` for all below example.com; empty permits all.

    `private_networks` are those that may be reached although they are not public, and by plain HTTP.
    """

    hosts: tuple[str, ...] = ()
    private_networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def from_settings(cls, settings: Settings) -> "Rules":
        return cls(settings.fetch_hosts, settings.fetch_private_networks)

    def read(self, url: str) -> Target:
        """The URL, provided that it may be fetched as far as its text tells. Raises `UrlRefused`."""
        match = _URL.fullmatch(url) if len(url) <= LONGEST_URL else None
        if match is None:
            raise UrlRefused(f"must be an http or https URL of at most {LONGEST_URL} ASCII characters, without user and password")
        scheme, host = match["scheme"].lower(), match["host"].lower()
        port = int(match["port"]) if match["port"] else _PORTS[scheme]
        if port not in _PORTS.values() and not _LEAST_OTHER_PORT <= port < 2**16:
            raise UrlRefused("its port must be 80, 443, or 1024 and above")
        target = Target(scheme, host.strip("[]"), port, (match["path"] or "/") + (match["query"] or ""))
        address = _literal(host)
        if not self._names(target.host):
            raise UrlRefused("its host is not one of those that may be fetched from")
        if address is not None:
            self.check(target, [address])
        elif scheme == "http" and not self.private_networks:
            raise UrlRefused("must be https")
        return target

    def redirected(self, target: Target, location: str) -> Target:
        """Where an answer of `target` leads to. Raises `UrlRefused`, as for any URL."""
        # A Location is sent with raw bytes by some; urljoin drops tabs and line ends, which no header holds.
        plain = re.sub(r"[^\x21-\x7e]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("latin-1", "replace")), location)
        try:
            return self.read(urljoin(target.url, plain))
        except ValueError as problem:  # brackets that hold no address
            raise UrlRefused("leads to what is no URL") from problem

    def check(self, target: Target, addresses: list[Address]) -> None:
        """Raises `UrlRefused` unless each address is one to connect to for this URL. One bad one spoils all: it is no accident."""
        for address in addresses:
            private = any(address.version == network.version and address in network for network in self.private_networks)
            if not private and not is_public(address):
                raise UrlRefused("its host has an address that is not public")
            if target.scheme == "http" and not private:
                raise UrlRefused("must be https")

    def _names(self, host: str) -> bool:
        return not self.hosts or any(host == each or (each.startswith("*.") and host.endswith(each[1:])) for each in self.hosts)


def is_public(address: Address) -> bool:
    """Whether an address is meant to be reached by everybody, and holds no other address that is not."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address.scope_id is None and address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


def _literal(host: str) -> Address | None:
    """The address that stands in a URL. None for a name. Raises `UrlRefused` for what is neither, or an address in another form."""
    if host.startswith("["):
        try:
            return IPv6Address(host[1:-1])
        except ValueError as problem:
            raise UrlRefused("its host is no IPv6 address") from problem
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return IPv4Address(host)  # four decimal numbers without leading zeros
        except ValueError as problem:
            raise UrlRefused("its host is a number, and no IPv4 address in its usual form") from problem
    if len(host) > _LONGEST_HOST or not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlRefused("its host is no name; write international ones in ASCII (xn--...), without a dot at the end")
    return None
