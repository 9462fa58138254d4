"""The JSON routes that make and end links: to download, to upload, and public ones."""

import secrets
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Router, delete, get, post, put
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import Meta

from server import fields, ledger
from server.api.door import needs, principal_of, services_of
from server.api.files import FileAnswer, file_json, id_of
from server.api.reading import known_query_only
from server.api.services import Services
from server.api.signing import LinkAnswer, Linker, PreviewWish, permitted_ttl
from server.auth import Scope
from server.errors import DatabaseUnavailable, Forbidden, InvalidRequest, NoPreview
from server.kinds import KINDS, KNOWN
from server.ledger import File, UploadLink

MOST_LINKS_AT_ONCE = 500

Http = Request[Any, Any, Any]
Disposition = Literal["inline", "attachment"]


class LinkWish(msgspec.Struct, forbid_unknown_fields=True):
    """`ttl_seconds` is how long the link lives at least; `name` is what a browser saves the file as, its own name when left out.

    `preview` makes it a link to a preview of the file instead.
    """

    ttl_seconds: Annotated[int, Meta(ge=1)] | None = None
    disposition: Disposition = "inline"
    name: Annotated[str, Meta(min_length=1, max_length=fields.NAME_CHARACTERS)] | None = None
    preview: PreviewWish | None = None


class LinksWish(msgspec.Struct, forbid_unknown_fields=True):
    """Links to up to 500 files, or to the same preview of each. An id that is malformed names no file, and costs the others nothing."""

    ids: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(min_length=1, max_length=MOST_LINKS_AT_ONCE)]
    ttl_seconds: Annotated[int, Meta(ge=1)] | None = None
    disposition: Disposition = "inline"
    preview: PreviewWish | None = None


class LinkResult(msgspec.Struct, omit_defaults=True):
    """`id` as it was sent. `not_found` also for an id that is malformed or another user's, `no_preview` for a file that has no such one."""

    id: str
    status: Literal["linked", "not_found", "no_preview"]
    url: str | None = None
    expires_at: datetime | None = None
    preview: str | None = None


class LinkResults(msgspec.Struct):
    """One result for each id, in the order of the request."""

    links: list[LinkResult]


class PublicWish(msgspec.Struct, forbid_unknown_fields=True):
    """True gives the file a URL that needs no signature; false ends it for good, and a later one is another."""

    is_public: bool


class PublicAnswer(msgspec.Struct):
    """`url` is null when the file is not public. It cannot be guessed."""

    url: str | None


class UploadLinkWish(msgspec.Struct, forbid_unknown_fields=True):
    """The right to upload one file of at most `max_bytes`. `types` are kinds or MIME types; the other fields are given to the file."""

    max_bytes: Annotated[int, Meta(ge=1)]
    ttl_seconds: Annotated[int, Meta(ge=1)] | None = None
    types: list[str] = []
    file_name: Annotated[str, Meta(min_length=1, max_length=fields.NAME_CHARACTERS)] | None = None
    type: Literal["video", "image", "scene", "project", "audio"] | None = None
    package_name: Annotated[str, Meta(max_length=fields.PACKAGE_NAME_CHARACTERS)] | None = None
    tags: list[str] = []
    metadata: dict[str, Any] = {}


class UploadLinkAnswer(msgspec.Struct):
    """`file_id` is what the file will be called once it has come; until then there is no such file."""

    url: str
    file_id: UUID
    expires_at: datetime
    max_bytes: int


@post("/files/{file_id:uuid}/link", guards=[needs(Scope.LINKS_WRITE)], status_code=200)
async def link_file(request: Http, file_id: FromPath[UUID], data: JSONBody[LinkWish | None] = None) -> LinkAnswer:
    """A signed link to these bytes of a file, or to a preview of them. When they are replaced or deleted it leads nowhere."""
    wish = data or LinkWish()
    return await _link(request, file_id, wish)


@get("/storage/{file_id:uuid}/url", guards=[needs(Scope.LINKS_WRITE)], before_request=known_query_only)
async def storage_url(
    request: Http,
    file_id: FromPath[UUID],
    ttl_seconds: Annotated[int | None, QueryParameter(ge=1, description="How long the link lives at least.")] = None,
    disposition: Annotated[Disposition, QueryParameter(description="How a browser is to treat the bytes.")] = "inline",
) -> LinkAnswer:
    """The same link, asked for without a body."""
    return await _link(request, file_id, LinkWish(ttl_seconds, disposition))


@post("/links", guards=[needs(Scope.LINKS_WRITE)], status_code=200)
async def link_files(request: Http, data: JSONBody[LinksWish]) -> LinkResults:
    """Links to many files at once: a gallery is one request."""
    services, principal = services_of(request), principal_of(request)
    owner = principal.owner
    permitted_ttl(services, data.ttl_seconds)
    ids = {text: file_id for text in data.ids if (file_id := id_of(text)) is not None}
    files = await ledger.get_files(services.db, owner, list(dict.fromkeys(ids.values())))
    if principal.kinds is not None:
        files = {file_id: file for file_id, file in files.items() if file.file_type in principal.kinds}
    if not files:
        return LinkResults([LinkResult(text, "not_found") for text in data.ids])
    linker = await Linker.of(services, owner, files.values(), data.ttl_seconds)
    previews = {} if data.preview is None else await linker.wished(owner, list(files.values()), data.preview)
    results = []
    for text in data.ids:
        file = files.get(ids[text]) if text in ids else None
        if file is None:
            results.append(LinkResult(text, "not_found"))
        elif data.preview is not None and file.id not in previews:
            results.append(LinkResult(text, "no_preview"))
        else:
            link = linker.link(file, data.disposition, preview=previews.get(file.id))
            results.append(LinkResult(text, "linked", link.url, link.expires_at, link.preview))
    return LinkResults(results)


@post("/files/{file_id:uuid}/revoke-links", guards=[needs(Scope.LINKS_WRITE)], status_code=200)
async def revoke_file_links(request: Http, file_id: FromPath[UUID]) -> FileAnswer:
    """Ends every signed link to a file. Links made afterwards work; a public URL stays."""
    return file_json(await services_of(request).intake.revoke_links(principal_of(request).owner, file_id))


@post("/links/revoke", guards=[needs(Scope.LINKS_WRITE)], status_code=204)
async def revoke_user_links(request: Http) -> None:
    """Ends every signed link to any of the user's files. Public URLs stay. Not for a key that is restricted to some types."""
    if principal_of(request).kinds is not None:
        raise Forbidden(Scope.LINKS_WRITE)
    services = services_of(request)
    await ledger.raise_link_epoch(services.db, principal_of(request).owner)
    services.recent_links.clear()
    with suppress(DatabaseUnavailable):  # then housekeeping tells it
        await services.delivery.refresh_link_epochs()  # nginx is told at once


@put("/files/{file_id:uuid}/public", guards=[needs(Scope.LINKS_WRITE)])
async def make_public(request: Http, file_id: FromPath[UUID], data: JSONBody[PublicWish]) -> PublicAnswer:
    """Makes a file public, or private again. Caches may show it for `COFFER_PUBLIC_MAX_AGE_SECONDS` longer."""
    services = services_of(request)
    public_id = secrets.token_urlsafe(16) if data.is_public else None
    file = await ledger.set_public(services.db, principal_of(request).owner, file_id, public_id)
    services.recent_links.clear()
    return _public(services, file)


@get("/files/{file_id:uuid}/public", guards=[needs(Scope.FILES_READ)])
async def show_public(request: Http, file_id: FromPath[UUID]) -> PublicAnswer:
    """The public URL of a file, if it has one."""
    services = services_of(request)
    return _public(services, await ledger.get_file(services.db, principal_of(request).owner, file_id))


@post("/uploads/links", guards=[needs(Scope.LINKS_WRITE)], status_code=201)
async def link_upload(request: Http, data: JSONBody[UploadLinkWish]) -> UploadLinkAnswer:
    """A link that takes one upload. Its bytes are reserved now, so the upload cannot fail for want of quota."""
    services, principal = services_of(request), principal_of(request)
    unknown = [each for each in data.types if each not in KINDS and each not in KNOWN]
    if unknown:
        raise InvalidRequest("types", f"must be of {', '.join(KINDS)}, or MIME types that are stored here")
    kinds = principal.kinds
    if kinds is not None and ({data.type, *data.types} & frozenset(KINDS)) - kinds:
        raise InvalidRequest("types", f"these credentials are good for {', '.join(sorted(kinds))} alone")
    link = UploadLink(
        types=data.types,
        kinds=None if kinds is None else sorted(kinds),
        file_name=None if data.file_name is None else fields.clean_name(data.file_name, "file_name"),
        kind=data.type,
        package_name=fields.clean_package_name(data.package_name),
        tags=fields.clean_tags(data.tags),
        metadata=fields.clean_metadata(data.metadata),
    )
    ttl_seconds = permitted_ttl(services, data.ttl_seconds)
    expires_at = int(time.time()) + ttl_seconds
    # The reservation outlives its link by a little: what begins in the last second still has it.
    upload_id = await services.intake.open_link(
        principal.owner, link, max_bytes=data.max_bytes, ttl_seconds=ttl_seconds + services.settings.reservation_lease_seconds
    )
    url = services.settings.public_url + services.links.upload(upload_id, expires_at=expires_at)
    return UploadLinkAnswer(url, upload_id, datetime.fromtimestamp(expires_at, UTC), data.max_bytes)


@delete("/uploads/links/{file_id:uuid}", guards=[needs(Scope.LINKS_WRITE, of_stored_file=False)])
async def close_upload_link(request: Http, file_id: FromPath[UUID]) -> None:
    """Gives up an upload link that has brought no file, and the quota that it holds."""
    principal = principal_of(request)
    await services_of(request).intake.close_link(principal.owner, file_id, principal.kinds)


async def _link(request: Http, file_id: UUID, wish: LinkWish) -> LinkAnswer:
    services, owner = services_of(request), principal_of(request).owner
    permitted_ttl(services, wish.ttl_seconds)
    file = await ledger.get_file(services.db, owner, file_id)
    linker = await Linker.of(services, owner, [file], wish.ttl_seconds)
    name = None if wish.name is None else fields.clean_name(wish.name, "name")
    if wish.preview is None:
        return linker.link(file, wish.disposition, name)
    preview = (await linker.wished(owner, [file], wish.preview)).get(file.id)
    if preview is None:
        raise NoPreview(file.preview_state, file.preview_reason)
    return linker.link(file, wish.disposition, name, preview)


def _public(services: Services, file: File) -> PublicAnswer:
    return PublicAnswer(None if file.public_id is None else f"{services.settings.public_url}/p/{file.public_id}")


router = Router(
    path="/api",
    route_handlers=[
        link_file,
        link_files,
        storage_url,
        revoke_file_links,
        revoke_user_links,
        make_public,
        show_public,
        link_upload,
        close_upload_link,
    ],
    tags=["Links"],
)
