"""`coffer.client` against a real server, with a network that cuts, and against the OpenAPI description."""

import asyncio
import inspect
import io
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin
from uuid import UUID

import httpx
import msgspec
import pytest

import coffer.client
from coffer.client import ApiError, AsyncClient, Callback, Client, Incomplete, OutputWish, Progress, calls, models
from coffer.client.calls import Ask, Pause
from tests.samples import image, video
from tests.serving import RunningServer

LARGE = 5_000_000
PIECE = 1_000_000
LOST = -1
SECRET = "whsec_" + "A" * 32


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PIECE_BYTES", PIECE)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries that follow each other without pauses."""
    monkeypatch.setattr(calls, "_LONGEST_PAUSE_SECONDS", 0.01)


@contextmanager
def cutting(server: RunningServer, *after_bytes: int) -> Iterator[str]:
    """A way to the server; its URL. The first connections are cut after so many bytes of requests, or (`LOST`) when the answer comes."""
    listener = socket.create_server(("127.0.0.1", 0))
    bounds = iter(after_bytes)

    def carry(source: socket.socket, target: socket.socket, most: float) -> None:
        with suppress(OSError):
            while most > 0 and (data := source.recv(int(min(most, 65_536)))):
                target.sendall(data)
                most -= len(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def join(client: socket.socket, most: float) -> None:
        with client, socket.create_connection((server.host, server.port)) as upstream:
            if most == LOST:
                there = threading.Thread(target=carry, args=(client, upstream, float("inf")))
                there.start()
                upstream.recv(1)
                carry(upstream, client, 0)
                there.join()
                return
            back = threading.Thread(target=carry, args=(upstream, client, float("inf")))
            back.start()
            carry(client, upstream, most)
            back.join()

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                joined.append(threading.Thread(target=join, args=(client, next(bounds, float("inf")))))
                joined[-1].start()

    joined: list[threading.Thread] = []
    serving = threading.Thread(target=serve)
    serving.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for each in (serving, *joined):
            each.join()


def test_files_and_links(api: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "Größe.png"
    path.write_bytes(image(20_000))
    with Client(api.url, api_key=api.api_key, user_id="ada ü") as ada:
        file = ada.upload(path, tags=["a", "b"], metadata={"scene": "7"}, kind="image", package_name="p")
        assert (file.file_name, file.file_size, file.tags, file.metadata, file.user_id) == (
            path.name,
            20_000,
            ["a", "b"],
            {"scene": "7"},
            "ada ü",
        )
        assert ada.read(file.id) == image(20_000) and ada.file(file.id) == file
        second = ada.upload(b"\x89PNG" + image(2_000)[4:], name="2.png")
        page = ada.files(limit=1, links=True)
        assert [each.id for each in page.files] == [second.id] and page.files[0].link is not None
        rest = ada.files(cursor=page.next_cursor)
        assert [each.id for each in rest.files] == [file.id]
        link = ada.link(file.id, ttl_seconds=60, disposition="attachment", name="x.png")
        got = httpx.get(link.url if link.url.startswith("http") else api.url + link.url)
        assert got.content == image(20_000) and "x.png" in got.headers["content-disposition"]
        ada.revoke_links(file.id)
        assert httpx.get(api.url + link.url).status_code in (403, 404)
        assert ada.usage().used_bytes == 22_000
        ada.delete(second.id)
        with pytest.raises(ApiError) as missing:
            ada.file(second.id)
        assert (missing.value.status, missing.value.code) == (404, "not_found")


def test_what_is_large_goes_on_after_each_cut(api: RunningServer, pieces: None, at_once: None, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(video(LARGE))
    reached: list[Progress] = []
    with cutting(api, 1_500_000, 100, LOST, 2_400_000, LOST, LOST, 700_000) as url, Client(url, api_key=api.api_key, user_id="cut") as cut:
        file = cut.upload(path, metadata={"scene": "9"}, progress=reached.append)
        assert (file.file_size, file.file_name, file.metadata) == (LARGE, "film.mp4", {"scene": "9"})
        assert cut.read(file.id) == video(LARGE) and len(cut.files().files) == 1
    sent = [each.sent_bytes for each in reached]
    assert sent == sorted(sent) and sent[-1] == LARGE == reached[-1].total_bytes


def test_another_process_goes_on_where_one_stopped(api: RunningServer, pieces: None) -> None:
    class Stopped(Exception):
        pass

    reached: list[Progress] = []

    def stop(progress: Progress) -> None:
        reached.append(progress)
        if progress.sent_bytes >= 2 * PIECE:
            raise Stopped

    content = video(LARGE, seed=4)
    with Client(api.url, api_key=api.api_key, user_id="later") as first, pytest.raises(Stopped):
        first.upload(content, name="film.mp4", progress=stop)
    address = reached[-1].address
    with Client(api.url, api_key=api.api_key, user_id="later") as second:
        with pytest.raises(Incomplete):
            second.upload(content[:-1], resume=address)
        again: list[Progress] = []
        file = second.upload(io.BytesIO(content), resume=address, progress=again.append)
        assert again[0].sent_bytes == 2 * PIECE and second.read(file.id) == content


def test_a_small_file_whose_answer_is_lost_is_stored_once(api: RunningServer, at_once: None) -> None:
    with cutting(api, LOST, 5_000, 300, LOST) as url, Client(url, api_key=api.api_key, user_id="small") as small:
        file = small.upload(image(9_000))
        assert [each.id for each in small.files().files] == [file.id]


def test_a_job_whose_answer_is_lost_is_registered_once(api: RunningServer, at_once: None) -> None:
    with cutting(api, LOST, LOST) as url, Client(url, api_key=api.api_key, user_id="job") as app:
        made = app.generate([OutputWish(max_bytes=5_000)])
        assert [each.id for each in app.jobs().jobs] == [made.job_id]


def test_an_output_whose_answer_is_lost_is_brought(api: RunningServer, at_once: None) -> None:
    with Client(api.url, api_key=api.api_key, user_id="lost") as app, cutting(api, LOST) as url, Client(url) as pipeline:
        link = app.upload_link(10_000)
        place = msgspec.structs.replace(link, url=url + httpx.URL(link.url).path)
        assert pipeline.upload_to(place, image(500)) == link.file_id
        assert app.read(link.file_id) == image(500)


def test_upload_links_need_no_key(api: RunningServer, pieces: None, at_once: None) -> None:
    with Client(api.url, api_key=api.api_key, user_id="links") as app, cutting(api, 1_200_000) as url, Client(url) as pipeline:
        small, large = app.upload_link(10_000, types=["image"], file_name="a.png"), app.upload_link(LARGE, ttl_seconds=60, kind="video")
        assert pipeline.upload_to(small, image(5_000)) == small.file_id
        assert pipeline.upload_to(large, video(LARGE)) == large.file_id
        assert {each.id: each.file_name for each in app.files().files}[small.file_id] == "a.png"
        assert app.read(large.file_id) == video(LARGE)
        with pytest.raises(ApiError) as used:
            pipeline.upload_to(small, image(5_000))
        assert used.value.code == "link_used"
        with pytest.raises(ApiError) as unknown:
            pipeline.usage()
        assert unknown.value.status == 401


def test_jobs(api: RunningServer) -> None:
    with Client(api.url, api_key=api.api_key, user_id="jobs") as app, Client(api.url) as pipeline:
        reference = app.upload(image(3_000))
        made = app.generate(
            [OutputWish(max_bytes=5_000), OutputWish(max_bytes=6_000, type="video", file_name="b.mp4")],
            entity=("character", "mira"),
            project_id="p",
            model="m",
            prompt="by night",
            parameters={"steps": 3},
            references=[reference.id],
            callback=Callback("https://app.example.com/", SECRET),
            marks=[],
            ttl_seconds=600,
            idempotency_key="one",
        )
        again = app.generate([OutputWish(max_bytes=5_000)], idempotency_key="one")
        assert again.job_id == made.job_id and (made.job.prompt, made.job.callback_state) == ("by night", "waiting")
        assert made.references[0].file_id == reference.id and made.webhook.secret.startswith("whsec_")
        for place, content in zip(made.uploads, (image(5_000), video(6_000)), strict=True):
            pipeline.upload_to(place, content)
        ended = app.wait_for_job(made.job_id, seconds=30)
        assert (ended.state, [each.state for each in ended.outputs]) == ("completed", ["stored", "stored"])
        other = app.generate([OutputWish(max_bytes=5_000)])
        assert app.cancel_job(other.job_id).state == "cancelled" == app.job(other.job_id).state
        assert [each.id for each in app.jobs(state="completed", entity=("character", "mira"), limit=5).jobs] == [made.job_id]
        with pytest.raises(ApiError) as refused:
            app.generate([OutputWish(max_bytes=5_000)], pipeline="nobody")
        assert (refused.value.code, refused.value.problem["field"]) == ("invalid_request", "pipeline")


@pytest.mark.anyio
async def test_the_one_that_is_awaited_does_the_same(api: RunningServer, pieces: None, at_once: None) -> None:
    reached: list[Progress] = []
    with cutting(api, 1_500_000) as url:
        async with AsyncClient(url, api_key=api.api_key, user_id="async") as coffer:
            large, *small = await asyncio.gather(
                coffer.upload(video(LARGE), progress=reached.append), *(coffer.upload(image(1_000 + seed, seed)) for seed in range(5))
            )
            assert await coffer.read(large.id) == video(LARGE) and reached[-1].sent_bytes == LARGE
            assert len((await coffer.files()).files) == 6 and {each.file_size for each in small} == set(range(1_000, 1_005))
            made = await coffer.generate([OutputWish(max_bytes=5_000)])
            await coffer.upload_to(made.uploads[0], image(500))
            assert (await coffer.wait_for_job(made.job_id)).state == "completed"


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, str]:
        return {name: str(inspect.signature(each)) for name, each in vars(kind).items() if not name.startswith("_") and name != "close"}

    assert methods(Client) == methods(AsyncClient)


def test_the_key_goes_nowhere_else(api: RunningServer) -> None:
    with Client(api.url, api_key="cof_secret", user_id="ada") as ada, pytest.raises(ValueError, match="API key"):
        ada.upload(video(10), resume="http://127.0.0.1:1/api/tus/steal")


# Against the description


@pytest.fixture(scope="module")
def description(api: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{api.url}/schema/openapi.json").json()
    return found


ANSWERS = {
    models.Link: "LinkAnswer",
    models.File: "FileAnswer",
    models.FilePage: "FileList",
    models.UploadLink: "UploadLinkAnswer",
    models.Usage: "UsageAnswer",
    models.Output: "OutputAnswer",
    models.Job: "JobAnswer",
    models.JobPage: "JobList",
    models.Reference: "Reference",
    models.UploadPlace: "UploadPlace",
    models.WebhookPlace: "WebhookPlace",
    models.NewJob: "NewJobAnswer",
}
WISHES = {models.OutputWish: "OutputSpec", models.Callback: "CallbackWish"}


def _json_types(kind: Any) -> set[str]:
    """What JSON calls a Python type; a model by the name of its schema, a Literal by its values."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    if get_origin(kind) in (Union, type(int | None)):
        return set().union(*(_json_types(each) for each in get_args(kind)))
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    formats = {"UUID": "uuid", "datetime": "date-time"}
    if kind in plain:
        return {plain[kind]}
    if kind in ANSWERS | WISHES:
        return {(ANSWERS | WISHES)[kind]}
    return {{list: "array", dict: "object"}.get(get_origin(kind)) or formats[kind.__name__]}


def _described(schema: dict[str, Any]) -> set[str]:
    if "$ref" in schema:
        return {schema["$ref"].rpartition("/")[2]}
    alternatives = schema.get("oneOf") or schema.get("anyOf")
    if alternatives:
        return set().union(*(_described(each) for each in alternatives))
    if "enum" in schema:
        return {"null" if each is None else each for each in schema["enum"]}
    found = schema.get("type", [])
    types = {found} if isinstance(found, str) else set(found)
    if schema.get("format") in ("uuid", "date-time"):
        types = types - {"string"} | {schema["format"]}
    return types


@pytest.mark.parametrize("model", [*ANSWERS, *WISHES])
def test_models_are_those_of_the_description(description: dict[str, Any], model: type[msgspec.Struct]) -> None:
    schema = description["components"]["schemas"][(ANSWERS | WISHES)[model]]
    for each in msgspec.structs.fields(model):
        assert each.name in schema["properties"], f"{model.__name__}.{each.name} is not described"
        wanted, described = _json_types(each.type), _described(schema["properties"][each.name])
        if model is models.File and each.name == "link":
            wanted -= {"null"}  # it is left out
        assert wanted == described, f"{model.__name__}.{each.name}: {wanted} is not {described}"
        if model in ANSWERS and each.required:
            assert each.name in schema["required"], f"{model.__name__}.{each.name} may be missing"


UUID_ = UUID(int=7)
PLACE = models.UploadLink("/u/token", UUID_, datetime(2026, 1, 1, tzinfo=UTC), 1)
ASKED: list[Callable[[], calls.Steps[Any]]] = [
    lambda: calls.upload(b"x", name="n", kind="image", package_name="p", tags=["t"], metadata={"a": "b"}, resume=None),
    lambda: calls.upload_to(PLACE, b"x", resume=None),
    lambda: calls.get_file(UUID_),
    lambda: calls.list_files(kind="image", links=True, limit=1, cursor="c"),
    lambda: calls.read(UUID_),
    lambda: calls.delete_file(UUID_),
    calls.usage,
    lambda: calls.link(UUID_, ttl_seconds=1, disposition="inline", name="n"),
    lambda: calls.upload_link(1, ttl_seconds=1, types=["image"], file_name="n", kind="image"),
    lambda: calls.revoke_links(UUID_),
    lambda: calls.generate(
        [OutputWish(max_bytes=1)],
        pipeline="p",
        entity=("a", "b"),
        project_id="p",
        model="m",
        prompt="p",
        parameters={"a": 1},
        references=[UUID_],
        parent_id=UUID_,
        callback=Callback("https://a.example/", SECRET),
        marks=["iptc"],
        ttl_seconds=1,
        idempotency_key=None,
    ),
    lambda: calls.get_job(UUID_),
    lambda: calls.await_job(UUID_),
    lambda: calls.list_jobs(state="queued", entity=("a", "b"), limit=1, cursor="c"),
    lambda: calls.cancel_job(UUID_),
]


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_requests_are_those_of_the_description(description: dict[str, Any], number: int) -> None:
    steps = ASKED[number]()
    ask = next(steps)
    steps.close()
    assert isinstance(ask, Ask)
    path = re.sub(r"^/u/token$", "/u/{token}", ask.url)
    found = [
        template
        for template in description["paths"]
        if re.fullmatch(re.sub(r"\{\w+\}", r"[^/]+", template), path.replace("{token}", "token"))
    ]
    exact = [each for each in found if each == path] or found
    operation = next(description["paths"][each][ask.method.lower()] for each in exact if ask.method.lower() in description["paths"][each])
    parameters = {each["name"].lower() for each in (_followed(description, each) for each in operation.get("parameters", []))}
    assert {name.lower() for name in ask.query} <= parameters
    assert {name for name in ask.headers if name == "idempotency-key"} <= parameters
    if ask.headers.get("content-type") == "application/json":
        schema = _followed(description, operation["requestBody"]["content"]["application/json"]["schema"])
        if "oneOf" in schema:
            schema = next(_followed(description, each) for each in schema["oneOf"] if each.get("type") != "null")
        assert msgspec.json.decode(ask.body or b"", type=dict[str, Any]).keys() <= schema["properties"].keys()


def _followed(description: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        found: Any = description
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        schema = found
    return schema


def test_it_stands_alone() -> None:
    """Whoever installs it for itself needs httpx and msgspec."""
    sources = list(Path(inspect.getfile(coffer.client)).parent.glob("*.py"))
    imported = {name for path in sources for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE)}
    assert len(sources) == 5 and not imported & {"server", "ops", "litestar", "asyncpg", "uuid_utils"}


def test_patience_ends() -> None:
    steps = calls.get_file(UUID_)
    pauses: list[float] = []
    given: Any = None
    with pytest.raises(ApiError) as away:
        while True:
            asked = steps.send(given)
            given = (
                httpx.Response(503, json={"code": "database_unavailable"}, headers={"retry-after": "5"}) if isinstance(asked, Ask) else None
            )
            if isinstance(asked, Pause):
                pauses.append(asked.seconds)
    assert away.value.code == "database_unavailable" and pauses == [5, 5, 5, 8, 16, 32, 32]
