"""Moving users, as rows: who looked before a move changes nothing after it, and a copy ends with its file."""

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest

from server import ledger
from server.errors import Conflict, VolumeUnavailable
from server.ledger import Database, File, PreviewRow, moves
from server.ledger import audit as audits
from server.ledger.moves import MovedFile
from tests.quota.rows import VOLUME, new_file

pytestmark = pytest.mark.anyio

OTHER = UUID(int=77)
PICTURE = PreviewRow(variant="320", file_name="320.webp", mime_type="image/webp", width=1, height=1, size_bytes=5)


@pytest.fixture(autouse=True)
async def two_volumes(db: Database) -> None:
    await ledger.add_volume(db, VOLUME, "/mnt/one")
    await ledger.add_volume(db, OTHER, "/mnt/two")
    await ledger.ensure_user(db, "ada", max_bytes=None, volume_id=VOLUME)


@pytest.fixture
async def file(db: Database) -> AsyncIterator[File]:
    yield await ledger.publish_file(db, new_file("ada", 5))


async def moved(db: Database, file: File) -> None:
    """As `coffer rebalance` does it; the old copy is left."""
    assert await moves.begin_move(db, "ada", OTHER)
    (page,) = await moves.page_to_move(db, "ada", None, 10)
    assert await moves.announce_copies(db, OTHER, [page]) == {file.id}
    assert await moves.switch_files(db, VOLUME, OTHER, [page], nothing) == {file.id}


async def nothing(_: list[UUID]) -> None:
    """No bytes are moved here."""


async def test_who_looked_before_a_move_changes_nothing_after_it(db: Database, file: File) -> None:
    await db.write("update user_files set preview_state = 'pending'")
    await moved(db, file)
    with pytest.raises(Conflict):
        await ledger.rename_generation(db, "ada", file, 2, file.file_path.replace(".1.", ".2."))
    assert not await ledger.finish_preview(db, file, "ready", made=[PICTURE])
    assert await ledger.add_variant(db, file, PICTURE, 100) is None
    now = await ledger.get_file(db, "ada", file.id)
    assert (now.volume_id, now.generation, now.preview_state) == (OTHER, 1, "pending")
    assert await ledger.finish_preview(db, now, "ready", made=[PICTURE])
    assert await ledger.add_variant(db, now, PICTURE, 100) == []


async def test_a_copy_is_left_to_the_mover_for_as_long_as_its_file_lives(db: Database, file: File) -> None:
    await moved(db, file)
    directory = f"{file.file_path.rsplit('/', 2)[0]}/previews/{file.id}"
    assert {(each.volume_id, each.file_path) for each in await moves.old_copies(db, 0, 10)} == {
        (VOLUME, file.file_path),
        (VOLUME, directory),
    }
    assert (await moves.count_copies(db))[0] == 2
    assert await moves.old_copies(db, 60, 10) == []
    assert await ledger.pending_tombstones(db, 10) == []
    assert await audits.old_tombstones(db, 0, 10) == []
    now = await ledger.get_file(db, "ada", file.id)
    await ledger.rename_generation(db, "ada", now, 2, file.file_path.replace(".1.", ".2."))
    assert await moves.old_copies(db, 0, 10) == []
    ended = await ledger.tombstones_of(db, file.id, 1)
    assert {(each.volume_id, each.file_path) for each in ended} == {(VOLUME, file.file_path), (VOLUME, directory), (OTHER, file.file_path)}
    assert len(await ledger.pending_tombstones(db, 10)) == 3


async def test_deleting_takes_copies_along(db: Database, file: File) -> None:
    await moved(db, file)
    deleted = await ledger.delete_files(db, "ada", [file.id])
    paths = {(tombstone.volume_id, tombstone.file_path) for _, tombstone in deleted}
    assert {(VOLUME, file.file_path), (OTHER, file.file_path)} <= paths


async def test_what_changes_while_it_is_copied_is_not_switched(db: Database, file: File) -> None:
    await moves.begin_move(db, "ada", OTHER)
    (page,) = await moves.page_to_move(db, "ada", None, 10)
    await moves.announce_copies(db, OTHER, [page])
    await ledger.rename_generation(db, "ada", file, 2, file.file_path.replace(".1.", ".2."))
    asked: list[UUID] = []

    async def publish(ids: list[UUID]) -> None:
        asked.extend(ids)

    assert await moves.switch_files(db, VOLUME, OTHER, [page], publish) == set()
    assert asked == [] and (await ledger.get_file(db, "ada", file.id)).volume_id == VOLUME
    assert await moves.announce_copies(db, OTHER, [page]) == set()
    (again,) = await moves.page_to_move(db, "ada", None, 10)
    await db.write("update user_files set damaged_at = now()")
    assert await moves.switch_files(db, VOLUME, OTHER, [again], publish) == set()


async def test_a_failed_publishing_switches_nothing(db: Database, file: File) -> None:
    await moves.begin_move(db, "ada", OTHER)
    (page,) = await moves.page_to_move(db, "ada", None, 10)
    await moves.announce_copies(db, OTHER, [page])

    async def fail(_: list[UUID]) -> None:
        raise VolumeUnavailable

    with pytest.raises(VolumeUnavailable):
        await moves.switch_files(db, VOLUME, OTHER, [page], fail)
    assert (await ledger.get_file(db, "ada", file.id)).volume_id == VOLUME
    assert {each.volume_id for each in await moves.old_copies(db, 0, 10)} == {OTHER}


async def test_a_page_goes_on_where_the_last_one_ended(db: Database) -> None:
    files = [await ledger.publish_file(db, new_file("ada", 1)) for _ in range(5)]
    await ledger.publish_file(db, new_file("ada", 1, volume_id=OTHER))
    await moves.begin_move(db, "ada", OTHER)
    seen: list[MovedFile] = []
    while page := await moves.page_to_move(db, "ada", seen[-1] if seen else None, 2):
        seen += page
    assert [each.id for each in seen] == [each.id for each in files]


async def test_a_move_ends_when_nothing_is_left(db: Database, file: File) -> None:
    assert not await moves.begin_move(db, "ada", VOLUME)  # is there
    await moves.begin_move(db, "ada", OTHER)
    assert await moves.users_being_moved(db, "", 10) == ["ada"]
    assert not await moves.finish_move(db, "ada", 0)  # a file
    await ledger.delete_files(db, "ada", [file.id])
    upload_id = uuid4()
    await ledger.open_reservation(
        db, upload_id=upload_id, user_id="ada", volume_id=VOLUME, reserved_bytes=1, idempotency_key=None, lease_seconds=60, most=None
    )
    assert not await moves.finish_move(db, "ada", 0)  # an upload
    await ledger.release_reservation(db, upload_id)
    assert not await moves.finish_move(db, "ada", 60)  # somebody may not have heard yet
    assert await moves.finish_move(db, "ada", 0)
    assert await moves.users_being_moved(db, "", 10) == []


async def test_who_may_be_moved_where(db: Database) -> None:
    await ledger.drain_volume(db, OTHER, is_draining=True)
    assert not await moves.begin_move(db, "ada", OTHER)
    await ledger.drain_volume(db, OTHER, is_draining=False)
    await ledger.add_volume(db, OTHER, "/mnt/two", reserved_for="bob")
    assert not await moves.begin_move(db, "ada", OTHER)
    await ledger.begin_erasing(db, "ada")
    await ledger.add_volume(db, third := uuid4(), "/mnt/three")
    assert not await moves.begin_move(db, "ada", third)


async def test_where_new_users_are_placed(db: Database) -> None:
    """Whatever the process believes that asks."""
    await ledger.add_volume(db, OTHER, "/mnt/two", reserved_for="bob")
    with pytest.raises(Conflict):
        await ledger.add_volume(db, uuid4(), "/mnt/three", reserved_for="bob")
    assert (await ledger.ensure_user(db, "bob", max_bytes=None, volume_id=VOLUME)).volume_id == OTHER
    assert (await ledger.ensure_user(db, "eve", max_bytes=None, volume_id=OTHER)).volume_id is None
    assert (await ledger.ensure_user(db, "eve", max_bytes=None, volume_id=VOLUME)).volume_id == VOLUME
    await ledger.drain_volume(db, VOLUME, is_draining=True)
    assert (await ledger.ensure_user(db, "dan", max_bytes=None, volume_id=VOLUME)).volume_id is None


async def test_an_upload_that_somebody_has_had_is_not_switched(db: Database) -> None:
    upload_id, name = uuid4(), uuid4()
    await ledger.create_resumable_upload(
        db,
        upload_id=upload_id,
        user_id="ada",
        volume_id=VOLUME,
        length_bytes=9,
        reserved_bytes=9,
        upload_metadata="",
        details="{}",
        kinds=None,
        is_partial=False,
        lifetime_seconds=600,
        most=None,
    )
    await moves.begin_move(db, "ada", OTHER)
    (seen,) = await moves.resumables_to_move(db, "ada")
    claimed = await ledger.claim_resumable_upload(db, "ada", upload_id, uuid4(), 60, None)
    assert claimed is not None
    assert not await moves.switch_resumable_upload(db, seen, OTHER, name)
    assert not await moves.switch_resumable_upload(db, claimed.upload, OTHER, name)
    assert await moves.resumables_to_move(db, "ada") == []
    await ledger.checkpoint_resumable_upload(db, claimed.upload, 3, upload_id, 600, release=True)
    assert not await moves.switch_resumable_upload(db, seen, OTHER, name)
    (again,) = await moves.resumables_to_move(db, "ada")
    assert again.offset_bytes == 3
    assert await moves.switch_resumable_upload(db, again, OTHER, name)
    state = await ledger.get_resumable_upload(db, "ada", upload_id)
    assert (state.upload.volume_id, state.upload.incoming_name) == (OTHER, name)
    assert await moves.finish_move(db, "ada", 0)


async def test_only_a_drained_and_empty_volume_is_retired(db: Database, file: File) -> None:
    assert not await ledger.retire_volume(db, OTHER, leaves_bytes=False)  # not drained
    await ledger.drain_volume(db, VOLUME, is_draining=True)
    with pytest.raises(VolumeUnavailable):
        await ledger.retire_volume(db, VOLUME, leaves_bytes=True)
    await moved(db, file)
    assert await ledger.count_left(db, VOLUME) == (0, 0, 0, 2)
    assert not await ledger.retire_volume(db, VOLUME, leaves_bytes=False)  # copies
    assert await ledger.retire_volume(db, VOLUME, leaves_bytes=True)
    assert [row.id for row in await ledger.list_volumes(db)] == [OTHER]
    assert (await moves.count_copies(db))[0] == 0
