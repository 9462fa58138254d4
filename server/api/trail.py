"""The audit trail, for admins to read: who did what to which file, and when."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Router, get
from litestar.params import QueryParameter

from server import fields, ledger
from server.api.door import needs, services_of
from server.api.files import id_of, moment
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.auth import Scope
from server.errors import InvalidRequest
from server.ledger import AuditQuery, AuditRecord

Http = Request[Any, Any, Any]


class AuditAnswer(msgspec.Struct, kw_only=True):
    """One record. `actor_*`, `acting_user_id` and `address` tell who did it, `user_id` and `file_id` to whom and what."""

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


class AuditList(msgspec.Struct):
    """Newest first. `next_cursor` asks for the records before these; null when there are none."""

    records: list[AuditAnswer]
    next_cursor: str | None


@get("/", before_request=known_query_only)
async def list_audit(
    request: Http,
    *,
    user: Annotated[str | None, QueryParameter(description="Only what was done to this user and the user's files.")] = None,
    file: Annotated[str | None, QueryParameter(description="Only what was done to this file.")] = None,
    actor: Annotated[
        str | None, QueryParameter(description="Only what was done by this key, token's subject, link or account: `actor_id`.")
    ] = None,
    action: Annotated[str | None, QueryParameter(description="Only this action, such as `file.deleted`.")] = None,
    since: Annotated[str | None, QueryParameter(description="At this time or later: RFC 3339, or a date (UTC).")] = None,
    until: Annotated[str | None, QueryParameter(description="Before this time: RFC 3339, or a date (UTC).")] = None,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Records on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before, with the same filters.")] = None,
) -> AuditList:
    """Who did what to which file, and when. Filters combine."""
    services = services_of(request)
    file_id = None if file is None else id_of(file)
    if file is not None and file_id is None:
        raise InvalidRequest("file", "must be the id of a file")
    page = await ledger.list_trail(
        services.db,
        AuditQuery(
            user_id=None if user is None else fields.clean_user_id(user, "user"),
            file_id=file_id,
            actor_id=None if actor is None else fields.clean_name(actor, "actor"),
            action=None if action is None else fields.clean_name(action, "action"),
            since=moment(since, "since"),
            until=moment(until, "until"),
            limit=page_size(services, limit),
            cursor=cursor,
        ),
    )
    return AuditList([_answer(record) for record in page.records], page.next_cursor)


def _answer(record: AuditRecord) -> AuditAnswer:
    return AuditAnswer(**{name: getattr(record, name) for name in AuditAnswer.__struct_fields__})


router = Router(path="/api/audit", route_handlers=[list_audit], guards=[needs(Scope.ADMIN)], tags=["Audit"])
