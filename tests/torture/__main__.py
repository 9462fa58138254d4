"""`python -m tests.torture [number ...]`: faults that Coffer must survive, in their whole length; `make test` has a short form of each.

One line for each, with its figures. Exit code 1 if something was lost. Everything runs on loopback and in a scratch directory that is
removed at the end; all of it takes about half an hour. Failing disks need root and loop devices.
"""

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from ops.embedded_postgres import EmbeddedPostgres
from tests.scratch import scratch
from tests.torture.cases import CASES, Case
from tests.torture.stage import Stage


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", epilog="faults: " + "; ".join(f"{case.number} {case.title}" for case in CASES)
    )
    parser.add_argument("numbers", nargs="*", type=int, metavar="number", help="which ones; all when left out")
    numbers = parser.parse_args().numbers
    if unknown := set(numbers) - {case.number for case in CASES}:
        parser.error(f"no such fault: {', '.join(map(str, sorted(unknown)))}")
    chosen = [case for case in CASES if not numbers or case.number in numbers]
    began = time.monotonic()
    with scratch(Path(tempfile.gettempdir()), "coffer-torture-") as directory:
        postgres = EmbeddedPostgres(directory / "postgres", settings={"max_connections": "200"})
        try:
            stage = Stage(postgres.start(), directory)
            outcomes = [_told(case, stage) for case in chosen]
        finally:
            postgres.stop()
    print(f"\n{outcomes.count(True)} of {len(outcomes)} survived, in {time.monotonic() - began:.0f} s", flush=True)
    return 0 if all(outcomes) else 1


def _told(case: Case, stage: Stage) -> bool:
    """Whether it was survived, and says so."""
    began = time.monotonic()
    try:
        outcome, held = f"{case.run(stage)}  ok", True
    except Exception as problem:  # noqa: BLE001 - the others are still worth their while
        outcome, held = f"{type(problem).__name__}: {problem}  FAILED", False
        traceback.print_exc()
    print(f"{case.number:>3}  {case.title}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    return held


if __name__ == "__main__":
    sys.exit(main())
