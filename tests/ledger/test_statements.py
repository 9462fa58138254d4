"""The statements in sql/queries, as a set."""

from pathlib import Path

import pytest

from server.ledger import statements
from server.ledger.statements import SQL_DIRECTORY, statement


def test_every_statement_is_used() -> None:
    sources = "".join(path.read_text() for path in (SQL_DIRECTORY.parent / "server" / "ledger").glob("*.py"))
    names = set(statements._statements())
    assert names == {name for name in names if f'"{name}"' in sources}


@pytest.mark.parametrize("text", ["-- name: one\nselect 1;", "-- name: one\n-- One.\nselect 1;\n-- name: one\n-- One.\nselect 1;"])
def test_an_undescribed_or_repeated_statement_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "some.sql").write_text(text)
    monkeypatch.setattr(statements, "SQL_DIRECTORY", tmp_path)
    with pytest.raises(ValueError, match="one"):
        statements._statements.__wrapped__()


def test_fragments_take_their_places() -> None:
    assert "$1" in statement("get_user", user="user_id") and "{user}" not in statement("get_user", user="user_id")
    with pytest.raises(KeyError):
        statement("no_such_statement")
