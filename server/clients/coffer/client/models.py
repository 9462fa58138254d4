"""What Coffer answers, as far as this client looks at it. Fields that a newer server adds are passed over.

tests/client holds each against the server's OpenAPI description.
"""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

Kind = Literal["video", "image", "scene", "project", "audio"]
JobState = Literal["queued", "running", "completed", "partly_completed", "failed", "cancelled", "expired"]


class Link(msgspec.Struct, frozen=True):
    """Whoever has `url` may read the file until `expires_at`."""

    url: str
    expires_at: datetime


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file. What previews tell is None until `preview_state` is `ready`; `link` is there where it was asked for."""

    id: UUID
    user_id: str
    file_name: str
    file_type: str
    mime_type: str
    file_size: int
    sha256: str
    etag: str
    width: int | None
    height: int | None
    duration_seconds: float | None
    preview_state: Literal["pending", "ready", "failed", "unsupported"] | None
    package_name: str | None
    tags: list[str]
    is_favorite: bool
    is_public: bool
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    link: Link | None = None


class FilePage(msgspec.Struct, frozen=True):
    """`next_cursor` asks for the page after this one; None when there is none."""

    files: list[File]
    next_cursor: str | None


class UploadLink(msgspec.Struct, frozen=True):
    """The right to upload one file, which is then called `file_id`. `upload_to` takes it."""

    url: str
    file_id: UUID
    expires_at: datetime
    max_bytes: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a user stores. `limit_bytes` and `available_bytes` are None for unlimited storage."""

    used_bytes: int
    reserved_bytes: int
    limit_bytes: int | None
    available_bytes: int | None
    file_count: int
    preview_bytes: int


class OutputWish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An output that a job is to have: of that type, at most so many bytes, which are held for it."""

    max_bytes: int
    type: Kind = "image"
    file_name: str | None = None


class Callback(msgspec.Struct, frozen=True):
    """Where the app is told of a job's end, and what that is signed with: `whsec_` and the base64 of 24 to 64 bytes of its own."""

    url: str
    secret: str


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """`file_id` is that of a file once `state` is `stored`; `reason` is why it failed."""

    index: int
    file_id: UUID
    type: str
    state: Literal["awaited", "fetching", "stored", "failed"]
    reason: str | None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job. It has ended when `finished_at` is there."""

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
    callback_state: Literal["waiting", "due", "told", "failed"] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime
    outputs: list[Output]


class JobPage(msgspec.Struct, frozen=True):
    """`next_cursor` asks for the page after this one; None when there is none."""

    jobs: list[Job]
    next_cursor: str | None


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the pipeline may read at `url`."""

    file_id: UUID
    file_name: str
    mime_type: str
    file_size: int
    url: str
    expires_at: datetime


class UploadPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where an output goes. `upload_to` takes it."""

    index: int
    file_id: UUID
    type: str
    max_bytes: int
    url: str
    tus_url: str
    expires_at: datetime


class WebhookPlace(msgspec.Struct, frozen=True):
    """Where the pipeline tells how it goes, and what it signs that with (Standard Webhooks)."""

    url: str
    secret: str


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job that was just registered, and all that its pipeline needs. Whoever has it may bring the outputs and speak for the job."""

    job_id: UUID
    job: Job
    references: list[Reference]
    uploads: list[UploadPlace]
    webhook: WebhookPlace
