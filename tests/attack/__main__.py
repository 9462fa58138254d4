"""`python -m tests.attack [number ...]`: what Coffer must refuse, tried against a running server with two users.

One line for each attack, with its figure. Exit code 1 if one got through. Everything runs on loopback and in a scratch directory that
is removed at the end; all of it takes less than five minutes.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from ops.embedded_postgres import EmbeddedPostgres
from tests.attack.cases import CASES, Case, run
from tests.attack.target import Target, target_on
from tests.scratch import scratch

NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attack", epilog="attacks: " + "; ".join(f"{case.number} {case.title}" for case in CASES)
    )
    parser.add_argument("numbers", nargs="*", type=int, metavar="number", help="which attacks; all when left out")
    numbers = parser.parse_args().numbers
    if unknown := set(numbers) - {case.number for case in CASES}:
        parser.error(f"no such attack: {', '.join(map(str, sorted(unknown)))}")
    chosen = [case for case in CASES if not numbers or case.number in numbers]
    began = time.monotonic()
    with scratch(Path(tempfile.gettempdir()), "coffer-attack-") as directory:
        postgres = EmbeddedPostgres(directory / "postgres", settings=NOT_DURABLE)
        try:
            with target_on(postgres.start(), directory, thorough=True) as target:
                outcomes = [_told(case, target) for case in chosen]
        finally:
            postgres.stop()
    print(f"\n{outcomes.count(True)} of {len(outcomes)} held, in {time.monotonic() - began:.0f} s", flush=True)
    return 0 if all(outcomes) else 1


def _told(case: Case, target: Target) -> bool:
    """Whether the attack was refused, and says so. An attack that could not be carried out counts as one that got through."""
    began = time.monotonic()
    try:
        outcome, held = f"{run(case, target)}  ok", True
    except Exception as problem:  # noqa: BLE001 - the other attacks are still worth their while
        outcome, held = f"{type(problem).__name__}: {problem}  FAILED", False
    print(f"{case.number:>3}  {case.title}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    return held


if __name__ == "__main__":
    sys.exit(main())
