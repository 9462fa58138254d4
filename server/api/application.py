"""The Litestar application: every JSON route. Failures pass through it to `front.py`, which answers all of them."""

from typing import Any, NoReturn, cast, get_args

from litestar import Litestar, Request
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException

from server.api import assets, compose, files, generate, health, links, media, openapi, presets, storage, trail, trash, users, webhooks
from server.api.door import services_of
from server.api.front import ASGIApp
from server.api.problems import COMMON_HEADERS, HttpRefusal
from server.api.reading import StrictRequest, bad_limit
from server.api.services import Services
from server.errors import InvalidRequest, NotFound
from server.ledger.models import JobState, SourceType

LARGEST_JSON_BYTES = 2**20  # the longest honest body, names and metadata written as escapes, is under 0.5 MiB

DESCRIBED: list[openapi.Handler] = [
    files.router,
    trash.router,
    links.router,
    storage.router,
    generate.router,
    presets.router,
    compose.router,
    media.router,
    users.router,
    trail.router,
    webhooks.router,
    assets.router,
    *health.handlers,
]


def build(services: Services) -> ASGIApp:
    """The application over these services. It needs no start-up of its own."""
    describing = openapi.handlers(DESCRIBED) if services.settings.schema_documentation else []
    app = Litestar(
        route_handlers=[*DESCRIBED, *describing],
        state=State({"services": services}),
        request_class=StrictRequest,
        exception_handlers={Exception: _pass_on},
        request_max_body_size=LARGEST_JSON_BYTES,
        response_headers=COMMON_HEADERS,
        logging_config=None,
        openapi_config=None,
    )
    return cast("ASGIApp", app)


def _pass_on(request: Request[Any, Any, Any], error: Exception) -> NoReturn:
    """Hands every failure to the front, with Litestar's own refusals put in our words."""
    match error:
        case ValidationException():
            raise _invalid(request, error) from error
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


def _invalid(request: Request[Any, Any, Any], error: ValidationException) -> InvalidRequest:
    """Says what would be accepted. Bodies that are there were judged by `StrictRequest`; this is for queries, and for no body."""
    first = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    match first.get("key"):
        case "data":
            return InvalidRequest("body", "is empty; send a JSON object")
        case "limit":
            return bad_limit(services_of(request))
        case "favorite" | "links" | "permanent" as name:
            return InvalidRequest(name, "must be true or false")
        case "sort":
            return InvalidRequest("sort", f"must be one of {', '.join(get_args(files.Sort))}")
        case "of_state":
            return InvalidRequest("state", f"must be one of {', '.join(get_args(assets.State))}")
        case "file_type":
            return InvalidRequest("type", f"must be one of {', '.join(get_args(files.Kind))}")
        case "job_state":
            return InvalidRequest("state", f"must be one of {', '.join(get_args(JobState))}")
        case "media_type":
            return InvalidRequest("type", f"must be one of {', '.join(get_args(files.Kind))}")
        case "source_type":
            return InvalidRequest("source", f"must be one of {', '.join(get_args(SourceType))}")
        case name:
            return InvalidRequest(str(name or "request"), str(first.get("message", error.detail)))
