"""Lists: the right files in the right order, and never more rows read than the page needs."""

import itertools
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg
import msgspec
import pytest

from server import ledger
from server.errors import InvalidRequest, SortNotAvailable
from server.ledger import Database, File, FileQuery, listing
from server.ledger.database import SESSION
from server.ledger.listing import Position, compose
from tests.quota.rows import VOLUME, new_file

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
FILES = 1500

# Many files alike, and three that differ in everything: reading the many to find the three is what must not happen.
FILL = """
insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, package_name, tags,
                        is_favorite, upload_date)
select id, 'ada',
       case when rare then 'Rare find ' || n || '.zip'
            else (array['Sunset-Beach', 'Beach_Sunset'])[1 + n % 2] || ' beach ' || n % 200 || '.PNG' end,
       case when rare then 'project' else 'image' end, case when rare then 'application/zip' else 'image/png' end, n % 100,
       decode(repeat('00', 32), 'hex'), $1, '/' || id || '.1.', case when rare then 'rare' else 'common' end,
       case when rare then array['rare'] else array['common', 'beach'] end, rare, $2::timestamptz + n % 300 * interval '1 minute'
  from (select gen_random_uuid() as id, n, n % 500 = 250 as rare from generate_series(1, $3::integer) n) made
"""

Filter = Callable[[File], bool]
Sort = Literal["created", "name", "size"]


def words_of(name: str) -> list[str]:
    return [word for word in re.split(r"[\x01-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3000]+", name.lower()) if word]


def first_match(name: str, search: str, *, descending: bool = False) -> bytes | None:
    """The first, in the list's order, of a name's search keys that begins as a search's."""
    words = words_of(name)
    keys = (" ".join(words[start:])[:64] for start in range(min(8, len(words))))
    matching = sorted((key.encode() for key in keys if key.startswith(" ".join(words_of(search))[:64])), reverse=descending)
    return matching[0] if matching else None


FILTERS: dict[str, tuple[dict[str, Any], Filter]] = {
    "none": ({}, lambda _: True),
    "type, rare": ({"file_type": "project"}, lambda file: file.file_type == "project"),
    "type, common": ({"file_type": "image"}, lambda file: file.file_type == "image"),
    "type, absent": ({"file_type": "video"}, lambda _: False),
    "mime, rare": ({"mime_type": "application/zip"}, lambda file: file.mime_type == "application/zip"),
    "mime, common": ({"mime_type": "image/png"}, lambda file: file.mime_type == "image/png"),
    "both": ({"file_type": "image", "mime_type": "image/png"}, lambda file: file.mime_type == "image/png"),
    "kinds": ({"kinds": frozenset({"project", "video"})}, lambda file: file.file_type == "project"),
    "all kinds": ({"kinds": frozenset({"project", "image"})}, lambda _: True),
    "one of the kinds": ({"kinds": frozenset({"project", "image"}), "file_type": "image"}, lambda file: file.file_type == "image"),
    "none of the kinds": ({"kinds": frozenset({"project"}), "file_type": "image"}, lambda _: False),
    "favorite": ({"is_favorite": True}, lambda file: file.is_favorite),
    "others": ({"is_favorite": False}, lambda file: not file.is_favorite),
    "package, rare": ({"package_name": "rare"}, lambda file: file.package_name == "rare"),
    "package, common": ({"package_name": "common"}, lambda file: file.package_name == "common"),
    "tag, rare": ({"tag": "rare"}, lambda file: "rare" in file.tags),
    "tag, common": ({"tag": "common"}, lambda file: "common" in file.tags),
}
SEARCHES = ["rare", "be", "BEACH-1", "sunset beach", "png", "1", "nothing"]
DATES: dict[str, tuple[dict[str, Any], Filter]] = {
    "from": ({"created_from": NOON + timedelta(minutes=290)}, lambda file: file.upload_date >= NOON + timedelta(minutes=290)),
    "to": ({"created_to": NOON + timedelta(minutes=10)}, lambda file: file.upload_date < NOON + timedelta(minutes=10)),
}
COMBINED = [
    ("from",),
    ("to",),
    ("from", "to"),
    ("type, common", "tag, common"),
    ("tag, common", "package, common", "favorite"),
    ("favorite", "type, rare", "from"),
    ("package, rare", "mime, rare", "to"),
    ("others", "tag, common"),
    ("kinds", "favorite"),
    ("all kinds", "tag, common"),
    ("kinds", "package, rare", "from"),
]
SORTS: tuple[Sort, ...] = ("created", "name", "size")
KEYS: dict[Sort, Callable[[File], Any]] = {
    "created": lambda file: file.upload_date,
    "name": lambda file: file.file_name.lower()[:100],  # all ASCII here, so in the order of bytes
    "size": lambda file: file.file_size,
}


@pytest.fixture
async def shelf(db: Database) -> list[File]:
    """Ada's files; Bob has the same, which she must never see."""
    await db.write("insert into volumes (id, mount_path) values ($1, '/nowhere')", VOLUME)
    await db.write("insert into user_storage (user_id, max_bytes) values ('ada', null), ('bob', null)")
    await db.write(FILL, VOLUME, NOON, FILES)
    await db.write(FILL.replace("'ada'", "'bob'"), VOLUME, NOON, FILES)
    files = await walk(db, FileQuery(limit=500))
    assert len(files) == FILES
    return files


async def walk(db: Database, query: FileQuery) -> list[File]:
    """All pages, one after the other."""
    files: list[File] = []
    while True:
        page = await ledger.list_files(db, "ada", query)
        assert len(page.files) <= query.limit
        files += page.files
        if page.next_cursor is None:
            return files
        query = msgspec.structs.replace(query, cursor=page.next_cursor)


def in_order(sort: Sort) -> Callable[[File], Any]:
    return lambda file: (KEYS[sort](file), file.id.bytes)


def ids(files: list[File]) -> list[UUID]:
    return [file.id for file in files]


async def test_filters_and_sorts(db: Database, shelf: list[File]) -> None:
    for name, sort, descending in itertools.product(FILTERS, SORTS, (False, True)):
        values, matches = FILTERS[name]
        expected = sorted(filter(matches, shelf), key=in_order(sort), reverse=descending)
        query = FileQuery(**values, sort=sort, descending=descending, limit=max(1, len(expected) // 3))
        assert ids(await walk(db, query)) == ids(expected), (name, sort, descending)


async def test_a_search_finds_words_by_their_beginnings_each_file_once(db: Database, shelf: list[File]) -> None:
    for search, descending in itertools.product(SEARCHES, (False, True)):
        matches = [(first_match(file.file_name, search, descending=descending), file.id.bytes, file.id) for file in shelf]
        expected = [file_id for *_, file_id in sorted((match for match in matches if match[0] is not None), reverse=descending)]
        query = FileQuery(name=search, sort="name", descending=descending, limit=max(1, len(expected) // 3))
        assert ids(await walk(db, query)) == expected, (search, descending)


async def test_filters_combine(db: Database, shelf: list[File]) -> None:
    every = FILTERS | DATES
    for names in COMBINED:
        values = dict(itertools.chain.from_iterable(every[name][0].items() for name in names))
        expected = [file for file in shelf if all(every[name][1](file) for name in names)]
        assert set(ids(await walk(db, FileQuery(**values, limit=40)))) == set(ids(expected)), names
        if "created_from" not in values and "created_to" not in values:
            found = await walk(db, FileQuery(**values, name="beach", sort="name", limit=40))
            assert set(ids(found)) == set(ids([file for file in expected if first_match(file.file_name, "beach")])), names


async def test_changes_between_pages_neither_repeat_nor_hide_others(db: Database, shelf: list[File]) -> None:
    first = await ledger.list_files(db, "ada", FileQuery(limit=100))
    await ledger.delete_files(db, "ada", ids(first.files))
    await db.write(FILL, VOLUME, NOON + timedelta(days=1), 50)
    rest = await walk(db, FileQuery(limit=100, cursor=first.next_cursor))
    assert ids(first.files) + ids(rest) == ids(shelf)


async def test_any_name_is_found_and_fits_its_indexes(db: Database) -> None:
    """The longest user, name, package and tag, of four bytes a character, and names that are all separators or all one word."""
    user = longest = "\U0001f3d6" * 255
    await db.write("insert into volumes (id, mount_path) values ($1, '/nowhere')", VOLUME)
    await db.write("insert into user_storage (user_id, max_bytes) values ($1, null)", user)
    names = ["\U0001f3d6" * 500, "\U0001f3d6 " * 250, "...", " ", "Été à la plage.JPG", "東京　の海.png", "a" * 500, "%_\\", "\uff21\uff22"]
    for name in names:
        new = new_file(user, 1, file_name=name, mime_type="image/" + "x" * 121, package_name=longest, tags=[longest])
        await ledger.set_favorite(db, user, (await ledger.publish_file(db, new)).id, True)
        found = await ledger.list_files(db, user, FileQuery(name=name, sort="name", limit=100))
        if words_of(name):
            assert name in {file.file_name for file in found.files}
    searches = {"plag": names[4], "ÉT": names[4], "の海": names[5], "\uff41\uff42": names[8]}  # the last one in small letters
    for search, expected in searches.items():
        page = await ledger.list_files(db, user, FileQuery(name=search, sort="name"))
        assert [file.file_name for file in page.files] == [expected]


@pytest.mark.parametrize(
    ("values", "sort", "refused"),
    [
        ({"name": "x"}, "created", "name"),
        ({"name": "x"}, "size", "name"),
        ({"created_from": NOON}, "name", "created_from"),
        ({"created_to": NOON}, "size", "created_to"),
    ],
)
async def test_what_no_index_serves_is_refused(db: Database, values: dict[str, Any], sort: Sort, refused: str) -> None:
    with pytest.raises(SortNotAvailable) as caught:
        await ledger.list_files(db, "ada", FileQuery(**values, sort=sort))
    assert (caught.value.filter, caught.value.sort) == (refused, sort)


@pytest.mark.parametrize("cursor", ["", "x", "====", "bm9uZQ", "W10", "é", "\ud800", "WyJjcmVhdGVkLWRlc2MiLDEsMl0", "a" * 10_000])
async def test_a_malformed_cursor_is_refused(db: Database, cursor: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await ledger.list_files(db, "ada", FileQuery(cursor=cursor))
    assert caught.value.field == "cursor"


async def test_a_cursor_of_another_order_is_refused(db: Database, shelf: list[File]) -> None:
    cursors = {}
    for sort, descending, name in [*itertools.product(SORTS, (False, True), (None,)), ("name", False, "beach"), ("name", True, "beach")]:
        query = FileQuery(sort=sort, descending=descending, name=name, limit=10)
        cursors[sort, descending, name] = query, (await ledger.list_files(db, "ada", query)).next_cursor
    for (key, (query, _)), (other, (_, cursor)) in itertools.product(cursors.items(), cursors.items()):
        following = msgspec.structs.replace(query, cursor=cursor)
        if key == other:
            assert (await ledger.list_files(db, "ada", following)).files
        else:
            with pytest.raises(InvalidRequest):
                await ledger.list_files(db, "ada", following)


# Plans


def literal(value: object) -> str:
    value = f"{{{','.join(value)}}}" if isinstance(value, list) else value
    return "null" if value is None else "'" + str(value).replace("'", "''") + "'"


async def rows_read(connection: asyncpg.Connection, query: FileQuery, after: Position | None) -> tuple[int, str]:
    """How many rows of tables and indexes it takes to read 11, by the generic plan that a connection keeps; and the plan."""
    sql, values = compose("ada", query, after, 11)  # of other filters too, 11 rows are read
    await connection.execute(f"prepare page as {sql}")
    arguments = ", ".join(map(literal, values))
    plan = await connection.fetchval(f"explain (analyze, format json, costs off, timing off) execute page ({arguments})")
    await connection.execute("deallocate page")

    def read(node: dict[str, Any]) -> float:
        own = 0.0
        if "Relation Name" in node:
            removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
            own = (node["Actual Rows"] + removed) * node["Actual Loops"]
        return own + sum(map(read, node.get("Plans", [])))

    return round(read(json.loads(plan)[0]["Plan"])), plan


@pytest.mark.parametrize("analyzed", [False, True])
async def test_a_page_reads_no_more_rows_than_it_shows(db: Database, shelf: list[File], database_url: str, analyzed: bool) -> None:
    """Or twice as many, where the filter has a table of its own.

    Plans are the generic ones, made for any user and any value: with what PostgreSQL knows when nearly all files are alike, and with
    what it knows of empty tables.
    """
    queries = [FileQuery(name=name, sort="name", descending=descending, limit=10) for name in SEARCHES for descending in (False, True)]
    for name, sort, descending in itertools.product(FILTERS, SORTS, (False, True)):
        queries.append(FileQuery(**FILTERS[name][0], sort=sort, descending=descending, limit=10))
    for name, descending in itertools.product(DATES, (False, True)):
        queries.append(FileQuery(**DATES[name][0], descending=descending, limit=10))
    both = FILTERS | DATES
    queries += [FileQuery(**dict(itertools.chain.from_iterable(both[name][0].items() for name in names)), limit=10) for names in COMBINED]
    connection = await asyncpg.connect(database_url, server_settings=SESSION)
    try:
        await connection.execute("analyze" if analyzed else "delete from pg_statistic")
        middle = shelf[FILES // 2]
        for query in queries:
            position = (KEYS[query.sort](middle) if query.name is None else "beach 5", middle.id)
            for after in (None, position):
                count, plan = await rows_read(connection, query, after)
                assert count <= 2 * 12 + 5, f"{query}\n{plan}"  # 5: the user's rows of user_storage_by_type
                assert "Seq Scan" not in plan and "Bitmap" not in plan, f"{query}\n{plan}"
    finally:
        await connection.close()


async def test_a_page_of_filters_that_seldom_meet_stops_reading_and_goes_on(
    db: Database, shelf: list[File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "READ_AT_MOST", 100)
    monkeypatch.setattr(listing, "SEARCH_AT_MOST", 50)
    query = FileQuery(tag="common", package_name="rare", limit=10)
    page = await ledger.list_files(db, "ada", query)
    assert page.files == [] and page.next_cursor is not None
    assert await walk(db, query) == []
    for query in (FileQuery(is_favorite=False, limit=10), FileQuery(name="be", sort="name", limit=10), FileQuery(tag="common", limit=10)):
        found = ids(await walk(db, query))
        assert len(found) == len(set(found)) == FILES - 3
    for query in (FileQuery(is_favorite=False, file_type="project"), FileQuery(name="rare", sort="name", package_name="common")):
        assert await walk(db, query) == []
