"""Asks clamd, ClamAV's daemon, about a file before it is published.

The protocol is `INSTREAM` of clamd(8): `zINSTREAM`, then pieces that each follow their length as 4 bytes, big-endian, then a length of
zero; the reply ends with NUL. Only the one reply that says so makes a file clean. Whatever else happens, nothing is published
(`server/decisions/0010-scanning-with-clamd.md`).
"""

import asyncio
import contextvars
import logging
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from server.errors import Infected, NotScannable, ScannerUnavailable
from server.kinds import KNOWN
from server.metrics import Metrics
from server.settings import SettingError, Settings, variable

Pieces = Iterable[bytes | memoryview]

_LONGEST_REPLY_BYTES = 4096
_LONGEST_SIGNATURE = 200
_PING_SECONDS = 2.0
_TOO_LONG = b"INSTREAM size limit exceeded. ERROR"
_FOUND = re.compile(rb"stream: ([\x20-\x7e]+) FOUND")
_LIMIT_SIGNATURE = "Heuristics.Limits.Exceeded"  # no virus: what AlertExceedsMax makes of a file that clamd has not scanned as a whole

log = logging.getLogger("coffer.scanner")


class Scanner:
    """The virus scanner of one process. Lives in one event loop; its scans run in threads of its own, as many as may run at once."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises `SettingError` for an exempt type that no file can have."""
        self._address = settings.clamd
        self._timeout_seconds = settings.clamd_timeout_seconds
        self._max_bytes = settings.clamd_max_bytes
        self._accepts_oversize = settings.scan_oversize == "accept"
        self._exempt = _exempt(settings.scan_exempt_types)
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(settings.clamd_scans_at_once, thread_name_prefix="scan")
        self._asking: asyncio.Task[bool] | None = None

    def refuse_oversize(self, mime_type: str, size_bytes: int) -> None:
        """Raises `NotScannable` when a file of that type and size would be refused for its size, whatever its bytes."""
        if size_bytes > self._max_bytes and not self._accepts_oversize and mime_type not in self._exempt:
            self._metrics.scanned(NotScannable.code, None)
            raise NotScannable("size", self._max_bytes)

    async def check(self, mime_type: str, size_bytes: int, pieces: Callable[[], Pieces]) -> None:
        """Returns when the file may be published. `pieces` gives its bytes, and is called and read in a thread.

        Raises `Infected`, `NotScannable`, `ScannerUnavailable`, and what reading `pieces` raises.
        """
        self.refuse_oversize(mime_type, size_bytes)
        if mime_type in self._exempt or size_bytes > self._max_bytes:
            self._metrics.scanned("skipped", None)
            return
        began = time.monotonic()
        deadline = began + self._timeout_seconds
        scan = contextvars.copy_context().run  # so that its log lines name the request
        result = "failed"
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, scan, self._scan, pieces, size_bytes, deadline)
            result = "clean"
        except (Infected, NotScannable, ScannerUnavailable) as refused:
            result = refused.code
            raise
        finally:
            self._metrics.scanned(result, time.monotonic() - began)

    async def answers(self) -> bool:
        """Whether clamd is there, asked within two seconds. It is asked once for all who want to know meanwhile.

        Whoever reaches the port may want to know: with a thread for each, a clamd that hangs would keep all threads waiting for it.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(self._ping))
        return await asyncio.shield(self._asking)

    async def warn_if_away(self) -> None:
        """Logs a warning unless clamd answers. Its absence keeps nobody from starting: it may come later."""
        if not await self.answers():
            log.warning("clamd does not answer at %s: until it does, uploads are refused with scanner_unavailable", self._address)

    def close(self) -> None:
        """Ends the threads, and waits for the scans under way, at most their time limit."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    # In a thread

    def _ping(self) -> bool:
        try:
            with _Conversation(self._address, time.monotonic() + _PING_SECONDS) as clamd:
                clamd.send(b"zPING\0")
                return clamd.reply() == b"PONG"
        except OSError:
            return False

    def _scan(self, pieces: Callable[[], Pieces], size_bytes: int, deadline: float) -> None:
        try:
            with _Conversation(self._address, deadline) as clamd:
                reply, judged_bytes = _stream(clamd, pieces())
        except OSError as problem:
            log.warning("clamd at %s is not to be had: %s", self._address, problem)
            raise ScannerUnavailable from problem
        if reply == b"stream: OK" and judged_bytes == size_bytes:
            return
        if found := _FOUND.fullmatch(reply):
            signature = found[1].decode("ascii")[:_LONGEST_SIGNATURE]
            if signature.startswith(_LIMIT_SIGNATURE):
                raise NotScannable("limits", self._max_bytes)
            raise Infected(signature)
        if reply == _TOO_LONG:
            log.warning("clamd's StreamMaxLength is less than %s (%d)", variable("clamd_max_bytes"), self._max_bytes)
            raise NotScannable("limits", self._max_bytes)
        log.warning("clamd at %s gave no verdict: %r", self._address, reply[:_LONGEST_SIGNATURE])
        raise ScannerUnavailable


class _Conversation:
    """One connection to clamd, which must be over by `deadline` (of `time.monotonic`). Every failure is an `OSError`."""

    def __init__(self, address: str, deadline: float) -> None:
        self._deadline = deadline
        family, _, place = address.partition(":")
        if family == "unix":
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.settimeout(self._left_seconds())
                self._socket.connect(place)
            except BaseException:
                self._socket.close()
                raise
        else:
            host, _, port = place.rpartition(":")
            self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout=self._left_seconds())
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "_Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _left_seconds(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        return left

    def send(self, data: bytes | memoryview) -> None:
        self._socket.settimeout(self._left_seconds())
        self._socket.sendall(data)

    @property
    def has_replied(self) -> bool:
        """Whether there is something to be read, the end included."""
        poll = select.poll()  # select.select takes no descriptor over 1023
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def reply(self) -> bytes:
        """Up to the NUL that ends it, without it. A reply that is cut short is none."""
        reply = b""
        while not reply.endswith(b"\0"):
            self._socket.settimeout(self._left_seconds())
            received = self._socket.recv(_LONGEST_REPLY_BYTES)
            reply += received
            if not received or len(reply) > _LONGEST_REPLY_BYTES:
                raise ConnectionError(f"it sent no whole reply: {reply[:_LONGEST_SIGNATURE]!r}")
        return reply[:-1]


def _stream(clamd: _Conversation, pieces: Pieces) -> tuple[bytes, int | None]:
    """The reply, and to how many bytes it came: None when it came before all were sent. clamd replies early when it has had enough."""
    sent_bytes = 0
    try:
        clamd.send(b"zINSTREAM\0")
        for piece in pieces:
            if not piece:  # its length would be taken for the end
                continue
            if clamd.has_replied:
                return clamd.reply(), None
            clamd.send(struct.pack("!L", len(piece)))
            clamd.send(piece)
            sent_bytes += len(piece)
        clamd.send(struct.pack("!L", 0))
    except ConnectionError:  # why it hung up may be there to be read
        return clamd.reply(), None
    return clamd.reply(), sent_bytes


def _exempt(wanted: tuple[str, ...]) -> frozenset[str]:
    """The known MIME types among `wanted`, in which `video/*` stands for all of its kind."""
    exempt: set[str] = set()
    for each in wanted:
        matching = {known for known in KNOWN if known == each or (each.endswith("/*") and known.startswith(each[:-1]))}
        if not matching:
            raise SettingError(f"{variable('scan_exempt_types')}: no file is of type {each}; there are {', '.join(sorted(KNOWN))}")
        exempt |= matching
    return frozenset(exempt)
