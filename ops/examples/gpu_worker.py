"""A pipeline to copy: takes the jobs that Coffer sends, reads their references, makes pictures and films, and brings them back.

    pip install httpx pillow standardwebhooks                     # and ffmpeg, for films
    export PIPELINE_SECRET=whsec_$(openssl rand -base64 32)
    python gpu_worker.py --port 8700 --address https://gpu.example.com

Coffer is told of it by `COFFER_PIPELINES`, with the same secret:

    [{"name": "gpu", "adapter": "dispatch", "url": "https://gpu.example.com/run", "secrets": ["whsec_..."]}]

`paint` and `film` stand for your models; the rest may stay as it is. It shows each habit that keeps a pipeline honest:

- Who sends a job is known by the signature, and a job that is sent twice is done once. The answer comes at once, the work afterwards.
- A picture goes home by its upload link. A film stays here, and Coffer fetches it from the URL that the last message names.
- Messages are signed with the job's own secret, and one that was not answered is sent again under the same id: it counts once.
- What goes wrong is said. Otherwise the job would hold its user's quota until it expires.
"""

import argparse
import io
import json
import logging
import os
import queue
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageOps
from standardwebhooks import Webhook, WebhookVerificationError

HEIGHT_PX = 512
FILM_SECONDS = 2
LARGEST_JOB_BYTES = 2**20
PATIENCE_SECONDS = 300
ANSWERS_TO_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}

Ticket = dict[str, Any]
"""What Coffer sends: `job_id`, `model`, `prompt`, `parameters`, `references` to read, `uploads` to fill, `webhook` to report to."""

log = logging.getLogger("gpu_worker")


def paint(prompt: str | None, references: list[Image.Image]) -> Image.Image:
    """Your image model. Here: the references side by side, or a plain colour made of the prompt."""
    if not references:
        return Image.new("RGB", (HEIGHT_PX, HEIGHT_PX), f"hsl({sum((prompt or '').encode()) % 360}, 60%, 50%)")
    scaled = [ImageOps.contain(each.convert("RGB"), (4 * HEIGHT_PX, HEIGHT_PX)) for each in references]
    canvas = Image.new("RGB", (sum(each.width for each in scaled), HEIGHT_PX))
    left = 0
    for each in scaled:
        canvas.paste(each, (left, (HEIGHT_PX - each.height) // 2))
        left += each.width
    return canvas


def film(picture: Path, target: Path) -> None:
    """Your video model. Here: the camera goes slowly into the picture."""
    frames = 25 * FILM_SECONDS
    zoom = f"zoompan=z='1+0.2*on/{frames}':d={frames}:s=640x360:fps=25,format=yuv420p"
    command: list[str | Path] = [
        os.environ.get("FFMPEG", "ffmpeg"),
        "-v",
        "error",
        "-y",
        "-i",
        picture,
        "-vf",
        zoom,
        "-movflags",
        "+faststart",
        target,
    ]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS)


class Worker:
    """Does one job after the other. `address` is where Coffer reaches this machine; films to be fetched lie in `outbox`."""

    def __init__(self, address: str, outbox: Path) -> None:
        self._address = address.rstrip("/")
        self._outbox = outbox
        self._http = httpx.Client(timeout=60)
        self._waiting: queue.Queue[Ticket] = queue.Queue()
        self._taken: set[str] = set()  # a machine that starts anew takes a job again: its outputs are stored once all the same

    def take(self, ticket: Ticket) -> None:
        """Remembers a job for later, once."""
        if ticket["job_id"] not in self._taken:
            self._taken.add(ticket["job_id"])
            self._waiting.put(ticket)

    def run(self) -> None:
        """Works, for ever."""
        while True:
            ticket = self._waiting.get()
            try:
                self._work(ticket)
                log.info("job %s: done", ticket["job_id"])
            except Exception as problem:  # noqa: BLE001 - whatever it was, its job is not to wait for its end
                log.warning("job %s: %s", ticket["job_id"], type(problem).__name__)
                with suppress(httpx.HTTPError):  # Coffer is away: the job expires
                    self._report(ticket, "job.failed", error=f"The pipeline failed: {type(problem).__name__}")

    def _work(self, ticket: Ticket) -> None:
        references: list[Image.Image] = [Image.open(io.BytesIO(self._asked("GET", each["url"]).content)) for each in ticket["references"]]
        self._report(ticket, "job.progress", progress_percent=10)
        picture = paint(ticket["prompt"], references)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "picture.png")
            picture.save(path)
            films = []
            for place in ticket["uploads"]:
                if place["type"] == "video":
                    name = f"{secrets.token_urlsafe(24)}.mp4"  # whoever knows it may read it
                    film(path, self._outbox / name)
                    films.append({"index": place["index"], "url": f"{self._address}/outbox/{name}"})
                else:
                    self._asked("PUT", place["url"], content=path.read_bytes(), done_by="link_used")
        self._report(ticket, "job.completed", outputs=films, progress_percent=100, credits_used=len(ticket["uploads"]))

    def _report(self, ticket: Ticket, kind: str, **data: Any) -> None:
        body = json.dumps({"type": kind, "data": {"job_id": ticket["job_id"], **data}})
        message_id, now = f"{ticket['job_id']}.{kind}", datetime.now(UTC)
        signature = Webhook(ticket["webhook"]["secret"]).sign(message_id, now, body)
        headers = {"webhook-id": message_id, "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature}
        self._asked("POST", ticket["webhook"]["url"], content=body.encode(), headers=headers)

    def _asked(
        self, method: str, url: str, *, content: bytes | None = None, headers: dict[str, str] | None = None, done_by: str = ""
    ) -> httpx.Response:
        """The answer, after as many tries as patience has. `done_by` is the problem that says that an earlier try was the one."""
        deadline, pause_seconds = time.monotonic() + PATIENCE_SECONDS, 1.0
        while True:
            try:
                answer = self._http.request(method, url, content=content, headers=headers)
            except httpx.TransportError:
                if time.monotonic() + pause_seconds > deadline:
                    raise
            else:
                if done_by and answer.status_code == 409 and answer.json().get("code") == done_by:
                    return answer
                if answer.status_code not in ANSWERS_TO_TRY_AGAIN or time.monotonic() + pause_seconds > deadline:
                    return answer.raise_for_status()
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes jobs from Coffer. PIPELINE_SECRET holds the pipeline's secret.")
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--address", required=True, help="where Coffer reaches this, e.g. https://gpu.example.com")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log the links, which are secrets
    pipeline = Webhook(os.environ["PIPELINE_SECRET"])
    with tempfile.TemporaryDirectory() as directory:
        outbox = Path(directory)
        worker = Worker(arguments.address, outbox)
        threading.Thread(target=worker.run, daemon=True).start()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", "0"))
                if self.path != "/run" or not 0 < length <= LARGEST_JOB_BYTES:
                    self.send_error(404 if self.path != "/run" else 413)
                    return
                try:
                    message = pipeline.verify(self.rfile.read(length), {name.lower(): value for name, value in self.headers.items()})
                except WebhookVerificationError:
                    self.send_error(401)
                    return
                worker.take(message["data"])
                self.send_response(202)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                path = outbox / self.path.rpartition("/")[2]
                if not self.path.startswith("/outbox/") or not path.is_file():
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("content-type", "video/mp4")
                self.send_header("content-length", str(path.stat().st_size))
                self.end_headers()
                with path.open("rb") as file:
                    shutil.copyfileobj(file, self.wfile)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - and not the names of films
                pass

        with ThreadingHTTPServer(("", arguments.port), Handler) as server:
            log.info("ready on port %d", server.server_port)
            server.serve_forever()


if __name__ == "__main__":
    main()
