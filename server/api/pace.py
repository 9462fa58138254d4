"""Clients that are slow on purpose: what a request must not take for ever, neither its head, its body, nor its answer.

A body is judged where it is waited for (`PacedBody`), so that no client pays for a slow disk or database of ours. What happens while
no handler waits is judged by the connection (`PatientProtocol`).
"""

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from server.api.express import ExpressProtocol
from server.api.streams import STREAMS
from server.errors import TooSlow
from server.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

PATIENCE = "patience"  # under this name the application's state, which the server hands to every connection, holds the settings
_NO_LINGERING = struct.pack("ii", 1, 0)  # on, for 0 seconds
FAREWELL_SECONDS = 1.0
"""How long a stopping server still takes one request on a connection that is idle: it may be on its way."""
_LOOKS = 4  # per shortest grace: what is due is found that much later at most


class Pace:
    """Bytes against the time spent waiting for them, over one stretch of `grace_seconds` after the other."""

    __slots__ = ("_bytes", "_bytes_per_second", "_grace_seconds", "_waited_seconds")

    def __init__(self, bytes_per_second: int, grace_seconds: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._grace_seconds = grace_seconds
        self._waited_seconds = 0.0
        self._bytes = 0

    @property
    def left_seconds(self) -> float:
        """How much longer may be waited before this stretch is judged."""
        return self._grace_seconds - self._waited_seconds

    def suffices(self, waited_seconds: float, size_bytes: int) -> bool:
        """Notes what has come after how long a wait. False when a stretch has ended with fewer bytes than it needed."""
        self._waited_seconds += waited_seconds
        self._bytes += size_bytes
        if self._waited_seconds < self._grace_seconds:
            return True
        enough = self._bytes >= self._bytes_per_second * self._waited_seconds
        self._waited_seconds, self._bytes = 0.0, 0
        return enough


class PacedBody:
    """A request's `receive` that raises `TooSlow` when the body comes slower than it must. `close` when the request is over."""

    __slots__ = ("_clock", "_complete", "_pace", "_receive", "_task", "_timer", "_too_slow", "_waiting_since")

    def __init__(self, settings: Settings, receive: Receive, clock: Callable[[], float]) -> None:
        """`clock` counts seconds, as the event loop's does, for it must agree with the loop's timers."""
        self._pace = Pace(settings.slow_upload_bytes_per_second, settings.slow_upload_grace_seconds)
        self._receive = receive
        self._clock = clock
        self._complete = settings.slow_upload_bytes_per_second == 0  # then there is nothing to watch
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._too_slow = False
        self._waiting_since = 0.0

    async def receive(self) -> Message:
        """The next message. After the body's end it is the client's leaving, for which one may wait for ever."""
        if self._complete:
            return await self._receive()
        self._task = asyncio.current_task()
        self._waiting_since = self._clock()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pace.left_seconds, self._look)
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            # Ours, unless somebody else has cancelled the request as well: then that counts.
            if self._too_slow and self._task is not None and self._task.uncancel() == 0:
                raise TooSlow from None
            raise
        finally:
            self._task = None
        if not message.get("more_body"):
            self._complete = True
            self.close()
        elif not self._pace.suffices(self._clock() - self._waiting_since, len(message.get("body", b""))):
            raise TooSlow
        return message

    def close(self) -> None:
        """Judges no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Ends a wait that has lasted too long, by cancelling the handler where it waits and nowhere else."""
        self._timer = None
        if self._task is None:
            return  # it is busy with what has come; its next wait sets a timer again
        now = self._clock()
        waited, self._waiting_since = now - self._waiting_since, now
        if self._pace.suffices(waited, 0):
            self._timer = asyncio.get_running_loop().call_later(self._pace.left_seconds, self._look)
        else:
            self._too_slow = True
            self._task.cancel()


class PatientProtocol(ExpressProtocol):
    """Hangs up on whoever does not finish a request's head, dribbles the rest of a body that was refused, or takes none of its answer.

    One timer per connection looks at it a few times per grace; a request costs a reading of the clock.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """As the server makes it. The settings come by way of the application's state."""
        super().__init__(*arguments, **named)
        settings: Settings = self.app_state[PATIENCE]
        self._head_seconds = settings.request_head_seconds
        self._rest_seconds = settings.slow_upload_grace_seconds
        self._unread_seconds = settings.slow_download_grace_seconds
        self._look_seconds = min(self._head_seconds, self._rest_seconds, self._unread_seconds) / _LOOKS
        self._due: float | None = None  # when the head, or the rest of a refused body, must be here
        self._in_message = False
        self._unread_bytes = 0
        self._unread_since = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client is here, and is watched until it has gone."""
        super().connection_made(transport)
        self._watch = self.loop.call_later(self._look_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is left to be watched."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._farewell is not None:
            self._farewell.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: the answer that is under way, or comes next, is this connection's last, and says so.

        An idle connection is not closed at once: a proxy or a client that is just sending would have to take that for a failure. Event
        streams, which would not end by themselves, are to end.
        """
        self.app_state[STREAMS].stopping.set()
        self._is_stopping = True
        if self._is_answered():
            self._farewell = self.loop.call_later(FAREWELL_SECONDS, self._part)
        else:
            super().shutdown()

    def _part(self) -> None:
        """Closes the connection, unless a request has begun to come: that is answered, or ends as any other that does not go on."""
        if self._is_answered() and not self._in_message:
            self.transport.close()

    def on_message_begin(self) -> None:
        """The time that a head may take begins with its first byte, unless its client was being waited for already."""
        self._in_message = True
        if self._due is None:
            self._due = self.loop.time() + self._head_seconds
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """From here on the handler knows what it waits for."""
        self._due = None
        super().on_headers_complete()
        if self._is_stopping:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """The request is here to its end."""
        self._in_message = False
        self._due = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer before the request's end: the rest is read away, so that the client gets to see the answer, but not for ever."""
        if self._in_message and not self._in_head and self._is_answered():
            self._due = self.loop.time() + self._rest_seconds
        super().on_response_complete()

    def resume_writing(self) -> None:
        """The client has taken so much of the answer that more is written, perhaps until as much waits as before."""
        self._unread_bytes = 0
        super().resume_writing()

    def _is_answered(self) -> bool:
        """No handler is at work, nor is one waiting for its turn."""
        return self.cycle is None or self.cycle.response_complete

    def _look(self) -> None:
        now = self.loop.time()
        self._watch = self.loop.call_later(self._look_seconds, self._look)
        unread_bytes = self._count_unread()
        if unread_bytes == 0 or unread_bytes != self._unread_bytes:
            self._unread_bytes, self._unread_since = unread_bytes, now
        elif now - self._unread_since >= self._unread_seconds:
            self._cut_off()
            return
        if self._due is None and not self._in_message and self._is_answered() and self.timeout_keep_alive_task is None:
            # uvicorn waits for no first request, nor for the next one when empty lines have come, which begin none.
            self._due = now + self._head_seconds
        if self._due is not None and now >= self._due and not self.transport.is_closing():
            self._hang_up()

    def _count_unread(self) -> int:
        """Bytes that wait here for the client, and with them those that the kernel has sent and not seen acknowledged.

        The kernel takes more from us only once a third of its buffer, which may be megabytes, is free again. By our own bytes alone
        a slow client would seem to take nothing meanwhile.
        """
        waiting_bytes = self.unsent_bytes()
        if waiting_bytes == 0:
            return 0
        (sent_bytes,) = struct.unpack("i", fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4)))
        return waiting_bytes + int(sent_bytes)

    def _cut_off(self) -> None:
        """By a reset: a close would keep what the client does not read, here or in the kernel, for as long as it does not read it."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        self.transport.abort()

    def _hang_up(self) -> None:
        if self._in_head and self._is_answered():
            self._refuse(TooSlow())
        else:  # it said nothing, or has its answer, or an answer is under way, into which nothing must be written
            self.transport.close()
