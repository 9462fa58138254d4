"""The `coffer` command: reads the command line, calls `server/commands/`, and turns every failure into an exit code."""

import argparse
import asyncio
import os
import pwd
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import httpx

from server import fields
from server.actor import Actor, act_as
from server.auth import Scope
from server.commands import configuration, edge, erasure, exporting, files, keys, lifecycle, previews, trail, users, volumes
from server.commands.failures import MEANING, CommandFailed, Exit, code_of
from server.commands.output import say
from server.errors import CofferError, InvalidRequest
from server.kinds import KINDS
from server.ledger import AuditQuery, Database, MigrationError, migrate
from server.settings import SettingError, Settings

Run = Callable[[argparse.Namespace], Any]
More = Callable[[Any], None]
DatabaseRun = Callable[[Database, Settings, argparse.Namespace], Awaitable[None]]

_EPILOG = "exit codes:\n" + "\n".join(f"  {code.value:<4} {meaning}" for code, meaning in MEANING.items())
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DURATIONS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}
_LONGEST_DURATION = timedelta(days=3650)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code. Results go to standard output, everything else to standard error."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None, more: More | None = None) -> int:
    """Runs one command and returns its exit code. Only argparse exits by itself, with 2 for a wrong command line.

    `more` declares commands that the server does not know (`ops/cli.py`), each with the default `run` to call.
    """
    parsed = _parser(more).parse_args(arguments)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except CommandFailed as problem:
        say(str(problem))
        return problem.code
    except SettingError as problem:
        say(str(problem))
        return Exit.USAGE
    except CofferError as problem:
        say(f"{problem} ({problem.code})")
        return code_of(problem)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Point it elsewhere, or Python complains once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILURE
    except OSError as problem:
        say(str(problem))
        return Exit.FAILURE
    return Exit.OK


def _parser(more: More | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coffer",
        description="A self-hosted media storage server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serving(commands)
    _add_keys(commands)
    _add_users(commands)
    _add_lifecycle(commands)
    _add_volumes(commands)
    _add_trail(commands)
    _add_previews(commands)
    _add_edge(commands)
    _add_files(commands)
    if more is not None:
        more(commands)
    return parser


# What runs Coffer


def _add_serving(commands: Any) -> None:
    _command(commands, "serve", _serve, "serve HTTP until it is told to stop")
    _command(commands, "worker", _worker, "run queued jobs until it is told to stop")
    _command(commands, "migrate", _migrate, "bring the database to this version's schema")
    _json(_command(commands, "config", _config, "print every setting, its source and what it means"))


def _serve(_: argparse.Namespace) -> None:
    from server.app import serve  # noqa: PLC0415 - the other commands start faster without the web server

    try:
        serve(Settings.load())
    except SystemExit as stopped:
        # The web server has exit codes of its own, which here would mean something else.
        if stopped.code:
            raise CommandFailed("the server could not start; the reason is above") from None


def _worker(_: argparse.Namespace) -> None:
    from server.worker import main as work  # noqa: PLC0415 - as above

    work()


def _migrate(_: argparse.Namespace) -> None:
    try:
        applied = asyncio.run(migrate(Settings.load().database_url))
    except MigrationError as problem:
        raise CommandFailed(str(problem), Exit.REFUSED) from problem
    for name in applied:
        print(name)
    if not applied:
        say("the schema is current; there was nothing to do")


def _config(arguments: argparse.Namespace) -> None:
    configuration.show_all(os.environ, as_json=arguments.json)


# API keys


def _add_keys(commands: Any) -> None:
    group = _group(commands, "key", "API keys")
    create = _json(_database_command(group, "create", _key_create, "make a key; it is shown only once"))
    create.add_argument("name", help="what the key is for, e.g. the app that uses it")
    choices = [scope.value for scope in Scope]
    create.add_argument("--scope", action="append", choices=choices, help="may be repeated; files:read and files:write when left out")
    create.add_argument("--user", action="append", type=user_id_of, help="may be repeated; only for these users")
    create.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; only for files of these types")
    create.add_argument(
        "--network", action="append", type=_network, help="may be repeated; only from there, e.g. 10.0.0.0/8 or 2001:db8::/32"
    )
    create.add_argument("--expires", type=_duration, help="after how long it ends, e.g. 90d; never when left out")
    _json(_database_command(group, "list", _key_list, "all keys, without their secrets"))
    rotate = _json(_database_command(group, "rotate", _key_rotate, "make a key with the same rights, and let the old one end soon"))
    rotate.add_argument("key_id")
    rotate.add_argument(
        "--overlap", type=_duration, default=_duration("24h"), help="how long the old one works on, e.g. 30m; 24h when left out"
    )
    rotate.add_argument("--expires", type=_duration, help="after how long the new one ends; as long as the old one had when left out")
    revoke = _for_real(_database_command(group, "revoke", _key_revoke, "end a key"))
    revoke.add_argument("key_id")


async def _key_create(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    scopes = arguments.scope or [Scope.FILES_READ.value, Scope.FILES_WRITE.value]
    await keys.create(
        db,
        name=fields.clean_name(arguments.name),
        scopes=scopes,
        user_ids=arguments.user,
        kinds=arguments.kind,
        networks=arguments.network,
        lifetime=arguments.expires,
        as_json=arguments.json,
    )


async def _key_list(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await keys.show_all(db, as_json=arguments.json)


async def _key_rotate(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await keys.rotate(db, key_id=arguments.key_id, overlap=arguments.overlap, lifetime=arguments.expires, as_json=arguments.json)


async def _key_revoke(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await keys.revoke(db, settings, key_id=arguments.key_id, for_real=arguments.for_real)


# Users


def _add_users(commands: Any) -> None:
    group = _group(commands, "user", "users, their quota and their end")
    show_one = _json(_database_command(group, "show", _user_show, "one user"))
    show_one.add_argument("user_id", type=user_id_of)
    _json(_database_command(group, "list", _user_list, "all users"))
    quota = _json(_database_command(group, "set-quota", _user_set_quota, "set how much a user may store"))
    quota.add_argument("user_id", type=user_id_of)
    quota.add_argument("quota", type=quantity, help="bytes, 10GiB (KiB, MiB, GiB, TiB) or unlimited")
    delete = _for_real(_database_command(group, "delete", _user_delete, "erase every byte and row of a user, and certify that"))
    delete.add_argument("user_id", type=user_id_of)
    delete.add_argument("--certificate", type=Path, metavar="FILE", help="where to write the certificate; standard output when left out")
    certificate = _database_command(group, "certificate", _user_certificate, "print once more what certifies a user's erasure")
    certificate.add_argument("user_id", type=user_id_of)
    certificate.add_argument("--output", type=Path, metavar="FILE", help="where to write it; standard output when left out")
    export = _database_command(group, "export", _user_export, "all files of a user in one tar archive, with all that is known of them")
    export.add_argument("user_id", type=user_id_of)
    export.add_argument("-o", "--output", required=True, help="where to write it, - for standard output")
    hold = _json(_database_command(group, "hold", _user_hold, "let nothing of a user's be deleted or replaced, by nobody"))
    hold.add_argument("user_id", type=user_id_of)
    hold.add_argument("--reason", type=_reason, required=True, help="why, such as a court's reference; it stands in the audit trail")
    release = _json(_database_command(group, "release", _user_release, "end the hold on a user"))
    release.add_argument("user_id", type=user_id_of)
    cleanup = _json(_for_real(_database_command(group, "cleanup", _user_cleanup, "erase users who store nothing and are not used")))
    cleanup.add_argument("--unseen-days", type=_days, required=True, help="for how long nothing of theirs must have changed")
    cleanup.add_argument("--any-quota", action="store_true", help="also those whose quota or tier is not the default")


async def _user_show(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await users.show_one(db, user_id=arguments.user_id, as_json=arguments.json)


async def _user_list(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await users.show_all(db, as_json=arguments.json)


async def _user_set_quota(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await users.set_quota(db, user_id=arguments.user_id, max_bytes=arguments.quota, as_json=arguments.json)


async def _user_delete(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await erasure.delete(db, settings, user_id=arguments.user_id, for_real=arguments.for_real, certificate=arguments.certificate)


async def _user_certificate(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await erasure.certify(db, user_id=arguments.user_id, to=arguments.output)


async def _user_export(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await exporting.export(db, settings, user_id=arguments.user_id, to=arguments.output)


async def _user_hold(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await users.hold(db, user_id=arguments.user_id, reason=arguments.reason, as_json=arguments.json)


async def _user_release(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await users.release(db, user_id=arguments.user_id, as_json=arguments.json)


async def _user_cleanup(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await erasure.cleanup(
        db,
        settings,
        unseen_days=arguments.unseen_days,
        any_quota=arguments.any_quota,
        for_real=arguments.for_real,
        as_json=arguments.json,
    )


# Lifecycle rules


def _add_lifecycle(commands: Any) -> None:
    group = _group(commands, "lifecycle", "rules by which files go; `coffer purge` applies them")
    _json(_database_command(group, "list", _lifecycle_list, "all rules"))
    add = _json(_database_command(group, "add", _lifecycle_add, "a new rule; files must meet all of its conditions"))
    add.add_argument("action", choices=("delete", "trash"), help="for good, or to the user's trash")
    add.add_argument("--after-days", type=_days, required=True, help="how old the bytes must be")
    add.add_argument("--user", type=user_id_of, help="only files of this user; of all when left out")
    add.add_argument("--type", choices=KINDS)
    add.add_argument("--mime", type=_text("mime"), help="such as image/png")
    add.add_argument("--tag", type=_text("tag"))
    add.add_argument("--package-name", type=_text("package_name"))
    add.add_argument(
        "--metadata",
        type=_pair,
        action="append",
        help="KEY=VALUE that the file's metadata must hold, such as origin=/renders; may be repeated",
    )
    add.add_argument("--favorites-too", action="store_true", help="spare no favourites")
    add.add_argument("--everything", action="store_true", help="needed where no condition is given: all files of all users")
    remove = _json(_database_command(group, "remove", _lifecycle_remove, "end a rule; files stay as they are"))
    remove.add_argument("rule_id", type=_at_least_one)


async def _lifecycle_list(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await lifecycle.show_all(db, as_json=arguments.json)


async def _lifecycle_add(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    conditions = {
        "after_days": arguments.after_days,
        "user_id": arguments.user,
        "file_type": arguments.type,
        "mime_type": arguments.mime,
        "tag": arguments.tag,
        "package_name": arguments.package_name,
        "metadata": dict(arguments.metadata) if arguments.metadata else None,
        "includes_favorites": arguments.favorites_too,
    }
    await lifecycle.add(
        db, settings, action=arguments.action, conditions=conditions, everything=arguments.everything, as_json=arguments.json
    )


async def _lifecycle_remove(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await lifecycle.remove(db, rule_id=arguments.rule_id, as_json=arguments.json)


# Volumes


def _add_volumes(commands: Any) -> None:
    group = _group(commands, "volume", "volumes")
    init = _json(_database_command(group, "init", _volume_init, "make a mounted directory a volume"))
    init.add_argument("path", type=Path)
    add = _json(_database_command(group, "add", _volume_add, "register a directory that is a volume already, perhaps at another mount"))
    add.add_argument("path", type=Path)
    for each in (init, add):
        each.add_argument("--for-user", type=user_id_of, help="reserve it for this user alone")
    init.add_argument("--replace", type=UUID, metavar="ID", help="make an empty disk this volume, whose own disk is lost")
    _json(_database_command(group, "list", _volume_list, "all volumes and their state"))
    reopen = _database_command(group, "reopen", _volume_reopen, "let a volume that an I/O error closed take writes again")
    reopen.add_argument("volume_id", type=UUID)
    drain = _database_command(group, "drain", _volume_drain, "place no new users on a volume; `rebalance` then moves those it has")
    drain.add_argument("volume_id", type=UUID)
    drain.add_argument("--undo", action="store_true", help="let it take new users again")
    retire = _for_real(_database_command(group, "retire", _volume_retire, "forget a drained, empty volume"))
    retire.add_argument("volume_id", type=UUID)
    retire.add_argument("--leave-bytes", action="store_true", help="although bytes could not be removed from it: wipe its disk")
    check = _json(_database_command(group, "verify", _volume_verify, "try volumes: sentinel, mount, a synced write, space, inodes"))
    check.add_argument("volume_id", type=UUID, nargs="*")


async def _volume_init(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await volumes.init(db, settings, mount=arguments.path, for_user=arguments.for_user, replaced=arguments.replace, as_json=arguments.json)


async def _volume_add(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await volumes.add(db, settings, mount=arguments.path, for_user=arguments.for_user, as_json=arguments.json)


async def _volume_list(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await volumes.show_all(db, settings, as_json=arguments.json)


async def _volume_reopen(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await volumes.reopen(db, volume_id=arguments.volume_id)


async def _volume_drain(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await volumes.drain(db, volume_id=arguments.volume_id, undo=arguments.undo)


async def _volume_retire(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await volumes.retire(db, settings, volume_id=arguments.volume_id, leaves_bytes=arguments.leave_bytes, for_real=arguments.for_real)


async def _volume_verify(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await volumes.verify_all(db, settings, ids=arguments.volume_id, as_json=arguments.json)


# The audit trail


def _add_trail(commands: Any) -> None:
    read = _json(_database_command(commands, "trail", _trail, "who did what to which file, and when; newest first"))
    read.add_argument("--user", type=user_id_of, help="only what was done to this user and the user's files")
    read.add_argument("--file", type=UUID, help="only what was done to this file")
    read.add_argument("--actor", help="only what was done by this key, token's subject, upload link or account")
    read.add_argument("--action", help="only this action, such as file.deleted")
    read.add_argument("--since", type=_moment, help="only what was done then or later: a date, or a time such as 2026-01-31T12:00:00Z")
    read.add_argument("--until", type=_moment, help="only what was done before then; dates and times without a zone are UTC")
    read.add_argument("--limit", type=_at_least_one, help="at most so many; when left out, all as JSON, and 100 as a table")


async def _trail(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    query = AuditQuery(
        user_id=arguments.user,
        file_id=arguments.file,
        actor_id=arguments.actor,
        action=arguments.action,
        since=_utc(arguments.since),
        until=_utc(arguments.until),
    )
    await trail.show_all(db, query=query, most=arguments.limit, as_json=arguments.json)


# Previews


def _add_previews(commands: Any) -> None:
    group = _group(commands, "previews", "pictures of files, made by the worker")
    _json(_database_command(group, "list-failed", _previews_list_failed, "the files whose preview failed, and why"))
    retry = _database_command(group, "retry", _previews_retry, "try failed previews again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("file_id", type=UUID, nargs="*", default=[])
    which.add_argument("--all", action="store_true", help="all that failed")
    rebuild = _for_real(_database_command(group, "rebuild", _previews_rebuild, "make all previews anew"))
    rebuild.add_argument("--user", type=user_id_of, help="only those of this user")


async def _previews_list_failed(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await previews.list_failed(db, as_json=arguments.json)


async def _previews_retry(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await previews.retry(db, ids=list(dict.fromkeys(arguments.file_id)), for_all=arguments.all)


async def _previews_rebuild(db: Database, _: Settings, arguments: argparse.Namespace) -> None:
    await previews.rebuild(db, user_id=arguments.user, for_real=arguments.for_real)


# nginx in front


def _add_edge(commands: Any) -> None:
    group = _group(commands, "edge", "nginx in front, which verifies signed links by itself")
    install = _for_real(_database_command(group, "install", _edge_install, "write nginx's configuration and keys, and have it reload them"))
    check = _database_command(group, "check", _edge_check, "whether nginx's configuration is that of these settings")
    default = edge.Site()
    for each in (install, check):
        each.add_argument("--server-name", action="append", type=str, default=[], help="may be repeated; any name when left out")
        each.add_argument("--certificate", type=Path, help="the TLS certificate with its chain; without one, nginx speaks plain HTTP")
        each.add_argument("--certificate-key", type=Path)
        each.add_argument(
            "--listen", default="", help="address:port; 443 (and 80, which redirects) when left out, or 80 without a certificate"
        )
        each.add_argument(
            "--trusted-proxy",
            action="append",
            type=_some_network,
            default=[],
            help="address or network of a proxy in front of nginx, such as a CDN's, whose X-Forwarded-For is believed; may be repeated",
        )
        each.add_argument("--metrics-listen", default=default.metrics_listen, help="for Prometheus; %(default)s when left out")
        each.add_argument("--directory", type=Path, default=default.directory, help="%(default)s when left out")
        each.add_argument("--log-directory", type=Path, default=default.log_directory, help="%(default)s when left out")
        each.add_argument("--nginx", default=default.program, help="the program, when it is not simply nginx")


def _site(arguments: argparse.Namespace) -> edge.Site:
    return edge.Site(
        directory=arguments.directory.resolve(),
        program=arguments.nginx,
        server_names=arguments.server_name,
        listen=arguments.listen,
        certificate=arguments.certificate,
        certificate_key=arguments.certificate_key,
        metrics_listen=arguments.metrics_listen,
        log_directory=arguments.log_directory.resolve(),
        trusted_proxies=arguments.trusted_proxy,
    )


async def _edge_install(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await edge.install(db, settings, site=_site(arguments), for_real=arguments.for_real)


async def _edge_check(db: Database, settings: Settings, arguments: argparse.Namespace) -> None:
    await edge.check(db, settings, site=_site(arguments))


# A user's files, over HTTP


def _add_files(commands: Any) -> None:
    upload = _json(_file_command(commands, "upload", _upload, "store files"))
    upload.add_argument("path", type=Path, nargs="+")
    upload.add_argument("--type", choices=KINDS, help="needed only where the bytes fit several types")
    upload.add_argument("--package-name")
    upload.add_argument("--tags", help="separated by commas")
    ls = _json(_file_command(commands, "ls", _ls, "list files, newest first"))
    for name in ("type", "mime", "tag", "package-name", "name", "sort"):
        ls.add_argument(f"--{name}", choices=KINDS if name == "type" else None, help="as in GET /api/files")
    ls.add_argument("--favorite", action="store_true", help="only favourites")
    ls.add_argument("--since", type=_moment, help="only what was uploaded then or later: a date, or a time such as 2026-01-31T12:00:00Z")
    ls.add_argument("--until", type=_moment, help="only what was uploaded before then; dates and times without a zone are UTC")
    ls.add_argument("--limit", type=_at_least_one, help="at most so many; all when left out")
    get = _file_command(commands, "get", _get, "download a file")
    get.add_argument("file_id", type=UUID)
    get.add_argument("-o", "--output", help="where to write it, - for standard output; the file's own name when left out")
    get.add_argument("--force", action="store_true", help="replace an existing file")
    remove = _for_real(_file_command(commands, "rm", _rm, "delete files"))
    remove.add_argument("file_id", type=UUID, nargs="+")
    remove.add_argument("--permanent", action="store_true", help="past the trash, where the server has one")


def _upload(arguments: argparse.Namespace) -> None:
    given = {"type": arguments.type, "package_name": arguments.package_name, "tags": arguments.tags}
    files.upload(_server(arguments), paths=arguments.path, fields=_without_none(given), as_json=arguments.json)


def _ls(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("type", "mime", "tag", "package_name", "name", "sort")}
    given |= {"favorite": "true" if arguments.favorite else None, "created_from": arguments.since, "created_to": arguments.until}
    files.show_all(_server(arguments), query=_without_none(given), most=arguments.limit, as_json=arguments.json)


def _get(arguments: argparse.Namespace) -> None:
    files.get(_server(arguments), file_id=str(arguments.file_id), to=arguments.output, force=arguments.force)


def _rm(arguments: argparse.Namespace) -> None:
    files.remove(
        _server(arguments), ids=[str(each) for each in arguments.file_id], permanently=arguments.permanent, for_real=arguments.for_real
    )


def _server(arguments: argparse.Namespace) -> files.Server:
    api_key = os.environ.get("COFFER_API_KEY")
    if not api_key:
        raise CommandFailed("COFFER_API_KEY is not set: the key to use, made with `coffer key create`", Exit.USAGE)
    if not arguments.user:
        raise CommandFailed("say whose files are meant, with --user or COFFER_USER", Exit.USAGE)
    return files.Server(_url(os.environ.get("COFFER_URL", "http://127.0.0.1:3001")), api_key, fields.clean_user_id(arguments.user))


def _url(text: str) -> str:
    try:
        url = httpx.URL(text)
        usable = url.scheme in {"http", "https"} and url.host and (url.port or 0) < 2**16
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise CommandFailed("COFFER_URL: say where the server is, such as http://127.0.0.1:3001 or https://media.example.org", Exit.USAGE)
    return text


def account() -> str:
    """The account of this machine that typed the command. Asked of the kernel: the environment says what it is told to say."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


# How a command is declared


def _group(commands: Any, name: str, meaning: str) -> Any:
    return commands.add_parser(name, help=meaning, description=meaning).add_subparsers(title="commands", metavar="COMMAND", required=True)


def _command(commands: Any, name: str, run: Run, meaning: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=meaning, description=meaning)
    parser.set_defaults(run=run)
    return parser


def _database_command(commands: Any, name: str, run: DatabaseRun, meaning: str) -> argparse.ArgumentParser:
    """A command that needs COFFER_DATABASE_URL, and talks to PostgreSQL without a server."""

    async def with_database(settings: Settings, arguments: argparse.Namespace) -> None:
        act_as(Actor(kind="cli", id=account()))
        db = Database(settings)
        await db.open()
        try:
            await run(db, settings, arguments)
        finally:
            await db.close()

    return _command(commands, name, lambda arguments: asyncio.run(with_database(Settings.load(), arguments)), meaning)


def _file_command(commands: Any, name: str, run: Run, meaning: str) -> argparse.ArgumentParser:
    """A command that talks to a server: COFFER_URL, COFFER_API_KEY and a user."""
    parser = _command(commands, name, run, meaning)
    parser.add_argument("--user", default=os.environ.get("COFFER_USER"), help="whose files; COFFER_USER when left out")
    return parser


def _json(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each result")
    return parser


def _for_real(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--for-real", action="store_true", help="do it; without this, it is only told what would be done")
    return parser


def user_id_of(text: str) -> str:
    try:
        return fields.clean_user_id(text)
    except InvalidRequest as problem:
        raise argparse.ArgumentTypeError(problem.reason) from None


def _at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError("say a whole number from 1")
    return int(text)


def _days(text: str) -> int:
    days = _at_least_one(text)
    if days > _LONGEST_DURATION.days:
        raise argparse.ArgumentTypeError(f"may be at most {_LONGEST_DURATION.days}")
    return days


def _text(field: str) -> Callable[[str], str]:
    def clean(text: str) -> str:
        try:
            return fields.clean_name(text, field)
        except InvalidRequest as problem:
            raise argparse.ArgumentTypeError(problem.reason) from None

    return clean


def _reason(text: str) -> str:
    return _text("reason")(text)


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError("say KEY=VALUE")
    return name, value


def _moment(text: str) -> str:
    """The text as the server understands it, if it does."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("say a date such as 2026-01-31, or a time such as 2026-01-31T12:00:00Z") from None
    return text


def _utc(text: str | None) -> datetime | None:
    moment = None if text is None else datetime.fromisoformat(text)
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


def quantity(text: str) -> int | None:
    """Bytes, such as 500MiB; None: unlimited."""
    if text == "unlimited":
        return None
    number = text.rstrip("BGIKMTbikmgt")
    unit = text[len(number) :].upper()
    if not number.isascii() or not number.isdigit() or unit not in _UNITS:
        raise argparse.ArgumentTypeError("say a number of bytes, or such as 500MiB or 10GiB, or unlimited")
    return int(number) * _UNITS[unit]


def _duration(text: str) -> timedelta:
    """90d, 24h, 30m or 45s, at most ten years."""
    number, unit = text[:-1], text[-1:]
    if not number.isascii() or not number.isdigit() or len(number) > 9 or unit not in _DURATIONS:
        raise argparse.ArgumentTypeError("say a number with d, h, m or s, such as 90d or 24h")
    duration = int(number) * _DURATIONS[unit]
    if duration > _LONGEST_DURATION:
        raise argparse.ArgumentTypeError(f"may be at most {_LONGEST_DURATION.days}d")
    return duration


def _some_network(text: str) -> keys.Network:
    network = _network(text)
    if network.prefixlen == 0:
        raise argparse.ArgumentTypeError("who trusts everybody lets everybody choose an address")
    return network


def _network(text: str) -> keys.Network:
    try:
        return ip_network(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{problem}; say an address, or a network such as 10.0.0.0/8") from None


def _without_none(given: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    main()
