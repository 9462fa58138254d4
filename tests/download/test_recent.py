"""Links that were answered a moment ago: what is remembered of them, and how it ends."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from server import ledger
from server.delivery import Answer, Body, RecentLinks, recent
from server.delivery.recent import KEPT_SECONDS
from server.vault.volume import Handle
from tests.download.here import serving_here, settings_of
from tests.processes import open_below
from tests.samples import image
from tests.serving import RunningServer, ServerFactory
from tests.waiting import until

LATER = 4_000_000_000
BODY = image(100_000)

pytestmark = pytest.mark.anyio


class Kept:
    """A file, and what was remembered of it at the moment 100."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.recent = RecentLinks(lambda: self.now)
        path.write_bytes(b"bytes")

    def keep(self, path: str = "/f/link", *, expires_at: int = LATER, status: int = 200, original: Path | None = None) -> None:
        file = Handle(os.open(self.path, os.O_RDONLY))
        headers = [("etag", '"x"'), ("cache-control", "old"), ("content-length", "5")]
        body = Body(file, 0, 5, b"", UUID(int=7), "path")
        hangs_on = Handle(os.open(original, os.O_RDONLY)) if original else None
        answer = Answer(status, headers, body)
        self.recent.keep(path, answer, asked_at=self.now, expires_at=expires_at, cache_control=lambda: f"at {self.now}", original=hangs_on)

    def find(self, path: str = "/f/link") -> Answer | None:
        found = self.recent.find(path)
        return None if found is None else found.answer()

    def open_files(self) -> int:
        return open_below(self.path.parent).count(str(self.path))


@pytest.fixture
async def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "file")


async def test_the_same_answer_again(kept: Kept) -> None:
    kept.keep()
    answer = kept.find()
    assert answer is not None and answer.body is not None
    assert (answer.status, answer.body.offset, answer.body.length) == (200, 0, 5)
    assert answer.headers == [("etag", '"x"'), ("cache-control", "at 100.0"), ("content-length", "5")]
    answer.body.close()
    assert kept.find() is not None, "one answer's end is not the other's"
    assert kept.find("/f/Link") is None


async def test_it_ends_a_second_after_the_row_was_asked(kept: Kept) -> None:
    kept.keep()
    kept.now += KEPT_SECONDS - 0.001
    assert kept.find() is not None
    kept.now += 0.001
    assert kept.find() is None
    assert kept.open_files() == 0


async def test_it_ends_with_the_link(kept: Kept) -> None:
    kept.keep(expires_at=1)
    assert kept.find() is None


@pytest.mark.parametrize("change", ["unlink", "rename", "replace", "second name", "truncate"])
async def test_it_ends_when_the_file_changes(kept: Kept, change: str) -> None:
    """By whomever: nobody tells us."""
    kept.keep()
    other = kept.path.with_name("other")
    match change:
        case "unlink":
            kept.path.unlink()
        case "rename":
            kept.path.rename(other)
        case "replace":
            other.write_bytes(b"other")
            other.rename(kept.path)
        case "second name":
            other.hardlink_to(kept.path)
        case "truncate":
            os.truncate(kept.path, 4)
    assert kept.find() is None


async def test_a_preview_ends_with_its_original(kept: Kept) -> None:
    original = kept.path.with_name("original")
    original.write_bytes(b"the original")
    kept.keep(original=original)
    answer = kept.find()
    assert answer is not None and answer.body is not None and answer.body.length == 5
    original.rename(kept.path.with_name("next generation"))
    assert kept.find() is None
    kept.keep(original=kept.path.with_name("next generation"))
    assert kept.find() is not None
    kept.path.unlink()
    assert kept.find() is None


@pytest.mark.parametrize("status", [206, 304])
async def test_only_whole_files_are_remembered(kept: Kept, status: int) -> None:
    kept.keep(status=status)
    assert kept.find() is None and kept.open_files() == 0
    kept.recent.keep("/f/link", Answer(200, [], None), asked_at=kept.now, expires_at=LATER, cache_control=str)
    assert kept.find() is None


async def test_all_can_be_forgotten(kept: Kept) -> None:
    kept.keep()
    kept.recent.clear()
    assert kept.find() is None and kept.open_files() == 0
    kept.keep()
    assert kept.find() is None, "its row was asked before"
    kept.now += 0.001
    kept.keep()
    assert kept.find() is not None


async def test_what_nobody_asks_for_again_is_closed(tmp_path: Path) -> None:
    """By the real clock: an open file would keep a deleted one's space, and its volume mounted."""
    kept = Kept(tmp_path / "file")
    kept.recent = RecentLinks()
    kept.now = kept.recent.now()
    kept.keep()
    assert kept.open_files() == 1
    await asyncio.to_thread(until, lambda: not kept.open_files())


async def test_few_files_are_kept_open(kept: Kept) -> None:
    for number in range(1_100):
        kept.keep(str(number))
    assert kept.open_files() == 1_024
    assert kept.find("75") is None and kept.find("76") is not None
    kept.recent.clear()


# With a server


@pytest.fixture
def browser(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def linked(client: httpx.Client, body: bytes = BODY) -> tuple[str, str]:
    file_id = client.post("/api/files/upload", content=body).json()["id"]
    return file_id, client.post(f"/api/files/{file_id}/link").json()["url"]


def test_what_just_worked_ends_at_once(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        ends: tuple[Callable[[str], httpx.Response], ...] = (
            lambda file_id: ada.delete(f"/api/files/{file_id}"),
            lambda file_id: ada.put(f"/api/files/{file_id}/content", content=image(5_000, seed=3)),
            lambda file_id: ada.post(f"/api/files/{file_id}/revoke-links"),
            lambda _: ada.post("/api/links/revoke"),
        )
        for end in ends:
            file_id, url = linked(ada)
            for _ in range(3):
                assert browser.get(url).content == BODY
            assert end(file_id).is_success
            assert browser.get(url).status_code == 404
        file_id, url = linked(ada)
        assert browser.get(url).content == BODY
        with server.client() as admin:
            assert admin.delete("/api/users/ada").is_success
        assert browser.get(url).status_code == 404


def test_another_process_revokes(server: RunningServer, browser: httpx.Client, tmp_path: Path) -> None:
    """A file's links at once, a user's within a second (P4)."""
    other = RunningServer(server.database_url, server.volume, tmp_path / "other.log", server.api_key, {})
    other.start()
    try:
        with other.client("ada") as ada:
            file_id, url = linked(ada)
            assert browser.get(url).content == BODY
            assert ada.post(f"/api/files/{file_id}/revoke-links").status_code == 200
            assert browser.get(url).status_code == 404
            _, url = linked(ada)
            assert browser.get(url).content == BODY
            assert ada.post("/api/links/revoke").status_code == 204
            until(lambda: browser.get(url).status_code == 404)
    finally:
        other.kill()


def test_a_public_file_is_remembered_and_ends(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as a test takes, so that what ends it is not the second's end."""
    monkeypatch.setattr(recent, "KEPT_SECONDS", 1_000.0)
    asked = []
    get_public_file = ledger.get_public_file

    async def counted(db: ledger.Database, public_id: str) -> ledger.File:
        asked.append(public_id)
        return await get_public_file(db, public_id)

    monkeypatch.setattr(ledger, "get_public_file", counted)
    with serving_here(settings_of(server)) as here, server.client("ada") as elsewhere:
        url = f"http://127.0.0.1:{here.port}"
        with httpx.Client(base_url=url, headers=elsewhere.headers) as ada, httpx.Client(base_url=url) as browser:
            file_id, _ = linked(elsewhere)

            def public(is_public: bool) -> str:
                answer = ada.put(f"/api/files/{file_id}/public", json={"is_public": is_public})
                assert answer.status_code == 200, answer.text
                return str(answer.json()["url"])

            path = public(True)
            answers = [browser.get(path) for _ in range(3)]
            assert [answer.content for answer in answers] == [BODY] * 3 and len(asked) == 1
            told = [{name: value for name, value in answer.headers.items() if name not in {"date", "x-request-id"}} for answer in answers]
            assert told[0] == told[1] == told[2] and "max-age=300" in told[0]["cache-control"]
            assert browser.get(path, headers={"Range": "bytes=-3"}).content == BODY[-3:]
            assert browser.head(path).content == b""
            assert browser.get(f"/f/{path.removeprefix('/p/')}").status_code == 403  # it is no link
            public(False)
            assert browser.get(path).status_code == 404
            path = public(True)
            assert [browser.get(path).status_code for _ in range(2)] == [200, 200]
            assert elsewhere.delete(f"/api/files/{file_id}").status_code == 204  # another process
            assert browser.get(path).status_code == 404


def test_one_link_never_gives_what_another_does(server: RunningServer, browser: httpx.Client) -> None:
    with server.client("ada") as ada:
        file_id, url = linked(ada)
        saved = ada.post(f"/api/files/{file_id}/link", json={"disposition": "attachment", "name": "x.png"}).json()["url"]
        for _ in range(2):
            assert browser.get(url).headers["content-disposition"].startswith("inline")
            assert browser.get(saved).headers["content-disposition"].startswith("attachment")
            assert browser.get(f"{url}?x").status_code == 403
            assert browser.get(url[:-1]).status_code == 403
            assert browser.post(url).status_code == 405
            assert browser.get(url, headers={"If-None-Match": "*"}).status_code == 304
            assert browser.get(url, headers={"Range": "bytes=-3"}).content == BODY[-3:]
            assert browser.head(url).content == b""


def test_reads_that_are_recorded_are_all_recorded(start_server: ServerFactory) -> None:
    server = start_server(COFFER_AUDIT_READS="true")
    with server.client("ada") as ada, httpx.Client(base_url=server.url) as browser:
        file_id, url = linked(ada)
        for _ in range(3):
            assert browser.get(url).content == BODY
        with server.client() as admin:
            records = admin.get("/api/audit", params={"file": file_id}).json()["records"]
    assert [each["action"] for each in records].count("file.downloaded") == 3
