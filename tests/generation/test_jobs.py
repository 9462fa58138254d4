"""Jobs over HTTP: registered, followed, listed, cancelled."""

from typing import Any

import httpx
import pytest

from server.auth import Scope
from tests.generation.speaking import ask, code, status, usage
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

MISSING = "01890000-0000-7000-8000-000000000000"


def upload(client: httpx.Client, content: bytes) -> dict[str, Any]:
    answer = client.post("/api/files/upload", content=content)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def events(server: RunningServer, user_id: str) -> list[tuple[str, Any]]:
    rows = execute(server.database_url, "select type, payload ->> 'state' as state from events where user_id = $1 order by id", user_id)
    return [(row["type"], row["state"]) for row in rows if row["type"].startswith("job.")]


def test_a_job_holds_its_quota_and_tells_all_that_a_pipeline_needs(api: RunningServer) -> None:
    with api.client("ada") as ada, httpx.Client(base_url=api.url) as pipeline:
        reference = upload(ada, image(2_000))
        made = ask(
            ada,
            outputs=[{"type": "image", "max_bytes": 10_000, "file_name": "Ada.png"}, {"type": "video", "max_bytes": 20_000}],
            entity_type="character",
            entity_id="c 1",
            project_id="p",
            model="sdxl",
            prompt="a castle\nby night",
            parameters={"steps": 30},
            references=[reference["id"]],
        )
        assert usage(ada) == (2_000, 30_000)
        assert made["webhook"]["url"] == f"/api/generate/webhook?job={made['job_id']}" and made["webhook"]["secret"].startswith("whsec_")
        (readable,) = made["references"]
        assert (readable["file_id"], pipeline.get(readable["url"]).content) == (reference["id"], image(2_000))
        picture, film = made["uploads"]
        assert (picture["index"], picture["type"], picture["max_bytes"]) == (0, "image", 10_000)
        job = status(ada, made["job_id"])
        assert job == made["job"]
        assert (job["state"], job["progress_percent"], job["prompt"], job["parameters"]) == (
            "queued",
            0,
            "a castle\nby night",
            {"steps": 30},
        )
        assert [(each["index"], each["state"]) for each in job["outputs"]] == [(0, "awaited"), (1, "awaited")]

        stored = pipeline.put(picture["url"], content=image(3_000))
        assert (stored.status_code, stored.json()["id"], stored.json()["file_name"]) == (201, picture["file_id"], "Ada.png")
        assert usage(ada) == (5_000, 20_000)
        job = status(ada, made["job_id"])
        assert (job["state"], job["progress_percent"], job["finished_at"]) == ("running", 50, None)
        assert pipeline.put(film["url"], content=video(4_000)).status_code == 201
        job = status(ada, made["job_id"])
        assert (job["state"], job["progress_percent"], job["error"]) == ("completed", 100, None)
        assert job["finished_at"] is not None and job["processing_seconds"] >= 0
        assert usage(ada) == (9_000, 0)
    assert events(api, "ada") == [("job.completed", "completed")]


def test_outputs_come_by_tus_too(api: RunningServer) -> None:
    content = image(9_000)
    with api.client("tina") as tina, httpx.Client(base_url=api.url) as pipeline:
        made = ask(tina)
        place = made["uploads"][0]
        link = {"Tus-Resumable": "1.0.0", "Upload-Link": place["url"]}
        created = pipeline.post(place["tus_url"], headers={**link, "Upload-Length": str(len(content))})
        assert created.status_code == 201, created.text
        piece = {**link, "Content-Type": "application/offset+octet-stream"}
        pipeline.patch(created.headers["location"], content=content[:5_000], headers={**piece, "Upload-Offset": "0"})
        assert status(tina, made["job_id"])["state"] == "queued"
        pipeline.patch(created.headers["location"], content=content[5_000:], headers={**piece, "Upload-Offset": "5000"})
        assert status(tina, made["job_id"])["state"] == "completed"
        assert usage(tina) == (9_000, 0)


def test_what_does_not_fit_reserves_nothing(api: RunningServer) -> None:
    with api.client("fay") as fay:
        api.set_quota("fay", 25_000)
        refused = fay.post("/api/generate", json={"outputs": [{"max_bytes": 10_000}] * 3})
        assert (code(refused), refused.json()["needed_bytes"]) == ((413, "quota_exceeded"), 30_000)
        assert (usage(fay), fay.get("/api/generate").json()["jobs"]) == ((0, 0), [])
        ask(fay, outputs=[{"max_bytes": 10_000}] * 2)
        assert usage(fay) == (0, 20_000)


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"outputs": []}, "outputs"),
        ({"outputs": [{"type": "image"}]}, "outputs"),
        ({"outputs": [{"max_bytes": 0}]}, "outputs"),
        ({"entity_type": "character"}, "entity_id"),
        ({"entity_type": "Big Character", "entity_id": "x"}, "entity_type"),
        ({"pipeline": "nobody"}, "pipeline"),
        ({"references": [MISSING]}, "references"),
        ({"parent_id": MISSING}, "parent_id"),
        ({"ttl_seconds": 10**9}, "ttl_seconds"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"colour": "red"}, "body"),
    ],
)
def test_what_cannot_be_is_refused_by_name(api: RunningServer, wish: dict[str, Any], field: str) -> None:
    with api.client("gus") as gus:
        refused = gus.post("/api/generate", json={"outputs": [{"max_bytes": 10}]} | wish)
        assert (code(refused), refused.json()["field"]) == ((400, "invalid_request"), field)
        assert usage(gus) == (0, 0)


def test_others_see_nothing_of_a_job(api: RunningServer) -> None:
    with api.client("hal") as hal, api.client("eve") as eve:
        made = ask(hal, prompt="mine")
        private = upload(hal, image())
        for answer in (
            eve.get(f"/api/generate/status/{made['job_id']}"),
            eve.get(f"/api/generate/events/{made['job_id']}"),
            eve.post(f"/api/generate/{made['job_id']}/cancel"),
        ):
            assert code(answer) == (404, "not_found")
        assert eve.get("/api/generate").json() == {"jobs": [], "next_cursor": None}
        stolen = eve.post("/api/generate", json={"outputs": [{"max_bytes": 10}], "references": [private["id"]]})
        assert stolen.json()["reason"].endswith("is no file of the user's")
        assert status(hal, made["job_id"])["state"] == "queued"


def test_scopes_and_kinds(api: RunningServer) -> None:
    reader = api.new_key(Scope.FILES_READ)
    with api.client("ivy") as ivy, api.client("ivy", api_key=reader) as watcher:
        made = ask(ivy, outputs=[{"type": "video", "max_bytes": 10}])
        assert watcher.get(f"/api/generate/status/{made['job_id']}").status_code == 200
        assert code(watcher.post("/api/generate", json={"outputs": [{"max_bytes": 10}]})) == (403, "forbidden")
        assert code(watcher.post(f"/api/generate/{made['job_id']}/cancel")) == (403, "forbidden")
        execute(api.database_url, "update api_keys set kinds = '{image}' where key_id = $1", reader.split("_")[1])
        until(lambda: watcher.get(f"/api/generate/status/{made['job_id']}").status_code == 404)
        assert watcher.get("/api/generate").json()["jobs"] == []


def test_a_repeated_request_makes_one_job(api: RunningServer) -> None:
    with api.client("jon") as jon:
        wish = {"outputs": [{"max_bytes": 10_000}]}
        first = jon.post("/api/generate", json=wish, headers={"Idempotency-Key": "k"})
        again = jon.post("/api/generate", json=wish, headers={"Idempotency-Key": "k"})
        assert first.json() == again.json() and usage(jon) == (0, 10_000)
        assert jon.post("/api/generate", json=wish, headers={"Idempotency-Key": "l"}).json()["job_id"] != first.json()["job_id"]


def test_pages_of_jobs_hold_each_once_and_filters_combine(api: RunningServer) -> None:
    with api.client("kim") as kim:
        made = [ask(kim, entity_type="character", entity_id=str(number % 2), project_id="p")["job_id"] for number in range(7)]
        kim.post(f"/api/generate/{made[0]}/cancel")
        found: list[str] = []
        cursor = None
        while True:
            page = kim.get("/api/generate", params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
            found += [job["id"] for job in page["jobs"]]
            if (cursor := page["next_cursor"]) is None:
                break
        assert found == made[::-1]

        def ids(**filters: str) -> list[str]:
            return [job["id"] for job in kim.get("/api/generate", params=filters).json()["jobs"]]

        assert ids(entity_type="character", entity_id="0") == [made[6], made[4], made[2], made[0]]
        assert ids(state="cancelled") == [made[0]]
        assert ids(state="queued", entity_type="character", entity_id="0", project_id="p") == [made[6], made[4], made[2]]
        assert ids(project_id="other") == []
        for wrong, field in (
            ({"state": "odd"}, "state"),
            ({"entity_id": "1"}, "entity_id"),
            ({"cursor": "x"}, "cursor"),
            ({"a": "b"}, "a"),
        ):
            refused = kim.get("/api/generate", params=wrong)
            assert (code(refused), refused.json()["field"]) == ((400, "invalid_request"), field)


def test_a_cancelled_job_gives_its_quota_back_and_takes_nothing_more(api: RunningServer) -> None:
    with api.client("lea") as lea, httpx.Client(base_url=api.url) as pipeline:
        made = ask(lea, outputs=[{"max_bytes": 10_000}] * 2)
        pipeline.put(made["uploads"][0]["url"], content=image(4_000)).raise_for_status()
        cancelled = lea.post(f"/api/generate/{made['job_id']}/cancel").json()
        assert cancelled["state"] == "cancelled"
        assert [(each["state"], each["reason"]) for each in cancelled["outputs"]] == [("stored", None), ("failed", "cancelled")]
        assert usage(lea) == (4_000, 0)
        assert pipeline.put(made["uploads"][1]["url"], content=image(4_000)).status_code == 403
        assert lea.post(f"/api/generate/{made['job_id']}/cancel").json() == cancelled
        assert usage(lea) == (4_000, 0)
    assert events(api, "lea") == [("job.cancelled", "cancelled")]


@pytest.mark.parametrize("size", [5_000, 2_000_000])
def test_an_upload_under_way_when_its_job_is_cancelled_stores_nothing(api: RunningServer, size: int) -> None:
    content = image(size)
    with api.client(f"mia{size}") as mia, httpx.Client(base_url=api.url) as pipeline:
        made = ask(mia, outputs=[{"max_bytes": size}])

        def body() -> Any:
            yield content[: size // 2]
            claimed = "select claimed_until is not null as yes from uploads where id = $1"
            until(lambda: execute(api.database_url, claimed, made["uploads"][0]["file_id"])[0]["yes"])
            assert mia.post(f"/api/generate/{made['job_id']}/cancel").json()["state"] == "cancelled"
            yield content[size // 2 :]

        assert pipeline.put(made["uploads"][0]["url"], content=body()).status_code in {403, 409}
        assert usage(mia) == (0, 0) and mia.get("/api/files").json()["files"] == []
    assert api.incoming() == []


def test_a_job_that_nobody_works_on_expires(start_server: ServerFactory) -> None:
    server = start_server()
    with server.client("ned") as ned, httpx.Client(base_url=server.url) as pipeline:
        both, none = (ask(ned, outputs=[{"max_bytes": 10_000}] * 2, ttl_seconds=600) for _ in range(2))
        pipeline.put(both["uploads"][0]["url"], content=image(4_000)).raise_for_status()
        execute(server.database_url, "update uploads set expires_at = now() - interval '1 second' where job_id is not null")
        until(lambda: status(ned, none["job_id"])["state"] == "expired")
        until(lambda: status(ned, both["job_id"])["state"] == "partly_completed")
        assert {each["reason"] for each in status(ned, none["job_id"])["outputs"]} == {"expired"}
        assert usage(ned) == (4_000, 0)
    assert sorted(events(server, "ned")) == [("job.completed", "partly_completed"), ("job.failed", "expired")]


def test_waiting_for_the_end(api: RunningServer) -> None:
    with api.client("oda") as oda, httpx.Client(base_url=api.url) as pipeline:
        made = ask(oda)
        with oda.stream("GET", f"/api/generate/events/{made['job_id']}", timeout=30) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            assert '"state":"queued"' in next(lines)
            pipeline.put(made["uploads"][0]["url"], content=image(4_000)).raise_for_status()
            assert '"state":"completed"' in next(lines)
            assert list(lines) == []
        assert oda.get(f"/api/generate/status/{made['job_id']}?wait=end").json()["state"] == "completed"


def test_erasing_a_user_takes_jobs_and_memories_along(api: RunningServer) -> None:
    with api.client("pia") as pia, api.client() as admin, httpx.Client(base_url=api.url) as pipeline:
        made = ask(pia, outputs=[{"max_bytes": 10_000}] * 2, prompt="secret")
        pipeline.put(made["uploads"][0]["url"], content=image(4_000)).raise_for_status()
        admin.delete("/api/users/pia").raise_for_status()
    for table in ("generation_jobs", "generated_media", "events", "uploads"):
        assert execute(api.database_url, f"select 1 from {table} where user_id = 'pia'") == []
    assert execute(api.database_url, "select 1 from generation_outputs where job_id = $1", made["job_id"]) == []
