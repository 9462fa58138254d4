"""Results on standard output, as a table for people or as JSON lines for programs; everything else on standard error."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec


def say(text: str) -> None:
    """Tells the person at the terminal something that is no result."""
    print(f"coffer: {text}", file=sys.stderr, flush=True)


def show(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Prints every row: whole as a line of JSON, or its `columns` as an aligned table with a heading."""
    if as_json:
        for row in rows:
            print(msgspec.json.encode(row).decode())
        return
    table = [list(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[position]) for line in table) for position in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def human_bytes(size_bytes: int) -> str:
    """1536 is 1.5 KiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def printable(text: str) -> str:
    """A text that someone else chose, made harmless for a terminal: what could move the cursor is shown escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case list() | tuple():
            return printable(",".join(str(each) for each in value))
        case _:
            return printable(str(value))
