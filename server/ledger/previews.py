"""Previews as rows: what became of a file's, which files are derived from it, and the jobs that are still to be done."""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from uuid import UUID

from server.errors import CofferError, NotFound
from server.kinds import PREVIEWED
from server.ledger.database import COMMIT_PATIENCE_SECONDS, LONG_PATIENCE_SECONDS, Database
from server.ledger.files import FILE_COLUMNS, file_of
from server.ledger.models import EvictedPreview, File, LinkedPreview, PreviewFacts, PreviewFigure, PreviewRow, PreviewState
from server.ledger.statements import statement

MOST_QUEUED_PER_USER = 256
"""Jobs of one user in the queue at a time; the number in sql/migrations/0012. Both cores make as many in some seconds."""

_GET = statement("get_previews")
_OF_MANY = statement("get_previews_of_many")
_LINKED = statement("get_linked_preview", file=FILE_COLUMNS)
_TOUCH = statement("touch_preview")
_FORGET = statement("forget_preview")
_REQUEST = statement("request_variant")
_IS_REQUESTED = statement("variant_is_requested")
_ADD = statement("add_variant")
_NOTIFY = statement("notify_preview")
_BEGIN = statement("begin_preview")
_UNCOUNT = statement("uncount_preview_try")
_RENEW = statement("renew_preview")
_FINISH = statement("finish_preview")
_DERIVE = statement("derive_preview_jobs")
_PURGE = statement("purge_job_log")
_WAKE = statement("wake_worker")
_COUNT = statement("count_previews")
_ADD_FIGURES = statement("add_preview_figures")
_FIGURES = statement("preview_figures")
_FAILED = statement("failed_previews", file=FILE_COLUMNS)
_RETRY = statement("retry_failed_previews")
_REBUILD = statement("rebuild_previews")


async def get_previews(db: Database, user_id: str, file_id: UUID) -> list[PreviewRow]:
    """What was derived from a file of the user; nothing when there is none, or no such file."""
    rows = await db.read(_GET, user_id, file_id)
    return [PreviewRow(**{name: row[name] for name in PreviewRow.__struct_fields__}) for row in rows]


async def begin_preview(db: Database, file: File) -> int | None:
    """Counts a try at the preview of `file`, durably, before it is made, and tells how many there were with this one.

    None when the file no longer waits, as for `finish_preview`.
    """
    rows = await db.write(_BEGIN, file.id, file.sha256)
    return int(rows[0]["preview_tries"]) if rows else None


async def uncount_preview_try(db: Database, file: File) -> None:
    """Takes the last try back, unless it is the first: what went wrong had nothing to do with the file."""
    await db.write(_UNCOUNT, file.id, file.sha256)


async def renew_preview(db: Database, file: File) -> None:
    """Has the previews of other bytes made anew that may have been overwritten by those of `file`, as it was once."""
    await db.write(_RENEW, file.id, file.sha256)


async def finish_preview(
    db: Database,
    file: File,
    state: PreviewState,
    *,
    reason: str | None = None,
    facts: PreviewFacts | None = None,
    made: Sequence[PreviewRow] = (),
) -> bool:
    """Says what became of the preview of `file`, and tells who waits for it. Call it when the bytes of `made` are synced.

    False when the file no longer waits: it is gone, somebody else was faster, or its bytes were replaced or moved since `file` was read.
    """
    facts = facts or PreviewFacts()
    rows = await db.write(
        _FINISH,
        file.id,
        file.sha256,
        state,
        reason,
        facts.width,
        facts.height,
        f"{facts.width}x{facts.height}" if facts.width and facts.height else None,
        facts.duration_seconds,
        None if facts.duration_seconds is None else _clock(facts.duration_seconds),
        facts.frame_rate,
        facts.video_codec,
        facts.audio_codec,
        facts.thumbhash,
        facts.average_color,
        [each.variant for each in made],
        [each.file_name for each in made],
        [each.mime_type for each in made],
        [each.width for each in made],
        [each.height for each in made],
        [each.size_bytes for each in made],
        file.volume_id,
        patience=COMMIT_PATIENCE_SECONDS,
    )
    return bool(rows)


async def get_previews_of_many(db: Database, user_id: str, ids: Sequence[UUID]) -> dict[UUID, list[PreviewRow]]:
    """What was derived from these files of the user, narrow ones first; without what was made on demand."""
    found: dict[UUID, list[PreviewRow]] = {}
    for row in await db.read(_OF_MANY, user_id, list(ids)):
        found.setdefault(row["file_id"], []).append(PreviewRow(**{name: row[name] for name in PreviewRow.__struct_fields__}))
    return found


# Made on demand


async def get_linked_preview(db: Database, file_id: UUID, generation: int, link_epoch: int, name: str) -> LinkedPreview:
    """The file that a link names, and its preview called `name` if there is one. Raises `NotFound` as `FileLookups.linked`."""
    rows = await db.read(_LINKED, file_id, generation, link_epoch, name)
    if not rows:
        raise NotFound
    row = rows[0]
    if row["preview_variant"] is None:
        return LinkedPreview(file=file_of(row), preview=None, is_unused=False)
    preview = PreviewRow(
        variant=row["preview_variant"],
        file_name=name,
        mime_type=row["preview_mime_type"],
        width=row["preview_width"],
        height=row["preview_height"],
        size_bytes=row["preview_size_bytes"],
    )
    return LinkedPreview(file=file_of(row), preview=preview, is_unused=row["preview_on_demand"] and not row["used_lately"])


async def touch_preview(db: Database, file_id: UUID, name: str) -> None:
    """Remembers that a preview was used."""
    await db.write(_TOUCH, file_id, name)


async def forget_preview(db: Database, file_id: UUID, name: str) -> None:
    """Has a preview made again whose bytes are gone: one made on demand when it is next asked for, another with all of its file."""
    await db.write(_FORGET, file_id, name)


async def request_variant(db: Database, file_id: UUID, name: str) -> None:
    """Asks the workers for the variant called `name`; once, however often it is asked for until it has been made."""
    await db.write(_REQUEST, file_id, name)


async def variant_is_requested(db: Database, file_id: UUID, name: str) -> bool:
    """Whether a worker is still to make it, or at it."""
    is_requested: bool = (await db.read(_IS_REQUESTED, file_id, name))[0]["yes"]
    return is_requested


async def add_variant(db: Database, file: File, made: PreviewRow, most_bytes: int) -> list[EvictedPreview] | None:
    """Enters a variant of `file`, whose bytes lie in their place, and takes the rows of those that its user has not used for the longest
    time, so that all made on demand stay within `most_bytes`; their bytes are then the caller's to remove.

    None when the file has gone, or has other bytes or another volume than `file` by now.
    """
    rows = await db.write(
        _ADD, file.id, file.sha256, made.variant, made.mime_type, made.width, made.height, made.size_bytes, most_bytes, file.volume_id
    )
    if not rows:
        return None
    return [
        EvictedPreview(**{name: row[name] for name in EvictedPreview.__struct_fields__})
        for row in rows
        if row["file_id"] is not None and row["volume_id"] is not None
    ]


async def notify_variant(db: Database, file_id: UUID, name: str) -> None:
    """Tells who waits for a variant that it is there, or that it cannot be made."""
    await db.write(_NOTIFY, variant_key(file_id, name))


def variant_key(file_id: UUID, name: str) -> str:
    """What `Notices` calls a variant."""
    return f"{file_id}/{name}"


# The queue


async def derive_preview_jobs(db: Database) -> int:
    """Gives waiting files the jobs that they lack, and tells how many those were. Safe to repeat, in several processes at once."""
    count: int = (await db.write(_DERIVE, MOST_QUEUED_PER_USER, patience=LONG_PATIENCE_SECONDS))[0]["count"]
    return count


async def purge_job_log(db: Database, limit: int) -> None:
    """Forgets up to `limit` old notes about jobs."""
    await db.write(_PURGE, limit, patience=LONG_PATIENCE_SECONDS)


async def wake_worker(db: Database) -> None:
    """Tells the workers that there are new jobs. Without it they look by themselves, later."""
    await db.write(_WAKE)


async def count_previews(db: Database) -> tuple[int, dict[str, int]]:
    """How many files wait for their preview, and how many of each kind have failed; kinds without failures are left out."""
    counts = {row["file_type"]: row["count"] for row in await db.read(_COUNT)}
    return counts.pop(None), counts


async def add_preview_figures(db: Database, figures: Sequence[PreviewFigure]) -> None:
    """Adds to what was counted of the making of previews. Call it with at most one of each type, state and bound, in their order."""
    columns = ([getattr(each, name) for each in figures] for name in PreviewFigure.__struct_fields__)
    await db.write(_ADD_FIGURES, *columns)


async def preview_figures(db: Database) -> list[PreviewFigure]:
    """What was counted since the beginning, by all workers."""
    return [PreviewFigure(**dict(row)) for row in await db.read(_FIGURES)]


async def failed_previews(db: Database, after: UUID | None, limit: int) -> list[File]:
    """A page of the files whose preview failed, of all users, in the order of their ids."""
    return [file_of(row) for row in await db.read(_FAILED, after, limit)]


async def retry_failed_previews(db: Database, ids: Collection[UUID] | None, limit: int) -> int:
    """Lets up to `limit` failed previews wait again, of these files or of all. Tells how many."""
    count: int = (await db.write(_RETRY, None if ids is None else list(ids), limit, patience=LONG_PATIENCE_SECONDS))[0]["count"]
    return count


async def rebuild_previews(db: Database, after: UUID | None, user_id: str | None, limit: int) -> tuple[UUID | None, int]:
    """Lets the previews of `limit` files after an id be made anew, of one user or of all. Those there are stay till then.

    Returns the last id looked at, None when there was none, and how many previews will be made.
    """
    row = (await db.write(_REBUILD, after, user_id, limit, sorted(PREVIEWED), patience=LONG_PATIENCE_SECONDS))[0]
    return row["last"], row["changed"]


def _clock(seconds: float) -> str:
    """150 seconds are 00:02:30."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02}:{minute:02}:{second:02}"


class Waker:
    """Calls the workers, in the background and once for all who ask while a call is under way. One per process."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._wanted = False
        self._calling: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """After a commit that added jobs; costs its caller nothing."""
        self._wanted = True
        if self._calling is None:
            self._calling = asyncio.create_task(self._call())

    async def _call(self) -> None:
        try:
            while self._wanted:
                self._wanted = False
                with suppress(CofferError):  # they look by themselves, later
                    await wake_worker(self._db)
        finally:
            self._calling = None
