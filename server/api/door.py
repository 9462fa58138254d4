"""Letting a request in: its credentials are judged before a byte of its body is read."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from server.api.services import Services
from server.auth import Principal, Scope
from server.errors import InvalidRequest, Unauthenticated

AnyConnection = ASGIConnection[Any, Any, Any, Any]


async def admit(services: Services, scope: MutableMapping[str, Any], needed: Scope) -> Principal:
    """Who sent the request of this ASGI scope, provided they may do what is needed. Kept in the scope's state for the log.

    Raises what `Authenticator.principal` raises. A repeated header is refused: two readers could pick different ones.
    """
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
    principal = await services.authenticator.principal(authorization, acting_user, needed)
    scope.setdefault("state", {})["principal"] = principal
    return principal


def needs(scope: Scope) -> Callable[[AnyConnection, BaseRouteHandler], Awaitable[None]]:
    """A Litestar guard: guards run before a handler's parameters and body are looked at."""

    async def guard(connection: AnyConnection, _: BaseRouteHandler) -> None:
        await admit(services_of(connection), cast("MutableMapping[str, Any]", connection.scope), scope)

    return guard


def services_of(connection: AnyConnection) -> Services:
    """What `application.build` was given: one and the same for all requests of a process."""
    return cast("Services", connection.app.state["services"])


def principal_of(connection: AnyConnection) -> Principal:
    """The principal that the route's guard let in."""
    return cast("Principal", connection.scope["state"]["principal"])
