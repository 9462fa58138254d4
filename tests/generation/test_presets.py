"""The presets over HTTP."""

from collections.abc import Iterator

import httpx
import msgspec
import pytest

from tests.generation.speaking import code, usage
from tests.samples import image
from tests.serving import RunningServer, ServerFactory


@pytest.fixture
def app(start_server: ServerFactory) -> Iterator[httpx.Client]:
    pipelines = [{"name": "films", "presets": ["animation"]}, {"name": "pictures", "presets": ["character", "moodboard"]}]
    server: RunningServer = start_server(COFFER_PIPELINES=msgspec.json.encode(pipelines).decode())
    with server.client("ada") as client:
        yield client


def test_each_is_a_job(app: httpx.Client) -> None:
    reference = app.post("/api/files/upload", content=image()).json()["id"]
    used = len(image())
    wish = {"entity_id": "c1", "name": "Mira", "clothing": "red coat", "count": 2, "max_bytes": 1_000}
    made = app.post("/api/generate/character", json=wish)
    assert made.status_code == 201, made.text
    job = made.json()["job"]
    assert (job["entity_type"], job["entity_id"], job["pipeline"], len(job["outputs"])) == ("character", "c1", "pictures", 2)
    assert job["prompt"].startswith("Character portrait of Mira. Clothing: red coat.")
    assert usage(app) == (used, 2_000)

    board = {
        "entity_id": "m1",
        "characters": ["Mira", "Tom"],
        "scene": "a pier",
        "references": [reference],
        "max_bytes": 1,
        "pipeline": "films",
    }
    job = app.post("/api/generate/moodboard", json=board).json()["job"]
    assert (job["entity_type"], job["pipeline"], job["references"]) == ("moodboard", "films", [reference])
    assert job["prompt"].startswith("Scene with Mira and Tom. Setting: a pier.")

    film = {"entity_id": "a1", "image_id": reference, "motion": "she waves", "duration_seconds": 5, "prompt": "my own"}
    made = app.post("/api/generate/animation", json=film)
    job = made.json()["job"]
    assert (job["entity_type"], job["pipeline"], job["prompt"], job["parameters"]) == (
        "animation",
        "films",
        "my own",
        {"duration_seconds": 5},
    )
    assert [reference["file_id"] for reference in made.json()["references"]] == [reference]
    assert [output["type"] for output in job["outputs"]] == ["video"]
    assert made.json()["uploads"][0]["max_bytes"] == 6 * 2**20  # no more than a file may have


def test_what_is_missing_is_named(app: httpx.Client) -> None:
    for path, wish, field in (
        ("character", {}, "body"),
        ("character", {"entity_id": "1", "count": 17}, "count"),
        ("moodboard", {"entity_id": "1", "name": "x"}, "body"),
        ("animation", {"entity_id": "1"}, "body"),
        ("animation", {"entity_id": "1", "image_id": "01890000-0000-7000-8000-000000000000"}, "references"),
    ):
        refused = app.post(f"/api/generate/{path}", json=wish)
        assert (code(refused), refused.json()["field"]) == ((400, "invalid_request"), field)
