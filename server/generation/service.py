"""Jobs as doors and adapters see them: registered, told, delivered to."""

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from uuid_utils.compat import uuid7

from server import ledger
from server.delivery import Links
from server.errors import (
    Conflict,
    FileTooLarge,
    IdempotencyInProgress,
    Infected,
    InvalidRequest,
    KindRequired,
    LinkExpired,
    LinkUsed,
    NotFound,
    NotScannable,
    TypeMismatch,
    UnsupportedType,
)
from server.fetching import Rules
from server.generation import signatures
from server.generation.messages import Message, OutputMessage
from server.intake import Details, Intake, Upload
from server.ledger import Database, UploadLink
from server.ledger import generation as rows
from server.ledger import media as media_rows
from server.ledger.models import Job, NewJob, NewOutput, Output
from server.setting_values import Pipeline, is_webhook_secret
from server.settings import Settings

WEBHOOK_PATH = "/api/generate/webhook"
TUS_PATH = "/api/tus/"

NOT_STORABLE = (FileTooLarge, Infected, KindRequired, NotScannable, TypeMismatch, UnsupportedType)
"""What is wrong with an output's bytes, whoever sends them again: the message is answered, and the output may come by another one."""
_PIECE_BYTES = 256 * 1024
_OUTCOMES: dict[str, rows.Outcome] = {
    "job.progress": "running",
    "job.completed": "completed",
    "job.failed": "failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputWish:
    """An output to come: of that type, at most so many bytes, which are held for it."""

    media_type: str
    max_bytes: int
    file_name: str | None = None


@dataclass(frozen=True, slots=True)
class Callback:
    """Whom the app has told of the job's end, and what that is signed with (Standard Webhooks). The pipeline hears of neither."""

    url: str
    secret: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWish:
    """A job, with all text cleaned. `reference_ids` are files of the user, `parent_id` is the media to be made anew. `marks` are for its
    outputs, some of the settings'; None is all of those.
    """

    outputs: list[OutputWish]
    pipeline: str | None = None
    entity_type: str | None = None
    entity_id: str | None = None
    project_id: str | None = None
    model: str | None = None
    prompt: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    reference_ids: list[UUID] = field(default_factory=list)
    parent_id: UUID | None = None
    callback: Callback | None = None
    marks: list[str] | None = None
    ttl_seconds: int


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the pipeline may read at `url` until `expires_at`."""

    file_id: UUID
    file_name: str
    mime_type: str
    file_size: int
    url: str
    expires_at: datetime


class UploadPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where an output goes: `PUT` to `url`, or tus to `tus_url` with `url` in the header `Upload-Link`."""

    index: int
    file_id: UUID
    type: str
    max_bytes: int
    url: str
    tus_url: str
    expires_at: datetime


class WebhookPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pipeline tells how it goes, and what it signs that with (Standard Webhooks)."""

    url: str
    secret: str


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """All that a pipeline needs for one job. Whoever has it may read the references, bring the outputs and speak for the job."""

    job_id: UUID
    model: str | None
    prompt: str | None
    parameters: dict[str, Any]
    expires_at: datetime
    references: list[Reference]
    uploads: list[UploadPlace]
    webhook: WebhookPlace


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one output of a message. `code` is why it was `refused`; another message may bring it again."""

    index: int
    state: str
    file_id: UUID | None = None
    code: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a message: `accepted`; `repeated`, when it was acted upon before; `late`, when its job was given up."""

    status: str
    outputs: list[Delivered] = []


class Generation:
    """Jobs. One per process; lives in one event loop. Doors authorise first, then call it."""

    def __init__(self, settings: Settings, db: Database, intake: Intake, links: Links) -> None:
        self._settings = settings
        self._db = db
        self._intake = intake
        self._links = links
        self._rules = Rules.from_settings(settings)
        self._pipelines = {pipeline.name: pipeline for pipeline in settings.pipelines}

    def pipeline(self, name: str | None) -> Pipeline | None:
        """The pipeline that the settings call so."""
        return None if name is None else self._pipelines.get(name)

    @property
    def called_pipelines(self) -> list[str]:
        """The names of those that Coffer calls by itself."""
        return [name for name, pipeline in self._pipelines.items() if pipeline.adapter is not None]

    # Making

    async def create(self, user_id: str, wish: JobWish, idempotency_key: str | None = None, kinds: frozenset[str] | None = None) -> Job:
        """Registers a job and holds the quota of all its outputs. With a key that has made a job, returns that.

        Only references of these `kinds` (None: all) are there. Raises `InvalidRequest` for a pipeline, mark, reference or parent that is
        not there or a callback's secret that is none, `UrlRefused`, `FileTooLarge`, and as `Intake.open_link`.
        """
        callback = None if wish.callback is None else self._checked(wish.callback)
        if wish.pipeline is not None and wish.pipeline not in self._pipelines:
            raise InvalidRequest("pipeline", "is not one of those in the settings")
        marks = list(self._settings.mark_outputs) if wish.marks is None else wish.marks
        if not set(marks) <= set(self._settings.mark_outputs):
            raise InvalidRequest("marks", "are not all in the settings")
        for output in wish.outputs:
            if output.max_bytes > self._settings.max_file_bytes:
                raise FileTooLarge(self._settings.max_file_bytes)
        await self._check_references(user_id, wish, kinds)
        placement = await self._intake.placed(user_id)
        placement.volume.check_writable(sum(output.max_bytes for output in wish.outputs))
        job_id = uuid7()
        new = NewJob(
            id=job_id,
            user_id=user_id,
            outputs=[
                NewOutput(
                    file_id=uuid7(),
                    media_type=output.media_type,
                    max_bytes=output.max_bytes,
                    link=UploadLink(
                        types=[output.media_type],
                        kind=output.media_type,
                        file_name=output.file_name,
                        job_id=job_id,
                        marks=marks,
                    ),
                )
                for output in wish.outputs
            ],
            pipeline=wish.pipeline,
            entity_type=wish.entity_type,
            entity_id=wish.entity_id,
            project_id=wish.project_id,
            model_used=wish.model,
            prompt_used=wish.prompt,
            generation_params=wish.parameters,
            reference_ids=wish.reference_ids,
            parent_id=wish.parent_id,
            callback_url=None if callback is None else callback.url,
            callback_secret=None if callback is None else callback.secret,
            dispatched=wish.pipeline in self.called_pipelines,
        )
        try:
            made = await rows.create_job(
                self._db,
                new,
                volume_id=placement.volume.id,
                ttl_seconds=wish.ttl_seconds,
                lease_seconds=self._settings.reservation_lease_seconds,
                most_links=self._settings.upload_links_per_user,
                idempotency_key=idempotency_key,
            )
        except NotFound as problem:  # erased since we looked
            self._intake.forget(user_id)
            raise Conflict from problem
        if new.dispatched:
            self._intake.waker.wake()
        return await rows.get_job(self._db, user_id, made)

    def _checked(self, callback: Callback) -> Callback:
        """With its URL in its plainest form. It is judged by its text now, and by its address when something is sent."""
        if not is_webhook_secret(callback.secret):
            raise InvalidRequest("callback.secret", "must be whsec_ and the base64 of 24 to 64 bytes, e.g. from: openssl rand -base64 32")
        return Callback(self._rules.read(callback.url).url, callback.secret)

    async def _check_references(self, user_id: str, wish: JobWish, kinds: frozenset[str] | None) -> None:
        found = await ledger.get_files(self._db, user_id, wish.reference_ids) if wish.reference_ids else {}
        for reference_id in wish.reference_ids:
            if reference_id not in found or (kinds is not None and found[reference_id].file_type not in kinds):
                raise InvalidRequest("references", f"{reference_id} is no file of the user's")
        if wish.parent_id is not None:
            try:
                await media_rows.get_media(self._db, user_id, wish.parent_id, kinds)
            except NotFound:
                raise InvalidRequest("parent_id", "is no media of the user's") from None

    async def ticket(self, job: Job) -> Ticket:
        """What its pipeline needs. Asked again it is the same, but for references that are gone."""
        outputs = (await rows.get_outputs(self._db, [job.id])).get(job.id, [])
        base = self._settings.public_url
        expires_at = int(job.expires_at.timestamp())
        return Ticket(
            job_id=job.id,
            model=job.model_used,
            prompt=job.prompt_used,
            parameters=job.generation_params,
            expires_at=job.expires_at,
            references=await self._references(job),
            uploads=[
                UploadPlace(
                    index=output.output_index,
                    file_id=output.file_id,
                    type=output.media_type,
                    max_bytes=output.max_bytes,
                    url=base + self._links.upload(output.file_id, expires_at=expires_at),
                    tus_url=base + TUS_PATH,
                    expires_at=datetime.fromtimestamp(expires_at, UTC),
                )
                for output in outputs
            ],
            webhook=WebhookPlace(url=f"{base}{WEBHOOK_PATH}?job={job.id}", secret=self.job_secrets(job.id)[0]),
        )

    async def _references(self, job: Job) -> list[Reference]:
        if not job.reference_ids:
            return []
        files = await ledger.get_files(self._db, job.user_id, job.reference_ids)
        present = [files[reference_id] for reference_id in job.reference_ids if reference_id in files]
        link_epoch = (await ledger.get_user(self._db, job.user_id)).link_epoch
        if self._settings.audit_reads:
            await ledger.record_reads(self._db, "link.created", job.user_id, [file.id for file in present])
        expires_at = int(job.expires_at.timestamp())
        return [
            Reference(
                file_id=file.id,
                file_name=file.file_name,
                mime_type=file.mime_type,
                file_size=file.file_size,
                url=self._settings.public_url + self._links.download(file, link_epoch, expires_at=expires_at),
                expires_at=datetime.fromtimestamp(expires_at, UTC),
            )
            for file in present
        ]

    # What pipelines say

    def job_secrets(self, job_id: UUID) -> list[str]:
        """The secrets that are good for this job, the first of which is told."""
        return signatures.job_secrets(self._settings.link_keys, job_id)

    async def take(self, message: Message, *, sender: str, message_id: str, job: Job) -> Answer:
        """Does what a message of the job's pipeline says, once: outputs first, then the report, and only then the message counts.

        So a message that failed half-way is sent again, and what it has stored already is found. Raises what is not the message's fault,
        `IdempotencyInProgress` among it: another request brings the same output at this moment and may yet fail.
        """
        if await rows.message_is_known(self._db, sender, message_id):
            return Answer(status="repeated")
        if job.state in {"failed", "cancelled", "expired"} or (job.finished_at is None and job.expires_at <= datetime.now(UTC)):
            return Answer(status="late")
        outputs = {output.output_index: output for output in (await rows.get_outputs(self._db, [job.id])).get(job.id, [])}
        delivered = [await self._deliver(outputs.get(each.index), each) for each in message.data.outputs]
        report = await rows.report_job(
            self._db,
            job.id,
            sender=sender,
            message_id=message_id,
            outcome=_OUTCOMES[message.type],
            progress_percent=message.data.progress_percent,
            credits_used=message.data.credits_used,
            error=message.data.error,
        )
        if any(each.state == "fetching" for each in delivered):
            self._intake.waker.wake()
        return Answer(status=report, outputs=delivered)

    async def _deliver(self, output: Output | None, message: OutputMessage) -> Delivered:
        if output is None:
            return Delivered(index=message.index, state="unknown")
        if message.url is not None:
            state = await rows.fetch_output(self._db, output.job_id, output.output_index, message.url)
            return Delivered(index=message.index, state=state or "unknown", file_id=output.file_id)
        try:
            return await self._store(output, message.base64 or b"")
        except NOT_STORABLE as refused:
            return Delivered(index=message.index, state="refused", code=refused.code)
        except (LinkExpired, Conflict):  # cancelled or expired meanwhile
            return Delivered(index=message.index, state="late")

    async def _store(self, output: Output, content: bytes) -> Delivered:
        """Puts bytes where the output's upload link leads. Of many who bring it one does; the others wait for what becomes of that."""
        delivered = Delivered(index=output.output_index, state="stored", file_id=output.file_id)
        claimed = await self._claim(output, len(content))
        if claimed is None:
            return delivered
        upload, link = claimed
        try:
            view = memoryview(content)
            for at in range(0, len(view), _PIECE_BYTES):
                await upload.write(view[at : at + _PIECE_BYTES])
            await upload.finish(details_of(link))
        finally:
            await upload.abort()
        return delivered

    async def _claim(self, output: Output, size_bytes: int) -> tuple[Upload, UploadLink] | None:
        """The one upload of an output; None when another has stored it. Raises `IdempotencyInProgress` when that one takes too long."""
        deadline = time.monotonic() + self._settings.idempotency_wait_seconds
        pause_seconds = 0.05
        while True:
            try:
                return await self._intake.begin_linked(output.file_id, declared_bytes=size_bytes, expected={})
            except LinkUsed:
                current = await rows.find_output(self._db, output.file_id)
                if current is not None and current.state == "stored":
                    return None
                if time.monotonic() >= deadline:
                    raise IdempotencyInProgress from None
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(pause_seconds * 1.5, 0.5)


def details_of(link: UploadLink) -> Details:
    """What an output's link says of its file."""
    return Details(file_name=link.file_name, kind=link.kind, package_name=link.package_name, tags=link.tags, metadata=link.metadata)
