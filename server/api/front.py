"""The outermost layer: every request passes here, and the byte routes go no further.

It gives each request its id, counts and logs it, and answers with problem+json whatever a handler raises before it has
begun to answer. Written against bare ASGI, because at a thousand small uploads a second a framework's own time per request
would be most of the cost.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote
from uuid import UUID

from server import logs
from server.api.accounting import account, request_id_of
from server.api.cors import Cors, Headers
from server.api.door import REFUSED
from server.api.download import DOWNLOAD_ROUTE, download
from server.api.events import follow
from server.api.export import export
from server.api.express import BEGAN, EXPRESS, REST, Express, Rest
from server.api.limits import rate_headers
from server.api.linked import LINK_ROUTE, PUBLIC_ROUTE, download_by_link, download_public
from server.api.pace import PATIENCE, PacedBody
from server.api.problems import HttpRefusal, Problem
from server.api.proxies import Proxies
from server.api.sendfile import EXTENSION, SENDFILE, ClientGone
from server.api.services import Services
from server.api.streams import STREAMS
from server.api.upload import replace, upload, upload_by_link
from server.errors import CofferError, NotFound

Message = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]

CLIENT_GONE = 499  # only in logs and metrics: nobody was there to be told

ANSWER_HEADERS = "answer_headers"
"""Under this name a request's state holds headers for its answer, whatever that is; set by a door."""

_FILES = "/api/files/"
_USERS = "/api/users/"

log = logging.getLogger("coffer.api")


class Door(Protocol):
    """A protocol of its own below one path. What it raises is answered as everywhere."""

    def template(self, path: str) -> str:
        """The route of a path, for logs and metrics."""

    async def answer(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Answers a request, also OPTIONS that is no preflight."""


class Front:
    """The ASGI application that a server process runs."""

    def __init__(
        self,
        services: Services,
        json_app: ASGIApp,
        running: Callable[[], AbstractAsyncContextManager[None]],
        doors: Mapping[str, "Door"] | None = None,
    ) -> None:
        """`json_app` answers everything but the byte routes; `running` is entered at start-up and left at shut-down. `doors` answer all
        that lies below a path.
        """
        self._doors = dict(doors or {})
        self._services = services
        self._json_app = json_app
        self._running = running
        self._proxies = Proxies(services.settings)
        self._cors = Cors(services.settings)
        seconds = services.settings.hsts_seconds
        self._over_tls = ((b"strict-transport-security", f"max-age={seconds}".encode()),) if seconds else ()

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _live(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        await receive()
        scope["state"][PATIENCE] = self._services.settings
        scope["state"][STREAMS] = self._services.streams
        scope["state"][EXPRESS] = Express(self._services, self._proxies, self._answer_headers)
        scope["state"][SENDFILE] = self._services.settings.sendfile
        try:
            async with self._running():
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as problem:
            log.exception("could not start or stop cleanly")
            await send({"type": "lifespan.startup.failed", "message": logs.without_secrets(str(problem))})
            raise
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        self._proxies.settle(scope)
        body = PacedBody(self._services.settings, receive, asyncio.get_running_loop().time)
        exchange = _Exchange(scope, body.receive, send, self._answer_headers(scope))
        metrics = self._services.metrics
        if BEGAN not in scope["state"]:
            metrics.started()
        # Each request runs in a task of its own, so nothing needs to be reset.
        logs.request_id.set(exchange.request_id)
        try:
            await self._answer(exchange)
        finally:
            body.close()
            principal = scope["state"].get("principal")
            route = exchange.route or scope.get("path_template")
            account(
                metrics,
                began=exchange.began,
                request_id=exchange.request_id,
                method=scope["method"],
                route=route,
                path=scope["path"] if route and not exchange.path_is_secret else None,
                status=exchange.final_status,
                bytes_in=exchange.bytes_in,
                bytes_out=exchange.bytes_out,
                client=scope.get("client"),
                principal=principal.credentials if principal else None,
                user_id=principal.user_id if principal else None,
            )

    def _answer_headers(self, scope: ASGIScope) -> Headers:
        headers = self._cors.headers(scope)
        return (*headers, *self._over_tls) if scope["scheme"] == "https" else headers

    async def _answer(self, exchange: "_Exchange") -> None:
        try:
            await self._route(exchange)
        except Exception as error:  # noqa: BLE001 - the last net: what is not expected is logged with its traceback
            await self._fail(exchange, Problem.of(error, exchange.request_id), error)

    async def _fail(self, exchange: "_Exchange", problem: Problem, error: Exception) -> None:
        """Tells the client, if that is still possible. An answer cut short is left incomplete, so the server drops the connection."""
        if exchange.client_gone:
            log.debug("client went away", exc_info=error)
            return
        if problem.status >= 500 or exchange.status:
            # A disk that is away fails every request, and where that was noticed says nothing: what is expected needs no traceback.
            is_known = isinstance(error, CofferError) and error.__cause__ is None
            log.error("request failed", exc_info=None if is_known else error, extra={"error": type(error).__name__})
        if not exchange.status:
            await problem.send(exchange.scope, exchange.send)

    async def _route(self, exchange: "_Exchange") -> None:
        scope = exchange.scope
        if exchange.rest is not None:
            await exchange.send_rest()
            return
        path: str = scope["path"]
        if scope["method"] == "OPTIONS" and (permitted := self._cors.preflight(scope)) is not None:
            exchange.route, exchange.path_is_secret = "preflight", True  # it may be that of an upload link
            await _send_no_content(exchange, permitted)
            return
        if path.startswith(_FILES):
            file_id, _, last = path[len(_FILES) :].rpartition("/")
            byte_route = _BYTE_ROUTES.get((bool(file_id), last))
            if byte_route is not None:
                await self._serve_bytes(exchange, byte_route, file_id)
                return
        elif (link_route := _LINK_ROUTES.get(path[:3])) is not None:
            await self._serve_link(exchange, link_route)
            return
        elif (door := self._door(path)) is not None:
            exchange.route = door.template(path)
            await door.answer(scope, exchange.receive, exchange.send)
            return
        elif path.startswith(_USERS):
            # A user id may hold slashes and percent signs: keep its segment as it was sent, for `users.py` to decode once.
            raw: bytes = scope.get("raw_path") or quote(path).encode("ascii")
            scope["path"] = raw.decode("latin-1")
            segment, _, last = scope["path"][len(_USERS) :].partition("/")
            if segment and last == "export":
                await self._serve_export(exchange, segment)
                return
        if scope["method"] == "OPTIONS":
            await self._tell_methods(exchange)
            return
        await self._json_app(scope, exchange.receive, exchange.send)

    def _door(self, path: str) -> "Door | None":
        return next((door for prefix, door in self._doors.items() if path == prefix or path.startswith(f"{prefix}/")), None)

    async def _tell_methods(self, exchange: "_Exchange") -> None:
        """Answers OPTIONS for a JSON route, without credentials. Raises `NotFound` where there is none.

        Litestar's own answer names the methods of one of a path's handlers, behind its guards; its refusal of a method that no
        route has names all.
        """
        try:
            await self._json_app({**exchange.scope, "method": "TRACE"}, exchange.receive, exchange.send)
        except HttpRefusal as refusal:
            await _send_no_content(exchange, ((b"allow", refusal.headers["allow"].encode("ascii")),))

    async def _serve_link(self, exchange: "_Exchange", route: "_ByteRoute") -> None:
        exchange.route, exchange.path_is_secret = route.template, True
        scope = exchange.scope
        if scope["method"] not in route.methods:
            await _refuse_method(exchange, route)
            return
        if REFUSED in scope["state"]:
            raise scope["state"][REFUSED]
        self._services.limits.count_link(scope)
        raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode("ascii")
        await route.handler(self._services, raw[3:].decode("latin-1"), scope, exchange.receive, exchange.send)

    async def _serve_export(self, exchange: "_Exchange", segment: str) -> None:
        exchange.route = _EXPORT.template
        if exchange.scope["method"] not in _EXPORT.methods:
            await _refuse_method(exchange, _EXPORT)
            return
        await _EXPORT.handler(self._services, segment, exchange.scope, exchange.receive, exchange.send)

    async def _serve_bytes(self, exchange: "_Exchange", byte_route: "_ByteRoute", file_id: str) -> None:
        scope = exchange.scope
        known: UUID | None = None
        if file_id:
            try:
                known = UUID(file_id) if len(file_id) == 36 else None
            except ValueError:
                known = None
            if known is None:  # then it is none of our routes, and what stands in the path is not logged
                raise NotFound
        exchange.route = byte_route.template
        if scope["method"] not in byte_route.methods:
            await _refuse_method(exchange, byte_route)
            return
        arguments = () if known is None else (known,)
        await byte_route.handler(self._services, *arguments, scope, exchange.receive, exchange.send)


async def _refuse_method(exchange: "_Exchange", route: "_ByteRoute") -> None:
    """Answers OPTIONS by what there is. Raises `HttpRefusal` for every other method, which the route does not have."""
    allow = ", ".join((*route.methods, "OPTIONS"))
    if exchange.scope["method"] != "OPTIONS":
        raise HttpRefusal(405, {"allow": allow})
    await _send_no_content(exchange, ((b"allow", allow.encode()),))


async def _send_no_content(exchange: "_Exchange", headers: Headers) -> None:
    await exchange.send({"type": "http.response.start", "status": 204, "headers": headers})
    await exchange.send({"type": "http.response.body", "body": b""})


class _ByteRoute(NamedTuple):
    template: str
    methods: tuple[str, ...]
    handler: Callable[..., Awaitable[None]]


# By whether a file's id stands before the last segment, and that segment.
_BYTE_ROUTES = {
    (False, "events"): _ByteRoute("/api/files/events", ("GET",), follow),
    (False, "upload"): _ByteRoute("/api/files/upload", ("POST",), upload),
    (True, "content"): _ByteRoute("/api/files/{file_id}/content", ("PUT",), replace),
    (True, "download"): _ByteRoute(DOWNLOAD_ROUTE, ("GET", "HEAD"), download),
}

_EXPORT = _ByteRoute("/api/users/{user_id}/export", ("GET",), export)

# By the first three characters of the path. What follows them is the link, as it was sent.
_LINK_ROUTES = {
    "/f/": _ByteRoute(LINK_ROUTE, ("GET", "HEAD"), download_by_link),
    "/p/": _ByteRoute(PUBLIC_ROUTE, ("GET", "HEAD"), download_public),
    "/u/": _ByteRoute("/u/{token}", ("PUT",), upload_by_link),
}


class _Exchange:
    """One request and its answer, watched on their way through."""

    __slots__ = (
        "_added",
        "_raw_receive",
        "_raw_send",
        "began",
        "bytes_in",
        "bytes_out",
        "client_gone",
        "complete",
        "path_is_secret",
        "request_id",
        "rest",
        "route",
        "scope",
        "status",
    )

    def __init__(self, scope: ASGIScope, receive: Receive, send: Send, added: Headers) -> None:
        """`added` are headers for the answer, whoever gives it."""
        state = scope.setdefault("state", {})
        self.began = state.get(BEGAN) or time.perf_counter()
        self.scope = scope
        self.route: str | None = None
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.client_gone = False
        self.complete = False
        self.path_is_secret = False  # a link's: whoever reads the log must not be able to use it
        self._added = added
        self._raw_receive = receive
        self._raw_send = send
        self.request_id = request_id_of(scope["headers"])
        self.rest: Rest | None = state.pop(REST, None)  # it holds a file open, and the scope lasts until the connection's next request
        if self.rest is not None:
            reply = self.rest.reply
            self.began, self.request_id, self.route, self.path_is_secret = reply.began, reply.request_id, reply.route, reply.path is None
            self.status, self.bytes_out = 200, self.rest.sent_bytes
        state["request_id"] = self.request_id

    @property
    def final_status(self) -> int:
        if self.client_gone and not self.complete:
            return CLIENT_GONE
        return self.status or 500

    async def receive(self) -> Message:
        message = await self._raw_receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
        elif message["type"] == "http.disconnect" and not self.complete:
            self.client_gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == EXTENSION:
            await self._send_file(message)
            return
        if message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode("ascii")),
                *rate_headers(self.scope),
                *self.scope["state"].get(ANSWER_HEADERS, ()),
                *self._added,
            ]
        await self._raw_send(message)

    async def _send_file(self, message: Message) -> None:
        try:
            await self._raw_send(message)
        except ClientGone as gone:
            self.client_gone = True
            self.bytes_out += gone.sent_bytes
            raise
        self.bytes_out += message["count"]
        self.complete = True

    async def send_rest(self) -> None:
        """Sends what is left of an answer that has begun."""
        rest, self.rest = self.rest, None
        if rest is not None:
            count = rest.reply.size_bytes - rest.sent_bytes
            await self.send({"type": EXTENSION, "file": rest.reply.file, "offset": rest.sent_bytes, "count": count})
