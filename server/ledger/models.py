"""Rows as the rest of the house sees them. Names are those of the tables; every size is in bytes."""

import math
from datetime import datetime
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal
from uuid import UUID

import msgspec

PreviewState = Literal["pending", "ready", "failed", "unsupported"]


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `user_files`. `file_path` is relative to its volume's mount.

    What previews are made of fills what is None till then; `preview_state` None: no preview is made of such a file.
    `preview_tries` is how often making one of these bytes has begun. `damaged_at`: since when the stored bytes are known to be
    wrong. `deleted_at`: since when it is in the trash.
    """

    id: UUID
    user_id: str
    file_name: str
    file_type: str
    mime_type: str
    file_size: int
    sha256: bytes
    volume_id: UUID
    file_path: str
    generation: int
    thumbnail_path: str | None
    resolution: str | None
    width: int | None
    height: int | None
    duration: str | None
    duration_seconds: float | None
    preview_state: PreviewState | None
    preview_reason: str | None
    preview_tries: int
    thumbhash: bytes | None
    average_color: str | None
    frame_rate: float | None
    video_codec: str | None
    audio_codec: str | None
    package_name: str | None
    tags: list[str]
    is_favorite: bool
    public_id: str | None
    metadata: dict[str, Any]
    upload_date: datetime
    content_changed_at: datetime
    created_at: datetime
    updated_at: datetime
    damaged_at: datetime | None
    deleted_at: datetime | None


class NewFile(msgspec.Struct, frozen=True, kw_only=True):
    """What `publish_file` inserts. `id` equals the upload's id, so a reservation and its file never part.

    `user_since` is `User.created_at` as it was when the upload began: the same id erased and come back is another user. `fence` is that of
    the writer of a resumable upload: another one's file is not inserted. Nor is one that `needs_reservation` and has none any more.
    """

    id: UUID
    user_id: str
    file_name: str
    file_type: str
    mime_type: str
    file_size: int
    sha256: bytes
    volume_id: UUID
    file_path: str
    generation: int = 1
    package_name: str | None = None
    tags: list[str] = []
    metadata: dict[str, Any] = {}
    idempotency_key: str | None = None
    user_since: datetime | None = None
    fence: int | None = None
    needs_reservation: bool = False


class ReplacedContent(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes that `replace_content` points a file at. `upload_id` names the reservation that held room for them."""

    upload_id: UUID
    mime_type: str
    file_size: int
    sha256: bytes
    volume_id: UUID
    file_path: str
    generation: int


class PreviewRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `previews`: a file derived from another. `file_name` is that in the other's directory of previews."""

    variant: str
    file_name: str
    mime_type: str
    width: int | None
    height: int | None
    size_bytes: int


class LinkedPreview(msgspec.Struct, frozen=True, kw_only=True):
    """What a link to a preview leads to: the file, and the preview where it has been made. `is_unused`: it was not asked for lately."""

    file: File
    preview: PreviewRow | None
    is_unused: bool


class EvictedPreview(msgspec.Struct, frozen=True, kw_only=True):
    """A preview without a row, whose bytes are still to be removed. `file_path` is that of the file it was made from."""

    file_id: UUID
    file_name: str
    volume_id: UUID
    file_path: str


class PreviewFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What making previews has found out about a file. Width and height as it is to be seen, orientation applied."""

    width: int | None = None
    height: int | None = None
    duration_seconds: float | None = None
    frame_rate: float | None = None
    video_codec: str | None = None
    audio_codec: str | None = None
    thumbhash: bytes | None = None
    average_color: str | None = None


class FileQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What to list. None is no filter. `name` finds words of the name by their beginnings, and comes with the sort `name`.
    `kinds` are the only ones that may be seen at all, whatever `file_type` asks for.

    Dates are of the upload, `created_from` inclusive and `created_to` exclusive, and come with the sort `created`.
    """

    kinds: frozenset[str] | None = None
    file_type: str | None = None
    mime_type: str | None = None
    tag: str | None = None
    is_favorite: bool | None = None
    package_name: str | None = None
    name: str | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    sort: Literal["created", "name", "size"] = "created"
    descending: bool = True
    limit: int = 50
    cursor: str | None = None


class FilePage(msgspec.Struct, frozen=True, kw_only=True):
    """One page. `next_cursor` is None on the last one."""

    files: list[File]
    next_cursor: str | None


class User(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `user_storage`. `max_bytes` None is unlimited. `preview_bytes` are in none of the other figures.

    `held_at`: since when a legal hold keeps everything of the user's, for `hold_reason`.
    `warned_percent` is what the last event `quota.warning` told, until use falls well below; 0: none.
    """

    user_id: str
    tier: str
    max_bytes: int | None
    total_bytes: int
    reserved_bytes: int
    file_count: int
    preview_bytes: int
    warned_percent: int
    volume_id: UUID | None
    erasing_at: datetime | None
    held_at: datetime | None
    hold_reason: str | None
    link_epoch: int
    created_at: datetime
    updated_at: datetime


class UploadLink(msgspec.Struct, frozen=True, kw_only=True):
    """What an upload link allows and gives: kept as JSON in its reservation's row. `types` are kinds or MIME types; empty is any.

    `kinds` are the only ones that the credentials which made the link were good for; None is all. `job_id`: what it brings is an output,
    to be marked with `marks`.
    """

    types: list[str] = []
    kinds: list[str] | None = None
    file_name: str | None = None
    kind: str | None = None
    package_name: str | None = None
    tags: list[str] = []
    metadata: dict[str, Any] = {}
    job_id: UUID | None = None
    marks: list[str] = []


class ClaimedLink(msgspec.Struct, frozen=True, kw_only=True):
    """An upload link that one upload has taken. `reserved_bytes` is the most that it may bring."""

    user_id: str
    reserved_bytes: int
    link: UploadLink


class KindUsage(msgspec.Struct, frozen=True, kw_only=True):
    """A user's files of one kind, and their bytes. Reservations are in none."""

    file_count: int
    total_bytes: int


class MovedToTrash(msgspec.Struct, frozen=True, kw_only=True):
    """A file, and the name that its bytes are to have in the trash. Where there are no bytes, it keeps the one it has."""

    id: UUID
    old_generation: int
    generation: int
    file_path: str


class LifecycleRule(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `lifecycle_rules`: what becomes of files `after_days` days, which those are. None is no condition."""

    id: int
    action: Literal["delete", "trash"]
    after_days: int
    user_id: str | None
    file_type: str | None
    mime_type: str | None
    tag: str | None
    package_name: str | None
    metadata: dict[str, Any] | None
    includes_favorites: bool
    created_at: datetime


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file whose row is gone and whose bytes must go too."""

    id: int
    volume_id: UUID
    file_path: str


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `audit_log`. `actor_*`, `acting_user_id` and `address` as in `server.actor.Actor`; the others are what it was done to."""

    at: datetime
    id: int
    action: str
    actor_kind: str
    actor_id: str | None
    acting_user_id: str | None
    user_id: str | None
    file_id: UUID | None
    address: str | None
    request_id: str | None
    detail: dict[str, Any]


class AuditQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which records to list, newest first. None is no filter. `since` is inclusive, `until` exclusive."""

    user_id: str | None = None
    file_id: UUID | None = None
    actor_id: str | None = None
    action: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    limit: int = 50
    cursor: str | None = None


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page. `next_cursor` is None on the last one."""

    records: list[AuditRecord]
    next_cursor: str | None


Work = Literal["asset_check", "asset_import", "delivery", "output_fetch"]
"""What workers do with other machines."""


class WorkFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Generation and events out. `ended_…` are of the last hour; of what waits 100,000 are counted at most.

    Seconds are 0 where nothing waits. `counts` are what the workers have counted since ever: by work and result.
    """

    open_jobs: dict[str, int]
    ended_jobs: dict[str, int]
    ended_outputs: dict[str, int]
    oldest_queued_seconds: float
    fetching_outputs: int
    pending_deliveries: int
    dead_letters: int
    oldest_delivery_seconds: float
    counts: dict[tuple[str, str], int]


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All users, files and uploads together. `limit_bytes` is the sum of the quotas that are not unlimited; `warned_80` are the users whose
    last warning was of 80 % of their quota. Seconds are 0 where nothing is overdue, or nothing waits to be buried.
    """

    users: int
    file_count: int
    total_bytes: float
    reserved_bytes: float
    limit_bytes: float
    unlimited_users: int
    warned_80: int
    warned_90: int
    warned_100: int
    damaged_files: int
    reservation_overdue_seconds: float
    tombstone_age_seconds: float
    worker_connections: int
    work: WorkFigures


class VolumeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `volumes`. `state` is `open` or `read_only` (set after an I/O error, cleared by a sysadmin).

    One that is draining takes no new users; one that is reserved takes this one alone.
    """

    id: UUID
    mount_path: str
    state: str
    is_draining: bool
    reserved_for: str | None
    created_at: datetime


class ApiKeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `api_keys`. Only the SHA-256 of the secret is ever stored.

    `user_ids`, `kinds` and `networks` are the only ones that the key is good for; None is no restriction.
    """

    key_id: str
    name: str
    secret_sha256: bytes
    scopes: list[str]
    user_ids: list[str] | None = None
    kinds: list[str] | None = None
    networks: list[IPv4Network | IPv6Network] | None = None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = None


PREVIEW_BOUNDS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, math.inf)
"""Of the histogram that the workers keep. A bound once used stays: rows have it."""


class PreviewFigure(msgspec.Struct, frozen=True, kw_only=True):
    """How many files of a type ended in a state after up to `upto_seconds` of work, and more than the bound before, and their sum."""

    file_type: str
    state: str
    upto_seconds: float
    files: int
    seconds: float


class ResumableUpload(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `resumable_uploads`. `length_bytes` None: not declared yet. `offset_bytes` are synced.

    `upload_metadata` is what the client sent; `details` is what was made of it (`server.intake.Details`), as JSON.
    """

    id: UUID
    user_id: str
    volume_id: UUID
    incoming_name: UUID
    length_bytes: int | None
    offset_bytes: int
    upload_metadata: str
    details: str
    kinds: list[str] | None
    is_partial: bool
    parts: list[UUID] | None
    joined_as: UUID | None
    link: str | None
    fence: int
    boot_id: str | None
    expires_at: datetime


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a row says of a file's bytes."""

    id: UUID
    user_id: str
    volume_id: UUID
    file_path: str
    file_size: int
    sha256: bytes
    damaged_at: datetime | None


class StoredPreview(msgspec.Struct, frozen=True, kw_only=True):
    """Where a preview's bytes should lie: by the row of its file, whose last three are None when that is gone."""

    file_id: UUID
    variant: str
    file_name: str
    size_bytes: int
    user_id: str | None
    volume_id: UUID | None
    file_path: str | None


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file without a row. `seen_before`: by an earlier audit, too."""

    file_path: str
    size_bytes: int
    seen_before: bool


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted of a user, by the row of `user_storage`, and as its files, uploads and previews sum up, all as of one moment."""

    user_id: str
    total_bytes: int
    file_count: int
    reserved_bytes: int
    preview_bytes: int
    total_sum: int
    file_sum: int
    reserved_sum: int
    preview_sum: int
    last_of_history: int
    typed_bytes: int
    types_agree: bool

    @property
    def wrong(self) -> list[str]:
        """The counters that are not the sums."""
        agree = {
            "total_bytes": self.total_bytes == self.total_sum,
            "file_count": self.file_count == self.file_sum,
            "reserved_bytes": self.reserved_bytes == self.reserved_sum,
            "preview_bytes": self.preview_bytes == self.preview_sum,
            "history": self.total_bytes == self.last_of_history,
            "by_type": self.types_agree and self.typed_bytes == self.total_sum,
        }
        return [name for name, does in agree.items() if not does]


class WebhookEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Who is told of events, without secrets. `types` None is all. `pending` and `dead` count what is still to be told, and given up."""

    id: UUID
    url: str
    types: list[str] | None
    description: str
    created_at: datetime
    last_sent_at: datetime | None
    last_failed_at: datetime | None
    last_failure: str | None
    pending: int
    dead: int


class DueWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint for which something is due. All of `secrets` sign."""

    id: UUID
    url: str
    secrets: list[str]


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An event for one endpoint. `tries` counts this one too."""

    id: int
    tries: int
    event_id: int
    type: str
    user_id: str
    file_id: UUID | None
    payload: dict[str, Any]
    created_at: datetime


class DeadDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """An event that an endpoint was never told, since `give_up_at`."""

    id: int
    tries: int
    last_failure: str | None
    give_up_at: datetime
    event_id: int
    type: str
    user_id: str
    file_id: UUID | None
    payload: dict[str, Any]
    created_at: datetime


class AssetSubject(msgspec.Struct, frozen=True, kw_only=True):
    """What linked media shows, in the app's own words. Without a `media_type` it is not remembered as media, and shows no entity."""

    media_type: str | None = None
    entity_type: str | None = None
    entity_id: str | None = None
    project_id: str | None = None


class Asset(msgspec.Struct, frozen=True, kw_only=True):
    """Media that lives elsewhere. `details` and `import_actor` are JSON, the latter of an actor; `version` counts the URLs that it has had.

    `file_id` names what it was imported as, and may have been deleted since.
    """

    id: UUID
    user_id: str
    url: str
    fetch_url: str
    version: int
    details: str
    state: str
    reason: str | None
    mime_type: str | None
    size_bytes: int | None
    failures: int
    last_checked_at: datetime | None
    last_reachable_at: datetime | None
    import_state: str | None
    import_reason: str | None
    import_actor: str | None
    import_kinds: list[str] | None
    file_id: UUID | None
    created_at: datetime
    updated_at: datetime


# Generation

JobState = Literal["queued", "running", "completed", "partly_completed", "failed", "cancelled", "expired"]
CallbackState = Literal["waiting", "due", "told", "failed"]
OutputState = Literal["awaited", "fetching", "stored", "failed"]
SourceType = Literal["generated", "linked", "replaced", "uploaded"]
MarkingState = Literal["pending", "marked", "unmarked"]


class NewOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that a new job awaits. `link` is what its upload link says."""

    file_id: UUID
    media_type: str
    max_bytes: int
    link: UploadLink


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """What `create_job` registers. `dispatched`: the worker hands it on to the pipeline."""

    id: UUID
    user_id: str
    outputs: list[NewOutput]
    pipeline: str | None = None
    entity_type: str | None = None
    entity_id: str | None = None
    project_id: str | None = None
    model_used: str | None = None
    prompt_used: str | None = None
    generation_params: dict[str, Any] = {}
    reference_ids: list[UUID] = []
    parent_id: UUID | None = None
    callback_url: str | None = None
    callback_secret: str | None = None
    dispatched: bool = False


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `generation_outputs`: a file that is still to come, has come, or (with its `reason`) never will."""

    job_id: UUID
    output_index: int
    file_id: UUID
    media_type: str
    max_bytes: int
    state: OutputState
    reason: str | None
    url: str | None


class Marking(msgspec.Struct, frozen=True):
    """What an output is to be marked with, and the model that made it."""

    marks: list[str]
    model_used: str | None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `generation_jobs`. `error` is in the pipeline's words; `remote_id` is what the pipeline calls the job."""

    id: UUID
    user_id: str
    pipeline: str | None
    entity_type: str | None
    entity_id: str | None
    project_id: str | None
    media_types: list[str]
    model_used: str | None
    prompt_used: str | None
    generation_params: dict[str, Any]
    reference_ids: list[UUID]
    parent_id: UUID | None
    output_count: int
    state: JobState
    progress_percent: int
    credits_used: Decimal | None
    error: str | None
    remote_id: str | None
    callback_url: str | None
    callback_state: CallbackState | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime


class JobQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs of a user a page holds, newest first. `kinds`: only jobs all of whose outputs are of these; None is all."""

    state: JobState | None = None
    entity_type: str | None = None
    entity_id: str | None = None
    project_id: str | None = None
    kinds: frozenset[str] | None = None
    limit: int = 50
    cursor: str | None = None


class JobPage(msgspec.Struct, frozen=True):
    """`next_cursor` asks for the page after this one; None when there is none."""

    jobs: list[Job]
    next_cursor: str | None


class Media(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `generated_media`: how a piece of media was made. `id` is that of its file, where it has one.

    `marks` are those that Coffer has put into the bytes as they are now; `marking` is None where it was to put in none.
    """

    id: UUID
    user_id: str
    file_id: UUID | None
    job_id: UUID | None
    output_index: int | None
    entity_type: str | None
    entity_id: str | None
    project_id: str | None
    media_type: str
    source_type: SourceType
    model_used: str | None
    prompt_used: str | None
    generation_params: dict[str, Any]
    credits_used: Decimal | None
    original_url: str | None
    is_accessible: bool
    last_checked_at: datetime | None
    reference_ids: list[UUID]
    parent_id: UUID | None
    root_id: UUID
    is_primary: bool
    marks: list[str]
    marking: MarkingState | None
    marking_reason: str | None
    created_at: datetime


class MediaQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which media of a user a page holds, newest first. `prompt`: all of its words stand in the prompt. `kinds`: None is all."""

    entity_type: str | None = None
    entity_id: str | None = None
    project_id: str | None = None
    model: str | None = None
    media_type: str | None = None
    source_type: SourceType | None = None
    prompt: str | None = None
    is_primary: bool | None = None
    root_id: UUID | None = None
    kinds: frozenset[str] | None = None
    limit: int = 50
    cursor: str | None = None


class MediaPage(msgspec.Struct, frozen=True):
    """`next_cursor` asks for the page after this one; None when there is none."""

    media: list[Media]
    next_cursor: str | None
