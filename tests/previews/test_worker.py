"""The worker's handling of one file, on a real database and a real volume, with a decoder that does what each test wants."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from server import ledger
from server.errors import VolumeFull
from server.ledger import Database, File
from server.ledger.queue import Retry
from server.previews.making import Made, MadeFile, Unmakeable, Wishes
from server.previews.on_demand import OnDemand
from server.previews.variants import Variant
from server.previews.worker import MOST_TRIES, PreviewWorker
from server.vault import Vault
from tests.ledger.races import waiting_for_lock
from tests.quota.rows import Connection, add_user, new_file
from tests.vault.test_previews import there
from tests.waiting import until

pytestmark = pytest.mark.anyio

Decode = Callable[[], Awaitable[None]]


class Bench:
    """One file of a user on a volume, and a worker whose decoder calls `decode` before it writes."""

    def __init__(self, db: Database, vault: Vault, mount: Path, file: File) -> None:
        self.db, self.vault, self.mount, self.file = db, vault, mount, file
        self.decode: Decode = _nothing
        on_demand = OnDemand(db, vault, self.make_variant, 1_000_000)
        self.worker = PreviewWorker(db, vault, self.make, on_demand, Wishes(), at_once=2)

    async def make(self, source: Path, mime_type: str, output: Path, wishes: Wishes) -> Made:
        picture = b"picture of " + source.read_bytes()
        await self.decode()
        (output / "320.webp").write_bytes(picture)
        return Made(files=[MadeFile(variant="320", name="320.webp", mime_type="image/webp", width=320, height=2)])

    async def make_variant(self, source: Path, mime_type: str, output: Path, variant: Variant) -> MadeFile:
        await self.decode()
        (output / variant.name).write_bytes(b"variant")
        return MadeFile(variant=variant.name, name=variant.name, mime_type="image/webp", width=1, height=1)

    async def handle(self, variant: str | None = None) -> None:
        await self.worker.handle(self.file.id, variant, 0, (0, 0))

    async def row(self) -> tuple[str | None, str | None]:
        now = await ledger.find_file_anywhere(self.db, self.file.id)
        assert now is not None
        return now.preview_state, now.preview_reason

    async def tries(self) -> int:
        now = await ledger.find_file_anywhere(self.db, self.file.id)
        assert now is not None
        return now.preview_tries

    async def replace(self, content: bytes) -> None:
        """The bytes of another generation, as an upload replaces them."""
        new = self.file.file_path.replace(".1.", ".2.")
        (self.mount / new).write_bytes(content)
        await self.db.write(
            "update user_files set sha256 = $2, file_path = $3, generation = 2, preview_state = 'pending', preview_tries = 0 where id = $1",
            *(self.file.id, content.ljust(32)[:32], new),
        )


async def _nothing() -> None:
    pass


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def bench(db: Database, sql: Connection, volume: Path) -> AsyncIterator[Bench]:
    await add_user(sql, "ada", None)
    vault = Vault(0)
    rows = await ledger.list_volumes(db)
    await vault.refresh(rows)
    file_id = uuid4()
    path = f"users/ada/images/{file_id}.1.png"
    (volume / path).parent.mkdir(parents=True)
    (volume / path).write_bytes(b"old")
    file = await ledger.publish_file(db, new_file("ada", 3, id=file_id, file_path=path, volume_id=rows[0].id))
    yield Bench(db, vault, volume, file)
    vault.close()


async def test_what_is_made_is_stored_and_said(bench: Bench) -> None:
    await bench.handle()
    assert (await bench.row(), await bench.tries()) == (("ready", None), 1)
    assert there(bench.mount, f"users/ada/previews/{bench.file.id}") == {"320.webp": b"picture of old"}


@pytest.mark.parametrize("problem", [VolumeFull(), OSError(errno.ENOSPC, "no space"), OSError(errno.EMFILE, "too many open files")])
async def test_what_is_not_the_files_fault_is_no_try_however_often(bench: Bench, problem: Exception) -> None:
    async def fail() -> None:
        raise problem

    bench.decode = fail
    for _ in range(MOST_TRIES + 2):
        with pytest.raises(Retry):
            await bench.handle()
    assert (await bench.row(), await bench.tries()) == (("pending", None), 1)
    bench.decode = _nothing
    await bench.handle()
    assert await bench.row() == ("ready", None)


async def test_what_may_be_the_files_fault_is_tried_three_times(bench: Bench) -> None:
    async def fail() -> None:
        raise OSError(errno.ELOOP, "a link where a picture should be")

    bench.decode = fail
    for _ in range(MOST_TRIES - 1):
        with pytest.raises(Retry):
            await bench.handle()
    assert await bench.row() == ("pending", None)
    with pytest.raises(OSError):
        await bench.handle()
    assert await bench.row() == ("failed", "error")


async def test_a_file_that_fails_loses_the_previews_that_it_had(bench: Bench) -> None:
    """Those of before its rebuilding: their rows go, and nobody would look for their bytes."""
    await bench.handle()
    await ledger.rebuild_previews(bench.db, None, None, 10)

    async def fail() -> None:
        raise RuntimeError

    bench.decode = fail
    for expected in (Retry, Retry, RuntimeError):
        with pytest.raises(expected):
            await bench.handle()
    assert await bench.row() == ("failed", "error")
    assert list((bench.mount / "users/ada/previews").iterdir()) == []


async def test_a_path_changed_by_hand_ends_as_a_failure(bench: Bench, sql: Connection) -> None:
    await sql.execute("update user_files set file_path = replace(file_path, 'users/ada/', 'users/../')")
    for expected in (Retry, Retry, ValueError):
        with pytest.raises(expected):
            await bench.handle()
    assert await bench.row() == ("failed", "error")


async def test_a_worker_that_is_stopped_forgives_what_it_has_in_hand_once(bench: Bench) -> None:
    """So that whoever kills it after all, deploy after deploy, leaves no file that has `crashed`."""
    begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        await may_go_on.wait()
        raise VolumeFull

    bench.decode = wait
    await ledger.begin_preview(bench.db, bench.file)
    under_way = asyncio.create_task(bench.handle())
    await asyncio.wait_for(begun.wait(), 10)
    assert await bench.tries() == 2
    bench.worker.stop()
    for _ in range(2):
        await bench.worker.forgive()
        assert await bench.tries() == 1
    may_go_on.set()
    with pytest.raises(Retry):
        await under_way
    assert await bench.tries() == 1


async def test_who_gives_up_on_bytes_that_were_replaced_harms_no_preview_of_the_new(bench: Bench) -> None:
    """It took its time; another worker has made those of the new bytes meanwhile, which go when it removes what it has no preview of."""

    async def replaced() -> None:
        bench.decode = _nothing
        await bench.replace(b"new")
        other = Bench(bench.db, bench.vault, bench.mount, bench.file)
        await other.handle()
        assert await bench.row() == ("ready", None)
        raise Unmakeable("damaged")

    bench.decode = replaced
    await bench.handle()
    assert await bench.row() == ("ready", None)
    assert there(bench.mount, f"users/ada/previews/{bench.file.id}") == {"320.webp": b"picture of new"}


@pytest.mark.parametrize("variant", [None, "240x-contain-q80.webp"])
async def test_previews_stored_after_their_user_was_erased_leave_not_even_a_name(
    bench: Bench, sql: Connection, variant: str | None
) -> None:
    if variant is not None:
        await bench.handle()

    async def erase() -> None:
        await sql.execute("delete from user_files")
        await sql.execute("delete from tombstones")
        bench.vault.volumes[0].remove_user("ada")

    bench.decode = erase
    await bench.handle(variant)
    assert list((bench.mount / "users").iterdir()) == []


async def test_making_room_for_a_variant_and_deleting_files_do_not_lock_each_other_out(bench: Bench, sql: Connection, db: Database) -> None:
    """Whoever changes previews of several files locks their user before: else one of the two would be undone a second later."""
    await bench.handle()
    other = await ledger.publish_file(db, new_file("ada", 1, volume_id=bench.file.volume_id))
    variant = ledger.PreviewRow(variant="x", file_name="x", mime_type="image/webp", width=1, height=1, size_bytes=10)
    assert await ledger.add_variant(db, other, variant, 100) == []
    async with sql.transaction():
        await sql.execute("select from user_storage where user_id = 'ada' for update")
        deleting = asyncio.create_task(db.write("delete from user_files where id = $1", other.id))
        await waiting_for_lock(sql)
        adding = asyncio.create_task(ledger.add_variant(db, bench.file, variant, 0))
        await waiting_for_lock(sql, 2)
    await asyncio.gather(deleting, adding)
    assert await sql.fetchval("select deadlocks from pg_stat_database where datname = current_database()") == 0


async def test_making_room_waits_for_nobody_who_is_at_a_preview(bench: Bench, sql: Connection, db: Database) -> None:
    """Its file is being deleted, or its previews made: then its user is waited for there, and is ours."""
    variant = ledger.PreviewRow(variant="x", file_name="x", mime_type="image/webp", width=1, height=1, size_bytes=10)
    one, two = [await ledger.publish_file(db, new_file("ada", 1, volume_id=bench.file.volume_id)) for _ in range(2)]
    for other in (one, two):
        assert await ledger.add_variant(db, other, variant, 100) == []
    async with sql.transaction():
        await sql.execute("select from previews where file_id = $1 for update", one.id)
        went = await asyncio.wait_for(ledger.add_variant(db, bench.file, variant, 10), 10)
        assert went is not None and [each.file_id for each in went] == [two.id]
    went = await ledger.add_variant(db, bench.file, variant, 10)
    assert went is not None and [each.file_id for each in went] == [one.id]


async def test_whoever_was_tried_before_is_tried_alone(bench: Bench, sql: Connection, db: Database) -> None:
    """So that a file that takes the worker along with it takes no other's tries."""
    at_work: list[str] = []
    begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        at_work.append("one more")
        begun.set()
        await may_go_on.wait()
        at_work.pop()

    bench.decode = work
    path = f"users/ada/images/{(other := uuid4())}.1.png"
    (bench.mount / path).write_bytes(b"other")
    file = await ledger.publish_file(db, new_file("ada", 5, id=other, file_path=path, volume_id=bench.file.volume_id))
    await ledger.begin_preview(db, file)
    first = asyncio.create_task(bench.handle())
    await asyncio.wait_for(begun.wait(), 10)
    second = asyncio.create_task(bench.worker.handle(other, None, 0, (0, 0)))
    await asyncio.to_thread(until, lambda: bench.worker._room._waiting_alone or len(at_work) != 1)
    assert len(at_work) == 1
    may_go_on.set()
    await asyncio.wait_for(asyncio.gather(first, second), 10)
    assert [row[0] for row in await sql.fetch("select preview_state from user_files")] == ["ready", "ready"]
