"""Every setting of Coffer, read once from the environment into one frozen object.

A setting's variable is `COFFER_` and its name in capitals (`COFFER_PORT`); `DATABASE_URL` is also read under its
usual name. A secret may come as a file instead: `COFFER_DATABASE_URL_FILE=/path`, or a systemd credential called
`database_url`. `coffer config` prints all of them with their sources.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from server import setting_values as values
from server.setting_values import Pipeline, Rate, TokenIssuer

KIB, MIB, GIB = 2**10, 2**20, 2**30


class SettingError(ValueError):
    """A setting is missing or cannot be understood. The message names the variable and the remedy."""


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
        "", "PostgreSQL 15 to 18 to use (postgresql://user:password@host:port/name). Required.", read=values.database_url, secret=True
    )
    database_connections: int = setting(10, "Connections that each server process keeps at most.", read=values.whole, at_least=2)

    host: str = setting("127.0.0.1", "Address to listen on. Put nginx in front before you change it.")
    port: int = setting(3001, "TCP port to listen on; 0 picks a free one.", read=values.whole, at_least=0, at_most=65_535)
    processes: int = setting(1, "Server processes. One serves one core; the state is all in PostgreSQL.", read=values.whole, at_least=1)
    stop_grace_seconds: int = setting(
        30,
        "How long a server that is told to stop lets its running requests finish. What it cuts off is as if it had crashed: safe, but "
        "told nobody. An upgrade waits so long for the old server's uploads, while the new one serves.",
        read=values.whole,
        at_least=1,
        at_most=840,  # TimeoutStopSec= of systemd/coffer-api.service is a minute longer
    )
    log_level: str = setting("info", "Least severe level that is logged: debug, info, warning, error.")

    default_quota_bytes: int | None = setting(
        10 * GIB, "Quota in bytes of a user seen for the first time; `unlimited` for none.", read=values.optional_whole, at_least=0
    )
    max_file_bytes: int = setting(2 * GIB, "Largest single file, in bytes.", read=values.whole, at_least=1)
    volume_reserve_bytes: int | None = setting(
        None, "Free bytes that uploads leave on a volume; `auto` is the larger of 1 % and 1 GiB.", read=values.optional_whole, at_least=0
    )
    max_list_page: int = setting(200, "Most files that one page of a list may hold.", read=values.whole, at_least=1)

    types_video: tuple[str, ...] = setting((), "MIME types accepted as video; empty means all that Coffer knows.", read=values.words)
    types_image: tuple[str, ...] = setting((), "MIME types accepted as image; empty means all that Coffer knows.", read=values.words)
    types_scene: tuple[str, ...] = setting((), "MIME types accepted as scene; empty means all that Coffer knows.", read=values.words)
    types_project: tuple[str, ...] = setting((), "MIME types accepted as project; empty means all that Coffer knows.", read=values.words)
    types_audio: tuple[str, ...] = setting((), "MIME types accepted as audio; empty means all that Coffer knows.", read=values.words)

    buffered_body_bytes: int = setting(
        1 * MIB, "Uploads up to this many bytes wait in memory and charge the quota at the commit alone.", read=values.whole, at_least=0
    )
    buffered_total_bytes: int = setting(
        64 * MIB,
        "Bytes that all buffered uploads of a process may hold together, one user's a quarter of it; past it they go to disk at once.",
        read=values.whole,
        at_least=0,
    )
    reservation_step_bytes: int = setting(
        64 * MIB, "Step by which an upload of undeclared length reserves quota.", read=values.whole, at_least=1
    )
    reservation_lease_seconds: int = setting(
        120,
        "How long a reservation outlives the process that renews it. A crashed upload's quota returns after this.",
        read=values.whole,
        at_least=5,
    )
    tus_lifetime_seconds: int = setting(
        86_400,
        "How long an unfinished resumable upload is kept, with the quota that it holds, after its last byte.",
        read=values.whole,
        at_least=60,
    )
    tus_uploads_per_user: int | None = setting(
        100, "Unfinished resumable uploads that one user may have; `unlimited` for any number.", read=values.optional_whole, at_least=1
    )
    tus_sync_bytes: int = setting(
        64 * MIB,
        "A resumable upload is synced and its offset recorded whenever so many bytes have come, and at the end of each request.",
        read=values.whole,
        at_least=1 * MIB,
    )
    tus_absolute_locations: bool = setting(
        True, "Whether the address of a new resumable upload is a whole URL, or a path.", read=values.boolean
    )
    idempotency_wait_seconds: int = setting(
        30, "How long a repeated request waits for the first one with its Idempotency-Key.", read=values.whole, at_least=0
    )
    leftover_age_seconds: int = setting(
        86_400, "Age at which a file in incoming/ that no upload claims is removed.", read=values.whole, at_least=60
    )
    trash_days: int = setting(
        0,
        "How long a deleted file stays in its user's trash before `coffer purge` deletes it for good; 0 deletes at once.",
        read=values.whole,
        at_least=0,
        at_most=3_650,
    )
    quarantine_days: int = setting(
        30, "After how long `coffer purge` removes what the audit has set aside; 0 never.", read=values.whole, at_least=0, at_most=3_650
    )
    events_days: int = setting(90, "After how long `coffer purge` removes events; 0 never.", read=values.whole, at_least=0, at_most=3_650)
    jobs_days: int = setting(
        90, "After how long `coffer purge` removes generation jobs that have ended; 0 never.", read=values.whole, at_least=0, at_most=3_650
    )
    metrics_directory: str = setting(
        "", "Directory of Prometheus' textfile collector, for the metrics of the tools, such as `coffer audit`. Empty: they leave none."
    )
    hetzner_token: str = setting(
        "", "Token of the Hetzner Cloud project, which may read and write, for `coffer hetzner`. The server needs none.", secret=True
    )
    hetzner_url: str = setting("https://api.hetzner.cloud/v1", "Where Hetzner's API is, for `coffer hetzner`.", read=values.base_url)
    api_key_cache_seconds: int = setting(
        3,
        "How long a server process trusts an API key it has just checked: the longest a revoked key still works.",
        read=values.whole,
        at_least=0,
    )
    link_keys: tuple[str, ...] = setting(
        (),
        "Secrets that sign links, at least 32 characters each, separated by spaces or lines. The first signs, all verify: to change it, "
        "put a new one first, and drop the old one when its links have ended. Required to serve.",
        read=values.link_keys,
        secret=True,
    )
    public_url: str = setting(
        "",
        "Where browsers reach this server, e.g. https://media.example.com: links start with it. Empty: links start with /.",
        read=values.base_url,
    )
    link_ttl_seconds: int = setting(3_600, "Life of a link for which none is asked.", read=values.whole, at_least=1)
    link_max_ttl_seconds: int = setting(7 * 86_400, "Longest life of a link that may be asked for.", read=values.whole, at_least=1)
    link_window_seconds: int = setting(
        300,
        "Who asks for the same link within such a window gets the same one; it lives up to this much longer.",
        read=values.whole,
        at_least=1,
    )
    link_cache: str = setting(
        "private",
        "Who may cache what a link gives, for its life: `private` (browsers) or `public` (CDNs too).",
        read=values.one_of("private", "public"),
    )
    edge_state_file: str = setting(
        "",
        "Where the server tells nginx each second whose links were revoked, e.g. /run/coffer/edge. Empty: nginx passes all links to the "
        "server. See Production.",
    )
    public_max_age_seconds: int = setting(
        300,
        "How long browsers and CDNs may keep a public file: the longest it is seen after that was ended.",
        read=values.whole,
        at_least=0,
    )
    token_issuers: tuple[TokenIssuer, ...] = setting(
        (), "Issuers of user tokens, as a JSON list (see User tokens); empty takes API keys alone.", read=values.token_issuers
    )
    token_users_are_created: bool = setting(
        True, "Make a user with the default quota at the first valid token; otherwise unknown users are refused.", read=values.boolean
    )
    token_keys_refetch_seconds: int = setting(
        10, "Least seconds between two fetches of an issuer's keys, whatever tokens ask for.", read=values.whole, at_least=1
    )
    token_keys_max_age_seconds: int = setting(
        86_400, "How long an issuer's keys are used while it cannot be reached.", read=values.whole, at_least=60
    )
    link_resource_policy: str = setting(
        "cross-origin",
        "Whose pages may show what a link gives, as in <img>: `cross-origin` (any), `same-site` or `same-origin`.",
        read=values.one_of("cross-origin", "same-site", "same-origin"),
    )

    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = setting(
        (), "Addresses or networks of proxies that are believed when they name the client, e.g. 127.0.0.1 10.0.0.0/8.", read=values.networks
    )
    proxy_header: str = setting(
        "x-forwarded-for",
        "How they name it: `x-forwarded-for` (with X-Forwarded-Proto) or `forwarded` (RFC 7239). The other one is ignored.",
        read=values.one_of("x-forwarded-for", "forwarded"),
    )
    accel_redirect_prefix: str = setting(
        "",
        "Where nginx, as a trusted proxy, finds the volumes by their ids, e.g. /coffer-files: downloads through it then send no bytes "
        "but X-Accel-Redirect. Empty: off.",
        read=values.internal_path,
    )
    cors_origins: tuple[str, ...] = setting(
        (), "Origins whose pages may call the API and use links, e.g. https://app.example.com; `*` for any.", read=values.origins
    )
    hsts_seconds: int = setting(
        31_536_000,
        "How long browsers that came by TLS keep to it (Strict-Transport-Security); 0 says nothing.",
        read=values.whole,
        at_least=0,
    )
    request_head_seconds: int = setting(20, "How long a client may take to send the head of a request.", read=values.whole, at_least=1)
    slow_upload_bytes_per_second: int = setting(
        1 * KIB,
        "Slowest pace of a request's body; while the server is busy itself does not count. 0 permits any.",
        read=values.whole,
        at_least=0,
    )
    slow_upload_grace_seconds: int = setting(
        30,
        "Waiting time over which that pace is measured; also how long the rest of a refused body is read away.",
        read=values.whole,
        at_least=1,
    )
    slow_download_grace_seconds: int = setting(
        60, "After how long a client that takes no byte of its answer is cut off.", read=values.whole, at_least=1
    )
    sendfile: bool = setting(
        True, "Have the kernel send files by itself. Off: they are read and sent, at several times the processor time.", read=values.boolean
    )
    rate_per_user: Rate | None = setting(
        Rate(60_000, 60), "Requests for one user with one key, as requests/seconds; `off` for any number. See Limits.", read=values.rate
    )
    rate_per_key: Rate | None = setting(None, "Requests with one key, whomever it acts for.", read=values.rate)
    rate_links_per_address: Rate | None = setting(
        Rate(60_000, 60), "Requests of signed links and public files from one address.", read=values.rate
    )
    rate_failures_per_address: Rate | None = setting(
        Rate(600, 60),
        "Requests from one address that are answered 401. Past it, credentials from there are refused unseen.",
        read=values.rate,
    )
    rate_exempt_addresses: tuple[IPv4Network | IPv6Network, ...] = setting(
        (), "Addresses and networks for which the limits per address do not hold, such as those of your own backends.", read=values.networks
    )
    uploads_at_once_per_user: int | None = setting(
        256, "Uploads that one user may have under way; `unlimited` for any number.", read=values.optional_whole, at_least=1
    )
    upload_links_per_user: int | None = setting(
        1_000, "Upload links of one user that have brought no file yet; `unlimited` for any number.", read=values.optional_whole, at_least=1
    )
    clamd: str = setting(
        "",
        "Where clamd listens, which every file is shown to before it is stored: unix:/run/clamav/clamd.ctl or tcp:host:port. Empty: "
        "nothing is scanned.",
        read=values.clamd,
    )
    clamd_timeout_seconds: int = setting(
        60, "How long one file's scan may take, waiting for its turn included; longer is refused with 503.", read=values.whole, at_least=1
    )
    clamd_max_bytes: int = setting(
        25 * MIB,
        "Largest file that is scanned, in bytes. clamd's own StreamMaxLength, MaxFileSize and MaxScanSize must not be less.",
        read=values.whole,
        at_least=1,
        at_most=2 * GIB - 1,  # clamd itself skips what is larger, and calls it clean
    )
    clamd_scans_at_once: int = setting(
        4,
        "Scans that a server process runs at once; those of all processes should stay below clamd's MaxThreads.",
        read=values.whole,
        at_least=1,
    )
    scan_exempt_types: tuple[str, ...] = setting(
        (), "MIME types that are stored without a scan, by the bytes' own type: image/png, video/*.", read=values.exempt_types
    )
    scan_oversize: str = setting(
        "refuse",
        "What becomes of a file that is too large to be scanned: `refuse`, or `accept` it unscanned.",
        read=values.one_of("refuse", "accept"),
    )
    previews_in_quota: bool = setting(
        False,
        "Count previews against quotas: uploads then need room for what they bring beside them. The same in all servers.",
        read=values.boolean,
    )
    previews_at_once: int = setting(
        2, "Previews that a worker makes at once, each in a process of its own; as many as there are cores.", read=values.whole, at_least=1
    )
    preview_widths: tuple[int, ...] = setting(
        (320, 640, 1280),
        "Widths in pixels that every image and every video's poster is made in; none is enlarged.",
        read=values.steps(16, 4096, 8),
    )
    preview_quality: int = setting(80, "Quality of WebP previews.", read=values.whole, at_least=1, at_most=100)
    preview_animations: bool = setting(True, "Make a short animated preview of animated GIF and WebP.", read=values.boolean)
    preview_storyboards: bool = setting(
        False, "Make a storyboard of every video: frames side by side in one image, with a WebVTT index.", read=values.boolean
    )
    preview_clips: bool = setting(False, "Make a muted clip of three seconds of every video.", read=values.boolean)
    variant_sizes: tuple[int, ...] = setting(
        (64, 96, 128, 160, 240, 320, 480, 640, 800, 960, 1280, 1600, 1920, 2560),
        "Widths and heights in pixels of pictures made on demand: what is asked for is rounded up to one of them.",
        read=values.steps(16, 4096, 32),
    )
    variant_qualities: tuple[int, ...] = setting(
        (50, 65, 80, 90),
        "Qualities of pictures made on demand: what is asked for is rounded up to one of them.",
        read=values.steps(1, 100, 8),
    )
    variant_cache_bytes: int = setting(
        256 * MIB,
        "Bytes that the pictures made on demand for one user may take; the least recently used give way.",
        read=values.whole,
        at_least=0,
    )
    preview_wait_seconds: int = setting(
        30,
        "How long a request for a preview that is still being made, or for a file with `wait=preview`, waits for it.",
        read=values.whole,
        at_least=0,
    )
    fetch_hosts: tuple[str, ...] = setting(
        (),
        "Hosts that URLs may name which Coffer fetches or sends to, `*.example.com` for all below one; empty permits all.",
        read=values.hosts,
    )
    fetch_private_networks: tuple[IPv4Network | IPv6Network, ...] = setting(
        (),
        "Networks that may be fetched from and sent to although they are not public, by http too, e.g. 10.1.2.0/24.",
        read=values.networks,
    )
    fetch_seconds: int = setting(
        3_600, "How long fetching one file from a URL may take, with all that is tried again.", read=values.whole, at_least=1
    )
    fetch_bytes_per_second: int | None = setting(
        None, "Most bytes a second of one such fetch; `unlimited` for any number.", read=values.optional_whole, at_least=1
    )
    fetches_at_once: int = setting(4, "Linked assets that a worker imports at once.", read=values.whole, at_least=1)
    asset_check_seconds: int = setting(
        86_400, "How often the worker looks whether a linked asset is still there.", read=values.whole, at_least=60
    )
    pipelines: tuple[Pipeline, ...] = setting(
        (),
        "Pipelines that work on generation jobs, as a JSON list (see Generation). Jobs of no pipeline wait for who holds their secret.",
        read=values.pipelines,
        secret=True,
    )
    generation_ttl_seconds: int = setting(
        3_600, "Life of a generation job for which none is asked; the longest is that of links.", read=values.whole, at_least=1
    )
    generation_message_bytes: int = setting(
        8 * MIB, "Largest message of a pipeline, in bytes: what it holds of outputs comes in base64.", read=values.whole, at_least=1 * KIB
    )
    mark_outputs: tuple[str, ...] = setting(
        (),
        "What the worker marks outputs of generation jobs with, as made by AI: `iptc` (metadata), `c2pa` (a signed manifest), or both. "
        "Empty: it leaves them as they came.",
        read=values.some_of("iptc", "c2pa"),
    )
    c2pa_certificates: str = setting(
        "",
        "Certificates for `c2pa`, in PEM: that of the key first, then those above it.",
        secret=True,  # it is none, but comes as a file, too
    )
    c2pa_key: str = setting("", "Private key for `c2pa`, in PEM: of an elliptic curve, P-256.", secret=True)
    audit_log_days: int = setting(
        400,
        "How long the audit trail keeps a record, in days; 0 for ever. Not less than 30: the database itself keeps those.",
        read=values.audit_log_days,
    )
    audit_reads: bool = setting(
        False,
        "Record downloads and the making of download links too: each then costs a write, and is refused without one.",
        read=values.boolean,
    )
    backup_repository: str = setting(
        "",
        "restic's repository for `coffer backup`: /path, sftp:user@host:/path, s3:https://host/bucket, ... What restic needs to get there "
        "(AWS_ACCESS_KEY_ID, ssh's configuration) it reads as usual.",
        secret=True,  # that of a REST server may hold a password
    )
    backup_password: str = setting(
        "", "Password that encrypts the repository. Without it no backup can be read: keep it in another place, too.", secret=True
    )
    backup_forget: bool = setting(
        True,
        "Remove old backups. Off for a repository that takes no deletes, and whose keeper removes them.",
        read=values.boolean,
    )
    backup_keep_daily: int = setting(7, "Days of which the last backup is kept.", read=values.whole, at_least=1)
    backup_keep_weekly: int = setting(0, "Weeks of which the last backup is kept besides.", read=values.whole, at_least=0)
    backup_keep_monthly: int = setting(0, "Months of which the last backup is kept besides.", read=values.whole, at_least=0)
    backup_previews: bool = setting(False, "Back up previews, too. They can be made again from the files.", read=values.boolean)
    backup_before: str = setting(
        "", "Shell command that `coffer backup` runs first: it may mount the repository. If it fails, nothing is backed up."
    )
    backup_after: str = setting("", "Shell command that `coffer backup` runs last, when all went well.")
    backup_failed: str = setting(
        "",
        "Shell command that `coffer backup` and `coffer drill` run when they fail, with the reason in COFFER_FAILURE: mail, or curl to a "
        "webhook.",
    )
    drill_max_age_days: int = setting(
        8, "For how many days after a drill has restored one the backups count as proven.", read=values.whole, at_least=1
    )
    schema_documentation: bool = setting(True, "Serve the OpenAPI description and its page at /schema.", read=values.boolean)

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Reads the environment; raises `SettingError` naming the first variable that is wrong or missing."""
        found = read_with_sources(os.environ if environment is None else environment)
        settings = cls(**{name: value for name, (value, _) in found.items()})
        if not settings.database_url:
            source = found["database_url"][1]
            wrong = f"{variable('database_url')} (or DATABASE_URL) is not set" if source == "default" else f"{source} is empty"
            raise SettingError(f"{wrong}: Coffer keeps its rows in PostgreSQL, e.g. postgresql://coffer:secret@127.0.0.1/coffer")
        for name in ("c2pa_certificates", "c2pa_key"):
            if "c2pa" in settings.mark_outputs and not getattr(settings, name):
                raise SettingError(f"{variable(name)} is not set: {variable('mark_outputs')} asks for c2pa, which signs with it")
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
