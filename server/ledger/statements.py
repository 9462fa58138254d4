"""Loads the statements of `sql/queries/*.sql` by name.

A statement begins with `-- name: its_name`, is described by the comment lines that follow, and ends before the next
name. A name that is missing, repeated or undescribed stops the import, so no process starts with a broken set.
"""

import re
from functools import cache
from pathlib import Path

SQL_DIRECTORY = Path(__file__).resolve().parents[2] / "sql"

_NAME = re.compile(r"^-- name: ([a-z_]+)\n((?:--.*\n)*)", re.MULTILINE)


def statement(name: str, **fragments: str) -> str:
    """The SQL called `name`, with each `{key}` of `fragments` replaced. Fragments are our own text, never a client's."""
    text = _statements()[name]
    for key, fragment in fragments.items():
        text = text.replace("{" + key + "}", fragment)
    return text


@cache
def _statements() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted((SQL_DIRECTORY / "queries").glob("*.sql")):
        text = path.read_text(encoding="utf-8")
        heads = list(_NAME.finditer(text))
        for head, following in zip(heads, [*heads[1:], None], strict=True):
            name, description = head.groups()
            if name in found or not description.strip("- \n"):
                raise ValueError(f"{path.name}: statement {name} is repeated or has no description")
            found[name] = text[head.end() : following.start() if following else len(text)].strip().rstrip(";")
    return found
