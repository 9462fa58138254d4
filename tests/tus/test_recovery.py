"""A process that dies at any step of a resumable upload, a database that goes away, a disk that fills up: nothing acknowledged is lost."""

import asyncio
import hashlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from ops.embedded_postgres import EmbeddedPostgres
from server.errors import NotFound, OffsetMismatch, UploadExpired, VolumeFull
from server.intake import Details
from server.ledger import add_volume
from server.vault.sentinel import init_volume
from tests.launching import Executed
from tests.quota.rows import drift
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute, new_server
from tests.tus.crashes import Service, Tell, Work, run_until, serving
from tests.tus.persistent import PersistentUpload
from tests.tus.speaking import PIECE, create, offset, patch
from tests.waiting import until

BODY = image(1_600_000)
HALF = 800_000


@pytest.fixture
def mount(database_url: str, tmp_path: Path) -> Path:
    mount = tmp_path / "volume"
    mount.mkdir()

    async def add() -> None:
        async with serving(database_url) as service:
            await add_volume(service.db, init_volume(mount), str(mount))

    asyncio.run(add())
    return mount


# What a client does: it keeps what it was told, and goes on from there


async def begun(service: Service, length: int | None = len(BODY), **how: Any) -> UUID:
    made = await service.uploads.create("ada", length_bytes=length, upload_metadata="", details=Details(), kinds=None, **how)
    return made.id


async def sent(service: Service, upload_id: UUID, body: bytes, to: int, tell: Tell, *, checked: bool = False) -> None:
    """Everything from where the upload is up to `to`, in batches."""
    async with service.uploads.writing("ada", upload_id, is_checked=checked) as writer:
        for at in range(writer.received_bytes, to, 300_000):
            await writer.write(body[at : min(at + 300_000, to)])
        if checked:
            await writer.keep()
        if writer.is_whole and not writer.upload.is_partial:
            await writer.finish_upload()
    tell(f"{upload_id} {writer.seen.offset_bytes}")


async def upload(service: Service, tell: Tell) -> None:
    upload_id = await begun(service)
    tell(f"{upload_id} 0")
    await sent(service, upload_id, BODY, HALF, tell)
    await sent(service, upload_id, BODY, len(BODY), tell)


async def upload_checked(service: Service, tell: Tell) -> None:
    upload_id = await begun(service)
    tell(f"{upload_id} 0")
    await sent(service, upload_id, BODY, HALF, tell, checked=True)
    async with service.uploads.writing("ada", upload_id, is_checked=True) as writer:
        await writer.write(image(600_000, seed=5))
        await writer.take_back()
    await sent(service, upload_id, BODY, len(BODY), tell, checked=True)


async def join(service: Service, tell: Tell) -> None:
    parts = []
    for body in (BODY[:HALF], BODY[HALF:]):
        parts.append(await begun(service, len(body), is_partial=True))
        tell(f"{parts[-1]} 0")
        await sent(service, parts[-1], body, len(body), tell)
    made = await service.uploads.join("ada", parts, upload_metadata="", details=Details(), kinds=None)
    tell(f"{made.id} {made.offset_bytes}")


async def give_up(service: Service, tell: Tell) -> None:
    upload_id = await begun(service)
    tell(f"{upload_id} 0")
    await sent(service, upload_id, BODY, HALF, tell)
    await service.uploads.end("ada", upload_id)
    tell("ended")


def each_crash(
    database_url: str,
    mount: Path,
    work: Work,
    recover: Callable[[Service, list[str]], Awaitable[None]],
    every: int,
    *,
    is_power_cut: bool = False,
) -> int:
    """Kills the work at its first step and each `every` after it, recovers, and looks that all is as it must be. Returns how many steps."""
    step = 1
    while True:
        came_to_its_end, told = run_until(database_url, work, step)
        # Else one would wait for it: that the lease ends by itself is another test's.
        execute(database_url, "update resumable_uploads set held_until = clock_timestamp() where held_by is not null")
        if is_power_cut:
            _cut_power(database_url, mount)

        async def recovered() -> None:
            async with serving(database_url) as service:
                await recover(service, told)  # noqa: B023
                await look_around(service, database_url, mount)

        try:
            asyncio.run(recovered())
        except BaseException as problem:
            problem.add_note(f"after a crash at step {step}")
            raise
        if came_to_its_end:
            return step
        step += every


def _cut_power(database_url: str, mount: Path) -> None:
    """What was not synced is not what was written."""
    execute(database_url, "update resumable_uploads set boot_id = 'an earlier one'")
    _lose_what_was_not_recorded(database_url, mount)


def _lose_what_was_not_recorded(database_url: str, mount: Path) -> None:
    for row in execute(database_url, "select incoming_name, offset_bytes from resumable_uploads"):
        path = mount / "incoming" / str(row["incoming_name"])
        if path.exists() and path.stat().st_size > row["offset_bytes"]:
            lost = path.stat().st_size - row["offset_bytes"]
            with path.open("r+b") as file:
                file.seek(row["offset_bytes"])
                file.write(bytes(lost))


async def look_around(service: Service, database_url: str, mount: Path) -> None:
    """Quota is that of the rows, rows have their files and files their rows, and nothing is left in incoming/ when all is over."""
    connection = await asyncpg.connect(database_url)
    try:
        rows = {row["file_path"]: row["sha256"].hex() for row in await connection.fetch("select file_path, sha256 from user_files")}
        stored = {str(path.relative_to(mount)): _sha256(path) for path in (mount / "users").glob("*/*/*") if path.is_file()}
        assert stored == rows
        assert await connection.fetchval("select coalesce(sum(reserved_bytes), 0)::bigint from user_storage") == 0
        assert await drift(connection) == []
        await connection.execute("delete from user_files")
        for path in (mount / "incoming").iterdir():
            os.utime(path, (time.time() - 3_600,) * 2)
        await service.housekeeping.tidy()
        assert list((mount / "incoming").iterdir()) == []
        assert [path for path in (mount / "users").glob("*/*/*") if path.is_file()] == []
        assert await drift(connection) == []
    finally:
        await connection.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unheard(_: object) -> None:
    """In place of a client that is told."""


async def go_on(service: Service, told: list[str]) -> None:
    """As the client does: whatever was acknowledged is not asked for again."""
    if not told:  # the answer to the creation was lost: the upload is nobody's, and expires
        await _expire(service)
        return
    upload_id, offset = told[-1].split()
    seen = await service.uploads.look("ada", UUID(upload_id))
    assert seen.offset_bytes >= int(offset), f"{offset} bytes were acknowledged, and now {seen.offset_bytes}"
    if not seen.is_finished:
        await sent(service, UUID(upload_id), BODY, len(BODY), _unheard)
        seen = await service.uploads.look("ada", UUID(upload_id))
    assert seen.is_finished
    (row,) = await service.db.read("select sha256, file_size from user_files")
    assert row["sha256"] == hashlib.sha256(BODY).digest() and row["file_size"] == len(BODY)


async def join_again(service: Service, told: list[str]) -> None:
    by_id = dict(line.split() for line in told)
    parts = [UUID(each) for each in list(by_id)[:2]]
    for part, body in zip(parts, (BODY[:HALF], BODY[HALF:]), strict=False):
        try:
            seen = await service.uploads.look("ada", part)
        except NotFound:  # they end once they are joined
            assert len(by_id) >= 2
            continue
        assert seen.offset_bytes >= int(by_id[str(part)])
        if seen.offset_bytes < len(body):
            await sent(service, part, body, len(body), _unheard)
    if len(parts) < 2:
        await _expire(service)
        return
    made = await service.uploads.join("ada", parts, upload_metadata="", details=Details(), kinds=None)
    assert made.is_finished
    assert await service.uploads.join("ada", parts, upload_metadata="", details=Details(), kinds=None) == made
    (row,) = await service.db.read("select sha256 from user_files")
    assert row["sha256"] == hashlib.sha256(BODY).digest()


async def end_again(service: Service, told: list[str]) -> None:
    if told and told[-1] != "ended":
        with suppress(NotFound):
            await service.uploads.end("ada", UUID(told[-1].split()[0]))
    else:
        await _expire(service)
    assert await service.db.read("select from resumable_uploads") == []


async def _expire(service: Service) -> None:
    for table in ("uploads", "resumable_uploads"):
        await service.db.write(f"update {table} set expires_at = clock_timestamp() - interval '8 days'")
    await service.housekeeping.tidy()


# The whole of each is in `make torture`: odd numbers, so that steps before and after a call take turns.


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("work", [upload, upload_checked])
def test_an_upload_survives_a_crash_at_any_step(database_url: str, mount: Path, work: Work, power_cut: bool) -> None:
    assert each_crash(database_url, mount, work, go_on, 9, is_power_cut=power_cut) > 50


def test_a_joined_upload_survives_a_crash_at_any_step(database_url: str, mount: Path) -> None:
    assert each_crash(database_url, mount, join, join_again, 11) > 80


def test_an_end_survives_a_crash_at_any_step(database_url: str, mount: Path) -> None:
    assert each_crash(database_url, mount, give_up, end_again, 9) > 20


def test_a_disk_that_fills_up_keeps_what_it_took(database_url: str, mount: Path) -> None:
    async def run() -> None:
        async with serving(database_url) as service:
            upload_id = await begun(service)
            (volume,) = service.vault.volumes
            with pytest.raises(VolumeFull):
                async with service.uploads.writing("ada", upload_id) as writer:
                    await writer.write(BODY[:HALF])
                    volume._reserve_bytes = 2**60
                    await writer.write(BODY[HALF:])
            seen = await service.uploads.look("ada", upload_id)
            assert seen.offset_bytes == HALF == (mount / "incoming" / str(upload_id)).stat().st_size
            with pytest.raises(VolumeFull):  # before a byte is read
                async with service.uploads.writing("ada", upload_id):
                    raise AssertionError
            volume._reserve_bytes = 0
            await go_on(service, [f"{upload_id} {HALF}"])
            await look_around(service, database_url, mount)

    asyncio.run(run())


def test_bytes_that_are_gone_are_sent_again(database_url: str, mount: Path) -> None:
    """Somebody has lost what was synced: a damage, which ends with the right bytes all the same."""

    async def run(left_bytes: int | None) -> None:
        async with serving(database_url) as service, serving(database_url) as other:
            upload_id = await begun(service)
            await sent(service, upload_id, BODY, HALF, _unheard)
            path = mount / "incoming" / str(upload_id)
            if left_bytes is None:
                path.unlink()
            else:
                os.truncate(path, left_bytes)
            with pytest.raises(OffsetMismatch):
                async with other.uploads.writing("ada", upload_id) as writer:
                    raise OffsetMismatch(writer.received_bytes)
            assert (await other.uploads.look("ada", upload_id)).offset_bytes == 0
            await sent(other, upload_id, BODY, 300_000, _unheard)
            await go_on(service, [f"{upload_id} 300000"])
            await look_around(service, database_url, mount)

    for left_bytes in (None, 0, 100):
        asyncio.run(run(left_bytes))


def test_what_expired_goes_with_its_bytes(database_url: str, mount: Path) -> None:
    """Also with those that lie under another name than the upload's."""

    async def run() -> None:
        async with serving(database_url) as service:
            upload_id = await begun(service)
            await sent(service, upload_id, BODY, HALF, _unheard)
            (mount / "incoming" / str(upload_id)).rename(mount / "incoming" / str(name := uuid4()))
            await service.db.write("update resumable_uploads set incoming_name = $1", name)
            assert (await service.uploads.look("ada", upload_id)).offset_bytes == HALF
            await service.housekeeping.tidy()
            assert len(list((mount / "incoming").iterdir())) == 1
            for table in ("uploads", "resumable_uploads"):
                await service.db.write(f"update {table} set expires_at = clock_timestamp()")
            await service.housekeeping.tidy()
            assert list((mount / "incoming").iterdir()) == []
            with pytest.raises(UploadExpired):
                await service.uploads.look("ada", upload_id)
            with pytest.raises(UploadExpired):
                await service.uploads.end("ada", upload_id)
            await look_around(service, database_url, mount)

    asyncio.run(run())


def test_an_erased_users_bytes_are_gone_at_once(database_url: str, mount: Path) -> None:
    async def run() -> None:
        async with serving(database_url) as service:
            upload_id = await begun(service)
            await sent(service, upload_id, BODY, HALF, _unheard)
            await service.intake.erase_user("ada")
            assert list((mount / "incoming").iterdir()) == []
            with pytest.raises(NotFound):
                await service.uploads.look("ada", upload_id)

    asyncio.run(run())


def test_a_database_that_restarts_costs_an_upload_nothing(start_server: ServerFactory, tmp_path: Path) -> None:
    postgres = EmbeddedPostgres(tmp_path / "postgres")
    server = start_server(database_url=postgres.start(), COFFER_TUS_SYNC_BYTES=str(2**20))
    body = image(6_000_000)
    headers = {"Authorization": f"Bearer {server.api_key}", "X-User-Id": "ada"}
    try:
        with ThreadPoolExecutor(1) as pool:
            uploading = PersistentUpload([server.url], headers, body, piece_bytes=100_000)
            running = pool.submit(uploading.run)
            for at in (1_000_000, 3_000_000):
                until(lambda: uploading.furthest_bytes > at or running.done())  # noqa: B023
                postgres.stop()
                postgres.start()
            running.result()
            uploading.close()
        assert uploading.answers[503] > 0
        assert server.stored_files() == {hashlib.sha256(body).hexdigest()}
        with server.client("ada") as client:
            assert client.get("/api/storage/usage").json()["used_bytes"] == len(body)
    finally:
        server.stop()
        postgres.stop()


def test_where_nobody_may_know_the_boot_an_upload_goes_on_from_what_was_recorded(database_url: str, tmp_path: Path) -> None:
    """As in a unit of systemd with ProcSubset=pid. The server is killed in the middle, and the power cut."""
    # Of a chroot, as of any directory, nothing but the mount itself can be made private.
    mount = 'mount --make-private /proc && mount -t proc -o subset=pid proc /proc && exec "$@"'
    seeing_processes_alone = ("unshare", "--mount", "--propagation", "unchanged", "sh", "-c", mount, "sh")
    server = new_server(database_url, tmp_path, None, {})
    server.launch = partial(Executed, within=seeing_processes_alone)
    server.start()
    try:
        with server.client("ada") as client:
            path = create(client, len(BODY))
            assert patch(client, path, 0, BODY[:HALF]).status_code == 204
            # A request under way when the server is killed: its bytes are in the file, and not recorded.
            with closing(socket.create_connection((server.host, server.port))) as unfinished:
                unfinished.sendall(_head_of_patch(server, path, HALF, len(BODY) - HALF) + BODY[HALF : HALF + 300_000])
                (file,) = (server.volume / "incoming").iterdir()
                until(lambda: file.stat().st_size > HALF)
                server.kill()
        _lose_what_was_not_recorded(database_url, server.volume)
        server.start()
        with server.client("ada") as client:
            until(lambda: _goes_on(client, path))
        assert server.stored_files() == {hashlib.sha256(BODY).hexdigest()}
    finally:
        server.kill()


def _head_of_patch(server: RunningServer, path: str, at: int, length: int) -> bytes:
    headers = PIECE | {"Host": "x", "Authorization": f"Bearer {server.api_key}", "X-User-Id": "ada"}
    lines = [f"PATCH {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Upload-Offset: {at}", f"Content-Length: {length}", "", ""]).encode()


def _goes_on(client: httpx.Client, path: str) -> bool:
    """Sends the rest. False while the lease of the server that was killed keeps everybody off."""
    begun_at = offset(client, path)
    assert begun_at == HALF
    answer = patch(client, path, begun_at, BODY[begun_at:])
    assert answer.status_code in (204, 423), answer.text
    return answer.status_code == 204
