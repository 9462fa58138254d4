"""API keys. Only the SHA-256 of a key's secret is ever here."""

from server.ledger.database import Database, Row
from server.ledger.models import ApiKeyRow
from server.ledger.statements import statement

_COLUMNS = ", ".join(ApiKeyRow.__struct_fields__)

_CREATE = statement("create_api_key")
_FIND = statement("find_api_key", key=_COLUMNS)
_LIST = statement("list_api_keys", key=_COLUMNS)
_REVOKE = statement("revoke_api_key")


async def create_api_key(db: Database, *, key_id: str, name: str, secret_sha256: bytes, scopes: list[str]) -> None:
    """Adds a key."""
    await db.write(_CREATE, key_id, name, secret_sha256, scopes)


async def find_api_key(db: Database, key_id: str) -> ApiKeyRow | None:
    """The key, revoked or not."""
    rows = await db.read(_FIND, key_id)
    return _key_of(rows[0]) if rows else None


async def list_api_keys(db: Database) -> list[ApiKeyRow]:
    """All keys, revoked ones included, oldest first."""
    return [_key_of(row) for row in await db.read(_LIST)]


async def revoke_api_key(db: Database, key_id: str) -> bool:
    """Ends a key for good. False when it is unknown or ended already."""
    return bool(await db.write(_REVOKE, key_id))


def _key_of(row: Row) -> ApiKeyRow:
    return ApiKeyRow(**{name: row[name] for name in ApiKeyRow.__struct_fields__})
