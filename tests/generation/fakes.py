"""Pipelines as public documentation describes them, and a place where outputs lie: real HTTP on loopback."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple


class Asked(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Reply = tuple[int, bytes]


class Site:
    """Answers by `routes`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[Asked], Reply] | Reply] = {}
        self.asked: list[Asked] = []
        self.url = ""

    def reply(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        found = self.routes.get(asked.path, (404, b""))
        return found(asked) if callable(found) else found


@contextmanager
def site() -> Iterator[Site]:
    """A site of its own, on a free port."""
    here = Site()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, content = here.reply(Asked(self.command, self.path, headers, body))
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def as_json(status: int, /, **content: Any) -> Reply:
    return status, json.dumps(content).encode()
