"""`GET` and `HEAD /api/files/{id}/download`: stored bytes to their owner, as bare ASGI."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, quote
from uuid import UUID

from server.api.door import admit, check_kinds
from server.api.proxies import BY_PROXY
from server.api.sendfile import EXTENSION, HEAD_WAITS
from server.api.services import Services
from server.api.streams import disconnected
from server.auth import Scope
from server.delivery import Answer, Body, Delivery
from server.delivery.headers import Disposition
from server.errors import InvalidRequest
from server.ledger import File
from server.settings import Settings
from server.vault.layout import is_previews

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DOWNLOAD_ROUTE = "/api/files/{file_id}/download"
ROW = "row"  # under this name a request's state holds the file's row, if that was asked for where the request was read

_JUDGED_BY_NGINX = frozenset({b"if-match", b"if-unmodified-since"})
_LEFT_TO_NGINX = frozenset({b"content-length", b"content-range", b"accept-ranges"})


async def download(services: Services, file_id: UUID, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answers with the file's bytes: whole, one range, or none when the client has them already (`server/delivery/`).

    `?disposition=inline|attachment` says how a browser is to treat them. Memory holds two reads at most, whatever the
    file's size, and none where the server sends files by itself. If the bytes turn out to be fewer than promised, `Damaged` is
    raised in mid-answer: the caller must leave the answer incomplete, so that no client takes it for whole.
    """
    principal = await admit(services, scope, Scope.FILES_READ)
    await check_kinds(services, principal, file_id)
    disposition = _disposition(scope["query_string"])
    unread = sends_unread(services.settings, scope)
    row: File | None = scope["state"].pop(ROW, None)
    headers = joined_headers(scope)
    answer = await services.delivery.open(principal.owner, file_id, scope["method"], headers, disposition, unread=unread, row=row)
    await send_answer(services, answer, scope, receive, send)


def sends_unread(settings: Settings, scope: MutableMapping[str, Any]) -> bool:
    """Whether no byte of a file has to be read here: the server under us sends files by itself, or nginx in front does."""
    return EXTENSION in scope.get("extensions", ()) or nginx_sends(settings, scope)


def nginx_sends(settings: Settings, scope: MutableMapping[str, Any], path: str = "") -> bool:
    """Whether the bytes may be left to nginx; those of a stored `path`, if it is known.

    Where they lie is told to nobody but a trusted proxy. nginx takes care of `Range` and `If-Range` by itself: what lies under a path never
    changes. But it would judge two other conditions once more, by the file's date, so requests that have them are answered here. So are
    previews: under the name of one lies another once its original's contents are replaced, and nginx may have the old one open still
    (decisions/0016).
    """
    return bool(
        settings.accel_redirect_prefix
        and scope.get("state", {}).get(BY_PROXY)
        and _JUDGED_BY_NGINX.isdisjoint(name for name, _ in scope["headers"])
        and not is_previews(path)
    )


def by_nginx(settings: Settings, body: Body, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers by which nginx is told to send the body."""
    path = f"{settings.accel_redirect_prefix}/{body.volume_id}/{quote(body.path)}"
    kept = [each for each in headers if each[0] not in _LEFT_TO_NGINX]
    return [*kept, (b"content-length", b"0"), (b"x-accel-redirect", path.encode("ascii"))]


async def send_answer(services: Services, answer: Answer, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Sends an answer, which was opened as `sends_unread` says, and closes it. Raises as `download` when the bytes run out."""
    try:
        headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in answer.headers]
        start: Message = {"type": "http.response.start", "status": answer.status, "headers": headers}
        if answer.body is None:
            await send(start)
            await send({"type": "http.response.body", "body": b""})
        elif nginx_sends(services.settings, scope, answer.body.path):
            start["status"], start["headers"] = 200, by_nginx(services.settings, answer.body, headers)
            await send(start)
            await send({"type": "http.response.body", "body": b""})
        elif EXTENSION in scope.get("extensions", ()):
            start[HEAD_WAITS] = True
            await send(start)
            await send({"type": EXTENSION, "file": answer.body.file, "offset": answer.body.offset, "count": answer.body.length})
        else:
            await send(start)
            await _send_bytes(services.delivery, answer.body, receive, send)
    finally:
        if answer.body is not None:
            answer.body.close()


async def _send_bytes(delivery: Delivery, body: Body, receive: Receive, send: Send) -> None:
    at, end = body.offset, body.offset + body.length
    chunk, body.first = body.first, b""  # not kept in memory for as long as the rest takes
    # A server's `send` does not tell that the client has gone, so a long answer listens for it. A short one is over at once.
    gone = asyncio.create_task(disconnected(receive)) if len(chunk) < body.length else None
    try:
        while True:
            at += len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": at < end})
            if at >= end or (gone and gone.done()):
                return
            chunk = await delivery.read(body, at)
    finally:
        if gone:
            gone.cancel()


def joined_headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    """The request's headers by lower-case name, repeated ones joined in their order (RFC 9110, section 5.3)."""
    joined: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


def _disposition(query: bytes) -> Disposition | None:
    if not query:
        return None
    match parse_qs(query.decode("latin-1"), keep_blank_values=True).get("disposition"):
        case None:
            return None
        case ["inline"]:
            return "inline"
        case ["attachment"]:
            return "attachment"
        case _:
            raise InvalidRequest("disposition", "must be inline or attachment")
