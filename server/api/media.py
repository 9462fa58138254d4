"""The JSON routes of the memory of making: which model, prompt and references each piece of media was made with."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Router, get, post, put
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import UNSET, UnsetType

from server import fields, ledger
from server.api.door import needs, principal_of, services_of
from server.api.files import Kind
from server.api.generate import EntityType, Id
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.api.services import Services
from server.api.signing import LinkAnswer, Linker
from server.auth import Principal, Scope
from server.errors import Forbidden, InvalidRequest, NotFound
from server.ledger import media as rows
from server.ledger.models import MarkingState, Media, MediaQuery, SourceType

_MOST_VARIANTS = 200

Http = Request[Any, Any, Any]


class MediaAnswer(msgspec.Struct, kw_only=True):
    """How a piece of media was made. Prompt and parameters are its owner's alone.

    `parent_id` is what it was made anew from, `root_id` the first of that line. `link` is there with `links=1`. `marks` are those that
    Coffer has put into the file's bytes; `marking` is null where it was to put in none, and `unmarked` for a reason.
    """

    id: UUID
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
    credits_used: float | None
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
    link: LinkAnswer | UnsetType = UNSET


class MediaList(msgspec.Struct):
    """`next_cursor` asks for the page after this one; null when there is none."""

    media: list[MediaAnswer]
    next_cursor: str | None


class Lineage(msgspec.Struct):
    """`parents`, nearest first, and `variants`: all others of the same root, newest first, 200 at most."""

    parents: list[MediaAnswer]
    variants: list[MediaAnswer]


class PrimaryChange(msgspec.Struct, forbid_unknown_fields=True):
    """True makes it the one that stands for its entity, in place of any other."""

    is_primary: bool


class UploadedMedia(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A file of the user's that is to be media, of an entity, a project, both or neither."""

    file_id: UUID
    entity_type: EntityType | None = None
    entity_id: Id | None = None
    project_id: Id | None = None


def media_json(media: Media) -> MediaAnswer:
    """The answer that every route gives for a piece of media."""
    values = {name: getattr(media, name) for name in MediaAnswer.__struct_fields__ if name != "link"}
    values["credits_used"] = None if media.credits_used is None else float(media.credits_used)
    return MediaAnswer(**values)


@get("/", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def list_media(
    request: Http,
    *,
    entity_type: Annotated[str | None, QueryParameter(description="Only media of entities of this type.")] = None,
    entity_id: Annotated[str | None, QueryParameter(description="Only media of this entity; comes with `entity_type`.")] = None,
    project_id: Annotated[str | None, QueryParameter(description="Only media of this project.")] = None,
    media_type: Annotated[Kind | None, QueryParameter(name="type", description="Only media of this kind.")] = None,
    source_type: Annotated[SourceType | None, QueryParameter(name="source", description="Only media that came about in this way.")] = None,
    model: Annotated[str | None, QueryParameter(description="Only media made by this model.")] = None,
    prompt: Annotated[str | None, QueryParameter(description="Only media in whose prompt all of these words stand, in any case.")] = None,
    primary: Annotated[
        bool | None, QueryParameter(description="Only those that stand for their entity, or with false only the others.")
    ] = None,
    links: Annotated[bool, QueryParameter(description="With 1, a signed link to each file. Needs the scope links:write too.")] = False,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Media on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before, with the same filters.")] = None,
) -> MediaList:
    """The user's media and how each was made, newest first: `limit=1` with an entity and a type is its latest."""
    services, principal = services_of(request), principal_of(request)
    if links and Scope.LINKS_WRITE not in principal.scopes:
        raise Forbidden(Scope.LINKS_WRITE)
    if entity_id is not None and entity_type is None:
        raise InvalidRequest("entity_id", "comes with entity_type")
    page = await rows.list_media(
        services.db,
        principal.owner,
        MediaQuery(
            entity_type=_cleaned(entity_type, "entity_type"),
            entity_id=_cleaned(entity_id, "entity_id"),
            project_id=_cleaned(project_id, "project_id"),
            model=_cleaned(model, "model"),
            media_type=media_type,
            source_type=source_type,
            prompt=None if prompt is None else fields.clean_name(prompt, "prompt"),
            is_primary=primary,
            kinds=principal.kinds,
            limit=page_size(services, limit),
            cursor=cursor,
        ),
    )
    answers = [media_json(media) for media in page.media]
    if links and answers:
        await _add_links(services, principal, answers)
    return MediaList(answers, page.next_cursor)


def _cleaned(text: str | None, field: str) -> str | None:
    return None if text is None else fields.clean_user_id(text, field)


async def _add_links(services: Services, principal: Principal, answers: Sequence[MediaAnswer]) -> None:
    files = await ledger.get_files(services.db, principal.owner, [answer.file_id for answer in answers if answer.file_id is not None])
    if not files:
        return
    linker = await Linker.of(services, principal.owner, files.values(), None)
    for answer in answers:
        if answer.file_id is not None and answer.file_id in files:
            answer.link = linker.link(files[answer.file_id])


@post("/", guards=[needs(Scope.FILES_WRITE)], status_code=201)
async def add_media(request: Http, data: JSONBody[UploadedMedia]) -> MediaAnswer:
    """Makes an upload media beside what was generated, with its file's id. Asked again, it belongs to what was said last."""
    services, principal = services_of(request), principal_of(request)
    if (data.entity_type is None) != (data.entity_id is None):
        raise InvalidRequest("entity_id", "comes with entity_type")
    file = await ledger.get_file(services.db, principal.owner, data.file_id)
    if principal.kinds is not None and file.file_type not in principal.kinds:
        raise NotFound
    media = await rows.add_uploaded_media(
        services.db,
        principal.owner,
        file.id,
        entity_type=data.entity_type,
        entity_id=_cleaned(data.entity_id, "entity_id"),
        project_id=_cleaned(data.project_id, "project_id"),
    )
    if media is None:
        raise InvalidRequest("file_id", "is media already, which was generated or linked")
    return media_json(media)


@get("/{media_id:uuid}", guards=[needs(Scope.FILES_READ)])
async def show_media(request: Http, media_id: FromPath[UUID]) -> MediaAnswer:
    """How one piece of media was made. That of a generated file has the file's id."""
    principal = principal_of(request)
    return media_json(await rows.get_media(services_of(request).db, principal.owner, media_id, principal.kinds))


@get("/{media_id:uuid}/lineage", guards=[needs(Scope.FILES_READ)])
async def show_lineage(request: Http, media_id: FromPath[UUID]) -> Lineage:
    """What it was made anew from, and what else was made of the same beginning. Media that was deleted is left out."""
    services, principal = services_of(request), principal_of(request)
    media = await rows.get_media(services.db, principal.owner, media_id, principal.kinds)
    parents = await rows.media_ancestors(services.db, principal.owner, media_id)
    family = await rows.list_media(
        services.db, principal.owner, MediaQuery(root_id=media.root_id, kinds=principal.kinds, limit=_MOST_VARIANTS)
    )
    return Lineage(
        [media_json(parent) for parent in parents if principal.kinds is None or parent.media_type in principal.kinds],
        [media_json(each) for each in family.media if each.id != media_id],
    )


@put("/{media_id:uuid}/primary", guards=[needs(Scope.FILES_WRITE)])
async def set_primary(request: Http, media_id: FromPath[UUID], data: JSONBody[PrimaryChange]) -> MediaAnswer:
    """Makes a piece of media the one that stands for its entity, or no longer. An entity has one at most."""
    services, principal = services_of(request), principal_of(request)
    media = await rows.get_media(services.db, principal.owner, media_id, principal.kinds)
    if data.is_primary and media.entity_id is None:
        raise InvalidRequest("is_primary", "this media belongs to no entity")
    return media_json(await rows.set_primary(services.db, principal.owner, media_id, is_primary=data.is_primary))


router = Router(path="/api/media", route_handlers=[list_media, add_media, show_media, show_lineage, set_primary], tags=["Media"])
