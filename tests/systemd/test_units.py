"""The units in systemd/, as systemd itself reads them."""

import configparser
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from server.settings import Settings

UNITS = Path(__file__).resolve().parents[2] / "systemd"
CRONTAB = UNITS.parent / "ops" / "cron" / "coffer.crontab"
PROGRAM = "/opt/coffer/current/.venv/bin/coffer"
TOOLS = ("audit", "scrub", "backup", "drill", "purge", "usage")
MOST_EXPOSED = {"coffer-api": 1.5, "coffer-worker": 2.0}


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a program that is here, which `verify` wants."""
    directory = tmp_path / "units"
    shutil.copytree(UNITS, directory)
    for path in directory.glob("*.service"):
        path.write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    return directory


def complaints(directory: Path) -> str:
    """What systemd says of the units: it ends with 0 for most of what it does not understand."""
    names = [str(path) for path in directory.iterdir() if path.is_file()] + [str(path) for path in (directory / "examples").iterdir()]
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    return verified.stderr


def test_systemd_understands_every_line(units: Path) -> None:
    assert complaints(units) == ""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("coffer-api.service", "ProtectSystm=strict"),
        ("coffer-.service.d/10-confinement.conf", "SystemCallFilter=no_such_call"),
        ("coffer-worker.service.d/20-jail.conf", "RestrictNamespaces=usr"),
        ("coffer-audit.timer", "OnCalendar=every morning"),
    ],
)
def test_what_it_does_not_understand_would_be_seen(units: Path, name: str, line: str) -> None:
    with (units / name).open("a") as file:
        section = "[Timer]" if name.endswith(".timer") else "[Service]"
        file.write(f"\n{section}\n{line}\n")
    assert complaints(units) != ""


def exposure(directory: Path, name: str) -> float:
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", f"{directory}/{name}.service"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+) ", told)
    assert found is not None, told
    return float(found[1])


@pytest.mark.parametrize("name", ["coffer-api", "coffer-worker", *(f"coffer-{tool}" for tool in TOOLS)])
def test_services_are_confined(units: Path, name: str) -> None:
    assert exposure(units, name) <= MOST_EXPOSED.get(name, 2.0)


def test_without_the_common_part_nothing_is_confined(units: Path) -> None:
    """So the test above looks at it, too."""
    shutil.rmtree(units / "coffer-.service.d")
    assert exposure(units, "coffer-api") > 5


@pytest.mark.parametrize(
    ("name", "does_without"),
    [
        ("coffer-api", {"RestrictSUIDSGID": "no", "ProcSubset": "all"}),  # openat2(2), /proc/sys
        ("coffer-worker", {"MemoryDenyWriteExecute": "no"}),  # callbacks of libc2pa
    ],
)
def test_what_would_break_a_service_is_left_out(name: str, does_without: dict[str, str]) -> None:
    """Only a booted machine shows what each of these breaks (`make try-install`), so that nobody puts one back unawares."""
    parts = [UNITS / f"{name}.service", *(UNITS / "coffer-.service.d").iterdir(), *(UNITS / f"{name}.service.d").iterdir()]
    effective: dict[str, str] = {}
    for part in sorted(parts, key=lambda path: (path.suffix != ".service", path.name)):
        effective |= dict(parsed(part)["Service"])
    assert effective | does_without == effective


def parsed(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return parser


@pytest.mark.parametrize("tool", TOOLS)
def test_timers_start_their_tools_also_after_the_machine_was_off(tool: str) -> None:
    timer, service = parsed(UNITS / f"coffer-{tool}.timer"), parsed(UNITS / f"coffer-{tool}.service")
    assert timer["Timer"]["Persistent"] == "yes" and timer["Timer"]["RandomizedDelaySec"]
    assert timer["Install"]["WantedBy"] == "coffer.target"
    assert service["Service"]["ExecStart"].split()[:2] == [PROGRAM, tool]
    assert service["Service"]["SuccessExitStatus"] == "7"


def test_cron_runs_what_timers_run() -> None:
    jobs = dict(re.findall(r"^\S+ \S+ \S+ \S+ \S+\s+coffer\s+nice coffer (\w+)(.*?)\s+>>", CRONTAB.read_text(), re.MULTILINE))
    assert {tool: f"{PROGRAM} {tool}{rest}" for tool, rest in jobs.items()} == {
        tool: parsed(UNITS / f"coffer-{tool}.service")["Service"]["ExecStart"] for tool in TOOLS
    }


def test_the_last_moment_of_a_stop_is_coffers_own() -> None:
    """systemd is more patient than any setting lets the server be."""

    (grace,) = (each for each in fields(Settings) if each.name == "stop_grace_seconds")
    assert int(parsed(UNITS / "coffer-api.service")["Service"]["TimeoutStopSec"]) >= grace.metadata["at_most"] + 60
