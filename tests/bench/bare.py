"""The least that keeps promise P1: `PUT /<directory>/<name>` is hashed, written, synced, linked and answered. No rows, no checks.

Run by `tests.bench.servers.bare`, under the same HTTP server and with the same steps on the disk as Coffer.
"""

import asyncio
import hashlib
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn

from server.api.protocol import UploadProtocol

Message = MutableMapping[str, Any]

BATCH_BYTES = 256 * 2**10
WRITE_BACK_BYTES = 8 * 2**20
_threads = ThreadPoolExecutor(8)
_root = ""


class _Incoming:
    def __init__(self, name: str) -> None:
        self.path = f"{_root}/incoming-{name}"
        self.sha256 = hashlib.sha256()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        self._written = self._started = 0

    def append(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self.sha256.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(self._fd, view) :]
            self._written += len(chunk)
        if self._written - self._started >= WRITE_BACK_BYTES:
            os.posix_fadvise(self._fd, self._started, self._written - self._started, os.POSIX_FADV_DONTNEED)
            self._started = self._written

    def publish(self, directory: str, name: str) -> None:
        os.fdatasync(self._fd)
        os.close(self._fd)
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        os.link(self.path, name, dst_dir_fd=parent)
        Path(self.path).unlink()
        os.fsync(parent)
        os.close(parent)


def _store(directory: str, name: str, chunks: list[bytes], incoming: _Incoming | None) -> str:
    incoming = incoming or _Incoming(name)
    incoming.append(chunks)
    incoming.publish(directory, name)
    return incoming.sha256.hexdigest()


async def handle(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
    if scope["type"] != "http":
        return
    loop = asyncio.get_running_loop()
    group, name = scope["path"].strip("/").split("/")
    directory = f"{_root}/{group}"
    Path(directory).mkdir(exist_ok=True)
    chunks: list[bytes] = []
    held, more = 0, True
    incoming: _Incoming | None = None
    while more:
        message = await receive()
        more = message.get("more_body", False)
        chunks.append(message["body"])
        held += len(message["body"])
        if more and held >= BATCH_BYTES:
            incoming = incoming or _Incoming(name)
            await loop.run_in_executor(_threads, incoming.append, chunks)
            chunks, held = [], 0
    digest = await loop.run_in_executor(_threads, _store, directory, name, chunks, incoming)
    body = digest.encode()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    _root = sys.argv[1]
    Path(_root).mkdir()
    uvicorn.run(
        handle,
        host="127.0.0.1",
        port=int(sys.argv[2]),
        loop="uvloop",
        http=UploadProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=75,
    )
