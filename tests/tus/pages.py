"""A web server of an app: what its pages are made of, what they tell, and an edge in front of Coffer that adds the app's key."""

import json
import queue
import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import httpx

from tests.tus.speaking import VERSION

# Of one connection, each way.
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Pages(AbstractContextManager["Pages"]):
    """`serve` gives bytes under a path; what a page sends to `/told` is had by `told`. Below `/api/tus` requests go on to `coffer`, as the
    user of that client; GET, which tus does not have, asks for the file of an upload.
    """

    def __init__(self) -> None:
        self.coffer: httpx.Client | None = None
        self._told: queue.Queue[Any] = queue.Queue()
        self._served: dict[str, tuple[str, bytes]] = {}
        pages = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                pages._answer(self)

            do_GET = do_POST = do_HEAD = do_PATCH = do_DELETE = answer  # noqa: N815 - the library's names

            def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the library's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Pages":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, path: str, mime_type: str, body: bytes) -> None:
        self._served[path] = (mime_type, body)

    def told(self, timeout_seconds: float = 30) -> Any:
        """The next thing that a page tells. Raises `queue.Empty`."""
        return self._told.get(timeout=timeout_seconds)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        body = request.rfile.read(int(request.headers["Content-Length"] or 0))
        status, headers, content = 404, [], b""
        if path == "/told":
            self._told.put(json.loads(body))
            status = 204
        elif path in self._served:
            mime_type, content = self._served[path]
            status, headers = 200, [("Content-Type", mime_type)]
        elif path.startswith("/api/tus") and self.coffer is not None:
            answer = self._relayed(self.coffer, request, path, body)
            headers = [each for each in answer.headers.items() if each[0].lower() not in _HOP_BY_HOP]
            status, content = answer.status_code, answer.content
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        if status != 204:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    @staticmethod
    def _relayed(coffer: httpx.Client, request: BaseHTTPRequestHandler, path: str, body: bytes) -> httpx.Response:
        if request.command == "GET":
            found = coffer.head(path, headers=VERSION)
            return coffer.get(f"/api/files/{found.headers['coffer-file-id']}/download") if found.status_code == 200 else found
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        return coffer.request(request.command, path, headers=headers, content=body or None)
