"""A byte's way in that Coffer goes itself: a URL's bytes become a file, through the one intake.

For the worker, never for the server: nobody's request waits for somebody else's machine.
"""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from urllib.parse import unquote, urlsplit

from server import fields, ledger
from server.errors import InvalidRequest, NotFound
from server.fetching import Download, Fetcher, FetchFailed
from server.intake.service import Intake
from server.intake.upload import Details, Upload
from server.ledger.models import File

_FIRST_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0

log = logging.getLogger("coffer.intake")


async def fetch_file(
    intake: Intake,
    fetcher: Fetcher,
    user_id: str,
    url: str,
    *,
    details: Details,
    idempotency_key: str,
    headers: Mapping[str, str] | None = None,
    most_bytes: int | None = None,
    kinds: frozenset[str] | None = None,
    first_pause_seconds: float = _FIRST_PAUSE_SECONDS,
) -> File:
    """Stores what the URL gives for a known user, once for each key, however often this is called and wherever it was killed.

    Quota is charged before the body is read where its length is declared, and step by step otherwise. What may pass is tried again, with
    growing pauses, for `fetch_seconds` of the settings; a cut connection goes on where it was where the server lets it. `headers` are for
    the URL's own host. Without a name in `details`, the URL's last segment is.

    Raises `NotFound` when the user is erased meanwhile, `UrlRefused`, `FetchFailed`, and as `Intake.begin_once` and `Upload.finish`; then
    nothing is stored.
    """
    settings = intake.settings
    most = min(settings.max_file_bytes, settings.max_file_bytes if most_bytes is None else most_bytes)
    clock = asyncio.get_running_loop().time
    deadline = clock() + settings.fetch_seconds
    pause_seconds = first_pause_seconds
    user_since = (await ledger.get_user(intake.db, user_id)).created_at
    while True:
        stored = await ledger.find_file_by_idempotency_key(intake.db, user_id, idempotency_key)
        if stored is not None:
            return stored
        download = Download(fetcher, url, most_bytes=most, headers=headers, most_bytes_per_second=settings.fetch_bytes_per_second)
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout_at(deadline):
                    await stack.enter_async_context(download)
                # Hours may have gone by. An intake makes users who are unknown, and nobody who was erased is to come back by this.
                if (await ledger.get_user(intake.db, user_id)).created_at != user_since:
                    raise NotFound
                return await _store(intake, download, user_id, details, idempotency_key, kinds, deadline)
        except TimeoutError as problem:
            raise FetchFailed("timeout", may_pass=True) from problem
        except FetchFailed as problem:
            if not problem.may_pass or clock() + pause_seconds >= deadline:
                raise
            log.info("a fetch will be tried again: %s", problem.reason)
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)


async def _store(
    intake: Intake,
    download: Download,
    user_id: str,
    details: Details,
    idempotency_key: str,
    kinds: frozenset[str] | None,
    deadline: float,
) -> File:
    upload = await intake.begin_once(user_id, idempotency_key, declared_bytes=download.size_bytes, kinds=kinds)
    if not isinstance(upload, Upload):
        return upload
    try:
        async with asyncio.timeout_at(deadline):  # not around the end: a commit that is cut off is one of unknown outcome
            async for chunk in download.chunks():
                await upload.write(chunk)
        return await upload.finish(details if details.file_name else _named(details, download.url))
    finally:
        await upload.abort()


def _named(details: Details, url: str) -> Details:
    """With the name that stands in the URL, if it is one."""
    try:
        name = fields.clean_name(unquote(urlsplit(url).path.rpartition("/")[2], errors="strict"), "name")
    except (InvalidRequest, UnicodeDecodeError):
        return details
    return Details(file_name=name, kind=details.kind, package_name=details.package_name, tags=details.tags, metadata=details.metadata)
