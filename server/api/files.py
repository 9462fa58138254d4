"""The JSON routes of files. Their bytes travel through `upload.py` and `download.py`."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Response, Router, delete, get, patch, post, put
from litestar.params import Parameter
from msgspec import UNSET, Meta, UnsetType

from server import fields, ledger
from server.api.cursors import opened, sealed
from server.api.door import needs, principal_of, services_of
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.api.signing import LinkAnswer, Linker
from server.auth import Scope
from server.delivery.conditions import evaluate_if_match
from server.errors import Forbidden, InvalidRequest, NotFound, PreconditionFailed
from server.ledger import File, FileQuery

MOST_DELETED_AT_ONCE = 1_000

_UUID_CHARACTERS = 36
_SEARCHABLE = re.compile(r"[^\x00-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3000]")  # what name_suffixes_v1 takes for part of a word

Sort = Literal["created", "-created", "name", "-name", "size", "-size"]
Kind = Literal["video", "image", "scene", "project", "audio"]
Http = Request[Any, Any, Any]


class FileAnswer(msgspec.Struct, kw_only=True):
    """A file as clients see it. Where its bytes lie is nobody's business.

    `etag` is as in the download's header. `link` is there in lists with `links=1`.
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
    package_name: str | None
    tags: list[str]
    is_favorite: bool
    is_public: bool
    metadata: dict[str, Any]
    upload_date: datetime
    created_at: datetime
    updated_at: datetime
    link: LinkAnswer | UnsetType = UNSET


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
    """Ids as text: one that is malformed names no file, and costs the others nothing."""

    ids: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(min_length=1, max_length=MOST_DELETED_AT_ONCE)]


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
        etag=f'"{sha256}"',
        resolution=file.resolution,
        width=file.width,
        height=file.height,
        duration=file.duration,
        duration_seconds=file.duration_seconds,
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
    file_type: Annotated[Kind | None, Parameter(query="type", description="Only files of this kind.")] = None,
    mime: Annotated[str | None, Parameter(description="Only this MIME type.")] = None,
    tag: Annotated[str | None, Parameter(description="Only files with this tag.")] = None,
    favorite: Annotated[bool | None, Parameter(description="Only favourites, or with false only the others.")] = None,
    package_name: Annotated[str | None, Parameter(description="Only files of this package.")] = None,
    name: Annotated[str | None, Parameter(description="Only names with a word that starts so, in any case. Comes with sort=name.")] = None,
    created_from: Annotated[
        str | None, Parameter(description="Uploaded at this time or later: RFC 3339, or a date (UTC). Comes with sort=created.")
    ] = None,
    created_to: Annotated[
        str | None, Parameter(description="Uploaded before this time: RFC 3339, or a date (UTC). Comes with sort=created.")
    ] = None,
    sort: Annotated[Sort | None, Parameter(description="A leading minus sorts downward. Newest first when left out.")] = None,
    limit: Annotated[int | None, Parameter(ge=1, description=f"Files on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, Parameter(description="`next_cursor` of the page before, with the same filters and sort.")] = None,
    links: Annotated[bool, Parameter(description="With 1, a signed link with each file. Needs the scope links:write too.")] = False,
) -> FileList:
    """The user's files, page by page. A combination of filter and sort that no index serves is refused, never slow."""
    services = services_of(request)
    if links and Scope.LINKS_WRITE not in principal_of(request).scopes:
        raise Forbidden(Scope.LINKS_WRITE)
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
        linker = await Linker.of(services, principal_of(request).owner, page.files, None)
        for answer, file in zip(answers, page.files, strict=True):
            answer.link = linker.link(file)
    next_cursor = sealed(page.next_cursor, link_keys) if page.next_cursor is not None and is_restricted else page.next_cursor
    return FileList(answers, next_cursor)


@get("/{file_id:uuid}", guards=[needs(Scope.FILES_READ)])
async def show_file(request: Http, file_id: UUID) -> FileAnswer:
    """One file's fields."""
    return file_json(await ledger.get_file(services_of(request).db, principal_of(request).owner, file_id))


@patch("/{file_id:uuid}", guards=[needs(Scope.FILES_WRITE)])
async def change_file(request: Http, file_id: UUID, data: FileChanges) -> FileAnswer:
    """Renames a file, or changes its package name or metadata. Without any of them the file stays as it is, `updated_at` too."""
    await _check_if_match(request, file_id)
    if data == FileChanges():
        return file_json(await ledger.get_file(services_of(request).db, principal_of(request).owner, file_id))
    file = await ledger.update_file(
        services_of(request).db,
        principal_of(request).owner,
        file_id,
        file_name=UNSET if data.file_name is UNSET else fields.clean_name(data.file_name, "file_name"),
        package_name=UNSET if data.package_name is UNSET else fields.clean_package_name(data.package_name),
        metadata=UNSET if data.metadata is UNSET else fields.clean_metadata(data.metadata),
    )
    return file_json(file)


@delete("/{file_id:uuid}", guards=[needs(Scope.FILES_WRITE)])
async def delete_file(request: Http, file_id: UUID) -> None:
    """Deletes a file. Its quota is free when this is answered."""
    await _check_if_match(request, file_id)
    if not await services_of(request).intake.delete(principal_of(request).owner, [file_id]):
        raise NotFound


@post("/delete", guards=[needs(Scope.FILES_WRITE)], status_code=200)
async def delete_files(request: Http, data: FileIds) -> DeleteResults:
    """Deletes up to 1,000 files, with an answer for each."""
    ids = {text: file_id for text in data.ids if (file_id := id_of(text)) is not None}
    services, principal = services_of(request), principal_of(request)
    wanted = list(dict.fromkeys(ids.values()))
    if principal.kinds is not None:
        wanted = await ledger.ids_of_kinds(services.db, principal.owner, wanted, principal.kinds)
    deleted = await services.intake.delete(principal.owner, wanted)
    return DeleteResults([DeleteResult(each, "deleted" if ids.get(each) in deleted else "not_found") for each in data.ids])


@post("/{file_id:uuid}/favorite", guards=[needs(Scope.FILES_WRITE)], status_code=200)
async def favor_file(request: Http, file_id: UUID, data: FavoriteChange | None = None) -> FileAnswer:
    """Without a body, switches whether the file is a favourite; with one, sets it."""
    value = None if data is None else data.is_favorite
    return file_json(await ledger.set_favorite(services_of(request).db, principal_of(request).owner, file_id, value))


@put("/{file_id:uuid}/tags", guards=[needs(Scope.FILES_WRITE)])
async def tag_file(request: Http, file_id: UUID, data: TagsChange) -> FileAnswer:
    """Replaces the file's tags."""
    tags = fields.clean_tags(data.tags)
    return file_json(await ledger.set_tags(services_of(request).db, principal_of(request).owner, file_id, tags))


@post("/{file_id:uuid}/copy", guards=[needs(Scope.FILES_WRITE)], status_code=201)
async def copy_file(request: Http, file_id: UUID) -> Response[FileAnswer]:
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
        if not evaluate_if_match(wanted, file.sha256):
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
    route_handlers=[list_files, show_file, change_file, delete_file, delete_files, favor_file, tag_file, copy_file],
    tags=["Files"],
)
