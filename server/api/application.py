"""The Litestar application: every JSON route. Failures pass through it to `front.py`, which answers all of them."""

from typing import Any, NoReturn, cast

from litestar import Litestar, Request
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException

from server.api import files, health, openapi, storage, users
from server.api.front import ASGIApp
from server.api.problems import COMMON_HEADERS, HttpRefusal
from server.api.services import Services
from server.errors import InvalidRequest, NotFound

LARGEST_JSON_BYTES = 2**20  # the longest honest body, names and metadata written as escapes, is under 0.5 MiB


# What clients call the parameters that have another name in the handlers.
_NAMES_OUTSIDE = {"data": "body", "file_type": "type"}


def build(services: Services) -> ASGIApp:
    """The application over these services. It needs no start-up of its own."""
    described: list[openapi.Handler] = [files.router, storage.router, users.router, *health.handlers]
    describing = openapi.handlers(described) if services.settings.schema_documentation else []
    app = Litestar(
        route_handlers=[*described, *describing],
        state=State({"services": services}),
        exception_handlers={Exception: _pass_on},
        request_max_body_size=LARGEST_JSON_BYTES,
        response_headers=COMMON_HEADERS,
        logging_config=None,
        openapi_config=None,
    )
    return cast("ASGIApp", app)


def _pass_on(_: Request[Any, Any, Any], error: Exception) -> NoReturn:
    """Hands every failure to the front, with Litestar's own refusals put in our words."""
    match error:
        case ValidationException():
            raise _invalid(error) from error
        case HTTPException(status_code=404):
            raise NotFound from error
        case HTTPException(status_code=400):
            raise InvalidRequest("body", error.detail) from error
        case HTTPException(status_code=status) if status < 500:
            raise HttpRefusal(status, error.headers) from error
        case RecursionError():  # nothing here recurses but the decoding of JSON
            raise InvalidRequest("body", "is nested too deeply") from error
        case _:
            raise error


def _invalid(error: ValidationException) -> InvalidRequest:
    first = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    name, message = str(first.get("key", "request")), str(first.get("message", error.detail))
    # Litestar tells of a missing body with the text of a KeyError.
    return InvalidRequest(_NAMES_OUTSIDE.get(name, name), "is missing" if message == repr(name) else message)
