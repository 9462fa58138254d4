"""Linked assets as rows: their URLs, what was found out about them, and which are to be looked at or imported."""

from collections.abc import Collection, Sequence
from datetime import datetime
from uuid import UUID

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import Database, Row
from server.ledger.models import Asset, AssetSubject
from server.ledger.statements import statement

ASSET_COLUMNS = ", ".join(f"l.{name}" for name in Asset.__struct_fields__)

_ADD = statement("add_asset", asset=ASSET_COLUMNS)
_GET = statement("get_asset", asset=ASSET_COLUMNS)
_LIST = statement("list_assets", asset=ASSET_COLUMNS)
_REPLACE = statement("replace_asset", asset=ASSET_COLUMNS)
_DELETE = statement("delete_asset")
_ASK_CHECK = statement("ask_for_asset_check")
_ASK_IMPORT = statement("ask_for_asset_import", asset=ASSET_COLUMNS)
_CLAIM_CHECKS = statement("claim_asset_checks", asset=ASSET_COLUMNS)
_FINISH_CHECK = statement("finish_asset_check")
_CLAIM_IMPORTS = statement("claim_asset_imports", asset=ASSET_COLUMNS)
_PUT_OFF_IMPORTS = statement("put_off_asset_imports")
_FINISH_IMPORT = statement("finish_asset_import")


async def add_asset(
    db: Database, *, asset_id: UUID, user_id: str, url: str, fetch_url: str, details: str, most: int, shows: AssetSubject
) -> Asset | None:
    """Links an asset of a known user, to be looked at at once. None when the user has `most`."""
    subject = shows.media_type, shows.entity_type, shows.entity_id, shows.project_id
    rows = await db.write(_ADD, asset_id, user_id, url, fetch_url, details, most, *subject, actor_json())
    return _asset_of(rows[0]) if rows else None


async def get_asset(db: Database, user_id: str, asset_id: UUID) -> Asset:
    """One. Raises `NotFound`."""
    return _one(await db.read(_GET, user_id, asset_id))


async def list_assets(db: Database, user_id: str, after: UUID, limit: int, state: str | None) -> list[Asset]:
    """A page, the oldest first."""
    return [_asset_of(row) for row in await db.read(_LIST, user_id, after, limit, state)]


async def replace_asset(db: Database, user_id: str, asset_id: UUID, *, url: str, fetch_url: str) -> Asset:
    """Another URL, of which nothing is known yet. Raises `NotFound`."""
    return _one(await db.write(_REPLACE, user_id, asset_id, url, fetch_url, actor_json()))


async def delete_asset(db: Database, user_id: str, asset_id: UUID) -> None:
    """Forgets it. Raises `NotFound`."""
    if not await db.write(_DELETE, user_id, asset_id, actor_json()):
        raise NotFound


async def ask_for_asset_check(db: Database, user_id: str, asset_id: UUID, fresh_seconds: float) -> datetime | None:
    """Has it looked at by a worker. None when that was lately, or there is no need to, or no such asset."""
    rows = await db.write(_ASK_CHECK, user_id, asset_id, fresh_seconds)
    return rows[0]["asked_at"] if rows else None


async def ask_for_asset_import(db: Database, user_id: str, asset_id: UUID, kinds: Collection[str] | None) -> Asset:
    """Has it imported by a worker, as a file of these kinds alone. Does nothing where it is already. Raises `NotFound`."""
    rows = await db.write(_ASK_IMPORT, user_id, asset_id, None if kinds is None else sorted(kinds), actor_json())
    return _asset_of(rows[0]) if rows else await get_asset(db, user_id, asset_id)


async def claim_asset_checks(db: Database, most: int, lease_seconds: float) -> list[Asset]:
    """Takes what is to be looked at."""
    return [_asset_of(row) for row in await db.write(_CLAIM_CHECKS, most, lease_seconds)]


async def finish_asset_check(
    db: Database, asset: Asset, *, reason: str | None, mime_type: str | None, size_bytes: int | None, again_seconds: float
) -> None:
    """What was found: `reason` None is that it can be reached. Looks again after a while."""
    state = "reachable" if reason is None else "unreachable"
    await db.write(_FINISH_CHECK, asset.id, asset.version, state, reason, mime_type, size_bytes, again_seconds)


async def claim_asset_imports(db: Database, most: int, lease_seconds: float) -> list[Asset]:
    """Takes what is to be imported. Keep the lease by `put_off_asset_imports`."""
    return [_asset_of(row) for row in await db.write(_CLAIM_IMPORTS, most, lease_seconds)]


async def put_off_asset_imports(db: Database, ids: Sequence[UUID], delay_seconds: float) -> None:
    """They come back to be imported after a while, unless they are finished by then."""
    await db.write(_PUT_OFF_IMPORTS, list(ids), delay_seconds)


async def finish_asset_import(db: Database, asset: Asset, *, file_id: UUID | None, reason: str | None) -> None:
    """It became this file, or `reason` says why not. Nothing when it has another URL by now."""
    await db.write(_FINISH_IMPORT, asset.id, asset.version, file_id, reason)


def _asset_of(row: Row) -> Asset:
    return Asset(**{name: row[name] for name in Asset.__struct_fields__})


def _one(rows: list[Row]) -> Asset:
    if not rows:
        raise NotFound
    return _asset_of(rows[0])
