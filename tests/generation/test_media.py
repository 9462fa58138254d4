"""The memory of making: what is kept of each output, found again, and forgotten with its file."""

from typing import Any

import httpx
import pytest

from server.auth import Scope
from tests.access.test_key_restrictions import client as client_of_key
from tests.generation.speaking import ask, code, inline, tell
from tests.samples import image, video
from tests.serving import RunningServer, execute
from tests.waiting import until

MISSING = "01890000-0000-7000-8000-000000000000"


@pytest.fixture
def pipeline(api: RunningServer) -> Any:
    with httpx.Client(base_url=api.url) as client:
        yield client


def made(app: httpx.Client, pipeline: httpx.Client, content: bytes | None = None, **wish: Any) -> str:
    """The id of a new piece of media."""
    job = ask(app, **wish)
    tell(pipeline, job, "job.completed", outputs=[inline(content or image(100))]).raise_for_status()
    file_id: str = job["uploads"][0]["file_id"]
    return file_id


def found(app: httpx.Client, **filters: Any) -> list[str]:
    answer = app.get("/api/media", params=filters)
    assert answer.status_code == 200, answer.text
    return [media["id"] for media in answer.json()["media"]]


def character(number: int) -> dict[str, Any]:
    return {"entity_type": "character", "entity_id": str(number)}


def test_how_it_was_made_is_remembered(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("ada") as ada:
        reference = ada.post("/api/files/upload", content=image()).json()["id"]
        job = ask(ada, **character(7), project_id="p", model="sdxl", prompt="A castle", parameters={"steps": 3}, references=[reference])
        tell(pipeline, job, "job.completed", outputs=[inline(image(100))], credits_used="0.25").raise_for_status()
        file_id = job["uploads"][0]["file_id"]
        media = ada.get(f"/api/media/{file_id}").json()
        assert media.pop("created_at") is not None
        assert media == {
            "id": file_id,
            "file_id": file_id,
            "job_id": job["job_id"],
            "output_index": 0,
            "entity_type": "character",
            "entity_id": "7",
            "project_id": "p",
            "media_type": "image",
            "source_type": "generated",
            "model_used": "sdxl",
            "prompt_used": "A castle",
            "generation_params": {"steps": 3},
            "credits_used": 0.25,
            "original_url": None,
            "is_accessible": True,
            "last_checked_at": None,
            "reference_ids": [reference],
            "parent_id": None,
            "root_id": file_id,
            "is_primary": False,
            "marks": [],
            "marking": None,
            "marking_reason": None,
        }
        ada.delete(f"/api/files/{file_id}").raise_for_status()
        assert code(ada.get(f"/api/media/{file_id}")) == (404, "not_found")
    assert execute(api.database_url, "select 1 from generated_media where id = $1", file_id) == []


def test_finding_it_again(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("bea") as bea:
        castle = made(bea, pipeline, **character(1), model="sdxl", prompt="A Castle by night, blue")
        film = made(bea, pipeline, video(100), outputs=[{"type": "video", "max_bytes": 100}], **character(1), model="wan", prompt="castle")
        forest = made(bea, pipeline, **character(2), project_id="p", model="sdxl", prompt="forest by day")
        plain = made(bea, pipeline)
        assert found(bea) == [plain, forest, film, castle]
        assert found(bea, **character(1)) == [film, castle]
        assert found(bea, **character(1), type="image", limit=1) == [castle]  # the latest image of a character
        assert found(bea, entity_type="character") == [forest, film, castle]
        assert found(bea, model="sdxl") == [forest, castle]
        assert found(bea, model="sdxl", project_id="p") == [forest]
        assert found(bea, prompt="night castle") == [castle]
        assert found(bea, prompt="CASTLE") == [film, castle]
        assert found(bea, prompt="castl") == [] and found(bea, prompt="castle day") == []
        assert found(bea, prompt="'; drop table & | ! :*") == []
        assert found(bea, source="uploaded") == [] and found(bea, source="generated", prompt="forest") == [forest]
        wrong: tuple[dict[str, str], ...] = ({"entity_id": "1"}, {"type": "odd"}, {"source": "odd"}, {"primary": "odd"}, {"cursor": "odd"})
        for filters in wrong:
            refused = bea.get("/api/media", params=filters)
            assert (code(refused), refused.json()["field"]) == ((400, "invalid_request"), next(iter(filters)))


def test_pages_hold_each_once(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("cai") as cai:
        ids = [made(cai, pipeline, **character(number % 2), prompt=f"word{number % 3}") for number in range(9)]
        pages: tuple[tuple[dict[str, Any], list[str]], ...] = (({}, ids), (character(0), ids[::2]), ({"prompt": "word0"}, ids[::3]))
        for filters, wanted in pages:
            collected: list[str] = []
            cursor = None
            while True:
                page = cai.get("/api/media", params={"limit": 2, **filters} | ({"cursor": cursor} if cursor else {})).json()
                collected += [media["id"] for media in page["media"]]
                if (cursor := page["next_cursor"]) is None:
                    break
            assert collected == wanted[::-1]


def test_it_is_the_owners_alone(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("dan") as dan, api.client("eve") as eve:
        media_id = made(dan, pipeline, prompt="very private", **character(1))
        for answer in (
            eve.get(f"/api/media/{media_id}"),
            eve.get(f"/api/media/{media_id}/lineage"),
            eve.put(f"/api/media/{media_id}/primary", json={"is_primary": True}),
        ):
            assert code(answer) == (404, "not_found")
        assert found(eve, prompt="private") == []
        refused = eve.post("/api/generate", json={"outputs": [{"max_bytes": 10}], "parent_id": media_id})
        assert refused.json()["field"] == "parent_id"
        reader = api.new_key(Scope.FILES_READ)
        execute(api.database_url, "update api_keys set kinds = '{video}' where key_id = $1", reader.split("_")[1])
        with api.client("dan", api_key=reader) as restricted:
            assert (found(restricted), restricted.get(f"/api/media/{media_id}").status_code) == ([], 404)
    assert "very private" not in api.logged()
    for table in ("events", "audit_log"):
        assert not any("very private" in str(row) for row in execute(api.database_url, f"select * from {table}"))


def test_regenerations_keep_their_line(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("fay") as fay:
        first = made(fay, pipeline)
        second = made(fay, pipeline, parent_id=first)
        third = made(fay, pipeline, parent_id=second)
        aside = made(fay, pipeline, parent_id=first)
        other = made(fay, pipeline)

        def lineage(media_id: str) -> tuple[list[str], list[str]]:
            answer = fay.get(f"/api/media/{media_id}/lineage").json()
            return [each["id"] for each in answer["parents"]], [each["id"] for each in answer["variants"]]

        assert lineage(third) == ([second, first], [aside, second, first])
        assert lineage(first) == ([], [aside, third, second])
        assert lineage(other) == ([], [])
        fay.delete(f"/api/files/{second}").raise_for_status()
        assert lineage(third) == ([], [aside, first])


def test_an_entity_has_one_primary(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("gil") as gil:
        one, two = (made(gil, pipeline, **character(1)) for _ in range(2))
        other, plain = made(gil, pipeline, **character(2)), made(gil, pipeline)

        def set_primary(media_id: str, *, is_primary: bool = True) -> httpx.Response:
            return gil.put(f"/api/media/{media_id}/primary", json={"is_primary": is_primary})

        assert set_primary(one).json()["is_primary"] and set_primary(other).json()["is_primary"]
        assert found(gil, primary="true") == [other, one]
        for _ in range(2):
            assert set_primary(two).json()["is_primary"]
            assert found(gil, **character(1), primary="true") == [two] and found(gil, **character(1), primary="false") == [one]
        assert not set_primary(two, is_primary=False).json()["is_primary"]
        assert found(gil, primary="true") == [other]
        assert set_primary(plain).json()["field"] == "is_primary"
        assert code(set_primary(MISSING)) == (404, "not_found")


def test_links_come_along(api: RunningServer, pipeline: httpx.Client) -> None:
    reader = api.new_key(Scope.FILES_READ)
    with api.client("hal") as hal, api.client("hal", api_key=reader) as without:
        made(hal, pipeline)
        (media,) = hal.get("/api/media", params={"links": "1"}).json()["media"]
        assert pipeline.get(media["link"]["url"]).content == image(100)
        assert "link" not in hal.get("/api/media").json()["media"][0]
        until(lambda: without.get("/api/media", params={"links": "1"}).status_code == 403)


def test_an_upload_is_media_of_an_entity_when_its_user_says_so(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("uma") as uma, api.client("eve") as eve:
        generated = made(uma, pipeline, **character(1))
        uploaded = uma.post("/api/files/upload", content=image(100, 7)).json()["id"]
        answer = uma.post("/api/media", json={"file_id": uploaded, **character(1), "project_id": "p"})
        assert (answer.status_code, answer.json()["source_type"], answer.json()["media_type"]) == (201, "uploaded", "image")
        media = uma.get(f"/api/media/{uploaded}").json()
        assert media == answer.json() and (media["id"], media["file_id"], media["root_id"]) == (uploaded, uploaded, uploaded)
        assert (media["model_used"], media["prompt_used"], media["job_id"], media["is_primary"]) == (None, None, None, False)
        assert found(uma, **character(1)) == [uploaded, generated] and found(uma, source="uploaded") == [uploaded]
        made_anew = made(uma, pipeline, parent_id=uploaded)
        assert [each["id"] for each in uma.get(f"/api/media/{made_anew}/lineage").json()["parents"]] == [uploaded]
        uma.put(f"/api/media/{uploaded}/primary", json={"is_primary": True}).raise_for_status()
        for where, primary in ((character(1), True), (character(2), False), ({}, False)):
            again = uma.post("/api/media", json={"file_id": uploaded, **where}).json()
            assert (again["is_primary"], again["entity_id"], again["project_id"]) == (primary, where.get("entity_id"), None)
        assert found(uma, **character(1)) == [generated] and found(uma, **character(2)) == []
        for file_id, expected in ((generated, (400, "invalid_request")), (MISSING, (404, "not_found"))):
            assert code(uma.post("/api/media", json={"file_id": file_id, **character(1)})) == expected
        assert code(eve.post("/api/media", json={"file_id": uploaded})) == (404, "not_found")
        with client_of_key(api, "uma", kinds=["video"]) as films:
            assert code(films.post("/api/media", json={"file_id": uploaded})) == (404, "not_found")
        for body in ({"file_id": uploaded, "entity_type": "character"}, {}, {"file_id": uploaded, "prompt": "x"}):
            assert code(uma.post("/api/media", json=body)) == (400, "invalid_request")
        uma.delete(f"/api/files/{uploaded}").raise_for_status()
        assert code(uma.get(f"/api/media/{uploaded}")) == (404, "not_found")
    assert execute(api.database_url, "select 1 from generated_media where id = $1", uploaded) == []


def test_what_was_generated_and_then_replaced_says_so(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("rex") as rex:
        generated = made(rex, pipeline, **character(1), prompt="a pier")
        uploaded = rex.post("/api/files/upload", content=image(100, 7)).json()["id"]
        rex.post("/api/media", json={"file_id": uploaded, **character(1)}).raise_for_status()
        for file_id, source in ((generated, "replaced"), (uploaded, "uploaded")):
            rex.put(f"/api/files/{file_id}/content", content=image(200, 8)).raise_for_status()
            assert rex.get(f"/api/media/{file_id}").json()["source_type"] == source
        assert rex.get(f"/api/media/{generated}").json()["prompt_used"] == "a pier"
        assert found(rex, source="replaced", **character(1)) == [generated]
