"""What pipelines say: the bodies of `POST /api/generate/webhook`."""

from decimal import Decimal
from typing import Annotated, Literal
from urllib.parse import urlsplit
from uuid import UUID

import msgspec
from msgspec import Meta

from server.errors import InvalidRequest

MOST_OUTPUTS = 100
_LONGEST_URL = 4096
_MOST_CREDITS = Decimal(10**12)


class OutputMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One output, by its index in the job: its bytes in `base64`, or a `url` that Coffer is to fetch it from."""

    index: Annotated[int, Meta(ge=0, lt=MOST_OUTPUTS)]
    base64: bytes | None = None
    url: Annotated[str, Meta(max_length=_LONGEST_URL)] | None = None


class JobMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """About which job, and what there is to say of it. `error` is for people; `credits_used` are those of the whole job so far."""

    job_id: UUID
    outputs: Annotated[list[OutputMessage], Meta(max_length=MOST_OUTPUTS)] = []
    progress_percent: Annotated[int, Meta(ge=0, le=100)] | None = None
    credits_used: Decimal | None = None
    error: Annotated[str, Meta(max_length=2000)] | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`job.progress` leaves the job running; `job.completed` and `job.failed` say that nothing more will come than is on its way."""

    type: Literal["job.progress", "job.completed", "job.failed"]
    data: JobMessage
    timestamp: str | None = None


_decoder = msgspec.json.Decoder(Message)


def parse(body: bytes) -> Message:
    """The message in a body that is known to be its pipeline's. Raises `InvalidRequest` naming the field."""
    try:
        message = _decoder.decode(body)
    except msgspec.DecodeError as problem:
        reason, _, path = str(problem).partition(" - at `$.")
        raise InvalidRequest(path.rstrip("`") or "body", reason) from problem
    except (UnicodeDecodeError, RecursionError) as problem:
        raise InvalidRequest("body", "must be JSON in UTF-8") from problem
    data = message.data
    if data.credits_used is not None and not (data.credits_used.is_finite() and 0 <= data.credits_used <= _MOST_CREDITS):
        raise InvalidRequest("data.credits_used", f"must be from 0 to {_MOST_CREDITS}")
    if len({output.index for output in data.outputs}) < len(data.outputs):
        raise InvalidRequest("data.outputs", "must name each output once")
    for output in data.outputs:
        if (output.base64 is None) == (output.url is None):
            raise InvalidRequest("data.outputs", "each needs either base64 or url")
        if output.url is not None and not is_fetchable(output.url):
            raise InvalidRequest("data.outputs", "url must be an http or https URL without credentials")
    if data.error is not None and "\0" in data.error:
        raise InvalidRequest("data.error", "must not contain NUL characters")
    return message


def is_fetchable(url: str) -> bool:
    """Whether it has the shape of a URL that the worker may try. Whether it may go there is judged when it goes."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if parts.scheme not in {"http", "https"} or not host or "@" in parts.netloc:
        return False
    return url.isascii() and url.isprintable() and " " not in url
