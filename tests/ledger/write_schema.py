"""Writes `sql/schema.sql` anew from the migrations: `python -m tests.ledger.write_schema`."""

import asyncio
import re
import subprocess
import tempfile
from pathlib import Path

from ops.embedded_postgres import EmbeddedPostgres, binaries_for
from server.ledger import migrate
from server.ledger.statements import SQL_DIRECTORY

SCHEMA = SQL_DIRECTORY / "schema.sql"

HEAD = """\
-- The database that the files of sql/migrations add up to, to be read. Do not edit it: change the database by a new migration, then
-- write this file anew with `python -m tests.ledger.write_schema`. A test fails while the two differ.

-- Functions come before the tables that they name.
SET check_function_bodies = false;

"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="coffer-schema-") as name:
        Path(name).chmod(0o711)
        postgres = EmbeddedPostgres(Path(name) / "postgres", settings={"fsync": "off"})
        url = postgres.start()
        try:
            asyncio.run(migrate(url))
            options = ["--schema-only", "--no-owner", "--no-privileges", "--exclude-table=schema_migrations"]
            dumped = subprocess.run([binaries_for(None) / "pg_dump", *options, url], check=True, capture_output=True, text=True).stdout
        finally:
            postgres.stop()
    SCHEMA.write_text(HEAD + _readable(dumped))


def _readable(dumped: str) -> str:
    """Without pg_dump's commands to psql, its settings and its headings, which depend on its version."""
    headings = r"^(--\n-- (Name:|PostgreSQL).*\n--\n|-- Dumped .*\n)"
    settings = r"^(\\.*|SET .*;|SELECT pg_catalog\.set_config.*;)\n"
    text = re.sub(settings, "", re.sub(headings, "", dumped, flags=re.MULTILINE), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    main()
