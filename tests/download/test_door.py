"""The ASGI door: whole answers, bounded memory, no descriptor left open, no short answer taken for whole."""

import asyncio
import os
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.api.download import download
from server.api.services import Services
from server.delivery.service import READ_BYTES
from server.errors import CofferError, Damaged, InvalidRequest, NotFound, RangeNotSatisfiable, Unauthenticated
from server.vault.volume import Volume
from tests.download.conftest import Exchange, Shelf
from tests.download.samples import FILE_ID
from tests.processes import open_below

SMALL = b"a small picture"
LARGE = os.urandom(4 * READ_BYTES + 1)


def opened(shelf: Shelf) -> list[str]:
    """The stored files that this process still has open, after a moment for threads to put down what they were given."""
    deadline = time.monotonic() + 2
    while (found := open_now(shelf)) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


def open_now(shelf: Shelf) -> list[str]:
    return [target for target in open_below(shelf.mount / "users") if ".jpg" in target]


def run(services: Services, make: Callable[[Exchange], Awaitable[object]] | None = None, **request: Any) -> Exchange:
    """Serves one request; `make` may drive it, else it is simply awaited. Then nothing must be left open."""

    async def serve() -> Exchange:
        exchange = Exchange(**request)
        await (make(exchange) if make else served(services, exchange))
        await asyncio.sleep(0)  # cancelled tasks need one more turn of the loop to be gone
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return exchange

    return asyncio.run(serve())


async def served(services: Services, exchange: Exchange) -> None:
    await download(services, FILE_ID, exchange.scope, exchange.receive, exchange.send)


@pytest.mark.parametrize("data", [b"", SMALL, LARGE[:READ_BYTES], LARGE[: READ_BYTES + 1], LARGE])
def test_every_byte_and_no_other(shelf: Shelf, services: Services, data: bytes) -> None:
    shelf.put(data)
    exchange = run(services)
    assert (exchange.status, exchange.headers["content-length"]) == (200, str(len(data)))
    assert exchange.body == data
    assert exchange.complete
    assert all(len(each) <= READ_BYTES for each in exchange.bodies)
    assert opened(shelf) == []


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, len(LARGE) - 2), (READ_BYTES - 1, READ_BYTES), (len(LARGE) - 1, len(LARGE) - 1)])
def test_ranges(shelf: Shelf, services: Services, first: int, last: int) -> None:
    shelf.put(LARGE)
    exchange = run(services, headers={"range": f"bytes={first}-{last}"})
    assert (exchange.status, exchange.headers["content-range"]) == (206, f"bytes {first}-{last}/{len(LARGE)}")
    assert exchange.body == LARGE[first : last + 1]
    assert exchange.complete


def test_head_and_not_modified_send_no_bytes(shelf: Shelf, services: Services) -> None:
    file = shelf.put(LARGE)
    head = run(services, method="HEAD")
    assert (head.status, head.headers["content-length"], head.body, head.complete) == (200, str(len(LARGE)), b"", True)
    cached = run(services, headers={"if-none-match": f'"{file.sha256.hex()}"'})
    assert (cached.status, cached.body, cached.complete) == (304, b"", True)
    assert opened(shelf) == []


def test_headers_sent_twice_are_one_list(shelf: Shelf, services: Services) -> None:
    file = shelf.put(SMALL)
    exchange = Exchange(headers={"if-none-match": '"a"'})
    exchange.scope["headers"].append((b"if-none-match", f'"{file.sha256.hex()}"'.encode()))
    asyncio.run(served(services, exchange))
    assert exchange.status == 304

    exchange = Exchange(headers={"range": "bytes=0-1"})
    exchange.scope["headers"].append((b"range", b"bytes=3-4"))
    asyncio.run(served(services, exchange))
    assert (exchange.status, exchange.body) == (200, SMALL)


@pytest.mark.parametrize(
    ("query", "mime_type", "expected"),
    [
        ("", "image/jpeg", "inline"),
        ("disposition=attachment", "image/jpeg", "attachment"),
        ("a=b&disposition=inline&a=c", "image/jpeg", "inline"),
        ("", "application/json", "attachment"),
        ("disposition=inline", "text/html", "attachment"),
    ],
)
def test_disposition(shelf: Shelf, services: Services, query: str, mime_type: str, expected: str) -> None:
    shelf.put(SMALL, mime_type=mime_type)
    assert run(services, query=query).headers["content-disposition"] == f'{expected}; filename="sunset.jpg"'


@pytest.mark.parametrize(
    "query", ["disposition=", "disposition=Inline", "disposition=inline&disposition=inline", "disposition=%0d%0a", "disposition=%ff"]
)
def test_a_strange_disposition(shelf: Shelf, services: Services, query: str) -> None:
    shelf.put(SMALL)
    with pytest.raises(InvalidRequest):
        run(services, query=query)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"headers": {"range": "bytes=99-"}}, RangeNotSatisfiable),
        ({"user": "user_3other"}, NotFound),
        ({"headers": {"if-match": '"a"'}}, CofferError),
    ],
)
def test_failures_come_before_the_answer(shelf: Shelf, services: Services, request_: dict[str, Any], error: type[CofferError]) -> None:
    """So that the door can still turn them into a problem."""
    shelf.put(SMALL)
    exchange = Exchange(**request_)
    with pytest.raises(error):
        asyncio.run(served(services, exchange))
    assert exchange.messages == []


def test_credentials_come_first(shelf: Shelf, services: Services) -> None:
    exchange = Exchange(query="disposition=nonsense")
    exchange.scope["headers"] = []
    with pytest.raises(Unauthenticated):
        asyncio.run(served(services, exchange))
    assert shelf.looks == 0


# Endings


def test_a_file_cut_short_in_mid_answer_is_never_a_whole_answer(shelf: Shelf, services: Services) -> None:
    file = shelf.put(LARGE)
    exchange = Exchange()

    async def truncate(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            os.truncate(shelf.path(file), READ_BYTES + 7)

    exchange.before_send = truncate
    with pytest.raises(Damaged):
        asyncio.run(served(services, exchange))
    assert not exchange.complete
    assert len(exchange.body) < len(LARGE)
    assert opened(shelf) == []


def test_a_client_that_goes_away_stops_the_reading(shelf: Shelf, services: Services) -> None:
    """A server's `send` says nothing of a closed connection; without listening for it, all of the file would be read."""
    shelf.put(LARGE)

    async def leave(exchange: Exchange) -> None:
        async def after_the_second(_: dict[str, Any]) -> None:
            if len(exchange.messages) == 2:
                exchange.disconnected.set()
            await asyncio.sleep(0.01)

        exchange.before_send = after_the_second
        await served(services, exchange)

    exchange = run(services, leave)
    assert 2 <= len(exchange.bodies) <= 3
    assert not exchange.complete
    assert opened(shelf) == []


def test_a_cancelled_send_leaves_nothing_open(shelf: Shelf, services: Services) -> None:
    shelf.put(LARGE)

    async def cancel_each(exchange: Exchange) -> None:
        for stop_at in range(6):
            each = Exchange()
            reached = asyncio.Event()

            async def hang(_: dict[str, Any], each: Exchange = each, stop_at: int = stop_at, reached: asyncio.Event = reached) -> None:
                if len(each.messages) == stop_at:
                    reached.set()
                    await asyncio.Event().wait()

            each.before_send = hang
            task = asyncio.ensure_future(served(services, each))
            await reached.wait()
            assert open_now(shelf)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
            assert opened(shelf) == [], stop_at

    run(services, cancel_each)


@pytest.mark.parametrize("during", ["open", "first", "later"])
def test_a_request_cancelled_while_a_thread_works_leaves_nothing_open(
    shelf: Shelf, services: Services, during: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread cannot be stopped; what it opens after the request is gone must be closed all the same."""
    shelf.put(LARGE)
    entered, go_on, left = threading.Event(), threading.Event(), threading.Event()
    skip = [1 if during == "later" else 0]

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if skip[0]:
                skip[0] -= 1
                return work(*arguments)
            entered.set()
            assert go_on.wait(10)
            try:
                return work(*arguments)
            finally:
                left.set()

        return wrapped

    if during == "open":
        monkeypatch.setattr(Volume, "open_stored", slow(Volume.open_stored))
    else:
        monkeypatch.setattr(os, "pread", slow(os.pread))

    async def cancel(exchange: Exchange) -> None:
        task = asyncio.ensure_future(served(services, exchange))
        await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bool(open_now(shelf)) is (during != "open"), "a thread never reads from a descriptor closed under it"
        go_on.set()
        await asyncio.to_thread(left.wait, 10)
        assert await asyncio.to_thread(opened, shelf) == []

    run(services, cancel)


def test_memory_does_not_grow_with_the_file(shelf: Shelf, services: Services) -> None:
    """A sparse file of 128 MiB at a few reads in memory: what Python allocates is counted, not guessed."""
    file = shelf.put(b"")
    size = 2**27
    os.truncate(shelf.path(file), size)
    shelf.put_row(file, file_size=size)
    seen = 0

    async def discard(exchange: Exchange) -> None:
        async def count(message: dict[str, Any]) -> None:
            nonlocal seen
            seen += len(message.get("body", b""))
            message["body"] = b""

        exchange.before_send = count
        tracemalloc.start()
        try:
            await served(services, exchange)
            assert tracemalloc.get_traced_memory()[1] < 4 * READ_BYTES + 2**20
        finally:
            tracemalloc.stop()

    run(services, discard)
    assert seen == size
