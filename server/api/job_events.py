"""`GET /api/generate/events/{job_id}`: how a job goes as server-sent events, as bare ASGI."""

import asyncio
from collections.abc import MutableMapping
from functools import partial
from typing import Any
from uuid import UUID

import msgspec

from server.api.door import admit
from server.api.files import id_of
from server.api.generate import job_answer, visible_job
from server.api.problems import HttpRefusal
from server.api.services import Services
from server.api.streams import HEARTBEAT, Receive, Send, Stream
from server.auth import Principal, Scope
from server.errors import NotFound
from server.ledger.generation import job_notice

EVENTS_PATH = "/api/generate/events"


class JobEventsDoor:
    """Tells a job as it is, and again whenever it has changed, until it has ended. One per process."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def template(self, path: str) -> str:
        """The route of a path below `EVENTS_PATH`, for logs and metrics."""
        return f"{EVENTS_PATH}/{{job_id}}"

    async def answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Follows one job. The stream ends with the job, or as that of files does; connecting again is right unless the job has ended.

        Raises `NotFound`, `TooManyStreams`, and `DatabaseUnavailable` when nothing can be heard.
        """
        if not await is_method(scope, send, "GET"):
            return
        services = self._services
        principal = await admit(services, scope, Scope.FILES_READ)
        job_id = id_of(scope["path"].removeprefix(EVENTS_PATH).strip("/"))
        if job_id is None:
            raise NotFound
        await visible_job(services, principal, job_id)
        with services.streams.opened(principal.owner), services.notices.of(job_notice(job_id)) as noticed:
            await services.notices.listening()
            await services.streams.answer(receive, send, partial(self._tell, principal, job_id, noticed))

    async def _tell(self, principal: Principal, job_id: UUID, noticed: asyncio.Event, stream: Stream) -> None:
        told = b""
        while True:
            noticed.clear()
            job = await visible_job(self._services, principal, job_id)
            answer = await job_answer(self._services, job)
            # Its time goes on by itself, which is no news.
            news = msgspec.json.encode(msgspec.structs.replace(answer, processing_seconds=None) if job.finished_at is None else answer)
            await stream.tell(HEARTBEAT if news == told else b"event: job\ndata: %b\n\n" % msgspec.json.encode(answer))
            told = news
            if job.finished_at is not None or not await stream.wait(noticed.wait()):
                return


async def is_method(scope: MutableMapping[str, Any], send: Send, method: str) -> bool:
    """Whether the request is to be answered by the route's one method. Answers OPTIONS itself; raises `HttpRefusal` for every other."""
    if scope["method"] == method:
        return True
    allow = f"{method}, OPTIONS"
    if scope["method"] != "OPTIONS":
        raise HttpRefusal(405, {"allow": allow})
    await send({"type": "http.response.start", "status": 204, "headers": [(b"allow", allow.encode("ascii"))]})
    await send({"type": "http.response.body", "body": b""})
    return False
