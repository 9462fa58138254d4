"""Two connections at each trigger: the second waits for the first, and is admitted or refused for what the first then did."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

import asyncpg
import pytest

from tests.ledger.races import waiting_for_lock
from tests.quota.conftest import Connect
from tests.quota.rows import Connection, add_user, drift, insert_file, insert_upload, used

pytestmark = pytest.mark.anyio


@dataclass
class Ada:
    """A user with files and uploads to change; 30 bytes fit, and no more. Bob has room, and files to give."""

    id: str
    bob: str
    grown_file: UUID
    grown_upload: UUID
    spare_file: UUID
    given_file: UUID
    spare_upload: UUID
    shrunk_upload: UUID
    bobs: list[UUID]


async def new_ada(sql: Connection, number: int, room: int) -> Ada:
    ada, bob = f"ada {number}", f"bob {number}"
    await add_user(sql, ada, 150 + room)
    await add_user(sql, bob, 1000)
    return Ada(
        ada,
        bob,
        grown_file=await insert_file(sql, ada, 10),
        grown_upload=await insert_upload(sql, ada, 20),
        spare_file=await insert_file(sql, ada, 30),
        given_file=await insert_file(sql, ada, 30),
        spare_upload=await insert_upload(sql, ada, 30),
        shrunk_upload=await insert_upload(sql, ada, 30),
        bobs=[await insert_file(sql, bob, 30), await insert_file(sql, bob, 30)],
    )


Change = Callable[[Connection, Ada], Awaitable[object]]

# Each needs 30 bytes.
TAKES: dict[str, Change] = {
    "insert": lambda sql, ada: insert_file(sql, ada.id, 30),
    "reserve": lambda sql, ada: insert_upload(sql, ada.id, 30),
    "grow a file": lambda sql, ada: sql.execute("update user_files set file_size = file_size + 30 where id = $1", ada.grown_file),
    "grow an upload": lambda sql, ada: sql.execute(
        "update uploads set reserved_bytes = reserved_bytes + 30 where id = $1", ada.grown_upload
    ),
    "receive a file": lambda sql, ada: sql.execute("update user_files set user_id = $1 where id = $2", ada.id, ada.bobs.pop()),
}
# Each gives 30 bytes back.
GIVES: dict[str, Change] = {
    "delete": lambda sql, ada: sql.execute("delete from user_files where id = $1", ada.spare_file),
    "release": lambda sql, ada: sql.execute("delete from uploads where id = $1", ada.spare_upload),
    "shrink a file": lambda sql, ada: sql.execute("update user_files set file_size = 0 where id = $1", ada.spare_file),
    "shrink an upload": lambda sql, ada: sql.execute("update uploads set reserved_bytes = 0 where id = $1", ada.shrunk_upload),
    "give a file": lambda sql, ada: sql.execute("update user_files set user_id = $1 where id = $2", ada.bob, ada.given_file),
}


async def second_succeeds(connect: Connect, ada: Ada, first: Change, second: Change, *, commits: bool) -> bool:
    """Runs `second` while `first` is neither committed nor rolled back, and tells whether it was admitted in the end."""
    one, two = await connect(), await connect()
    transaction = one.transaction()
    await transaction.start()
    await first(one, ada)
    task = asyncio.ensure_future(second(two, ada))
    await waiting_for_lock(one)
    await (transaction.commit() if commits else transaction.rollback())
    try:
        await task
    except asyncpg.PostgresError as problem:
        assert problem.sqlstate == "CF001"
        return False
    finally:
        await one.close()
        await two.close()
    return True


async def test_of_two_that_fit_alone_the_second_is_refused(sql: Connection, connect: Connect) -> None:
    for number, (first, second) in enumerate(itertools.product(TAKES, TAKES)):
        for commits in (True, False):
            ada = await new_ada(sql, number * 2 + commits, room=59)
            admitted = await second_succeeds(connect, ada, TAKES[first], TAKES[second], commits=commits)
            assert admitted is not commits, f"{first}, then {second}"
            assert sum((await used(sql, ada.id))[:2]) == 180
    assert await drift(sql) == []


async def test_what_the_first_gives_back_the_second_may_take(sql: Connection, connect: Connect) -> None:
    for number, (first, second) in enumerate(itertools.product(GIVES, TAKES)):
        for commits in (True, False):
            ada = await new_ada(sql, number * 2 + commits, room=0)
            admitted = await second_succeeds(connect, ada, GIVES[first], TAKES[second], commits=commits)
            assert admitted is commits, f"{first}, then {second}"
            assert sum((await used(sql, ada.id))[:2]) == 150
    assert await drift(sql) == []


@pytest.mark.parametrize("table", ["user_files", "uploads"])
async def test_one_row_deleted_twice_gives_its_bytes_back_once(sql: Connection, connect: Connect, table: str) -> None:
    ada = await new_ada(sql, 0, room=0)
    row = ada.spare_file if table == "user_files" else ada.spare_upload

    async def delete(connection: Connection, _: Ada) -> None:
        await connection.execute(f"delete from {table} where id = $1", row)

    assert await second_succeeds(connect, ada, delete, delete, commits=True)
    assert sum((await used(sql, ada.id))[:2]) == 120
    assert await drift(sql) == []


async def test_nothing_slips_in_while_an_erasure_begins(sql: Connection, connect: Connect) -> None:
    for number, take in enumerate(TAKES.values()):
        ada = await new_ada(sql, number, room=1000)

        async def begin(connection: Connection, ada: Ada) -> None:
            await connection.execute("update user_storage set erasing_at = now() where user_id = $1", ada.id)

        one, two = await connect(), await connect()
        async with one.transaction():
            await begin(one, ada)
            task = asyncio.ensure_future(take(two, ada))
            await waiting_for_lock(one)
        with pytest.raises(asyncpg.PostgresError) as caught:
            await task
        assert caught.value.sqlstate == "CF003"
        await one.close()
        await two.close()


INSERT_BOTH = """
insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path)
select gen.id, owner.id, 'n', 'image', 'image/png', 1, decode(repeat('00', 32), 'hex'), (select id from volumes),
       '/' || gen.id || '.1.'
  from unnest($1::text[]) owner (id), lateral (select gen_random_uuid() as id where owner.id <> '') gen
"""


@pytest.mark.parametrize("kind", ["insert", "update", "delete", "reserve", "release", "receive"])
async def test_statements_over_several_users_take_them_in_one_order(sql: Connection, connect: Connect, kind: str) -> None:
    """A third party holds the later user. The first statement then holds the earlier one and waits; so must the second, which names
    them the other way round: if it held the later one while it waited for the earlier, the two would wait for each other."""
    users = ["user a", "user b"]
    for user in users:
        await add_user(sql, user, None)
    await add_user(sql, "user c", None)
    held, one, two = await connect(), await connect(), await connect()

    async def prepare(order: list[str]) -> list[UUID]:
        make = insert_upload if kind == "release" else insert_file
        return [await make(sql, "user c" if kind == "receive" else user, 10) for user in order]

    ids = {tuple(order): await prepare(order) for order in (users, users[::-1])}

    async def run(connection: Connection, order: list[str]) -> None:
        mine = ids[tuple(order)]
        if kind == "insert":
            await connection.execute(INSERT_BOTH, order)
        elif kind == "reserve":
            await connection.execute(
                "insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at) "
                "select gen_random_uuid(), u, (select id from volumes), 1, now() from unnest($1::text[]) u",
                order,
            )
        elif kind == "receive":
            await connection.execute(
                "update user_files f set user_id = n.u from unnest($1::uuid[], $2::text[]) n (i, u) where f.id = n.i", mine, order
            )
        elif kind == "update":
            await connection.execute("update user_files set file_size = file_size + 1 where id = any ($1)", mine)
        elif kind == "delete":
            await connection.execute("delete from user_files where id = any ($1)", mine)
        else:
            await connection.execute("delete from uploads where id = any ($1)", mine)

    async with held.transaction():
        await held.execute("update user_storage set tier = 'held' where user_id = 'user b'")
        first = asyncio.ensure_future(run(one, users))
        await waiting_for_lock(held, 1)
        second = asyncio.ensure_future(run(two, users[::-1]))
        await waiting_for_lock(held, 2)
    await asyncio.gather(first, second)
    assert await drift(sql) == []
