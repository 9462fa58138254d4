"""`GET /api/users/{id}/export`: all files of a user in one archive, as bare ASGI."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from server import ledger
from server.api.door import admit
from server.api.problems import RAW_COMMON_HEADERS
from server.api.services import Services
from server.api.streams import disconnected
from server.api.users import decoded
from server.auth import Scope
from server.delivery.export import FILE_NAME, MEDIA_TYPE, Export
from server.errors import Forbidden

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_HEADERS = [
    (b"content-type", MEDIA_TYPE.encode()),
    (b"content-disposition", f'attachment; filename="{FILE_NAME}"'.encode()),
    (b"x-accel-buffering", b"no"),  # nginx would fill its disk with it
    *RAW_COMMON_HEADERS,
]


async def export(services: Services, segment: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answers with a tar archive of all files of the user whose id the path's `segment` holds, percent-encoded.

    For an admin's key, for the user's own token, and for a key that may read all of the user's files and acts for them. Raises `Forbidden`
    for everybody else, whether or not there is such a user; `NotFound`, `TooManyStreams`, `VolumeUnavailable`. What fails once the answer
    has begun leaves it incomplete: the archive then has no end.
    """
    try:
        await admit(services, scope, Scope.ADMIN)
        user_id = decoded(segment)
    except Forbidden as refused:
        try:
            principal = await admit(services, scope, Scope.FILES_READ)  # counts as a second request: an export is worth two
        except Forbidden:
            raise refused from None
        user_id = decoded(segment)
        if principal.owner != user_id or principal.kinds is not None:
            raise refused from None
    user = await ledger.get_user(services.db, user_id)
    with services.streams.opened(user_id):
        archive = Export(services.db, services.vault, user, audit_reads=services.settings.audit_reads)
        await archive.begin()
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        gone = asyncio.create_task(disconnected(receive))
        try:
            async with aclosing(archive.pieces()) as pieces:
                async for piece in pieces:
                    if gone.done() or services.streams.stopping.is_set():
                        return
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
