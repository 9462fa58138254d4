"""What pipelines say: signatures, replays, outputs in base64 and by URL, reports."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.generation.speaking import NEW_SECRET, OLD_SECRET, ask, code, inline, message, signed, status, tell, usage
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

WEBHOOK = "/api/generate/webhook"


@pytest.fixture
def pipeline(api: RunningServer) -> Any:
    with httpx.Client(base_url=api.url) as client:
        yield client


def test_an_output_in_base64_is_stored_and_remembered(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("ada") as ada:
        job = ask(ada)
        answer = tell(pipeline, job, "job.completed", outputs=[inline(image(5_000))], credits_used=1.5)
        assert answer.status_code == 200, answer.text
        file_id = job["uploads"][0]["file_id"]
        stored = {"index": 0, "state": "stored", "file_id": file_id, "code": None}
        assert answer.json() == {"status": "accepted", "outputs": [stored]}
        assert ada.get(f"/api/files/{file_id}/download").content == image(5_000)
        found = status(ada, job["job_id"])
        assert (found["state"], found["credits_used"]) == ("completed", 1.5)
        assert usage(ada) == (5_000, 0)
        assert ada.get(f"/api/media/{file_id}").json()["credits_used"] == 1.5
    actor = execute(api.database_url, "select actor_kind, actor_id from audit_log where file_id = $1 and action = 'file.created'", file_id)
    assert [tuple(row) for row in actor] == [("pipeline", job["job_id"])]


def test_fifty_duplicates_at_once_store_one_file(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("bea") as bea:
        job = ask(bea, outputs=[{"max_bytes": 100_000}])
        for message_id in ("msg_same", None):  # as one message, and as many
            with ThreadPoolExecutor(50) as pool:
                send = lambda _: tell(pipeline, job, "job.progress", message_id=message_id, outputs=[inline(image(50_000))])  # noqa: B023, E731
                answers = list(pool.map(send, range(50)))
            assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
            assert {answer.json()["status"] for answer in answers} <= {"accepted", "repeated", "late"}
        assert usage(bea) == (50_000, 0)
        assert len(bea.get("/api/files").json()["files"]) == 1
        assert status(bea, job["job_id"])["state"] == "completed"
    assert len(execute(api.database_url, "select 1 from generated_media where job_id = $1", job["job_id"])) == 1
    assert len(execute(api.database_url, "select 1 from events where user_id = 'bea' and type = 'job.completed'")) == 1


def test_a_duplicate_is_not_taken_for_stored_while_the_first_may_fail(start_server: ServerFactory) -> None:
    server = start_server(COFFER_IDEMPOTENCY_WAIT_SECONDS="0")
    with server.client("bob") as bob, httpx.Client(base_url=server.url) as pipeline:
        job = ask(bob)
        place = job["uploads"][0]

        def told() -> httpx.Response:
            return tell(pipeline, job, "job.completed", message_id="msg_1", outputs=[inline(image(5_000))])

        with socket.create_connection((server.host, server.port)) as broken:
            broken.sendall(f"PUT {place['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n".encode() + image(1_000))
            claimed = "select claimed_until is not null as yes from uploads where id = $1"
            until(lambda: execute(server.database_url, claimed, place["file_id"])[0]["yes"])
            assert code(told()) == (409, "idempotency_in_progress")
        until(lambda: told().status_code == 200)
        assert bob.get(f"/api/files/{place['file_id']}/download").content == image(5_000)
        assert (status(bob, job["job_id"])["state"], usage(bob)) == ("completed", (5_000, 0))


def test_what_is_not_signed_right_is_refused_and_does_nothing(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("cai") as cai:
        job, other = ask(cai), ask(cai)
        secret, url = job["webhook"]["secret"], job["webhook"]["url"]
        body = message("job.completed", job["job_id"], outputs=[inline(image())])
        good = signed(secret, body)
        now = time.time()
        wrong: list[tuple[str, bytes, dict[str, str]]] = [
            (url, body.replace(b"job.completed", b"job.failed"), good),
            (url, body + b" ", good),
            (url, b"\xff" + body, good),
            (url, body, {**good, "webhook-id": "msg_other"}),
            (url, body, {**good, "webhook-timestamp": str(int(now) + 1)}),
            (url, body, {**good, "webhook-signature": "v1,AAAA"}),
            (url, body, {**good, "webhook-signature": "nonsense"}),
            (url, body, {**good, "webhook-signature": good["webhook-signature"].replace("v1,", "v2,")}),
            (url, body, signed(secret, body, at=now - 301)),
            (url, body, signed(secret, body, at=now + 320)),
            (url, body, signed(other["webhook"]["secret"], body)),
            (url, body, signed(NEW_SECRET, body)),
            (other["webhook"]["url"], body, good),
            (f"{WEBHOOK}?pipeline=painter", body, good),
            (f"{WEBHOOK}?pipeline=quiet", body, good),
            (f"{WEBHOOK}?pipeline=nobody", body, good),
            *((url, body, {name: value for name, value in good.items() if name != left_out}) for left_out in good),
        ]
        for where, content, headers in wrong:
            assert code(pipeline.post(where, content=content, headers=headers)) == (401, "unauthenticated"), headers
        repeated = pipeline.post(url, content=body, headers=[*good.items(), ("webhook-id", "msg_other")])
        assert code(repeated) == (401, "unauthenticated")
        assert status(cai, job["job_id"])["state"] == "queued" and usage(cai) == (0, 20_000)
        assert pipeline.post(url, content=body, headers=good).json()["status"] == "accepted"


@pytest.mark.parametrize("prefix", ["webhook", "svix", "Svix"])
def test_a_pipeline_of_the_settings_signs_with_any_of_its_secrets(api: RunningServer, pipeline: httpx.Client, prefix: str) -> None:
    with api.client(f"dan {prefix}") as dan:
        url = f"{WEBHOOK}?pipeline=painter"
        for secret in (NEW_SECRET, OLD_SECRET):
            job = ask(dan, pipeline="painter")
            body = message("job.completed", job["job_id"], outputs=[inline(image(100))])
            assert pipeline.post(url, content=body, headers=signed(secret, body, prefix=prefix)).json()["status"] == "accepted"
            assert status(dan, job["job_id"])["state"] == "completed"
        own = ask(dan)
        body = message("job.failed", own["job_id"])
        assert code(pipeline.post(url, content=body, headers=signed(NEW_SECRET, body))) == (404, "not_found")
        assert tell(pipeline, ask(dan, pipeline="painter"), "job.progress").json()["status"] == "accepted"  # by the job's own secret


def test_a_replay_does_nothing(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("eli") as eli:
        job = ask(eli, outputs=[{"max_bytes": 10_000}] * 2)
        body = message("job.progress", job["job_id"], progress_percent=40, outputs=[inline(image(5_000))])
        headers = signed(job["webhook"]["secret"], body)
        assert pipeline.post(job["webhook"]["url"], content=body, headers=headers).json()["status"] == "accepted"
        file_id = job["uploads"][0]["file_id"]
        eli.delete(f"/api/files/{file_id}").raise_for_status()
        assert pipeline.post(job["webhook"]["url"], content=body, headers=headers).json() == {"status": "repeated", "outputs": []}
        assert usage(eli) == (0, 10_000)
        assert status(eli, job["job_id"])["progress_percent"] == 50


def test_progress_never_goes_back_and_failure_ends(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("flo") as flo:
        job = ask(flo)
        for told, seen in ((30, 30), (20, 30), (60, 60)):
            tell(pipeline, job, "job.progress", progress_percent=told).raise_for_status()
            found = status(flo, job["job_id"])
            assert (found["state"], found["progress_percent"]) == ("running", seen)
        tell(pipeline, job, "job.failed", error="out of memory").raise_for_status()
        found = status(flo, job["job_id"])
        assert (found["state"], found["error"], found["outputs"][0]["reason"]) == ("failed", "out of memory", "failed")
        assert usage(flo) == (0, 0)
        late = tell(pipeline, job, "job.completed", outputs=[inline(image())])
        assert late.json() == {"status": "late", "outputs": []}
        assert flo.get("/api/files").json()["files"] == []
    rows = execute(api.database_url, "select type, payload::text from events where user_id = 'flo'")
    assert [row["type"] for row in rows] == ["job.failed"] and "memory" not in rows[0]["payload"]


@pytest.mark.parametrize(("kind", "state"), [("job.completed", "partly_completed"), ("job.failed", "partly_completed")])
def test_less_than_was_promised_is_a_part(api: RunningServer, pipeline: httpx.Client, kind: str, state: str) -> None:
    with api.client(kind) as gil:
        job = ask(gil, outputs=[{"max_bytes": 10_000}] * 3)
        tell(pipeline, job, kind, outputs=[inline(image(5_000), 1)]).raise_for_status()
        found = status(gil, job["job_id"])
        assert found["state"] == state
        assert [each["state"] for each in found["outputs"]] == ["failed", "stored", "failed"]
        assert usage(gil) == (5_000, 0)


def test_the_bill_may_come_after_the_goods(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("hal") as hal:
        job = ask(hal, outputs=[{"max_bytes": 10_000}] * 2)
        for place in job["uploads"]:
            pipeline.put(place["url"], content=image(4_000)).raise_for_status()
        assert status(hal, job["job_id"])["state"] == "completed"
        assert tell(pipeline, job, "job.failed", credits_used="0.5", error="no").json()["status"] == "accepted"
        found = status(hal, job["job_id"])
        assert (found["state"], found["credits_used"], found["error"]) == ("completed", 0.5, None)
        assert hal.get(f"/api/media/{job['uploads'][0]['file_id']}").json()["credits_used"] == 0.25


def test_after_cancelling_nothing_is_stored(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("hue") as hue:
        job = ask(hue)
        hue.post(f"/api/generate/{job['job_id']}/cancel").raise_for_status()
        for output in (inline(image()), {"index": 0, "url": "https://example.com/a.png"}):
            assert tell(pipeline, job, "job.completed", outputs=[output]).json() == {"status": "late", "outputs": []}
        assert (status(hue, job["job_id"])["state"], usage(hue)) == ("cancelled", (0, 0))
    assert execute(api.database_url, "select 1 from generation_outputs where job_id = $1 and url is not null", job["job_id"]) == []


def test_an_output_that_cannot_be_stored_is_answered_and_may_come_again(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("ian") as ian:
        job = ask(ian, outputs=[{"max_bytes": 10_000}] * 2)
        told = tell(pipeline, job, "job.progress", outputs=[inline(video(5_000)), inline(image(10_001), 1), inline(image(), 7)]).json()
        assert [(each["index"], each["state"], each["code"]) for each in told["outputs"]] == [
            (0, "refused", "type_mismatch"),
            (1, "refused", "file_too_large"),
            (7, "unknown", None),
        ]
        assert usage(ian) == (0, 20_000)
        tell(pipeline, job, "job.progress", outputs=[inline(image(5_000)), inline(image(10_000), 1)]).raise_for_status()
        assert (status(ian, job["job_id"])["state"], usage(ian)) == ("completed", (15_000, 0))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[" * 100_000, "body"),
        (b'{"type": "job.odd", "data": {"job_id": "@"}}', "type"),
        (b'{"type": "job.progress", "data": {}}', "data"),
        (b'{"type": "job.progress", "data": {"job_id": "@", "outputs": [{"index": 0}]}}', "data.outputs"),
        (b'{"type": "job.progress", "data": {"job_id": "@", "outputs": [{"index": 0, "base64": "%%%"}]}}', "data.outputs[0].base64"),
        (b'{"type": "job.progress", "data": {"job_id": "@", "outputs": [{"index": 0, "url": "file:///etc/passwd"}]}}', "data.outputs"),
        (
            b'{"type": "job.progress", "data": {"job_id": "@", "outputs": [{"index": 0, "url": "https://u:p@example.com/"}]}}',
            "data.outputs",
        ),
        (b'{"type": "job.progress", "data": {"job_id": "@", "credits_used": "1e99999"}}', "data.credits_used"),
        (b'{"type": "job.progress", "data": {"job_id": "@", "credits_used": -1}}', "data.credits_used"),
        (b'{"type": "job.progress", "data": {"job_id": "@", "progress_percent": 101}}', "data.progress_percent"),
        (b'{"type": "job.progress", "data": {"job_id": "01890000-0000-7000-8000-000000000000"}}', "data.job_id"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(api: RunningServer, pipeline: httpx.Client, body: bytes, field: str) -> None:
    with api.client("jim") as jim:
        job = ask(jim, outputs=[{"max_bytes": 10}])
        body = body.replace(b"@", job["job_id"].encode())
        refused = pipeline.post(job["webhook"]["url"], content=body, headers=signed(job["webhook"]["secret"], body))
        assert (code(refused), refused.json()["field"]) == ((400, "invalid_request"), field)
        assert status(jim, job["job_id"])["state"] == "queued"


def test_the_door_itself(api: RunningServer, pipeline: httpx.Client) -> None:
    for query in ("", "?job=x", "?pipeline=", "?job=01890000-0000-7000-8000-000000000000&pipeline=painter"):
        assert pipeline.post(WEBHOOK + query, content=b"{}").json()["field"] == "query"
    assert code(pipeline.get(WEBHOOK)) == (405, "method_not_allowed")
    assert pipeline.options(WEBHOOK).headers["allow"] == "POST, OPTIONS"
    assert code(pipeline.post(f"{WEBHOOK}/more", content=b"")) == (404, "not_found")


def test_a_body_past_its_cap_is_refused_whoever_signed_it(start_server: ServerFactory) -> None:
    server = start_server(COFFER_GENERATION_MESSAGE_BYTES="4096")
    with server.client("kat") as kat, httpx.Client(base_url=server.url) as pipeline:
        job = ask(kat)
        assert code(tell(pipeline, job, "job.progress", outputs=[inline(image(4_000))])) == (413, "body_too_large")
        assert tell(pipeline, job, "job.progress", outputs=[inline(image(2_000))]).json()["status"] == "accepted"
        assert usage(kat) == (2_000, 0)
    secret = job["webhook"]["secret"].removeprefix("whsec_")
    assert secret not in server.logged()
    assert not any(secret in str(row) for row in execute(server.database_url, "select * from generation_jobs, generation_outputs, uploads"))


def test_a_url_becomes_work_for_the_worker(api: RunningServer, pipeline: httpx.Client) -> None:
    with api.client("liv") as liv:
        job = ask(liv, outputs=[{"max_bytes": 10_000}] * 2)
        url = "https://example.com/a.png"
        told = tell(pipeline, job, "job.completed", outputs=[{"index": 0, "url": url}]).json()
        assert [(each["index"], each["state"]) for each in told["outputs"]] == [(0, "fetching")]
        found = status(liv, job["job_id"])  # what is on its way may still come; what is not never will
        assert (found["state"], [each["state"] for each in found["outputs"]]) == ("running", ["fetching", "failed"])
        assert usage(liv) == (0, 10_000)
        tell(pipeline, job, "job.progress", outputs=[{"index": 0, "url": "https://example.com/other.png"}]).raise_for_status()
    file_id = job["uploads"][0]["file_id"]
    rows = execute(api.database_url, "select url from generation_outputs where file_id = $1", file_id)
    assert [row["url"] for row in rows] == [url]
    queued = execute(
        api.database_url, "select convert_from(payload, 'UTF8') as text from pgqueuer where dedupe_key = $1", f"fetch:{file_id}"
    )
    assert [row["text"] for row in queued] == [f"fetch {file_id}"]
