"""The two clients: the same calls, one that waits and one that is awaited."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar
from uuid import UUID

import httpx

from coffer.client import calls
from coffer.client.calls import Ask, Pause, Progress, Source, Steps
from coffer.client.models import (
    Callback,
    File,
    FilePage,
    Job,
    JobPage,
    JobState,
    Kind,
    Link,
    NewJob,
    OutputWish,
    UploadLink,
    UploadPlace,
    Usage,
)

T = TypeVar("T")
OnProgress = Callable[[Progress], None]
Disposition = Literal["inline", "attachment"]

TIMEOUT_SECONDS = 60.0
"""Above the half minute for which Coffer has `wait_for_job` wait."""


@dataclass(frozen=True, slots=True)
class _Result(Generic[T]):
    value: T


def _step(steps: Steps[T], given: Any) -> Ask | Pause | Progress | _Result[T]:
    """What comes next when the one before gave this; a `TransportError` is thrown."""
    try:
        return steps.throw(given) if isinstance(given, httpx.TransportError) else steps.send(given)
    except StopIteration as end:
        return _Result(end.value)


class _Requests:
    """How an `Ask` becomes a request: where Coffer is, and as whom it is asked."""

    def __init__(self, url: str, api_key: str | None, user_id: str | None) -> None:
        self._url = httpx.URL(url.rstrip("/") + "/")
        self._key: list[tuple[bytes, bytes]] = []
        if api_key is not None:
            self._key.append((b"authorization", b"Bearer " + api_key.encode()))
        if user_id is not None:
            self._key.append((b"x-user-id", user_id.encode()))

    def of(self, ask: Ask) -> dict[str, Any]:
        """The arguments of httpx' `request`. The key goes to Coffer's own origin alone."""
        url = self._url.join(ask.url)
        headers = [(name.encode(), value.encode()) for name, value in ask.headers.items()]
        if ask.has_key:
            if (url.scheme, url.host, url.port) != (self._url.scheme, self._url.host, self._url.port):
                raise ValueError(f"{url.host} is not where this client's API key belongs")
            headers += self._key
        if ask.query:
            url = url.copy_merge_params(dict(ask.query))
        return {"method": ask.method, "url": url, "headers": headers, "content": ask.body}


class Client:
    """Coffer, asked and waited for. Not for several threads at once, no more than its `httpx.Client` is.

    `api_key` may be a user's own token, which needs no `user_id`. Without any, only `upload_to` is of use. What may pass is tried again for
    a minute and a half; then the failure is raised.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, user_id: str | None = None, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self._requests = _Requests(url, api_key, user_id)
        self._http = httpx.Client(timeout=timeout_seconds)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of its connections."""
        self._http.close()

    def _do(self, steps: Steps[T], progress: OnProgress | None = None) -> T:
        given: Any = None
        with closing(steps):
            while True:
                match _step(steps, given):
                    case Ask() as ask:
                        try:
                            given = self._http.request(**self._requests.of(ask))
                        except httpx.TransportError as problem:
                            given = problem
                    case Pause(seconds):
                        time.sleep(seconds)
                        given = None
                    case Progress() as reached:
                        if progress is not None:
                            progress(reached)
                        given = None
                    case _Result(value):
                        return value

    def upload(
        self,
        source: Source,
        *,
        name: str | None = None,
        kind: Kind | None = None,
        package_name: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        resume: str | None = None,
        progress: OnProgress | None = None,
    ) -> File:
        """Stores a file. A large one goes in pieces and goes on after each cut; with `resume`, from where an earlier process was."""
        steps = calls.upload(source, name=name, kind=kind, package_name=package_name, tags=tags, metadata=metadata or {}, resume=resume)
        return self._do(steps, progress)

    def upload_to(
        self, place: UploadLink | UploadPlace, source: Source, *, resume: str | None = None, progress: OnProgress | None = None
    ) -> UUID:
        """Brings the one file of an upload link, and needs no key for it."""
        return self._do(calls.upload_to(place, source, resume=resume), progress)

    def file(self, file_id: UUID) -> File:
        """One file."""
        return self._do(calls.get_file(file_id))

    def files(self, *, kind: Kind | None = None, links: bool = False, limit: int | None = None, cursor: str | None = None) -> FilePage:
        """One page of the user's files, newest first; `links` gives each its link."""
        return self._do(calls.list_files(kind=kind, links=links, limit=limit, cursor=cursor))

    def read(self, file_id: UUID) -> bytes:
        """All bytes of a file, in memory."""
        return self._do(calls.read(file_id))

    def delete(self, file_id: UUID) -> None:
        """Deletes a file, or moves it to the trash where there is one."""
        self._do(calls.delete_file(file_id))

    def usage(self) -> Usage:
        """What the user stores."""
        return self._do(calls.usage())

    def link(self, file_id: UUID, *, ttl_seconds: int | None = None, disposition: Disposition = "inline", name: str | None = None) -> Link:
        """A link to read a file."""
        return self._do(calls.link(file_id, ttl_seconds=ttl_seconds, disposition=disposition, name=name))

    def upload_link(
        self,
        max_bytes: int,
        *,
        ttl_seconds: int | None = None,
        types: Sequence[str] = (),
        file_name: str | None = None,
        kind: Kind | None = None,
    ) -> UploadLink:
        """A link to upload one file of at most `max_bytes`; `types` are kinds or MIME types."""
        return self._do(calls.upload_link(max_bytes, ttl_seconds=ttl_seconds, types=types, file_name=file_name, kind=kind))

    def revoke_links(self, file_id: UUID) -> None:
        """Ends all links to a file."""
        self._do(calls.revoke_links(file_id))

    def generate(
        self,
        outputs: Sequence[OutputWish],
        *,
        pipeline: str | None = None,
        entity: tuple[str, str] | None = None,
        project_id: str | None = None,
        model: str | None = None,
        prompt: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        references: Sequence[UUID] = (),
        parent_id: UUID | None = None,
        callback: Callback | None = None,
        marks: Sequence[Literal["iptc", "c2pa"]] | None = None,
        ttl_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> NewJob:
        """Registers a job. `entity` is its type and id; `marks` are some of the server's, None all of them.

        Without an `idempotency_key` of yours each call makes one job.
        """
        steps = calls.generate(
            outputs,
            pipeline=pipeline,
            entity=entity,
            project_id=project_id,
            model=model,
            prompt=prompt,
            parameters=parameters or {},
            references=references,
            parent_id=parent_id,
            callback=callback,
            marks=marks,
            ttl_seconds=ttl_seconds,
            idempotency_key=idempotency_key,
        )
        return self._do(steps)

    def job(self, job_id: UUID) -> Job:
        """How a job goes."""
        return self._do(calls.get_job(job_id))

    def wait_for_job(self, job_id: UUID, *, seconds: float | None = None) -> Job:
        """How a job has ended; None waits as long as it takes. Raises TimeoutError."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while (job := self._do(calls.await_job(job_id))).finished_at is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} is still {job.state}")
        return job

    def jobs(
        self,
        *,
        state: JobState | None = None,
        entity: tuple[str, str] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> JobPage:
        """One page of the user's jobs, newest first."""
        return self._do(calls.list_jobs(state=state, entity=entity, limit=limit, cursor=cursor))

    def cancel_job(self, job_id: UUID) -> Job:
        """Cancels a job that has not ended; what is stored stays."""
        return self._do(calls.cancel_job(job_id))


class AsyncClient:
    """`Client`, to be awaited: one event loop, any number of calls at once. Files are read in threads."""

    def __init__(
        self, url: str, *, api_key: str | None = None, user_id: str | None = None, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self._requests = _Requests(url, api_key, user_id)
        self._http = httpx.AsyncClient(timeout=timeout_seconds)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Lets go of its connections."""
        await self._http.aclose()

    async def _do(self, steps: Steps[T], progress: OnProgress | None = None) -> T:
        given: Any = None
        with closing(steps):
            while True:
                match await asyncio.to_thread(_step, steps, given):
                    case Ask() as ask:
                        try:
                            given = await self._http.request(**self._requests.of(ask))
                        except httpx.TransportError as problem:
                            given = problem
                    case Pause(seconds):
                        await asyncio.sleep(seconds)
                        given = None
                    case Progress() as reached:
                        if progress is not None:
                            progress(reached)
                        given = None
                    case _Result(value):
                        return value

    async def upload(
        self,
        source: Source,
        *,
        name: str | None = None,
        kind: Kind | None = None,
        package_name: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        resume: str | None = None,
        progress: OnProgress | None = None,
    ) -> File:
        """Stores a file. A large one goes in pieces and goes on after each cut; with `resume`, from where an earlier process was."""
        steps = calls.upload(source, name=name, kind=kind, package_name=package_name, tags=tags, metadata=metadata or {}, resume=resume)
        return await self._do(steps, progress)

    async def upload_to(
        self, place: UploadLink | UploadPlace, source: Source, *, resume: str | None = None, progress: OnProgress | None = None
    ) -> UUID:
        """Brings the one file of an upload link, and needs no key for it."""
        return await self._do(calls.upload_to(place, source, resume=resume), progress)

    async def file(self, file_id: UUID) -> File:
        """One file."""
        return await self._do(calls.get_file(file_id))

    async def files(
        self, *, kind: Kind | None = None, links: bool = False, limit: int | None = None, cursor: str | None = None
    ) -> FilePage:
        """One page of the user's files, newest first; `links` gives each its link."""
        return await self._do(calls.list_files(kind=kind, links=links, limit=limit, cursor=cursor))

    async def read(self, file_id: UUID) -> bytes:
        """All bytes of a file, in memory."""
        return await self._do(calls.read(file_id))

    async def delete(self, file_id: UUID) -> None:
        """Deletes a file, or moves it to the trash where there is one."""
        await self._do(calls.delete_file(file_id))

    async def usage(self) -> Usage:
        """What the user stores."""
        return await self._do(calls.usage())

    async def link(
        self, file_id: UUID, *, ttl_seconds: int | None = None, disposition: Disposition = "inline", name: str | None = None
    ) -> Link:
        """A link to read a file."""
        return await self._do(calls.link(file_id, ttl_seconds=ttl_seconds, disposition=disposition, name=name))

    async def upload_link(
        self,
        max_bytes: int,
        *,
        ttl_seconds: int | None = None,
        types: Sequence[str] = (),
        file_name: str | None = None,
        kind: Kind | None = None,
    ) -> UploadLink:
        """A link to upload one file of at most `max_bytes`; `types` are kinds or MIME types."""
        return await self._do(calls.upload_link(max_bytes, ttl_seconds=ttl_seconds, types=types, file_name=file_name, kind=kind))

    async def revoke_links(self, file_id: UUID) -> None:
        """Ends all links to a file."""
        await self._do(calls.revoke_links(file_id))

    async def generate(
        self,
        outputs: Sequence[OutputWish],
        *,
        pipeline: str | None = None,
        entity: tuple[str, str] | None = None,
        project_id: str | None = None,
        model: str | None = None,
        prompt: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        references: Sequence[UUID] = (),
        parent_id: UUID | None = None,
        callback: Callback | None = None,
        marks: Sequence[Literal["iptc", "c2pa"]] | None = None,
        ttl_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> NewJob:
        """Registers a job. `entity` is its type and id; `marks` are some of the server's, None all of them.

        Without an `idempotency_key` of yours each call makes one job.
        """
        steps = calls.generate(
            outputs,
            pipeline=pipeline,
            entity=entity,
            project_id=project_id,
            model=model,
            prompt=prompt,
            parameters=parameters or {},
            references=references,
            parent_id=parent_id,
            callback=callback,
            marks=marks,
            ttl_seconds=ttl_seconds,
            idempotency_key=idempotency_key,
        )
        return await self._do(steps)

    async def job(self, job_id: UUID) -> Job:
        """How a job goes."""
        return await self._do(calls.get_job(job_id))

    async def wait_for_job(self, job_id: UUID, *, seconds: float | None = None) -> Job:
        """How a job has ended; None waits as long as it takes. Raises TimeoutError."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while (job := await self._do(calls.await_job(job_id))).finished_at is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} is still {job.state}")
        return job

    async def jobs(
        self,
        *,
        state: JobState | None = None,
        entity: tuple[str, str] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> JobPage:
        """One page of the user's jobs, newest first."""
        return await self._do(calls.list_jobs(state=state, entity=entity, limit=limit, cursor=cursor))

    async def cancel_job(self, job_id: UUID) -> Job:
        """Cancels a job that has not ended; what is stored stays."""
        return await self._do(calls.cancel_job(job_id))
