"""uvicorn's HTTP protocol, with a read buffer that suits uploads."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

READ_AHEAD_BYTES = 256 * 1024  # per connection; one more read of the event loop's, 250 KiB, may come on top


class UploadProtocol(HttpToolsProtocol):
    """Pauses a connection when 256 KiB wait to be read, where uvicorn does at 64 KiB.

    The event loop reads up to 250 KiB at once, so at 64 KiB every read of an upload costs a pause and a resume: a quarter
    of the throughput, and of the processor's time per GiB (decisions/0001).
    """

    def on_body(self, body: bytes) -> None:
        """Takes a piece of a request's body from the parser."""
        cycle = self.cycle
        if cycle.response_complete:
            return
        # `bytes()` of bytes copies nothing, and the application has usually taken what came before.
        cycle.body = bytes(cycle.body) + body if cycle.body else body  # type: ignore[assignment]  # uvicorn only appends and reads
        if len(cycle.body) > READ_AHEAD_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()
