"""uvicorn's HTTP protocol, with a read buffer that suits uploads, a bound on everything that is not a body, and our own refusals."""

import logging
from typing import TYPE_CHECKING, Any

from uuid_utils import uuid7
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.api.problems import HttpRefusal, Problem

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent

READ_AHEAD_BYTES = 128 * 1024  # per connection; the event loop reads up to 250 KiB at once, so at most that much more waits
# nginx takes 32 KiB by default. The parser keeps what it has of a head, so without a bound one endless header fills the memory.
MOST_HEAD_BYTES = 64 * 1024

_DECIDING = frozenset({b"content-length", b"transfer-encoding", b"connection"})  # how the answer ends

log = logging.getLogger("coffer.api")


class UploadCycle(RequestResponseCycle):
    """One request and its answer."""

    async def receive(self) -> "ASGIReceiveEvent":
        """As the server's, which drops what it has of a body when the connection ends: a resumable upload keeps that."""
        message = await super().receive()
        if message["type"] != "http.disconnect" or not self.body or self.response_complete:
            return message
        rest, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": rest, "more_body": self.more_body}

    async def send(self, message: Any) -> None:
        """As the server's, which looks at every header by itself: a head that says how long its body is is looked at as a whole."""
        if message["type"] != "http.response.start" or self.response_started or self.flow.write_paused or self.disconnected:
            await super().send(message)
            return
        headers = [*self.default_headers, *message["headers"]]
        lengths = [value for name, value in headers if name in _DECIDING]
        if len(lengths) != 1 or not lengths[0].isdigit():
            await super().send(message)
            return
        self.start_answer()
        self.chunked_encoding, self.expected_content_length = False, int(lengths[0])
        self.transport.write(self.encoded(message["status"], headers))

    def start_answer(self) -> None:
        """From here on the client is being answered."""
        self.response_started = True
        self.waiting_for_100_continue = False

    def encoded(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The bytes of a head. Raises `RuntimeError` for a header that is not one line, which would let its author write others."""
        if not self.keep_alive:
            headers.append((b"connection", b"close"))
        head = b"".join([STATUS_LINE[status], *[b"%b: %b\r\n" % each for each in headers], b"\r\n"])
        if head.count(b"\n") != len(headers) + 2 or head.count(b"\r") != len(headers) + 2 or b"\0" in head:
            raise RuntimeError("a header's value is not one line")
        return head


class UploadProtocol(HttpToolsProtocol):
    """Hands a body's pieces to the application as they were read, without copying them.

    uvicorn appends them to a bytearray and copies that. Growing and dropping it returned memory to the kernel thousands of times
    per GiB, to be fetched and cleared again: a quarter of the processor's time of an upload (decisions/0001).

    Hangs up when 64 KiB have come (give or take a read) that completed neither a head nor a piece of a body. Leaves out
    trailers: uvicorn would add them to the headers of a request whose headers have been judged already.
    """

    _cycle_class: type[UploadCycle] = UploadCycle
    _bytes_since_progress = 0
    _in_head = False

    def data_received(self, data: bytes) -> None:
        """Takes bytes from the event loop."""
        self._bytes_since_progress += len(data)
        super().data_received(data)
        if self._bytes_since_progress > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HttpRefusal(431))

    def send_400_response(self, msg: str) -> None:
        """Refuses what the parser could not read as HTTP. uvicorn has logged `msg`, which for us says no more than the status."""
        self._refuse(HttpRefusal(400))

    def _refuse(self, error: Exception) -> None:
        """Answers with problem+json and hangs up. No request has come of it, so the front neither sees, counts nor logs it."""
        if self._is_being_answered():
            self.transport.abort()  # what is said now would stand within the body of an answer
            return
        request_id = str(uuid7())
        problem = Problem.of(error, request_id)
        problem.headers["connection"] = "close"
        log.info("refused before it was a request", extra={"request_id": request_id, "status": problem.status})
        headers = [*self.server_state.default_headers, *problem.raw_headers(), (b"x-request-id", request_id.encode())]
        lines = [b"%b: %b\r\n" % each for each in headers]
        self.transport.write(b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", problem.body]))
        self.transport.close()

    def _is_being_answered(self) -> bool:
        """An answer has begun and not ended."""
        return bool(self.pipeline) or (self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete)

    def on_message_begin(self) -> None:
        """A request's first byte has come; until `on_headers_complete` its headers are taken."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header; the parser calls it for trailers too, which are dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts the application, with headers that are final from here on. A target with a fragment is no request (RFC 9112, section 3.2).

        uvicorn would drop the fragment, and what follows a `#` in a signed link is not signed.
        """
        if b"#" in self.url:
            raise ValueError("a request's target has no fragment")  # the parser takes it for a malformed request
        self._in_head = False
        self._bytes_since_progress = 0
        super().on_headers_complete()
        self.cycle.__class__ = self._cycle_class  # uvicorn makes its cycles itself; the application has not begun to run yet

    def on_body(self, body: bytes) -> None:
        """Takes a piece of a request's body from the parser."""
        self._bytes_since_progress = 0
        cycle = self.cycle
        if cycle.response_complete:
            return
        # The application has usually taken what came before; with this limit a large read waits alone, and nothing is joined.
        cycle.body = bytes(cycle.body) + body if cycle.body else body  # type: ignore[assignment]  # uvicorn only appends and reads
        if len(cycle.body) > READ_AHEAD_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Tells the application that the body has ended. Also without a body, so an idle connection never counts as a head under way."""
        self._bytes_since_progress = 0
        super().on_message_complete()
