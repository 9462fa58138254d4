"""What the worker finds out about linked assets, and how it imports them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import UUID

import pytest

from server import ledger
from server.assets import AssetWorker, link, relink
from server.errors import InvalidRequest, NotFound, UrlRefused
from server.fetching import Fetcher, Rules
from server.fetching.rules import Address
from server.intake import Details, Intake
from server.ledger import Asset, Database, WorkCounts
from server.settings import Settings
from server.vault import Vault
from tests.fetching.peer import Asked, Authority, Peer, Say, always, head, listening, ranged
from tests.samples import image
from tests.waiting import eventually, until

pytestmark = pytest.mark.anyio

OUTSIDE = "127.0.0.2"
RULES = Rules(private_networks=(ip_network(f"{OUTSIDE}/32"),))
BODY = image(2_000_000)


@pytest.fixture
def counts() -> WorkCounts:
    return WorkCounts()


@pytest.fixture
async def worker(database_url: str, db: Database, volume: Path, counts: WorkCounts) -> AsyncIterator[AssetWorker]:
    vault = Vault(0)
    await vault.refresh(await ledger.list_volumes(db))
    intake = Intake(Settings(database_url=database_url, fetch_seconds=30), db, vault)
    await intake.placed("ada")
    made = AssetWorker(db, Fetcher(RULES), intake, counts)
    yield made
    await made.stop()
    vault.close()


async def linked(db: Database, url: str, details: Details = Details()) -> Asset:  # noqa: B008 - it is frozen
    return await link(db, RULES, "ada", url, details)


async def looked_at(worker: AssetWorker, db: Database, asset_id: UUID) -> Asset:
    """The asset once nothing is due for it."""

    async def look() -> Asset:
        await worker.look()
        return await ledger.get_asset(db, "ada", asset_id)

    return await eventually(look, lambda asset: asset.state != "unchecked" and asset.import_state != "pending")


async def check_again(db: Database, worker: AssetWorker, asset_id: UUID) -> Asset:
    await db.write("update linked_assets set check_at = clock_timestamp(), state = 'unchecked' where id = $1", asset_id)
    return await looked_at(worker, db, asset_id)


async def wait_hours(db: Database, asset_id: UUID) -> float:
    """Until the next look, in hours."""
    (row,) = await db.read(
        "select extract(epoch from check_at - clock_timestamp())::float8 as s from linked_assets where id = $1", asset_id
    )
    return float(row["s"]) / 3_600


async def test_a_badge_follows_what_is_found(worker: AssetWorker, db: Database, counts: WorkCounts) -> None:
    answering = always(206, b"x", content_type="image/png; charset=x", content_range="bytes 0-0/2000000")

    async def changing(asked: Asked, say: Say) -> None:
        await answering(asked, say)

    async with Peer(changing, OUTSIDE) as peer:
        asset = await looked_at(worker, db, (await linked(db, f"{peer.url}/a.png")).id)
        assert (asset.state, asset.reason, asset.mime_type, asset.size_bytes) == ("reachable", None, "image/png", 2_000_000)
        assert peer.asked[0].headers["range"] == "bytes=0-0"
        assert await wait_hours(db, asset.id) == pytest.approx(24)
        answering = always(404)
        for failures, hours in ((1, 1 / 12), (2, 1 / 6), (3, 1 / 3)):
            lost = await check_again(db, worker, asset.id)
            assert (lost.state, lost.reason, lost.failures, lost.size_bytes) == ("unreachable", "status_404", failures, 2_000_000)
            assert await wait_hours(db, asset.id) == pytest.approx(hours, rel=0.01)
            assert lost.last_reachable_at == asset.last_reachable_at
        answering = always(200, b"whole", content_type="image/png")
        found = await check_again(db, worker, asset.id)
        assert (found.state, found.reason, found.failures, found.size_bytes) == ("reachable", None, 0, 5)
    assert counts.take() == {("asset_check", "reachable"): 2, ("asset_check", "unreachable"): 3}


async def test_internal_addresses_are_unreachable_and_untouched(worker: AssetWorker, db: Database) -> None:
    async with listening("127.0.0.1", "::1") as (port, internal), Peer(always(302, location=f"http://localhost:{port}/"), OUTSIDE) as peer:
        for url in (f"http://localhost:{port}/", peer.url):
            asset = await linked(db, url)
            assert (await ledger.ask_for_asset_import(db, "ada", asset.id, None)).import_state == "pending"
            found = await looked_at(worker, db, asset.id)
            assert (found.state, found.reason, found.import_state, found.import_reason) == (
                "unreachable",
                "refused",
                "failed",
                "url_refused",
            )
        assert [each.connections for each in internal] == [0, 0]
        for url in (f"http://127.0.0.1:{port}/", f"http://[::1]:{port}/", f"http://2130706433:{port}/"):
            with pytest.raises(UrlRefused):
                await linked(db, url)


async def test_an_import_is_a_file_once(worker: AssetWorker, db: Database) -> None:
    async with Peer(ranged(BODY), OUTSIDE) as peer:
        asset = await linked(db, f"{peer.url}/scene.png", Details(tags=["sea"]))
        await ledger.ask_for_asset_import(db, "ada", asset.id, None)
        done = await looked_at(worker, db, asset.id)
        assert done.import_state == "done" and done.file_id is not None
        file = await ledger.get_file(db, "ada", done.file_id)
        assert (file.file_name, file.tags, file.sha256) == ("scene.png", ["sea"], hashlib.sha256(BODY).digest())
        # Its worker died before it could say so, and another one begins anew.
        await db.write("update linked_assets set import_state = 'pending', import_at = clock_timestamp(), file_id = null")
        assert (await looked_at(worker, db, asset.id)).file_id == file.id
        assert (await ledger.ask_for_asset_import(db, "ada", asset.id, None)).import_state == "done"
        assert (await ledger.get_user(db, "ada")).file_count == 1
        assert (await db.read("select count(*) from linked_assets where check_at is not null"))[0]["count"] == 0
        await ledger.delete_asset(db, "ada", asset.id)
        assert (await ledger.get_file(db, "ada", file.id)).id == file.id


async def test_an_import_of_an_asset_that_was_replaced_is_not_taken_for_the_new_one(worker: AssetWorker, db: Database) -> None:
    held = asyncio.Event()
    other = image(1_000, seed=2)

    async def answer(asked: Asked, say: Say) -> None:
        if asked.path == "/old":
            await held.wait()
        await ranged(BODY if asked.path == "/old" else other)(asked, say)

    async with Peer(answer, OUTSIDE) as peer:
        asset = await linked(db, f"{peer.url}/old")
        await ledger.ask_for_asset_import(db, "ada", asset.id, None)
        await worker.look()
        replaced = await relink(db, RULES, "ada", asset.id, f"{peer.url}/new")
        assert (replaced.state, replaced.import_state, replaced.version) == ("unchecked", None, 2)
        await db.write("update linked_assets set import_state = 'pending'")  # and not due before the old one has ended
        held.set()
        await eventually(lambda: ledger.get_user(db, "ada"), lambda user: user.file_count)
        await worker.stop()
        assert (await ledger.get_asset(db, "ada", asset.id)).import_state == "pending"
        await db.write("update linked_assets set import_at = clock_timestamp()")
        done = await looked_at(worker, db, asset.id)
        assert done.file_id is not None and (await ledger.get_file(db, "ada", done.file_id)).file_size == 1_000


async def test_why_an_import_fails_is_told_and_it_can_be_tried_again(worker: AssetWorker, db: Database) -> None:
    answering = always(200, b"<html>", content_type="image/png")

    async def changing(asked: Asked, say: Say) -> None:
        await answering(asked, say)

    async with Peer(changing, OUTSIDE) as peer:
        asset = await linked(db, peer.url)
        for each, kinds, reason in (
            (answering, None, "unsupported_type"),
            (always(404), None, "status_404"),
            (always(200, BODY, content_encoding="gzip"), None, "encoded"),
            (ranged(BODY), ["video"], "unsupported_type"),
            (ranged(BODY), None, "quota_exceeded"),
        ):
            answering = each
            await ledger.set_quota(db, "ada", 1_000 if reason == "quota_exceeded" else None)
            await ledger.ask_for_asset_import(db, "ada", asset.id, kinds)
            failed = await looked_at(worker, db, asset.id)
            assert (failed.import_state, failed.import_reason) == ("failed", reason)
        await ledger.set_quota(db, "ada", None)
        await ledger.ask_for_asset_import(db, "ada", asset.id, None)
        assert (await looked_at(worker, db, asset.id)).import_state == "done"


async def test_an_import_cut_off_by_a_stop_goes_on_with_the_next_worker(worker: AssetWorker, db: Database, volume: Path) -> None:
    released = asyncio.Event()

    async def hanging(asked: Asked, say: Say) -> None:
        if len(peer.asked) == 1:
            await say(head(200, content_length=len(BODY)) + BODY[:1_500_000])
            await released.wait()
        await ranged(BODY)(asked, say)

    async with Peer(hanging, OUTSIDE) as peer:
        asset = await linked(db, peer.url)
        await db.write("update linked_assets set check_at = null")
        await ledger.ask_for_asset_import(db, "ada", asset.id, None)
        stopped = AssetWorker(db, Fetcher(RULES), worker._intake)
        await stopped.look()
        await asyncio.to_thread(until, lambda: list((volume / "incoming").iterdir()))
        await stopped.stop()
        released.set()
        assert not list((volume / "incoming").iterdir())
        assert (await ledger.get_user(db, "ada")).reserved_bytes == 0
        await db.write("update linked_assets set state = 'reachable'")
        assert (await looked_at(worker, db, asset.id)).import_state == "done"


async def test_a_drive_file_that_is_not_shared_is_told_by_its_page(
    worker: AssetWorker, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drive itself, as far as its name, certificate and addresses go: port 443 of an address that this test stands in for.
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))

    async def resolve(host: str, port: int) -> list[Address]:
        assert host == "drive.usercontent.google.com"
        return [ip_address(OUTSIDE)]

    context = authority.server("drive.usercontent.google.com")
    async with Peer(always(200, b"Sign in", content_type="text/html; charset=utf-8"), OUTSIDE, 443, context) as peer:
        asking = AssetWorker(db, Fetcher(RULES, resolve=resolve), worker._intake)
        asset = await linked(db, "https://drive.google.com/file/d/1A2b3C4d5E6f7G8h9I0jKlMnOpQrStUvW/view?usp=sharing")
        found = await looked_at(asking, db, asset.id)
        assert (found.state, found.reason) == ("unreachable", "not_shared")
        assert peer.asked[0].path.startswith("/download?id=1A2b3C4d5E6f7G8h9I0jKlMnOpQrStUvW")
        peer.answering = always(206, b"x", content_type="image/png", content_range="bytes 0-0/5")
        assert (await check_again(db, asking, asset.id)).state == "reachable"
        await asking.stop()


async def test_a_user_has_so_many_and_others_see_none_of_them(worker: AssetWorker, db: Database) -> None:
    asset = await linked(db, f"http://{OUTSIDE}:8000/a")
    with pytest.raises(NotFound):
        await ledger.get_asset(db, "bob", asset.id)
    await db.write(
        """insert into linked_assets (id, user_id, url, fetch_url, details, check_at)
           select gen_random_uuid(), 'ada', 'https://a.example/', 'https://a.example/', '{}', null from generate_series(2, 10000)"""
    )
    with pytest.raises(InvalidRequest):
        await linked(db, f"http://{OUTSIDE}:8000/b")
