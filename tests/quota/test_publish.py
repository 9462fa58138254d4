"""The ledger's own way in: publishing, with and without a reservation, many at once."""

import asyncio
import contextlib
import os
import random
from uuid import UUID, uuid4

import pytest

from server import ledger
from server.errors import (
    Conflict,
    IdempotencyInProgress,
    NotFound,
    PreconditionFailed,
    QuotaExceeded,
    UserErasing,
)
from server.ledger import Database
from tests.quota.rows import VOLUME, Connection, add_user, drift, new_file, replacement, used

pytestmark = pytest.mark.anyio


async def reserve(db: Database, user_id: str, size: int, upload_id: UUID | None = None, key: str | None = None) -> UUID:
    upload_id = upload_id or uuid4()
    await ledger.open_reservation(
        db, upload_id=upload_id, user_id=user_id, volume_id=VOLUME, reserved_bytes=size, idempotency_key=key, lease_seconds=60
    )
    return upload_id


@pytest.mark.parametrize("reserving", [False, True])
async def test_64_at_once_at_the_quota_minus_one_byte(db: Database, sql: Connection, reserving: bool) -> None:
    await add_user(sql, "ada", 64 * 1000 - 1)

    async def upload() -> bool:
        file = new_file("ada", 1000)
        try:
            if reserving:
                await reserve(db, "ada", 1000, file.id)
            await ledger.publish_file(db, file)
        except QuotaExceeded as refusal:
            assert refusal.limit_bytes == 63_999 and refusal.used_bytes + refusal.needed_bytes > 63_999
            return False
        return True

    assert sorted(await asyncio.gather(*(upload() for _ in range(64)))) == [False] + [True] * 63
    assert await used(sql, "ada") == (63_000, 0, 63)
    assert await drift(sql) == []


async def test_a_held_reservation_is_published_after_the_quota_was_lowered(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    old = await ledger.publish_file(db, new_file("ada", 40))
    new, other = await reserve(db, "ada", 40), await reserve(db, "ada", 20)
    await ledger.set_quota(db, "ada", 0)
    with pytest.raises(QuotaExceeded):
        await ledger.resize_reservation(db, new, 41)
    with pytest.raises(QuotaExceeded):
        await ledger.publish_file(db, new_file("ada", 41, id=new))  # more than it holds
    await ledger.publish_file(db, new_file("ada", 40, id=new))
    await ledger.replace_content(db, user_id="ada", file_id=old.id, expected_generation=1, new=replacement(old.id, 60, 2, upload_id=other))
    assert await used(sql, "ada") == (100, 0, 2)
    assert await drift(sql) == []


async def test_publishing_is_all_or_nothing(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    upload = await reserve(db, "ada", 10, key="k")
    with pytest.raises(IdempotencyInProgress):
        await reserve(db, "ada", 1, key="k")
    with pytest.raises(QuotaExceeded):
        await ledger.publish_file(db, new_file("ada", 101, id=upload))
    assert await used(sql, "ada") == (0, 10, 0)  # the reservation is still there
    await ledger.publish_file(db, new_file("ada", 10, id=upload, idempotency_key="k"))
    for again in (new_file("ada", 10, id=upload), new_file("ada", 10, idempotency_key="k")):
        with pytest.raises(Conflict):
            await ledger.publish_file(db, again)
    with pytest.raises(NotFound):
        await ledger.publish_file(db, new_file("nobody", 1))
    with pytest.raises(NotFound):
        await reserve(db, "nobody", 1)
    assert [row["type"] for row in await sql.fetch("select type from events")] == ["file.created"]
    assert await drift(sql) == []


async def test_an_expired_reservation_gives_no_right_to_publish(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    late, live = await reserve(db, "ada", 60), await reserve(db, "ada", 10)
    await sql.execute("update uploads set expires_at = now() where id = $1", late)
    assert await ledger.release_expired(db) == {late: late}
    assert await ledger.live_uploads(db, [late, live]) == {live}
    await ledger.publish_file(db, new_file("ada", 60))
    with pytest.raises(QuotaExceeded):
        await ledger.publish_file(db, new_file("ada", 60, id=late))
    with pytest.raises(NotFound):
        await ledger.resize_reservation(db, late, 61)
    assert await used(sql, "ada") == (60, 10, 1)


async def test_replacing_charges_the_difference_and_buries_the_old_bytes(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    file = await ledger.publish_file(db, new_file("ada", 40))
    with pytest.raises(QuotaExceeded):
        await ledger.replace_content(db, user_id="ada", file_id=file.id, expected_generation=1, new=replacement(file.id, 101, 2))
    await ledger.replace_content(db, user_id="ada", file_id=file.id, expected_generation=1, new=replacement(file.id, 100, 2))
    with pytest.raises(PreconditionFailed):
        await ledger.replace_content(db, user_id="ada", file_id=file.id, expected_generation=1, new=replacement(file.id, 1, 3))
    with pytest.raises(NotFound):
        await ledger.replace_content(db, user_id="bob", file_id=file.id, expected_generation=2, new=replacement(file.id, 1, 3))
    assert [tombstone.file_path for tombstone in await ledger.pending_tombstones(db, 10)] == [file.file_path]
    assert await used(sql, "ada") == (100, 0, 1)
    assert await drift(sql) == []


async def test_deleting_tells_what_to_unlink_and_nothing_of_others(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", 100)
    await add_user(sql, "bob", 100)
    mine = [await ledger.publish_file(db, new_file("ada", 10)) for _ in range(3)]
    his = await ledger.publish_file(db, new_file("bob", 10))
    deleted = await ledger.delete_files(db, "ada", [mine[0].id, his.id, uuid4(), mine[1].id, mine[0].id])
    assert {(file_id, tombstone.file_path) for file_id, tombstone in deleted} == {(file.id, file.file_path) for file in mine[:2]}
    assert await ledger.delete_files(db, "ada", [mine[0].id]) == []
    await ledger.drop_tombstones(db, [tombstone.id for _, tombstone in deleted])
    assert await ledger.pending_tombstones(db, 10) == []
    assert await used(sql, "ada") == (10, 0, 1) and await used(sql, "bob") == (10, 0, 1)


async def test_an_erased_user_leaves_only_tombstones(db: Database, sql: Connection) -> None:
    await add_user(sql, "ada", None)
    for size in range(5):
        await ledger.publish_file(db, new_file("ada", size, tags=["t"]))
    await reserve(db, "ada", 10)
    assert await ledger.erase_batch(db, "ada", 2) == []  # only of a user whose erasure has begun
    await ledger.begin_erasing(db, "ada")
    for attempt in (ledger.publish_file(db, new_file("ada", 0)), reserve(db, "ada", 0)):
        with pytest.raises(UserErasing):
            await attempt
    with pytest.raises(Conflict):
        await ledger.finish_erasing(db, "ada", _remove_nothing)
    assert await ledger.users_being_erased(db) == ["ada"]
    batches = [len(await ledger.erase_batch(db, "ada", 2)) for _ in range(4)]
    assert batches == [2, 2, 1, 0]
    await ledger.finish_erasing(db, "ada", _remove_nothing)
    await ledger.finish_erasing(db, "ada", _remove_nothing)
    left = [
        row["relname"]
        for row in await sql.fetch("select relname::text from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace")
    ]
    filled = {name for name in left if await sql.fetchval(f"select exists (select from {name})")}
    assert filled == {"audit_log", "quota_rules", "schema_migrations", "tombstones", "volumes"}


async def test_everything_at_once_drifts_by_nothing_and_shows_no_deadlock(db: Database, sql: Connection) -> None:
    """Eight workers in the same three users' files, with statements over many rows and over all users."""
    users = ["a", "b", "c"]
    for user in users:
        await add_user(sql, user, 50_000)
    chance = random.Random(os.environ.get("COFFER_TEST_SEED", "1"))
    published: list[tuple[str, UUID]] = []
    held: list[tuple[str, UUID, int]] = []

    async def step() -> None:
        user, size = chance.choice(users), chance.randrange(3000)
        match chance.randrange(8):
            case 0 | 1:
                published.append((user, (await ledger.publish_file(db, new_file(user, size, tags=["x"]))).id))
            case 2:
                held.append((user, await reserve(db, user, size), size))
            case 3 if held:
                owner, upload, reserved = held.pop(chance.randrange(len(held)))
                published.append((owner, (await ledger.publish_file(db, new_file(owner, reserved, id=upload))).id))
            case 4 if published:
                some = chance.sample(published, min(5, len(published)))
                await ledger.delete_files(db, some[0][0], [file_id for _, file_id in some])
            case 5 if published:
                owner, file_id = chance.choice(published)
                await ledger.replace_content(db, user_id=owner, file_id=file_id, expected_generation=1, new=replacement(file_id, size, 2))
            case 6:
                ids = [file_id for _, file_id in chance.sample(published, min(4, len(published)))]
                await db.write("update user_files set user_id = $1, file_size = file_size + 1 where id = any ($2)", user, ids)
            case _:
                await ledger.renew_reservations(db, [upload for _, upload, _ in held], 60)

    async def worker() -> None:
        for _ in range(60):
            with contextlib.suppress(QuotaExceeded, NotFound, PreconditionFailed):
                await step()

    await asyncio.gather(*(worker() for _ in range(8)))
    assert await drift(sql) == []


async def _remove_nothing() -> None:
    """These users have no bytes."""
