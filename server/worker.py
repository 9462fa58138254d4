"""The worker process: runs queued jobs. There are no kinds of job yet, so it only holds its place under systemd."""

import asyncio
import logging
import signal

from server import logs
from server.errors import CofferError
from server.ledger import Database
from server.settings import Settings

_LONGEST_PAUSE_SECONDS = 30.0

log = logging.getLogger("coffer.worker")


def main() -> None:
    """Runs until SIGTERM or SIGINT. A database that is down is waited for."""
    settings = Settings.load()
    logs.configure(settings.log_level)
    asyncio.run(_work(settings))


async def _work(settings: Settings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    db = Database(settings)
    await db.open()
    try:
        waiting = asyncio.create_task(_wait_for_database(db))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([waiting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            await waiting
            log.info("ready; there are no jobs to run yet")
        waiting.cancel()
        await stopped
    finally:
        await db.close()
        log.info("stopped")


async def _wait_for_database(db: Database) -> None:
    pause_seconds = 1.0
    while True:
        try:
            await db.check()
            return
        except CofferError as problem:
            log.warning("waiting for the database: %s", problem)
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)


if __name__ == "__main__":
    main()
