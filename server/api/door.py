"""Letting a request in: its credentials are judged before a byte of its body is read."""

from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import Any, cast
from uuid import UUID

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from server import ledger, logs
from server.actor import Actor, Kind, act_as
from server.api.services import Services
from server.auth import Principal, Scope
from server.errors import CofferError, InvalidRequest, NotFound, RateLimited, Unauthenticated

_MOST_ADDRESSES_REMEMBERED = 4_096  # parsing one takes longer than the rest of naming the actor

AnyConnection = ASGIConnection[Any, Any, Any, Any]


REFUSED = "refused"
"""Under this name a request's state holds the problem, if it was refused where it was read (`express.py`)."""
_ADMITTED = "admitted"  # and under this one whom `admit_at_once` let in


async def admit(services: Services, scope: MutableMapping[str, Any], needed: Scope) -> Principal:
    """Who sent the request of this ASGI scope, provided they may do what is needed. Kept in the scope's state for the log.

    Raises what `Authenticator.principal` raises, and `RateLimited`. A repeated header is refused: two readers could pick different ones.
    """
    state = scope.setdefault("state", {})
    if REFUSED in state:
        raise state[REFUSED]
    principal: Principal | None = state.pop(_ADMITTED, None)
    if principal is None:
        services.limits.check_failures(scope)
        try:
            principal = await _principal(services, scope, needed)
        except Unauthenticated:
            services.limits.count_failure(scope)
            raise
        state["principal"] = principal
    act_in(scope, principal.credentials, principal.key_id or principal.user_id, principal.user_id)
    await services.authenticator.admit_user(principal)
    return principal


def admit_at_once(services: Services, scope: MutableMapping[str, Any], needed: Scope) -> Principal | None:
    """As `admit`, for credentials that are good for every kind of file, where nothing has to be asked for: otherwise None.

    A request that goes the ordinary way after all comes to `admit`, once and for the same need, which counts and judges nothing twice.
    """
    try:
        authorization, acting_user = _credentials(scope)
    except CofferError:
        return None
    principal = services.authenticator.remembered(authorization, acting_user, needed)
    if principal is None or principal.kinds is not None:
        return None
    try:
        services.limits.check_failures(scope)
        services.limits.count_request(scope, principal.key_id, principal.user_id)
    except RateLimited as refusal:
        scope["state"][REFUSED] = refusal
        return None
    scope["state"]["principal"] = scope["state"][_ADMITTED] = principal
    return principal


async def _principal(services: Services, scope: MutableMapping[str, Any], needed: Scope) -> Principal:
    authorization, acting_user = _credentials(scope)
    client = scope.get("client")
    return await services.authenticator.principal(
        authorization, acting_user, needed, client[0] if client else None, partial(services.limits.count_request, scope)
    )


def _credentials(scope: MutableMapping[str, Any]) -> tuple[str | None, str | None]:
    authorization: str | None = None
    acting_user: str | None = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            if authorization is not None:
                raise Unauthenticated
            authorization = value.decode("latin-1")
        elif name == b"x-user-id":
            if acting_user is not None:
                raise InvalidRequest("X-User-Id", "may be sent once only")
            # Bytes that are not UTF-8 become lone surrogates, which no user id may hold, and are refused after the credentials.
            acting_user = value.decode("utf-8", "surrogateescape")
    return authorization, acting_user


def act_in(scope: MutableMapping[str, Any], kind: Kind, actor_id: str | None, user_id: str | None = None) -> None:
    """What the request of this ASGI scope changes from here on is recorded as done by this actor, acting for that user."""
    client = scope.get("client")
    address = _address(client[0]) if client else None
    act_as(Actor(kind=kind, id=actor_id, user_id=user_id, address=address, request_id=logs.request_id.get()))


@lru_cache(_MOST_ADDRESSES_REMEMBERED)
def _address(host: str) -> str | None:
    """The IP address alone: the interface of a link-local one is nothing that PostgreSQL could keep."""
    try:
        return str(ip_address(host.partition("%")[0]))
    except ValueError:
        return None


async def check_kinds(services: Services, principal: Principal, file_id: UUID) -> None:
    """Raises `NotFound` for a file that these credentials may not see because of its kind. A file's kind never changes.

    Costs a query only where the credentials are good for some kinds alone.
    """
    if principal.kinds is not None and not await ledger.ids_of_kinds(services.db, principal.owner, [file_id], principal.kinds):
        raise NotFound


def needs(scope: Scope, *, of_stored_file: bool = True) -> Callable[[AnyConnection, BaseRouteHandler], Awaitable[None]]:
    """A Litestar guard: guards run before a handler's parameters and body are looked at.

    It also sees to it that the file of the route's `file_id` is of a kind that the credentials are good for, unless the route is about
    a file that is still to come.
    """

    async def guard(connection: AnyConnection, _: BaseRouteHandler) -> None:
        services = services_of(connection)
        principal = await admit(services, cast("MutableMapping[str, Any]", connection.scope), scope)
        if of_stored_file and (file_id := connection.path_params.get("file_id")) is not None:
            await check_kinds(services, principal, file_id)

    return guard


def services_of(connection: AnyConnection) -> Services:
    """What `application.build` was given: one and the same for all requests of a process."""
    return cast("Services", connection.app.state["services"])


def principal_of(connection: AnyConnection) -> Principal:
    """The principal that the route's guard let in."""
    return cast("Principal", connection.scope["state"]["principal"])
