"""uvicorn's HTTP protocol, with a read buffer that suits uploads and a bound on everything that is not a body."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

READ_AHEAD_BYTES = 256 * 1024  # per connection; one more read of the event loop's, 250 KiB, may come on top
# nginx takes 32 KiB by default. The parser keeps what it has of a head, so without a bound one endless header fills the memory.
MOST_HEAD_BYTES = 64 * 1024


class UploadProtocol(HttpToolsProtocol):
    """Pauses a connection when 256 KiB wait to be read, where uvicorn does at 64 KiB.

    The event loop reads up to 250 KiB at once, so at 64 KiB every read of an upload costs a pause and a resume: a quarter
    of the throughput, and of the processor's time per GiB (decisions/0001).

    Hangs up when 64 KiB have come (give or take a read) that completed neither a head nor a piece of a body. Leaves out
    trailers: uvicorn would add them to the headers of a request whose headers have been judged already.
    """

    _bytes_since_progress = 0
    _in_head = False

    def data_received(self, data: bytes) -> None:
        """Takes bytes from the event loop."""
        self._bytes_since_progress += len(data)
        super().data_received(data)
        if self._bytes_since_progress > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._bytes_since_progress = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Takes a piece of a request's body from the parser."""
        self._bytes_since_progress = 0
        cycle = self.cycle
        if cycle.response_complete:
            return
        # `bytes()` of bytes copies nothing, and the application has usually taken what came before.
        cycle.body = bytes(cycle.body) + body if cycle.body else body  # type: ignore[assignment]  # uvicorn only appends and reads
        if len(cycle.body) > READ_AHEAD_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._bytes_since_progress = 0
        super().on_message_complete()
