"""Rows for the tests, and what must be true of them."""

from typing import Any
from uuid import UUID, uuid4

import asyncpg

from server.ledger import NewFile, ReplacedContent

Connection = asyncpg.Connection

VOLUME = UUID("00000000-0000-7000-8000-000000000001")
SHA256 = bytes(32)

INSERT_FILE = """
insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path)
values ($1, $2, 'a file.png', 'image', 'image/png', $3, $4, $5, $6)
"""
INSERT_UPLOAD = (
    "insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at) values ($1, $2, $3, $4, now() + interval '1 hour')"
)


def path_of(file_id: UUID, generation: int = 1) -> str:
    return f"users/someone/images/{file_id}.{generation}.png"


def new_file(user_id: str, size: int, **changes: Any) -> NewFile:
    file_id = changes.pop("id", None) or uuid4()
    values: dict[str, Any] = {
        "id": file_id,
        "user_id": user_id,
        "file_name": "a file.png",
        "file_type": "image",
        "mime_type": "image/png",
        "file_size": size,
        "sha256": SHA256,
        "volume_id": VOLUME,
        "file_path": path_of(file_id),
    }
    return NewFile(**values | changes)


def replacement(file_id: UUID, size: int, generation: int, upload_id: UUID | None = None) -> ReplacedContent:
    return ReplacedContent(
        upload_id=upload_id or uuid4(),
        mime_type="image/png",
        file_size=size,
        sha256=SHA256,
        volume_id=VOLUME,
        file_path=path_of(file_id, generation),
        generation=generation,
    )


async def add_volume(connection: Connection) -> None:
    await connection.execute("insert into volumes (id, mount_path) values ($1, '/nowhere') on conflict do nothing", VOLUME)


async def add_user(connection: Connection, user_id: str, max_bytes: int | None) -> None:
    await connection.execute("insert into user_storage (user_id, max_bytes) values ($1, $2)", user_id, max_bytes)


async def insert_file(connection: Connection, user_id: str, size: int) -> UUID:
    file_id = uuid4()
    await connection.execute(INSERT_FILE, file_id, user_id, size, SHA256, VOLUME, path_of(file_id))
    return file_id


async def insert_upload(connection: Connection, user_id: str, size: int) -> UUID:
    upload_id = uuid4()
    await connection.execute(INSERT_UPLOAD, upload_id, user_id, VOLUME, size)
    return upload_id


async def used(connection: Connection, user_id: str) -> tuple[int, int, int]:
    """Total bytes, reserved bytes and files, as the user's row says."""
    row = await connection.fetchrow("select total_bytes, reserved_bytes, file_count from user_storage where user_id = $1", user_id)
    assert row is not None
    return row["total_bytes"], row["reserved_bytes"], row["file_count"]


DRIFT = """
with files as (select user_id, count(*) as files, sum(file_size) as bytes from user_files group by user_id),
     held as (select user_id, sum(reserved_bytes) as bytes from uploads group by user_id),
     typed as (select user_id, file_type, mime_type, count(*) as files, sum(file_size) as bytes from user_files group by 1, 2, 3),
     history as (select distinct on (user_id) user_id, total_bytes from usage_ledger order by user_id, id desc),
     moved as (select user_id, sum(delta_bytes) as bytes from usage_ledger group by user_id)
select 'total_bytes' as what, u.user_id from user_storage u left join files f using (user_id) where u.total_bytes <> coalesce(f.bytes, 0)
union all
select 'file_count', u.user_id from user_storage u left join files f using (user_id) where u.file_count <> coalesce(f.files, 0)
union all
select 'reserved_bytes', u.user_id from user_storage u left join held h using (user_id) where u.reserved_bytes <> coalesce(h.bytes, 0)
union all
select 'by type', coalesce(t.user_id, k.user_id) from typed t full join user_storage_by_type k using (user_id, file_type, mime_type)
 where (coalesce(t.files, 0), coalesce(t.bytes, 0)) is distinct from (coalesce(k.file_count, 0), coalesce(k.total_bytes, 0))
union all
select 'last total of the history', u.user_id from user_storage u left join history h using (user_id)
 where u.total_bytes <> coalesce(h.total_bytes, 0)
union all
select 'sum of the history', u.user_id from user_storage u left join moved m using (user_id) where u.total_bytes <> coalesce(m.bytes, 0)
union all
(select 'tags', user_id from (
    select user_id, tag, upload_date, name_key, file_size, file_id from user_file_tags
    except select f.user_id, t, f.upload_date, f.name_key, f.file_size, f.id from user_files f, unnest(f.tags) t) surplus)
union all
(select 'tags', user_id from (
    select f.user_id, t, f.upload_date, f.name_key, f.file_size, f.id from user_files f, unnest(f.tags) t
    except select user_id, tag, upload_date, name_key, file_size, file_id from user_file_tags) missing)
union all
(select 'words', user_id from (
    select user_id, suffix_key, file_id from user_file_words
    except select f.user_id, w, f.id from user_files f, name_suffixes_v1(f.file_name) w) surplus)
union all
(select 'words', user_id from (
    select f.user_id, w, f.id from user_files f, name_suffixes_v1(f.file_name) w
    except select user_id, suffix_key, file_id from user_file_words) missing)
"""


async def drift(connection: Connection) -> list[tuple[str, str]]:
    """What the ledger says that its files and uploads do not: must be empty. (For users who were never deleted and made anew.)"""
    return [(row["what"], row["user_id"]) for row in await connection.fetch(DRIFT)]
