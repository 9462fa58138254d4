"""What operational tools ask for each page reads an index from where the last page ended, by the plan that their connections keep."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from server.ledger.database import SESSION
from server.ledger.files import FILE_COLUMNS
from server.ledger.statements import statement
from tests.ledger.test_listing import literal
from tests.quota.rows import INSERT_FILE, SHA256, VOLUME, add_user, add_volume, path_of

pytestmark = pytest.mark.anyio

_ID = UUID("00000000-0000-7000-8000-000000000001")
_TEXT = str(_ID)
_NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
_PREVIEW = """
insert into previews (file_id, variant, user_id, file_name, mime_type, size_bytes) values ($1, '320', 'ada', '320.webp', 'image/webp', 7)
"""
_TRASH = """
insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, deleted_at)
select id, 'user-' || n, 'a', 'image', 'image/png', 1, $1, $2, '/' || id || '.1.', now()
  from (select gen_random_uuid() as id, n from generate_series(1, 20) n, generate_series(1, 5)) made
"""
_JOB = """
insert into generation_jobs (id, user_id, media_types, output_count, expires_at, state, finished_at)
values ($1, 'ada', '{image}', 1, now(), 'failed', now())
"""
_LARGE = ("user_files", "previews", "tombstones", "events", "generation_jobs")


@pytest.fixture
async def large(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """As a server's connection, to tables of which PostgreSQL believes that they have a million rows on their one page."""
    connection = await asyncpg.connect(database_url, server_settings=SESSION)
    try:
        await fill(connection)
        yield connection
    finally:
        await connection.close()


async def fill(connection: asyncpg.Connection) -> None:
    await add_volume(connection)
    await add_user(connection, "ada", None)
    await connection.execute(INSERT_FILE, _ID, "ada", 1, SHA256, VOLUME, path_of(_ID))
    await connection.execute(_PREVIEW, _ID)
    await connection.execute("insert into user_storage (user_id, max_bytes) select 'user-' || n, null from generate_series(1, 20) n")
    await connection.execute(_TRASH, SHA256, VOLUME)
    await connection.execute("insert into tombstones (volume_id, file_path, file_id, generation) select id, 'x', $1, 1 from volumes", _ID)
    await connection.execute("insert into events (user_id, type, payload) values ('ada', 'file.created', '{}')")
    await connection.execute(_JOB, _ID)
    await connection.execute("analyze")
    await connection.execute(
        "update pg_class set relpages = 1, reltuples = 1000000 where relname = any ($1) or oid in"
        " (select indexrelid from pg_index join pg_class c on c.oid = indrelid where c.relname = any ($1))",
        _LARGE,
    )


async def generic_plan(connection: asyncpg.Connection, sql: str, arguments: tuple[Any, ...]) -> str:
    """`explain` of the statement itself would see the arguments, and leave out `$1 is null or` and the like."""
    await connection.execute(f"prepare page as {sql}")
    rows = await connection.fetch(f"explain execute page ({', '.join(_literal(each) for each in arguments)})")
    return "\n".join(row[0] for row in rows)


def _literal(value: object) -> str:
    return literal([str(each) for each in value] if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "arguments", "index", "position"),
    [
        ("page_of_paths", (_ID, 10_000), "user_files_pkey", "id >"),
        ("known_paths", (_ID, _TEXT), "user_files_pkey", "id = ANY"),
        ("get_stored", ([_ID],), "user_files_pkey", "id = ANY"),
        ("unknown_previews", (_ID, [_TEXT], [_ID], [_TEXT]), "previews_pkey", "file_id ="),
        ("page_of_previews", (_ID, "320", 10_000), "previews_pkey", "ROW(file_id, variant) >"),
        ("page_of_suspects", (_ID, "", 1_000, None), "audit_suspects_pkey", "file_path >"),
        ("page_of_counters", ("", 500), "previews_pkey", "file_id ="),
        ("page_to_scrub", (_ID, _ID, 1_000), "user_files_pkey", "id >"),
        ("page_of_damaged", (_ID, 1_000), "user_files_damaged", "id >"),
        ("failed_previews", (_ID, 100), "user_files_preview_failed", "id >"),
        ("rebuild_previews", (_ID, None, 1_000, ["image"]), "user_files_pkey", "id >"),
        ("missing_in_listing", (_ID, 1_000), "user_files_pkey", "id >"),
        ("lock_files_to_move", (_ID, [_ID], [1]), "user_files_pkey", "id = ANY"),
        ("page_to_move", ("ada", _NOON, _ID, 1_000), "user_files_created", "ROW(upload_date, id) >"),
        ("page_of_ruled", (_ID, 10_000, True), "user_files_pkey", "id >"),
        ("list_trash", ("ada", None, None, 50), "user_files_trash", "ROW(deleted_at, id) <"),
        ("list_trash_of_kinds", ("ada", None, None, 50, ["image"]), "user_files_trash_kind", "ROW(deleted_at, id) <"),
        ("page_of_old_trash", (30, None, None, 10_000), "user_files_trash_age", "ROW(deleted_at, id) >"),
        ("page_of_user_files", ("ada", None, None, _NOON, 200), "user_files_created", "ROW(upload_date, id) >"),
        ("saved_files", ("ada", _ID, 1_000), "user_files_pkey", "id >"),
        ("purge_events", (90, 1_000), "events_pkey", ""),
        ("purge_jobs", (90, 1_000), "generation_jobs_ended", "finished_at <"),
        ("purge_jobs", (90, 1_000), "generation_jobs_pkey", "id = ANY"),
        ("purge_jobs", (90, 1_000), "webhook_deliveries_dead", "endpoint_id = ANY"),
    ],
)
async def test_a_page_begins_where_the_last_one_ended(
    large: asyncpg.Connection, name: str, arguments: tuple[Any, ...], index: str, position: str
) -> None:
    """The position is a condition on the index, not one on what was read from its beginning on, and nothing reads a whole index besides."""
    if name == "missing_in_listing":
        await large.execute(statement("create_listing"))
    sql = statement(name, file=FILE_COLUMNS) if "{file}" in statement(name, file="{file}") else statement(name)
    plan = await generic_plan(large, sql, arguments)
    lines = plan.splitlines()
    scans = [number for number, line in enumerate(lines) if re.search(r"Index (Only )?Scan .*on (user_files|previews|tombstones)\b", line)]
    unbounded = [lines[number] for number in scans if "Index Cond" not in lines[number + 1]]
    assert not unbounded and not re.search(r"(Seq|Bitmap Heap) Scan on (user_files|previews|tombstones)", plan), plan
    conditions = [lines[number + 1] for number, line in enumerate(lines) if f"using {index} on" in line]
    assert conditions and (not position or any(position in line for line in conditions)), plan


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("page_of_previews", (_ID, "320", 10_000)),
        ("page_of_counters", ("", 500)),
        ("page_of_ruled", (_ID, 10_000, True)),
        ("users_to_move", (_ID, "", 500)),
        ("pending_tombstones", (1_000,)),
        ("old_tombstones", (600.0, 1_000)),
    ],
)
async def test_however_it_joins_nothing_is_read_to_its_end(large: asyncpg.Connection, name: str, arguments: tuple[Any, ...]) -> None:
    """By merging or hashing, where the statement leaves that open: in some stores PostgreSQL finds it cheaper than to look up."""
    await large.execute("set enable_nestloop = off; set enable_sort = on")
    plan = await generic_plan(large, statement(name), arguments)
    lines = plan.splitlines()
    scans = [number for number, line in enumerate(lines) if re.search(r"Scan .*on (user_files|previews)\b", line)]
    assert scans and not [lines[number] for number in scans if "Index Cond" not in lines[number + 1]], plan


async def test_what_goes_to_the_trash_is_looked_up(large: asyncpg.Connection) -> None:
    """By a statement inside of a function, so by the rows that it reads: there are a hundred others."""
    transaction = large.transaction()
    await transaction.start()
    actor = '{"kind": "cli", "id": "test"}'
    moved = await large.fetch(statement("trash_files"), "ada", VOLUME, [_ID], [1], [2], [path_of(_ID, 2)], None, actor)
    read = await large.fetchval("select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = 'user_files'")
    await transaction.rollback()
    assert {row["file_id"] for row in moved} == {_ID}
    assert read < 20
