"""What keeps an idle server tidy: watching volumes, renewing leases, finishing what a crash interrupted.

Every step is safe to repeat and to run in several processes at once.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from server import ledger
from server.errors import CofferError, NotFound
from server.intake.service import Intake
from server.ledger import Database
from server.ledger.generation import purge_messages
from server.ledger.moves import users_being_moved
from server.settings import Settings
from server.vault import Vault, Volume

_WATCH_SECONDS = 1.0  # a volume that goes away is known within this
_TIDY_SECONDS = 15.0
EXPIRED_UPLOADS_KNOWN_SECONDS = 7 * 86_400
"""How long an expired resumable upload is remembered: till then its client is told that it has expired."""
_MESSAGES_KNOWN_SECONDS = 86_400  # of pipelines; a signature is good for minutes
_BATCH = 1_000
_MOST_MOVED = 10_000  # at a time; uploads of further ones go to their old volume for up to a minute, and are moved from there

log = logging.getLogger("coffer.housekeeping")


class Housekeeping:
    """The background tasks of one server process."""

    def __init__(
        self, settings: Settings, db: Database, vault: Vault, intake: Intake, also_watch: Sequence[Callable[[], Awaitable[None]]] = ()
    ) -> None:
        """`also_watch` are other rooms' looks at the database, repeated with those at the volumes."""
        self._settings = settings
        self._db = db
        self._vault = vault
        self._intake = intake
        self._also_watch = also_watch
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Looks at the volumes once, then goes on in the background. Works with the database down: it asks again."""
        await self._guarded(self.watch)
        await self._guarded(self._set_rules)
        renew_seconds = self._settings.reservation_lease_seconds / 4  # three renewals may fail before a lease is lost
        self._tasks = [
            asyncio.create_task(self._repeat(self.watch, _WATCH_SECONDS)),
            asyncio.create_task(self._repeat(self._look, _WATCH_SECONDS)),
            asyncio.create_task(self._repeat(self.renew, renew_seconds)),
            asyncio.create_task(self._repeat(self.tidy, _TIDY_SECONDS)),
        ]

    async def stop(self) -> None:
        """Ends the tasks; what one was doing is repeated at the next start."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    async def _repeat(self, step: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            await self._guarded(step)
            await asyncio.sleep(seconds)

    async def _guarded(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except CofferError as problem:
            log.warning("will try again: %s", problem)
        except Exception:
            log.exception("housekeeping failed; will try again")

    async def watch(self) -> None:
        """Probes every volume, also while the database is down, and records the faults that this process met.

        Where users are placed who are being moved is asked anew, so that their uploads go to the new volume within seconds.
        """
        try:
            rows = await ledger.list_volumes(self._db)
        except CofferError:
            rows = None
        await self._vault.refresh(rows)
        if rows is None:
            return
        for volume in self._vault.volumes:
            if volume.unrecorded_fault:
                await ledger.set_volume_state(self._db, volume.id, "read_only")
        for user_id in await users_being_moved(self._db, "", _MOST_MOVED):
            self._intake.forget(user_id)
        for look in self._also_watch:
            await look()

    async def _look(self) -> None:
        """At the volumes alone: a database that takes its time must not hide what becomes of them."""
        await self._vault.refresh(None)

    async def renew(self) -> None:
        """Keeps the reservations of running uploads from expiring."""
        if self._intake.live:
            await ledger.renew_reservations(self._db, list(self._intake.live), self._settings.reservation_lease_seconds)

    async def tidy(self) -> None:
        """One round of everything that an interruption may have left; each part goes on when another fails."""
        for step in (self._set_rules, self._expire, self._bury, self._sweep_incoming, self._go_on_erasing, self._forget):
            await self._guarded(step)

    async def release_expired(self) -> int:
        """Gives back what one batch of abandoned uploads hold, and removes their bytes. Returns how many there were."""
        expired = await ledger.release_expired(self._db, _BATCH)
        gone = [name for upload_id, name in expired.items() if upload_id not in self._intake.live]
        if gone:
            log.info("released %d expired reservations", len(gone))
            for volume in self._writable():
                await self._vault.run(volume.remove_incoming, gone)
        return len(expired)

    async def forget_records(self) -> int:
        """Drops the records of the audit trail that are beyond their time, and tells how many those were."""
        count, days = 0, self._settings.audit_log_days
        while days:
            dropped = await ledger.purge_trail(self._db, days, _BATCH)
            count += dropped
            if dropped < _BATCH:
                break
        return count

    async def forget_uploads(self) -> int:
        """Forgets resumable uploads that ended `EXPIRED_UPLOADS_KNOWN_SECONDS` ago, and tells how many."""
        count = 0
        while left := await ledger.purge_resumable_uploads(self._db, EXPIRED_UPLOADS_KNOWN_SECONDS, _BATCH):
            count += len(left)
            for volume in self._writable():
                await self._vault.run(volume.remove_incoming, [name for volume_id, name in left if volume_id == volume.id])
        return count

    async def _set_rules(self) -> None:
        await ledger.set_quota_rules(self._db, counts_previews=self._settings.previews_in_quota)

    async def _expire(self) -> None:
        await self.release_expired()

    async def _bury(self) -> None:
        while tombstones := await ledger.pending_tombstones(self._db, _BATCH):
            reachable = {volume.id for volume in self._writable()}
            now = [tombstone for tombstone in tombstones if tombstone.volume_id in reachable]
            await self._intake.bury(now)
            if len(now) < _BATCH:
                return

    async def _sweep_incoming(self) -> None:
        for volume in self._writable():
            old = await self._vault.run(volume.old_incoming, time.time() - self._settings.leftover_age_seconds, _BATCH)
            if old:
                live = await ledger.live_uploads(self._db, old)
                await self._vault.run(volume.remove_incoming, [upload_id for upload_id in old if upload_id not in live])

    async def _go_on_erasing(self) -> None:
        for user_id in await ledger.users_being_erased(self._db):
            with suppress(NotFound):  # another process finished it
                await self._intake.erase_user(user_id)

    async def _forget(self) -> None:
        await self.forget_records()
        await self.forget_uploads()
        await purge_messages(self._db, _MESSAGES_KNOWN_SECONDS)

    def _writable(self) -> list[Volume]:
        return [volume for volume in self._vault.volumes if volume.state in ("open", "full")]
