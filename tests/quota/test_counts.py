"""How many uploads and upload links one user may have, counted in PostgreSQL."""

import asyncio
from uuid import UUID, uuid4

import pytest

from server import ledger
from server.errors import TooManyUploads
from server.ledger import ClaimedLink, Database, UploadLink
from tests.ledger.races import waiting_for_lock
from tests.quota.conftest import Connect
from tests.quota.rows import VOLUME, Connection, add_user

pytestmark = pytest.mark.anyio


@pytest.fixture
async def ada(sql: Connection) -> str:
    await add_user(sql, "ada", None)
    return "ada"


async def open_one(db: Database, user_id: str, most: int | None, *, link: bool = False, lease_seconds: float = 60) -> UUID:
    upload_id = uuid4()
    await ledger.open_reservation(
        db,
        upload_id=upload_id,
        user_id=user_id,
        volume_id=VOLUME,
        reserved_bytes=0,  # the count must hold where no byte is charged
        idempotency_key=None,
        lease_seconds=lease_seconds,
        link=UploadLink() if link else None,
        most=most,
    )
    return upload_id


@pytest.mark.parametrize("link", [False, True])
async def test_40_at_once_at_a_limit_of_7(db: Database, ada: str, link: bool) -> None:
    outcomes = await asyncio.gather(*[open_one(db, ada, 7, link=link) for _ in range(40)], return_exceptions=True)
    assert sum(isinstance(each, UUID) for each in outcomes) == 7
    assert {type(each) for each in outcomes} == {UUID, TooManyUploads}
    await open_one(db, ada, 7, link=not link)  # the other sort has its own count
    await open_one(db, ada, None, link=link)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("claims", [True, False])
async def test_the_second_waits_for_the_first(db: Database, ada: str, connect: Connect, commits: bool, claims: bool) -> None:
    """Each would be the last that is allowed. The first has not committed when the second asks."""
    await open_one(db, ada, None)
    links = [await open_one(db, ada, None, link=True) for _ in range(2)]
    one = await connect()
    transaction = one.transaction()
    await transaction.start()
    second: asyncio.Future[UUID | ClaimedLink | None]
    if claims:
        await one.execute("select claim_link_v1($1, 60, 2)", links[0])
        second = asyncio.ensure_future(ledger.claim_link(db, links[1], 60, 2))
    else:
        await one.execute("select open_upload_v1($1, 'ada', $2, 0, null, 60, null, 2)", uuid4(), VOLUME)
        second = asyncio.ensure_future(open_one(db, ada, 2))
    await waiting_for_lock(one)
    await (transaction.commit() if commits else transaction.rollback())
    if commits:
        with pytest.raises(TooManyUploads) as refused:
            await second
        assert refused.value.limit == 2
    else:
        await second


async def test_what_has_expired_is_not_counted(db: Database, ada: str) -> None:
    for _ in range(3):
        await open_one(db, ada, 1, lease_seconds=-1)
    await open_one(db, ada, 1)
    with pytest.raises(TooManyUploads):
        await open_one(db, ada, 1)


async def test_a_used_link_counts_until_it_is_left(db: Database, ada: str) -> None:
    one, other = [await open_one(db, ada, None, link=True) for _ in range(2)]
    assert await ledger.claim_link(db, one, 60, 1) is not None
    with pytest.raises(TooManyUploads):
        await open_one(db, ada, 1)
    with pytest.raises(TooManyUploads):
        await ledger.claim_link(db, other, 60, 1)
    await ledger.unclaim_link(db, one)
    assert await ledger.claim_link(db, other, 60, 1) is not None
