"""lists: a page of 50 for a user with 1,000,000 files against the same page for a user with 1,000.

The rows are added by SQL, with every trigger on, and have no files: this database is thrown away.
"""

import asyncio
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from urllib.parse import quote
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from tests.bench.clients import Connection
from tests.bench.harness import Stage, elapsed, say, verdict
from tests.bench.servers import Coffer, Request

MANY, FEW = 1_000_000, 1_000
ASKED = 15
BATCH = 100_000
RARE = 60  # files that match a rare filter, of either user: a full page and a little more
_USERS = {"many": MANY, "few": FEW}
_COLUMNS = [
    *("id", "user_id", "file_name", "file_type", "mime_type", "file_size", "sha256", "volume_id", "file_path"),
    *("package_name", "tags", "is_favorite", "upload_date"),
]
_TYPES = [("image", "image/jpeg"), ("image", "image/png"), ("video", "video/mp4"), ("audio", "audio/mpeg"), ("scene", "application/zip")]
_WORDS = ("beach", "sunset", "dog", "forest", "city", "night", "snow", "portrait", "draft", "final")
_OLDEST, _HISTORY = datetime(2024, 1, 1, tzinfo=UTC), timedelta(days=730)

_FILTERS: dict[str, dict[str, str]] = {
    "no filter": {},
    "type": {"type": "image"},
    "mime": {"mime": "video/mp4"},
    "tag": {"tag": "common"},
    "rare tag": {"tag": "rare"},
    "favorite": {"favorite": "true"},
    "package": {"package_name": "package-3"},
    "rare package": {"package_name": "rare"},
    "type and tag": {"type": "image", "tag": "common"},
}
_SORTED_ONE_WAY: dict[str, tuple[dict[str, str], str]] = {
    "name search": ({"name": "beach"}, "name"),
    "rare name search": ({"name": "unusual"}, "name"),
    "dates": ({"created_from": "2024-06-01", "created_to": "2025-06-01"}, "created"),
}


def measure(stage: Stage) -> None:
    coffer = stage.coffer
    began = time.monotonic()
    asyncio.run(_add_rows(coffer))
    say(f"added {MANY + FEW:,} rows in {elapsed(began)}")
    connection = Connection(coffer.port)
    ratios: dict[str, list[tuple[float, str]]] = {}
    slowest = 0.0
    for name, query in _queries():
        first = {user: _request(coffer, user, query) for user in _USERS}
        second = {user: _next(connection, first[user], query, coffer, user) for user in _USERS}
        for page, requests in (("first page", first), ("second page", second)):
            seconds = _ask(connection, requests)
            slowest = max(slowest, seconds["many"])
            ratios.setdefault(name, []).append((seconds["many"] / seconds["few"], f"{query.get('sort')}, {page}"))
    for name, found in ratios.items():
        worst, where = max(found)
        median = statistics.median(value for value, _ in found)
        verdict(f"{name}: median {median:.2f}, worst ({where})", worst, at_most=1.5)
    say(f"slowest page of all: {slowest * 1000:.1f} ms")


def _queries() -> Iterator[tuple[str, dict[str, str]]]:
    for name, given in _FILTERS.items():
        for sort in ("created", "name", "size"):
            for sign in ("", "-"):
                yield name, given | {"sort": sign + sort}
    for name, (given, sort) in _SORTED_ONE_WAY.items():
        for sign in ("", "-"):
            yield name, given | {"sort": sign + sort}


def _request(coffer: Coffer, user: str, query: dict[str, str]) -> Request:
    text = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    return Request("GET", f"/api/files?limit=50&{text}", coffer.headers(user))


def _next(connection: Connection, first: Request, query: dict[str, str], coffer: Coffer, user: str) -> Request:
    page = json.loads(connection.ask(first))
    if len(page["files"]) != 50 or page["next_cursor"] is None:
        raise AssertionError(f"{first.path} does not fill a page: {len(page['files'])} files")
    return _request(coffer, user, query | {"cursor": page["next_cursor"]})


def _ask(connection: Connection, requests: dict[str, Request]) -> dict[str, float]:
    """The median seconds of each request, asked in turns."""
    seconds: dict[str, list[float]] = {user: [] for user in requests}
    for _ in range(ASKED):
        for user, request in requests.items():
            began = time.perf_counter()
            connection.ask(request)
            seconds[user].append(time.perf_counter() - began)
    return {user: statistics.median(each) for user, each in seconds.items()}


async def _add_rows(coffer: Coffer) -> None:
    connection = await asyncpg.connect(coffer.database_url)
    try:
        volume_id = await connection.fetchval("select id from volumes")
        for user, count in _USERS.items():
            await connection.execute("insert into user_storage (user_id, max_bytes, volume_id) values ($1, null, $2)", user, volume_id)
            rows = _rows(user, count, volume_id)
            while batch := list(islice(rows, BATCH)):
                await connection.copy_records_to_table("user_files", records=batch, columns=_COLUMNS)
        # What autovacuum does within a minute of such a load.
        await connection.execute("vacuum (analyze)")
    finally:
        await connection.close()


def _rows(user: str, count: int, volume_id: UUID) -> Iterator[tuple[Any, ...]]:
    """Files spread evenly over a user's history: every filter matches the same share of many files as of few, but for the rare ones."""
    dice = random.Random(user)
    sha256 = hashlib.sha256(user.encode()).digest()
    rare = set(dice.sample(range(count), RARE))
    for number in range(count):
        file_id = uuid7()
        kind, mime_type = dice.choice(_TYPES)
        first, second = dice.sample(_WORDS, 2)
        is_rare = number in rare
        yield (
            *(file_id, user, f"{'unusual ' if is_rare else ''}{first}-{second} {number}", kind, mime_type),
            *(dice.randrange(1_000, 50_000_000), sha256, volume_id, f"users/{user}/{kind}s/{file_id}.1.bin"),
            "rare" if is_rare else f"package-{dice.randrange(10)}",
            [tag for tag, wanted in (("common", dice.random() < 0.2), ("rare", is_rare)) if wanted],
            dice.random() < 0.1,
            _OLDEST + _HISTORY * (number / count),
        )
