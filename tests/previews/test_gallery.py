"""A page of a user's files is drawn from one list request: real pictures, films and sounds through the real worker, up to the pixels."""

from pathlib import Path
from typing import Any

import httpx
import pyvips

from tests.previews.conftest import RealWorkerFactory
from tests.previews.media import TEST_CARD, record
from tests.previews.pictures import difference, photo, reduced_in_full
from tests.previews.test_queue import states
from tests.serving import RunningServer
from tests.waiting import until


def upload(client: httpx.Client, content: bytes, name: str) -> str:
    answer = client.post("/api/files/upload", content=content, params={"name": name})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def fetched(browser: httpx.Client, preview: dict[str, Any]) -> Any:
    """The picture behind a preview's link, decoded; it must be as the list says."""
    answer = browser.get(preview["url"])
    assert (answer.status_code, answer.headers["content-type"], len(answer.content)) == (200, "image/webp", preview["size_bytes"])
    image = pyvips.Image.new_from_buffer(answer.content, "")
    assert image.get("vips-loader").startswith("webpload")
    assert (image.width, image.height) == (preview["width"], preview["height"])
    return image


def test_one_list_request_draws_a_page(server: RunningServer, start_real_worker: RealWorkerFactory, tmp_path: Path) -> None:
    start_real_worker()
    picture, drawing = photo(1600, 1200), photo(500, 300)
    film = record(tmp_path / "a.mp4", TEST_CARD, "-c:v", "libx264", "-pix_fmt", "yuv420p", sound="sine=d=2")
    sound = record(tmp_path / "a.mp3", "sine=f=440:r=44100:d=2")
    with server.client("ada", timeout=60) as ada, httpx.Client(base_url=server.url) as nobody:
        upload(ada, picture.jpegsave_buffer(Q=95), "photo.jpg")
        upload(ada, drawing.pngsave_buffer(), "drawing.png")
        upload(ada, film.read_bytes(), "film.mp4")
        upload(ada, sound.read_bytes(), "sound.mp3")
        until(lambda: states(server) == {"ready": 4})
        page = ada.get("/api/files", params={"links": 1}).json()["files"]
        files = {file["file_name"]: file for file in page}
        pictures = {
            (name, variant): fetched(nobody, preview)
            for name, file in files.items()
            for variant, preview in file["previews"].items()
            if preview["mime_type"] == "image/webp"
        }
    sizes = {what: (image.width, image.height) for what, image in pictures.items()}
    assert sizes == {
        ("photo.jpg", "320"): (320, 240),
        ("photo.jpg", "640"): (640, 480),
        ("photo.jpg", "1280"): (1280, 960),
        ("drawing.png", "320"): (320, 192),
        ("drawing.png", "640"): (500, 300),
        ("film.mp4", "320"): (320, 180),
        ("sound.mp3", "waveform"): sizes["sound.mp3", "waveform"],
    }
    for name in ("photo.jpg", "drawing.png", "film.mp4"):
        assert files[name]["thumbhash"] and files[name]["average_color"], name
    assert [files[name]["resolution"] for name in ("photo.jpg", "drawing.png", "film.mp4")] == ["1600x1200", "500x300", "320x180"]
    assert [files[name]["duration"] for name in ("film.mp4", "sound.mp3")] == ["00:00:02", "00:00:02"]
    for name, variant, original in (("photo.jpg", "320", picture), ("photo.jpg", "1280", picture), ("drawing.png", "640", drawing)):
        assert difference(pictures[name, variant], reduced_in_full(original, int(variant))) < 3
    # The test card's first bar at its left, at a third of its height.
    red, green, blue = (round(each) for each in pictures["film.mp4", "320"].getpoint(25, 72)[:3])
    assert (red > 200, green < 80, blue < 80) == (True, True, True)
