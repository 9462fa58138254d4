"""`coffer edge`: nginx's configuration, made from the settings and volumes of this installation (ops/nginx/).

What is written, below nginx's directory: `conf.d/coffer.conf`, `coffer/coffer_edge.lua`, `coffer/coffer_settings.lua`, and `coffer/keys`,
which only root may read: nginx's master reads it when it starts or reloads, and its workers inherit what it knows. It holds keys derived
for download links, with which nothing else can be signed.
"""

import difflib
import hmac
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from server.api.cors import ANSWER_HEADERS
from server.commands.failures import CommandFailed, Exit
from server.commands.output import say
from server.delivery.headers import CONTENT_SECURITY_POLICY, disposition_of
from server.delivery.links import DOWNLOAD_SALT
from server.delivery.previews import PREVIEW_MIME_TYPES
from server.kinds import DIRECTORIES, KNOWN
from server.ledger import Database, list_volumes
from server.settings import Settings, variable

TEMPLATES = Path(__file__).resolve().parents[2] / "ops" / "nginx"
ACCEL_PREFIX = "/coffer-files"

_STALE_SECONDS = 5  # as in ops/nginx/coffer_edge.lua
_PATH = re.compile(r"/[A-Za-z0-9_./~+-]*")
_HOST_NAME = re.compile(r"[A-Za-z0-9.-]{1,253}")
_ADDRESS = re.compile(r"[A-Za-z0-9.:\[\]-]{1,100}")
_ORIGIN = re.compile(r"[a-z]+://[A-Za-z0-9.:\[\]-]{1,253}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where nginx is and how it listens. Without a certificate it speaks plain HTTP, for tests and behind another end of TLS."""

    directory: Path = Path("/etc/nginx")
    program: str = "nginx"
    server_names: Sequence[str] = ()
    listen: str = ""
    certificate: Path | None = None
    certificate_key: Path | None = None
    metrics_listen: str = "127.0.0.1:8145"
    log_directory: Path = Path("/var/log/nginx")
    trusted_proxies: Sequence[IPv4Network | IPv6Network] = ()
    """Networks of proxies in front of nginx, such as a CDN's, that are believed when they name the client."""


async def install(db: Database, settings: Settings, *, site: Site, for_real: bool) -> None:
    """`coffer edge install`: tells what differs from what is there; `for_real` writes it, has nginx check it, and has nginx reload it.

    Safe to repeat. What nginx refuses is taken back, and its reason told: `REFUSED`.
    """
    wanted = await _wanted(db, settings, site)
    different = {path: text for path, text in wanted.items() if _text(path) != text}
    if not different:
        say("nginx's files are as they should be")
    for path, text in different.items():
        print(f"{'would write' if not for_real else 'writing'} {path}")
        if not _is_secret(path):
            _show_difference(path, text)
    if not for_real:
        if different:
            say("nothing was changed; --for-real does it")
        return
    before = {path: _text(path) for path in different}
    for path, text in different.items():
        _write(path, text)
    if (complaint := _nginx(site, "-t")) is not None:
        for path, old in before.items():
            if old is None:
                path.unlink()
            else:
                _write(path, old)
        raise CommandFailed(f"nginx refuses this, so nothing was changed:\n{complaint}{_advice(complaint)}", Exit.REFUSED)
    # Also when nothing differs: the nginx that runs may be older than its files.
    if (complaint := _nginx(site, "-s", "reload")) is not None:
        say(f"nginx could not be told to reload ({complaint}); start it with: systemctl start nginx")
    else:
        say("nginx has been told to reload")


async def check(db: Database, settings: Settings, *, site: Site) -> None:
    """`coffer edge check`: whether nginx's files are those of these settings, nginx takes them, and the server tells it of revoked links.

    Raises `CommandFailed` with the first thing that is wrong.
    """
    wanted = await _wanted(db, settings, site)
    if stale := [str(path) for path, text in wanted.items() if _text(path) != text]:
        raise CommandFailed(f"{', '.join(stale)}: not as these settings want it; `coffer edge install` tells the difference")
    for path in wanted:
        if _is_secret(path) and path.stat().st_mode & 0o077:
            raise CommandFailed(f"{path} must be readable by root alone: chmod 600 {path}")
    if (complaint := _nginx(site, "-t")) is not None:
        raise CommandFailed(f"nginx refuses its configuration:\n{complaint}{_advice(complaint)}")
    try:
        age_seconds = time.time() - Path(settings.edge_state_file).stat().st_mtime
    except OSError as problem:
        raise CommandFailed(f"{settings.edge_state_file}: {problem.strerror}; is the server running?", Exit.UNAVAILABLE) from problem
    if age_seconds > _STALE_SECONDS:
        raise CommandFailed(
            f"{settings.edge_state_file} was last written {age_seconds:.0f} s ago: is the server running, and its database?",
            Exit.UNAVAILABLE,
        )
    say("nginx's files are as they should be, and it is told of revoked links")


async def _wanted(db: Database, settings: Settings, site: Site) -> dict[Path, str]:
    """Every file that nginx needs, with its text."""
    _check(settings, site)
    own = site.directory / "coffer"
    volumes = {row.id: row.mount_path for row in await list_volumes(db)}
    for mount in volumes.values():
        _check_text(_PATH, mount, "the path of a volume")
    return {
        own / "keys": "".join(f"{derived_key(key)}\n" for key in settings.link_keys),
        # A copy: nginx's master runs it as root, so nobody else may change it.
        own / "coffer_edge.lua": (TEMPLATES / "coffer_edge.lua").read_text(),
        own / "coffer_settings.lua": lua_settings(settings, {volume_id.hex[:8]: mount for volume_id, mount in volumes.items()}),
        site.directory / "conf.d" / "coffer.conf": configuration(settings, site, {str(each): mount for each, mount in volumes.items()}),
    }


def _check(settings: Settings, site: Site) -> None:
    """Nothing may stand in the configuration that means something to nginx. Raises `CommandFailed`."""
    if not settings.link_keys:
        raise CommandFailed(f"{variable('link_keys')} is not set: nginx verifies links with it", Exit.USAGE)
    if not settings.edge_state_file:
        raise CommandFailed(f"{variable('edge_state_file')} is not set: nginx reads there whose links were revoked", Exit.USAGE)
    if (site.certificate is None) != (site.certificate_key is None):
        raise CommandFailed("a certificate and its key belong together", Exit.USAGE)
    paths = [site.directory, site.log_directory, Path(settings.edge_state_file), site.certificate, site.certificate_key]
    for path in paths:
        if path is not None:
            _check_text(_PATH, str(path), "a path")
    for name in site.server_names:
        _check_text(_HOST_NAME, name, "a server name")
    for address in (site.listen, site.metrics_listen):
        if address:
            _check_text(_ADDRESS, address, "an address")


def _check_text(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise CommandFailed(f"{text!r} cannot stand in nginx's configuration as {what}", Exit.USAGE)


def derived_key(key: str) -> str:
    """The key for download links alone, in hexadecimal (server/decisions/0011)."""
    return hmac.new(key.encode(), DOWNLOAD_SALT, sha256).hexdigest()


def lua_settings(settings: Settings, volumes: Mapping[str, str]) -> str:
    types = {
        each.extension: f'{{ mime_type = "{each.mime_type}", disposition = "{disposition_of(each.mime_type, None)}" }}'
        for each in KNOWN.values()
    }
    previews = {
        ending: f'{{ mime_type = "{mime_type}", disposition = "{disposition_of(mime_type, None)}" }}'
        for ending, mime_type in PREVIEW_MIME_TYPES.items()
    }
    return "\n".join(
        [
            "-- Made by `coffer edge install`; not for editing.",
            "return {",
            f'    state_file = "{settings.edge_state_file}",',
            "    directories = { " + ", ".join(f'"{each}"' for each in DIRECTORIES.values()) + " },",
            *_lua_table("volumes", {prefix: f'"{mount}"' for prefix, mount in volumes.items()}),
            *_lua_table("types", types),
            *_lua_table("preview_types", previews),
            "}",
            "",
        ]
    )


def _lua_table(name: str, entries: Mapping[str, str]) -> Iterable[str]:
    return (f"    {name} = {{", *(f'        ["{key}"] = {value},' for key, value in entries.items()), "    },")


def configuration(settings: Settings, site: Site, volumes: Mapping[str, str]) -> str:
    """The site, from ops/nginx/coffer.conf: `@name@` stands for what is known here alone."""
    listen, redirect = _listening(site)
    any_origin = settings.cors_origins == ("*",)
    for origin in () if any_origin else settings.cors_origins:
        _check_text(_ORIGIN, origin, "an origin")
    link_rate = settings.rate_links_per_address
    rfc_7239 = settings.proxy_header == "forwarded"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    values = {
        "directory": str(site.directory / "coffer"),
        "upstream": f"{host}:{settings.port}",
        "accel": ACCEL_PREFIX,
        "allow_origins": _indented(
            ['default "*";'] if any_origin else ['default "";', *(f'"{each}" "{each}";' for each in settings.cors_origins)], 4
        ),
        "expose_headers": ANSWER_HEADERS,
        "exempt": _indented((f"{ip_network(each)} 1;" for each in settings.rate_exempt_addresses), 4),
        # A rate that nobody reaches, where none is set: the zone has to be there.
        "link_rate": f"{max(1, link_rate.requests // link_rate.seconds)}r/s" if link_rate else "1000000r/s",
        "link_burst": str(link_rate.requests if link_rate else 1_000_000),
        "link_cache": settings.link_cache,
        "redirect": redirect,
        "listen": _indented(listen, 4),
        "real_address": _indented(_real_address(site), 4),
        "log": str(site.log_directory / "coffer.log"),
        "error_log": str(site.log_directory / "coffer-error.log"),
        "head_seconds": str(settings.request_head_seconds),
        "upload_seconds": str(settings.slow_upload_grace_seconds + 30),  # the server's own patience ends first, and says why
        "download_seconds": str(settings.slow_download_grace_seconds),
        "forwarded_for": '""' if rfc_7239 else "$remote_addr",
        "forwarded_proto": '""' if rfc_7239 else "$scheme",
        "forwarded": "'for=\"$coffer_forwarded_for\";proto=$scheme'" if rfc_7239 else '""',
        "content_security_policy": CONTENT_SECURITY_POLICY,
        "resource_policy": settings.link_resource_policy,
        "link_headers": _indented(_link_headers(settings, any_origin=any_origin, over_tls=site.certificate is not None), 8),
        "accel_locations": _indented(_accel_locations(volumes), 4),
        "metrics_listen": site.metrics_listen,
    }
    template = (TEMPLATES / "coffer.conf").read_text()
    return re.sub(r"@([a-z_0-9]+)@", lambda found: values[found[1]], template)


def _listening(site: Site) -> tuple[list[str], str]:
    """How the site listens, and the server that sends browsers from HTTP to HTTPS."""
    names = " ".join(site.server_names) or "_"
    if site.certificate is None:
        return [f"listen {site.listen or '80'};", f"server_name {names};"], ""
    address = site.listen or "443"
    listen = [
        f"listen {address} ssl http2;",
        *([] if site.listen else ["listen [::]:443 ssl http2;"]),
        f"server_name {names};",
        f"ssl_certificate {site.certificate};",
        f"ssl_certificate_key {site.certificate_key};",
        "ssl_protocols TLSv1.2 TLSv1.3;",
        "ssl_session_cache shared:coffer_tls:10m;",
        "ssl_session_timeout 1d;",
        "ssl_session_tickets off;",
    ]
    if site.listen:
        return listen, ""
    redirect = f"""\
server {{
    listen 80;
    listen [::]:80;
    server_name {names};
    access_log off;
    location ^~ /.well-known/acme-challenge/ {{ root /var/www/html; }}
    location / {{ return 308 https://$host$request_uri; }}
}}
"""
    return listen, redirect


def _real_address(site: Site) -> Iterable[str]:
    """Who the client is where proxies stand in front: the right-most address that is none of theirs, as server/api/proxies.py has it."""
    yield from (f"set_real_ip_from {each};" for each in site.trusted_proxies)
    if site.trusted_proxies:
        yield from ("real_ip_header X-Forwarded-For;", "real_ip_recursive on;")


def _link_headers(settings: Settings, *, any_origin: bool, over_tls: bool) -> Iterable[str]:
    if settings.cors_origins and not any_origin:
        yield "add_header Vary Origin;"
    if settings.hsts_seconds and over_tls:
        yield f'add_header Strict-Transport-Security "max-age={settings.hsts_seconds}";'


# Those that nginx does not copy from the server's answer by itself.
_ACCEL_HEADERS = (
    *("ETag", "Last-Modified", "Repr-Digest", "Vary", "X-Content-Type-Options", "Content-Security-Policy", "Cross-Origin-Resource-Policy"),
    *("Referrer-Policy", "X-Request-Id", "RateLimit-Policy", "RateLimit", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers"),
    "Strict-Transport-Security",
)


def _accel_locations(volumes: Mapping[str, str]) -> Iterable[str]:
    yield f"location ^~ {ACCEL_PREFIX}/ {{ internal; return 404; }}"
    for volume_id, mount in volumes.items():
        yield from (
            f"location ^~ {ACCEL_PREFIX}/{volume_id}/users/ {{",
            "    internal;",
            f"    alias {mount.rstrip('/')}/users/;",
            f"    disable_symlinks on from={mount};",
            "    sendfile on;",
            "    sendfile_max_chunk 2m;",
            "    tcp_nopush on;",
            "    etag off;",
            "    if_modified_since off;",
            "    max_ranges 1;",
            *(f"    add_header {name} $upstream_http_{name.lower().replace('-', '_')};" for name in _ACCEL_HEADERS),
            "}",
        )


def _indented(lines: Iterable[str], spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in lines)


def _nginx(site: Site, *arguments: str) -> str | None:
    """Runs nginx for a moment. What it complains of, if anything."""
    try:
        done = subprocess.run([site.program, *arguments], capture_output=True, text=True, check=False)
    except OSError as problem:
        return f"{site.program}: {problem.strerror}"
    return None if done.returncode == 0 else done.stderr.strip()


def _advice(complaint: str) -> str:
    return "\nInstall nginx and its Lua module: apt-get install nginx libnginx-mod-http-lua" if "lua" in complaint else ""


def _is_secret(path: Path) -> bool:
    return path.name == "keys"


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _show_difference(path: Path, text: str) -> None:
    old = _text(path)
    for line in difflib.unified_diff((old or "").splitlines(), text.splitlines(), "now", "then", lineterm="", n=1):
        print(f"  {line}")


def _write(path: Path, text: str) -> None:
    """Whole or not at all; keys are readable by their owner alone from the first byte."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    mode = 0o600 if _is_secret(path) else 0o644
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
