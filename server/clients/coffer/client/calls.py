"""What is asked of Coffer, in which order, and when it is asked again: as generators, which do no input or output but reading files.

A generator yields an `Ask`, and is sent the answer or thrown an `httpx.TransportError`; yields a `Pause`, and is resumed after so many
seconds; yields `Progress` for whoever wants to know. What it returns is the result. So `Client` and `AsyncClient` are two small loops.
"""

import base64
import io
import os
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin
from uuid import UUID

import httpx
import msgspec

from coffer.client.errors import ApiError, Incomplete
from coffer.client.models import (
    Callback,
    File,
    FilePage,
    Job,
    JobPage,
    Kind,
    Link,
    NewJob,
    OutputWish,
    UploadLink,
    UploadPlace,
    Usage,
)

PIECE_BYTES = 8 * 2**20
"""Of a large upload, in memory at a time. What is smaller goes in one request."""
MOST_TRIES = 8
"""Without a byte of progress: 1, 2, 4, ... 32, 32 s between them are a minute and a half."""
_LONGEST_PAUSE_SECONDS = 32.0
_TUS = {"tus-resumable": "1.0.0"}
_TUS_PATH = "/api/tus/"
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_PASSING_CODES = {"idempotency_in_progress", "upload_locked"}

T = TypeVar("T")
Source = Path | bytes | BinaryIO
"""What is uploaded: a path, bytes, or an open file that can be sought in."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `url` is a path of Coffer's, or a whole URL; only with `has_key` the API key and the user go with it."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str | int] = field(default_factory=dict)
    body: bytes | None = None
    has_key: bool = True


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an upload is. `address` is kept by who wants to go on after a crash, and given as `resume`; None where it goes at once."""

    sent_bytes: int
    total_bytes: int
    address: str | None


Steps = Generator[Ask | Pause | Progress, Any, T]


def _once(ask: Ask, tries: int = 0) -> Steps[httpx.Response | None]:
    """The answer; None, after a pause, when it may be better next time. Raises at the last try, and for what will not change."""
    last = tries + 1 >= MOST_TRIES
    pause_seconds = min(2.0**tries, _LONGEST_PAUSE_SECONDS)
    try:
        response: httpx.Response = yield ask
    except httpx.TransportError:
        if last:
            raise
        yield Pause(pause_seconds)
        return None
    if response.is_success:
        return response
    problem = ApiError.of(response)
    if last or not (response.status_code in _PASSING or problem.code in _PASSING_CODES):
        raise problem
    wished = response.headers.get("retry-after", "")
    yield Pause(max(pause_seconds, float(wished)) if wished.isdigit() else pause_seconds)
    return None


def _answered(ask: Ask) -> Steps[httpx.Response]:
    """The answer of what can be asked twice without harm. Raises `ApiError`, `httpx.TransportError`."""
    tries = 0
    while (response := (yield from _once(ask, tries))) is None:
        tries += 1
    return response


def _found(ask: Ask, kind: type[T]) -> Steps[T]:
    response = yield from _answered(ask)
    return msgspec.json.decode(response.content, type=kind)


def _json(method: str, path: str, content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Ask:
    present = {name: value for name, value in content.items() if value is not None}
    return Ask(method, path, {"content-type": "application/json", **(headers or {})}, body=msgspec.json.encode(present))


def _query(**values: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in values.items() if value is not None}


def _new_key() -> dict[str, str]:
    return {"idempotency-key": str(uuid.uuid4())}


# Files


def upload(
    source: Source,
    *,
    name: str | None,
    kind: Kind | None,
    package_name: str | None,
    tags: Sequence[str],
    metadata: Mapping[str, str],
    resume: str | None,
) -> Steps[File]:
    """Stores a file of the user. A small one in one request, a large one in pieces by tus."""
    with _opened(source) as (file, total_bytes):
        name = name or (source.name if isinstance(source, Path) else None)
        texts = {"type": kind, "package_name": package_name, "tags": ",".join(tags) or None}
        if resume is None and total_bytes <= PIECE_BYTES:
            query = _query(name=name, metadata=msgspec.json.encode(metadata).decode() if metadata else None, **texts)
            ask = Ask("POST", "/api/files/upload", {"content-type": "application/octet-stream", **_new_key()}, query, file.read())
            response = yield from _answered(ask)
            yield Progress(total_bytes, total_bytes, None)
            return msgspec.json.decode(response.content, type=File)
        told = {**metadata, "filename": name, **texts}
        file_id = yield from _in_pieces(file, total_bytes, _TUS_PATH, {}, told, resume)
    return (yield from get_file(file_id))


def upload_to(place: UploadLink | UploadPlace, source: Source, *, resume: str | None) -> Steps[UUID]:
    """Brings the one file of an upload link; its id. For who has no key, such as pipelines.

    When an answer was lost and the link is in use then, the file has come by the earlier try, or is about to.
    """
    with _opened(source) as (file, total_bytes):
        if resume is not None or total_bytes > PIECE_BYTES:
            where = urljoin(place.url, _TUS_PATH)
            return (yield from _in_pieces(file, total_bytes, where, {"upload-link": place.url}, {}, resume))
        ask = Ask("PUT", place.url, {"content-type": "application/octet-stream"}, body=file.read(), has_key=False)
        yield from _unless_done(ask, "link_used")
        yield Progress(total_bytes, total_bytes, None)
        return place.file_id


def _unless_done(ask: Ask, done_by: str) -> Steps[None]:
    """Asks for what is done once. From the second try on, the problem `done_by` says that an earlier one was it."""
    tries = 0
    try:
        while (yield from _once(ask, tries)) is None:
            tries += 1
    except ApiError as problem:
        if not (tries and problem.code == done_by):
            raise


def _in_pieces(
    file: BinaryIO, total_bytes: int, where: str, link: Mapping[str, str], metadata: Mapping[str, str | None], resume: str | None
) -> Steps[UUID]:
    """By tus: after each cut it asks how much has come, and goes on there. `link` is the header of an upload link, in place of a key."""
    headers, has_key = {**_TUS, **link}, not link
    address, sent_bytes = resume, None
    if address is None:
        told = ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in metadata.items() if value is not None)
        creation = {**headers, "upload-length": str(total_bytes), **({"upload-metadata": told} if told else {})}
        response = yield from _answered(Ask("POST", where, creation, has_key=has_key))
        address, sent_bytes = urljoin(str(response.url), response.headers["location"]), 0
    tries = 0
    while True:
        if sent_bytes is None:
            response = yield from _answered(Ask("HEAD", address, headers, has_key=has_key))
            sent_bytes = int(response.headers["upload-offset"])
            if int(response.headers.get("upload-length", total_bytes)) != total_bytes:
                raise Incomplete("the source is not as long as what was begun")
        else:
            file.seek(sent_bytes)
            piece = file.read(PIECE_BYTES)
            if not piece and sent_bytes < total_bytes:
                raise Incomplete("the source has become shorter")
            offset = {**headers, "upload-offset": str(sent_bytes), "content-type": "application/offset+octet-stream"}
            try:
                answer = yield from _once(Ask("PATCH", address, offset, body=piece, has_key=has_key), tries)
            except ApiError as problem:
                if problem.code != "offset_mismatch" or tries + 1 >= MOST_TRIES:
                    raise
                answer = None  # the answer to an earlier piece was lost
            if answer is None:
                sent_bytes, tries = None, tries + 1
                continue
            sent_bytes, tries, response = int(answer.headers["upload-offset"]), 0, answer
        yield Progress(sent_bytes, total_bytes, address)
        if sent_bytes == total_bytes:
            return UUID(response.headers["coffer-file-id"])


@contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, int]]:
    """The source from its beginning, and its length."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    else:
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        total_bytes = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        yield opened, total_bytes


def get_file(file_id: UUID) -> Steps[File]:
    """One file."""
    return _found(Ask("GET", f"/api/files/{file_id}"), File)


def list_files(*, kind: Kind | None, links: bool, limit: int | None, cursor: str | None) -> Steps[FilePage]:
    """One page of the user's files, newest first."""
    return _found(Ask("GET", "/api/files", query=_query(type=kind, links=1 if links else None, limit=limit, cursor=cursor)), FilePage)


def read(file_id: UUID) -> Steps[bytes]:
    """All bytes of a file, in memory."""
    response = yield from _answered(Ask("GET", f"/api/files/{file_id}/download"))
    return response.content


def delete_file(file_id: UUID) -> Steps[None]:
    """Deletes a file."""
    return _unless_done(Ask("DELETE", f"/api/files/{file_id}"), "not_found")


def usage() -> Steps[Usage]:
    """What the user stores."""
    return _found(Ask("GET", "/api/storage/usage"), Usage)


# Links


def link(file_id: UUID, *, ttl_seconds: int | None, disposition: str, name: str | None) -> Steps[Link]:
    """A link to read a file."""
    return _found(_json("POST", f"/api/files/{file_id}/link", {"ttl_seconds": ttl_seconds, "disposition": disposition, "name": name}), Link)


def upload_link(
    max_bytes: int, *, ttl_seconds: int | None, types: Sequence[str], file_name: str | None, kind: Kind | None
) -> Steps[UploadLink]:
    """A link to upload one file. An answer that is lost leaves a link behind, which expires."""
    wish = {"max_bytes": max_bytes, "ttl_seconds": ttl_seconds, "types": list(types), "file_name": file_name, "type": kind}
    return _found(_json("POST", "/api/uploads/links", wish), UploadLink)


def revoke_links(file_id: UUID) -> Steps[None]:
    """Ends all links to a file."""
    yield from _answered(Ask("POST", f"/api/files/{file_id}/revoke-links"))


# Jobs


def generate(
    outputs: Sequence[OutputWish],
    *,
    pipeline: str | None,
    entity: tuple[str, str] | None,
    project_id: str | None,
    model: str | None,
    prompt: str | None,
    parameters: Mapping[str, Any],
    references: Sequence[UUID],
    parent_id: UUID | None,
    callback: Callback | None,
    marks: Sequence[str] | None,
    ttl_seconds: int | None,
    idempotency_key: str | None,
) -> Steps[NewJob]:
    """Registers a job, once."""
    wish = {
        "outputs": list(outputs),
        "pipeline": pipeline,
        "entity_type": None if entity is None else entity[0],
        "entity_id": None if entity is None else entity[1],
        "project_id": project_id,
        "model": model,
        "prompt": prompt,
        "parameters": dict(parameters),
        "references": list(references),
        "parent_id": parent_id,
        "callback": callback,
        "marks": None if marks is None else list(marks),
        "ttl_seconds": ttl_seconds,
    }
    key = _new_key() if idempotency_key is None else {"idempotency-key": idempotency_key}
    return _found(_json("POST", "/api/generate", wish, key), NewJob)


def get_job(job_id: UUID) -> Steps[Job]:
    """How a job goes."""
    return _found(Ask("GET", f"/api/generate/status/{job_id}"), Job)


def await_job(job_id: UUID) -> Steps[Job]:
    """How a job has ended, or how it goes after half a minute."""
    return _found(Ask("GET", f"/api/generate/status/{job_id}", query={"wait": "end"}), Job)


def list_jobs(*, state: str | None, entity: tuple[str, str] | None, limit: int | None, cursor: str | None) -> Steps[JobPage]:
    """One page of the user's jobs, newest first."""
    entity_type, entity_id = entity or (None, None)
    query = _query(state=state, entity_type=entity_type, entity_id=entity_id, limit=limit, cursor=cursor)
    return _found(Ask("GET", "/api/generate", query=query), JobPage)


def cancel_job(job_id: UUID) -> Steps[Job]:
    """Cancels a job that has not ended."""
    return _found(Ask("POST", f"/api/generate/{job_id}/cancel"), Job)
