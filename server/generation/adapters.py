"""How Coffer calls pipelines by itself. A third adapter is a class with these two methods, its name in `Pipeline.adapter`
(server/setting_values.py), and two lines in `adapter_of`. Tests answer for the pipeline with `tests/generation/fakes.py`.

`DispatchAdapter` posts each job to a URL and hears of it by webhook: for functions on GPUs. `PollingAdapter` submits a job to a model API
that answers "processing, fetch later", and asks after it. Both speak to addresses of the settings alone: no user names any of them.
"""

import time
import uuid
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import quote, urljoin, urlsplit

import httpx
import msgspec
from standardwebhooks import Webhook

from server.generation.messages import is_fetchable
from server.generation.service import Ticket
from server.setting_values import Pipeline

TIMEOUT_SECONDS = 30.0
MOST_ANSWER_BYTES = 2**20
_CLIENT_ERRORS_TO_TRY_AGAIN = {408, 409, 425, 429}


class PipelineError(Exception):
    """The pipeline did not do what it was asked; told to the app as the job's error when `is_final`, or when it goes on too long."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


class Submitted(msgspec.Struct, frozen=True):
    """The pipeline is at work on what it calls `remote_id`."""

    remote_id: str
    progress_percent: int | None = None


class Finished(msgspec.Struct, frozen=True):
    """It is done; the outputs lie at these URLs, in their order."""

    urls: list[str]


class Failed(msgspec.Struct, frozen=True):
    """It will not be done."""

    error: str


class Adapter(Protocol):
    """One pipeline that Coffer calls. Both methods may be called again for the same job, also by another process; both raise
    `PipelineError`. `poll` is called each `poll_seconds` after a job was submitted; None: it never is, and the pipeline tells by webhook.
    """

    poll_seconds: int | None

    async def submit(self, ticket: Ticket) -> Submitted: ...

    async def poll(self, remote_id: str) -> Submitted | Finished | Failed: ...


def adapter_of(pipeline: Pipeline, client: httpx.AsyncClient) -> Adapter | None:
    """What calls that pipeline, or None where it comes by itself."""
    match pipeline.adapter:
        case "dispatch":
            return DispatchAdapter(pipeline, client)
        case "polling":
            return PollingAdapter(pipeline, client)
        case _:
            return None


def new_client() -> httpx.AsyncClient:
    """For all adapters of a process. No proxy, no cookie and no redirect leads a job elsewhere than the settings say."""
    return httpx.AsyncClient(timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False)


class DispatchAdapter:
    """Posts the ticket as `{"type": "job.created", "timestamp": …, "data": {…}}`, signed by Standard Webhooks with the pipeline's first
    secret. The message's id is the same each time, so a receiver knows a repetition. Any 2xx takes the job; an `id` in the answer is kept.
    """

    poll_seconds: int | None = None

    def __init__(self, pipeline: Pipeline, client: httpx.AsyncClient) -> None:
        self._pipeline = pipeline
        self._client = client

    async def submit(self, ticket: Ticket) -> Submitted:
        """Hands the job on. Raises `PipelineError`."""
        now = datetime.fromtimestamp(int(time.time()), UTC)
        body = msgspec.json.encode({"type": "job.created", "timestamp": now, "data": ticket})
        message_id = f"job_{uuid.uuid5(ticket.job_id, 'dispatch').hex}"
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(self._pipeline.secrets[0]).sign(message_id, now, body.decode()),
        }
        answer = await _asked(self._client, "POST", self._pipeline.url or "", headers, body)
        remote_id = answer.get("id") if isinstance(answer, dict) else None
        return Submitted(remote_id[:512] if isinstance(remote_id, str) and remote_id else message_id)

    async def poll(self, remote_id: str) -> Submitted | Finished | Failed:
        """Never called."""
        return Submitted(remote_id)


class PollingAdapter:
    """Submits `{"model", "prompt", "parameters", "references", "outputs"}` to the pipeline's URL and asks at the URL that the answer names.

    An answer is `{"id": …, "status": …, "output": …, "error": …, "progress": …, "urls": {"get": …}}`, as model APIs commonly give:
    `status` is `succeeded` or `completed`, `failed`, `error`, `canceled` or `cancelled`, and else it is under way; `output` is a URL or a
    list of URLs. Without `urls.get` the job is asked for below the URL, by its id; `urls.get` must be of the same origin.
    """

    def __init__(self, pipeline: Pipeline, client: httpx.AsyncClient) -> None:
        self._url = pipeline.url or ""
        self._headers = {"content-type": "application/json"}
        if pipeline.token is not None:
            self._headers["authorization"] = f"Bearer {pipeline.token}"
        self._client = client
        self.poll_seconds: int | None = pipeline.poll_seconds

    async def submit(self, ticket: Ticket) -> Submitted:
        """Hands the job on. The remote id is the URL to ask at. Raises `PipelineError`."""
        body = msgspec.json.encode(
            {
                "model": ticket.model,
                "prompt": ticket.prompt,
                "parameters": ticket.parameters,
                "references": [reference.url for reference in ticket.references],
                "outputs": len(ticket.uploads),
            }
        )
        headers = {**self._headers, "idempotency-key": str(ticket.job_id)}
        answer = await _asked(self._client, "POST", self._url, headers, body)
        found = answer if isinstance(answer, dict) else {}
        urls = found.get("urls")
        where = urls.get("get") if isinstance(urls, dict) else None
        if where is None and isinstance(found.get("id"), str | int):
            where = f"{self._url.rstrip('/')}/{quote(str(found['id']), safe='')}"
        if not isinstance(where, str) or len(where) > 512 or not self._is_own(where):
            raise PipelineError("the pipeline's answer does not tell where to ask", is_final=True)
        return Submitted(where)

    async def poll(self, remote_id: str) -> Submitted | Finished | Failed:
        """How it goes. Raises `PipelineError`."""
        answer = await _asked(self._client, "GET", remote_id, self._headers, None)
        found = answer if isinstance(answer, dict) else {}
        match str(found.get("status", "")).lower():
            case "succeeded" | "completed":
                output = found.get("output")
                urls = [output] if isinstance(output, str) else output if isinstance(output, list) else []
                if not urls or not all(isinstance(url, str) and len(url) <= 4096 and is_fetchable(url) for url in urls):
                    return Failed("the pipeline named no output that can be fetched")
                return Finished(urls)
            case "failed" | "error" | "canceled" | "cancelled" as status:
                error = found.get("error")
                return Failed(error if isinstance(error, str) and error else status)
            case _:
                progress = found.get("progress")
                known = isinstance(progress, int) and not isinstance(progress, bool) and 0 <= progress <= 100
                return Submitted(remote_id, progress if known else None)

    def _is_own(self, where: str) -> bool:
        """The token goes nowhere but to where the settings send it."""
        try:
            parts, own = urlsplit(urljoin(self._url, where)), urlsplit(self._url)
        except ValueError:
            return False
        return is_fetchable(where) and (parts.scheme, parts.netloc) == (own.scheme, own.netloc)


async def _asked(client: httpx.AsyncClient, method: str, url: str, headers: dict[str, str], body: bytes | None) -> Any:
    """The JSON of an answer, None where it is none. Raises `PipelineError`; what the pipeline said in words is not repeated."""
    try:
        async with client.stream(method, url, headers=headers, content=body) as answer:
            content = b""
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > MOST_ANSWER_BYTES:
                    raise PipelineError("the pipeline's answer is too long", is_final=True)
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise PipelineError(f"the pipeline cannot be reached: {type(problem).__name__}", is_final=False) from problem
    if not answer.is_success:
        again = answer.status_code >= 500 or answer.status_code in _CLIENT_ERRORS_TO_TRY_AGAIN
        raise PipelineError(f"the pipeline answered {answer.status_code}", is_final=not again)
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
