"""`GET /api/files/events`: a user's finished previews as server-sent events (HTML, section 9.2), as bare ASGI.

What is finished after the answer's head has come is sent, or the stream ends; so a client lists its files anew whenever it has connected.
A stream that a client does not read keeps ids alone, and few; its connection is judged as that of any slow reader (`pace.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import msgspec

from server import ledger
from server.api.door import admit
from server.api.download import disconnected
from server.api.files import file_json
from server.api.problems import RAW_COMMON_HEADERS
from server.api.services import Services
from server.auth import Principal, Scope
from server.errors import CofferError
from server.ledger import Finished

_FILES_AT_ONCE = 100
_FAREWELL_SECONDS = 1.0  # for a client that reads nothing to take the end of its stream

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back
    *RAW_COMMON_HEADERS,
]
_HELLO = b"retry: 2000\n\n"
_HEARTBEAT = b":\n\n"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def follow(services: Services, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Tells of each preview that is finished from now on, whatever became of it, until the client goes, 5 minutes are over, the server
    stops, the database is lost or more has happened than is remembered.

    Raises `TooManyStreams`, and `DatabaseUnavailable` when nothing can be heard.
    """
    principal = await admit(services, scope, Scope.FILES_READ)
    with services.streams.opened(principal.owner), services.notices.of_user(principal.owner) as finished:
        await services.notices.listening()
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": _HELLO, "more_body": True})
        ends = {asyncio.create_task(disconnected(receive)), asyncio.create_task(services.streams.stopping.wait())}
        try:
            with suppress(TimeoutError, CofferError):
                async with asyncio.timeout(services.streams.longest_seconds):
                    await _tell(services, principal, finished, ends, send)
        finally:
            for end in ends:
                end.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await send({"type": "http.response.body", "body": b""})


async def _tell(services: Services, principal: Principal, finished: Finished, ends: set[asyncio.Task[Any]], send: Send) -> None:
    while True:
        news = asyncio.create_task(finished.wait())
        try:
            await asyncio.wait({news, *ends}, timeout=services.streams.heartbeat_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if any(end.done() for end in ends) or finished.is_incomplete:
            return
        ids = finished.take(_FILES_AT_ONCE)
        files = await ledger.get_files(services.db, principal.owner, ids) if ids else {}
        told = [
            file_json(files[file_id])
            for file_id in ids
            if file_id in files
            and files[file_id].preview_state != "pending"  # its bytes were replaced: there will be another event
            and (principal.kinds is None or files[file_id].file_type in principal.kinds)
        ]
        body = b"".join(b"event: preview\ndata: %b\n\n" % msgspec.json.encode(answer) for answer in told)
        if body or not ids:
            await _sent(send, body or _HEARTBEAT, ends)


async def _sent(send: Send, body: bytes, ends: set[asyncio.Task[Any]]) -> None:
    """Sends it, unless the end comes first: a client that does not read must not keep a server from stopping."""
    sending = asyncio.ensure_future(send({"type": "http.response.body", "body": body, "more_body": True}))
    try:
        await asyncio.wait({sending, *ends}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not sending.done():
            sending.cancel()
    if sending.done():
        sending.result()
