"""Bodies that are files, sent by the kernel from its page cache to the socket: ASGI's zero copy send (`http.response.zerocopysend`).

The extension is in a request's scope where the connection is a plain socket; over TLS, or when the settings say so, it is not, and the
application reads and sends the bytes itself. Measured in decisions/0017.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import MutableMapping
from typing import Any

from server.api.protocol import UploadCycle, UploadProtocol
from server.errors import Damaged

Message = MutableMapping[str, Any]

EXTENSION = "http.response.zerocopysend"
HEAD_WAITS = "coffer.head_waits"
"""In a message that starts an answer: a file follows at once, so the head is to go out with its first bytes, in one packet."""

SENDFILE = "sendfile"  # under this name the application's state, which the server hands to every connection, says whether it may

TURN_BYTES = 2 * 1024 * 1024
"""What one connection may send before the others have their turn: as nginx has it; about half a millisecond on loopback."""
_PROBE_BYTES = 256 * 1024  # Linux reads ahead half as much at once by default, and reclaims by age: what is gone is rarely less
_probe = [bytearray(1)]

_GONE = frozenset({errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})  # besides what is a `ConnectionError`

log = logging.getLogger("coffer.api")


class ClientGone(ConnectionError):
    """The client left before it had the whole file. `sent_bytes` of it were handed to the kernel."""

    def __init__(self, sent_bytes: int) -> None:
        super().__init__("the client has gone")
        self.sent_bytes = sent_bytes


class FileCycle(UploadCycle):
    """One request and its answer, whose body may be a file."""

    protocol: "SendfileProtocol"
    _head: bytes | None = None

    async def send(self, message: Any) -> None:
        """As the server's, and takes files. Raises `ClientGone`, and `Damaged` when the file ends before its time."""
        if message["type"] == EXTENSION:
            await self._send_file(message["file"], message["offset"], message["count"])
        elif HEAD_WAITS in message and not self.response_started:
            self._head = self.encoded(message["status"], [*self.default_headers, *message["headers"]])
            self.start_answer()
        else:
            await super().send(message)

    def go_on(self, head: bytes) -> None:
        """Takes over an answer that has begun: `head` is what is left of its head, and a file is what follows."""
        self._head = head
        self.start_answer()

    async def _send_file(self, file: Any, offset: int, count: int) -> None:
        if self._head is None or self.response_complete:
            raise RuntimeError("a file is sent after a head that waits for it, once")
        head, self._head = self._head, None
        try:
            await self.protocol.send_file(head, file.fileno(), offset, count)
        except ClientGone:
            # Found here before the event loop told of it; uvicorn would call the answer incomplete, as if that were our fault.
            self.disconnected = True
            self.transport.abort()
            raise
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class SendfileProtocol(UploadProtocol):
    """Sends files past the transport, which has nothing to send meanwhile, through a descriptor of its own for the same socket.

    uvloop has no `sendfile`, and watches no descriptor for others that a transport has; a second one it watches.
    """

    _cycle_class = FileCycle
    _socket: socket.socket | None = None
    _writable: asyncio.Future[None] | None = None
    _unsent_bytes = 0
    """Bytes of a file that wait for the client to take those before them; 0 while it is we who are busy."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client is here."""
        super().connection_made(transport)
        self._sends_files = bool(self.app_state.get(SENDFILE)) and self.scheme == "http"

    def connection_lost(self, exc: Exception | None) -> None:
        """Wakes whoever waits for the client, and lets go of the socket: only then is it closed."""
        super().connection_lost(exc)
        if self._socket is not None:
            if self._writable is not None:
                self._on_writable()
            self._socket.close()  # uvloop keeps it open for as long as it is watched, so nobody else gets its number before that ends
            self._socket = None

    def on_headers_complete(self) -> None:
        """Starts the application, which is told that it may send files."""
        if not self._sends_files:
            super().on_headers_complete()
            return
        self.scope["extensions"] = {EXTENSION: {}}
        super().on_headers_complete()
        self.cycle.protocol = self  # type: ignore[attr-defined]

    def unsent_bytes(self) -> int:
        """How many bytes wait here for the client."""
        return self.transport.get_write_buffer_size() + self._unsent_bytes

    def send_now(self, head: bytes, fd: int, count: int) -> tuple[bytes, int]:
        """Sends as much of a head and of a file from its start as the kernel takes at once.

        Returns the rest of the head, and how many bytes of the file went.

        For a connection with nothing else to send. What goes wrong is met again, and told, by whoever sends the rest.
        """
        mine = self._own_socket()
        try:
            head = head[mine.send(head, socket.MSG_MORE) :]
            return head, 0 if head else os.sendfile(mine.fileno(), fd, 0, count)
        except OSError:
            return head, 0

    async def send_file(self, head: bytes, fd: int, offset: int, count: int) -> None:
        """Sends the head of an answer and `count` bytes of a file, at least one. Raises `ClientGone`, and `Damaged` when there are fewer.

        Whoever calls keeps the file open meanwhile. No file is empty, for no type begins with nothing (`server/kinds.py`).
        """
        at, end, resident_to = offset, offset + count, offset
        try:
            while self.transport.get_write_buffer_size():  # an answer to an earlier request of this connection
                await self._until_writable(count)
            mine = self._own_socket()
            while head:
                try:
                    head = head[mine.send(head, socket.MSG_MORE) :]
                except BlockingIOError:
                    await self._until_writable(count)
            while at < end:
                turn_bytes = min(end - at, TURN_BYTES)
                if resident_to < at + turn_bytes:
                    if not is_resident(fd, at, turn_bytes):
                        # A disk's time would be everybody's.
                        await self.loop.run_in_executor(None, _read_ahead, fd, at, turn_bytes)
                    resident_to = at + turn_bytes
                self._check_client()
                try:
                    sent = os.sendfile(mine.fileno(), fd, at, turn_bytes)
                except BlockingIOError:
                    await self._until_writable(end - at)
                    continue
                if sent == 0:
                    raise Damaged
                at += sent
                if sent < turn_bytes:
                    await self._until_writable(end - at)
                elif at < end:
                    await asyncio.sleep(0)
        except ConnectionError as problem:
            raise ClientGone(at - offset) from problem
        except OSError as problem:
            if problem.errno in _GONE:
                raise ClientGone(at - offset) from problem
            log.error("a stored file cannot be sent", extra={"errno": problem.errno})  # noqa: TRY400 - no traceback: it would hold the file
            raise Damaged from None

    def _own_socket(self) -> socket.socket:
        self._check_client()
        if self._socket is None:
            theirs = self.transport.get_extra_info("socket")
            self._socket = socket.socket(theirs.family, theirs.type, theirs.proto, fileno=os.dup(theirs.fileno()))
            self._socket.setblocking(False)
        return self._socket

    def _check_client(self) -> None:
        if self.transport.is_closing():
            raise ConnectionAbortedError

    async def _until_writable(self, unsent_bytes: int) -> None:
        """Returns when the kernel takes more bytes. Raises `ConnectionAbortedError` when the connection has ended."""
        mine = self._own_socket()
        self._unsent_bytes = unsent_bytes
        self._writable = self.loop.create_future()
        self.loop.add_writer(mine, self._on_writable)
        try:
            await self._writable
        finally:
            self._writable = None
            self._unsent_bytes = 0
            self.loop.remove_writer(mine)
        self._check_client()

    def _on_writable(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)


def is_resident(fd: int, offset: int, count: int) -> bool:
    """Whether these bytes of a file are, as far as a few probes tell, in the page cache, so that sending them waits for no disk.

    A hole between two probes costs everybody the time of one read.
    """
    try:
        for at in (*range(offset, offset + count, _PROBE_BYTES), offset + count - 1):
            os.preadv(fd, _probe, at, os.RWF_NOWAIT)
    except OSError:  # it is not there, or this file system cannot tell
        return False
    return True


def _read_ahead(fd: int, offset: int, count: int) -> None:
    """Has the bytes brought into the page cache, and waits for them. Errors are met again, and told, when they are sent."""
    end = offset + count
    try:
        while offset < end and (read := len(os.pread(fd, min(_PROBE_BYTES, end - offset), offset))):
            offset += read
    except OSError:
        pass
