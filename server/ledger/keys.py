"""API keys. Only the SHA-256 of a key's secret is ever here."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network

from server.actor import actor_json
from server.ledger.database import Database, Row
from server.ledger.models import ApiKeyRow
from server.ledger.statements import statement

_COLUMNS = ", ".join(ApiKeyRow.__struct_fields__)

_CREATE = statement("create_api_key")
_FIND = statement("find_api_key", key=_COLUMNS)
_LIST = statement("list_api_keys", key=_COLUMNS)
_REVOKE = statement("revoke_api_key")
_ROTATE = statement("rotate_api_key", key=_COLUMNS)
_NOTE_USED = statement("note_api_keys_used")


async def create_api_key(
    db: Database,
    *,
    key_id: str,
    name: str,
    secret_sha256: bytes,
    scopes: list[str],
    user_ids: list[str] | None = None,
    kinds: list[str] | None = None,
    networks: list[IPv4Network | IPv6Network] | None = None,
    lifetime: timedelta | None = None,
) -> None:
    """Adds a key. None is no restriction, and no end. PostgreSQL's clock counts the lifetime."""
    await db.write(_CREATE, key_id, name, secret_sha256, scopes, user_ids, kinds, networks, lifetime, actor_json())


async def rotate_api_key(
    db: Database, old_key_id: str, *, key_id: str, secret_sha256: bytes, overlap: timedelta, lifetime: timedelta | None = None
) -> ApiKeyRow | None:
    """Adds a key with the rights of an old one, which ends after the overlap if not before. Both or neither happen.

    The new one lives as long as the old one was made for, unless another `lifetime` is given. None when the old one is
    unknown, revoked or expired.
    """
    rows = await db.write(_ROTATE, old_key_id, key_id, secret_sha256, overlap, lifetime, actor_json())
    return _key_of(rows[0]) if rows else None


async def note_api_keys_used(db: Database, used: Mapping[str, datetime]) -> None:
    """Keeps for each key id when it was last used."""
    await db.write(_NOTE_USED, list(used.keys()), list(used.values()))


async def find_api_key(db: Database, key_id: str) -> ApiKeyRow | None:
    """The key, revoked or not."""
    rows = await db.read(_FIND, key_id)
    return _key_of(rows[0]) if rows else None


async def list_api_keys(db: Database) -> list[ApiKeyRow]:
    """All keys, revoked ones included, oldest first."""
    return [_key_of(row) for row in await db.read(_LIST)]


async def revoke_api_key(db: Database, key_id: str) -> bool:
    """Ends a key for good. False when it is unknown or ended already."""
    return bool(await db.write(_REVOKE, key_id, actor_json()))


def _key_of(row: Row) -> ApiKeyRow:
    return ApiKeyRow(**{name: row[name] for name in ApiKeyRow.__struct_fields__})
