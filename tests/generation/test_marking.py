"""Outputs are marked once they are stored: a new version of the same file, or the one that came and the reason why."""

import asyncio
import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ops import cli
from server.delivery import Links
from server.errors import PreconditionFailed
from server.generation import Generation, JobWish, OutputWish
from server.generation.credentials import Credentials
from server.generation.marking import MOST_TRIES, MakeMark, Marker
from server.generation.service import details_of
from server.intake import Intake
from server.ledger import (
    Database,
    File,
    PreviewFacts,
    PreviewRow,
    ReplacedContent,
    add_variant,
    add_volume,
    begin_preview,
    find_file_anywhere,
    finish_preview,
    get_previews,
    get_user,
    hold_user,
    list_volumes,
    set_quota,
)
from server.ledger import generation as rows
from server.ledger.media import get_media
from server.ledger.models import Job
from server.ledger.queue import Retry
from server.previews import decoders, xmp
from server.previews.decoders import Broken, Sign
from server.previews.marks import Mark
from server.previews.models import MadeFile
from server.previews.statements import NAME
from server.settings import SettingError, Settings
from server.vault import Vault
from server.vault.sentinel import init_volume
from tests.generation.speaking import ask, code, inline, status, tell, usage
from tests.previews.issuing import issue
from tests.previews.media import TEST_CARD, record
from tests.previews.pictures import photo
from tests.previews.test_marking import frames, pixels
from tests.quota.rows import drift
from tests.serving import RunningServer, ServerFactory, execute
from tests.tus.crashes import Service, run_until, serving
from tests.waiting import until
from tests.working import BackgroundWorker

CERTIFICATES, KEY = issue("The owner of Coffer")
CREDENTIALS = Credentials(CERTIFICATES, KEY)
EVERY = int(os.environ.get("COFFER_TEST_KILL_EVERY", "7"))
"""Of the steps at which a worker may die, one in so many is tried; being odd, it has those before calls and those after them."""
PICTURE = bytes(photo().jpegsave_buffer())
ED25519 = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
LARGE = bytes(photo(1_000, 800).pngsave_buffer(compression=0))  # more than is held in memory


@pytest.fixture(autouse=True, scope="module")
def decoders_end() -> Iterator[None]:
    yield
    for each in (decoders.marker, decoders.reader):
        if each.cache_info().currsize:
            each().close()
            each.cache_clear()


# Over HTTP, with a worker


@pytest.fixture
def marking(tmp_path: Path) -> dict[str, Any]:
    """The settings."""
    (tmp_path / "chain.pem").write_text(CERTIFICATES)
    (tmp_path / "key.pem").write_text(KEY)
    return {
        "COFFER_MARK_OUTPUTS": "c2pa,iptc",
        "COFFER_C2PA_CERTIFICATES_FILE": str(tmp_path / "chain.pem"),
        "COFFER_C2PA_KEY_FILE": str(tmp_path / "key.pem"),
    }


@pytest.fixture
def running(start_server: ServerFactory, marking: dict[str, Any]) -> RunningServer:
    return start_server(**marking)


@pytest.fixture
def start_worker(running: RunningServer, marking: dict[str, Any], tmp_path: Path) -> Iterator[Callable[[], BackgroundWorker]]:
    started: list[BackgroundWorker] = []

    def start() -> BackgroundWorker:
        started.append(BackgroundWorker(running, tmp_path / "worker.log", marking))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_outputs_come_and_are_marked(running: RunningServer, start_worker: Callable[[], BackgroundWorker], tmp_path: Path) -> None:
    film = record(tmp_path / "a.mp4", TEST_CARD, "-c:v", "libx264", "-pix_fmt", "yuv420p").read_bytes()
    sent = [PICTURE, bytes(photo().pngsave_buffer()), bytes(photo().webpsave_buffer()), film]
    with running.client("ada", timeout=60) as ada:
        types = ["image", "image", "image", "video"]
        made = ask(ada, outputs=[{"type": each, "max_bytes": 2**20} for each in types], model="a-model", prompt="a secret wish")
        for place, content in list(zip(made["uploads"], sent, strict=True))[:3]:
            httpx.put(place["url"] if place["url"].startswith("http") else running.url + place["url"], content=content).raise_for_status()
        assert tell(ada, made, "job.completed", outputs=[inline(film, 3)]).json()["status"] == "accepted"
        ids = [output["file_id"] for output in status(ada, made["job_id"])["outputs"]]
        # All are there, and the job goes on: who hears of its end is to find the bytes as they stay.
        assert status(ada, made["job_id"])["state"] == "running"
        before = ada.get(f"/api/files/{ids[0]}").json()
        early = ada.post(f"/api/files/{ids[0]}/link").json()["url"]
        assert ada.get(early).content == PICTURE
        start_worker()
        until(lambda: status(ada, made["job_id"])["state"] == "completed", timeout_seconds=120)
        got = [ada.get(f"/api/files/{each}/download") for each in ids]
        for each, content in list(zip(got, sent, strict=True))[:3]:
            assert pixels(each.content) == pixels(content) and each.content != content
        assert frames(tmp_path / "got.mp4", got[3].content) == frames(tmp_path / "sent.mp4", film)
        for each, file_id in zip(got, ids, strict=True):
            assert b"secret" not in each.content
            said = ada.get(f"/api/files/{file_id}/provenance").json()
            told = said["content_credentials"]
            active = told["manifests"][told["active_manifest"]]
            assert (said["digital_source_type"], told["validation_state"]) == (xmp.GENERATED, "Valid")
            assert active["signature_info"]["issuer"] == "The owner of Coffer"
            assert active["assertions"][-1]["data"]["actions"][0]["softwareAgent"] == {"name": "a-model"}
            media = ada.get(f"/api/media/{file_id}").json()
            assert (media["marks"], media["marking"], media["marking_reason"]) == (["iptc", "c2pa"], "marked", None)
        after = ada.get(f"/api/files/{ids[0]}").json()
        assert (after["file_size"], after["sha256"] != before["sha256"]) == (len(got[0].content), True)
        assert got[0].headers["etag"] != f'"{before["sha256"]}"'
        assert usage(ada) == (sum(len(each.content) for each in got), 0)
        # A link of before is as one to bytes that were replaced; one of the job's end leads to what stays.
        assert ada.get(early).status_code == 404
        assert ada.get(ada.post(f"/api/files/{ids[0]}/link").json()["url"]).content == got[0].content
        for file_id in ids:
            assert ada.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()["preview_state"] == "ready"
        # Other bytes are nobody's but the user's: what is said of them is not what was said of those.
        ada.put(f"/api/files/{ids[0]}/content", content=PICTURE).raise_for_status()
        media = ada.get(f"/api/media/{ids[0]}").json()
        assert (media["marks"], media["marking"]) == ([], None)
        assert ada.get(f"/api/files/{ids[0]}/provenance").json() == {"digital_source_type": None, "content_credentials": None}
    running.settle()
    told = execute(running.database_url, "select type from events where type not like 'preview%' order by id")
    assert [each["type"] for each in told][:9] == ["file.created"] * 4 + ["file.replaced"] * 4 + ["job.completed"]
    assert len(running.stored_paths()) == 4


def test_a_job_says_which_marks_it_wants(running: RunningServer) -> None:
    with running.client("ada") as ada:
        assert code(ada.post("/api/generate", json={"outputs": [{"max_bytes": 10}], "marks": ["stamp"]})) == (400, "invalid_request")
        without = ask(ada, outputs=[{"type": "image", "max_bytes": 10_000}], marks=[])
        assert tell(ada, without, "job.completed", outputs=[inline(PICTURE)]).json()["outputs"][0]["state"] == "stored"
        assert status(ada, without["job_id"])["state"] == "completed"
        (output,) = status(ada, without["job_id"])["outputs"]
        assert ada.get(f"/api/media/{output['file_id']}").json()["marking"] is None
        one = ask(ada, outputs=[{"type": "image", "max_bytes": 10_000}], marks=["iptc"])
        tell(ada, one, "job.completed", outputs=[inline(PICTURE)])
        assert status(ada, one["job_id"])["state"] == "running"
        wanted = execute(running.database_url, "select wanted_marks from generated_media where marking = 'pending'")
        assert [each["wanted_marks"] for each in wanted] == [["iptc"]]


def test_marks_that_the_settings_do_not_name(start_server: ServerFactory) -> None:
    with start_server().client("ada") as ada:
        refused = ada.post("/api/generate", json={"outputs": [{"max_bytes": 10}], "marks": ["iptc"]})
        assert code(refused) == (400, "invalid_request")
        assert refused.json()["field"] == "marks"


# In this process


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(
        database_url=database_url, link_keys=("k" * 32,), volume_reserve_bytes=2**20, mark_outputs=("iptc", "c2pa"), trash_days=1
    )


async def output(generation: Generation, intake: Intake, content: bytes, *marks: str) -> tuple[Job, UUID]:
    """A job whose one output has come."""
    wish = JobWish(outputs=[OutputWish(media_type="image", max_bytes=len(content))], model="m", marks=list(marks), ttl_seconds=600)
    job = await generation.create("ada", wish)
    file_id = (await rows.get_outputs(intake.db, [job.id]))[job.id][0].file_id
    upload, link = await intake.begin_linked(file_id, declared_bytes=len(content), expected={})
    await upload.write(content)
    await upload.finish(details_of(link))
    return job, file_id


class Coffer:
    """What a worker process is made of, as far as marks need it."""

    def __init__(self, settings: Settings, db: Database, vault: Vault, mount: Path) -> None:
        self.db, self.mount = db, mount
        self.intake = Intake(settings, db, vault)
        self.generation = Generation(settings, db, self.intake, Links(settings.link_keys))
        self.marker = Marker(db, self.intake, CREDENTIALS)

    async def output(self, content: bytes, *marks: str) -> tuple[Job, UUID]:
        return await output(self.generation, self.intake, content, *(marks or ("iptc",)))

    async def file(self, file_id: UUID) -> File:
        file = await find_file_anywhere(self.db, file_id)
        assert file is not None
        return file

    async def content(self, file_id: UUID) -> bytes:
        return (self.mount / (await self.file(file_id)).file_path).read_bytes()

    async def end(self, job: Job, file_id: UUID) -> tuple[str, str | None, str | None, list[str]]:
        media = await get_media(self.db, "ada", file_id)
        return (await rows.get_job(self.db, "ada", job.id)).state, media.marking, media.marking_reason, media.marks

    def marker_by(self, make: MakeMark) -> Marker:
        return Marker(self.db, self.intake, CREDENTIALS, make)


@pytest.fixture
async def coffer(settings: Settings, db: Database, volume: Path) -> AsyncIterator[Coffer]:
    vault = Vault(settings.volume_reserve_bytes)
    await vault.refresh(await list_volumes(db))
    yield Coffer(settings, db, vault, volume)
    vault.close()


@pytest.mark.anyio
@pytest.mark.parametrize("content", [PICTURE, LARGE], ids=["in memory", "on the disk"])
async def test_the_quota_holds_to_the_byte(coffer: Coffer, content: bytes) -> None:
    _, first = await coffer.output(content)
    await coffer.marker.handle(first, 0)
    used = (await coffer.file(first)).file_size
    more = used - len(content)
    assert more > 0
    for room, end in ((more - 1, ("completed", "unmarked", "quota_exceeded", [])), (more, ("completed", "marked", None, ["iptc"]))):
        await set_quota(coffer.db, "ada", used + len(content) + room)
        job, file_id = await coffer.output(content)
        await coffer.marker.handle(file_id, 0)
        assert await coffer.end(job, file_id) == end
        used += (await coffer.file(file_id)).file_size
        user = await get_user(coffer.db, "ada")
        assert (user.total_bytes, user.reserved_bytes) == (used, 0)
    assert list((coffer.mount / "incoming").iterdir()) == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("content", "marks", "reason"),
    [
        (PICTURE[:300], ("iptc",), "damaged"),
        (PICTURE[:4] + b"\xff\xff" + PICTURE[6:], ("iptc",), "damaged"),
        (PICTURE[:300], ("iptc", "c2pa"), "damaged"),
        (bytes(photo().gifsave_buffer()), ("iptc",), "unsupported"),
    ],
    ids=["truncated", "giant segment", "nothing to sign", "another type"],
)
async def test_what_cannot_be_marked_stays_as_it_came(coffer: Coffer, content: bytes, marks: tuple[str, ...], reason: str) -> None:
    job, file_id = await coffer.output(content, *marks)
    before = await coffer.file(file_id)
    await coffer.marker.handle(file_id, 0)
    state, marking, told, made = await coffer.end(job, file_id)
    assert (state, marking, made) == ("completed", "unmarked", [])
    assert told in {reason, "unreadable_credentials"}
    assert await coffer.file(file_id) == before
    assert await coffer.content(file_id) == content


@pytest.mark.anyio
async def test_one_mark_is_better_than_none(coffer: Coffer) -> None:
    job, file_id = await coffer.output(bytes(photo().gifsave_buffer()), "iptc", "c2pa")
    await coffer.marker.handle(file_id, 0)
    assert await coffer.end(job, file_id) == ("completed", "marked", None, ["c2pa"])


@pytest.mark.anyio
async def test_what_speaks_for_itself_is_left_alone(coffer: Coffer) -> None:
    ends = []
    content = PICTURE
    for marks in (("iptc",), ("c2pa",), ("iptc",)):
        job, file_id = await coffer.output(content, *marks)
        await coffer.marker.handle(file_id, 0)
        ends.append((await coffer.end(job, file_id))[1:3])
        if ends[-1][0] == "unmarked":
            assert await coffer.content(file_id) == content
            job, file_id = await coffer.output(PICTURE, "c2pa")
            await coffer.marker.handle(file_id, 0)
        content = await coffer.content(file_id)
    assert ends == [("marked", None), ("unmarked", "has_source_type"), ("unmarked", "has_credentials")]


@pytest.mark.anyio
async def test_marking_again_changes_nothing(coffer: Coffer) -> None:
    job, file_id = await coffer.output(PICTURE)
    await coffer.marker.handle(file_id, 0)
    once = await coffer.file(file_id)
    await asyncio.gather(*(coffer.marker.handle(file_id, 0) for _ in range(3)))
    with pytest.raises(PreconditionFailed):
        new = ReplacedContent(
            upload_id=uuid4(),
            mime_type="image/jpeg",
            file_size=5,
            sha256=bytes(32),
            volume_id=once.volume_id,
            file_path=once.file_path.replace(".2.", ".3."),
            generation=3,
        )
        await rows.mark_content(
            coffer.db, user_id="ada", file_id=file_id, expected_generation=once.generation, new=new, marks=["iptc"], statements_name=NAME
        )
    assert await coffer.file(file_id) == once
    assert await coffer.end(job, file_id) == ("completed", "marked", None, ["iptc"])


@pytest.mark.anyio
async def test_previews_stay_and_what_the_file_said_goes(coffer: Coffer) -> None:
    _, file_id = await coffer.output(PICTURE)
    file = await coffer.file(file_id)
    made = [
        PreviewRow(variant=each, file_name=f"{each}.webp", mime_type="image/webp", width=1, height=1, size_bytes=1)
        for each in ("320", "640")
    ]
    assert await begin_preview(coffer.db, file) == 1
    assert await finish_preview(coffer.db, file, "ready", facts=PreviewFacts(width=600, height=400), made=made)
    said = PreviewRow(variant=NAME, file_name=NAME, mime_type="application/json", width=None, height=None, size_bytes=1)
    assert await add_variant(coffer.db, file, said, 10_000) == []
    await coffer.marker.handle(file_id, 0)
    assert sorted(each.file_name for each in await get_previews(coffer.db, "ada", file_id)) == ["320.webp", "640.webp"]
    marked = await coffer.file(file_id)
    assert (marked.preview_state, marked.width, marked.sha256 != file.sha256) == ("ready", 600, True)
    # Who has read the bytes of before comes too late.
    assert await add_variant(coffer.db, file, said, 10_000) is None


@pytest.mark.anyio
async def test_two_workers_mark_at_once(coffer: Coffer) -> None:
    job, file_id = await coffer.output(LARGE)
    await asyncio.gather(*(coffer.marker.handle(file_id, 0) for _ in range(4)))
    assert await coffer.end(job, file_id) == ("completed", "marked", None, ["iptc"])
    user = await get_user(coffer.db, "ada")
    assert (user.total_bytes, user.reserved_bytes) == ((await coffer.file(file_id)).file_size, 0)
    assert len(list((coffer.mount / "users").glob("*/images/*"))) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["replaced", "revoked", "trashed", "deleted"])
async def test_the_file_changes_while_it_is_marked(coffer: Coffer, what: str) -> None:
    job, file_id = await coffer.output(PICTURE)
    asked = 0

    async def make(source: Path, mime_type: str, target_fd: int, mark: Mark, sign: Sign) -> None:
        nonlocal asked
        asked += 1
        await decoders.marker().mark(source, mime_type, target_fd, mark, sign)
        if asked > 1:
            return
        if what == "replaced":
            upload = await coffer.intake.begin("ada", declared_bytes=len(LARGE), replacing=await coffer.file(file_id))
            await upload.write(LARGE)
            await upload.replace(await coffer.file(file_id))
        elif what == "revoked":
            await coffer.intake.revoke_links("ada", file_id)
        else:
            assert await coffer.intake.delete("ada", [file_id], permanently=what == "deleted")

    await coffer.marker_by(make).handle(file_id, 0)
    state = (await rows.get_job(coffer.db, "ada", job.id)).state
    assert state == "completed"
    if what == "replaced":
        assert (await coffer.end(job, file_id), asked) == (("completed", None, None, []), 1)
        assert await coffer.content(file_id) == LARGE
    elif what == "revoked":
        assert (await coffer.end(job, file_id), asked) == (("completed", "marked", None, ["iptc"]), 2)
    elif what == "trashed":
        (row,) = await asyncio.to_thread(
            execute, coffer.intake.settings.database_url, "select marking, marking_reason from generated_media"
        )
        assert tuple(row) == ("unmarked", "deleted")
        assert (await coffer.content(file_id)) == PICTURE
    else:
        assert await find_file_anywhere(coffer.db, file_id) is None
    assert (await get_user(coffer.db, "ada")).reserved_bytes == 0
    assert len(list((coffer.mount / "users").glob("*/images/*"))) == (0 if what == "deleted" else 1)


@pytest.mark.anyio
async def test_a_legal_hold_keeps_the_bytes_that_came(coffer: Coffer) -> None:
    job, file_id = await coffer.output(PICTURE)
    await hold_user(coffer.db, "ada", "case 7/26")
    await coffer.marker.handle(file_id, 0)
    assert await coffer.end(job, file_id) == ("completed", "unmarked", "legal_hold", [])
    assert await coffer.content(file_id) == PICTURE


@pytest.mark.anyio
async def test_a_decoder_that_dies_is_tried_again_and_then_given_up(coffer: Coffer) -> None:
    job, file_id = await coffer.output(PICTURE)

    async def die(*_: Any) -> None:
        raise Broken("gone")

    marker = coffer.marker_by(die)
    for put_off in range(MOST_TRIES - 1):
        with pytest.raises(Retry):
            await marker.handle(file_id, put_off)
        assert (await coffer.end(job, file_id))[:2] == ("running", "pending")
    await marker.handle(file_id, MOST_TRIES - 1)
    assert await coffer.end(job, file_id) == ("completed", "unmarked", "error", [])
    assert await coffer.content(file_id) == PICTURE


@pytest.mark.anyio
async def test_outputs_wait_for_a_certificate_that_is_valid(coffer: Coffer) -> None:
    job, file_id = await coffer.output(PICTURE, "c2pa")
    for credentials in (None, Credentials(*issue("too late", days=0))):
        with pytest.raises(Retry):
            await Marker(coffer.db, coffer.intake, credentials).handle(file_id, 20)
        assert (await coffer.end(job, file_id))[:2] == ("running", "pending")
    await coffer.marker.handle(file_id, 0)
    assert await coffer.end(job, file_id) == ("completed", "marked", None, ["c2pa"])


@pytest.mark.anyio
async def test_a_lost_job_comes_back(coffer: Coffer) -> None:
    _, file_id = await coffer.output(PICTURE)
    queued = "select convert_from(payload, 'UTF8') as payload from pgqueuer where entrypoint = 'generation'"
    url = coffer.intake.settings.database_url
    assert [each["payload"] for each in await asyncio.to_thread(execute, url, queued)] == [f"mark {file_id}"]
    await asyncio.to_thread(execute, url, "delete from pgqueuer")
    # Its pipeline is not asked again: nothing is awaited from there.
    await asyncio.to_thread(execute, url, "update generation_jobs set pipeline = 'model', remote_id = 'one'")
    assert await rows.derive_generation_jobs(coffer.db, ["model"], ["model"]) == 1
    assert await rows.derive_generation_jobs(coffer.db, [], []) == 0
    assert [each["payload"] for each in await asyncio.to_thread(execute, url, queued)] == [f"mark {file_id}"]
    await coffer.marker.handle(file_id, 0)
    await asyncio.to_thread(execute, url, "delete from pgqueuer")
    assert await rows.derive_generation_jobs(coffer.db, [], []) == 0


# Killed at any step


async def at_once(source: Path, mime_type: str, target_fd: int, mark: Mark, sign: Sign) -> None:
    """What the jail does, without one: it has been killed often enough in other tests."""
    await asyncio.to_thread(_write, source, mime_type, target_fd)


def _write(source: Path, mime_type: str, target_fd: int) -> None:
    with source.open("rb") as file, open(target_fd, "r+b", closefd=False) as target:
        xmp.write(file, xmp.edits_of(file, mime_type), target)


async def says_nothing(_source: Path, _mime_type: str, output: Path) -> MadeFile:
    (output / NAME).write_text("{}")
    return MadeFile(variant=NAME, name=NAME, mime_type="application/json")


@pytest.fixture
def mount(database_url: str, tmp_path: Path) -> Path:
    mount = tmp_path / "mount"
    mount.mkdir()

    async def add() -> None:
        async with serving(database_url) as service:
            await add_volume(service.db, init_volume(mount), str(mount))

    asyncio.run(add())
    return mount


@pytest.mark.parametrize("content", [PICTURE, LARGE], ids=["in memory", "on the disk"])
def test_a_worker_dies_at_any_step(
    database_url: str, mount: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is one version at every moment, and in the end it is the marked one, charged once."""
    made: list[UUID] = []

    async def begin() -> None:
        async with serving(database_url) as service:
            settings = Settings(database_url=database_url, link_keys=("k" * 32,), mark_outputs=("iptc",))
            generation = Generation(settings, service.db, service.intake, Links(settings.link_keys))
            made.append((await output(generation, service.intake, content, "iptc"))[1])

    async def work(service: Service, _tell: Any) -> None:
        await Marker(service.db, service.intake, None, at_once, says_nothing).handle(made[-1], 0)

    async def recover() -> None:
        async with serving(database_url) as service:
            file = await find_file_anywhere(service.db, made[-1])
            assert file is not None
            assert hashlib.sha256((mount / file.file_path).read_bytes()).digest() == file.sha256
            await work(service, None)
            await asyncio.to_thread(execute, database_url, "update uploads set expires_at = clock_timestamp()")
            await service.housekeeping.tidy()
            user = await get_user(service.db, "ada")
            assert (user.total_bytes, user.reserved_bytes) == (len(made) * marked_bytes, 0)

    marked_bytes = len(marked_with(content))
    step, came_to_its_end = 1 - EVERY, False
    while not came_to_its_end:
        step += EVERY
        asyncio.run(begin())
        came_to_its_end, _ = run_until(database_url, work, step)
        asyncio.run(recover())
    assert step > 20
    ended = execute(database_url, "select state, count(*) from generation_jobs group by state")
    assert [tuple(each) for each in ended] == [("completed", len(made))]
    marks = execute(database_url, "select distinct marking, marks from generated_media")
    assert [tuple(each) for each in marks] == [("marked", ["iptc"])]

    async def drifted() -> list[Any]:
        connection = await asyncpg.connect(database_url)
        try:
            return list(await drift(connection))
        finally:
            await connection.close()

    assert asyncio.run(drifted()) == []
    monkeypatch.setenv("DATABASE_URL", database_url)
    capfd.readouterr()
    cli.run(["audit", "--json"])
    assert {json.loads(line).get("kind") for line in capfd.readouterr().out.splitlines()} <= {None}


def marked_with(content: bytes) -> bytes:
    with io.BytesIO() as target:
        path = Path(f"/proc/self/fd/{os.memfd_create('content')}")
        path.write_bytes(content)
        with path.open("rb") as file:
            mime_type = "image/jpeg" if content.startswith(b"\xff") else "image/png"
            xmp.write(file, xmp.edits_of(file, mime_type), target)
        return target.getvalue()


# What it is signed with


@pytest.mark.parametrize(
    ("certificates", "key", "reason"),
    [
        ("", KEY, "C2PA_CERTIFICATES"),
        ("no certificate", KEY, "C2PA_CERTIFICATES"),
        (issue("another")[0], KEY, "not that of"),
        (CERTIFICATES + issue("another")[0], KEY, "issued by the next"),
        (CERTIFICATES + " " * 40_000, KEY, "characters"),
        (CERTIFICATES, "no key", "no private key"),
        (CERTIFICATES, ED25519, "P-256"),
    ],
    ids=["none", "no certificate", "of another key", "in no order", "too long", "no key", "of another kind"],
)
def test_what_cannot_sign_is_refused_at_the_start(certificates: str, key: str, reason: str) -> None:
    with pytest.raises(SettingError, match=reason) as refused:
        Credentials(certificates, key)
    assert KEY.splitlines()[1] not in str(refused.value)


def test_a_worker_without_a_key_does_not_start(running: RunningServer, marking: dict[str, Any], tmp_path: Path) -> None:
    for name in ("COFFER_C2PA_KEY", "COFFER_C2PA_CERTIFICATES"):
        others = {other: path for other, path in marking.items() if other != f"{name}_FILE"}
        with pytest.raises(SettingError, match=f"{name} is not set"):
            Settings.load({"DATABASE_URL": "postgresql://x@y/z"} | others)
    (tmp_path / "key.pem").write_text(issue("another")[1])
    worker = BackgroundWorker(running, tmp_path / "refused.log", marking)
    try:
        until(lambda: "is not that of COFFER_C2PA_KEY" in worker.log.read_text())
    finally:
        worker.kill()
