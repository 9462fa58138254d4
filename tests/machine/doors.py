"""Ways into the server and out of it, within the confinement of its unit, which may take from one what no other needs. Not among them:
events as they happen, archives of a user, and what the worker sends to others or fetches from them.

Python's standard library alone, as in tests/machine/load.py.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.machine.load import Failed, Server, picture

PROGRAM_FILES = Path("/opt/coffer/current/.venv/lib")
_TUS = {"Tus-Resumable": "1.0.0"}


class Doors:
    """One user, who comes and goes by them. Each method raises `Failed` or AssertionError."""

    def __init__(self, server: Server) -> None:
        """The key needs `files:read`, `files:write`, `links:write` and `jobs:write`."""
        self._server = server
        self._headers = {"Authorization": f"Bearer {server.api_key}", "X-User-Id": f"doors-{os.getpid()}-{time.time_ns()}"}

    def resumable(self) -> None:
        """A resumable upload in two pieces."""
        content = picture(300, 200) + os.urandom(500_000)
        half = len(content) // 2
        _, answer = self._ask("POST", "/api/tus", headers=_TUS | {"Upload-Length": str(len(content))})
        path = urlsplit(answer["location"]).path
        piece = _TUS | {"Content-Type": "application/offset+octet-stream"}
        self._ask("PATCH", path, content[:half], piece | {"Upload-Offset": "0"})
        _, answer = self._ask("HEAD", path, headers=_TUS)
        assert answer["upload-offset"] == str(half), answer
        self._ask("PATCH", path, content[half:], piece | {"Upload-Offset": str(half)})
        (stored,) = [each for each in self._files() if each["file_size"] == len(content)]
        assert self._content(f"/api/files/{stored['id']}/download") == content

    def links(self) -> None:
        """An upload link, a download link, and a public file."""
        content = picture(30, 20, seed=2)
        made = self._json("POST", "/api/uploads/links", {"max_bytes": 100_000})
        self._ask("PUT", urlsplit(made["url"]).path, content, without_key=True)
        link = self._json("POST", f"/api/files/{made['file_id']}/link", {})
        assert self._content(urlsplit(link["url"]).path, without_key=True) == content
        public = self._json("PUT", f"/api/files/{made['file_id']}/public", {"is_public": True})
        assert self._content(urlsplit(public["url"]).path, without_key=True) == content

    def previews(self) -> None:
        """Of a picture and a film, one that is made when it is asked for, and a sheet: decoders in their jail."""
        ids = [self._upload(picture(640, 480, seed=3), "a.png"), self._upload(film(), "a.mp4")]
        for file_id in ids:
            shown = self._json("GET", f"/api/files/{file_id}?wait=preview&links=1")
            assert shown["preview_state"] == "ready", shown
            assert shown["previews"]
            for preview in shown["previews"].values():
                assert self._content(urlsplit(preview["url"]).path, without_key=True)
        other = self._json("POST", f"/api/files/{ids[0]}/link", {"preview": {"width": 200, "format": "webp"}})
        assert self._content(urlsplit(other["url"]).path, without_key=True)
        sheet = self._json("POST", "/api/compose", {"files": ids, "columns": 2, "cell_width": 64, "cell_height": 64})
        assert self._content(f"/api/files/{sheet['id']}/download")
        self._ask("GET", f"/api/files/{ids[0]}/provenance")

    def job(self) -> None:
        """A generation job, whose pipeline brings one output itself and sends the other along."""
        made = self._json("POST", "/api/generate", {"outputs": [{"type": "image", "max_bytes": 100_000}] * 2, "prompt": "a pier"})
        self._ask("PUT", urlsplit(made["uploads"][0]["url"]).path, picture(50, 40, seed=4), without_key=True)
        outputs = [{"index": 1, "base64": base64.b64encode(picture(50, 40, seed=5)).decode()}]
        body = json.dumps({"type": "job.completed", "data": {"job_id": made["job_id"], "outputs": outputs}}).encode()
        webhook = urlsplit(made["webhook"]["url"])
        self._ask("POST", f"{webhook.path}?{webhook.query}", body, _signed(made["webhook"]["secret"], body), without_key=True)
        ended = self._json("GET", f"/api/generate/status/{made['job_id']}?wait=end")
        assert ended["state"] == "completed", ended

    def metrics(self, *, of_one_process: bool) -> None:
        """The figures, and those of the process where there is one alone."""
        text = self._content("/metrics", without_key=True).decode()
        assert "coffer_http_requests_total{" in text
        assert ("process_resident_memory_bytes " in text) == of_one_process, text

    def _upload(self, content: bytes, name: str) -> str:
        file_id: str = self._json("POST", f"/api/files/upload?name={name}", content)["id"]
        return file_id

    def _files(self) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = self._json("GET", "/api/files")["files"]
        return files

    def _content(self, path: str, *, without_key: bool = False) -> bytes:
        return self._ask("GET", path, without_key=without_key)[0]

    def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        headers = {}
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        found: dict[str, Any] = json.loads(self._ask(method, path, body, headers)[0])
        return found

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, *, without_key: bool = False
    ) -> tuple[bytes, http.client.HTTPMessage]:
        """One request, on a connection of its own."""
        connection = self._server.connect()
        try:
            connection.request(method, path, body, ({} if without_key else self._headers) | (headers or {}))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise Failed(f"{method} {path}: {answer.status} {content[:300]!r}")
        return content, answer.headers


def film() -> bytes:
    """Two seconds, made by the ffmpeg that the release brings."""
    (ffmpeg,) = PROGRAM_FILES.glob("python3*/site-packages/imageio_ffmpeg/binaries/ffmpeg-*")
    made = Path("/var/tmp/coffer-film.mp4")
    options = ("-v", "error", "-y", "-f", "lavfi", "-i", "testsrc=duration=2:size=320x240:rate=10", "-pix_fmt", "yuv420p")
    subprocess.run([ffmpeg, *options, made], check=True)
    content = made.read_bytes()
    made.unlink()
    return content


def _signed(secret: str, body: bytes) -> dict[str, str]:
    """As Standard Webhooks has it."""
    key, message_id, now = base64.b64decode(secret.removeprefix("whsec_")), f"msg_{os.urandom(8).hex()}", str(int(time.time()))
    signature = base64.b64encode(hmac.digest(key, f"{message_id}.{now}.".encode() + body, hashlib.sha256)).decode()
    return {"webhook-id": message_id, "webhook-timestamp": now, "webhook-signature": f"v1,{signature}"}
