"""Generation jobs and their outputs as rows. An output's reservation is a row of `uploads` with the id of the file to come, and what ends
that row settles the output: see sql/migrations/0020.
"""

import asyncio
import base64
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.errors import CofferError, InvalidRequest, NotFound, PreconditionFailed
from server.ledger.database import COMMIT_PATIENCE_SECONDS, LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.files import FILE_COLUMNS, file_of, replacing
from server.ledger.models import File, Job, JobPage, JobQuery, JobState, Marking, NewJob, Output, OutputState, ReplacedContent
from server.ledger.statements import statement

Position = tuple[Annotated[datetime, msgspec.Meta(tz=True)], UUID]
Outcome = Literal["running", "completed", "failed"]
Report = Literal["accepted", "repeated", "late"]

READ_AT_MOST = 10_000
"""Rows that a page reads where the other filters let few through: under 0.1 s."""

_JOB = ", ".join(f"j.{name}" for name in Job.__struct_fields__)
_OUTPUT = ", ".join(f"o.{name}" for name in Output.__struct_fields__)
_CREATE = statement("create_job")
_GET = statement("get_job", job=_JOB)
_ANYWHERE = statement("find_job_anywhere", job=_JOB)
_OUTPUTS = statement("get_outputs", output=_OUTPUT)
_FIND_OUTPUT = statement("find_output", output=_OUTPUT)
_CANCEL = statement("cancel_job")
_REPORT = statement("report_job")
_IS_KNOWN = statement("message_is_known")
_PURGE = statement("purge_messages")
_FETCH = statement("fetch_output")
_FAIL = statement("fail_output")
_NOTIFY = statement("notify_job")
_SET_REMOTE_ID = statement("set_remote_id")
_DERIVE = statement("derive_generation_jobs")
_FIND_MARKING = statement("find_marking")
_SETTLE_MARKING = statement("settle_marking")
_MARK = statement("mark_content", file=FILE_COLUMNS)
_cursors = msgspec.json.Decoder(Position)


def job_notice(job_id: UUID) -> str:
    """What `Notices.of` hears when something becomes of the job."""
    return f"job/{job_id}"


async def create_job(
    db: Database,
    new: NewJob,
    *,
    volume_id: UUID,
    ttl_seconds: int,
    lease_seconds: int,
    most_links: int | None,
    idempotency_key: str | None = None,
) -> UUID:
    """Registers a job and reserves the sum of its outputs' bytes: both or neither. Returns its id, or that of the job which the key made.

    The reservations live `lease_seconds` longer than the job. Raises `QuotaExceeded`, `TooManyUploads`, `UserErasing` and `NotFound` (no
    such user).
    """
    row = {name: getattr(new, name) for name in NewJob.__struct_fields__ if name not in {"id", "user_id", "outputs"}}
    row["media_types"] = sorted({output.media_type for output in new.outputs})
    outputs = [{"media_type": output.media_type, "max_bytes": output.max_bytes} for output in new.outputs]
    rows = await db.write(
        _CREATE,
        new.id,
        new.user_id,
        volume_id,
        msgspec.json.encode(row).decode(),
        [output.file_id for output in new.outputs],
        msgspec.json.encode(outputs).decode(),
        msgspec.json.encode([output.link for output in new.outputs]).decode(),
        ttl_seconds,
        lease_seconds,
        idempotency_key,
        most_links,
        actor_json(),
        patience=COMMIT_PATIENCE_SECONDS,
    )
    made: UUID = rows[0]["id"]
    return made


async def get_job(db: Database, user_id: str, job_id: UUID) -> Job:
    """One job of the user. Raises `NotFound`."""
    return _one(await db.read(_GET, user_id, job_id))


async def find_job_anywhere(db: Database, job_id: UUID) -> Job | None:
    """One job, whosever it is: for who has proven to be its pipeline."""
    rows = await db.read(_ANYWHERE, job_id)
    return _job_of(rows[0]) if rows else None


async def list_jobs(db: Database, user_id: str, query: JobQuery) -> JobPage:
    """One page, newest first. Where filters seldom meet it may hold fewer jobs than `limit`: the list ends where `next_cursor` is None.

    Raises `InvalidRequest` for a cursor that is malformed.
    """
    sql, values = compose_jobs(user_id, query, None if query.cursor is None else read_cursor(query.cursor), READ_AT_MOST)
    rows = await db.read(sql, *values)
    matching, last = page_of(rows, query.limit, READ_AT_MOST)
    return JobPage([_job_of(row) for row in matching], None if last is None else write_cursor(last))


def compose_jobs(user_id: str, query: JobQuery, after: Position | None, most: int) -> tuple[str, list[Any]]:
    """The statement that reads one job more than the page holds, but at most `most` rows, after a position; and its values."""
    values: list[Any] = [user_id, query.limit + 1, most]

    def bind(value: object) -> str:
        values.append(value)
        return f"${len(values)}"

    bounds, others = [], []
    if query.entity_type is not None and query.entity_id is not None:
        bounds.append(f"j.entity_type = {bind(query.entity_type)} and j.entity_id = {bind(query.entity_id)}")
    elif query.entity_type is not None:
        others.append(f"j.entity_type is not distinct from {bind(query.entity_type)}")
    if after is not None:
        bounds.append(f"(j.created_at, j.id) < ({bind(after[0])}, {bind(after[1])})")
    if query.project_id is not None:
        others.append(f"j.project_id is not distinct from {bind(query.project_id)}")
    if query.state is not None:
        others.append(f"j.state = {bind(query.state)}")
    if query.kinds is not None:
        others.append(f"j.media_types <@ {bind(sorted(query.kinds))}")
    return _composed("list_jobs", bounds, others, job=_JOB), values


def _composed(name: str, bounds: Sequence[str], others: Sequence[str], **fragments: str) -> str:
    return statement(
        name,
        bounds="".join(f" and {bound}" for bound in bounds),
        others="".join(f" and {other}" for other in others),
        **fragments,
    )


async def get_outputs(db: Database, job_ids: Sequence[UUID]) -> dict[UUID, list[Output]]:
    """The outputs of each of the jobs, in their order."""
    found: dict[UUID, list[Output]] = {}
    for row in await db.read(_OUTPUTS, list(job_ids)):
        found.setdefault(row["job_id"], []).append(_output_of(row))
    return found


async def find_output(db: Database, file_id: UUID) -> Output | None:
    """The output that a file is, or is to be."""
    rows = await db.read(_FIND_OUTPUT, file_id)
    return _output_of(rows[0]) if rows else None


async def cancel_job(db: Database, user_id: str, job_id: UUID) -> JobState:
    """Cancels a job unless it has ended; returns its state afterwards. Its outputs that have not come never will. Raises `NotFound`."""
    state: JobState | None = (await db.write(_CANCEL, user_id, job_id, actor_json()))[0]["state"]
    if state is None:
        raise NotFound
    return state


async def report_job(
    db: Database,
    job_id: UUID,
    *,
    sender: str,
    message_id: str | None,
    outcome: Outcome | None,
    progress_percent: int | None = None,
    credits_used: Decimal | None = None,
    error: str | None = None,
) -> Report:
    """What a pipeline says of a job. A message counts once; without `message_id` repeating is safe. `late`: nothing was done, it has ended.

    `completed` and `failed` give up the outputs that nobody has begun to send.
    """
    rows = await db.write(_REPORT, job_id, sender, message_id, outcome, progress_percent, credits_used, error)
    answer: Report = rows[0]["answer"]
    return answer


async def message_is_known(db: Database, sender: str, message_id: str) -> bool:
    """Whether that message was acted upon."""
    return bool((await db.read(_IS_KNOWN, sender, message_id))[0]["is_known"])


async def purge_messages(db: Database, older_than_seconds: int) -> None:
    """Forgets messages whose signatures are no good any more."""
    await db.write(_PURGE, older_than_seconds, patience=LONG_PATIENCE_SECONDS)


async def fetch_output(db: Database, job_id: UUID, output_index: int, url: str) -> OutputState | None:
    """Has the worker fetch an output from a URL, unless it is settled or being fetched. Its state afterwards; None: there is none."""
    state: OutputState | None = (await db.write(_FETCH, job_id, output_index, url))[0]["state"]
    return state


async def fail_output(db: Database, file_id: UUID, reason: str) -> None:
    """Gives up an output, and what it reserved. One that is settled stays so."""
    await db.write(_FAIL, file_id, reason[:64])


async def notify_job(db: Database, job_id: UUID) -> None:
    """Tells those who wait for a job, in all processes, to look."""
    await db.write(_NOTIFY, str(job_id))


async def set_remote_id(db: Database, job_id: UUID, remote_id: str) -> bool:
    """Notes what the pipeline calls a job that runs from now on. False when it has a name already, or has ended."""
    return bool(await db.write(_SET_REMOTE_ID, job_id, remote_id))


async def derive_generation_jobs(db: Database, called_pipelines: Sequence[str], polled_pipelines: Sequence[str]) -> int:
    """Queues what the rows say is to be done and no job in the queue is for; tells how many those were.

    Jobs of called pipelines are to be handed on, once, those of polled ones to be asked after until they have ended.
    """
    rows = await db.write(_DERIVE, list(called_pipelines), list(polled_pipelines), patience=LONG_PATIENCE_SECONDS)
    return int(rows[0]["count"])


async def find_marking(db: Database, file_id: UUID) -> Marking | None:
    """What an output waits to be marked with; None when it does not."""
    rows = await db.read(_FIND_MARKING, file_id)
    return Marking(rows[0]["wanted_marks"], rows[0]["model_used"]) if rows else None


async def settle_marking(db: Database, file_id: UUID, reason: str | None = None) -> None:
    """Ends the job of an output that waited to be marked, if it was the last one open. With a reason the marking is given up first."""
    await db.write(_SETTLE_MARKING, file_id, None if reason is None else reason[:64])


async def mark_content(
    db: Database, *, user_id: str, file_id: UUID, expected_generation: int, new: ReplacedContent, marks: Sequence[str], statements_name: str
) -> File:
    """Points an output that waits to be marked at its marked bytes, as `replace_content` does; previews stay but for `statements_name`.

    Raises as that; `PreconditionFailed` also when it does not wait any more.
    """
    rows = await db.write(
        _MARK,
        *replacing(user_id, file_id, expected_generation, new),
        list(marks),
        statements_name,
        patience=COMMIT_PATIENCE_SECONDS,
    )
    if not rows:
        raise PreconditionFailed
    return file_of(rows[0])


class JobTeller:
    """Tells those who wait for jobs, in the background: an upload's commit must not wait for a notification. One per process."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._changed: set[UUID] = set()
        self._telling: asyncio.Task[None] | None = None

    def tell(self, job_id: UUID) -> None:
        """After a commit that changed the job; costs its caller nothing."""
        self._changed.add(job_id)
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        try:
            while self._changed:
                with suppress(CofferError):  # who waits looks by itself, later
                    await notify_job(self._db, self._changed.pop())
        finally:
            self._telling = None


def page_of(rows: list[Row], limit: int, most: int) -> tuple[list[Row], Row | None]:
    """The rows of a page among those read, and the one to go on from, if any."""
    matching = [row for row in rows if row["matches"]]
    if len(matching) > limit:
        return matching[:limit], matching[limit - 1]
    return matching, rows[-1] if rows and rows[-1]["place"] == most else None


def write_cursor(row: Row) -> str:
    """Where the next page begins."""
    return base64.urlsafe_b64encode(msgspec.json.encode((row["created_at"], row["id"]))).rstrip(b"=").decode()


def read_cursor(cursor: str) -> Position:
    """What `write_cursor` wrote. Raises `InvalidRequest` for every other text."""
    try:
        position: Position = _cursors.decode(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, msgspec.MsgspecError) as problem:
        raise InvalidRequest(field="cursor", reason="it is not one that a page of this list gave") from problem
    return position


def _job_of(row: Row) -> Job:
    values = {name: row[name] for name in Job.__struct_fields__}
    values["generation_params"] = msgspec.json.decode(values["generation_params"])
    return Job(**values)


def _output_of(row: Row) -> Output:
    return Output(**{name: row[name] for name in Output.__struct_fields__})


def _one(rows: list[Row]) -> Job:
    if not rows:
        raise NotFound
    return _job_of(rows[0])
