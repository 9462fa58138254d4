"""Rows for many requests in one statement."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from server import ledger
from server.errors import DatabaseUnavailable, InvalidRequest, NotFound
from server.ledger import Database, File, FileLookups
from server.ledger.files import FILE_COLUMNS
from server.ledger.lookups import Gathering
from server.ledger.statements import statement
from tests.quota.rows import Connection, add_user, add_volume, new_file

pytestmark = pytest.mark.anyio


class Asked:
    """Answers each number with its text once it is let go, and remembers what it was asked together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()

    async def __call__(self, keys: list[int]) -> dict[int, str]:
        self.batches.append(keys)
        await self.go.wait()
        if 13 in keys:
            raise InvalidRequest("thirteen", "is refused")
        if 99 in keys:
            raise DatabaseUnavailable
        return {key: str(key) for key in keys if key >= 0}


async def settled(*tasks: "asyncio.Task[Any]") -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def begun(gathering: "Gathering[int, str]", *keys: int) -> list["asyncio.Task[str | None]"]:
    tasks = [asyncio.create_task(gathering.get(key)) for key in keys]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def test_who_comes_first_asks_at_once_and_the_others_together() -> None:
    asked = Asked()
    gathering = Gathering(asked)
    first = await begun(gathering, 1)
    rest = await begun(gathering, 2, 3, 2, 1, -1)
    assert asked.batches == [[1]]
    asked.go.set()
    assert await settled(*first, *rest) == ["1", "2", "3", "2", "1", None]
    assert asked.batches == [[1], [2, 3, 1, -1]], "a look that had begun before is none for those who came after"
    assert await gathering.get(4) == "4"


async def test_a_key_that_is_refused_costs_nobody_else() -> None:
    asked = Asked()
    gathering = Gathering(asked)
    tasks = [*await begun(gathering, 1), *await begun(gathering, 2, 13, 3)]
    asked.go.set()
    first, second, refused, third = await settled(*tasks)
    assert (first, second, third) == ("1", "2", "3")
    assert isinstance(refused, InvalidRequest)


async def test_without_a_database_all_are_told() -> None:
    asked = Asked()
    gathering = Gathering(asked)
    tasks = [*await begun(gathering, 1), *await begun(gathering, 2, 99)]
    asked.go.set()
    first, *others = await settled(*tasks)
    assert first == "1" and [type(each) for each in others] == [DatabaseUnavailable] * 2
    assert asked.batches == [[1], [2, 99]]
    assert await gathering.get(5) == "5"


async def test_who_leaves_takes_nothing_from_the_others() -> None:
    asked = Asked()
    gathering = Gathering(asked)
    first, second, third = [*await begun(gathering, 1), *await begun(gathering, 2, 2)]
    first.cancel()
    second.cancel()
    asked.go.set()
    assert await third == "2"
    assert [type(each) for each in await settled(first, second)] == [asyncio.CancelledError] * 2


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Connection]:
    """A plain connection; Ada and Bob have room."""
    connection = await asyncpg.connect(database_url)
    await add_volume(connection)
    await add_user(connection, "ada", None)
    await add_user(connection, "bob", None)
    yield connection
    await connection.close()


async def test_rows_go_to_those_who_asked_for_them(db: Database, sql: Connection) -> None:
    """And another user's file is none, nor one whose links were revoked."""
    lookups = FileLookups(db)
    files = [await ledger.publish_file(db, new_file(user, size)) for user, size in (("ada", 1), ("bob", 2), ("ada", 3))]
    known = {(file.user_id, file.id): file for file in files}
    wanted = [(user, file.id) for user in ("ada", "bob", "eve") for file in files] + [("ada", uuid4())]
    found = await asyncio.gather(*(lookups.owned(*each) for each in wanted), return_exceptions=True)
    for key, row in zip(wanted, found, strict=True):
        assert (isinstance(row, NotFound) and key not in known) or row == known[key]

    links = [(files[0].id, 1, 0), (files[0].id, 1, 1), (files[0].id, 2, 0), (files[1].id, 1, 0)]
    assert await linked(lookups, links) == [files[0], None, None, files[1]]
    await ledger.raise_link_epoch(db, "ada")
    assert await linked(lookups, links) == [None, files[0], None, files[1]]
    await sql.execute("update user_storage set erasing_at = now() where user_id = 'bob'")
    assert await linked(lookups, links) == [None, files[0], None, None]


async def linked(lookups: FileLookups, links: list[tuple[UUID, int, int]]) -> list[File | None]:
    """All at once; None for those that are not found."""

    async def one(*link: Any) -> File | None:
        try:
            return await lookups.linked(*link)
        except NotFound:
            return None

    return await asyncio.gather(*(one(*each) for each in links))


@pytest.mark.parametrize("text", ["get_files_of_users", "get_linked_files"])
async def test_the_plan_reads_one_row_for_each_key(db: Database, sql: Connection, text: str) -> None:
    """Whatever PostgreSQL believes about the sizes of tables."""
    keys: tuple[Any, ...] = (["ada"], [uuid4()]) if text == "get_files_of_users" else ([uuid4()], [1], [0])
    plan = "\n".join(row[0] for row in await db.read(f"explain {statement(text, file=FILE_COLUMNS)}", *keys))
    assert "Nested Loop" in plan and "Index" in plan
    assert "Seq Scan" not in plan and "Hash Join" not in plan and "Merge" not in plan, plan
