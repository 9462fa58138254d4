"""What `coffer audit` asks of the rows, page by page, and the little that it may change. Nothing here knows a volume."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import Counters, StoredFile, StoredPreview, Suspect, Tombstone
from server.ledger.statements import statement

_PATIENCE_SECONDS = 600.0
"""A tool has time: the counters of a user with millions of files are summed in one statement."""

_PAGE_OF_PATHS = statement("page_of_paths")
_GET_STORED = statement("get_stored")
_KNOWN_PATHS = statement("known_paths")
_UNKNOWN_PREVIEWS = statement("unknown_previews")
_CLAIMED = statement("claimed_files")
_NOTE = statement("note_suspects")
_FORGET = statement("forget_suspects")
_DROP = statement("drop_suspects")
_SUSPECTS = statement("page_of_suspects")
_PREVIEWS = statement("page_of_previews")
_PREVIEW_IS_STORED = statement("preview_is_stored")
_COUNTERS = statement("page_of_counters")
_CORRECT = statement("correct_counters")
_COUNT = statement("count_stored")
_OLD_RESERVATIONS = statement("old_reservations")
_OLD_TOMBSTONES = statement("old_tombstones")


class PathPage(NamedTuple):
    """The paths and sizes of a page of files, by volume. `last` is the id to go on from; None: that was all."""

    by_volume: dict[UUID, tuple[list[bytes], list[int]]]
    last: UUID | None


class Listed(NamedTuple):
    """A path as a listing has it, with what its names say: the file's id, and of a preview its own name."""

    path: str
    file_id: str
    preview: str | None = None


async def page_of_paths(db: Database, after: UUID | None, limit: int) -> PathPage:
    """The next `limit` files in the order of their ids, but for those known to be damaged."""
    rows = await db.read(_PAGE_OF_PATHS, after or UUID(int=0), limit, patience=_PATIENCE_SECONDS)
    by_volume = {row["volume_id"]: (row["paths"].encode().split(b"\n"), [*map(int, row["sizes"].split())]) for row in rows if row["paths"]}
    return PathPage(by_volume, max((row["last"] for row in rows), default=None))


async def get_stored(db: Database, ids: Sequence[UUID]) -> list[StoredFile]:
    """Those of `ids` that are files, whoever owns them."""
    return [_filled(StoredFile, row) for row in await db.read(_GET_STORED, list(ids), patience=_PATIENCE_SECONDS)]


async def files_without_rows(db: Database, volume_id: UUID, paths: Sequence[str], ids: Sequence[str]) -> set[str]:
    """Those of the paths that no row names. `ids` are those in the paths, in the same order."""
    known = (await db.read(_KNOWN_PATHS, volume_id, " ".join(ids), patience=_PATIENCE_SECONDS))[0]["paths"]
    return set(paths).difference(known.split("\n") if known else ())


async def previews_without_rows(db: Database, volume_id: UUID, previews: Sequence[Listed]) -> set[str]:
    """The paths of those that no row names."""
    paths, ids, names = ([each[place] for each in previews] for place in range(3))
    return {row["path"] for row in await db.read(_UNKNOWN_PREVIEWS, volume_id, paths, ids, names, patience=_PATIENCE_SECONDS)}


async def without_rows(db: Database, volume_id: UUID, listed: Sequence[Listed]) -> set[str]:
    """The same for both."""
    files = [each for each in listed if each.preview is None]
    previews = [each for each in listed if each.preview is not None]
    found = await files_without_rows(db, volume_id, [each.path for each in files], [each.file_id for each in files]) if files else set()
    return found | await previews_without_rows(db, volume_id, previews) if previews else found


async def claimed(db: Database, volume_id: UUID, listed: Sequence[Listed]) -> set[str]:
    """The paths of those without a row that are wanted all the same, or are about to be removed."""
    rows = await db.read(_CLAIMED, volume_id, [each.path for each in listed], [each.file_id for each in listed], patience=_PATIENCE_SECONDS)
    return {row["path"] for row in rows}


async def note_suspects(db: Database, began: datetime, volume_id: UUID, sizes: dict[str, int]) -> None:
    """Remembers files without a row, by path with their sizes, as seen by the audit that began then. Repeating is safe."""
    await db.write(_NOTE, began, volume_id, list(sizes), list(sizes.values()), patience=LONG_PATIENCE_SECONDS)


async def forget_suspects(db: Database, began: datetime, volume_id: UUID) -> None:
    """Forgets those that this audit, having looked everywhere, has not seen."""
    await db.write(_FORGET, began, volume_id, patience=_PATIENCE_SECONDS)


async def drop_suspects(db: Database, volume_id: UUID, paths: Sequence[str]) -> None:
    """Forgets those that have been dealt with. Repeating is safe."""
    await db.write(_DROP, volume_id, list(paths), patience=LONG_PATIENCE_SECONDS)


async def page_of_suspects(db: Database, began: datetime, volume_id: UUID, after: str, limit: int) -> list[Suspect]:
    """The next `limit` in the order of their paths."""
    return [_filled(Suspect, row) for row in await db.read(_SUSPECTS, volume_id, after, limit, began, patience=_PATIENCE_SECONDS)]


async def page_of_previews(db: Database, after: tuple[UUID, str] | None, limit: int) -> list[StoredPreview]:
    """The next `limit` previews after a file's id and a variant."""
    file_id, variant = after or (None, None)
    return [_filled(StoredPreview, row) for row in await db.read(_PREVIEWS, file_id, variant, limit, patience=_PATIENCE_SECONDS)]


async def preview_is_stored(db: Database, preview: StoredPreview) -> bool:
    """Whether its row, and that of its file, are still as they were."""
    rows = await db.read(_PREVIEW_IS_STORED, preview.file_id, preview.file_name, preview.volume_id, preview.file_path)
    is_stored: bool = rows[0]["yes"]
    return is_stored


async def page_of_counters(db: Database, after: str, limit: int) -> list[Counters]:
    """The next `limit` users in the order of their ids. Counters and sums are of one snapshot: uploads under way make no difference."""
    return [_filled(Counters, row) for row in await db.read(_COUNTERS, after, limit, patience=_PATIENCE_SECONDS)]


async def correct_counters(db: Database, user_id: str) -> tuple[dict[str, int], dict[str, int]] | None:
    """Makes a user's counters the sums, and tells what they were and are; None when the user has gone. `counter_corrections` keeps both."""
    rows = await db.write(_CORRECT, user_id, patience=_PATIENCE_SECONDS)
    return (msgspec.json.decode(rows[0]["was"]), msgspec.json.decode(rows[0]["became"])) if rows else None


async def count_stored(db: Database) -> tuple[int, int]:
    """How many files there are, and how many bytes, as the counters say."""
    row = (await db.read(_COUNT, patience=_PATIENCE_SECONDS))[0]
    return row["files"], row["bytes"]


async def old_reservations(db: Database, overdue_seconds: float, limit: int) -> list[tuple[UUID, str, int]]:
    """Id, user and bytes of reservations whose lease ended so long ago that housekeeping should have released them."""
    rows = await db.read(_OLD_RESERVATIONS, overdue_seconds, limit, patience=_PATIENCE_SECONDS)
    return [(row["id"], row["user_id"], row["reserved_bytes"]) for row in rows]


async def old_tombstones(db: Database, overdue_seconds: float, limit: int) -> list[Tombstone]:
    """Deleted files whose bytes housekeeping should have removed long ago."""
    return [_filled(Tombstone, row) for row in await db.read(_OLD_TOMBSTONES, overdue_seconds, limit, patience=_PATIENCE_SECONDS)]


def _filled(kind: type[Any], row: Row) -> Any:
    return kind(**{name: row[name] for name in kind.__struct_fields__})
