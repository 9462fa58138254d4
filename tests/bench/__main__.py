"""`python -m tests.bench [section ...]`: how fast Coffer is, as ratios of interleaved runs in one session.

A ratio holds on any machine; a rate is for the curious. Nothing here ever fails a build: a missed target is printed as such.
Everything runs on loopback and in a scratch directory that is removed at the end.
"""

import argparse
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.bench import audit, backup, downloads, edge, generation, huge, large, links, lists, memory, million, previews, small, tus
from tests.bench.harness import Stage, elapsed, say
from tests.bench.processes import BenchError
from tests.scratch import scratch

SECTIONS = {
    "large": large,
    "small": small,
    "memory": memory,
    "huge": huge,
    "downloads": downloads,
    "edge": edge,
    "lists": lists,
    "links": links,
    "previews": previews,
    "tus": tus,
    "audit": audit,
    "backup": backup,
    "million": million,
    "generation": generation,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Prints speed and memory beside their targets. All sections together take about ten minutes.",
        epilog="sections: " + "; ".join((module.__doc__ or "").splitlines()[0] for module in SECTIONS.values()),
    )
    parser.add_argument("sections", nargs="*", metavar="section", help=f"any of {', '.join(SECTIONS)}; all when left out")
    parser.add_argument("--scratch", type=Path, default=Path(".coffer"), help="directory on the file system to measure (default: .coffer)")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if not shutil.which("curl"):
        print("the benchmark needs curl", file=sys.stderr)
        return 1
    arguments.scratch.mkdir(mode=0o711, parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        with scratch(arguments.scratch, "bench-") as directory, ExitStack() as stack:
            stage = Stage(directory, stack)
            for name in arguments.sections or SECTIONS:
                _run(name, stage)
    except KeyboardInterrupt:
        return 130
    print(f"\ndone in {elapsed(began)}", flush=True)
    return 0


def _run(name: str, stage: Stage) -> None:
    print(f"\n{SECTIONS[name].__doc__ or name}".rstrip(), flush=True)
    began = time.monotonic()
    try:
        SECTIONS[name].measure(stage)
    except BenchError as problem:
        say(str(problem))
    say(f"({elapsed(began)})")


if __name__ == "__main__":
    sys.exit(main())
