"""Links and public files that were answered a moment ago are answered where the request is read: without a task, and past the front.

All that a request asks for is looked at, counted and logged here as there; whatever is not as simple as can be goes the ordinary way.
Measured in decisions/0017.
"""

import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple, cast

from server.api.accounting import account, request_id_of
from server.api.cors import Headers
from server.api.download import by_nginx, nginx_sends
from server.api.linked import CONDITIONS, LINK_ROUTE, PUBLIC_ROUTE
from server.api.proxies import Proxies
from server.api.sendfile import TURN_BYTES, FileCycle, SendfileProtocol, is_resident
from server.api.services import Services
from server.delivery.recent import Recent
from server.errors import RateLimited
from server.vault.volume import Handle

Scope = MutableMapping[str, Any]

EXPRESS = "express"  # under this name the application's state, which the server hands to every connection, holds an `Express`
REST = "express_rest"  # under this name a request's state holds what is left to be sent of its answer
REFUSED = "express_refused"  # and under this one the problem, if it was counted here and there have been too many

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
        for name, _ in scope["headers"]:
            if name in _NOT_SIMPLE:
                return None
        began = time.perf_counter()
        scope["path"] = path
        self._proxies.settle(scope)
        is_nginxs = nginx_sends(self._services.settings, scope)
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

    def account(self, reply: Reply, scope: Scope) -> None:
        """Counts and logs an answer that has gone out as a whole."""
        self._services.metrics.started()
        account(
            self._services.metrics,
            began=reply.began,
            request_id=reply.request_id,
            method="GET",
            route=reply.route,
            path=None,
            status=200,
            bytes_in=0,
            bytes_out=reply.size_bytes,
            client=scope["client"],
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
