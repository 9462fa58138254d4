"""What the worker does for jobs: fetches outputs that lie elsewhere, has outputs marked, hands jobs on to pipelines, asks after them."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from server.errors import CofferError, LinkExpired, LinkUsed, UrlRefused
from server.fetching import Download, Fetcher, FetchFailed
from server.generation.adapters import Adapter, Failed, Finished, PipelineError, Submitted
from server.generation.marking import Marker
from server.generation.service import NOT_STORABLE, Generation, details_of
from server.intake import Intake, Upload
from server.ledger import Database, WorkCounts
from server.ledger import generation as rows
from server.ledger.backups import list_upload_stops
from server.ledger.models import Job, Output
from server.ledger.queue import Retry

ENTRYPOINT = "generation"
"""Of the jobs' queue. A payload is `fetch` or `mark` and the file id of an output, or `dispatch` and the id of a job."""

MOST_TRIES = 10
"""Of handing a job on: half an hour in all. A URL is tried until its job's end."""
FIRST_DELAY_SECONDS = 2.0
"""Before the second try; each further one waits twice as long, up to `LONGEST_DELAY_SECONDS`."""
LONGEST_DELAY_SECONDS = 300.0

log = logging.getLogger("coffer.generation")


class GenerationWorker:
    """Handles the jobs of one worker process. Rows say what is to be done; repeating is safe."""

    def __init__(
        self,
        db: Database,
        intake: Intake,
        generation: Generation,
        fetcher: Fetcher,
        adapters: Mapping[str, Adapter],
        marker: Marker,
        counts: WorkCounts | None = None,
    ) -> None:
        """`adapters` are by the names of their pipelines."""
        self._db = db
        self._intake = intake
        self._generation = generation
        self._fetcher = fetcher
        self._adapters = adapters
        self._marker = marker
        self._counts = counts or WorkCounts()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Lets go of what is being fetched, which may take long; the next worker begins it anew."""
        self._stopping.set()

    async def derive(self) -> int:
        """Queues what was lost, and tells how many those were."""
        polled = [name for name, adapter in self._adapters.items() if adapter.poll_seconds is not None]
        return await rows.derive_generation_jobs(self._db, list(self._adapters), polled)

    async def handle(self, payload: str, put_off: int) -> None:
        """Does one job of the queue. Raises `Retry`. Nothing while the store is a restored one that may not be the one that counts: what
        the rows say is derived when it is cleared, with all of its tries.
        """
        if await list_upload_stops(self._db):
            return
        what, _, about = payload.partition(" ")
        if what == "fetch":
            await self._fetch_output(UUID(about), put_off)
        elif what == "mark":
            await self._marker.handle(UUID(about), put_off)
        else:
            await self._hand_on(UUID(about), put_off)

    # Outputs that lie elsewhere

    async def _fetch_output(self, file_id: UUID, put_off: int) -> None:
        try:
            output = await rows.find_output(self._db, file_id)
            if output is None or output.state != "fetching" or output.url is None:
                return
            upload, link = await self._intake.begin_linked(file_id, declared_bytes=None, expected={})
            try:
                await self._unless_stopping(self._fetch(output, output.url, upload))
                await upload.finish(details_of(link))
                self._counts.count("output_fetch", "stored")
            finally:
                await upload.abort()
        except LinkExpired:  # the job has ended, or is about to
            return
        except LinkUsed as problem:  # somebody brings it at this moment, or a worker that died held it
            raise _later(put_off, problem) from problem
        except (*NOT_STORABLE, UrlRefused) as refused:
            await rows.fail_output(self._db, file_id, refused.code)
            self._counts.count("output_fetch", "failed")
        except FetchFailed as failed:
            if failed.may_pass and await self._is_time_left(file_id, _delay_seconds(put_off)):
                self._counts.count("output_fetch", "put_off")
                raise _later(put_off, failed) from failed
            await rows.fail_output(self._db, file_id, failed.reason)
            self._counts.count("output_fetch", "failed")
        except CofferError as problem:  # of the database, the volume or the scanner: not the output's fault
            raise _later(put_off, problem) from problem

    async def _is_time_left(self, file_id: UUID, delay_seconds: float) -> bool:
        """Whether the output's job goes on for longer than that."""
        output = await rows.find_output(self._db, file_id)
        job = None if output is None else await rows.find_job_anywhere(self._db, output.job_id)
        return job is not None and job.finished_at is None and job.expires_at > datetime.now(UTC) + timedelta(seconds=delay_seconds)

    async def _fetch(self, output: Output, url: str, upload: Upload) -> None:
        """Streams what the URL gives into the upload. A cut connection goes on where it was, if the server lets it."""
        settings = self._intake.settings
        download = Download(self._fetcher, url, most_bytes=output.max_bytes, most_bytes_per_second=settings.fetch_bytes_per_second)
        try:
            async with asyncio.timeout(settings.fetch_seconds), download:
                async for chunk in download.chunks():
                    await upload.write(chunk)
        except TimeoutError as problem:
            raise FetchFailed("timeout", may_pass=True) from problem

    async def _unless_stopping(self, work: Coroutine[Any, Any, None]) -> None:
        """Raises `Retry` when the worker stops before the work is done."""
        working, stopped = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
        if working.cancelled():
            raise Retry(0, "the worker is stopping")
        working.result()

    # Pipelines that Coffer calls

    async def _hand_on(self, job_id: UUID, put_off: int) -> None:
        job = await rows.find_job_anywhere(self._db, job_id)
        adapter = None if job is None or job.pipeline is None else self._adapters.get(job.pipeline)
        if job is None or job.finished_at is not None or adapter is None:
            return
        try:
            if job.remote_id is None:
                taken = await adapter.submit(await self._generation.ticket(job))
                await rows.set_remote_id(self._db, job.id, taken.remote_id)
                if adapter.poll_seconds is not None:
                    raise Retry(adapter.poll_seconds, "to be asked after")
            elif adapter.poll_seconds is not None:
                await self._ask_after(job, job.remote_id, adapter, adapter.poll_seconds)
        except PipelineError as problem:
            if not problem.is_final and (put_off + 1 < MOST_TRIES or job.remote_id is not None):
                raise _later(put_off if job.remote_id is None else 0, problem) from problem
            await self._report(job, Failed(str(problem)))
        except CofferError as problem:
            raise _later(put_off, problem) from problem

    async def _ask_after(self, job: Job, remote_id: str, adapter: Adapter, poll_seconds: int) -> None:
        found = await adapter.poll(remote_id)
        if isinstance(found, Submitted):
            if found.progress_percent is not None:
                await self._say(job, "running", progress_percent=found.progress_percent)
            raise Retry(poll_seconds, "still at work")
        await self._report(job, found)

    async def _report(self, job: Job, found: Finished | Failed) -> None:
        if isinstance(found, Failed):
            await self._say(job, "failed", error=found.error[:2000].replace("\0", ""))
            return
        for index, url in enumerate(found.urls[: job.output_count]):
            await rows.fetch_output(self._db, job.id, index, url)
        await self._say(job, "completed")
        self._intake.waker.wake()

    async def _say(self, job: Job, outcome: rows.Outcome, *, progress_percent: int | None = None, error: str | None = None) -> None:
        await rows.report_job(
            self._db,
            job.id,
            sender="coffer",
            message_id=None,
            outcome=outcome,
            progress_percent=progress_percent,
            error=error,
        )


def _delay_seconds(put_off: int) -> float:
    return min(FIRST_DELAY_SECONDS * 2.0 ** min(put_off, 20), LONGEST_DELAY_SECONDS)


def _later(put_off: int, problem: Exception) -> Retry:
    log.info("will try again: %s", type(problem).__name__)
    return Retry(_delay_seconds(put_off), f"{type(problem).__name__}: {problem}")
