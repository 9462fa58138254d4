"""The routes of linked assets. What is fetched, the worker fetches."""

import asyncio
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Router, delete, get, post, put
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import Meta

from server import fields, ledger
from server.api.door import needs, principal_of, services_of
from server.api.files import id_of
from server.api.generate import EntityType, Id
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.assets import ask_for_check, link, notice_of, relink
from server.auth import Scope
from server.errors import InvalidRequest
from server.fetching import Rules
from server.intake import Details
from server.ledger import Asset

CHECK_WAIT_SECONDS = 15.0
"""How long a request for a look at an asset waits for it."""
_FIRST = UUID(int=0)

Http = Request[Any, Any, Any]
State = Literal["unchecked", "reachable", "unreachable"]


class AssetWish(msgspec.Struct, forbid_unknown_fields=True):
    """What lives elsewhere, at an https URL or a share link of Google Drive. With a `type` it is media too, of that entity and project; the
    other fields are given to the file when it is imported.
    """

    url: str
    file_name: Annotated[str, Meta(min_length=1, max_length=fields.NAME_CHARACTERS)] | None = None
    type: Literal["video", "image", "scene", "project", "audio"] | None = None
    package_name: Annotated[str, Meta(max_length=fields.PACKAGE_NAME_CHARACTERS)] | None = None
    tags: list[str] = []
    metadata: dict[str, Any] = {}
    entity_type: EntityType | None = None
    entity_id: Id | None = None
    project_id: Id | None = None


class AssetReplacement(msgspec.Struct, forbid_unknown_fields=True):
    """Where it lives now."""

    url: str


class AssetAnswer(msgspec.Struct, kw_only=True):
    """A linked asset. `state` is for a badge, `reason` why it is unreachable, `mime_type` and `size_bytes` what its server says of it.

    `import_state` is null, `pending`, `done` (then it is the file `file_id`, unless that was deleted) or `failed` for `import_reason`.
    """

    id: UUID
    url: str
    file_name: str | None
    state: str
    reason: str | None
    mime_type: str | None
    size_bytes: int | None
    last_checked_at: datetime | None
    last_reachable_at: datetime | None
    import_state: str | None
    import_reason: str | None
    file_id: UUID | None
    created_at: datetime
    updated_at: datetime


class AssetList(msgspec.Struct):
    """The oldest first. `next_cursor` asks for the assets after these; null when there are none."""

    assets: list[AssetAnswer]
    next_cursor: str | None


@post("/link", guards=[needs(Scope.FILES_WRITE)], status_code=201)
async def link_asset(request: Http, data: JSONBody[AssetWish]) -> AssetAnswer:
    """Registers media that stays where it is. It is looked at within seconds, and every day from then on."""
    services, principal = services_of(request), principal_of(request)
    details = Details(
        file_name=None if data.file_name is None else fields.clean_name(data.file_name, "file_name"),
        kind=data.type,
        package_name=fields.clean_package_name(data.package_name),
        tags=fields.clean_tags(data.tags),
        metadata=fields.clean_metadata(data.metadata),
    )
    rules = Rules.from_settings(services.settings)
    rules.read(data.url)  # before there is a user because of it
    await services.intake.placed(principal.owner)
    asset = await link(
        services.db,
        rules,
        principal.owner,
        data.url,
        details,
        entity_type=data.entity_type,
        entity_id=None if data.entity_id is None else fields.clean_user_id(data.entity_id, "entity_id"),
        project_id=None if data.project_id is None else fields.clean_user_id(data.project_id, "project_id"),
    )
    return _answer(asset)


@get("/", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def list_assets(
    request: Http,
    of_state: Annotated[State | None, QueryParameter(name="state", description="Only assets of this state.")] = None,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Assets on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before.")] = None,
) -> AssetList:
    """The user's linked assets."""
    services = services_of(request)
    wanted = page_size(services, limit)
    after = _FIRST if cursor is None else id_of(cursor)
    if after is None:
        raise InvalidRequest("cursor", "it is not one that a page of this list gave")
    found = await ledger.list_assets(services.db, principal_of(request).owner, after, wanted, of_state)
    return AssetList([_answer(each) for each in found], str(found[-1].id) if len(found) == wanted else None)


@get("/{asset_id:uuid}", guards=[needs(Scope.FILES_READ)])
async def show_asset(request: Http, asset_id: FromPath[UUID]) -> AssetAnswer:
    """One asset, as it was found when it was last looked at."""
    return _answer(await ledger.get_asset(services_of(request).db, principal_of(request).owner, asset_id))


@get("/{asset_id:uuid}/check", guards=[needs(Scope.FILES_READ)])
async def check_asset(request: Http, asset_id: FromPath[UUID]) -> AssetAnswer:
    """Has the worker look at the asset now, and answers with what it finds, or after 15 s as it was. A look is good for 30 s."""
    services, owner = services_of(request), principal_of(request).owner
    clock = asyncio.get_running_loop().time
    deadline = clock() + CHECK_WAIT_SECONDS
    with services.notices.of(notice_of(asset_id)) as noticed:
        asked_at = await ask_for_check(services.db, owner, asset_id)
        while True:
            asset = await ledger.get_asset(services.db, owner, asset_id)
            is_new = asked_at is None or (asset.last_checked_at is not None and asset.last_checked_at >= asked_at)
            if is_new or (left := deadline - clock()) <= 0:
                return _answer(asset)
            await ledger.time_to_look(noticed, left)


@put("/{asset_id:uuid}/replace", guards=[needs(Scope.FILES_WRITE)])
async def replace_asset(request: Http, asset_id: FromPath[UUID], data: JSONBody[AssetReplacement]) -> AssetAnswer:
    """Another URL for the asset, as when the old one is dead. What was imported from the old one stays a file."""
    services, owner = services_of(request), principal_of(request).owner
    return _answer(await relink(services.db, Rules.from_settings(services.settings), owner, asset_id, data.url))


@post("/{asset_id:uuid}/import", guards=[needs(Scope.FILES_WRITE)], status_code=202)
async def import_asset(request: Http, asset_id: FromPath[UUID]) -> AssetAnswer:
    """Has the worker fetch the asset's bytes and store them as a file of the user's, once. One that failed is tried again."""
    principal = principal_of(request)
    return _answer(await ledger.ask_for_asset_import(services_of(request).db, principal.owner, asset_id, principal.kinds))


@delete("/{asset_id:uuid}", guards=[needs(Scope.FILES_WRITE)])
async def delete_asset(request: Http, asset_id: FromPath[UUID]) -> None:
    """Forgets the asset. A file that it was imported as stays."""
    await ledger.delete_asset(services_of(request).db, principal_of(request).owner, asset_id)


def _answer(asset: Asset) -> AssetAnswer:
    values = {name: getattr(asset, name) for name in AssetAnswer.__struct_fields__ if name != "file_name"}
    return AssetAnswer(file_name=msgspec.json.decode(asset.details, type=Details).file_name, **values)


router = Router(
    path="/api/assets",
    route_handlers=[link_asset, list_assets, show_asset, check_asset, replace_asset, import_asset, delete_asset],
    tags=["Assets"],
)
