"""The trash as a key sees it that is restricted to some kinds."""

from uuid import UUID

import pytest

from server import ledger
from server.ledger import Database
from server.ledger.trash import Position
from tests.quota.rows import VOLUME, new_file

pytestmark = pytest.mark.anyio


async def test_pages_of_some_kinds_are_newest_first_and_whole(db: Database) -> None:
    await ledger.add_volume(db, VOLUME, "/nowhere")
    for user_id in ("bob", "ada"):
        await ledger.ensure_user(db, user_id, max_bytes=None, volume_id=VOLUME)
        for number in range(12):
            file = await ledger.publish_file(db, new_file(user_id, 5, file_type=("image", "video", "audio")[number % 3]))
            hours = number * 5 % 7  # not in the order of ids, and some at the same time
            deleted_at = f"timestamptz '2026-01-07 00:00Z' - interval '{hours} hours'"
            await db.write(f"update user_files set deleted_at = {deleted_at} where id = $1", file.id)
    theirs = "from user_files where user_id = 'ada' and deleted_at is not null"
    rows = await db.read(f"select id, file_type, deleted_at {theirs} order by deleted_at desc, id desc")
    for kinds in (["video", "image"], ["audio"], ["scene"], None):
        found: list[UUID] = []
        after: Position | None = None
        while page := await ledger.list_trash(db, "ada", kinds, after, 3):
            found += [file.id for file in page]
            assert page[-1].deleted_at is not None
            after = page[-1].deleted_at, page[-1].id
        assert found == [row["id"] for row in rows if kinds is None or row["file_type"] in kinds]
