"""What settings may hold: their types, and how each is read from its text.

A reader raises `ValueError` with the remedy; `settings.py` puts the variable's name before it.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

_HOST_AND_PORT = re.compile(r"(?:\[[^\]]*\]|[^\s:@]*)(?::([0-9]*))?")


_SHORTEST_LINK_KEY = 32
_MOST_AUDIT_LOG_DAYS = 36_500


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests at once, regained evenly over so many seconds."""

    requests: int
    seconds: int

    def __str__(self) -> str:
        return f"{self.requests}/{self.seconds}"


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ValueError("say a whole number") from None


def optional_whole(text: str) -> int | None:
    """A whole number, or None for no limit."""
    return None if text.strip().lower() in {"", "auto", "none", "unlimited"} else whole(text)


def boolean(text: str) -> bool:
    """True or false, in the usual words."""
    try:
        return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}[
            text.strip().lower()
        ]
    except KeyError:
        raise ValueError("say true or false") from None


def database_url(text: str) -> str:
    """Tells what is no address of PostgreSQL from one where nobody answers. The text may hold a password, so it is not repeated.

    A bare @ in a password is refused, as asyncpg would take what follows it for a host and show it in its complaint.
    """
    try:
        parts = urlsplit(text)
        hosts = [_HOST_AND_PORT.fullmatch(host) for host in parts.netloc.split("@", 1)[-1].split(",")]
        usable = parts.scheme in {"postgresql", "postgres"} and all(host and int(host[1] or 0) < 2**16 for host in hosts)
    except ValueError:
        usable = False
    if text and not usable:
        raise ValueError("say postgresql://user:password@host:port/name, with what is special in a password percent-encoded")
    return text


def words(text: str) -> tuple[str, ...]:
    """Words between spaces or commas."""
    return tuple(text.replace(",", " ").split())


def link_keys(text: str) -> tuple[str, ...]:
    """Secrets, each long enough not to be guessed."""
    keys = words(text)
    if any(len(key) < _SHORTEST_LINK_KEY for key in keys):
        raise ValueError(f"each key needs at least {_SHORTEST_LINK_KEY} characters, e.g. from: openssl rand -base64 32")
    return keys


def base_url(text: str) -> str:
    """A URL that paths are put behind, without a slash at its end."""
    if text and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise ValueError("say https://host, without query")
    return text.rstrip("/")


def internal_path(text: str) -> str:
    """A path of nginx's that none of its clients reaches, without a slash at its end."""
    if text and not re.fullmatch(r"(/[A-Za-z0-9_-]+)+/?", text):
        raise ValueError("say /a/path of letters, digits, hyphens and underscores")
    return text.rstrip("/")


# Asymmetric ones only: whoever can check an HS* token can make one, and `none` is no signature (RFC 8725, sections 2.1 and 3.2).
TokenAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_Text = Annotated[str, Meta(min_length=1, max_length=1024)]


class TokenIssuer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose user tokens are taken, and which of them: one entry of `COFFER_TOKEN_ISSUERS`.

    `issuer` is the exact text of the claim `iss`; `audiences` and `authorized_parties` are what `aud` and `azp` may be. Its keys
    come from `jwks_url`, or without any network from `public_key_file` (PEM or JWKS). `leeway_seconds` forgives clocks that differ.
    """

    issuer: _Text
    audiences: tuple[_Text, ...] = ()
    authorized_parties: tuple[_Text, ...] = ()
    algorithms: Annotated[tuple[TokenAlgorithm, ...], Meta(min_length=1)] = ("RS256",)
    jwks_url: _Text | None = None
    public_key_file: _Text | None = None
    leeway_seconds: Annotated[int, Meta(ge=0, le=300)] = 5


def token_issuers(text: str) -> tuple[TokenIssuer, ...]:
    """The issuers in a JSON list, with what would make one unsafe refused."""
    if not text.strip():
        return ()
    try:
        issuers = msgspec.json.decode(text, type=tuple[TokenIssuer, ...])
    except msgspec.ValidationError as problem:
        raise ValueError(str(problem).replace("`$", "`")) from None
    except (msgspec.DecodeError, RecursionError) as problem:
        raise ValueError(f"say a JSON list of issuers: {problem}") from None
    for number, each in enumerate(issuers):
        if each.issuer in {other.issuer for other in issuers[:number]}:
            raise _wrong_entry(number, "issuer", "is named twice")
        if (each.jwks_url is None) == (each.public_key_file is None):
            raise _wrong_entry(number, "jwks_url", "say either this or public_key_file")
        if each.jwks_url is not None and not _is_safe_url(each.jwks_url):
            raise _wrong_entry(number, "jwks_url", "must be an https URL without credentials; http is for loopback only")
        if not each.audiences and not each.authorized_parties:
            # A token that the issuer made for another app would be good here (RFC 8725, section 3.9).
            raise _wrong_entry(number, "audiences", "say whom tokens must be for, here or in authorized_parties")
    return issuers


_PIPELINE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_LEAST_SECRET_BYTES = 24  # of Standard Webhooks' specification


Preset = Literal["character", "moodboard", "animation"]


class Pipeline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who works on jobs: one entry of `COFFER_PIPELINES`.

    `secrets` sign its messages (`whsec_` and base64 of 24 to 64 bytes); the first signs ours, all verify, so a new one is put first and the
    old one dropped when the pipeline has changed over. Without `adapter` the pipeline comes by itself; `dispatch` has each job sent to
    `url`; `polling` submits it to `url`, with `token` as a bearer's, and asks after it each `poll_seconds`. `presets` are those of
    `POST /api/generate/...` that it gets where no other is named.
    """

    name: _Text
    secrets: tuple[_Text, ...] = ()
    adapter: Literal["dispatch", "polling"] | None = None
    url: _Text | None = None
    token: _Text | None = None
    poll_seconds: Annotated[int, Meta(ge=1, le=3600)] = 5
    presets: tuple[Preset, ...] = ()


def pipelines(text: str) -> tuple[Pipeline, ...]:
    """The pipelines in a JSON list. A complaint never repeats a secret."""
    if not text.strip():
        return ()
    try:
        found = msgspec.json.decode(text, type=tuple[Pipeline, ...])
    except msgspec.ValidationError as problem:
        raise ValueError(str(problem).replace("`$", "`")) from None
    except (msgspec.DecodeError, RecursionError):
        raise ValueError("say a JSON list of pipelines") from None
    for number, each in enumerate(found):
        if not _PIPELINE_NAME.fullmatch(each.name) or each.name in {other.name for other in found[:number]}:
            raise _wrong_entry(number, "name", "must be a name of its own, of a-z, 0-9, _ and -")
        if not all(is_webhook_secret(secret) for secret in each.secrets):
            raise _wrong_entry(number, "secrets", "must be whsec_ and the base64 of 24 to 64 bytes, e.g. from: openssl rand -base64 32")
        if each.adapter is not None and (each.url is None or not _is_safe_url(each.url)):
            raise _wrong_entry(number, "url", "must be an https URL without credentials; http is for loopback only")
        if each.adapter == "dispatch" and not each.secrets:
            raise _wrong_entry(number, "secrets", "are needed to sign what is sent")
    return found


def is_webhook_secret(text: str) -> bool:
    """Whether it is one by Standard Webhooks: `whsec_` and the base64 of 24 to 64 bytes."""
    try:
        secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:
        return False
    return text.startswith("whsec_") and _LEAST_SECRET_BYTES <= len(secret) <= 64


def _wrong_entry(number: int, name: str, reason: str) -> ValueError:
    """As msgspec words its own."""
    return ValueError(f"{reason} - at `[{number}].{name}`")


def _is_safe_url(url: str) -> bool:
    """https without credentials; http where nobody is in between."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return False
    if not host or "@" in parts.netloc or not url.isascii() or not url.isprintable() or " " in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Addresses and networks in CIDR form. The whole internet is refused: who trusts everybody lets everybody choose an address."""
    try:
        found = tuple(ip_network(word) for word in words(text))
    except ValueError:
        found = ()
    if (text.strip() and not found) or any(network.prefixlen == 0 for network in found):
        raise ValueError("say addresses or networks without host bits, such as 127.0.0.1 10.0.0.0/8 2001:db8::/48; not 0.0.0.0/0")
    return found


def hosts(text: str) -> tuple[str, ...]:
    """Names of hosts, or `*.` and a name for all below it."""
    found = words(text.lower())
    for each in found:
        if not re.fullmatch(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", each):
            raise ValueError("say names of hosts, such as files.example.com *.example.org, without scheme and port")
    return found


_OWN_PORT = re.compile(r"http://.*:80|https://.*:443")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


def origins(text: str) -> tuple[str, ...]:
    """Origins as browsers send them, since they are compared as they stand: lower case, without the scheme's own port."""
    found = tuple(word.lower() for word in words(text))
    if found != ("*",) and not all(_ORIGIN.fullmatch(word) and not _OWN_PORT.fullmatch(word) for word in found):
        raise ValueError("say * alone, or origins such as https://app.example.com or http://localhost:5173, without path and default port")
    return found


def steps(least: int, most: int, most_steps: int) -> Callable[[str], tuple[int, ...]]:
    """A reader of ascending whole numbers between two bounds, separated by spaces or commas."""

    def read(text: str) -> tuple[int, ...]:
        numbers = tuple(sorted({whole(word) for word in words(text)}))
        if not numbers or len(numbers) > most_steps or numbers[0] < least or numbers[-1] > most:
            raise ValueError(f"say 1 to {most_steps} whole numbers from {least} to {most}")
        return numbers

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """A reader that takes one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"say {' or '.join(choices)}")
        return text

    return read


def some_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """A reader that takes any of these words, and gives them in this order."""

    def read(text: str) -> tuple[str, ...]:
        found = words(text)
        if not set(found) <= set(choices):
            raise ValueError(f"say {' or '.join(choices)}, or several with commas")
        return tuple(each for each in choices if each in found)

    return read


def rate(text: str) -> Rate | None:
    """`requests/seconds`, or None for no limit."""
    if text.strip().lower() in {"", "off", "none", "unlimited"}:
        return None
    match = re.fullmatch(r"\s*([0-9_]{1,12})\s*/\s*([0-9_]{1,9})\s*", text)
    found = Rate(whole(match[1]), whole(match[2])) if match else None
    if found is None or found.requests < 1 or found.seconds < 1:
        raise ValueError("say requests/seconds, such as 600/60, or off")
    return found


def clamd(text: str) -> str:
    """Where clamd listens: a Unix socket, or a host and port."""
    tcp = re.fullmatch(r"tcp:(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*):([0-9]{1,5})", text)
    if text and not re.fullmatch(r"unix:/[^\0]+", text) and not (tcp and 0 < int(tcp[1]) < 2**16):
        raise ValueError("say unix:/path/of/its/socket or tcp:host:port")
    return text


def exempt_types(text: str) -> tuple[str, ...]:
    """MIME types, `*` for all of one kind."""
    types = words(text.lower())
    for each in types:
        if not re.fullmatch(r"[a-z]+/(\*|[a-z0-9][a-z0-9.+-]*)", each):
            raise ValueError("say MIME types, such as video/* or image/png")
    return types


def audit_log_days(text: str) -> int:
    """Days that the database lets the audit trail be cut to, or 0."""
    days = whole(text)
    if not (days == 0 or 30 <= days <= _MOST_AUDIT_LOG_DAYS):
        raise ValueError(f"say days, from 30 to {_MOST_AUDIT_LOG_DAYS}, or 0 for ever")
    return days
