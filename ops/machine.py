"""What the machine tells about itself: mounts, units and timers of systemd, the tools' last runs, the release, the running server.

Nothing here changes anything, and nothing raises because a machine has no systemd: what cannot be known is None.
"""

import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from server.settings import Settings

SERVICES = ("coffer-api.service", "coffer-worker.service")
TOOLS = ("audit", "scrub", "backup", "drill", "purge", "usage")
_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Mount:
    """Where a path lies: the mount's own path, the file system's type, its options, and the device as major:minor."""

    point: str
    kind: str
    options: frozenset[str]
    device: str


def mount_of(path: Path) -> Mount | None:
    """The mount that holds a path (proc(5), mountinfo). None when the kernel does not tell."""
    best: Mount | None = None
    resolved = str(path.resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind_and_more = left.split(), right.split()
        point = fields[4].encode().decode("unicode_escape")  # blanks in it are written \040
        if (resolved == point or resolved.startswith(point.rstrip("/") + "/")) and (best is None or len(point) >= len(best.point)):
            options = frozenset(fields[5].split(",")) | frozenset(kind_and_more[-1].split(","))
            best = Mount(point, kind_and_more[0], options, fields[2])
    return best


def disk_cache(device: str) -> str | None:
    """What the kernel thinks of the cache of a disk, by its major:minor: `write back`, which it flushes, or `write through`.

    Of the latter it believes that there is nothing to flush (sysfs-block). None for what is no disk.
    """
    disk = Path("/sys/dev/block", device).resolve()
    for place in (disk, disk.parent):  # a partition lies below its disk
        try:
            return (place / "queue" / "write_cache").read_text().strip()
        except OSError:
            continue
    return None


def has_systemd() -> bool:
    """Whether systemd runs this machine (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def output_of(*command: str, timeout_seconds: float = _TIMEOUT_SECONDS) -> str | None:
    """What a program prints, or None when it is not there, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def unit(name: str, *properties: str) -> dict[str, str]:
    """Properties of a unit, as `systemctl show` writes them; nothing without systemd."""
    if not has_systemd():
        return {}
    told = output_of("systemctl", "show", name, f"--property={','.join(properties)}", "--timestamp=unix") or ""
    return dict(line.split("=", 1) for line in told.splitlines() if "=" in line)


class LastRun(msgspec.Struct, frozen=True, kw_only=True):
    """A tool's last end, and its exit code."""

    ended_at: datetime
    exit_code: int


def last_run(settings: Settings, tool: str) -> LastRun | None:
    """As its metrics say, or else systemd since the last boot. None: it has not run, as far as anybody knows."""
    if settings.metrics_directory:
        values = {}
        try:
            text = Path(settings.metrics_directory, f"coffer_{tool}.prom").read_text()
            for family in text_string_to_metric_families(text):
                values.update({sample.name: sample.value for sample in family.samples})
            return LastRun(
                ended_at=datetime.fromtimestamp(values[f"coffer_{tool}_end_timestamp_seconds"], UTC),
                exit_code=int(values[f"coffer_{tool}_exit_code"]),
            )
        except (OSError, ValueError, KeyError):
            pass
    told = unit(f"coffer-{tool}.service", "ExecMainExitTimestamp", "ExecMainStatus")
    stamp = told.get("ExecMainExitTimestamp", "").lstrip("@")
    if not stamp.isdigit() or stamp == "0":
        return None
    return LastRun(ended_at=datetime.fromtimestamp(int(stamp), UTC), exit_code=int(told.get("ExecMainStatus") or 0))


def release() -> str:
    """The name of the release that this code is: its directory below /opt/coffer, or `checkout`."""
    directory = Path(__file__).resolve().parent.parent
    return directory.name if directory.parent.name == "releases" else "checkout"


def address(settings: Settings) -> str:
    """Where the server of these settings is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - compared with, not bound to
    return f"http://[{quote(host)}]:{settings.port}" if ":" in host else f"http://{quote(host)}:{settings.port}"


def ask(settings: Settings, path: str) -> httpx.Response | None:
    """What the server of this machine answers, or None when it does not."""
    try:
        return httpx.get(address(settings) + path, timeout=_TIMEOUT_SECONDS)
    except httpx.HTTPError:
        return None


def is_root() -> bool:
    """Whether everything can be looked at."""
    return os.geteuid() == 0
