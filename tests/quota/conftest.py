"""Plain connections: the quota must hold without any of our Python."""

from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest

from tests.quota.rows import Connection, add_volume

Connect = Callable[[], Awaitable[Connection]]


@pytest.fixture
async def connect(database_url: str) -> AsyncIterator[Connect]:
    """Opens as many connections as a test wants; the first one has added the volume that all rows name."""
    opened: list[Connection] = []

    async def open_one() -> Connection:
        connection = await asyncpg.connect(database_url)
        opened.append(connection)
        if len(opened) == 1:
            await add_volume(connection)
        return connection

    yield open_one
    for connection in opened:
        await connection.close()


@pytest.fixture
async def sql(connect: Connect) -> Connection:
    """One connection."""
    return await connect()
