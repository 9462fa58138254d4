"""The audit trail as rows: by whom, in which order, and how they leave."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from server import actor, ledger
from server.actor import Actor, act_as
from server.errors import InvalidRequest, QuotaExceeded
from server.ledger import AuditQuery, AuditRecord, Database, Publisher, statements
from server.ledger import trail as trail_module
from server.ledger.database import SESSION
from server.ledger.trail import compose
from tests.quota.rows import VOLUME, new_file

pytestmark = pytest.mark.anyio

FILE = UUID(int=7)
RECORD = """
insert into audit_log (at, action, actor_kind, actor_id, user_id, file_id, address)
values ($1, $2, 'api_key', $3, $4, $5, '192.0.2.1')
"""


@pytest.fixture
async def users(db: Database) -> None:
    await ledger.add_volume(db, VOLUME, "/nowhere")
    for name in ("ada", "bob", "eve"):
        await ledger.set_quota(db, name, 100 if name == "eve" else None)


async def record(db: Database, at: datetime, **values: Any) -> None:
    values = {"action": "file.deleted", "actor_id": "key", "user_id": "ada", "file_id": None} | values
    await db.write(RECORD, at, values["action"], values["actor_id"], values["user_id"], values["file_id"])


async def walk(db: Database, query: AuditQuery) -> list[AuditRecord]:
    """All pages, one after the other."""
    found: list[AuditRecord] = []
    while True:
        page = await ledger.list_trail(db, query)
        assert len(page.records) <= query.limit
        found += page.records
        if page.next_cursor is None:
            return found
        query = msgspec.structs.replace(query, cursor=page.next_cursor)


# Writing


async def test_files_that_share_a_transaction_are_recorded_each_by_its_own_actor(db: Database, users: None) -> None:
    publisher = Publisher(db)

    async def publish(number: int, user: str) -> UUID:
        act_as(Actor(kind="api_key", id=f"key {number}", user_id=user, address="2001:db8::1", request_id=f"request {number}"))
        return (await publisher.publish(new_file(user, 60))).id

    senders = ["ada", "bob", "ada", "eve", "eve", "bob"]  # the second file of eve's is refused, so all go once more, alone
    outcomes = await asyncio.gather(*(publish(*each) for each in enumerate(senders)), return_exceptions=True)
    assert [type(each) for each in outcomes].count(QuotaExceeded) == 1
    together = await asyncio.gather(*(publish(10 + number, user) for number, user in enumerate(["ada", "bob"] * 3)))
    assert len({row["xmin"] for row in await db.read("select xmin::text from user_files where id = any ($1)", together)}) < len(together)
    expected = {
        each: (f"key {number}", user, f"request {number}", user, "2001:db8::1")
        for number, user, each in [
            *((number, senders[number], each) for number, each in enumerate(outcomes)),
            *((10 + number, ["ada", "bob"][number % 2], each) for number, each in enumerate(together)),
        ]
        if isinstance(each, UUID)
    }
    found = await walk(db, AuditQuery(action="file.created"))
    assert len(found) == len(expected) == 11
    assert {each.file_id: (each.actor_id, each.acting_user_id, each.request_id, each.user_id, each.address) for each in found} == expected


async def test_what_is_rolled_back_is_not_recorded(db: Database, users: None) -> None:
    before = await walk(db, AuditQuery())
    with pytest.raises(QuotaExceeded):
        await ledger.publish_file(db, new_file("eve", 101))
    file = await ledger.publish_file(db, new_file("eve", 100))
    with pytest.raises(asyncpg.PostgresError, match="stop"):
        await db.write(
            f"do $$ begin perform delete_files_v2('eve', array['{file.id}'::uuid], '{actor.actor_json()}'); raise 'stop'; end $$"
        )
    (added,) = [each for each in await walk(db, AuditQuery()) if each not in before]
    assert (added.action, added.file_id, added.actor_kind, added.actor_id) == ("file.created", file.id, "system", None)


# Leases and progress of uploads (when an upload link ends by itself, its record tells beforehand), when keys were used, what is derived
# from files. Where bytes lie (that a user is moved, and has been, is recorded), and what a restore settles before anybody is let in.
UNRECORDED = {
    "wish_for_sheet",
    "resume_move",
    "relabel_uploads",
    "switch_files",
    "switch_resumable_upload",
    "settle_restored",
    "forget_restored_previews",
    "set_tier",
    "note_api_keys_used",
    "unclaim_link",
    "claim_link",
    "release_reservation",
    "release_expired",
    "renew_reservations",
    "resize_reservation",
    "finish_preview",
    "begin_preview",
    "uncount_preview_try",
    "renew_preview",
    "forget_preview",
    "retry_failed_previews",
    "rebuild_previews",
    "create_linked_upload",
    "claim_resumable_upload",
    "renew_resumable_uploads",
    "checkpoint_resumable_upload",
    "end_resumable_upload",
}


async def test_every_statement_that_changes_something_records_it() -> None:
    tables = "(user_files|user_storage|uploads|api_keys|volumes)"
    changing = re.compile(
        rf"(insert into|update|delete from) {tables}\b|(delete_files|trash_files|begin_erasing|open_upload|claim_link)_v\d"
    )
    recording = re.compile(r"insert into audit_log|delete_files_v3|open_upload_v2|(trash_files|begin_erasing)_v1")
    changes = {name for name, sql in statements._statements().items() if changing.search(sql)}
    records = {name for name, sql in statements._statements().items() if recording.search(sql)}
    assert changes - records == UNRECORDED


async def test_a_detail_is_small(db: Database) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await db.write(
            "insert into audit_log (action, actor_kind, detail) values ('a.b', 'cli', jsonb_build_object('a', repeat('x', 9000)))"
        )


# Keeping


async def refused(db: Database, sql: str) -> bool:
    try:
        await db.write(sql)
    except asyncpg.PostgresError as problem:
        assert problem.sqlstate == "CF006", problem
        return True
    return False


async def test_records_stay_as_they_are(db: Database, users: None) -> None:
    now = datetime.now(UTC)
    for days in (50, 40, 31, 29):
        await record(db, now - timedelta(days=days), actor_id=f"{days}")
    before = await walk(db, AuditQuery())
    for sql in (
        "update audit_log set action = 'a.b'",
        "update audit_log set address = null",
        "update audit_log set address = null where actor_id = '50'",
        "update audit_log set user_id = null",
        "delete from audit_log",
        "delete from audit_log where actor_id = '29'",  # too young
        "delete from audit_log where actor_id = '40'",  # there is an older one
        "delete from audit_log where actor_id in ('50', '31')",
        "truncate audit_log",
    ):
        assert await refused(db, sql), sql
        assert await walk(db, AuditQuery()) == before, sql
    assert not await refused(db, "delete from audit_log where actor_id in ('50', '40')")
    assert [each.actor_id for each in await walk(db, AuditQuery())] == [each.actor_id for each in before[:-2]]


async def test_records_leave_by_age_oldest_first(db: Database) -> None:
    now = datetime.now(UTC)
    for number in range(10):
        await record(db, now - timedelta(days=100 - number), actor_id=f"{number}")
    await record(db, now - timedelta(days=49), actor_id="young")
    assert await ledger.purge_trail(db, 200, 4) == 0
    assert await ledger.purge_trail(db, 50, 4) == 4
    assert [each.actor_id for each in await walk(db, AuditQuery())] == ["young", "9", "8", "7", "6", "5", "4"]
    assert await ledger.purge_trail(db, 50, 100) == 6
    assert await ledger.purge_trail(db, 50, 100) == 0
    assert [each.actor_id for each in await walk(db, AuditQuery())] == ["young"]


async def test_one_process_purges_at_a_time(db: Database) -> None:
    await record(db, datetime.now(UTC) - timedelta(days=100))
    async with db.transaction() as run:
        await run("select pg_advisory_xact_lock($1)", trail_module._PURGE_LOCK)
        assert await ledger.purge_trail(db, 50, 100) == 0
    assert await ledger.purge_trail(db, 50, 100) == 1


async def test_a_role_of_its_own_for_the_server_cannot_lift_the_rule(database_url: str) -> None:
    """As the README has it: this much a server needs, and no more."""
    connection = await asyncpg.connect(database_url)
    role = f"coffer_test_{uuid4().hex}"
    try:
        transaction = connection.transaction()  # a role belongs to the whole cluster, so this one is never committed
        await transaction.start()
        await connection.execute(f"create role {role}; grant select, insert, delete, update (address) on audit_log to {role}")
        await connection.execute(f"set local role {role}")
        await connection.execute(RECORD, datetime.now(UTC) - timedelta(days=100), "file.deleted", "key", "ada", None)
        await connection.execute(RECORD, datetime.now(UTC), "file.deleted", "key", "ada", None)
        assert await connection.fetchval(trail_module._PURGE, 50, 100, 1) == 1
        for sql in (
            "alter table audit_log disable trigger all",
            "drop trigger keep_deleted on audit_log",
            "set local session_replication_role = replica",
            "update audit_log set action = 'a.b'",
            "truncate audit_log",
            "create or replace function keep_audit_log_v1() returns trigger language plpgsql as 'begin return null; end'",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with connection.transaction():
                    await connection.execute(sql)
        await transaction.rollback()
    finally:
        await connection.close()


async def test_an_erased_user_leaves_ids_and_no_address(db: Database, users: None) -> None:
    act_as(Actor(kind="api_key", id="key", address="192.0.2.1"))
    for user in ("ada", "bob"):
        await ledger.publish_file(db, new_file(user, 1))
    assert await refused(db, "update audit_log set address = null where user_id = 'ada'")
    await ledger.begin_erasing(db, "ada")
    await ledger.begin_erasing(db, "ada")  # recorded once
    assert await refused(db, "update audit_log set address = null where user_id = 'bob'")
    assert await refused(db, "update audit_log set address = null, request_id = 'x' where user_id = 'ada'")
    while await ledger.erase_batch(db, "ada"):
        pass

    async def remove_bytes() -> None:
        pass

    await ledger.finish_erasing(db, "ada", remove_bytes)
    told = [(each.action, each.address) for each in reversed(await walk(db, AuditQuery(user_id="ada")))]
    gone = ["user.created", "file.created", "user.erasing", "file.deleted"]
    assert told == [*((action, None) for action in gone), ("user.erased", "192.0.2.1")]
    assert [each.address for each in await walk(db, AuditQuery(user_id="bob", action="file.created"))] == ["192.0.2.1"]


# Listing

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROWS = 3_000
FILL = """
insert into audit_log (at, action, actor_kind, actor_id, user_id, file_id)
select $1::timestamptz + n / 7 * interval '1 second', (array['file.created', 'file.deleted'])[1 + n % 2], 'api_key',
       case when n % 500 = 250 then 'rare' else 'common' end, case when n % 500 = 100 then 'rare' else 'common' end,
       case when n % 3 = 0 then $2::uuid end
  from generate_series(1, $3::integer) n
"""
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "user, rare": {"user_id": "rare"},
    "user, common": {"user_id": "common"},
    "actor, rare": {"actor_id": "rare"},
    "file": {"file_id": FILE},
    "file unknown": {"file_id": uuid4()},
    "action": {"action": "file.deleted"},
    "since": {"since": NOON + timedelta(seconds=400)},
    "until": {"until": NOON + timedelta(seconds=20)},
    "all": {
        "user_id": "common",
        "actor_id": "common",
        "file_id": FILE,
        "action": "file.deleted",
        "since": NOON + timedelta(seconds=9),
        "until": NOON + timedelta(seconds=90),
    },
}


def matches(each: AuditRecord, wanted: dict[str, Any]) -> bool:
    same = all(getattr(each, name) == value for name, value in wanted.items() if name not in ("since", "until"))
    return same and wanted.get("since", each.at) <= each.at and (each.at < wanted["until"] if "until" in wanted else True)


async def test_filters_and_pages(db: Database) -> None:
    await db.write(FILL, NOON, FILE, ROWS)
    everything = await walk(db, AuditQuery(limit=500))
    assert len(everything) == ROWS and everything == sorted(everything, key=lambda each: (each.at, each.id), reverse=True)
    for name, wanted in FILTERS.items():
        expected = [each for each in everything if matches(each, wanted)]
        for limit in (7, 1_000):
            assert await walk(db, AuditQuery(limit=limit, **wanted)) == expected, name


async def test_a_page_never_reads_more_than_it_may(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await db.write(FILL, NOON, FILE, ROWS)
    monkeypatch.setattr(trail_module, "READ_AT_MOST", 100)
    page = await ledger.list_trail(db, AuditQuery(user_id="common", actor_id="rare"))
    assert page.next_cursor is not None and len(page.records) <= 1
    assert len(await walk(db, AuditQuery(user_id="common", actor_id="rare"))) == ROWS // 500


async def test_every_filter_reads_its_index_in_order(db: Database, database_url: str) -> None:
    await db.write(FILL, NOON, FILE, ROWS)
    indexes = {"user": "audit_log_by_user", "actor": "audit_log_by_actor", "file": "audit_log_by_file", "all": "audit_log_by_file"}
    connection = await asyncpg.connect(database_url, server_settings=SESSION)
    try:
        for name, wanted in FILTERS.items():
            for after in (None, (NOON + timedelta(seconds=50), 5)):
                sql, values = compose(AuditQuery(**wanted), after, 100)
                statement = await connection.prepare(f"explain {sql}")
                plan = "\n".join(row[0] for row in await statement.fetch(*values))
                index = indexes.get(re.split("[, ]", name)[0], "audit_log_pkey")
                assert f"Index Scan Backward using {index} on audit_log" in plan, f"{name}\n{plan}"
                assert "Sort" not in plan and "Seq Scan" not in plan, f"{name}\n{plan}"
    finally:
        await connection.close()


async def test_a_made_up_cursor_is_refused(db: Database) -> None:
    for cursor in ("", "x", "W10", "WyIyMDI2LTAxLTAxVDEyOjAwOjAwIiwxXQ", "é", "WyIyMDI2LTAxLTAxVDEyOjAwOjAwWiIsIjEiXQ"):
        with pytest.raises(InvalidRequest, match="cursor"):
            await ledger.list_trail(db, AuditQuery(cursor=cursor))
