"""Small files that share a transaction: each as if it were alone."""

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from server import ledger
from server.errors import CommitUnknown, InvalidRequest, NotFound, QuotaExceeded, UserErasing
from server.ledger import Database, Publisher, database
from server.ledger.publisher import MOST_TOGETHER
from server.settings import Settings
from tests.ledger.races import waiting_for_lock
from tests.quota.rows import Connection, add_user, drift, new_file, used

pytestmark = pytest.mark.anyio


async def transactions(sql: Connection) -> int:
    count: int = await sql.fetchval("select count(distinct xmin::text) from user_files")
    return count


async def test_what_comes_at_once_is_committed_at_once(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", None)
    await add_user(sql, "bob", None)
    publisher = Publisher(db)
    news = [
        new_file(
            user,
            size,
            file_name=f"{user} {size}.png",
            package_name="holiday" if size % 2 else None,
            tags=["sea", "sun, sand", 'a "b"'][: size % 4],
            metadata={"size": size, "deep": [None, {"é": "x"}]},
        )
        for user in ("ada", "bob")
        for size in range(MOST_TOGETHER)
    ]
    files = await asyncio.gather(*map(publisher.publish, news))
    assert await transactions(sql) == 2  # twice the most that go together
    assert [file.id for file in files] == [new.id for new in news]
    for file in files:
        assert await ledger.get_file(db, file.user_id, file.id) == file
    events = await sql.fetch("select file_id, type from events")
    assert Counter((row["file_id"], row["type"]) for row in events) == Counter((new.id, "file.created") for new in news)
    total = sum(range(MOST_TOGETHER))
    assert await used(sql, "ada") == await used(sql, "bob") == (total, 0, MOST_TOGETHER)
    assert await drift(sql) == []


async def test_one_file_alone_needs_one_transaction(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", 10)
    file = await Publisher(db).publish(new_file("ada", 10))
    assert await ledger.get_file(db, "ada", file.id) == file


async def test_the_refusal_of_one_is_not_that_of_another(db: Database, sql: Connection) -> None:
    for user, max_bytes in (("ada", 99), ("bob", None), ("eve", None)):
        await add_user(sql, user, max_bytes)
    await sql.execute("update user_storage set erasing_at = now() where user_id = 'eve'")
    since = (await ledger.get_user(db, "bob")).created_at
    news = {
        "fits": new_file("bob", 100, user_since=since),
        "fits too": new_file("ada", 99),
        "too large": new_file("ada", 100),
        "nobody": new_file("nobody", 1),
        "another bob": new_file("bob", 1, user_since=datetime(2020, 1, 1, tzinfo=UTC)),
        "being erased": new_file("eve", 1),
        "half a surrogate pair": new_file("bob", 1, metadata={"text": "\ud800"}),
    }
    publisher = Publisher(db)
    outcomes = dict(zip(news, await asyncio.gather(*map(publisher.publish, news.values()), return_exceptions=True), strict=True))
    assert {name: type(outcome) for name, outcome in outcomes.items()} == {
        "fits": ledger.File,
        "fits too": ledger.File,
        "too large": QuotaExceeded,
        "nobody": NotFound,
        "another bob": NotFound,
        "being erased": UserErasing,
        "half a surrogate pair": InvalidRequest,
    }
    assert await used(sql, "ada") == (99, 0, 1) and await used(sql, "bob") == (100, 0, 1)
    assert await drift(sql) == []


async def test_a_file_of_an_earlier_user_of_the_same_id_is_refused(db: Database, sql: Connection) -> None:
    await add_user(sql, "bob", None)
    with pytest.raises(NotFound):
        await Publisher(db).publish(new_file("bob", 1, user_since=datetime(2020, 1, 1, tzinfo=UTC)))
    assert await used(sql, "bob") == (0, 0, 0)


async def test_those_with_a_locked_user_are_left_out_and_the_others_do_not_wait(db: Database, sql: Connection) -> None:
    for user in ("ada", "bob"):
        await add_user(sql, user, None)
    publisher = Publisher(db)
    async with sql.transaction():
        await sql.execute("update user_storage set tier = 'held' where user_id = 'ada'")
        waiting = asyncio.ensure_future(publisher.publish(new_file("ada", 1)))
        await asyncio.gather(*(publisher.publish(new_file("bob", 1)) for _ in range(3)))
        await waiting_for_lock(sql)
        await publisher.publish(new_file("bob", 1))
        assert not waiting.done()
    assert (await waiting).user_id == "ada"
    assert await drift(sql) == []


async def test_64_at_once_at_the_quota_minus_one_byte(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", 64 * 1000 - 1)
    publishers = [Publisher(db), Publisher(db)]  # as two processes have
    outcomes = await asyncio.gather(*(publishers[i % 2].publish(new_file("ada", 1000)) for i in range(64)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["File"] * 63 + ["QuotaExceeded"]
    assert await used(sql, "ada") == (63_000, 0, 63)
    assert await drift(sql) == []


async def test_two_processes_in_each_others_way_meet_no_deadlock(db: Database, sql: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "TRIES", 1)  # a deadlock would be an error, not a second try
    users = ["a", "b", "c", "d"]
    for user in users:
        await add_user(sql, user, None)
    chance = random.Random(1)
    publishers = [Publisher(db), Publisher(db)]

    async def one(publisher: Publisher) -> None:
        for _ in range(25):
            user = chance.choice(users)
            file = await publisher.publish(new_file(user, 1, file_type=chance.choice(["image", "video"])))
            if chance.random() < 0.3:
                await ledger.delete_files(db, user, [file.id])

    await asyncio.gather(*(one(publishers[i % 2]) for i in range(16)))
    assert await drift(sql) == []


async def test_a_lost_connection_is_unknown_to_all_who_shared_it(sql: Connection, settings: Settings) -> None:
    db = Database(settings)
    await db.open()
    try:
        await add_user(sql, "ada", None)
        publisher = Publisher(db)
        transaction = sql.transaction()
        await transaction.start()
        await sql.execute("lock table events")
        sharing = asyncio.gather(*(publisher.publish(new_file("ada", 1)) for _ in range(3)), return_exceptions=True)
        await waiting_for_lock(sql)
        await sql.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'coffer'")
        problems = await sharing
        assert [type(problem) for problem in problems] == [CommitUnknown] * 3
        await transaction.rollback()
        await publisher.publish(new_file("ada", 1))  # goes on
        assert await used(sql, "ada") == (1, 0, 1)
    finally:
        await db.close()


async def test_whoever_is_cancelled_takes_nobody_along(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", None)
    publisher = Publisher(db)
    async with sql.transaction():
        await sql.execute("lock table events")
        calls = [asyncio.ensure_future(publisher.publish(new_file("ada", 1, id=uuid4()))) for _ in range(3)]
        await waiting_for_lock(sql)
        calls[0].cancel()
        late = asyncio.ensure_future(publisher.publish(new_file("ada", 1)))
    outcomes = await asyncio.gather(*calls, late, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == ["CancelledError", "File", "File", "File"]
    assert await used(sql, "ada") == (4, 0, 4)  # the cancelled one's row came with the others'


async def test_what_fails_after_the_commit_is_unknown(db: Database, sql: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published once more, alone, it could be refused then, and the bytes of a row be removed."""
    await add_user(sql, "ada", None)
    write = db.write

    async def failing(*arguments: Any, **options: Any) -> list[Any]:
        await write(*arguments, **options)
        raise RuntimeError("later")

    monkeypatch.setattr(db, "write", failing)
    with pytest.raises(CommitUnknown):
        await Publisher(db).publish(new_file("ada", 10))
    assert await used(sql, "ada") == (10, 0, 1)
