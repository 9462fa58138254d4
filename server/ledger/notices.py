"""Hears what processes tell each other through PostgreSQL: that a preview is finished, that somebody wants an upload or has let go of it.

One connection per process, opened by the first who waits.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from server.errors import DatabaseUnavailable
from server.ledger.database import CONNECT_SECONDS
from server.settings import Settings

MOST_FINISHED_REMEMBERED = 1_000
"""Ids for one who is slow to take them: some 100 KiB."""

_CHANNEL = "coffer_notice"
_PAUSE_SECONDS = 1.0
LOOK_SECONDS = 15.0
"""A connection that is cut without a word is noticed within this, and `CONNECT_SECONDS` more."""

LOOK_AGAIN_SECONDS = 2.0
"""A row that somebody waits for is looked at after this, should its notice be lost."""

log = logging.getLogger("coffer.ledger")

_Key = TypeVar("_Key")
_Listener = TypeVar("_Listener")


async def time_to_look(noticed: asyncio.Event, most_seconds: float = LOOK_AGAIN_SECONDS) -> None:
    """Returns when a row is to be looked at again: with the next notice of it, or soon without one."""
    with suppress(TimeoutError):
        await asyncio.wait_for(noticed.wait(), min(most_seconds, LOOK_AGAIN_SECONDS))
    noticed.clear()


class Finished:
    """The files of one user whose previews have been finished, each once, in that order, until they are taken."""

    def __init__(self) -> None:
        self.is_incomplete = False  # one may be missing, and always will
        self._ids: dict[UUID, None] = {}
        self._news = asyncio.Event()

    async def wait(self) -> None:
        """Returns when there is something to take, or never will be."""
        await self._news.wait()

    def take(self, most: int) -> list[UUID]:
        """The first of them, which are then forgotten."""
        taken = list(self._ids)[:most]
        for file_id in taken:
            del self._ids[file_id]
        if not self._ids and not self.is_incomplete:
            self._news.clear()
        return taken

    def add(self, file_id: UUID) -> None:
        """One more."""
        if self.is_incomplete:
            return
        self._ids[file_id] = None
        self._news.set()
        if len(self._ids) > MOST_FINISHED_REMEMBERED:
            self.give_up()

    def give_up(self) -> None:
        """Something may have been missed."""
        self.is_incomplete = True
        self._ids.clear()
        self._news.set()


class Notices:
    """Lives in one event loop. A notice may get lost with the connection: whoever waits for a file looks at its row now and then, too,
    and whoever follows a user is told.
    """

    def __init__(self, settings: Settings, look_seconds: float = LOOK_SECONDS) -> None:
        self._look_seconds = look_seconds
        self._url = settings.database_url
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._heeding: dict[str, set[asyncio.Event]] = {}
        self._following: dict[str, set[Finished]] = {}
        self._listening: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()

    @contextmanager
    def of(self, what: UUID | str) -> Iterator[asyncio.Event]:
        """An event that is set whenever a notice of `what` comes: a file's previews or the variant of a `variant_key` are finished, say.

        Read the row after this, not before.
        """
        with self._among(self._waiting, str(what), asyncio.Event()) as event:
            yield event

    @contextmanager
    def only_heard(self, what: str) -> Iterator[asyncio.Event]:
        """As `of`, but the event is never set for a notice that may have been missed. For what is said again until it is heard."""
        with self._among(self._heeding, what, asyncio.Event()) as event:
            yield event

    @contextmanager
    def of_user(self, user_id: str) -> Iterator[Finished]:
        """What is finished of the user's from the end of the next `listening` on."""
        with self._among(self._following, user_id, Finished()) as finished:
            yield finished

    async def listening(self) -> None:
        """Returns when notices are heard. Raises `DatabaseUnavailable` when that takes too long."""
        try:
            await asyncio.wait_for(self._connected.wait(), CONNECT_SECONDS)
        except TimeoutError:
            raise DatabaseUnavailable from None

    async def close(self) -> None:
        """Ends the connection."""
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening
            self._listening = None

    @contextmanager
    def _among(self, listeners: dict[_Key, set[_Listener]], key: _Key, listener: _Listener) -> Iterator[_Listener]:
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        listeners.setdefault(key, set()).add(listener)
        try:
            yield listener
        finally:
            listeners[key].discard(listener)
            if not listeners[key]:
                del listeners[key]

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as problem:
                log.warning("notices are not heard: %s", type(problem).__name__)
            except Exception:
                log.exception("notices are not heard")  # and yet it goes on: nobody would start it again
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _listen_once(self) -> None:
        settings = {"application_name": "coffer notices"}
        connection = await asyncpg.connect(self._url, timeout=CONNECT_SECONDS, server_settings=settings)
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        try:
            await connection.add_listener(_CHANNEL, self._heard)
            for events in self._waiting.values():  # what was finished while nobody listened
                for event in events:
                    event.set()
            self._connected.set()
            while not lost.is_set():
                try:
                    await asyncio.wait_for(lost.wait(), self._look_seconds)
                except TimeoutError:
                    await connection.execute("select", timeout=CONNECT_SECONDS)
        finally:
            self._connected.clear()
            for followers in self._following.values():
                for finished in followers:
                    finished.give_up()
            connection.terminate()

    def _heard(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        what, _, user_id = str(payload).partition(" ")
        for event in (*self._waiting.get(what, ()), *self._heeding.get(what, ())):
            event.set()
        with suppress(ValueError):  # no file of ours
            for finished in self._following.get(user_id, ()):  # nobody, where it was a variant
                finished.add(UUID(what))
