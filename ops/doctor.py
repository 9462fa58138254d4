"""`coffer doctor`: what a support engineer would ask for, looked at, with what to do about it. Changes nothing.

It goes on whatever is missing: a database that is away is one finding, not the end. Each check is a function of `Patient` that yields what
it saw.
"""

import asyncio
import importlib.metadata
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
from cryptography import x509

from ops import machine
from server import ledger
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, printable, say
from server.errors import CofferError
from server.intake import Scanner
from server.ledger import Database, MigrationError, overview
from server.metrics import Metrics
from server.settings import SettingError, Settings
from server.vault import Vault, Volume

EDGE_OPTIONS = Path("/etc/coffer/edge.options")
CREDENTIALS = Path("/etc/coffer/credentials")

_FASTEST_FLUSH_SECONDS = 20e-6
"""An NVMe disk with a protected cache takes about this for a flush; what is faster did not leave the machine's memory."""
_SLOW_FLUSH_SECONDS = 0.05
_FLUSHES = 32
_CLOCK_SECONDS = 2.0
_CERTIFICATE_WARNING = timedelta(days=21)
_LEAST_FREE_SHARE = 0.1
_FORECAST_FROM, _FORECAST_FROM_CHANGES, _LEAST_HISTORY = timedelta(days=14), 200_000, timedelta(hours=6)
_EXPECTED_EVERY = {"audit": timedelta(hours=13), "scrub": timedelta(days=3), "purge": timedelta(days=2), "usage": timedelta(days=2)}
"""After twice the time between two runs, and a little, one is missed. Of backups and drills, the database knows."""
_BACKUP_EVERY, _PROVEN_EVERY = timedelta(hours=50), timedelta(days=15)

State = Literal["ok", "advice", "wrong", "unknown"]


class Seen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one look told. `wrong`: a promise is at stake, or something does not work; `advice`: it works, and could be better."""

    check: str
    state: State
    text: str
    remedy: str | None = None


@dataclass(frozen=True)
class Patient:
    """What is looked at. `database_is_there` says whether asking it makes sense."""

    settings: Settings
    db: Database
    vault: Vault
    database_is_there: bool


Check = Callable[[Patient], AsyncIterator[Seen]]


def add(commands: Any) -> None:
    """Declares the command."""
    meaning = "look at everything that Coffer needs, and say what to do; best as root"
    parser = commands.add_parser("doctor", help=meaning, description=meaning)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each look, and one for the summary")
    parser.set_defaults(run=lambda arguments: asyncio.run(_run(as_json=arguments.json)))


async def _run(*, as_json: bool) -> None:
    began = time.monotonic()
    seen: list[Seen] = []
    try:
        settings = Settings.load()
    except SettingError as problem:
        raise CommandFailed(
            f"settings: {problem}. On an installed machine they are in /etc/coffer, which root may read", Exit.USAGE
        ) from None
    async for each in examine(settings):
        seen.append(each)
        _tell(each, as_json=as_json)
    counts = {state: sum(each.state == state for each in seen) for state in ("ok", "advice", "wrong", "unknown")}
    code = Exit.FOUND if counts["wrong"] else Exit.OK
    if as_json:
        summary = {"tool": "doctor", "exit_code": int(code), "duration_seconds": round(time.monotonic() - began, 3), **counts}
        print(msgspec.json.encode({"summary": summary}).decode())
    else:
        print(f"doctor: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}")
    if code is Exit.FOUND:
        raise CommandFailed("somebody must look at what is wrong", code)


def _tell(seen: Seen, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(seen).decode(), flush=True)
        return
    word = {"ok": "ok", "advice": "advice", "wrong": "WRONG", "unknown": "?"}[seen.state]
    print(f"{word:<7} {seen.check:<12} {printable(seen.text)}", flush=True)
    if seen.remedy and seen.state != "ok":
        print(f"{'':<20} -> {printable(seen.remedy)}", flush=True)


async def examine(settings: Settings) -> AsyncIterator[Seen]:
    """Every look, in the order in which one would mend things. A check that fails itself is `unknown`, and the next one follows."""
    db, vault = Database(settings), Vault(settings.volume_reserve_bytes)
    await db.open()
    try:
        try:
            await vault.refresh(await ledger.list_volumes(db))
            is_there = True
        except (CofferError, MigrationError):
            is_there = False
        except Exception as problem:  # noqa: BLE001 - such as a table that is not there yet: the check of the database says so
            say(f"volumes cannot be listed: {problem}")
            is_there = True
        patient = Patient(settings, db, vault, is_there)
        for check in CHECKS:
            name = check.__name__
            try:
                async for seen in check(patient):
                    yield seen
            except Exception as problem:  # noqa: BLE001 - the other checks are still worth their while
                yield Seen(check=name, state="unknown", text=f"could not be looked at: {type(problem).__name__}: {problem}")
    finally:
        vault.close()
        await db.close()


async def versions(_: Patient) -> AsyncIterator[Seen]:
    coffer = f"Coffer {importlib.metadata.version('coffer')} ({machine.release()})"
    python = f"Python {platform.python_version()}"
    yield Seen(check="versions", state="ok", text=f"{coffer}, {python}, Linux {platform.release()} on {platform.machine()}")
    if _numbers(platform.release()) < (5, 13):
        yield Seen(
            check="versions",
            state="advice",
            text="this Linux has no Landlock (5.13)",
            remedy="a newer kernel makes the previews' jail whole",
        )


async def database(patient: Patient) -> AsyncIterator[Seen]:
    if not patient.database_is_there:
        remedy = "systemctl status postgresql; is COFFER_DATABASE_URL right? sudo -u coffer coffer volume list"
        yield Seen(check="database", state="wrong", text="PostgreSQL does not answer", remedy=remedy)
        return
    facts = await overview.database_facts(patient.db)
    major = facts.version // 10_000
    is_known = 15 <= major <= 18
    text = (
        f"PostgreSQL {facts.version_text}, {human_bytes(facts.size_bytes)}, {facts.connections} of {facts.connections_at_most} connections"
    )
    yield Seen(check="database", state="ok" if is_known else "wrong", text=text, remedy="use PostgreSQL 15 to 18")
    if missing := await ledger.pending(patient.db):
        yield Seen(check="database", state="wrong", text=f"{len(missing)} migrations are not applied", remedy="coffer migrate")
    for name, value, wanted in (
        ("fsync", facts.fsync, {"on"}),
        ("full_page_writes", facts.full_page_writes, {"on"}),
        ("synchronous_commit", facts.synchronous_commit, {"on", "remote_apply", "remote_write", "local"}),
    ):
        if value not in wanted:
            text = f"{name} is {value}: what was acknowledged may be gone after a crash"
            remedy = f"alter system set {name} = on; select pg_reload_conf(), then: coffer audit, for rows may be lost already"
            yield Seen(check="database", state="wrong", text=text, remedy=remedy)
    if facts.data_checksums != "on":
        remedy = "stop PostgreSQL, and pg_checksums --enable"
        yield Seen(
            check="database", state="advice", text="PostgreSQL does not notice when its own disk rots (data_checksums)", remedy=remedy
        )
    wanted_connections = 2 * ledger.connections_wanted(patient.settings)  # old and new side by side, during an upgrade
    if wanted_connections > facts.connections_at_most:
        text = (
            f"{facts.connections_at_most} connections are allowed, and servers and worker may want {wanted_connections} during an upgrade"
        )
        remedy = (
            f"alter system set max_connections = {wanted_connections + 10}, and restart PostgreSQL; or lower COFFER_DATABASE_CONNECTIONS"
        )
        yield Seen(check="database", state="advice", text=text, remedy=remedy)
    apart = abs((facts.now - datetime.now(UTC)).total_seconds())
    if apart > _CLOCK_SECONDS:
        text = f"PostgreSQL's clock and this machine's are {apart:.1f} s apart"
        yield Seen(check="clock", state="wrong", text=text, remedy="let both follow NTP: timedatectl set-ntp true")


async def clock(_: Patient) -> AsyncIterator[Seen]:
    told = machine.output_of("timedatectl", "show", "--property=NTPSynchronized", "--value") if machine.has_systemd() else None
    if told is None:
        yield Seen(check="clock", state="unknown", text="whether the clock follows NTP cannot be told here")
    elif told == "yes":
        yield Seen(check="clock", state="ok", text=f"follows NTP; it is {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
    else:
        remedy = "apt-get install systemd-timesyncd, timedatectl set-ntp true; links and tokens end by the clock"
        yield Seen(check="clock", state="advice", text="the clock does not follow NTP", remedy=remedy)


async def volume(patient: Patient) -> AsyncIterator[Seen]:
    if patient.database_is_there and not patient.vault.volumes:
        yield Seen(check="volume", state="wrong", text="there is no volume", remedy="coffer volume init /a/mounted/directory")
    for each in patient.vault.volumes:
        for seen in await asyncio.to_thread(_volume, each):
            yield seen


def _volume(volume: Volume) -> list[Seen]:
    mount_path = volume.mount
    if volume.state == "unavailable":
        remedy = f"is it mounted? findmnt --target {shlex.quote(str(mount_path))}"
        return [Seen(check="volume", state="wrong", text=f"{mount_path}: {volume.state}: {volume.reason}", remedy=remedy)]
    seen = []
    if volume.state == "read_only":
        remedy = f"dmesg, smartctl; when the disk is well: coffer volume reopen {volume.id}"
        seen.append(Seen(check="volume", state="wrong", text=f"{mount_path}: closed for writing after an I/O error", remedy=remedy))
    space = os.statvfs(mount_path)
    free_share = space.f_bavail / max(1, space.f_blocks)
    inode_share = space.f_favail / space.f_files if space.f_files else 1.0
    text = f"{mount_path}: {human_bytes(space.f_bavail * space.f_frsize)} free ({free_share:.0%}), {inode_share:.0%} of the inodes"
    is_short = min(free_share, inode_share) < _LEAST_FREE_SHARE
    state: State = "wrong" if volume.state == "full" else "advice" if is_short else "ok"
    seen.append(Seen(check="volume", state=state, text=text, remedy="grow the volume, add another one, or purge"))
    seen += _mount_options(mount_path)
    owners = {path.stat().st_uid for path in (mount_path, mount_path / "incoming", mount_path / "users") if path.exists()}
    if len(owners) > 1:
        text = f"{mount_path}, incoming/ and users/ belong to different accounts: who serves cannot write in all of them"
        remedy = f"on an installed machine: chown -R coffer: {shlex.quote(str(mount_path))}"
        seen.append(Seen(check="volume", state="wrong", text=text, remedy=remedy))
    if mount_path.stat().st_mode & 0o007:
        remedy = f"chmod o= {shlex.quote(str(mount_path))}"
        seen.append(Seen(check="volume", state="wrong", text=f"{mount_path} is open to everybody on this machine", remedy=remedy))
    if volume.state != "read_only":
        seen.append(_flush(mount_path))
    return seen


def _mount_options(path: Path) -> list[Seen]:
    mount = machine.mount_of(path)
    if mount is None:
        return [Seen(check="mount", state="unknown", text=f"{path}: the kernel does not tell its mount")]
    seen = []
    for option, meaning in (
        ("nobarrier", "a power cut may lose what was synced"),
        ("barrier=0", "a power cut may lose what was synced"),
        ("data=writeback", "a crash may leave other files' old bytes in new ones"),
    ):
        if option in mount.options:
            seen.append(Seen(check="mount", state="wrong", text=f"{path}: {option}: {meaning}", remedy="mount it without"))
    if mount.point == "/":
        remedy = "a disk of its own: systemd/examples/ has a mount, with its options"
        seen.append(Seen(check="mount", state="advice", text=f"{path} lies on the root file system ({mount.kind})", remedy=remedy))
    elif lacking := sorted({"nosuid", "nodev", "noexec"} - mount.options):
        text = f"{path}: {mount.kind} without {', '.join(lacking)}"
        seen.append(
            Seen(check="mount", state="advice", text=text, remedy="what users store needs none of it: add them to the mount's options")
        )
    else:
        seen.append(Seen(check="mount", state="ok", text=f"{path}: {mount.kind} at {mount.point}, {','.join(sorted(mount.options))}"))
    return seen


def _flush(path: Path) -> Seen:
    """Times fdatasync on a file without a name, so that a crash leaves nothing behind.

    A time that no disk can do proves that the flush goes nowhere. A plausible one proves nothing: a disk may keep the bytes in a cache that
    forgets them, and say otherwise. Only a power cut would tell.
    """
    try:
        handle = os.open(path, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError as problem:
        return Seen(check="fsync", state="unknown", text=f"{path}: cannot be tried here: {problem.strerror}")
    times = []
    try:
        for _ in range(_FLUSHES):
            os.write(handle, os.urandom(4096))
            began = time.perf_counter()
            os.fdatasync(handle)
            times.append(time.perf_counter() - began)
    except OSError as problem:
        return Seen(check="fsync", state="wrong", text=f"{path}: {problem.strerror}", remedy="look at the disk: dmesg, smartctl")
    finally:
        os.close(handle)
    median = statistics.median(times)
    text = f"{path}: a flush takes {median * 1000:.2f} ms (median of {_FLUSHES})"
    if median < _FASTEST_FLUSH_SECONDS:
        remedy = (
            "no disk is that fast: it is memory, or something below says done too early (a virtual disk with an unsafe cache, nobarrier)"
        )
        return Seen(check="fsync", state="wrong", text=text, remedy=remedy)
    if median > _SLOW_FLUSH_SECONDS:
        return Seen(check="fsync", state="advice", text=text, remedy="uploads wait for it: is the disk busy, or failing?")
    mount = machine.mount_of(path)
    cache = machine.disk_cache(mount.device) if mount else None
    if cache == "write through":
        text += ", of a disk that says it has no cache to flush"
    return Seen(check="fsync", state="ok", text=f"{text}, as a disk may; that its own cache survives a power cut, no program can prove")


async def forecast(patient: Patient) -> AsyncIterator[Seen]:
    """When a volume is full if its users go on as they did lately. Previews and what else lies on the disk are not foreseen."""
    if not patient.database_is_there:
        return
    for each in await overview.growth_by_volume(patient.db, _FORECAST_FROM, _FORECAST_FROM_CHANGES):
        volume = patient.vault.volume(each.volume_id)
        if volume.state == "unavailable" or each.seconds < _LEAST_HISTORY.total_seconds():
            continue
        pace = f"of the last {_ago(timedelta(seconds=each.seconds))}"
        if each.more_bytes <= 0:
            yield Seen(check="forecast", state="ok", text=f"{volume.mount}: does not fill, at the pace {pace}")
            continue
        bytes_a_day = each.more_bytes * 86400 / each.seconds
        days = max(0, volume.free_bytes()) / bytes_a_day
        left = f"in {days:.0f} days" if 1 <= days < 3650 else "within a day" if days < 1 else "not in ten years"
        text = f"{volume.mount}: full {left}, at the pace {pace}, {human_bytes(round(bytes_a_day))} a day"
        state: State = "wrong" if days < 1 else "advice" if days < 14 else "ok"
        yield Seen(check="forecast", state=state, text=text, remedy="grow the volume or add another one: ops/runbooks/disk-full.md")


async def permissions(patient: Patient) -> AsyncIterator[Seen]:
    if not CREDENTIALS.parent.exists():
        yield Seen(check="permissions", state="unknown", text=f"there is no {CREDENTIALS.parent}: not installed by `make install`")
        return
    try:
        secrets = sorted(CREDENTIALS.iterdir())
    except PermissionError:
        yield Seen(check="permissions", state="unknown", text="secrets can only be looked at as root")
        return
    wrong = [path for path in secrets if path.stat().st_mode & 0o077]
    for path in wrong:
        yield Seen(check="permissions", state="wrong", text=f"{path} can be read by others", remedy=f"chmod 600 {path}")
    settings = CREDENTIALS.parent / "coffer.env"
    if settings.exists() and settings.stat().st_mode & 0o027:
        text = f"{settings} can be read by everybody, or written by others than root"
        yield Seen(check="permissions", state="wrong", text=text, remedy=f"chown root:coffer {settings}; chmod 640 {settings}")
    if not wrong:
        yield Seen(check="permissions", state="ok", text=f"{len(secrets)} secrets in {CREDENTIALS}, readable by their owner alone")


async def server(patient: Patient) -> AsyncIterator[Seen]:
    answer = await asyncio.to_thread(machine.ask, patient.settings, "/health/ready")
    where = machine.address(patient.settings)
    if answer is None:
        remedy = "systemctl status coffer-api; journalctl -u coffer-api"
        yield Seen(check="server", state="wrong", text=f"nobody answers at {where}", remedy=remedy)
    elif answer.status_code == 200:
        yield Seen(check="server", state="ok", text=f"ready at {where}")
    else:
        yield Seen(check="server", state="wrong", text=f"not ready: {answer.text[:500]}", remedy="what is not ok in there is the cause")


async def clamd(patient: Patient) -> AsyncIterator[Seen]:
    if not patient.settings.clamd:
        yield Seen(check="clamd", state="ok", text="not asked for (COFFER_CLAMD): files are stored unscanned")
        return
    asked = Scanner(patient.settings, Metrics())
    try:
        answers = await asked.answers()
    finally:
        asked.close()
    remedy = "systemctl status clamav-daemon; until it answers, uploads are refused"
    state: State = "ok" if answers else "wrong"
    yield Seen(check="clamd", state=state, text=f"{patient.settings.clamd} {'answers' if answers else 'does not answer'}", remedy=remedy)


async def decoders(_: Patient) -> AsyncIterator[Seen]:
    """By programs of their own: a library that is broken may end whoever loads it."""
    for name, code in (
        ("libvips", "import pyvips; print(*(pyvips.version(part) for part in range(3)), sep='.')"),
        ("ffmpeg", "import imageio_ffmpeg, subprocess; print(imageio_ffmpeg.get_ffmpeg_version())"),
    ):
        version = await asyncio.to_thread(machine.output_of, sys.executable, "-c", code, timeout_seconds=30)
        remedy = "make install (on a server) or make venv brings it; without it, no previews"
        if version:
            yield Seen(check="decoders", state="ok", text=f"{name} {version.splitlines()[-1]}")
        else:
            yield Seen(check="decoders", state="wrong", text=f"{name} does not start", remedy=remedy)


async def nginx(patient: Patient) -> AsyncIterator[Seen]:
    if shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        yield Seen(check="nginx", state="ok", text="not on this machine")
        return
    if not patient.settings.edge_state_file:
        text = "is on this machine and passes all links to the server, if it is Coffer's"
        yield Seen(
            check="nginx", state="advice", text=text, remedy="set COFFER_EDGE_STATE_FILE, and coffer edge install (README, Production)"
        )
        return
    if not machine.is_root():
        yield Seen(check="nginx", state="unknown", text="whether it has the right keys can only be looked at as root")
        return
    options = _edge_options()
    command = [sys.executable, "-m", "ops.cli", "edge", "check", *options]
    checking = await asyncio.create_subprocess_exec(
        *command, cwd=Path(__file__).parent.parent, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    told = (await checking.communicate())[0].decode(errors="replace").strip().removeprefix("coffer: ")
    remedy = f"coffer edge install {shlex.join(options)} --for-real"
    yield Seen(check="nginx", state="wrong" if checking.returncode else "ok", text=told, remedy=remedy)


def _edge_options() -> list[str]:
    try:
        return shlex.split(EDGE_OPTIONS.read_text())
    except OSError:
        return []


async def certificate(_: Patient) -> AsyncIterator[Seen]:
    options = _edge_options()
    if "--certificate" not in options[:-1]:
        yield Seen(check="certificate", state="unknown", text=f"{EDGE_OPTIONS} names none: TLS ends elsewhere, or nowhere")
        return
    path = Path(options[options.index("--certificate") + 1])
    names = {options[place + 1] for place, option in enumerate(options[:-1]) if option == "--server-name"}
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as problem:
        yield Seen(check="certificate", state="wrong", text=f"{path}: {problem}", remedy="certbot certificates")
        return
    ends = found.not_valid_after_utc
    left = ends - datetime.now(UTC)
    state: State = "wrong" if left < timedelta(days=3) else "advice" if left < _CERTIFICATE_WARNING else "ok"
    text = f"{path}: ends {ends:%Y-%m-%d}, in {left.days} days"
    yield Seen(
        check="certificate", state=state, text=text, remedy="certbot renew, and is its timer enabled? systemctl list-timers certbot.timer"
    )
    missing = sorted(name for name in names if not _covers(found, name))
    if missing:
        yield Seen(check="certificate", state="wrong", text=f"{path} is not for {', '.join(missing)}", remedy="certbot --expand -d ...")


def _covers(found: x509.Certificate, name: str) -> bool:
    try:
        extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    covered = {str(each).lower() for each in extension.get_values_for_type(x509.DNSName)}
    return name.lower() in covered or f"*.{name.lower().partition('.')[2]}" in covered


async def services(_: Patient) -> AsyncIterator[Seen]:
    if not machine.has_systemd():
        text = "no systemd here: ops/cron/coffer.crontab starts the tools"
        yield Seen(check="services", state="unknown", text=text)
        return
    for name in machine.SERVICES:
        told = machine.unit(name, "LoadState", "ActiveState", "UnitFileState", "NRestarts")
        if told.get("LoadState") != "loaded":
            yield Seen(check="services", state="unknown", text=f"there is no {name}: not installed by `make install`")
            continue
        good = told.get("ActiveState") == "active" and told.get("UnitFileState") == "enabled"
        text = f"{name}: {told.get('ActiveState')}, {told.get('UnitFileState')}, started again {told.get('NRestarts')} times by itself"
        remedy = f"journalctl -u {name}; systemctl enable --now {name}"
        yield Seen(check="services", state="ok" if good else "wrong", text=text, remedy=remedy)


async def timers(patient: Patient) -> AsyncIterator[Seen]:
    if machine.has_systemd():
        for tool in machine.TOOLS:
            told = machine.unit(f"coffer-{tool}.timer", "LoadState", "ActiveState")
            if told.get("LoadState") == "loaded" and told.get("ActiveState") != "active":
                remedy = f"systemctl enable --now coffer-{tool}.timer"
                yield Seen(check="timers", state="wrong", text=f"coffer-{tool}.timer is {told.get('ActiveState')}", remedy=remedy)
    for tool in machine.TOOLS:
        most = _EXPECTED_EVERY.get(tool, timedelta.max)
        last = machine.last_run(patient.settings, tool)
        if last is None:
            if tool in ("audit", "scrub"):
                remedy = f"on a new machine, wait; else systemctl list-timers, COFFER_METRICS_DIRECTORY; or now: coffer {tool}"
                yield Seen(check="timers", state="advice", text=f"no run of {tool} is known", remedy=remedy)
            continue
        age = datetime.now(UTC) - last.ended_at
        text = f"{tool} ended {_ago(age)} ago with {last.exit_code}"
        if last.exit_code not in (Exit.OK, Exit.BUSY):
            yield Seen(check="timers", state="wrong", text=text, remedy=f"journalctl -u coffer-{tool}; coffer {tool}")
        elif age > most:
            yield Seen(check="timers", state="wrong", text=text, remedy=f"systemctl list-timers coffer-{tool}.timer")
        else:
            yield Seen(check="timers", state="ok", text=text)


async def files(patient: Patient) -> AsyncIterator[Seen]:
    if not patient.database_is_there:
        return
    if damaged := await overview.count_damaged(patient.db):
        remedy = "restore them from a backup, then: coffer scrub --damaged"
        yield Seen(check="files", state="wrong", text=f"{damaged} files are damaged", remedy=remedy)
    waiting, failed = await ledger.count_previews(patient.db)
    if failed:
        yield Seen(
            check="previews", state="advice", text=f"{sum(failed.values())} files have no preview", remedy="coffer previews list-failed"
        )
    yield Seen(check="previews", state="ok", text=f"{waiting} files wait for theirs")


async def backup(patient: Patient) -> AsyncIterator[Seen]:
    if not patient.database_is_there:
        return
    found = await overview.last_backups(patient.db)
    if found is None:
        text = "this version makes none"
        yield Seen(check="backup", state="advice", text=text, remedy="pg_dump and a copy of the volumes, in this order, until it does")
        return
    now = datetime.now(UTC)
    if found.done_at is None:
        yield Seen(check="backup", state="wrong", text="there is none", remedy="coffer backup --help; systemctl status coffer-backup.timer")
        return
    age = now - found.done_at
    state: State = "ok" if age < _BACKUP_EVERY else "wrong"
    yield Seen(check="backup", state=state, text=f"the last one is {_ago(age)} old", remedy="journalctl -u coffer-backup; coffer backup")
    if found.last_drill_passed is False:
        yield Seen(check="backup", state="wrong", text="the last one tried could not be restored", remedy="coffer drill")
    elif found.proven_at is None or now - found.proven_at > _PROVEN_EVERY:
        yield Seen(check="backup", state="advice", text="unproven: none was restored on trial lately", remedy="coffer drill")


def _ago(age: timedelta) -> str:
    hours = age.total_seconds() / 3600
    return f"{hours:.0f} h" if 1 <= hours < 72 else f"{hours * 60:.0f} min" if hours < 1 else f"{hours / 24:.0f} days"


def _numbers(release: str) -> tuple[int, int]:
    parts = release.split(".")
    return int(parts[0]), int("".join(filter(str.isdigit, parts[1])) or 0) if len(parts) > 1 else 0


CHECKS: tuple[Check, ...] = (
    *(
        versions,
        database,
        clock,
        volume,
        forecast,
        permissions,
        server,
        services,
        timers,
        decoders,
        clamd,
        nginx,
        certificate,
        files,
        backup,
    ),
)
