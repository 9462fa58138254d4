"""Bytes for whoever holds a link: `GET /f/{token}/{name}`, `GET /p/{public_id}`, as bare ASGI. `PUT /u/{token}` is in `upload.py`."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from server.api.door import act_in
from server.api.download import joined_headers, send_answer, sends_unread
from server.api.services import Services
from server.delivery.links import link_cache_control
from server.delivery.recent import NEVER
from server.errors import LinkInvalid, NotFound

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LINK_ROUTE, PUBLIC_ROUTE = "/f/{token}/{name}", "/p/{public_id}"

CONDITIONS = frozenset({b"range", b"if-range", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"})
_PUBLIC_ID = re.compile(r"[A-Za-z0-9_-]{22}")


async def download_by_link(services: Services, rest: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answers the holder of a signed link. `rest` is the path after `/f/`, as it was sent.

    Raises `LinkInvalid` when any character differs from what we signed, `LinkExpired`, and `NotFound` when it was revoked or its bytes
    were deleted or replaced.
    """
    token, slash, segment = rest.partition("/")
    if not slash or scope["query_string"]:
        raise LinkInvalid
    unread = sends_unread(services.settings, scope)
    keeps = unread and _may_be_kept(services, scope)
    path = f"/f/{rest}"
    if keeps and (recent := services.recent_links.find(path)) is not None:
        await send_answer(services, recent.answer(), scope, receive, send)
        return
    asked_at = services.recent_links.now()
    link = services.links.verify_download(token, segment)
    act_in(scope, "download_link", str(link.id))
    cache = partial(link_cache_control, services.settings.link_cache, link.expires_at)
    answer = await services.delivery.open_linked(link, scope["method"], joined_headers(scope), cache(), unread=unread)
    if keeps and all(name != "vary" for name, _ in answer.headers):
        # What revokes a preview's link is its original's name.
        original = None if link.preview is None else services.delivery.original(link)
        if link.preview is None or original is not None:
            services.recent_links.keep(path, answer, asked_at=asked_at, expires_at=link.expires_at, cache_control=cache, original=original)
    await send_answer(services, answer, scope, receive, send)


async def download_public(services: Services, rest: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answers whoever knows the URL of a public file. Raises `NotFound` once that was ended."""
    if not _PUBLIC_ID.fullmatch(rest):
        raise NotFound
    act_in(scope, "public_link", None)
    unread = sends_unread(services.settings, scope)
    keeps = unread and _may_be_kept(services, scope)
    cache = f"public, max-age={services.settings.public_max_age_seconds}, no-transform"
    path = f"/p/{rest}"
    if keeps and (recent := services.recent_links.find(path)) is not None:
        await send_answer(services, recent.answer(), scope, receive, send)
        return
    asked_at = services.recent_links.now()
    answer = await services.delivery.open_public(rest, scope["method"], joined_headers(scope), cache, unread=unread)
    if keeps:
        services.recent_links.keep(path, answer, asked_at=asked_at, expires_at=NEVER, cache_control=lambda: cache)
    await send_answer(services, answer, scope, receive, send)


def _may_be_kept(services: Services, scope: MutableMapping[str, Any]) -> bool:
    """Whether this may be answered as a moment ago: it is a GET of a whole file. Reads that are to be recorded all go the long way."""
    return scope["method"] == "GET" and not services.settings.audit_reads and CONDITIONS.isdisjoint(each[0] for each in scope["headers"])
