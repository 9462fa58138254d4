"""A real browser, driven through the pipe of its DevTools protocol, and a web server on loopback that notices whether a script ran."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
from contextlib import AbstractContextManager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

_OPTIONS = [
    *("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-extensions", "--no-first-run", "--mute-audio", "--remote-debugging-pipe"),
    # Its own sandbox, which neither root nor most containers can have, protects the machine from pages; here all pages are ours.
    "--no-sandbox",
]


class Browser(AbstractContextManager["Browser"]):
    """Chromium with one tab. Downloads are denied; everything else is as a user has it."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        program = shutil.which("chromium")
        assert program is not None, "this needs Debian's package chromium"
        their_input, our_output = os.pipe()
        our_input, their_output = os.pipe()
        # Chromium talks through the descriptors 3 and 4.
        command = [
            "bash",
            "-c",
            f'exec "$@" 3<&{their_input} 4>&{their_output}',
            "bash",
            "setpriv",
            "--pdeathsig",
            "KILL",
            program,
            *_OPTIONS,
        ]
        command += [f"--user-data-dir={self._scratch}"]
        with (self._scratch.parent / "chromium.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"HOME": str(self._scratch)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(their_input, their_output),
                start_new_session=True,
            )
        os.close(their_input)
        os.close(their_output)
        self._input, self._output = os.fdopen(our_input, "rb"), os.fdopen(our_output, "wb", buffering=0)
        self.version: str = self._call("Browser.getVersion")["product"]
        self._call("Browser.setDownloadBehavior", behavior="deny")
        tab = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str = self._call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        self._call("Page.enable", self._session)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._input.close()
        self._output.close()

    def open(self, url: str) -> str:
        """Opens a page in the tab and waits until it and all that it holds has loaded. Returns why it was not shown, or nothing."""
        self._events.clear()
        error: str = self._call("Page.navigate", self._session, url=url).get("errorText", "")
        while not error and not any(each.get("method") == "Page.loadEventFired" for each in self._events):
            self._receive()
        return error

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._output.write(msgspec.json.encode(message) + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        assert "result" in answer, f"{method}: {answer}"
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        received = bytearray()
        while (byte := self._input.read(1)) != b"\0":
            assert byte, "the browser has ended"
            received += byte
        message: dict[str, Any] = msgspec.json.decode(received)
        if "method" in message:
            self._events.append(message)
        return message


class Witness(AbstractContextManager["Witness"]):
    """A web server of somebody else's. `GET /hit/<name>` is what scripts ask for; `hits` are the names asked for so far.

    `/relay/...` hands on what Coffer answers, without its Content-Disposition. `serve` gives bytes under a type of our choice.
    """

    def __init__(self, host: str, port: int) -> None:
        self.hits: set[str] = set()
        self._served: dict[str, tuple[str, bytes]] = {}
        witness = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                witness._answer(self, host, port)

            def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the library's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve(self, mime_type: str, body: bytes) -> str:
        """The URL under which these bytes are served as that type, with nothing that would restrain a browser."""
        path = f"/served/{len(self._served)}"
        self._served[path] = (mime_type, body)
        return self.url + path

    def relayed(self, path: str) -> str:
        """The URL of Coffer's answer to that path without its Content-Disposition, as a careless proxy would give it."""
        return f"{self.url}/relay{path}"

    def _answer(self, request: BaseHTTPRequestHandler, host: str, port: int) -> None:
        status, headers, body = 404, [], b""
        if hit := re.fullmatch("/hit/(.+)", request.path):
            self.hits.add(hit[1])
            status, headers = 200, [("Content-Type", "text/plain"), ("Access-Control-Allow-Origin", "*")]
        elif request.path in self._served:
            mime_type, body = self._served[request.path]
            status, headers = 200, [("Content-Type", mime_type)]
        elif request.path.startswith("/relay/"):
            upstream = HTTPConnection(host, port, timeout=20)
            upstream.request("GET", request.path.removeprefix("/relay"))
            answer = upstream.getresponse()
            unwanted = {"content-disposition", "content-length", "date"}
            status, headers, body = answer.status, [each for each in answer.getheaders() if each[0].lower() not in unwanted], answer.read()
            upstream.close()
        with suppress(ConnectionError):  # a browser that has what it wants hangs up
            request.send_response(status)
            for name, value in headers:
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
