"""API keys: making, listing and revoking them."""

from server.auth import Scope, api_keys
from server.commands.failures import CommandFailed, Exit
from server.commands.output import say, show
from server.ledger import Database, create_api_key, find_api_key, list_api_keys, revoke_api_key
from server.settings import Settings


async def create(db: Database, *, name: str, scopes: list[str], as_json: bool) -> None:
    """`coffer key create`. The key is shown this once; the database keeps only a digest."""
    key = api_keys.NewApiKey.generate()
    granted: list[str] = [scope.value for scope in Scope if scope.value in scopes]
    await create_api_key(db, key_id=key.key_id, name=name, secret_sha256=key.secret_sha256, scopes=granted)
    say(f"made key {key.key_id} with {', '.join(granted)}; it is shown only now:")
    if as_json:
        show([{"key_id": key.key_id, "name": name, "scopes": granted, "key": key.text}], (), as_json=True)
    else:
        print(key.text)


async def show_all(db: Database, *, as_json: bool) -> None:
    """`coffer key list`"""
    columns = ("key_id", "name", "scopes", "created_at", "revoked_at")
    show([{column: getattr(row, column) for column in columns} for row in await list_api_keys(db)], columns, as_json)


async def revoke(db: Database, settings: Settings, *, key_id: str, for_real: bool) -> None:
    """`coffer key revoke`"""
    row = await find_api_key(db, key_id)
    if row is None:
        raise CommandFailed(f"there is no key {key_id}", Exit.NOT_FOUND)
    if row.revoked_at is not None:
        say(f"key {key_id} ({row.name}) was revoked at {row.revoked_at:%Y-%m-%d %H:%M:%S} UTC")
    elif not for_real:
        say(f"would revoke key {key_id} ({row.name}: {', '.join(row.scopes)}). Nothing was changed; repeat with --for-real")
    else:
        await revoke_api_key(db, key_id)
        say(f"revoked key {key_id} ({row.name}); running servers stop taking it within {settings.api_key_cache_seconds} s")
