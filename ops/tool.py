"""The frame of every operational tool: one at a time, told to people, to programs and to Prometheus, and an exit code for timers."""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn
from uuid import UUID

import msgspec
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from tqdm import tqdm

from ops.hooks import tell_failure
from server import cli, ledger
from server.actor import Actor, act_as
from server.commands.failures import CommandFailed, Exit, code_of
from server.commands.output import printable, say
from server.errors import CofferError
from server.ledger import Database
from server.ledger.tools import ToolIsRunning, ToolLock, tool_lock
from server.settings import SettingError, Settings
from server.vault import Vault

_MOST_TOLD = 100  # of each kind; a person reads no more, and --json tells all

State = Literal["repaired", "repairable", "waiting", "look", "removable", "removed"]


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that is not as it should be.

    `repaired`; `repairable` with --repair; `waiting` until it is older or was seen once more; or somebody must `look`. What is in order
    and goes all the same is `removed`, or `removable` with --for-real. `command` is what to run. Of what is told together, `count` says
    how many, and `size_bytes` how large all of them are.
    """

    kind: str
    state: State
    text: str
    user_id: str | None = None
    file_id: UUID | None = None
    volume_id: UUID | None = None
    path: str | None = None
    command: str | None = None
    rule_id: int | None = None
    count: int | None = None
    size_bytes: int | None = None


@dataclass
class Desk:
    """What a tool works with."""

    tool: str
    arguments: argparse.Namespace
    settings: Settings
    db: Database
    vault: Vault
    lock: ToolLock
    figures: dict[str, float] = field(default_factory=dict)
    """Name, with its unit, to value: for the JSON summary and the metrics."""
    counts: Counter[tuple[str, State]] = field(default_factory=Counter)
    """Findings by kind and state."""

    def found(self, finding: Finding) -> None:
        """Counts and tells a finding at once: none is kept in memory."""
        key = (finding.kind, finding.state)
        self.counts[key] += 1
        if self.arguments.json:
            print(msgspec.json.encode(finding).decode(), flush=True)
        elif self.counts[key] <= _MOST_TOLD:
            with tqdm.external_write_mode(sys.stderr):
                say(f"{finding.kind}, {finding.state}: {printable(finding.text)}")
                if finding.command:
                    say(f"    {printable(finding.command)}")
        elif self.counts[key] == _MOST_TOLD + 1:
            say(f"{finding.kind}, {finding.state}: and more, which --json tells")

    @property
    def is_in_order(self) -> bool:
        """Whether nobody need do anything."""
        return not any(count for (_, state), count in self.counts.items() if state in ("look", "repairable"))

    def progress(self, what: str, total: float, unit: str) -> "tqdm[NoReturn]":
        """A bar on standard error; none where that is no terminal."""
        return tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=None, leave=False)


Work = Callable[[Desk], Awaitable[str]]
"""Does a tool's work, and returns what it looked at, as the start of the summary."""


def add(
    commands: Any,
    name: str,
    work: Work,
    meaning: str,
    *,
    tool: str | None = None,
    needs_store: Callable[[argparse.Namespace], bool] = lambda _: True,
    failure_command: Callable[[Settings], str] = lambda _: "",
) -> argparse.ArgumentParser:
    """Declares a tool as a command, with the options that all have. Commands of one `tool` share its lock and its metrics.

    One that does not need a store may find an empty database, and no volumes. `failure_command` is run when it fails or has to tell.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=meaning, description=meaning)
    add_options(parser, json=False, metrics_file=None)
    parser.set_defaults(run=lambda arguments: asyncio.run(_run(tool or name, work, arguments, needs_store(arguments), failure_command)))
    return parser


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options that all have. Without defaults: once more, for a part of a tool."""
    parser.add_argument(
        "--json", action="store_true", help="print a line of JSON for each finding, and one for the summary", default=argparse.SUPPRESS
    )
    parser.add_argument("--metrics-file", type=Path, help="where to write metrics for Prometheus", default=argparse.SUPPRESS)
    parser.set_defaults(**defaults)


async def _run(name: str, work: Work, arguments: argparse.Namespace, needs_store: bool, failure_command: Callable[[Settings], str]) -> None:
    act_as(Actor(kind="cli", id=cli.account()))
    settings = Settings.load()
    metrics_file: Path | None = arguments.metrics_file
    if metrics_file is None and settings.metrics_directory:
        metrics_file = Path(settings.metrics_directory, f"coffer_{name}.prom")
    code: Exit = Exit.FAILURE
    began = time.monotonic()
    desk: Desk | None = None
    try:
        async with tool_lock(settings, name) as lock:
            db, vault = Database(settings), Vault(settings.volume_reserve_bytes)
            desk = Desk(name, arguments, settings, db, vault, lock)
            await db.open()
            try:
                if needs_store:
                    await vault.refresh(await ledger.list_volumes(db))
                looked_at = await work(desk)
            finally:
                vault.close()
                await db.close()
        code = Exit.OK if desk.is_in_order else Exit.FOUND
        _summarise(desk, looked_at, time.monotonic() - began, code)
    except ToolIsRunning:
        code = Exit.BUSY  # whoever is at work writes the metrics
        raise CommandFailed(f"{name} is at work already, here or on another machine; nothing was done", code) from None
    except CommandFailed as problem:
        code = problem.code
        raise
    except CofferError as problem:
        code = code_of(problem)
        raise
    except SettingError:
        code = Exit.USAGE
        raise
    finally:
        if metrics_file is not None and code is not Exit.BUSY:
            _write_metrics(metrics_file, name, desk, time.monotonic() - began, code)
        if code not in (Exit.OK, Exit.BUSY):
            reason = str(sys.exception() or "somebody must look at what was found")
            await tell_failure(failure_command(settings), f"the command for failures of coffer {name}", f"coffer {name}: {reason}")
    if code is Exit.FOUND:
        raise CommandFailed("somebody must look at what was found", code)


def _summarise(desk: Desk, looked_at: str, seconds: float, code: Exit) -> None:
    if desk.arguments.json:
        findings = [{"kind": kind, "state": state, "count": count} for (kind, state), count in sorted(desk.counts.items())]
        summary = {"tool": desk.tool, "exit_code": int(code), "duration_seconds": round(seconds, 3), **desk.figures, "findings": findings}
        print(msgspec.json.encode({"summary": summary}).decode())
        return
    found = ", ".join(f"{count} {kind} {state}" for (kind, state), count in sorted(desk.counts.items())) or "nothing found"
    print(f"{desk.tool}: {looked_at} in {seconds:.1f} s: {found}")


def _write_metrics(path: Path, tool: str, desk: Desk | None, seconds: float, code: Exit) -> None:
    """Whole or not at all (it is renamed into place). A failed run leaves its code and no findings, and the time of its end."""
    registry = CollectorRegistry()
    prefix = f"coffer_{tool}"
    Gauge(f"{prefix}_exit_code", "How the last run ended: see `coffer --help`.", registry=registry).set(code)
    Gauge(f"{prefix}_end_timestamp_seconds", "When the last run ended.", registry=registry).set(time.time())
    Gauge(f"{prefix}_duration_seconds", "How long the last run took.", registry=registry).set(seconds)
    if desk is not None and code in (Exit.OK, Exit.FOUND):
        findings = Gauge(f"{prefix}_findings", "What the last run found.", ("kind", "state"), registry=registry)
        for (kind, state), count in sorted(desk.counts.items()):
            findings.labels(kind, state).set(count)
        for name, value in desk.figures.items():
            Gauge(f"{prefix}_{name}", "A figure of the last run; its unit ends its name.", registry=registry).set(value)
    try:
        write_to_textfile(str(path), registry)
        path.chmod(0o644)  # node_exporter is another account; there is no secret in them
    except OSError as problem:
        say(f"no metrics were written to {path}: {problem.strerror}")
