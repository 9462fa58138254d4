"""Previews against the quota, where `quota_rules` says so: they are never refused, and leave less room to everything else."""

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from server import ledger
from server.errors import QuotaExceeded
from server.ledger import Database, Publisher
from tests.ledger.races import waiting_for_lock
from tests.quota.conftest import Connect
from tests.quota.rows import VOLUME, Connection, add_user, insert_file, insert_upload, new_file, used
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

ADD_PREVIEW = """
insert into previews (file_id, variant, user_id, file_name, mime_type, size_bytes) values ($1, $2, $3, '320.webp', 'image/webp', $4)
"""


async def add_preview(sql: Connection, user_id: str, file_id: UUID, size: int, variant: str = "320") -> None:
    await sql.execute(ADD_PREVIEW, file_id, variant, user_id, size)


@pytest.fixture
async def ada(db: Database, sql: Connection) -> UUID:
    """A file of a user with 100 bytes: 40 are in use, and 35 by previews of it, which count."""
    await add_user(sql, "ada", 100)
    file_id = await insert_file(sql, "ada", 40)
    await add_preview(sql, "ada", file_id, 35)
    await ledger.set_quota_rules(db, counts_previews=True)
    return file_id


@pytest.mark.anyio
async def test_what_grows_needs_room_beside_previews(db: Database, sql: Connection, ada: UUID) -> None:
    grow_file = "update user_files set file_size = file_size + $2 where id = $1"
    upload_id = await insert_upload(sql, "ada", 5)
    ways: list[Callable[[int], Awaitable[object]]] = [
        lambda size: insert_file(sql, "ada", size),
        lambda size: insert_upload(sql, "ada", size),
        lambda size: sql.execute(grow_file, ada, size),
        lambda size: ledger.publish_file(db, new_file("ada", size)),
        lambda size: Publisher(db).publish(new_file("ada", size)),
        lambda size: ledger.resize_reservation(db, upload_id, 5 + size),
    ]
    for way in ways:
        with pytest.raises((asyncpg.PostgresError, QuotaExceeded), match="quota") as refused:
            await way(21)
        if isinstance(refused.value, QuotaExceeded):
            assert (refused.value.used_bytes, refused.value.limit_bytes, refused.value.needed_bytes) == (80, 100, 21)
    for way in ways:
        await way(2)
    assert sum((await used(sql, "ada"))[:2]) == 45 + 12


@pytest.mark.anyio
async def test_previews_themselves_are_never_refused_and_what_is_held_is_published(db: Database, sql: Connection, ada: UUID) -> None:
    upload_id = uuid4()
    await ledger.open_reservation(
        db, upload_id=upload_id, user_id="ada", volume_id=VOLUME, reserved_bytes=20, idempotency_key=None, lease_seconds=60
    )
    await add_preview(sql, "ada", ada, 1_000, "640")
    await ledger.publish_file(db, new_file("ada", 20, id=upload_id))
    with pytest.raises(QuotaExceeded):
        await ledger.publish_file(db, new_file("ada", 1))
    await sql.execute("update user_files set file_size = file_size - 10 where id = $1", ada)  # what shrinks needs no room
    await sql.execute("delete from user_files where id = $1", ada)
    await ledger.publish_file(db, new_file("ada", 80))
    assert await used(sql, "ada") == (100, 0, 2)


@pytest.mark.anyio
async def test_they_count_only_where_the_rule_says_so_and_against_a_limit(db: Database, sql: Connection, ada: UUID) -> None:
    await ledger.set_quota_rules(db, counts_previews=False)
    await insert_file(sql, "ada", 60)
    await ledger.set_quota_rules(db, counts_previews=True)
    await sql.execute("update user_storage set max_bytes = null")
    await insert_file(sql, "ada", 10_000)


@pytest.mark.anyio
async def test_there_is_one_rule_and_it_comes_back(db: Database, sql: Connection, ada: UUID) -> None:
    for values in ("(false, true)", "(true, true)", "(false, false)", "(false, null)", "(null, true)"):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await sql.execute(f"insert into quota_rules (counts_previews, is_only_row) values {values}")
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await sql.execute("update quota_rules set is_only_row = false")
    await ledger.set_quota_rules(db, counts_previews=False)
    await sql.execute("delete from quota_rules")
    with pytest.raises(QuotaExceeded):  # in doubt they count
        await ledger.publish_file(db, new_file("ada", 60))
    for counts in (False, True, True, False):
        await ledger.set_quota_rules(db, counts_previews=counts)
        assert [row[0] for row in await sql.fetch("select counts_previews from quota_rules")] == [counts]
    await ledger.publish_file(db, new_file("ada", 60))


@pytest.mark.anyio
@pytest.mark.parametrize("commits", [True, False])
async def test_an_upload_waits_for_a_preview_that_is_being_counted(connect: Connect, sql: Connection, ada: UUID, commits: bool) -> None:
    one, two = await connect(), await connect()
    transaction = one.transaction()
    await transaction.start()
    await add_preview(one, "ada", ada, 10, "640")
    task = asyncio.ensure_future(insert_upload(two, "ada", 20))
    await waiting_for_lock(one)
    if commits:
        await transaction.commit()
        with pytest.raises(asyncpg.PostgresError, match="quota"):
            await task
    else:
        await transaction.rollback()
        await task


@pytest.mark.anyio
async def test_many_at_once_never_take_more_than_there_is(db: Database, sql: Connection, ada: UUID) -> None:
    done = await asyncio.gather(*(ledger.publish_file(db, new_file("ada", 4)) for _ in range(16)), return_exceptions=True)
    assert sum(isinstance(each, QuotaExceeded) for each in done) == 10  # 25 bytes are left
    assert await used(sql, "ada") == (64, 0, 7)


def test_the_setting_is_the_rule_and_usage_tells_the_truth(start_server: ServerFactory, database_url: str) -> None:
    server = start_server(COFFER_PREVIEWS_IN_QUOTA="true")
    server.set_quota("ada", 10_000)
    with server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=image(4_000), params={"name": "a.png"}).json()["id"]
        execute(database_url, ADD_PREVIEW, UUID(file_id), "320", "ada", 3_000)
        usage = client.get("/api/storage/usage").json()
        assert {name: usage[name] for name in ("used_bytes", "preview_bytes", "available_bytes", "percent")} == {
            "used_bytes": 4_000,
            "preview_bytes": 3_000,
            "available_bytes": 3_000,
            "percent": 70.0,
        }
        refused = upload(client, 3_001)
        assert (refused.status_code, refused.json()["code"], refused.json()["used_bytes"]) == (413, "quota_exceeded", 7_000)
        assert upload(client, 3_000).status_code == 201
    server.stop()
    start_other(start_server, server)


def upload(client: httpx.Client, size: int) -> httpx.Response:
    return client.post("/api/files/upload", content=image(size, 1), params={"name": "a.png"})


def start_other(start_server: ServerFactory, before: RunningServer) -> None:
    """Without the setting, on the same database."""
    assert execute(before.database_url, "select counts_previews from quota_rules")[0][0] is True
    server = start_server(database_url=before.database_url)
    until(lambda: execute(server.database_url, "select counts_previews from quota_rules")[0][0] is False)
    with server.client("ada") as client:
        usage = client.get("/api/storage/usage").json()
        assert (usage["available_bytes"], usage["percent"], usage["preview_bytes"]) == (3_000, 70.0, 3_000)
        assert upload(client, 3_000).status_code == 201
