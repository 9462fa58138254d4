"""The admin routes of webhooks: who is told of events, and what could not be told."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Router, delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import Meta

from server import ledger
from server.api.door import needs, services_of
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.auth import Scope
from server.errors import InvalidRequest
from server.fetching import Rules
from server.ledger import DeadDelivery, WebhookEndpoint
from server.webhooks import EventType, register, rotate

MOST_REDELIVERED_AT_ONCE = 1_000
_LONGEST_OVERLAP_SECONDS = 7 * 86_400
_LARGEST_BIGINT = 2**63 - 1

Http = Request[Any, Any, Any]


class WebhookWish(msgspec.Struct, forbid_unknown_fields=True):
    """Whom to tell. Without `types`, of all events."""

    url: str
    types: Annotated[list[EventType], Meta(min_length=1)] | None = None
    description: Annotated[str, Meta(max_length=500)] = ""


class RotationWish(msgspec.Struct, forbid_unknown_fields=True):
    """For how long the secret of before signs too."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=_LONGEST_OVERLAP_SECONDS)] = 86_400


class RedeliveryWish(msgspec.Struct, forbid_unknown_fields=True):
    """Which dead letters to send again; without `ids` all."""

    ids: Annotated[list[Annotated[int, Meta(ge=1, le=_LARGEST_BIGINT)]], Meta(min_length=1, max_length=1_000)] | None = None


class WebhookAnswer(msgspec.Struct, kw_only=True):
    """An endpoint. `types` null is all; `pending` and `dead` count the events that it has not been told yet, and never was."""

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


class NewWebhookAnswer(msgspec.Struct, kw_only=True):
    """The `secret` is told here and never again."""

    id: UUID
    url: str
    types: list[str] | None
    description: str
    created_at: datetime
    secret: str


class SecretAnswer(msgspec.Struct):
    """The new secret, and until when the one before signs too."""

    secret: str
    old_secret_until: datetime


class WebhookList(msgspec.Struct):
    """The oldest first."""

    webhooks: list[WebhookAnswer]


class DeadLetterAnswer(msgspec.Struct, kw_only=True):
    """An event that an endpoint, or a job's callback, was not told in three days. `data` is what it would have been told."""

    id: int
    type: str
    timestamp: datetime
    tries: int
    last_failure: str | None
    gave_up_at: datetime
    data: dict[str, Any]


class DeadLetterList(msgspec.Struct):
    """The oldest first. `next_cursor` asks for those after these; null when there are none."""

    dead_letters: list[DeadLetterAnswer]
    next_cursor: str | None


class RedeliveryAnswer(msgspec.Struct):
    """How many are sent again. With as many as are sent at once there may be more: ask again."""

    redelivered: int


@post("/", status_code=201)
async def create_webhook(request: Http, data: JSONBody[WebhookWish]) -> NewWebhookAnswer:
    """An endpoint that is told of events from now on, signed by Standard Webhooks with the `secret` of this answer."""
    services = services_of(request)
    rules = Rules.from_settings(services.settings)
    endpoint_id, secret = await register(services.db, rules, url=data.url, types=data.types, description=data.description)
    made = await ledger.get_webhook_endpoint(services.db, endpoint_id)
    return NewWebhookAnswer(
        id=made.id, url=made.url, types=made.types, description=made.description, created_at=made.created_at, secret=secret
    )


@get("/")
async def list_webhooks(request: Http) -> WebhookList:
    """All endpoints, and how they fare."""
    return WebhookList([_answer(each) for each in await ledger.list_webhook_endpoints(services_of(request).db)])


@get("/{webhook_id:uuid}")
async def show_webhook(request: Http, webhook_id: FromPath[UUID]) -> WebhookAnswer:
    """One endpoint."""
    return _answer(await ledger.get_webhook_endpoint(services_of(request).db, webhook_id))


@delete("/{webhook_id:uuid}")
async def delete_webhook(request: Http, webhook_id: FromPath[UUID]) -> None:
    """Tells an endpoint nothing any more, not even what is outstanding."""
    await ledger.delete_webhook_endpoint(services_of(request).db, webhook_id)


@post("/{webhook_id:uuid}/rotate-secret", status_code=200)
async def rotate_secret(request: Http, webhook_id: FromPath[UUID], data: JSONBody[RotationWish]) -> SecretAnswer:
    """A new secret. For the overlap both sign each event, so that a receiver with either takes it."""
    return SecretAnswer(*await rotate(services_of(request).db, webhook_id, data.overlap_seconds))


@get("/{webhook_id:uuid}/dead-letters", before_request=known_query_only)
async def list_dead_letters(
    request: Http,
    webhook_id: FromPath[UUID],
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Dead letters on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before.")] = None,
) -> DeadLetterList:
    """Events that the endpoint was never told. They are kept for 30 days."""
    services = services_of(request)
    wanted = page_size(services, limit)
    await ledger.get_webhook_endpoint(services.db, webhook_id)
    return _page(await ledger.list_dead_deliveries(services.db, webhook_id, _position(cursor), wanted), wanted)


@post("/{webhook_id:uuid}/redeliver", status_code=200)
async def redeliver(request: Http, webhook_id: FromPath[UUID], data: JSONBody[RedeliveryWish]) -> RedeliveryAnswer:
    """Sends dead letters again, for another three days if need be; up to 1,000 at once. They come after what was told meanwhile."""
    services = services_of(request)
    await ledger.get_webhook_endpoint(services.db, webhook_id)
    return RedeliveryAnswer(await ledger.redeliver(services.db, webhook_id, data.ids, MOST_REDELIVERED_AT_ONCE))


@get("/callbacks/dead-letters", before_request=known_query_only)
async def list_dead_callbacks(
    request: Http,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Dead letters on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before.")] = None,
) -> DeadLetterList:
    """Ends of generation jobs, of all users, that the callbacks which they name were never told. They are kept for 30 days."""
    services = services_of(request)
    wanted = page_size(services, limit)
    return _page(await ledger.list_dead_callbacks(services.db, _position(cursor), wanted), wanted)


@post("/callbacks/redeliver", status_code=200)
async def redeliver_callbacks(request: Http, data: JSONBody[RedeliveryWish]) -> RedeliveryAnswer:
    """Tells callbacks that were given up again, for another three days if need be; up to 1,000 at once."""
    services = services_of(request)
    return RedeliveryAnswer(await ledger.redeliver_callbacks(services.db, data.ids, MOST_REDELIVERED_AT_ONCE))


def _page(found: list[DeadDelivery], wanted: int) -> DeadLetterList:
    return DeadLetterList([_dead(each) for each in found], str(found[-1].id) if len(found) == wanted else None)


def _position(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 19 and int(cursor) <= _LARGEST_BIGINT):
        raise InvalidRequest("cursor", "it is not one that a page of this list gave")
    return int(cursor)


def _answer(endpoint: WebhookEndpoint) -> WebhookAnswer:
    return WebhookAnswer(**{name: getattr(endpoint, name) for name in WebhookAnswer.__struct_fields__})


def _dead(each: DeadDelivery) -> DeadLetterAnswer:
    return DeadLetterAnswer(
        id=each.id,
        type=each.type,
        timestamp=each.created_at,
        tries=each.tries,
        last_failure=each.last_failure,
        gave_up_at=each.give_up_at,
        data={**each.payload, "user_id": each.user_id, "file_id": None if each.file_id is None else str(each.file_id)},
    )


router = Router(
    path="/api/webhooks",
    route_handlers=[
        create_webhook,
        list_webhooks,
        show_webhook,
        delete_webhook,
        rotate_secret,
        list_dead_letters,
        redeliver,
        list_dead_callbacks,
        redeliver_callbacks,
    ],
    guards=[needs(Scope.ADMIN)],
    tags=["Webhooks"],
)
