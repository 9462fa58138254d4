"""The JSON routes of generation jobs. What pipelines say comes in through `pipeline.py`."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import Meta

from server import fields
from server.api.door import needs, principal_of, services_of
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.api.services import Services
from server.api.upload import IDEMPOTENCY_KEY
from server.auth import Principal, Scope
from server.errors import InvalidRequest, NotFound
from server.generation import Callback, JobWish, OutputWish
from server.generation.service import Reference, UploadPlace, WebhookPlace
from server.ledger import generation as rows
from server.ledger import time_to_look
from server.ledger.generation import job_notice
from server.ledger.models import CallbackState, Job, JobQuery, JobState, Output, OutputState

MOST_OUTPUTS = 100
MOST_REFERENCES = 16
MOST_PROMPT_CHARACTERS = 20_000
ENTITY_TYPE_CHARACTERS = 64
MOST_URL_CHARACTERS = 4_096

_ENTITY_TYPE = r"^[a-z][a-z0-9_-]*$"

Http = Request[Any, Any, Any]
Kind = Literal["video", "image", "scene", "project", "audio"]
EntityType = Annotated[str, Meta(min_length=1, max_length=ENTITY_TYPE_CHARACTERS, pattern=_ENTITY_TYPE)]
Id = Annotated[str, Meta(min_length=1, max_length=255)]


class OutputSpec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A file that is to come, of at most `max_bytes`, which are held for it until the job ends."""

    type: Kind = "image"
    max_bytes: Annotated[int, Meta(ge=1)]
    file_name: Annotated[str, Meta(min_length=1, max_length=fields.NAME_CHARACTERS)] | None = None


class CallbackWish(msgspec.Struct, forbid_unknown_fields=True):
    """Where your app is told of this job's end, signed with the `secret` (`whsec_` and base64 of 24 to 64 bytes) that you make and keep."""

    url: Annotated[str, Meta(max_length=MOST_URL_CHARACTERS)]
    secret: Annotated[str, Meta(max_length=128)]


class GenerateWish(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A job. `entity_type` and `entity_id` say what the outputs show (a character, a moodboard), in the app's own words.

    `references` are files of the user that the pipeline may read; `parent_id` is the media that this job makes anew; `pipeline` is one of
    the settings' names, none leaves the job to whoever is given the answer. `marks` are some of those that the settings name, or when it is
    left out all.
    """

    outputs: Annotated[list[OutputSpec], Meta(min_length=1, max_length=MOST_OUTPUTS)]
    pipeline: Annotated[str, Meta(max_length=64)] | None = None
    entity_type: EntityType | None = None
    entity_id: Id | None = None
    project_id: Id | None = None
    model: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    prompt: Annotated[str, Meta(max_length=MOST_PROMPT_CHARACTERS)] | None = None
    parameters: dict[str, Any] = {}
    references: Annotated[list[UUID], Meta(max_length=MOST_REFERENCES)] = []
    parent_id: UUID | None = None
    callback: CallbackWish | None = None
    marks: list[Literal["iptc", "c2pa"]] | None = None
    ttl_seconds: Annotated[int, Meta(ge=1)] | None = None


class OutputAnswer(msgspec.Struct):
    """`file_id` is that of the file, once `state` is `stored`. `reason` is why it failed: `expired`, `cancelled`, or what was wrong."""

    index: int
    file_id: UUID
    type: str
    state: OutputState
    reason: str | None


class JobAnswer(msgspec.Struct, kw_only=True):
    """A job as clients see it. `processing_seconds` is from its start to its end, or until now. `callback_state` is null without a
    callback, else `waiting` for the end, `due`, `told`, or `failed` when three days of trying were in vain: it can be sent again.
    """

    id: UUID
    user_id: str
    state: JobState
    progress_percent: int
    pipeline: str | None
    entity_type: str | None
    entity_id: str | None
    project_id: str | None
    model: str | None
    prompt: str | None
    parameters: dict[str, Any]
    references: list[UUID]
    parent_id: UUID | None
    credits_used: float | None
    error: str | None
    callback_state: CallbackState | None
    processing_seconds: float | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime
    outputs: list[OutputAnswer]


class NewJobAnswer(msgspec.Struct, kw_only=True):
    """The job, and what its pipeline needs: links to read the references, to bring the outputs, and its webhook with its secret."""

    job_id: UUID
    job: JobAnswer
    references: list[Reference]
    uploads: list[UploadPlace]
    webhook: WebhookPlace


class JobList(msgspec.Struct):
    """`next_cursor` asks for the page after this one; null when there is none."""

    jobs: list[JobAnswer]
    next_cursor: str | None


def job_json(job: Job, outputs: Sequence[Output]) -> JobAnswer:
    """The answer that every route gives for a job. No secret and no link is in it."""
    return JobAnswer(
        id=job.id,
        user_id=job.user_id,
        state=job.state,
        progress_percent=job.progress_percent,
        pipeline=job.pipeline,
        entity_type=job.entity_type,
        entity_id=job.entity_id,
        project_id=job.project_id,
        model=job.model_used,
        prompt=job.prompt_used,
        parameters=job.generation_params,
        references=job.reference_ids,
        parent_id=job.parent_id,
        credits_used=None if job.credits_used is None else float(job.credits_used),
        error=job.error,
        callback_state=job.callback_state,
        processing_seconds=_processing_seconds(job),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        expires_at=job.expires_at,
        outputs=[OutputAnswer(each.output_index, each.file_id, each.media_type, each.state, each.reason) for each in outputs],
    )


def _processing_seconds(job: Job) -> float | None:
    if job.started_at is None:
        return None
    return round(((job.finished_at or datetime.now(UTC)) - job.started_at).total_seconds(), 3)


async def job_answer(services: Services, job: Job) -> JobAnswer:
    """The answer for one job, with its outputs."""
    return job_json(job, (await rows.get_outputs(services.db, [job.id])).get(job.id, []))


async def visible_job(services: Services, principal: Principal, job_id: UUID) -> Job:
    """The user's job. Raises `NotFound`, also where these credentials may not see one of its outputs because of its type."""
    job = await rows.get_job(services.db, principal.owner, job_id)
    if principal.kinds is not None and not set(job.media_types) <= principal.kinds:
        raise NotFound
    return job


@post("/", guards=[needs(Scope.JOBS_WRITE)], status_code=201)
async def generate(request: Http, data: JSONBody[GenerateWish]) -> Response[NewJobAnswer]:
    """Registers a job and holds the quota of its outputs, so that they cannot fail for want of it."""
    return await create(request, data)


async def create(request: Http, data: GenerateWish) -> Response[NewJobAnswer]:
    """The answer to whoever wants that job."""
    services, principal = services_of(request), principal_of(request)
    key = request.headers.get("idempotency-key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest("Idempotency-Key", "must be 1 to 200 visible ASCII characters")
    job = await services.generation.create(principal.owner, _wish(services, principal, data), key, principal.kinds)
    job = await visible_job(services, principal, job.id)  # the key may be that of a job which these credentials may not see
    ticket = await services.generation.ticket(job)
    answer = NewJobAnswer(
        job_id=job.id,
        job=await job_answer(services, job),
        references=ticket.references,
        uploads=ticket.uploads,
        webhook=ticket.webhook,
    )
    return Response(answer, headers={"location": f"/api/generate/status/{job.id}"})


def _wish(services: Services, principal: Principal, data: GenerateWish) -> JobWish:
    if (data.entity_type is None) != (data.entity_id is None):
        raise InvalidRequest("entity_id", "comes with entity_type")
    if principal.kinds is not None and {output.type for output in data.outputs} - principal.kinds:
        raise InvalidRequest("outputs", f"these credentials are good for {', '.join(sorted(principal.kinds))} alone")
    settings = services.settings
    ttl_seconds = min(settings.generation_ttl_seconds, settings.link_max_ttl_seconds) if data.ttl_seconds is None else data.ttl_seconds
    if ttl_seconds > settings.link_max_ttl_seconds:
        raise InvalidRequest("ttl_seconds", f"must be at most {settings.link_max_ttl_seconds}")
    return JobWish(
        outputs=[
            OutputWish(
                media_type=output.type,
                max_bytes=output.max_bytes,
                file_name=None if output.file_name is None else fields.clean_name(output.file_name, "outputs"),
            )
            for output in data.outputs
        ],
        pipeline=data.pipeline,
        entity_type=data.entity_type,
        entity_id=_cleaned(data.entity_id, "entity_id"),
        project_id=_cleaned(data.project_id, "project_id"),
        model=_cleaned(data.model, "model"),
        prompt=None if data.prompt is None else fields.clean_text(data.prompt, "prompt", MOST_PROMPT_CHARACTERS),
        parameters=fields.clean_metadata(data.parameters, "parameters"),
        reference_ids=list(dict.fromkeys(data.references)),
        parent_id=data.parent_id,
        callback=None if data.callback is None else Callback(data.callback.url, data.callback.secret),
        marks=None if data.marks is None else list(dict.fromkeys(data.marks)),
        ttl_seconds=ttl_seconds,
    )


def _cleaned(text: str | None, field: str) -> str | None:
    return None if text is None else fields.clean_user_id(text, field)


@get("/", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def list_jobs(
    request: Http,
    *,
    job_state: Annotated[JobState | None, QueryParameter(name="state", description="Only jobs in this state.")] = None,
    entity_type: Annotated[str | None, QueryParameter(description="Only jobs for entities of this type.")] = None,
    entity_id: Annotated[str | None, QueryParameter(description="Only jobs for this entity; comes with `entity_type`.")] = None,
    project_id: Annotated[str | None, QueryParameter(description="Only jobs of this project.")] = None,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Jobs on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before, with the same filters.")] = None,
) -> JobList:
    """The user's jobs, newest first, page by page."""
    services, principal = services_of(request), principal_of(request)
    if entity_id is not None and entity_type is None:
        raise InvalidRequest("entity_id", "comes with entity_type")
    page = await rows.list_jobs(
        services.db,
        principal.owner,
        JobQuery(
            state=job_state,
            entity_type=_cleaned(entity_type, "entity_type"),
            entity_id=_cleaned(entity_id, "entity_id"),
            project_id=_cleaned(project_id, "project_id"),
            kinds=principal.kinds,
            limit=page_size(services, limit),
            cursor=cursor,
        ),
    )
    outputs = await rows.get_outputs(services.db, [job.id for job in page.jobs]) if page.jobs else {}
    return JobList([job_json(job, outputs.get(job.id, [])) for job in page.jobs], page.next_cursor)


@get("/status/{job_id:uuid}", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def job_status(
    request: Http,
    job_id: FromPath[UUID],
    wait: Annotated[Literal["end"] | None, QueryParameter(description="Answer when the job has ended, or after a while (30 s).")] = None,
) -> JobAnswer:
    """How a job goes, and what became of each of its outputs."""
    services, principal = services_of(request), principal_of(request)
    job = await visible_job(services, principal, job_id)
    if wait is not None and job.finished_at is None:
        job = await _ended(services, job)
    return await job_answer(services, job)


async def _ended(services: Services, job: Job) -> Job:
    """The job when it has ended, or as it is when we have waited long enough."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + services.settings.preview_wait_seconds
    with services.notices.of(job_notice(job.id)) as noticed:
        while (job := await rows.get_job(services.db, job.user_id, job.id)).finished_at is None and (left := deadline - clock()) > 0:
            if services.streams.stopping.is_set():
                break
            await time_to_look(noticed, left)
    return job


@post("/{job_id:uuid}/cancel", guards=[needs(Scope.JOBS_WRITE)], status_code=200)
async def cancel_job(request: Http, job_id: FromPath[UUID]) -> JobAnswer:
    """Cancels a job that has not ended; what is stored stays, what comes later is refused. One that has ended stays as it is."""
    services, principal = services_of(request), principal_of(request)
    await visible_job(services, principal, job_id)
    await rows.cancel_job(services.db, principal.owner, job_id)
    return await job_answer(services, await rows.get_job(services.db, principal.owner, job_id))


router = Router(path="/api/generate", route_handlers=[generate, list_jobs, job_status, cancel_job], tags=["Generation"])
