"""The whole `coffer` command: what the server has, and the tools of this room, which the server does not know."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from server import cli


def main() -> NoReturn:
    """Runs one command and exits with its code."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    return cli.run(arguments, more=_add_tools)


def _add_tools(commands: Any) -> None:
    del commands  # there are none yet


if __name__ == "__main__":
    main()
