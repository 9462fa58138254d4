"""Resumable uploads as rows: who may change one, what it holds of the quota, and what ends it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from server import ledger
from server.errors import NotFound, QuotaExceeded, TooManyUploads, UserErasing
from server.ledger import ClaimedUpload, Database, Notices
from server.ledger.models import UploadLink
from server.settings import Settings
from tests.quota.rows import VOLUME, Connection, add_user, add_volume, drift, new_file, used

pytestmark = pytest.mark.anyio

LIFETIME = 3600.0
BOOT = "this boot"


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    await add_volume(connection)
    await add_user(connection, "ada", 1_000)
    await add_user(connection, "bob", 1_000)
    yield connection
    assert await drift(connection) == []
    await connection.close()


async def create(db: Database, length: int | None = 100, *, user: str = "ada", most: int | None = None, partial: bool = False) -> UUID:
    upload_id = uuid4()
    await ledger.create_resumable_upload(
        db,
        upload_id=upload_id,
        user_id=user,
        volume_id=VOLUME,
        length_bytes=length,
        reserved_bytes=length or 0,
        upload_metadata="filename YQ==",
        details="{}",
        kinds=None,
        is_partial=partial,
        lifetime_seconds=LIFETIME,
        most=most,
    )
    return upload_id


async def claim(db: Database, upload_id: UUID, *, user: str = "ada", lease: float = 60, boot: str | None = BOOT) -> ClaimedUpload:
    claimed = await ledger.claim_resumable_upload(db, user, upload_id, uuid4(), lease, boot)
    assert claimed is not None
    return claimed


async def checkpoint(db: Database, claimed: ClaimedUpload, offset: int, *, release: bool = False) -> bool:
    upload = claimed.upload
    expires_at = await ledger.checkpoint_resumable_upload(db, upload, offset, upload.incoming_name, LIFETIME, release=release)
    return expires_at is not None


async def part(db: Database, length: int, *, user: str = "ada") -> UUID:
    """A whole partial upload."""
    upload_id = await create(db, length, user=user, partial=True)
    assert await checkpoint(db, await claim(db, upload_id, user=user), length, release=True)
    return upload_id


async def join(db: Database, parts: list[UUID], *, user: str = "ada") -> UUID | None:
    upload_id = uuid4()
    expires_at = await ledger.join_resumable_uploads(
        db, upload_id=upload_id, user_id=user, parts=parts, upload_metadata="", details="{}", kinds=None, lifetime_seconds=LIFETIME
    )
    return upload_id if expires_at is not None else None


async def expire(sql: Connection, *ids: UUID) -> None:
    for table in ("uploads", "resumable_uploads"):
        await sql.execute(f"update {table} set expires_at = clock_timestamp() - interval '1 second' where id = any ($1)", ids)


async def row(sql: Connection, upload_id: UUID) -> dict[str, Any]:
    found = await sql.fetchrow("select * from resumable_uploads where id = $1", upload_id)
    assert found is not None
    return dict(found)


# One writer


async def test_one_writer_has_it_until_it_lets_go(db: Database, sql: Connection) -> None:
    upload_id = await create(db)
    claimed = await claim(db, upload_id)
    assert (claimed.reserved_bytes, claimed.boot_id_before, claimed.upload.boot_id) == (100, None, BOOT)
    assert await ledger.claim_resumable_upload(db, "ada", upload_id, uuid4(), 60, BOOT) is None
    state = await ledger.get_resumable_upload(db, "ada", upload_id)
    assert (state.is_held, state.is_written, state.is_over) == (True, True, False)
    assert await checkpoint(db, claimed, 40, release=True)
    again = await claim(db, upload_id, boot=None)
    assert (again.upload.offset_bytes, again.boot_id_before, again.upload.boot_id) == (40, BOOT, None)
    assert again.upload.fence != claimed.upload.fence


async def test_it_is_only_its_owners(db: Database, sql: Connection) -> None:
    upload_id = await create(db)
    assert await ledger.claim_resumable_upload(db, "bob", upload_id, uuid4(), 60, BOOT) is None
    with pytest.raises(NotFound):
        await ledger.get_resumable_upload(db, "bob", upload_id)
    await ledger.forget_published_upload(db, "bob", upload_id)
    assert await join(db, [await part(db, 1, user="bob"), upload_id], user="bob") is None


async def test_a_dead_writers_lease_ends(db: Database, sql: Connection) -> None:
    upload_id = await create(db)
    dead = await claim(db, upload_id, lease=-0.001)
    state = await ledger.get_resumable_upload(db, "ada", upload_id)
    assert (state.is_held, state.is_written) == (True, False)  # so whoever looks must look at the file
    assert (await claim(db, upload_id)).upload.fence != dead.upload.fence


async def test_a_stale_fence_changes_nothing(db: Database, sql: Connection) -> None:
    upload_id = await create(db, None)
    stale = await claim(db, upload_id, lease=-0.001)
    fresh = await claim(db, upload_id)
    before = await row(sql, upload_id)

    async def tries(claimed: ClaimedUpload) -> None:
        assert not await checkpoint(db, claimed, 90)
        assert not await checkpoint(db, claimed, 90, release=True)
        assert not await ledger.declare_resumable_length(db, claimed.upload, 90)
        assert await ledger.renew_resumable_uploads(db, [(upload_id, claimed.upload.fence)], 600) == set()
        await ledger.leave_resumable_upload(db, claimed.upload, is_doubtful=True)
        assert await ledger.end_resumable_upload(db, claimed.upload) == []
        with pytest.raises(NotFound):
            await ledger.publish_file(db, new_file("ada", 0, id=upload_id, fence=claimed.upload.fence))

    await tries(stale)
    assert await row(sql, upload_id) == before
    assert await checkpoint(db, fresh, 10, release=True)
    before = await row(sql, upload_id)
    await tries(fresh)  # it has let go
    assert await row(sql, upload_id) == before
    assert (await ledger.get_resumable_upload(db, "ada", upload_id)).has_reservation


async def test_leases_are_renewed_together_and_keep_uploads_alive(db: Database, sql: Connection) -> None:
    claimed = [await claim(db, await create(db, 10), lease=10) for _ in range(3)]
    stale = await claim(db, await create(db, 10), lease=-0.001)
    await claim(db, stale.upload.id)
    ids = [each.upload.id for each in claimed]
    await sql.execute("update uploads set expires_at = clock_timestamp() + interval '1 second'")
    await sql.execute("update resumable_uploads set expires_at = clock_timestamp() + interval '1 second'")
    held = [(each.upload.id, each.upload.fence) for each in (*claimed, stale)]
    assert await ledger.renew_resumable_uploads(db, held, 600) == set(held[:3])
    for table in ("uploads", "resumable_uploads"):
        rows = await sql.fetch(f"select id, expires_at > clock_timestamp() + interval '500 seconds' as lives from {table}")
        assert {each["id"] for each in rows if each["lives"]} == set(ids)
    rows = await sql.fetch("select id from resumable_uploads where held_until > clock_timestamp() + interval '500 seconds'")
    assert {each["id"] for each in rows} == set(ids)


async def test_a_lease_that_is_left_tells_to_look_at_the_file(db: Database, sql: Connection) -> None:
    for is_doubtful in (False, True):
        upload_id = await create(db)
        await ledger.leave_resumable_upload(db, (await claim(db, upload_id)).upload, is_doubtful=is_doubtful)
        state = await ledger.get_resumable_upload(db, "ada", upload_id)
        assert (state.is_held, state.is_written) == (True, False)
        assert (await claim(db, upload_id)).boot_id_before == (None if is_doubtful else BOOT)


async def test_a_claim_keeps_an_upload_from_expiring_under_its_writer(db: Database, sql: Connection) -> None:
    upload_id = await create(db)
    await sql.execute("update uploads set expires_at = clock_timestamp() + interval '1 second'")
    await claim(db, upload_id, lease=60)
    soon = await sql.fetchval("select expires_at < clock_timestamp() + interval '30 seconds' from uploads where id = $1", upload_id)
    assert not soon


async def test_two_who_claim_at_once(db: Database, sql: Connection) -> None:
    upload_id = await create(db)
    tries = [ledger.claim_resumable_upload(db, "ada", upload_id, uuid4(), 60, BOOT) for _ in range(10)]
    assert sum(each is not None for each in await asyncio.gather(*tries)) == 1


async def test_the_length_is_declared_once(db: Database, sql: Connection) -> None:
    claimed = await claim(db, await create(db, None))
    assert await ledger.declare_resumable_length(db, claimed.upload, 70)
    assert not await ledger.declare_resumable_length(db, claimed.upload, 80)
    with pytest.raises(asyncpg.CheckViolationError):  # more bytes than it is long: our defect, never recorded
        await checkpoint(db, claimed, 71)


async def test_the_holder_hears_that_it_is_wanted_and_nobody_who_comes_after(settings: Settings, db: Database, sql: Connection) -> None:
    notices = Notices(settings)
    upload_id = await create(db)
    first = await claim(db, upload_id)
    try:
        with (
            notices.only_heard(f"wanted/{upload_id}/{first.upload.fence}") as wanted,
            notices.only_heard(f"wanted/{upload_id}/{first.upload.fence + 1}") as wanted_of_another,
            notices.of(f"released/{upload_id}") as released,
        ):
            await notices.listening()
            assert not wanted.is_set() and released.is_set()  # of what nobody heard, one may be told, and the other must not
            released.clear()
            await ledger.want_resumable_upload(db, upload_id)
            await asyncio.wait_for(wanted.wait(), 10)
            assert await checkpoint(db, first, 10) and not released.is_set()
            assert await checkpoint(db, first, 10, release=True)
            await asyncio.wait_for(released.wait(), 10)
            await ledger.want_resumable_upload(db, upload_id)  # nobody has it
            released.clear()
            await ledger.end_resumable_upload(db, (await claim(db, upload_id)).upload)
            await asyncio.wait_for(released.wait(), 10)
            assert not wanted_of_another.is_set()
    finally:
        await notices.close()


# Quota and limits


async def test_quota_is_held_from_the_creation_to_the_end(db: Database, sql: Connection) -> None:
    upload_id = await create(db, 900)
    assert await used(sql, "ada") == (0, 900, 0)
    with pytest.raises(QuotaExceeded):
        await create(db, 101)
    ended = await ledger.end_resumable_upload(db, (await claim(db, upload_id)).upload)
    assert ended == [(VOLUME, upload_id)] and await used(sql, "ada") == (0, 0, 0)
    with pytest.raises(NotFound):
        await ledger.get_resumable_upload(db, "ada", upload_id)


async def test_the_published_file_takes_the_place_of_the_reservation(db: Database, sql: Connection) -> None:
    upload_id = await create(db, 1_000)
    claimed = await claim(db, upload_id)
    assert await checkpoint(db, claimed, 1_000)
    await ledger.publish_file(db, new_file("ada", 1_000, id=upload_id, fence=claimed.upload.fence))
    assert await used(sql, "ada") == (1_000, 0, 1)
    state = await ledger.get_resumable_upload(db, "ada", upload_id)
    assert (state.has_file, state.is_over, state.has_reservation) == (True, True, False)
    assert await checkpoint(db, claimed, 1_000, release=True)
    assert await ledger.claim_resumable_upload(db, "ada", upload_id, uuid4(), 60, BOOT) is None
    await ledger.forget_published_upload(db, "ada", upload_id)
    with pytest.raises(NotFound):
        await ledger.get_resumable_upload(db, "ada", upload_id)
    assert await used(sql, "ada") == (1_000, 0, 1)


async def test_one_that_is_not_published_is_not_forgotten(db: Database, sql: Connection) -> None:
    upload_id = await create(db)
    await ledger.forget_published_upload(db, "ada", upload_id)
    assert (await ledger.get_resumable_upload(db, "ada", upload_id)).has_reservation


async def test_a_reservation_that_is_gone_is_not_published(db: Database, sql: Connection) -> None:
    claimed = await claim(db, await create(db))
    await sql.execute("delete from uploads")
    with pytest.raises(NotFound):
        await ledger.publish_file(db, new_file("ada", 100, id=claimed.upload.id, fence=claimed.upload.fence))
    assert await used(sql, "ada") == (0, 0, 0)


@pytest.mark.parametrize("length", [1, None])
async def test_unfinished_ones_are_limited(db: Database, sql: Connection, length: int | None) -> None:
    outcomes = await asyncio.gather(*(create(db, length, most=5) for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(each, UUID) for each in outcomes) == 5
    assert {each.limit for each in outcomes if isinstance(each, TooManyUploads)} == {5}
    await create(db, length, user="bob", most=1)
    (first, *_), second = (each for each in outcomes if isinstance(each, UUID)), await create(db, 1, most=6)
    await ledger.end_resumable_upload(db, (await claim(db, first)).upload)
    await expire(sql, second)
    await create(db, length, most=5)
    with pytest.raises(TooManyUploads):
        await create(db, length, most=5)


async def test_nobody_begins_while_being_erased_and_nothing_is_left(db: Database, sql: Connection) -> None:
    parts = [await part(db, 10), await part(db, 20)]
    joined = await join(db, parts)
    other = await claim(db, await create(db))
    assert sorted(await ledger.list_resumable_bytes(db, "ada")) == sorted((VOLUME, each) for each in (*parts, joined, other.upload.id))
    await ledger.begin_erasing(db, "ada")
    with pytest.raises(UserErasing):
        await create(db)

    async def nothing() -> None:
        return

    await ledger.finish_erasing(db, "ada", nothing)
    assert await sql.fetchval("select count(*) from resumable_uploads") == await sql.fetchval("select count(*) from uploads") == 0
    assert not await checkpoint(db, other, 1)


# Expiry


async def test_what_expired_gives_its_quota_back_and_is_known_for_a_while(db: Database, sql: Connection) -> None:
    upload_id, live = await create(db), await create(db)
    assert await checkpoint(db, await claim(db, upload_id), 10, release=True)
    await sql.execute("update resumable_uploads set incoming_name = $2 where id = $1", upload_id, copied := uuid4())
    assert await ledger.live_uploads(db, [upload_id, copied]) == {upload_id, copied}
    await expire(sql, upload_id)
    assert await ledger.release_expired(db) == {upload_id: copied}
    assert await used(sql, "ada") == (0, 100, 0)
    state = await ledger.get_resumable_upload(db, "ada", upload_id)
    assert (state.is_expired, state.has_reservation) == (True, False)
    assert await ledger.live_uploads(db, [upload_id, copied, live]) == {live}
    assert await ledger.claim_resumable_upload(db, "ada", upload_id, uuid4(), 60, BOOT) is None
    assert await ledger.purge_resumable_uploads(db, 60, 10) == []
    assert await ledger.purge_resumable_uploads(db, 0, 10) == [(VOLUME, copied)]
    with pytest.raises(NotFound):
        await ledger.get_resumable_upload(db, "ada", upload_id)
    assert (await ledger.get_resumable_upload(db, "ada", live)).has_reservation


async def test_each_byte_lets_it_live_longer(db: Database, sql: Connection) -> None:
    upload_id = await create(db)
    soon = "update {} set expires_at = clock_timestamp() + interval '1 second'"
    for table in ("uploads", "resumable_uploads"):
        await sql.execute(soon.format(table))
    assert await checkpoint(db, await claim(db, upload_id, lease=1), 10, release=True)
    for table in ("uploads", "resumable_uploads"):
        assert await sql.fetchval(f"select expires_at > clock_timestamp() + interval '50 minutes' from {table}")


# Joining


async def test_parts_become_one_and_are_charged_once(db: Database, sql: Connection) -> None:
    parts = [await part(db, 300), await part(db, 600)]
    assert await used(sql, "ada") == (0, 900, 0)
    assert await ledger.measure_parts(db, "ada", parts) == 900
    assert await ledger.measure_parts(db, "bob", parts) == 0
    joined = await join(db, parts)
    assert joined is not None and await used(sql, "ada") == (0, 900, 0)
    found = await ledger.find_joined_upload(db, "ada", parts)
    assert found is not None and (found.id, found.length_bytes, found.offset_bytes, found.parts) == (joined, 900, 0, parts)
    assert await ledger.find_joined_upload(db, "ada", parts[::-1]) is None
    assert await ledger.find_joined_upload(db, "bob", parts) is None
    for each in parts:
        state = await ledger.get_resumable_upload(db, "ada", each)
        assert (state.is_over, state.has_file, state.has_reservation) == (True, False, True)
        assert await ledger.claim_resumable_upload(db, "ada", each, uuid4(), 60, BOOT) is None
    assert await ledger.live_uploads(db, parts) == set(parts)
    claimed = await claim(db, joined)
    assert await checkpoint(db, claimed, 900)
    await ledger.publish_file(db, new_file("ada", 900, id=joined, fence=claimed.upload.fence))
    assert await used(sql, "ada") == (900, 0, 1)
    assert await ledger.live_uploads(db, parts) == set()
    assert sorted(await ledger.end_parts(db, joined)) == sorted((VOLUME, each) for each in parts)
    assert (await ledger.find_joined_upload(db, "ada", parts)) is not None  # asked again, it is the same file


async def test_only_whole_free_parts_of_ones_own_are_joined(db: Database, sql: Connection) -> None:
    whole = await part(db, 10)
    unfinished = await create(db, 10, partial=True)
    no_part = await create(db, 10)
    assert await checkpoint(db, await claim(db, no_part), 10, release=True)
    held = await part(db, 10)
    await claim(db, held)
    expired = await part(db, 10)
    await expire(sql, expired)
    undeclared = await create(db, None, partial=True)
    foreign = await part(db, 10, user="bob")
    before = await used(sql, "ada"), await used(sql, "bob")
    for bad in (uuid4(), unfinished, no_part, held, expired, undeclared, foreign, whole):
        assert await join(db, [whole, bad]) is None, bad
    assert await join(db, []) is None
    assert (await used(sql, "ada"), await used(sql, "bob")) == before
    assert (await ledger.get_resumable_upload(db, "ada", whole)).upload.joined_as is None
    assert await join(db, [whole]) is not None
    assert await join(db, [whole]) is None and await join(db, [whole, await part(db, 1)]) is None


async def test_a_thousand_parts_are_joined_once(db: Database, sql: Connection) -> None:
    parts = [await part(db, 1) for _ in range(1_000)]
    outcomes = await asyncio.gather(*(join(db, parts) for _ in range(3)))
    (joined,) = [each for each in outcomes if each is not None]
    found = await ledger.find_joined_upload(db, "ada", parts)
    assert found is not None and found.id == joined and await used(sql, "ada") == (0, 1_000, 0)


async def test_parts_end_with_what_they_are_joined_to(db: Database, sql: Connection) -> None:
    parts = [await part(db, 10), await part(db, 20)]
    joined = await join(db, parts)
    assert joined is not None
    ended = await ledger.end_resumable_upload(db, (await claim(db, joined)).upload)
    assert sorted(ended) == sorted((VOLUME, each) for each in (*parts, joined))
    assert await sql.fetchval("select count(*) from resumable_uploads") == 0 and await used(sql, "ada") == (0, 0, 0)


async def test_parts_live_as_long_as_what_they_are_joined_to(db: Database, sql: Connection) -> None:
    parts = [await part(db, 10), await part(db, 20)]
    joined = await join(db, parts)
    assert joined is not None
    await sql.execute("update resumable_uploads set expires_at = clock_timestamp() + interval '1 second'")
    assert await checkpoint(db, await claim(db, joined), 10, release=True)
    assert await sql.fetchval("select bool_and(expires_at > clock_timestamp() + interval '50 minutes') from resumable_uploads")
    assert await ledger.purge_resumable_uploads(db, 3600, 10) == []
    await expire(sql, joined)
    assert await ledger.release_expired(db) == {joined: joined}
    assert await ledger.live_uploads(db, parts) == set()
    assert not (await ledger.get_resumable_upload(db, "ada", parts[0])).has_reservation
    assert sorted(await ledger.purge_resumable_uploads(db, 3600, 10)) == sorted((VOLUME, each) for each in parts)


async def test_parts_that_a_crash_left_after_publishing_are_purged(db: Database, sql: Connection) -> None:
    parts = [await part(db, 10), await part(db, 20)]
    joined = await join(db, parts)
    assert joined is not None
    await ledger.publish_file(db, new_file("ada", 30, id=joined, fence=(await claim(db, joined)).upload.fence))
    assert sorted(await ledger.purge_resumable_uploads(db, 3600, 10)) == sorted((VOLUME, each) for each in parts)
    assert (await ledger.get_resumable_upload(db, "ada", joined)).has_file


# Upload links


async def linked(db: Database, link_id: UUID, lifetime: float = LIFETIME) -> None:
    claimed = await ledger.claim_link(db, link_id, lifetime, None)
    assert claimed is not None
    await ledger.create_linked_upload(
        db,
        upload_id=link_id,
        length_bytes=50,
        upload_metadata="",
        details="{}",
        link=claimed.link,
        lifetime_seconds=lifetime,
        incoming_name=uuid4(),
    )


async def open_link(db: Database, seconds: int = 86_400) -> UUID:
    link_id = uuid4()
    await ledger.open_reservation(
        db,
        upload_id=link_id,
        user_id="ada",
        volume_id=VOLUME,
        reserved_bytes=80,
        idempotency_key=None,
        lease_seconds=seconds,
        link=UploadLink(types=["image"]),
        most=None,
    )
    return link_id


async def test_a_link_brings_one_upload_at_a_time(db: Database, sql: Connection) -> None:
    link_id = await open_link(db)
    await linked(db, link_id)
    assert await ledger.claim_link(db, link_id, 60, None) is None
    assert await ledger.user_of_upload_link(db, link_id) == "ada"
    claimed = await claim(db, link_id)
    assert claimed.reserved_bytes == 80 and claimed.upload.link is not None and claimed.upload.incoming_name != link_id
    assert await checkpoint(db, claimed, 10)
    assert await sql.fetchval("select expires_at > clock_timestamp() + interval '20 hours' from uploads")  # the link's own end stays
    assert await ledger.end_resumable_upload(db, claimed.upload) == [(VOLUME, claimed.upload.incoming_name)]
    assert await used(sql, "ada") == (0, 80, 0)
    await linked(db, link_id)
    await ledger.publish_file(db, new_file("ada", 50, id=link_id, fence=(await claim(db, link_id)).upload.fence))
    assert await used(sql, "ada") == (50, 0, 1) and await ledger.claim_link(db, link_id, 60, None) is None
    assert await ledger.user_of_upload_link(db, uuid4()) is None


async def test_a_link_outlives_an_upload_that_was_given_up(db: Database, sql: Connection) -> None:
    link_id = await open_link(db)
    await linked(db, link_id)
    stale = await claim(db, link_id, lease=-0.001)
    await sql.execute("update resumable_uploads set expires_at = clock_timestamp()")
    assert await ledger.claim_resumable_upload(db, "ada", link_id, uuid4(), 60, BOOT) is None
    await sql.execute("update uploads set claimed_until = clock_timestamp()")
    await linked(db, link_id)
    assert (await row(sql, link_id))["offset_bytes"] == 0
    assert not await checkpoint(db, stale, 10)
    fresh = await claim(db, link_id)
    assert fresh.upload.incoming_name != stale.upload.incoming_name and fresh.boot_id_before is None


async def test_a_link_that_is_used_outlives_its_own_end(db: Database, sql: Connection) -> None:
    link_id = await open_link(db, 1)
    await linked(db, link_id)
    assert await sql.fetchval("select expires_at > clock_timestamp() + interval '50 minutes' from uploads")
