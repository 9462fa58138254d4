"""The worker process: runs queued jobs, brings back those that were lost, and speaks to other machines: events out, files in."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from uuid import UUID

from server import ledger, logs, supervision
from server.assets import AssetWorker
from server.delivery import Links
from server.errors import CofferError
from server.fetching import Fetcher, Rules
from server.generation import Generation
from server.generation.adapters import adapter_of, new_client
from server.generation.credentials import credentials_of
from server.generation.marking import Marker
from server.generation.sheet_maker import SheetMaker
from server.generation.sheets import JOB as SHEET_JOB
from server.generation.worker import ENTRYPOINT, GenerationWorker
from server.intake import Housekeeping, Intake, Scanner
from server.ledger import Database
from server.ledger.queue import run_jobs, run_text_jobs
from server.ledger.sheets import purge_sheets
from server.metrics import Metrics
from server.previews.making import make, make_sheet, make_variant
from server.previews.models import Wishes
from server.previews.on_demand import MakeVariant, OnDemand
from server.previews.scratch import remove_left_over
from server.previews.worker import Make, PreviewWorker
from server.settings import SettingError, Settings, variable
from server.vault import Vault
from server.webhooks import Sender

_LONGEST_PAUSE_SECONDS = 30.0
_WATCH_SECONDS = 1.0
_DERIVING_SHARE = 0.1
"""Of the time at most, however many users have files that wait: all of their first ones are looked at each time."""
_PURGE_SECONDS = 600.0
_BATCH = 1_000
_LOOK_SECONDS = 0.5
_DEAD_LETTERS_KNOWN_DAYS = 30
_SHEET_WAITS_SECONDS = 86_400.0
_NICENESS = 10
"""Previews wait for requests, never the other way round."""
HEARTBEAT_SECONDS = 20.0

log = logging.getLogger("coffer.worker")


def main() -> None:
    """Runs until SIGTERM or SIGINT. A database that is down is waited for."""
    settings = Settings.load()
    logs.configure(settings.log_level)
    os.nice(_NICENESS)
    asyncio.run(work(settings, make, make_variant))


async def work(settings: Settings, make: Make, make_variant: MakeVariant, *, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
    """Makes previews by `make` and `make_variant`, and does what generation jobs, linked assets and webhooks need, until SIGTERM or SIGINT.

    Then it finishes those under way and leaves the others to the next start.
    """
    stopping = asyncio.Event()
    forgiving: set[asyncio.Task[None]] = set()
    db = Database(settings)
    vault = Vault(settings.volume_reserve_bytes)
    on_demand = OnDemand(db, vault, make_variant, settings.variant_cache_bytes)
    worker = PreviewWorker(db, vault, make, on_demand, wishes_of(settings), settings.previews_at_once)

    intake = Intake(settings, db, vault, Scanner(settings, Metrics()) if settings.clamd else None)
    housekeeping = Housekeeping(settings, db, vault, intake)
    fetcher = Fetcher(Rules.from_settings(settings))
    counts = ledger.WorkCounts()
    sender = Sender(db, fetcher, counts)
    assets = AssetWorker(db, fetcher, intake, counts)
    client = new_client()
    adapters = {each.name: adapter for each in settings.pipelines if (adapter := adapter_of(each, client)) is not None}
    if adapters and not settings.link_keys:
        raise SettingError(f"{variable('link_keys')} is not set: what pipelines are sent is made with it, as in the servers")
    marker = Marker(db, intake, credentials_of(settings))
    generation = Generation(settings, db, intake, Links(settings.link_keys))
    generating = GenerationWorker(db, intake, generation, fetcher, adapters, marker, counts)

    sheets = SheetMaker(db, vault, intake, make_sheet)

    def stop() -> None:
        stopping.set()
        worker.stop()
        generating.stop()
        forgiving.add(asyncio.create_task(worker.forgive()))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await db.open()

    clock = asyncio.get_running_loop().time
    derive_at = 0.0

    async def watch() -> None:
        nonlocal derive_at
        await housekeeping.watch()
        await tell()
        if (began := clock()) >= derive_at:
            if await ledger.derive_preview_jobs(db) + await generating.derive():
                await ledger.wake_worker(db)
            derive_at = clock() + (clock() - began) / _DERIVING_SHARE

    async def tell() -> None:
        if figures := worker.figures.take():
            await ledger.add_preview_figures(db, figures)
        if counted := counts.take():
            await ledger.add_work_counts(db, counted)

    async def handle(file_id: UUID, variant: str | None, put_off: int, place: tuple[int, int]) -> None:
        if variant == SHEET_JOB:
            await sheets.handle(file_id, put_off)
        else:
            await worker.handle(file_id, variant, put_off, place)

    async def jobs() -> None:
        await vault.refresh(await ledger.list_volumes(db))
        log.info("ready")
        await run_jobs(settings.database_url, handle, stopping, heartbeat_seconds=heartbeat_seconds)

    async def generation_jobs() -> None:
        await vault.refresh(await ledger.list_volumes(db))
        await run_text_jobs(settings.database_url, ENTRYPOINT, generating.handle, stopping, heartbeat_seconds=heartbeat_seconds)

    async def purge() -> None:
        await asyncio.to_thread(remove_left_over)
        await ledger.purge_job_log(db, _BATCH)
        await purge_sheets(db, _SHEET_WAITS_SECONDS, _BATCH)
        await ledger.purge_deliveries(db, _DEAD_LETTERS_KNOWN_DAYS, _BATCH)

    try:
        async with supervision.supervised():
            await asyncio.gather(
                _repeat(jobs, _WATCH_SECONDS, stopping),
                _repeat(generation_jobs, _WATCH_SECONDS, stopping),
                _repeat(watch, _WATCH_SECONDS, stopping),
                _repeat(housekeeping.renew, settings.reservation_lease_seconds / 4, stopping),
                _repeat(sender.look, _LOOK_SECONDS, stopping),
                _repeat(assets.look, _LOOK_SECONDS, stopping),
                _repeat(purge, _PURGE_SECONDS, stopping),
            )
    finally:
        await asyncio.gather(*forgiving, sender.stop(), assets.stop(), return_exceptions=True)
        await asyncio.gather(tell(), return_exceptions=True)
        await client.aclose()
        if intake.scanner is not None:
            intake.scanner.close()
        vault.close()
        await db.close()
        log.info("stopped")


def wishes_of(settings: Settings) -> Wishes:
    """Which previews are made of every file."""
    return Wishes(
        image_widths=settings.preview_widths,
        quality=settings.preview_quality,
        animated=settings.preview_animations,
        storyboard=settings.preview_storyboards,
        clip=settings.preview_clips,
    )


async def _repeat(step: Callable[[], Awaitable[None]], seconds: float, stopping: asyncio.Event) -> None:
    """Does `step` again and again until the stop; when it fails, after pauses that grow."""
    pause_seconds = seconds
    while not stopping.is_set():
        try:
            await step()
            pause_seconds = seconds
        except CofferError as problem:
            log.warning("will try again: %s", problem)
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
        except Exception:
            log.exception("will try again")
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
        try:
            await asyncio.wait_for(stopping.wait(), pause_seconds)
        except TimeoutError:
            continue


if __name__ == "__main__":
    main()
