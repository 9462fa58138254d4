"""The whole way, with nothing of Coffer faked: an app, a server, a worker, and the pipeline of ops/examples."""

import io
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import msgspec
from PIL import Image
from standardwebhooks import Webhook

from coffer.client import Callback, Client, OutputWish
from tests.edge.nginx import free_port
from tests.fetching.peer import Peer, always, in_thread
from tests.generation.speaking import NEW_SECRET, status, usage
from tests.serving import ServerFactory
from tests.waiting import until
from tests.working import working

EXAMPLE = Path(__file__).parents[2] / "ops" / "examples" / "gpu_worker.py"
CALLBACK_SECRET = "whsec_" + b64encode(b"what the app keeps to itself....").decode()


def picture(color: str) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (400, 300), color).save(made, "PNG")
    return made.getvalue()


@contextmanager
def example(port: int, log: Path) -> Iterator[None]:
    """The example, as somebody else would run it: it knows nothing of Coffer but the secret."""
    environment = {"PATH": os.environ["PATH"], "PIPELINE_SECRET": NEW_SECRET, "FFMPEG": imageio_ffmpeg.get_ffmpeg_exe()}
    command = [sys.executable, str(EXAMPLE), "--port", str(port), "--address", f"http://127.0.0.1:{port}"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        until(lambda: b"ready" in log.read_bytes())
        yield
    finally:
        process.kill()
        process.wait()


def test_from_two_references_to_a_gallery(start_server: ServerFactory, tmp_path: Path) -> None:
    port = free_port()
    pipelines = [{"name": "gpu", "adapter": "dispatch", "url": f"http://127.0.0.1:{port}/run", "secrets": [NEW_SECRET]}]
    settings: dict[str, Any] = {"COFFER_PIPELINES": msgspec.json.encode(pipelines).decode(), "COFFER_FETCH_PRIVATE_NETWORKS": "127.0.0.0/8"}
    server = start_server(**settings)
    with (
        in_thread(Peer(always(204), "127.0.0.2")) as app,
        in_thread(Peer(always(204), "127.0.0.2")) as callback,
        example(port, tmp_path / "example.log"),
        server.client() as admin,
        server.client("ada", timeout=30) as ada,
        Client(server.url, api_key=server.api_key, user_id="ada") as coffer,
    ):
        endpoint = admin.post("/api/webhooks", json={"url": app.url}).json()
        references = [coffer.upload(picture(color), name=f"{color}.png") for color in ("navy", "orange")]
        with working(server, tmp_path / "worker.log", COFFER_PUBLIC_URL=server.url, **settings) as worker:
            made = coffer.generate(
                [OutputWish(max_bytes=3_000_000), OutputWish(type="video", max_bytes=3_000_000, file_name="Mira.mp4")],
                pipeline="gpu",
                entity=("character", "mira"),
                prompt="Mira on a pier",
                references=[each.id for each in references],
                callback=Callback(callback.url, CALLBACK_SECRET),
            )
            coffer.wait_for_job(made.job_id, seconds=120)
            job_id = str(made.job_id)
            job = status(ada, job_id)
            assert (job["state"], job["progress_percent"], job["credits_used"]) == ("completed", 100, 2), (
                tmp_path / "example.log"
            ).read_text()
            image_id, film_id = (each["file_id"] for each in job["outputs"])

            # The app hears of both files, of all previews and of the job, each signed; and of the job by its callback.
            def heard() -> list[dict[str, Any]]:
                return [Webhook(endpoint["secret"]).verify(each.body, each.headers) for each in list(app.asked)]

            everything = [*(str(each.id) for each in references), image_id, film_id]
            expected = {(kind, file_id) for kind in ("file.created", "preview.ready") for file_id in everything} | {("job.completed", None)}
            until(lambda: {(each["type"], each["data"]["file_id"]) for each in heard()} >= expected, timeout_seconds=120)
            until(lambda: status(ada, job_id)["callback_state"] == "told")
            (called,) = callback.asked
            event = Webhook(CALLBACK_SECRET).verify(called.body, called.headers)
            assert (event["type"], event["data"]["file_ids"]) == ("job.completed", [image_id, film_id])
            assert not any(secret in str(heard()) + called.body.decode() for secret in ("whsec_", "Mira on a pier", "/u/", "/f/"))
            worker.stop()

        gallery = {each["id"]: each for each in ada.get("/api/files", params={"links": "1"}).json()["files"]}
        assert gallery.keys() == set(everything)
        assert (gallery[image_id]["mime_type"], gallery[film_id]["mime_type"]) == ("image/png", "video/mp4")
        assert gallery[film_id]["duration_seconds"] == 2 and gallery[film_id]["file_name"] == "Mira.mp4"
        for each in gallery.values():
            shown = ada.get(each["previews"]["320"]["url"])
            assert (shown.status_code, shown.headers["content-type"]) == (200, "image/webp")
        # Both references stand side by side: the example has read them.
        assert gallery[image_id]["width"] > gallery[image_id]["height"] == 512
        media = ada.get("/api/media", params={"entity_type": "character", "entity_id": "mira"}).json()["media"]
        assert {each["id"] for each in media} == {image_id, film_id}
        assert [each["original_url"] is not None for each in media if each["id"] == film_id] == [True]
        sizes = sum(each["file_size"] for each in gallery.values())
        stored = server.stored_paths()
        assert usage(ada) == (sizes, 0) and sum(path.stat().st_size for path in stored) == sizes and len(stored) == 4
