"""Whole files are answered where the request is read, without a task, and past the front: links and public files that were answered a
moment ago at once, and owners as soon as their file's row is there.

All that a request asks for is looked at, counted and logged here as there; whatever is not as simple as can be goes the ordinary way.
Measured in decisions/0017.
"""

import asyncio
import logging
import time
from collections.abc import Callable, MutableMapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from uuid import UUID

from server.api.accounting import account, request_id_of
from server.api.cors import Headers
from server.api.door import REFUSED, admit_at_once
from server.api.download import DOWNLOAD_ROUTE, ROW, by_nginx, nginx_sends
from server.api.limits import rate_headers
from server.api.linked import CONDITIONS, LINK_ROUTE, PUBLIC_ROUTE
from server.api.proxies import Proxies
from server.api.sendfile import TURN_BYTES, FileCycle, SendfileProtocol, is_resident
from server.api.services import Services
from server.auth import Scope as Right
from server.delivery import Body
from server.delivery.headers import representation_headers
from server.delivery.recent import Recent
from server.errors import CofferError, RateLimited
from server.ledger import File
from server.vault.volume import Handle

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

Scope = MutableMapping[str, Any]

EXPRESS = "express"  # under this name the application's state, which the server hands to every connection, holds an `Express`
REST = "express_rest"  # under this name a request's state holds what is left to be sent of its answer
BEGAN = "express_began"  # and under this one when it was begun to be answered here, by `time.perf_counter`: from then on it is in flight

_MOST_HEADERS_KEPT = 1_024  # of files, which follow from their rows; 1 KB each
_FILES, _DOWNLOAD, _ID_LENGTH = b"/api/files/", b"/download", 36
_ROUTES = {b"/f/": LINK_ROUTE, b"/p/": PUBLIC_ROUTE}
_NOT_SIMPLE = CONDITIONS | {b"content-length", b"transfer-encoding", b"expect", b"upgrade"}


log = logging.getLogger("coffer.api")


class Reply(NamedTuple):
    """A whole answer: its head, and its file where the bytes are ours to send."""

    head: bytes
    file: Handle | None
    size_bytes: int
    request_id: str
    route: str
    began: float
    path: str | None = None  # a link's is secret


class _Named(NamedTuple):
    """What an owner's headers are made of."""

    file_name: str
    mime_type: str
    sha256: bytes
    content_changed_at: datetime


class Rest(NamedTuple):
    """What a client was too slow to take at once, of an answer that has begun."""

    reply: Reply
    sent_bytes: int


class Express:
    """Finds answers that were given a moment ago. One per process."""

    def __init__(self, services: Services, proxies: Proxies, added: Callable[[Scope], Headers]) -> None:
        """`added` tells the headers that every answer to such a request has besides its own."""
        self._services = services
        self._proxies = proxies
        self._added = added
        self._defaults: tuple[object, bytes] = (None, b"")
        self._owners_headers = lru_cache(_MOST_HEADERS_KEPT)(self._headers_of)

    def reply(self, url: bytes, scope: Scope, default_headers: list[tuple[bytes, bytes]]) -> Reply | None:
        """The answer to a GET of this target, if it is such a one. The request is then counted against its limit.

        None leaves it to the ordinary way, where nothing is counted twice. Either way the `scope` may have been settled (`Proxies`).
        """
        route = _ROUTES.get(url[:3])
        if route is None:
            return None
        path = url.decode("latin-1")
        recent = self._services.recent_links.find(path)
        if recent is None or recent.size_bytes > TURN_BYTES:
            return None
        if not _is_simple(scope):
            return None
        began = time.perf_counter()
        scope["path"] = path
        self._proxies.settle(scope)
        is_nginxs = nginx_sends(self._services.settings, scope, recent.path)
        if not is_nginxs and not is_resident(recent.file.fd, 0, recent.size_bytes):
            return None
        try:
            self._services.limits.count_link(scope)
        except RateLimited as refusal:
            scope["state"][REFUSED] = refusal
            return None
        request_id = request_id_of(scope["headers"])
        added = b"".join([b"%b: %b\r\n" % each for each in self._added(scope)])
        head = b"%b%bx-request-id: %b\r\n%b\r\n" % (
            self._default_lines(default_headers),
            self._lines(recent, is_nginxs=is_nginxs),
            request_id.encode("ascii"),
            added,
        )
        return Reply(head, None if is_nginxs else recent.file, 0 if is_nginxs else recent.size_bytes, request_id, route, began)

    def ask(self, scope: Scope) -> "asyncio.Future[File | None] | None":
        """Lets in whoever asks for a whole file of theirs, where that needs no waiting, and asks for its row.

        None leaves it to the ordinary way, as `reply` does. That is also open to a request that was begun here.
        """
        path: bytes = scope["raw_path"]
        if not (path.startswith(_FILES) and path.endswith(_DOWNLOAD)) or scope["query_string"] or self._services.settings.audit_reads:
            return None
        if len(path) != len(_FILES) + _ID_LENGTH + len(_DOWNLOAD) or not _is_simple(scope):
            return None
        try:
            file_id = UUID(path[len(_FILES) : -len(_DOWNLOAD)].decode("ascii"))
        except ValueError:
            return None
        began = time.perf_counter()
        self._proxies.settle(scope)
        principal = admit_at_once(self._services, scope, Right.FILES_READ)
        if principal is None:
            return None
        self._services.metrics.started()
        scope["state"][BEGAN] = began
        return self._services.delivery.row_of(principal.owner, file_id)

    def owners_reply(self, row: "asyncio.Future[File | None]", scope: Scope, cycle: FileCycle) -> Reply | None:
        """The answer to what `ask` let in, once the row is there. None leaves it to the ordinary way."""
        if isinstance(problem := row.exception(), CofferError):
            scope["state"][REFUSED] = problem  # who asks a database once more that has just not answered waits twice as long to say so
        found = None if problem is not None else row.result()
        if found is None:
            return None
        scope["state"][ROW] = found
        file = self._services.delivery.whole_at_once(found)
        if file is None:
            return None
        is_nginxs = nginx_sends(self._services.settings, scope)
        request_id = request_id_of(scope["headers"])
        named = _Named(found.file_name, found.mime_type, found.sha256, found.content_changed_at)
        headers = [
            *cycle.default_headers,
            *self._owners_headers(named, found.file_size, found.volume_id, found.file_path, is_nginxs),
            (b"x-request-id", request_id.encode("ascii")),
            *rate_headers(scope),
            *self._added(scope),
        ]
        sent, size_bytes = (None, 0) if is_nginxs else (file, found.file_size)
        return Reply(cycle.encoded(200, headers), sent, size_bytes, request_id, DOWNLOAD_ROUTE, scope["state"][BEGAN], scope["path"])

    def _headers_of(self, named: _Named, size_bytes: int, volume_id: UUID, path: str, is_nginxs: bool) -> list[tuple[bytes, bytes]]:
        answered = [*representation_headers(named), ("content-length", str(size_bytes))]
        headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in answered]
        return by_nginx(self._services.settings, Body(None, 0, size_bytes, b"", volume_id, path), headers) if is_nginxs else headers

    def account(self, reply: Reply, scope: Scope) -> None:
        """Counts and logs an answer that has gone out as a whole."""
        state = scope["state"]
        if BEGAN not in state:
            self._services.metrics.started()
        principal = state.get("principal")
        account(
            self._services.metrics,
            began=reply.began,
            request_id=reply.request_id,
            method="GET",
            route=reply.route,
            path=reply.path,
            status=200,
            bytes_in=0,
            bytes_out=reply.size_bytes,
            client=scope["client"],
            principal=principal.credentials if principal else None,
            user_id=principal.user_id if principal else None,
        )

    def _default_lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The status line, and the server's own headers: a new list each second, for the date."""
        if self._defaults[0] is not headers:
            self._defaults = (headers, b"HTTP/1.1 200 OK\r\n" + _lines(headers))
        return self._defaults[1]

    def _lines(self, recent: Recent, *, is_nginxs: bool) -> bytes:
        second = int(time.time())
        prepared = cast("tuple[int, bool, bytes] | None", recent.prepared)
        if prepared is None or prepared[:2] != (second, is_nginxs):
            answer = recent.answer()
            headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in answer.headers]
            if is_nginxs and answer.body is not None:
                headers = by_nginx(self._services.settings, answer.body, headers)
            prepared = recent.prepared = (second, is_nginxs, _lines(headers))
        return prepared[2]


def _is_simple(scope: Scope) -> bool:
    return all(name not in _NOT_SIMPLE for name, _ in scope["headers"])


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % each for each in headers])


class ExpressProtocol(SendfileProtocol):
    """Answers at once what it can, when no other answer of the connection is under way.

    What its client does not take at once is sent by the application, to which it is a request whose answer has begun (`REST`).
    """

    _is_stopping = False
    _is_answered_at_once = False

    def on_headers_complete(self) -> None:
        """Answers, or starts the application."""
        if not self._answers_at_once():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is here to its end; one that was answered at once has no cycle that waits for that."""
        if not self._is_answered_at_once:
            super().on_message_complete()
            return
        self._is_answered_at_once = False
        self._bytes_since_progress = 0
        self.on_response_complete()

    def _answers_at_once(self) -> bool:
        if (
            not self._sends_files
            or self._is_stopping
            or self.parser.get_method() != b"GET"
            or (self.cycle is not None and not self.cycle.response_complete)
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size()
            or not self.parser.should_keep_alive()
            or self.parser.get_http_version() != "1.1"
        ):
            return False
        express: Express = self.app_state[EXPRESS]
        scope = cast("Scope", self.scope)
        try:
            reply = express.reply(self.url, scope, self.server_state.default_headers)
        except Exception:
            log.exception("could not answer at once")  # the parser would take it for an error of the client's
            return False
        if reply is None:
            return False
        if reply.file is None:
            self.transport.write(reply.head)
        else:
            head, sent_bytes = self.send_now(reply.head, reply.file.fd, reply.size_bytes)
            if sent_bytes < reply.size_bytes:
                scope["state"][REST] = Rest(reply, sent_bytes)
                super().on_headers_complete()
                cast("FileCycle", self.cycle).go_on(head)
                return True
        self._in_head = False
        self._is_answered_at_once = True
        express.account(reply, scope)
        return True

    def _start_asgi_task(self, cycle: "RequestResponseCycle", app: "ASGI3Application") -> None:
        """Starts the application for a request whose turn it is, unless it is an owner's whose answer waits for a row alone."""
        row = self._row_for(cast("Scope", cycle.scope))
        if row is None:
            super()._start_asgi_task(cycle, app)
        else:
            row.add_done_callback(lambda row: self._answer_owner(cast("FileCycle", cycle), app, row))

    def _row_for(self, scope: Scope) -> "asyncio.Future[File | None] | None":
        if not self._sends_files or scope["method"] != "GET" or scope["http_version"] != "1.1":
            return None
        try:
            return cast("Express", self.app_state[EXPRESS]).ask(scope)
        except Exception:
            log.exception("could not begin to answer at once")
            return None

    def _answer_owner(self, cycle: FileCycle, app: "ASGI3Application", row: "asyncio.Future[File | None]") -> None:
        """Answers, now that the row is there; or else the application does, which goes on from what was begun."""
        scope, express = cast("Scope", cycle.scope), cast("Express", self.app_state[EXPRESS])
        reply: Reply | None = None
        waits_for_disk = False
        if cycle.keep_alive and not self.transport.is_closing() and not self.transport.get_write_buffer_size():
            try:
                reply = express.owners_reply(row, scope, cycle)
                if reply is not None and reply.file is not None:
                    waits_for_disk = reply.size_bytes > TURN_BYTES or not is_resident(reply.file.fd, 0, reply.size_bytes)
            except Exception:
                log.exception("could not answer at once")
                reply = None
        if reply is None:
            super()._start_asgi_task(cycle, app)
            return
        if reply.file is None:
            self.transport.write(reply.head)
        else:
            head, sent_bytes = (reply.head, 0) if waits_for_disk else self.send_now(reply.head, reply.file.fd, reply.size_bytes)
            if sent_bytes < reply.size_bytes:
                scope["state"][REST] = Rest(reply, sent_bytes)
                super()._start_asgi_task(cycle, app)
                cycle.go_on(head)
                return
        cycle.start_answer()
        cycle.response_complete = True
        express.account(reply, scope)
        cycle.on_response()
