"""Users, volumes and keys."""

from uuid import UUID, uuid4

import pytest

from server import ledger
from server.errors import Conflict, NotFound
from server.ledger import Database, KindUsage
from tests.quota.rows import VOLUME, new_file

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def one_volume(db: Database) -> None:
    await ledger.add_volume(db, VOLUME, "/mnt/one")


async def test_a_user_is_added_once_and_keeps_quota_and_volume(db: Database) -> None:
    other = uuid4()
    await ledger.add_volume(db, other, "/mnt/two")
    first = await ledger.ensure_user(db, "ada", max_bytes=5, volume_id=VOLUME)
    assert (first.max_bytes, first.volume_id, first.total_bytes) == (5, VOLUME, 0)
    assert await ledger.ensure_user(db, "ada", max_bytes=9, volume_id=other) == first
    assert (await ledger.set_quota(db, "bob", None)).volume_id is None
    bob = await ledger.ensure_user(db, "bob", max_bytes=9, volume_id=other)
    assert (bob.max_bytes, bob.volume_id) == (None, other)
    assert (await ledger.set_quota(db, "bob", 7, volume_id=VOLUME)).volume_id == other


async def test_users_are_listed_in_pages(db: Database) -> None:
    for name in ("b", "a", "c"):
        await ledger.set_quota(db, name, 1)
    assert [user.user_id for user in await ledger.list_users(db, None, 2)] == ["a", "b"]
    assert [user.user_id for user in await ledger.list_users(db, "b", 2)] == ["c"]


async def test_usage_is_told_per_type(db: Database) -> None:
    assert await ledger.usage(db, "ada") == (None, {})
    await ledger.set_quota(db, "ada", None)
    await ledger.publish_file(db, new_file("ada", 1))
    await ledger.publish_file(db, new_file("ada", 2, mime_type="image/jpeg"))
    gone = await ledger.publish_file(db, new_file("ada", 4, file_type="video", mime_type="video/mp4"))
    await ledger.publish_file(db, new_file("ada", 8, file_type="audio", mime_type="audio/mpeg"))
    await ledger.delete_files(db, "ada", [gone.id])
    user, kinds = await ledger.usage(db, "ada")
    assert user is not None and (user.total_bytes, user.file_count) == (11, 3)
    assert kinds == {"image": KindUsage(file_count=2, total_bytes=3), "audio": KindUsage(file_count=1, total_bytes=8)}


async def test_a_user_who_is_not_being_erased_loses_nothing(db: Database) -> None:
    async def remove_bytes() -> None:
        raise AssertionError

    await ledger.set_quota(db, "ada", None)
    file = await ledger.publish_file(db, new_file("ada", 1))
    await ledger.delete_files(db, "ada", [file.id])
    with pytest.raises(Conflict):
        await ledger.finish_erasing(db, "ada", remove_bytes)
    assert (await db.read("select count(*) from events"))[0]["count"] == 2
    assert (await db.read("select count(*) from usage_ledger"))[0]["count"] == 2
    with pytest.raises(NotFound):
        await ledger.begin_erasing(db, "nobody")


async def test_volumes(db: Database) -> None:
    await ledger.add_volume(db, VOLUME, "/mnt/moved")
    await ledger.set_volume_state(db, VOLUME, "read_only")
    (row,) = await ledger.list_volumes(db)
    assert (row.id, row.mount_path, row.state) == (VOLUME, "/mnt/moved", "read_only")
    with pytest.raises(NotFound):
        await ledger.set_volume_state(db, UUID(int=0), "open")


async def test_keys_are_revoked_once(db: Database) -> None:
    await ledger.create_api_key(db, key_id="k", name="shop", secret_sha256=bytes(32), scopes=["files:read"])
    key = await ledger.find_api_key(db, "k")
    assert key is not None and (key.name, key.scopes, key.revoked_at) == ("shop", ["files:read"], None)
    assert await ledger.revoke_api_key(db, "k") and not await ledger.revoke_api_key(db, "k")
    (row,) = await ledger.list_api_keys(db)
    assert row.revoked_at is not None
    assert await ledger.find_api_key(db, "unknown") is None and not await ledger.revoke_api_key(db, "unknown")
