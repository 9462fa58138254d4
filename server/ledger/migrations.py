"""Applies `sql/migrations/NNNN_verb_object.sql`, forward only.

Many processes may start at once: a session advisory lock lets one work while the others wait, and each reads what was
applied after it holds the lock. A file and its record are one transaction, so a kill in mid-file leaves the database as
before that file. A file whose bytes differ from the recorded SHA-256 is refused: released migrations are frozen.
"""

import hashlib
from pathlib import Path

import asyncpg

from server.errors import DatabaseUnavailable
from server.ledger.database import Database
from server.ledger.statements import SQL_DIRECTORY, statement

MIGRATIONS = SQL_DIRECTORY / "migrations"

_ADVISORY_LOCK = 0x636F66666572
"""`coffer` in ASCII. Other programs on the same database must not use this key."""

# A migration that waits for a lock makes everyone queue behind it, and one that runs long stops the uploads it locks out.
# Failing after seconds is better than either: nothing has changed then, and starting it again is safe.
_LIMITS = "set local lock_timeout = '4s'; set local statement_timeout = '5s'"


class MigrationError(RuntimeError):
    """The migrations on disk and in the database do not belong together. The message says what to do."""


async def migrate(database_url: str, directory: Path = MIGRATIONS) -> list[str]:
    """Applies what is pending and returns the names. Raises `DatabaseUnavailable`, and `MigrationError`, also when a file fails."""
    try:
        connection = await asyncpg.connect(database_url, timeout=10, server_settings={"application_name": "coffer migrate"})
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as problem:
        raise DatabaseUnavailable from problem
    try:
        await connection.execute("select pg_advisory_lock($1)", _ADVISORY_LOCK)
        await connection.execute(statement("create_schema_migrations"))
        recorded = {row["name"]: row["sha256"] for row in await connection.fetch(statement("applied_migrations"))}
        names = _pending(recorded, directory)
        for name in names:
            content = (directory / f"{name}.sql").read_bytes()
            try:
                async with connection.transaction():
                    await connection.execute(_LIMITS)
                    await connection.execute(content.decode())
                    await connection.execute(statement("record_migration"), name, hashlib.sha256(content).digest())
            except asyncpg.PostgresError as problem:
                raise MigrationError(f"{name} failed and has changed nothing: {problem}") from problem
        return names
    finally:
        await connection.close()


async def pending(db: Database, directory: Path = MIGRATIONS) -> list[str]:
    """What `migrate` would apply. Raises `MigrationError` and `DatabaseUnavailable`."""
    if not (await db.read(statement("has_schema_migrations")))[0]["present"]:
        return _pending({}, directory)
    return _pending({row["name"]: row["sha256"] for row in await db.read(statement("applied_migrations"))}, directory)


def _pending(recorded: dict[str, bytes], directory: Path) -> list[str]:
    """Names on disk that are not recorded, in order. Names recorded but not on disk come from a newer release and are left alone."""
    names = []
    for path in sorted(directory.glob("[0-9][0-9][0-9][0-9]_*.sql")):
        if path.stem not in recorded:
            names.append(path.stem)
        elif recorded[path.stem] != hashlib.sha256(path.read_bytes()).digest():
            raise MigrationError(f"{path.name} was edited after it was applied: restore its text and put the change into a new migration")
    return names
