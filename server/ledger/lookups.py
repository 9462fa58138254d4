"""Rows for many requests in one statement: while one look at the database is under way, those who want the next one gather.

A statement's own cost is far above that of another row in it, for PostgreSQL and for us (decisions/0017). Nobody waits for company:
who comes first asks at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from typing import Generic, TypeVar
from uuid import UUID

from server.errors import DatabaseUnavailable, NotFound
from server.ledger.database import Database
from server.ledger.files import FILE_COLUMNS, file_of
from server.ledger.models import File
from server.ledger.statements import statement

Key = TypeVar("Key")
Found = TypeVar("Found")

_OWNED = statement("get_files_of_users", file=FILE_COLUMNS)
_LINKED = statement("get_linked_files", file=FILE_COLUMNS)


class Gathering(Generic[Key, Found]):
    """Asks for many keys at once what each of its callers wants to know of one. Lives in one event loop."""

    def __init__(self, ask: Callable[[list[Key]], Awaitable[Mapping[Key, Found]]]) -> None:
        """`ask` gets different keys, and leaves out those of which there is nothing to say."""
        self._ask = ask
        self._waiting: dict[Key, asyncio.Future[Found | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def get(self, key: Key) -> Found | None:
        """What there is, as it was after this was called. Raises what `ask` raises."""
        return await asyncio.shield(self.soon(key))  # it may be others' as well

    def soon(self, key: Key) -> "asyncio.Future[Found | None]":
        """The same without a task of one's own. It may be others' future as well, so nobody cancels it."""
        found = self._waiting.get(key)
        if found is None:
            found = self._waiting[key] = asyncio.get_running_loop().create_future()
        if self._asking is None:
            # In a context of its own: what is logged meanwhile is not the first request's alone.
            self._asking = asyncio.create_task(self._ask_all(), context=Context())
        return found

    async def _ask_all(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting, {}
                await self._settle(asked)
        finally:
            self._asking = None

    async def _settle(self, asked: dict[Key, asyncio.Future[Found | None]]) -> None:
        try:
            answers = await self._ask(list(asked))
        except Exception as problem:  # noqa: BLE001 - it is raised where it was asked for
            if len(asked) > 1 and not isinstance(problem, DatabaseUnavailable):
                for key, future in asked.items():  # what is wrong with one key is no other's business
                    await self._settle({key: future})
                return
            for future in asked.values():
                future.set_exception(problem)
                future.exception()  # who asked may have gone, and then nobody takes it
        else:
            for key, future in asked.items():
                future.set_result(answers.get(key))


class FileLookups:
    """The rows of files that are to be read."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._owned = Gathering(self._ask_owned)
        self._linked = Gathering(self._ask_linked)

    async def owned(self, user_id: str, file_id: UUID) -> File:
        """One file of one user. Raises `NotFound` and `DatabaseUnavailable`."""
        return _known(await self._owned.get((user_id, file_id)))

    def owned_soon(self, user_id: str, file_id: UUID) -> "asyncio.Future[File | None]":
        """As `owned`, without a task of one's own: None is `NotFound`. Nobody cancels it."""
        return self._owned.soon((user_id, file_id))

    async def linked(self, file_id: UUID, generation: int, link_epoch: int) -> File:
        """The file that a link names. Raises `NotFound` when it is gone, replaced, or its links are revoked, and `DatabaseUnavailable`."""
        return _known(await self._linked.get((file_id, generation, link_epoch)))

    async def _ask_owned(self, keys: list[tuple[str, UUID]]) -> dict[tuple[str, UUID], File]:
        users, ids = zip(*keys, strict=True)
        files = map(file_of, await self._db.read(_OWNED, users, ids))
        return {(file.user_id, file.id): file for file in files}

    async def _ask_linked(self, keys: list[tuple[UUID, int, int]]) -> dict[tuple[UUID, int, int], File]:
        ids, generations, epochs = zip(*keys, strict=True)
        rows = await self._db.read(_LINKED, ids, generations, epochs)
        return {(row["id"], row["generation"], row["wanted_epoch"]): file_of(row) for row in rows}


def _known(file: File | None) -> File:
    if file is None:
        raise NotFound
    return file
