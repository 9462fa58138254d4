"""The JSON routes of files. Their bytes travel through `upload.py` and `download.py`."""

import asyncio
import re
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Response, Router, delete, get, patch, post, put
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from server import fields, ledger
from server.api.cursors import opened, sealed
from server.api.door import needs, principal_of, services_of
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.api.services import Services
from server.api.signing import LinkAnswer, Linker, PreviewAnswer
from server.auth import Scope
from server.delivery.conditions import evaluate_if_match
from server.delivery.headers import etag
from server.errors import Forbidden, InvalidRequest, NotFound, PreconditionFailed
from server.ledger import File, FileQuery

MOST_DELETED_AT_ONCE = 1_000

_LINKS_MEANING = "With 1, signed links to each file and to its previews. Needs the scope links:write too."
_UUID_CHARACTERS = 36
_SEARCHABLE = re.compile(r"[^\x00-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3000]")  # what name_suffixes_v1 takes for part of a word

Sort = Literal["created", "-created", "name", "-name", "size", "-size"]
Kind = Literal["video", "image", "scene", "project", "audio"]
Http = Request[Any, Any, Any]


class FileAnswer(msgspec.Struct, kw_only=True):
    """A file as clients see it. Where its bytes lie is nobody's business.

    `etag` is as in the download's header. `preview_state` is null for a file from before there were previews of its kind; what previews
    tell is null until it is `ready`. `thumbhash` is base64. `link` and `previews` are there with `links=1`; `previews` are by name:
    pictures by their width limit in pixels (`320`), and others such as `storyboard`.
    """

    id: UUID
    user_id: str
    file_name: str
    file_type: str
    mime_type: str
    file_size: int
    sha256: str
    etag: str
    resolution: str | None
    width: int | None
    height: int | None
    duration: str | None
    duration_seconds: float | None
    frame_rate: float | None
    video_codec: str | None
    audio_codec: str | None
    preview_state: Literal["pending", "ready", "failed", "unsupported"] | None
    preview_reason: str | None
    thumbhash: str | None
    average_color: str | None
    package_name: str | None
    tags: list[str]
    is_favorite: bool
    is_public: bool
    metadata: dict[str, Any]
    upload_date: datetime
    created_at: datetime
    updated_at: datetime
    link: LinkAnswer | UnsetType = UNSET
    previews: dict[str, PreviewAnswer] | UnsetType = UNSET


class ProvenanceAnswer(msgspec.Struct):
    """`digital_source_type` is a term of the IPTC's vocabulary, as a URL, where XMP names one. `content_credentials` are a C2PA manifest
    store: its `manifests`, which of them is the `active_manifest`, and the `validation_state` of its hashes and signatures; or an `error`.
    No certificate is trusted here: who signed is for the reader to judge.
    """

    digital_source_type: str | None
    content_credentials: dict[str, Any] | None


class FileList(msgspec.Struct):
    """`next_cursor` asks for the page after this one; null when there is none."""

    files: list[FileAnswer]
    next_cursor: str | None


class FileChanges(msgspec.Struct, forbid_unknown_fields=True):
    """What is left out stays as it is. `metadata` replaces all of the old; `package_name` null takes the file out of its package."""

    file_name: Annotated[str, Meta(min_length=1, max_length=fields.NAME_CHARACTERS)] | UnsetType = UNSET
    package_name: Annotated[str, Meta(max_length=fields.PACKAGE_NAME_CHARACTERS)] | UnsetType | None = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET


class FavoriteChange(msgspec.Struct, forbid_unknown_fields=True):
    """Sets the flag to this, whatever it was: unlike a request without a body, it may be repeated."""

    is_favorite: bool


class TagsChange(msgspec.Struct, forbid_unknown_fields=True):
    """All tags of the file from now on, at most 64 of up to 100 characters; an empty list removes them. Repetitions are dropped."""

    tags: list[str]


class FileIds(msgspec.Struct, forbid_unknown_fields=True):
    """Ids as text: one that is malformed names no file, and costs the others nothing. `permanent` goes past the trash."""

    ids: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(min_length=1, max_length=MOST_DELETED_AT_ONCE)]
    permanent: bool = False


class DeleteResult(msgspec.Struct):
    """`id` as it was sent. `not_found` also for an id that is malformed or another user's."""

    id: str
    status: Literal["deleted", "not_found"]


class DeleteResults(msgspec.Struct):
    """One result for each id, in the order of the request; an id sent twice is answered twice, alike."""

    results: list[DeleteResult]


def file_json(file: File) -> FileAnswer:
    """The answer that every route gives for a file."""
    sha256 = file.sha256.hex()
    return FileAnswer(
        id=file.id,
        user_id=file.user_id,
        file_name=file.file_name,
        file_type=file.file_type,
        mime_type=file.mime_type,
        file_size=file.file_size,
        sha256=sha256,
        etag=etag(file.sha256),
        resolution=file.resolution,
        width=file.width,
        height=file.height,
        duration=file.duration,
        duration_seconds=file.duration_seconds,
        frame_rate=file.frame_rate,
        video_codec=file.video_codec,
        audio_codec=file.audio_codec,
        preview_state=file.preview_state,
        preview_reason=file.preview_reason,
        thumbhash=None if file.thumbhash is None else b64encode(file.thumbhash).decode(),
        average_color=file.average_color,
        package_name=file.package_name,
        tags=file.tags,
        is_favorite=file.is_favorite,
        is_public=file.public_id is not None,
        metadata=file.metadata,
        upload_date=file.upload_date,
        created_at=file.created_at,
        updated_at=file.updated_at,
    )


@get("/", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def list_files(
    request: Http,
    *,
    file_type: Annotated[Kind | None, QueryParameter(name="type", description="Only files of this kind.")] = None,
    mime: Annotated[str | None, QueryParameter(description="Only this MIME type.")] = None,
    tag: Annotated[str | None, QueryParameter(description="Only files with this tag.")] = None,
    favorite: Annotated[bool | None, QueryParameter(description="Only favourites, or with false only the others.")] = None,
    package_name: Annotated[str | None, QueryParameter(description="Only files of this package.")] = None,
    name: Annotated[
        str | None, QueryParameter(description="Only names with a word that starts so, in any case. Comes with sort=name.")
    ] = None,
    created_from: Annotated[
        str | None, QueryParameter(description="Uploaded at this time or later: RFC 3339, or a date (UTC). Comes with sort=created.")
    ] = None,
    created_to: Annotated[
        str | None, QueryParameter(description="Uploaded before this time: RFC 3339, or a date (UTC). Comes with sort=created.")
    ] = None,
    sort: Annotated[Sort | None, QueryParameter(description="A leading minus sorts downward. Newest first when left out.")] = None,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Files on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before, with the same filters and sort.")] = None,
    links: Annotated[bool, QueryParameter(description=_LINKS_MEANING)] = False,
) -> FileList:
    """The user's files, page by page. A combination of filter and sort that no index serves is refused, never slow."""
    services = services_of(request)
    _check_links(request, wanted=links)
    if name is not None and not _SEARCHABLE.search(name):
        raise InvalidRequest("name", "must hold a letter or a digit to look for")
    wanted = sort or ("-created" if name is None else "name")
    is_restricted, link_keys = principal_of(request).kinds is not None, services.settings.link_keys
    page = await ledger.list_files(
        services.db,
        principal_of(request).owner,
        FileQuery(
            kinds=principal_of(request).kinds,
            file_type=file_type,
            mime_type=None if mime is None else fields.clean_name(mime, "mime"),
            tag=None if tag is None else fields.clean_name(tag, "tag"),
            is_favorite=favorite,
            package_name=None if package_name is None else fields.clean_name(package_name, "package_name"),
            name=None if name is None else fields.clean_name(name, "name"),
            created_from=moment(created_from, "created_from"),
            created_to=moment(created_to, "created_to"),
            sort=_SORTS[wanted.removeprefix("-")],
            descending=wanted.startswith("-"),
            limit=page_size(services, limit),
            cursor=opened(cursor, link_keys) if cursor is not None and is_restricted else cursor,
        ),
    )
    answers = [file_json(file) for file in page.files]
    if links and answers:
        await _add_links(services, principal_of(request).owner, page.files, answers)
    next_cursor = sealed(page.next_cursor, link_keys) if page.next_cursor is not None and is_restricted else page.next_cursor
    return FileList(answers, next_cursor)


@get("/{file_id:uuid}", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def show_file(
    request: Http,
    file_id: FromPath[UUID],
    wait: Annotated[
        Literal["preview"] | None, QueryParameter(description="Answer when its preview is no longer pending, or after a while (30 s).")
    ] = None,
    links: Annotated[bool, QueryParameter(description=_LINKS_MEANING)] = False,
) -> FileAnswer:
    """One file's fields."""
    services, owner = services_of(request), principal_of(request).owner
    _check_links(request, wanted=links)
    file = await ledger.get_file(services.db, owner, file_id)
    if wait is not None and file.preview_state == "pending":
        file = await _with_previews(services, owner, file)
    answer = file_json(file)
    if links:
        await _add_links(services, owner, [file], [answer])
    return answer


@get("/{file_id:uuid}/provenance", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def show_provenance(request: Http, file_id: FromPath[UUID]) -> ProvenanceAnswer:
    """What the file's own bytes say of how they were made, as they came."""
    services = services_of(request)
    said = await services.provenance.of(await ledger.get_file(services.db, principal_of(request).owner, file_id))
    return ProvenanceAnswer(said.digital_source_type, said.content_credentials)


async def _with_previews(services: Services, owner: str, file: File) -> File:
    """The file when its previews are no longer pending, or as it is when we have waited long enough."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + services.settings.preview_wait_seconds
    with services.notices.of(file.id) as noticed:
        while (file := await ledger.get_file(services.db, owner, file.id)).preview_state == "pending" and (left := deadline - clock()) > 0:
            if services.streams.stopping.is_set():
                break
            await ledger.time_to_look(noticed, left)
    return file


def _check_links(request: Http, *, wanted: bool) -> None:
    if wanted and Scope.LINKS_WRITE not in principal_of(request).scopes:
        raise Forbidden(Scope.LINKS_WRITE)


async def _add_links(services: Services, owner: str, files: Sequence[File], answers: Sequence[FileAnswer]) -> None:
    """With these a page of files can be drawn without another request to the API."""
    linker = await Linker.of(services, owner, files, None)
    made = await ledger.get_previews_of_many(services.db, owner, [file.id for file in files])
    for answer, file in zip(answers, files, strict=True):
        answer.link = linker.link(file)
        answer.previews = linker.previews(file, made.get(file.id, ()))


@patch("/{file_id:uuid}", guards=[needs(Scope.FILES_WRITE)])
async def change_file(request: Http, file_id: FromPath[UUID], data: JSONBody[FileChanges]) -> FileAnswer:
    """Renames a file, or changes its package name or metadata. Without any of them the file stays as it is, `updated_at` too."""
    await _check_if_match(request, file_id)
    if data == FileChanges():
        return file_json(await ledger.get_file(services_of(request).db, principal_of(request).owner, file_id))
    services = services_of(request)
    file = await ledger.update_file(
        services.db,
        principal_of(request).owner,
        file_id,
        file_name=UNSET if data.file_name is UNSET else fields.clean_name(data.file_name, "file_name"),
        package_name=UNSET if data.package_name is UNSET else fields.clean_package_name(data.package_name),
        metadata=UNSET if data.metadata is UNSET else fields.clean_metadata(data.metadata),
    )
    if file.public_id is not None:
        services.recent_links.clear()  # its answers say its name
    return file_json(file)


@delete("/{file_id:uuid}", guards=[needs(Scope.FILES_WRITE)], before_request=known_query_only)
async def delete_file(
    request: Http,
    file_id: FromPath[UUID],
    permanent: Annotated[bool, QueryParameter(description="Past the trash, where there is one.")] = False,
) -> None:
    """Deletes a file: to the trash where the server has one, and there it still counts; else its quota is free when this is answered."""
    await _check_if_match(request, file_id)
    if not await services_of(request).intake.delete(principal_of(request).owner, [file_id], permanently=permanent):
        raise NotFound


@post("/delete", guards=[needs(Scope.FILES_WRITE)], status_code=200)
async def delete_files(request: Http, data: JSONBody[FileIds]) -> DeleteResults:
    """Deletes up to 1,000 files, as one, with an answer for each."""
    ids = {text: file_id for text in data.ids if (file_id := id_of(text)) is not None}
    services, principal = services_of(request), principal_of(request)
    wanted = list(dict.fromkeys(ids.values()))
    if principal.kinds is not None:
        wanted = await ledger.ids_of_kinds(services.db, principal.owner, wanted, principal.kinds)
    deleted = await services.intake.delete(principal.owner, wanted, permanently=data.permanent)
    return DeleteResults([DeleteResult(each, "deleted" if ids.get(each) in deleted else "not_found") for each in data.ids])


@post("/{file_id:uuid}/favorite", guards=[needs(Scope.FILES_WRITE)], status_code=200)
async def favor_file(request: Http, file_id: FromPath[UUID], data: JSONBody[FavoriteChange | None] = None) -> FileAnswer:
    """Without a body, switches whether the file is a favourite; with one, sets it."""
    value = None if data is None else data.is_favorite
    return file_json(await ledger.set_favorite(services_of(request).db, principal_of(request).owner, file_id, value))


@put("/{file_id:uuid}/tags", guards=[needs(Scope.FILES_WRITE)])
async def tag_file(request: Http, file_id: FromPath[UUID], data: JSONBody[TagsChange]) -> FileAnswer:
    """Replaces the file's tags."""
    tags = fields.clean_tags(data.tags)
    return file_json(await ledger.set_tags(services_of(request).db, principal_of(request).owner, file_id, tags))


@post("/{file_id:uuid}/copy", guards=[needs(Scope.FILES_WRITE)], status_code=201)
async def copy_file(request: Http, file_id: FromPath[UUID]) -> Response[FileAnswer]:
    """Makes a second file with the same bytes and fields, charged to the same user."""
    file = await services_of(request).intake.copy(principal_of(request).owner, file_id)
    return Response(file_json(file), headers={"location": f"/api/files/{file.id}"})


_SORTS: dict[str, Literal["created", "name", "size"]] = {"created": "created", "name": "name", "size": "size"}


def id_of(text: str) -> UUID | None:
    """A file's id as clients write it, or None."""
    try:
        return UUID(text) if len(text) == _UUID_CHARACTERS else None
    except ValueError:
        return None


async def _check_if_match(request: Http, file_id: UUID) -> None:
    """`If-Match` guards the bytes that the client has seen (RFC 9110, section 13.1.1): the ETag does not change with the other fields."""
    wanted = request.headers.get("if-match")
    if wanted is not None:
        file = await ledger.get_file(services_of(request).db, principal_of(request).owner, file_id)
        if not evaluate_if_match(wanted, etag(file.sha256)):
            raise PreconditionFailed


def moment(text: str | None, field: str) -> datetime | None:
    """A time as clients write it in a query. Raises `InvalidRequest`."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(field, "must be a time such as 2026-01-31T12:00:00Z, or a date; write + as %2B") from None
    if not 1900 <= moment.year <= 9000:  # away from the ends of the calendar, where a change of time zone overflows
        raise InvalidRequest(field, "must lie between the years 1900 and 9000")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


router = Router(
    path="/api/files",
    route_handlers=[list_files, show_file, show_provenance, change_file, delete_file, delete_files, favor_file, tag_file, copy_file],
    tags=["Files"],
)
