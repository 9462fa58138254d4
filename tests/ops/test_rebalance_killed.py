"""`coffer rebalance` is killed at every step: each row's file is where the row says, and the next run brings the rest."""

import argparse
import asyncio
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from ops import rebalance
from ops.tool import Desk
from server import ledger
from server.intake import Details
from server.ledger.tools import tool_lock
from server.settings import Settings
from server.vault.sentinel import init_volume
from tests.ops.conftest import drifted
from tests.samples import image
from tests.serving import execute
from tests.tus.crashes import Service, Tell, Work, run_until, serving
from tests.waiting import until

EVERY = int(os.environ.get("COFFER_TEST_KILL_EVERY", "23"))
WITH_TWO_COPIES = (54, 58, 62, 66, 120)  # about: before the rows are switched, and after
INSERT_PREVIEW = """
insert into previews (file_id, variant, user_id, file_name, mime_type, size_bytes) values ($1, '320', $2, '320.webp', 'image/webp', 9)
"""
LOCKS = """
select from pg_locks l join pg_database d on d.oid = l.database where l.locktype = 'advisory' and d.datname = current_database()
"""
PREVIEWS = "select p.file_id, f.volume_id from previews p join user_files f on f.id = p.file_id where f.user_id = $1"
RESUMABLES = "select volume_id, incoming_name, offset_bytes from resumable_uploads where user_id = $1"
PART = image(5_000, seed=7)


@dataclass(frozen=True)
class Pair:
    """Two volumes, and the journal of what was acknowledged: SHA-256 by file, per user. It is kept out of reach of what is tested."""

    database_url: str
    mounts: dict[UUID, Path]
    first: UUID
    second: UUID

    def path(self, volume_id: UUID, path: str) -> Path:
        return self.mounts[volume_id] / path


@pytest.fixture
def pair(database_url: str, tmp_path: Path) -> Pair:
    mounts: dict[UUID, Path] = {}

    async def add() -> None:
        async with serving(database_url) as service:
            for name in ("first", "second"):
                mount = tmp_path / name
                mount.mkdir()
                volume_id = init_volume(mount)
                await ledger.add_volume(service.db, volume_id, str(mount))
                mounts[volume_id] = mount

    asyncio.run(add())
    execute(database_url, "update volumes set created_at = created_at - interval '1 minute'")
    return Pair(database_url, mounts, *mounts)


async def _store(service: Service, user_id: str, body: bytes) -> UUID:
    upload = await service.intake.begin(user_id, declared_bytes=len(body))
    await upload.write(body)
    return (await upload.finish(Details())).id


def stored(pair: Pair, user_id: str) -> tuple[dict[UUID, bytes], UUID]:
    """A user on the first volume, with two files, previews of one, and an upload that has come half."""
    bodies: dict[UUID, bytes] = {}

    async def prepare() -> UUID:
        async with serving(pair.database_url) as service:
            await ledger.ensure_user(service.db, user_id, max_bytes=None, volume_id=pair.first)
            for number in range(2):
                body = image(3_000 + number, seed=number)
                bodies[await _store(service, user_id, body)] = body
            made = await service.uploads.create(user_id, length_bytes=9_000, upload_metadata="", details=Details(), kinds=None)
            async with service.uploads.writing(user_id, made.id) as writer:
                await writer.write(PART)
            return made.id

    upload_id = asyncio.run(prepare())
    file_id = next(iter(bodies))
    directory = pair.path(pair.first, f"users/{user_id}/previews/{file_id}")
    directory.mkdir(parents=True)
    (directory / "320.webp").write_bytes(b"a picture")
    execute(pair.database_url, INSERT_PREVIEW, file_id, user_id)
    execute(pair.database_url, "update user_files set preview_state = 'ready' where user_id = $1", user_id)
    return bodies, upload_id


def moving(pair: Pair, user_id: str, to: UUID) -> Work:
    """What a process does that moves one user."""

    async def move(service: Service, _: Tell) -> None:
        arguments = argparse.Namespace(json=True, for_real=True, user=user_id, to=to, evenly=False, rate=None, keep_old=0.0)
        settings = Settings(database_url=pair.database_url)
        async with tool_lock(settings, "rebalance") as lock:
            await rebalance.run(Desk("rebalance", arguments, settings, service.db, service.vault, lock))

    return move


def killed(pair: Pair, user_id: str, step: int) -> bool:
    """Moves a user to the second volume until it is killed at that step. Returns whether it came to its end before."""
    has_ended, _ = run_until(pair.database_url, moving(pair, user_id, pair.second), step)
    until(lambda: not execute(pair.database_url, LOCKS))  # PostgreSQL has noticed that it is dead
    return has_ended


def check_rows(pair: Pair, user_id: str, bodies: dict[UUID, bytes]) -> None:
    """What must be true at any moment: each acknowledged file lies where its row says, with its bytes; and no counter has moved."""
    rows = execute(pair.database_url, "select id, volume_id, file_path from user_files where user_id = $1", user_id)
    assert {row["id"] for row in rows} == bodies.keys()
    for row in rows:
        assert pair.path(row["volume_id"], row["file_path"]).read_bytes() == bodies[row["id"]]
    for row in execute(pair.database_url, PREVIEWS, user_id):
        assert pair.path(row["volume_id"], f"users/{user_id}/previews/{row['file_id']}/320.webp").read_bytes() == b"a picture"
    for row in execute(pair.database_url, RESUMABLES, user_id):
        assert row["offset_bytes"] == len(PART)
        assert pair.path(row["volume_id"], f"incoming/{row['incoming_name']}").read_bytes()[: len(PART)] == PART
    assert drifted(pair.database_url) == []


def files_of(pair: Pair, volume_id: UUID, user_id: str) -> list[str]:
    below = pair.path(volume_id, f"users/{user_id}")
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in below.rglob("*") if path.is_file())


def check_moved(pair: Pair, user_id: str, bodies: dict[UUID, bytes], to: UUID) -> None:
    """Everything is on one volume, and nothing on the other."""
    other = pair.first if to == pair.second else pair.second
    check_rows(pair, user_id, bodies)
    for table in ("user_files", "uploads", "resumable_uploads", "user_storage"):
        places = execute(pair.database_url, f"select distinct volume_id from {table} where user_id = $1", user_id)
        assert {row["volume_id"] for row in places} <= {to}, table
    assert files_of(pair, other, user_id) == []
    stored = [path for path in pair.path(to, f"users/{user_id}").glob("*/*") if path.is_file()]
    assert len(stored) == len(bodies)
    assert execute(pair.database_url, "select count(*) from tombstones")[0]["count"] == 0
    assert execute(pair.database_url, "select count(*) from user_storage where moving_since is not null")[0]["count"] == 0


def test_killed_at_any_step_nothing_is_lost_and_the_next_run_ends_the_move(pair: Pair) -> None:
    step, kills, has_ended = 1, 0, False
    while not has_ended:
        user_id = f"user-{step}"
        bodies, _ = stored(pair, user_id)
        has_ended = killed(pair, user_id, step)
        check_rows(pair, user_id, bodies)
        run_until(pair.database_url, moving(pair, user_id, pair.second), None)
        check_moved(pair, user_id, bodies, pair.second)
        kills += not has_ended
        step += EVERY
    assert kills > 60 / EVERY


def test_a_killed_move_may_go_back(pair: Pair) -> None:
    """The old place is the new one: what was left there to remove must not take the user's files with it."""
    step, has_ended = 2, False
    while not has_ended:
        user_id = f"user-{step}"
        bodies, _ = stored(pair, user_id)
        has_ended = killed(pair, user_id, step)
        run_until(pair.database_url, moving(pair, user_id, pair.first), None)
        check_moved(pair, user_id, bodies, pair.first)
        step += 2 * EVERY


async def _end(pair: Pair, how: str, user_id: str, file_id: UUID) -> None:
    async with serving(pair.database_url) as service:
        match how:
            case "delete":
                await service.intake.delete(user_id, [file_id])
            case "revoke":
                await service.intake.revoke_links(user_id, file_id)
            case "erase":
                await service.intake.erase_user(user_id)
            case _:
                old = await ledger.get_file(service.db, user_id, file_id)
                upload = await service.intake.begin(user_id, declared_bytes=2_000, replacing=old)
                await upload.write(image(2_000, seed=9))
                await upload.replace(old)


@pytest.mark.parametrize("how", ["delete", "revoke", "replace", "erase"])
def test_what_ends_after_a_kill_ends_on_both_volumes(pair: Pair, how: str) -> None:
    """A copy that a killed move has left is no way to read what was deleted, replaced, erased, or whose links were revoked."""
    switched: set[bool] = set()
    for step in WITH_TWO_COPIES:
        user_id = f"user-{step}"
        bodies, _ = stored(pair, user_id)
        killed(pair, user_id, step)
        file_id, body = next(iter(bodies.items()))
        ((volume_id, path),) = execute(pair.database_url, "select volume_id, file_path from user_files where id = $1", file_id)
        if all(pair.path(each, path).exists() for each in pair.mounts):
            switched.add(volume_id == pair.second)

        asyncio.run(_end(pair, how, user_id, file_id))
        for volume_id in pair.mounts:
            assert not pair.path(volume_id, path).exists()
        if how == "erase":
            assert files_of(pair, pair.first, user_id) == files_of(pair, pair.second, user_id) == []
        else:
            run_until(pair.database_url, moving(pair, user_id, pair.second), None)
            kept = {each: data for each, data in bodies.items() if each != file_id}
            after = {"revoke": {file_id: body}, "replace": {file_id: image(2_000, seed=9)}}
            check_moved(pair, user_id, kept | after.get(how, {}), pair.second)
    assert switched == {False, True}, "no kill has left two copies before the switch, or none has after it"
