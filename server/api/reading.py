"""How the JSON routes read what was sent: strictly, so that a misspelt or mistyped wish is refused and never ignored."""

from typing import Any
from urllib.parse import parse_qsl

import msgspec
from litestar import Request
from litestar.params import QueryParameter

from server.api.services import Services
from server.errors import InvalidRequest

DEFAULT_PAGE = 50

_MOST_PARAMETERS = 100
_ECHOED_CHARACTERS = 100  # of a name that the client made up


class StrictRequest(Request[Any, Any, Any]):
    """A request whose JSON body is decoded straight into its route's type. The framework would take `"10"` for a number."""

    async def json(self) -> Any:
        """The body as the type of the handler's `data`. Raises `InvalidRequest` naming the field, or `body` for the whole."""
        wanted = self.route_handler.parsed_fn_signature.parameters["data"].annotation
        try:
            return msgspec.json.decode(await self.body(), type=wanted)
        except msgspec.DecodeError as problem:
            reason, _, path = str(problem).partition(" - at `$.")
            raise InvalidRequest(path.rstrip("`").partition("[")[0].partition(".")[0] or "body", reason) from problem
        except UnicodeDecodeError as problem:
            raise InvalidRequest("body", "must be UTF-8") from problem


async def known_query_only(request: Request[Any, Any, Any]) -> None:
    """Refuses a query parameter that the route does not have, and one that is sent twice: two readers could pick different ones.

    A `before_request` hook, so it runs once the guards have let the request in.
    """
    try:
        query = request.scope["query_string"].decode("ascii")
        given = [name for name, _ in parse_qsl(query, keep_blank_values=True, max_num_fields=_MOST_PARAMETERS, errors="strict")]
    except ValueError as problem:
        raise InvalidRequest("query", f"must be at most {_MOST_PARAMETERS} percent-encoded UTF-8 parameters") from problem
    parameters = request.route_handler.parsed_fn_signature.parameters.values()
    known = [each.kwarg_definition.name or each.name for each in parameters if isinstance(each.kwarg_definition, QueryParameter)]
    for name in given:
        if name not in known:
            raise InvalidRequest(name[:_ECHOED_CHARACTERS], f"is not a parameter here, where there are {', '.join(known)}")
        if given.count(name) > 1:
            raise InvalidRequest(name, "may be given once only")


def page_size(services: Services, limit: int | None) -> int:
    """How many rows a page holds when so many are asked for. Raises `InvalidRequest` for more than the settings allow."""
    most = services.settings.max_list_page
    if limit is not None and limit > most:
        raise bad_limit(services)
    return min(DEFAULT_PAGE, most) if limit is None else limit


def bad_limit(services: Services) -> InvalidRequest:
    """The refusal of every `limit` that is none: text, zero, too large."""
    return InvalidRequest("limit", f"must be a whole number from 1 to {services.settings.max_list_page}")
