"""Small files become rows together: those that come while one transaction is under way share the next one.

A transaction costs PostgreSQL and this process little more for ten files than for one, and the disk one sync in either case
(server/decisions/0007).
"""

import asyncio
import logging
from datetime import datetime
from typing import NamedTuple

import asyncpg

from server.actor import actor_json
from server.errors import CofferError, CommitUnknown, DatabaseUnavailable
from server.ledger.database import COMMIT_PATIENCE_SECONDS, Database
from server.ledger.files import json_text, preview_state_of, publish_file, published
from server.ledger.models import File, NewFile
from server.ledger.statements import statement

MOST_TOGETHER = 64
"""Bounds how long one transaction holds its users' rows: 64 files take about 5 ms."""

_PUBLISH_TOGETHER = statement("publish_files")

log = logging.getLogger("coffer.ledger")


class _Waiting(NamedTuple):
    """`actor` is who sent it: the transaction runs in the task of somebody else."""

    new: NewFile
    actor: str
    outcome: asyncio.Future[datetime | None]


class Publisher:
    """Publishes files that hold no reservation. One per process; lives in one event loop.

    No file is refused because of another, nor waits for another's user: what a shared transaction leaves out, because somebody
    holds its user's row, and everything in one that PostgreSQL refused, is published once more, each file alone.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: list[_Waiting] = []
        self._turns: asyncio.Task[None] | None = None

    async def publish(self, new: NewFile) -> File:
        """As `publish_file`, for a file without reservation and without idempotency key. Cancelled, its outcome is unknown."""
        outcome: asyncio.Future[datetime | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(new, actor_json(), outcome))
        if self._turns is None:
            self._turns = asyncio.create_task(self._take_turns())
        committed_at = await outcome
        if committed_at is None:
            return await publish_file(self._db, new)
        return published(new, committed_at)

    async def _take_turns(self) -> None:
        try:
            while self._waiting:
                together, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
                dates, problem = await self._try_together(together)
                for new, _, outcome in together:
                    if outcome.done():  # its caller was cancelled
                        continue
                    if problem is not None:
                        outcome.set_exception(problem())
                    else:
                        outcome.set_result(dates.get(new.id))
        finally:
            self._turns = None

    async def _try_together(
        self, together: list[_Waiting]
    ) -> tuple[dict[object, datetime], type[CommitUnknown | DatabaseUnavailable] | None]:
        """When each file was committed, for those that were; or what all of them are to be told."""
        news = [each.new for each in together]
        try:
            rows = await self._db.write(
                _PUBLISH_TOGETHER,
                [new.id for new in news],
                [new.user_id for new in news],
                [new.user_since for new in news],
                [new.file_name for new in news],
                [new.file_type for new in news],
                [new.mime_type for new in news],
                [new.file_size for new in news],
                [new.sha256 for new in news],
                [new.volume_id for new in news],
                [new.file_path for new in news],
                [new.generation for new in news],
                [new.package_name for new in news],
                [json_text(new.tags) for new in news],
                [json_text(new.metadata) for new in news],
                [each.actor for each in together],
                [preview_state_of(new) for new in news],
                patience=COMMIT_PATIENCE_SECONDS,
            )
        except (CommitUnknown, DatabaseUnavailable) as problem:
            return {}, type(problem)
        except (CofferError, asyncpg.PostgresError):  # refused: who caused it is told so again, when published alone
            return {}, None
        except Exception:
            # Nobody knows whether this came before the commit or after it.
            log.exception("files were published with an unknown outcome")
            return {}, CommitUnknown
        return {row["id"]: row["upload_date"] for row in rows}, None
