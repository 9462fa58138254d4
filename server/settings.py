"""Every setting of Coffer, read once from the environment into one frozen object.

A setting's variable is `COFFER_` and its name in capitals (`COFFER_PORT`); `DATABASE_URL` is also read under its
usual name. A secret may come as a file instead: `COFFER_DATABASE_URL_FILE=/path`, or a systemd credential called
`database_url`. `coffer config` prints all of them with their sources.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

KIB, MIB, GIB = 2**10, 2**20, 2**30

_HOST_AND_PORT = re.compile(r"(?:\[[^\]]*\]|[^\s:@]*)(?::([0-9]*))?")


_SHORTEST_LINK_KEY = 32
_MOST_AUDIT_LOG_DAYS = 36_500


class SettingError(ValueError):
    """A setting is missing or cannot be understood. The message names the variable and the remedy."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests at once, regained evenly over so many seconds."""

    requests: int
    seconds: int

    def __str__(self) -> str:
        return f"{self.requests}/{self.seconds}"


def _whole(text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ValueError("say a whole number") from None


def _optional_whole(text: str) -> int | None:
    return None if text.strip().lower() in {"", "auto", "none", "unlimited"} else _whole(text)


def _boolean(text: str) -> bool:
    try:
        return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}[
            text.strip().lower()
        ]
    except KeyError:
        raise ValueError("say true or false") from None


def _database_url(text: str) -> str:
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


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.replace(",", " ").split())


def _link_keys(text: str) -> tuple[str, ...]:
    keys = tuple(text.replace(",", " ").split())
    if any(len(key) < _SHORTEST_LINK_KEY for key in keys):
        raise ValueError(f"each key needs at least {_SHORTEST_LINK_KEY} characters, e.g. from: openssl rand -base64 32")
    return keys


def _base_url(text: str) -> str:
    if text and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise ValueError("say https://host, without query")
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


def _token_issuers(text: str) -> tuple[TokenIssuer, ...]:
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
            raise _wrong_issuer(number, "issuer", "is named twice")
        if (each.jwks_url is None) == (each.public_key_file is None):
            raise _wrong_issuer(number, "jwks_url", "say either this or public_key_file")
        if each.jwks_url is not None and not _is_safe_url(each.jwks_url):
            raise _wrong_issuer(number, "jwks_url", "must be an https URL without credentials; http is for loopback only")
        if not each.audiences and not each.authorized_parties:
            # A token that the issuer made for another app would be good here (RFC 8725, section 3.9).
            raise _wrong_issuer(number, "audiences", "say whom tokens must be for, here or in authorized_parties")
    return issuers


def _wrong_issuer(number: int, name: str, reason: str) -> ValueError:
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


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Addresses and networks in CIDR form. The whole internet is refused: who trusts everybody lets everybody choose an address."""
    try:
        networks = tuple(ip_network(word) for word in _words(text))
    except ValueError:
        networks = ()
    if (text.strip() and not networks) or any(network.prefixlen == 0 for network in networks):
        raise ValueError("say addresses or networks without host bits, such as 127.0.0.1 10.0.0.0/8 2001:db8::/48; not 0.0.0.0/0")
    return networks


_OWN_PORT = re.compile(r"http://.*:80|https://.*:443")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


def _origins(text: str) -> tuple[str, ...]:
    """Origins as browsers send them, since they are compared as they stand: lower case, without the scheme's own port."""
    words = tuple(word.lower() for word in _words(text))
    if words != ("*",) and not all(_ORIGIN.fullmatch(word) and not _OWN_PORT.fullmatch(word) for word in words):
        raise ValueError("say * alone, or origins such as https://app.example.com or http://localhost:5173, without path and default port")
    return words


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"say {' or '.join(choices)}")
        return text

    return read


def _rate(text: str) -> Rate | None:
    if text.strip().lower() in {"", "off", "none", "unlimited"}:
        return None
    match = re.fullmatch(r"\s*([0-9_]{1,12})\s*/\s*([0-9_]{1,9})\s*", text)
    rate = Rate(_whole(match[1]), _whole(match[2])) if match else None
    if rate is None or rate.requests < 1 or rate.seconds < 1:
        raise ValueError("say requests/seconds, such as 600/60, or off")
    return rate


def _clamd(text: str) -> str:
    tcp = re.fullmatch(r"tcp:(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*):([0-9]{1,5})", text)
    if text and not re.fullmatch(r"unix:/[^\0]+", text) and not (tcp and 0 < int(tcp[1]) < 2**16):
        raise ValueError("say unix:/path/of/its/socket or tcp:host:port")
    return text


def _exempt_types(text: str) -> tuple[str, ...]:
    types = _words(text.lower())
    for each in types:
        if not re.fullmatch(r"[a-z]+/(\*|[a-z0-9][a-z0-9.+-]*)", each):
            raise ValueError("say MIME types, such as video/* or image/png")
    return types


def _audit_log_days(text: str) -> int:
    days = _whole(text)
    if not (days == 0 or 30 <= days <= _MOST_AUDIT_LOG_DAYS):
        raise ValueError(f"say days, from 30 to {_MOST_AUDIT_LOG_DAYS}, or 0 for ever")
    return days


def setting(
    default: Any,
    meaning: str,
    *,
    read: Callable[[str], Any] = str,
    at_least: int | None = None,
    at_most: int | None = None,
    secret: bool = False,
) -> Any:
    """Declares one setting: its default (once), what it means with its unit, how its text is read, its bounds."""
    return field(default=default, metadata={"meaning": meaning, "read": read, "at_least": at_least, "at_most": at_most, "secret": secret})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings. Built by `Settings.load`; tests build it directly."""

    database_url: str = setting(
        "", "PostgreSQL 15 to 18 to use (postgresql://user:password@host:port/name). Required.", read=_database_url, secret=True
    )
    database_connections: int = setting(10, "Connections that each server process keeps at most.", read=_whole, at_least=2)

    host: str = setting("127.0.0.1", "Address to listen on. Put nginx in front before you change it.")
    port: int = setting(3001, "TCP port to listen on; 0 picks a free one.", read=_whole, at_least=0, at_most=65_535)
    processes: int = setting(1, "Server processes. One serves one core; the state is all in PostgreSQL.", read=_whole, at_least=1)
    log_level: str = setting("info", "Least severe level that is logged: debug, info, warning, error.")

    default_quota_bytes: int | None = setting(
        10 * GIB, "Quota in bytes of a user seen for the first time; `unlimited` for none.", read=_optional_whole, at_least=0
    )
    max_file_bytes: int = setting(2 * GIB, "Largest single file, in bytes.", read=_whole, at_least=1)
    volume_reserve_bytes: int | None = setting(
        None, "Free bytes that uploads leave on a volume; `auto` is the larger of 1 % and 1 GiB.", read=_optional_whole, at_least=0
    )
    max_list_page: int = setting(200, "Most files that one page of a list may hold.", read=_whole, at_least=1)

    types_video: tuple[str, ...] = setting((), "MIME types accepted as video; empty means all that Coffer knows.", read=_words)
    types_image: tuple[str, ...] = setting((), "MIME types accepted as image; empty means all that Coffer knows.", read=_words)
    types_scene: tuple[str, ...] = setting((), "MIME types accepted as scene; empty means all that Coffer knows.", read=_words)
    types_project: tuple[str, ...] = setting((), "MIME types accepted as project; empty means all that Coffer knows.", read=_words)
    types_audio: tuple[str, ...] = setting((), "MIME types accepted as audio; empty means all that Coffer knows.", read=_words)

    buffered_body_bytes: int = setting(
        1 * MIB, "Uploads up to this many bytes wait in memory and charge the quota at the commit alone.", read=_whole, at_least=0
    )
    buffered_total_bytes: int = setting(
        64 * MIB,
        "Bytes that all buffered uploads of a process may hold together, one user's a quarter of it; past it they go to disk at once.",
        read=_whole,
        at_least=0,
    )
    reservation_step_bytes: int = setting(64 * MIB, "Step by which an upload of undeclared length reserves quota.", read=_whole, at_least=1)
    reservation_lease_seconds: int = setting(
        120,
        "How long a reservation outlives the process that renews it. A crashed upload's quota returns after this.",
        read=_whole,
        at_least=5,
    )
    idempotency_wait_seconds: int = setting(
        30, "How long a repeated request waits for the first one with its Idempotency-Key.", read=_whole, at_least=0
    )
    leftover_age_seconds: int = setting(
        86_400, "Age at which a file in incoming/ that no upload claims is removed.", read=_whole, at_least=60
    )
    api_key_cache_seconds: int = setting(
        3,
        "How long a server process trusts an API key it has just checked: the longest a revoked key still works.",
        read=_whole,
        at_least=0,
    )
    link_keys: tuple[str, ...] = setting(
        (),
        "Secrets that sign links, at least 32 characters each, separated by spaces or lines. The first signs, all verify: to change it, "
        "put a new one first, and drop the old one when its links have ended. Required to serve.",
        read=_link_keys,
        secret=True,
    )
    public_url: str = setting(
        "",
        "Where browsers reach this server, e.g. https://media.example.com: links start with it. Empty: links start with /.",
        read=_base_url,
    )
    link_ttl_seconds: int = setting(3_600, "Life of a link for which none is asked.", read=_whole, at_least=1)
    link_max_ttl_seconds: int = setting(7 * 86_400, "Longest life of a link that may be asked for.", read=_whole, at_least=1)
    link_window_seconds: int = setting(
        300, "Who asks for the same link within such a window gets the same one; it lives up to this much longer.", read=_whole, at_least=1
    )
    link_cache: str = setting(
        "private",
        "Who may cache what a link gives, for its life: `private` (browsers) or `public` (CDNs too).",
        read=_one_of("private", "public"),
    )
    public_max_age_seconds: int = setting(
        300, "How long browsers and CDNs may keep a public file: the longest it is seen after that was ended.", read=_whole, at_least=0
    )
    token_issuers: tuple[TokenIssuer, ...] = setting(
        (), "Issuers of user tokens, as a JSON list (see User tokens); empty takes API keys alone.", read=_token_issuers
    )
    token_users_are_created: bool = setting(
        True, "Make a user with the default quota at the first valid token; otherwise unknown users are refused.", read=_boolean
    )
    token_keys_refetch_seconds: int = setting(
        10, "Least seconds between two fetches of an issuer's keys, whatever tokens ask for.", read=_whole, at_least=1
    )
    token_keys_max_age_seconds: int = setting(
        86_400, "How long an issuer's keys are used while it cannot be reached.", read=_whole, at_least=60
    )
    link_resource_policy: str = setting(
        "cross-origin",
        "Whose pages may show what a link gives, as in <img>: `cross-origin` (any), `same-site` or `same-origin`.",
        read=_one_of("cross-origin", "same-site", "same-origin"),
    )

    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = setting(
        (), "Addresses or networks of proxies that are believed when they name the client, e.g. 127.0.0.1 10.0.0.0/8.", read=_networks
    )
    proxy_header: str = setting(
        "x-forwarded-for",
        "How they name it: `x-forwarded-for` (with X-Forwarded-Proto) or `forwarded` (RFC 7239). The other one is ignored.",
        read=_one_of("x-forwarded-for", "forwarded"),
    )
    cors_origins: tuple[str, ...] = setting(
        (), "Origins whose pages may call the API and use links, e.g. https://app.example.com; `*` for any.", read=_origins
    )
    hsts_seconds: int = setting(
        31_536_000, "How long browsers that came by TLS keep to it (Strict-Transport-Security); 0 says nothing.", read=_whole, at_least=0
    )
    request_head_seconds: int = setting(20, "How long a client may take to send the head of a request.", read=_whole, at_least=1)
    slow_upload_bytes_per_second: int = setting(
        1 * KIB, "Slowest pace of a request's body; while the server is busy itself does not count. 0 permits any.", read=_whole, at_least=0
    )
    slow_upload_grace_seconds: int = setting(
        30,
        "Waiting time over which that pace is measured; also how long the rest of a refused body is read away.",
        read=_whole,
        at_least=1,
    )
    slow_download_grace_seconds: int = setting(
        60, "After how long a client that takes no byte of its answer is cut off.", read=_whole, at_least=1
    )
    rate_per_user: Rate | None = setting(
        Rate(60_000, 60), "Requests for one user with one key, as requests/seconds; `off` for any number. See Limits.", read=_rate
    )
    rate_per_key: Rate | None = setting(None, "Requests with one key, whomever it acts for.", read=_rate)
    rate_links_per_address: Rate | None = setting(
        Rate(60_000, 60), "Requests of signed links and public files from one address.", read=_rate
    )
    rate_failures_per_address: Rate | None = setting(
        Rate(600, 60), "Requests from one address that are answered 401. Past it, credentials from there are refused unseen.", read=_rate
    )
    rate_exempt_addresses: tuple[IPv4Network | IPv6Network, ...] = setting(
        (), "Addresses and networks for which the limits per address do not hold, such as those of your own backends.", read=_networks
    )
    uploads_at_once_per_user: int | None = setting(
        256, "Uploads that one user may have under way; `unlimited` for any number.", read=_optional_whole, at_least=1
    )
    upload_links_per_user: int | None = setting(
        1_000, "Upload links of one user that have brought no file yet; `unlimited` for any number.", read=_optional_whole, at_least=1
    )
    clamd: str = setting(
        "",
        "Where clamd listens, which every file is shown to before it is stored: unix:/run/clamav/clamd.ctl or tcp:host:port. Empty: "
        "nothing is scanned.",
        read=_clamd,
    )
    clamd_timeout_seconds: int = setting(
        60, "How long one file's scan may take, waiting for its turn included; longer is refused with 503.", read=_whole, at_least=1
    )
    clamd_max_bytes: int = setting(
        25 * MIB,
        "Largest file that is scanned, in bytes. clamd's own StreamMaxLength, MaxFileSize and MaxScanSize must not be less.",
        read=_whole,
        at_least=1,
        at_most=2 * GIB - 1,  # clamd itself skips what is larger, and calls it clean
    )
    clamd_scans_at_once: int = setting(
        4, "Scans that a server process runs at once; those of all processes should stay below clamd's MaxThreads.", read=_whole, at_least=1
    )
    scan_exempt_types: tuple[str, ...] = setting(
        (), "MIME types that are stored without a scan, by the bytes' own type: image/png, video/*.", read=_exempt_types
    )
    scan_oversize: str = setting(
        "refuse",
        "What becomes of a file that is too large to be scanned: `refuse`, or `accept` it unscanned.",
        read=_one_of("refuse", "accept"),
    )
    audit_log_days: int = setting(
        400,
        "How long the audit trail keeps a record, in days; 0 for ever. Not less than 30: the database itself keeps those.",
        read=_audit_log_days,
    )
    audit_reads: bool = setting(
        False, "Record downloads and the making of download links too: each then costs a write, and is refused without one.", read=_boolean
    )
    schema_documentation: bool = setting(True, "Serve the OpenAPI description and its page at /schema.", read=_boolean)

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Reads the environment; raises `SettingError` naming the first variable that is wrong or missing."""
        found = read_with_sources(os.environ if environment is None else environment)
        settings = cls(**{name: value for name, (value, _) in found.items()})
        if not settings.database_url:
            source = found["database_url"][1]
            wrong = f"{variable('database_url')} (or DATABASE_URL) is not set" if source == "default" else f"{source} is empty"
            raise SettingError(f"{wrong}: Coffer keeps its rows in PostgreSQL, e.g. postgresql://coffer:secret@127.0.0.1/coffer")
        return settings


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"COFFER_{name.upper()}"


def read_with_sources(environment: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Every setting's value and where it came from; for `Settings.load` and `coffer config`."""
    found: dict[str, tuple[Any, str]] = {}
    for each in fields(Settings):
        text, source = _text_of(each.name, bool(each.metadata["secret"]), environment)
        if text is None:
            found[each.name] = (each.default, "default")
            continue
        try:
            value = each.metadata["read"](text)
        except ValueError as problem:
            raise SettingError(f"{source}: {problem}") from None
        at_least = each.metadata["at_least"]
        if at_least is not None and value is not None and value < at_least:
            raise SettingError(f"{source}: must be at least {at_least}")
        at_most = each.metadata["at_most"]
        if at_most is not None and value > at_most:
            raise SettingError(f"{source}: must be at most {at_most}")
        found[each.name] = (value, source)
    return found


def _text_of(name: str, secret: bool, environment: Mapping[str, str]) -> tuple[str | None, str]:
    names = [variable(name)] + (["DATABASE_URL"] if name == "database_url" else [])
    for source in names:
        if source in environment:
            return environment[source], source
    if secret:
        places = [(f"{source}_FILE", environment[f"{source}_FILE"]) for source in names if f"{source}_FILE" in environment]
        if "CREDENTIALS_DIRECTORY" in environment:
            credential = Path(environment["CREDENTIALS_DIRECTORY"]) / name
            places += [(f"credential {name}", str(credential))] if credential.exists() else []
        for source, path in places:
            try:
                return Path(path).read_text().strip(), source
            except OSError as problem:
                raise SettingError(f"{source}: cannot read {path}: {problem.strerror}") from None
    return None, "default"
