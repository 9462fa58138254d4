"""A network that fails: a TCP proxy whose connections are cut, reset, stalled and throttled after a number of bytes."""

import asyncio
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

FAULTS = ("cut", "reset", "stall", "throttle", "lost answer")
_NO_LINGERING = (1).to_bytes(4, "little") + bytes(4)
_PIECE_BYTES = 64 * 1024
_THROTTLED_BYTES_PER_SECOND = 4 * 2**20


class Proxy:
    """Stands before a server while it is entered. Each new connection is dealt a fault, until so many have struck.

    `cut` closes it both ways, `reset` aborts it, `stall` forwards nothing any more and keeps it open, `throttle` slows it down and cuts
    it after as many bytes again, and `lost answer` lets the client's bytes through and closes when the server answers. `done` counts what
    was really done.
    """

    def __init__(self, host: str, port: int, *, faults: int, within_bytes: int, seed: int = 0, kinds: tuple[str, ...] = FAULTS) -> None:
        """Each of the `faults` strikes when up to `within_bytes` bytes have gone up its connection."""
        self._target = host, port
        self._faults = faults
        self._within_bytes = within_bytes
        self._chance = random.Random(seed)
        self._kinds = kinds
        self.done: Counter[str] = Counter()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._stopped: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._ready = threading.Event()
        self._serving: set[asyncio.Task[None]] = set()

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._stopped is not None
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PIECE_BYTES)
        self.url = "http://{}:{}".format(*server.sockets[0].getsockname())
        self._ready.set()
        await self._stopped.wait()
        server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _deal(self) -> tuple[str, int]:
        if self._is_over():
            return "", 0
        return self._chance.choice(self._kinds), self._chance.randrange(self._within_bytes)

    def _is_over(self) -> bool:
        return self.done.total() >= self._faults

    def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        serving = asyncio.create_task(self._serve(from_client, to_client))
        self._serving.add(serving)  # nothing else refers to one that has stalled
        serving.add_done_callback(self._serving.discard)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        fault, at_bytes = self._deal()
        try:
            from_server, to_server = await asyncio.open_connection(*self._target, limit=_PIECE_BYTES)
        except OSError:
            _abort(to_client)
            return
        is_struck = asyncio.Event()
        stalled = asyncio.Event()

        async def up() -> None:
            sent_bytes = 0
            while piece := await from_client.read(_PIECE_BYTES):
                if fault and not is_struck.is_set() and sent_bytes + len(piece) > at_bytes and not self._is_over():
                    self.done[fault] += 1
                    is_struck.set()
                    if fault in ("cut", "reset", "stall"):
                        to_server.write(piece[: max(0, at_bytes - sent_bytes)])
                        await to_server.drain()
                        if fault == "stall":
                            await stalled.wait()
                        return
                to_server.write(piece)
                await to_server.drain()
                sent_bytes += len(piece)
                if fault == "throttle" and is_struck.is_set():
                    await asyncio.sleep(len(piece) / _THROTTLED_BYTES_PER_SECOND)
                    if sent_bytes >= at_bytes + self._within_bytes:
                        return

        async def down() -> None:
            while piece := await from_server.read(_PIECE_BYTES):
                if is_struck.is_set() and fault == "stall":
                    await stalled.wait()
                if is_struck.is_set() and fault == "lost answer":
                    return
                to_client.write(piece)
                await to_client.drain()

        directions = [asyncio.create_task(up()), asyncio.create_task(down())]
        end: Callable[[asyncio.StreamWriter], None] = asyncio.StreamWriter.close
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            if is_struck.is_set() and fault == "reset":
                end = _abort
        finally:
            for each in directions:
                each.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await each
            end(to_server)
            end(to_client)


def _abort(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
    writer.transport.abort()
