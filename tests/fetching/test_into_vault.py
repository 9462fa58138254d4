"""What a URL gives becomes a file by the one intake: once, within quota, of a type that is stored, and nothing otherwise."""

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from server import ledger
from server.errors import NotFound, QuotaExceeded, UnsupportedType
from server.fetching import Download, Fetcher, FetchFailed, Rules
from server.intake import Details, Intake, fetch_file
from server.ledger import Database, File
from server.settings import Settings
from server.vault import Vault
from tests.fetching.peer import Asked, Peer, Say, always, head, ranged
from tests.samples import image

pytestmark = pytest.mark.anyio

OUTSIDE = "127.0.0.2"
FETCHER = Fetcher(Rules(private_networks=(ip_network(f"{OUTSIDE}/32"),)))
BODY = image(3_000_000)


@pytest.fixture
async def intake(database_url: str, db: Database, volume: Path) -> AsyncIterator[Intake]:
    vault = Vault(0)
    await vault.refresh(await ledger.list_volumes(db))
    made = Intake(Settings(database_url=database_url, reservation_step_bytes=500_000, fetch_seconds=30), db, vault)
    await made.placed("ada")
    yield made
    vault.close()


async def stored(intake: Intake, url: str, key: str = "one", details: Details = Details()) -> File:  # noqa: B008 - it is frozen
    return await fetch_file(intake, FETCHER, "ada", url, details=details, idempotency_key=key, first_pause_seconds=0)


async def used(intake: Intake) -> tuple[int, int]:
    user = await ledger.get_user(intake.db, "ada")
    return user.total_bytes, user.reserved_bytes


async def test_bytes_become_a_file_once(intake: Intake) -> None:
    async with Peer(ranged(BODY, cut_after=2_000_000), OUTSIDE) as peer:
        file = await stored(intake, f"{peer.url}/a%20photo.png?secret=1")
        assert (file.file_name, file.mime_type, file.sha256) == ("a photo.png", "image/png", hashlib.sha256(BODY).digest())
        assert (await stored(intake, peer.url)).id == file.id
        assert len(peer.asked) == 2
        assert (await stored(intake, peer.url, "two", Details(file_name="x", tags=["a"]))).tags == ["a"]
    assert await used(intake) == (2 * len(BODY), 0)


async def test_what_may_pass_is_tried_again_and_what_stays_is_not(intake: Intake) -> None:
    async def answer(asked: Asked, say: Say) -> None:
        status = {1: 503, 2: 429, 3: 500}.get(len(peer.asked), 200)
        if len(peer.asked) == 4:
            await say(head(200, content_length=len(BODY)) + BODY[:2_000_000])  # cut, and no ETag to go on with
        else:
            await (ranged(BODY) if status == 200 else always(status))(asked, say)

    async with Peer(answer, OUTSIDE) as peer:
        assert (await stored(intake, peer.url)).file_size == len(BODY)
        assert len(peer.asked) == 5
    async with Peer(always(404), OUTSIDE) as peer:
        with pytest.raises(FetchFailed, match="status_404"):
            await stored(intake, peer.url, "two")
        assert len(peer.asked) == 1


async def test_quota_holds_before_and_while_the_bytes_come(intake: Intake) -> None:
    sent = 0

    async def undeclared(asked: Asked, say: Say) -> None:
        nonlocal sent
        await say(head(transfer_encoding="chunked"))
        for at in range(0, len(BODY), 0x1000):
            await say(b"1000\r\n" + BODY[at : at + 0x1000].ljust(0x1000, b"\0") + b"\r\n")
            sent += 0x1000
        await say(b"0\r\n\r\n")

    async def declared(asked: Asked, say: Say) -> None:
        await say(head(content_length=len(BODY)))
        await refused.wait()  # not a byte is needed to refuse it

    refused = asyncio.Event()
    await ledger.set_quota(intake.db, "ada", 2_000_000)
    async with Peer(declared, OUTSIDE) as peer:
        with pytest.raises(QuotaExceeded):
            await stored(intake, peer.url)
        refused.set()
    async with Peer(undeclared, OUTSIDE) as peer:
        with pytest.raises(QuotaExceeded):
            await stored(intake, peer.url)
        await ledger.set_quota(intake.db, "ada", 4_000_000)
        assert (await stored(intake, peer.url)).file_size == -(-len(BODY) // 0x1000) * 0x1000
    assert (await used(intake))[1] == 0


async def test_refused_bytes_leave_nothing(intake: Intake, volume: Path) -> None:
    async with Peer(always(200, b"<html>sign in</html>", content_type="image/png"), OUTSIDE) as peer:
        with pytest.raises(UnsupportedType):
            await stored(intake, peer.url)
    async with Peer(ranged(BODY), OUTSIDE) as peer:
        with pytest.raises(FetchFailed, match="too_large"):
            await fetch_file(intake, FETCHER, "ada", peer.url, details=Details(), idempotency_key="k", most_bytes=len(BODY) - 1)
    assert not list((volume / "incoming").iterdir())
    assert not [path for path in volume.glob("users/*/*/*") if path.is_file()]


async def test_the_end_of_the_time_is_the_end(database_url: str, intake: Intake) -> None:
    async def hanging(asked: Asked, say: Say) -> None:
        await say(head(200, content_length=len(BODY), etag='"one"') + BODY[:1_500_000])
        await asked_again.wait()

    asked_again = asyncio.Event()
    impatient = Intake(Settings(database_url=database_url, fetch_seconds=1), intake.db, intake.vault)
    async with Peer(hanging, OUTSIDE) as peer:
        with pytest.raises(FetchFailed, match="timeout"):
            await stored(impatient, peer.url)
        asked_again.set()
    assert await used(intake) == (0, 0)


@pytest.mark.parametrize("comes_back", [False, True])
async def test_nothing_is_stored_for_who_was_erased_meanwhile(intake: Intake, *, comes_back: bool) -> None:
    asked, erased = asyncio.Event(), asyncio.Event()

    async def late(each: Asked, say: Say) -> None:
        asked.set()
        await erased.wait()
        await ranged(BODY)(each, say)

    async with Peer(late, OUTSIDE) as peer:
        fetching = asyncio.create_task(stored(intake, peer.url))
        await asyncio.wait_for(asked.wait(), 30)
        await intake.erase_user("ada")
        if comes_back:
            await intake.placed("ada")
        erased.set()
        with pytest.raises(NotFound):
            await fetching
    assert [user.file_count for user in await ledger.list_users(intake.db, None, 10)] == ([0] if comes_back else [])


async def test_memory_holds_a_chunk_and_not_the_body(intake: Intake) -> None:
    pieces = 1_500

    async def large(asked: Asked, say: Say) -> None:
        await say(head(content_length=pieces * len(piece)))
        for _ in range(pieces):
            await say(piece)

    piece = bytes(2**16)
    async with Peer(large, OUTSIDE) as peer:
        tracemalloc.start()
        try:
            async with Download(FETCHER, peer.url, most_bytes=2**30) as download:
                received = 0
                async for chunk in download.chunks():
                    received += len(chunk)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert received == pieces * len(piece)
    assert peak_bytes < 4 * 2**20
