"""What the sections share: the servers, started when first needed, interleaved rounds, and how figures are printed."""

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from tests.bench import servers
from tests.bench.processes import BenchError
from tests.bench.servers import Coffer, Peer

KIB, MIB, GIB = 2**10, 2**20, 2**30


class Round(NamedTuple):
    """One round of one contestant: work per second, and CPU seconds of the server per unit that the section names."""

    rate: float
    cpu_seconds: float = 0.0


class Stage:
    """The servers of one session, all on one file system."""

    def __init__(self, scratch: Path, stack: ExitStack) -> None:
        self.scratch = scratch
        self._stack = stack

    @cached_property
    def coffer(self) -> Coffer:
        return self._stack.enter_context(servers.coffer(self.scratch))

    @cached_property
    def bare(self) -> Peer:
        return self._stack.enter_context(servers.bare(self.scratch))

    @cached_property
    def nginx(self) -> Peer | None:
        """None, after saying what is missing, where nginx cannot be had."""
        try:
            return self._stack.enter_context(servers.nginx(self.scratch))
        except BenchError as missing:
            say(f"without nginx: {missing}")
            return None

    def file(self, size_bytes: int) -> Path:
        """An MP4 by its start, then noise up to `size_bytes`; made once."""
        path = self.scratch / f"body-{size_bytes}"
        if not path.exists():
            with path.open("wb") as file:
                file.write(MP4_START)
                while (left := size_bytes - file.tell()) > 0:
                    file.write(os.urandom(min(left, MIB)))
        return path

    def free_bytes(self) -> int:
        facts = os.statvfs(self.scratch)
        return facts.f_bavail * facts.f_frsize


MP4_START = bytes.fromhex("0000001c6674797069736f6d0000020069736f6d69736f326d703431") + b"\x00\x00\x00\x08free"
PNG_START = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000100000001008020000009091683600000000")


def image(size_bytes: int) -> bytes:
    """A PNG by its start, then noise."""
    return PNG_START + os.urandom(size_bytes - len(PNG_START))


def interleave(contestants: Mapping[str, Callable[[], Round]], rounds: int) -> dict[str, list[Round]]:
    """Runs every contestant once per round, in a new order each time, so that a slow minute of the machine hits them alike.

    One round more goes before, which fills caches and does not count.
    """
    results: dict[str, list[Round]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        order = list(contestants)
        random.shuffle(order)
        for name in order:
            # What the last contestant left to be written must not slow this one.
            os.sync()
            result = contestants[name]()
            if number:
                results[name].append(result)
    return results


def timed(server: servers.Server, units: float, work: Callable[[], float]) -> Round:
    """A round whose `work` returns the seconds that `units` units took."""
    before = server.cpu_seconds()
    seconds = work()
    return Round(units / seconds, (server.cpu_seconds() - before) / units)


def counted(server: servers.Server, work: Callable[[], float], seconds: float) -> Round:
    """A round whose `work` returns units per second, over about `seconds`."""
    before = server.cpu_seconds()
    rate = work()
    return Round(rate, (server.cpu_seconds() - before) / (rate * seconds))


def table(results: Mapping[str, list[Round]], unit: str, cpu_unit: str, cpu_scale: float = 1.0) -> None:
    """One line per contestant: median, spread, CPU time."""
    for name, outcomes in results.items():
        rates = [each.rate for each in outcomes]
        cpu = statistics.median(each.cpu_seconds for each in outcomes) * cpu_scale
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        say(f"{name:<34}{statistics.median(rates):>9,.0f} {unit} ({spread}), {cpu:.2f} {cpu_unit}")


def ratio(results: Mapping[str, list[Round]], name: str, base: str, *, at_least: float | None = None) -> None:
    """The ratio of two medians, beside its target. Says nothing when a contestant is missing."""
    if name in results and base in results:
        value = statistics.median(each.rate for each in results[name]) / statistics.median(each.rate for each in results[base])
        verdict(f"{name} / {base}", value, at_least=at_least)


def verdict(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None, unit: str = "") -> None:
    """A figure beside its target."""
    text = f"{what:<52}{value:>9.2f}{unit}"
    if at_least is not None:
        text += f"   target >= {at_least:g}: {'met' if value >= at_least else 'MISSED'}"
    if at_most is not None:
        text += f"   target <= {at_most:g}: {'met' if value <= at_most else 'MISSED'}"
    say(text)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def elapsed(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


def peak_memory_bytes(pid: int | Literal["self"]) -> int:
    """The most memory that a process ever had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak_kib) * KIB


def run_python(code: str, database_url: str) -> tuple[str, int]:
    """Runs statements that leave an exit code in `code`. What they printed, and the most memory of that process, or of a child of it.

    Not the process's own `ru_maxrss`, which begins with what this one had when it started the other.
    """
    code = f"""{code}
import resource, sys
from tests.bench.harness import peak_memory_bytes
print(max(peak_memory_bytes("self"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
sys.exit(code)"""
    environment = os.environ | {"DATABASE_URL": database_url}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{done.stdout[-500:]}{done.stderr[-500:]}")
    told, _, peak_bytes = done.stdout.rstrip().rpartition("\n")
    return told, int(peak_bytes)
