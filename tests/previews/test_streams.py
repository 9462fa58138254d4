"""Event streams from within, where time can be made short: their end and heartbeat, clients that do not read, a silent database."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server import ledger
from server.api.events import follow
from server.api.services import Services
from server.api.streams import Streams
from server.app import assemble
from server.auth import NewApiKey, Scope
from server.ledger import Database, Notices
from server.settings import Settings
from tests.serving import DEFAULTS

pytestmark = pytest.mark.anyio

HELLO, HEARTBEAT = b"retry: 2000\n\n", b":\n\n"


class Client:
    """What `follow` sends to, and hears from: `gone` hangs up, `reads` cleared takes nothing more."""

    def __init__(self, api_key: str) -> None:
        self.scope = {"type": "http", "headers": [(b"authorization", f"Bearer {api_key}".encode()), (b"x-user-id", b"ada")]}
        self.bodies: list[bytes] = []
        self.came = asyncio.Event()
        self.gone, self.reads, self.stuck = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.reads.set()
        self.has_ended = False

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.reads.is_set():
            self.stuck.set()
            await self.reads.wait()
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            self.has_ended = not message.get("more_body")
            self.came.set()

    async def sees(self, what: Callable[[], bool]) -> None:
        while not what():
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 10)


@pytest.fixture
async def api_key(db: Database) -> str:
    key = NewApiKey.generate()
    await ledger.create_api_key(db, key_id=key.key_id, name="x", secret_sha256=key.secret_sha256, scopes=[Scope.FILES_READ.value])
    return key.text


@asynccontextmanager
async def serving(database_url: str, streams: Streams, look_seconds: float = 15.0) -> AsyncIterator[Services]:
    settings = Settings(database_url=database_url, link_keys=(DEFAULTS["COFFER_LINK_KEYS"],))
    notices = Notices(settings, look_seconds)
    services = dataclasses.replace(assemble(settings)._services, streams=streams, notices=notices)
    await services.db.open()
    try:
        yield services
    finally:
        await notices.close()
        await services.db.close()


async def test_a_stream_ends_when_its_time_is_over(database_url: str, api_key: str) -> None:
    client = Client(api_key)
    async with serving(database_url, Streams(longest_seconds=0.1)) as services:
        await asyncio.wait_for(follow(services, client.scope, client.receive, client.send), 10)
    assert client.bodies == [HELLO, b""] and client.has_ended


async def test_a_silent_stream_has_a_heartbeat_until_its_client_goes(database_url: str, api_key: str) -> None:
    client = Client(api_key)
    async with serving(database_url, Streams(heartbeat_seconds=0.01)) as services:
        following = asyncio.create_task(follow(services, client.scope, client.receive, client.send))
        await client.sees(lambda: client.bodies[:4] == [HELLO, *[HEARTBEAT] * 3])
        client.gone.set()
        await asyncio.wait_for(following, 10)
        with services.streams.opened("ada"):  # it is counted no more
            assert services.streams._open == {"ada": 1}


async def test_a_server_stops_though_a_client_does_not_read(database_url: str, api_key: str) -> None:
    client = Client(api_key)
    async with serving(database_url, Streams(heartbeat_seconds=0.01)) as services:
        following = asyncio.create_task(follow(services, client.scope, client.receive, client.send))
        await client.sees(lambda: HELLO in client.bodies)
        client.reads.clear()
        await asyncio.wait_for(client.stuck.wait(), 10)
        services.streams.stopping.set()
        await asyncio.wait_for(following, 10)
    assert not client.has_ended


async def test_a_stream_ends_when_the_database_has_fallen_silent(database_url: str, db: Database, api_key: str) -> None:
    """Its connection is open and nothing comes, not even its end: asking now and then finds it out."""
    client = Client(api_key)
    async with serving(database_url, Streams(), look_seconds=0.1) as services:
        following = asyncio.create_task(follow(services, client.scope, client.receive, client.send))
        await client.sees(lambda: HELLO in client.bodies)
        ((pid,),) = await db.read(
            "select pid from pg_stat_activity where application_name = 'coffer notices' and datname = current_database()"
        )
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.wait_for(following, 20)
        finally:
            os.kill(pid, signal.SIGCONT)
    assert client.bodies == [HELLO, b""] and client.has_ended


async def test_what_nobody_expects_is_heard_and_ends_no_listening(database_url: str, db: Database, api_key: str) -> None:
    client = Client(api_key)
    async with serving(database_url, Streams(heartbeat_seconds=0.01)) as services:
        await ledger.ensure_user(db, "ada", max_bytes=None, volume_id=None)
        following = asyncio.create_task(follow(services, client.scope, client.receive, client.send))
        await client.sees(lambda: HELLO in client.bodies)
        for payload in ("", " ", " ada", "no-id ada", "x" * 7_000):
            await db.write("select pg_notify('coffer_notice', $1)", payload)
        with services.notices.of_user("ada") as finished:
            file_id = "00000000-0000-7000-8000-000000000001"
            for user_id in ("robert", "ada bob", "ada"):  # the first two are others: a user's id may hold spaces
                await db.write("select pg_notify('coffer_notice', $1)", f"{file_id[:-1]}{len(user_id)} {user_id}")
            await asyncio.wait_for(finished.wait(), 10)
            heard = finished.take(9)
            assert [str(each) for each in heard] == [f"{file_id[:-1]}3"]
        client.gone.set()
        await asyncio.wait_for(following, 10)
