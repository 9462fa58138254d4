"""`POST /api/generate/webhook`: what pipelines say of their jobs, signed by Standard Webhooks, as bare ASGI.

The query says who speaks: `?job=` its holder, `?pipeline=` one of the settings'. So the secret is known before the body is read, and
nothing of the body is parsed, or looked up, before its signature was found right.
"""

from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qsl
from uuid import UUID

from server.api.door import act_in
from server.api.files import id_of
from server.api.job_events import is_method
from server.api.problems import HttpRefusal
from server.api.services import Services
from server.api.streams import Receive, Send
from server.api.upload import body_pieces, send_json
from server.errors import InvalidRequest, NotFound, RateLimited, Unauthenticated
from server.generation import messages, signatures
from server.generation.service import WEBHOOK_PATH
from server.ledger import generation as rows
from server.ledger.models import Job

MOST_BUFFERED_MESSAGES = 8
"""A process holds so many times the largest message, of all senders together: a body must be whole before its signature can be judged."""

_NAMES = {b"webhook-id", b"webhook-timestamp", b"webhook-signature"}


class WebhookDoor:
    """One per process."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._buffered_bytes = 0

    def template(self, path: str) -> str:
        """The route of a path, for logs and metrics."""
        return WEBHOOK_PATH

    async def answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Takes one message. Raises `Unauthenticated` for a signature that is wrong or old, `InvalidRequest`, `NotFound` for a job that is
        not the sender's, `RateLimited` also while too many bodies are held, and what storing an output raises.
        """
        if scope["path"] != WEBHOOK_PATH:
            raise NotFound
        if not await is_method(scope, send, "POST"):
            return
        services = self._services
        services.limits.check_failures(scope)
        services.limits.count_link(scope)
        job_id, pipeline = _speaker(scope)
        held = [0]
        try:
            try:
                body = await self._authenticated(scope, receive, job_id, pipeline, held)
            except Unauthenticated:
                services.limits.count_failure(scope)
                raise
            message = messages.parse(body)
            del body
            job = await self._job(message.data.job_id, job_id, pipeline)
            act_in(scope, "pipeline", pipeline or str(job.id), job.user_id)
            sender = f"job/{job.id}" if pipeline is None else f"pipeline/{pipeline}"
            answer = await services.generation.take(message, sender=sender, message_id=_headers(scope)["webhook-id"], job=job)
        finally:
            self._buffered_bytes -= held[0]
        await send_json(send, 200, answer, [])

    async def _authenticated(
        self, scope: MutableMapping[str, Any], receive: Receive, job_id: UUID | None, pipeline: str | None, held: list[int]
    ) -> bytes:
        headers = _headers(scope)
        if job_id is not None:
            secrets = self._services.generation.job_secrets(job_id)
        else:
            known = self._services.generation.pipeline(pipeline)
            secrets = [] if known is None else list(known.secrets)
        if not secrets:
            raise Unauthenticated
        body = await self._body(receive, held)
        signatures.check(secrets, headers, body)
        return body

    async def _body(self, receive: Receive, held: list[int]) -> bytes:
        """The body as a whole. `held` counts its bytes, which the caller gives back."""
        most = self._services.settings.generation_message_bytes
        pieces = []
        async for piece in body_pieces(receive):
            held[0] += len(piece)
            self._buffered_bytes += len(piece)
            if held[0] > most:
                raise HttpRefusal(413)
            if self._buffered_bytes > MOST_BUFFERED_MESSAGES * most:
                raise RateLimited("webhooks", 1)
            pieces.append(piece)
        return b"".join(pieces)

    async def _job(self, named: UUID, job_id: UUID | None, pipeline: str | None) -> Job:
        if job_id is not None and named != job_id:
            raise InvalidRequest("data.job_id", "is another one than in the query")
        job = await rows.find_job_anywhere(self._services.db, named)
        if job is None or (pipeline is not None and job.pipeline != pipeline):
            raise NotFound
        return job


def _speaker(scope: MutableMapping[str, Any]) -> tuple[UUID | None, str | None]:
    """The job or the pipeline that speaks, by the query."""
    try:
        query = parse_qsl(scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=2, errors="strict")
    except ValueError:
        query = []
    match query:
        case [("job", text)] if (job_id := id_of(text)) is not None:
            return job_id, None
        case [("pipeline", name)] if name:
            return None, name
        case _:
            raise InvalidRequest("query", "must be job=<its id> or pipeline=<its name>")


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    """The three headers of a signature, also under svix' names. Raises `Unauthenticated` for one that is missing or sent twice."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        standard = b"webhook-" + name[5:] if name.startswith(b"svix-") else name
        if standard in _NAMES:
            if standard.decode("ascii") in found:
                raise Unauthenticated
            found[standard.decode("ascii")] = value.decode("latin-1")
    if len(found) < len(_NAMES):
        raise Unauthenticated
    return found
