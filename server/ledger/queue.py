"""PgQueuer on our database. Only the worker imports this: a server that makes no previews needs no PgQueuer.

What was found necessary: failed jobs are held, running ones are never cancelled, and few are taken ahead, so that what comes late but
matters more need not wait for them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
from pgqueuer.adapters.drivers.asyncpg import AsyncpgPoolDriver
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain.errors import RetryRequested
from pgqueuer.domain.models import Job

from server.ledger.database import CONNECT_SECONDS, QUEUE_CONNECTIONS
from server.ledger.figures import WORKER_APPLICATION

ENTRYPOINT = "preview"

_TAKEN_AHEAD = 8
"""Jobs that one look at the queue takes. The next look comes up to 0.1 s later, so this keeps decoders busy that take 12 ms or more."""
VARIANT_AWAITED = timedelta(minutes=10)
"""Then nobody waits for a variant any more. Its job goes; one that kills its workers, whose tries nobody counts, has ended then."""
_POLL = timedelta(seconds=2)  # for jobs whose waking call was lost


class Retry(Exception):
    """Raised by a handler whose job is to be tried once more, `delay_seconds` from now."""

    def __init__(self, delay_seconds: float, reason: str) -> None:
        super().__init__(reason)
        self.delay_seconds = delay_seconds


Handler = Callable[[UUID, str | None, int, tuple[int, int]], Awaitable[None]]
"""Is given a file's id, the name of a variant of it or None for its previews, how often the job has been put off by `Retry`, and the job's
place: the lowest comes first. May be called twice for a job, also in two processes. What it raises, except `Retry`, leaves the job held as
failed. A job whose worker died comes back as it was: PgQueuer counts only what is put off."""


TextHandler = Callable[[str, int], Awaitable[None]]
"""Is given a job's payload as text, and how often it has been put off. The rest is as for `Handler`."""


async def run_jobs(database_url: str, handler: Handler, stopping: asyncio.Event, *, heartbeat_seconds: float) -> None:
    """Runs jobs of previews until `stopping`, then waits for those under way. Raises when the database is lost; start it again then.

    A worker that dies loses nothing: another takes its jobs when they have had no heartbeat for `heartbeat_seconds`.
    """

    async def handle(job: Job) -> None:
        file_id, _, variant = (job.payload or b"").decode().partition(" ")
        if variant and datetime.now(UTC) - job.created > VARIANT_AWAITED:
            return
        await handler(UUID(file_id), variant or None, job.attempts, (-job.priority, job.id))

    await _run(database_url, ENTRYPOINT, handle, stopping, heartbeat_seconds)


async def run_text_jobs(
    database_url: str, entrypoint: str, handler: TextHandler, stopping: asyncio.Event, *, heartbeat_seconds: float
) -> None:
    """As `run_jobs`, for the jobs of another entry point. They wait for networks, so they have places of their own beside the previews'."""

    async def handle(job: Job) -> None:
        await handler((job.payload or b"").decode(), job.attempts)

    await _run(database_url, entrypoint, handle, stopping, heartbeat_seconds)


async def _run(
    database_url: str, entrypoint: str, handle: Callable[[Job], Awaitable[None]], stopping: asyncio.Event, heartbeat_seconds: float
) -> None:
    pool = await asyncpg.create_pool(
        database_url,
        min_size=1,
        max_size=QUEUE_CONNECTIONS,
        timeout=CONNECT_SECONDS,
        server_settings={"application_name": WORKER_APPLICATION},
    )
    try:
        manager = QueueManager(Queries(AsyncpgPoolDriver(pool)))

        async def put_off(job: Job) -> None:
            try:
                await handle(job)
            except Retry as problem:
                raise RetryRequested(delay=timedelta(seconds=problem.delay_seconds), reason=str(problem)) from problem

        manager.entrypoint(entrypoint, on_failure="hold", accepts_context=False)(put_off)
        running = asyncio.create_task(
            manager.run(
                dequeue_timeout=_POLL,
                batch_size=_TAKEN_AHEAD,
                max_concurrent_tasks=2 * _TAKEN_AHEAD,
                heartbeat_timeout=timedelta(seconds=heartbeat_seconds),
                shutdown_on_listener_failure=True,
            )
        )
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        manager.shutdown.set()
        await running
    finally:
        pool.terminate()
