"""API keys: making, listing, rotating and revoking them."""

from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from server.auth import Scope, api_keys
from server.commands.failures import CommandFailed, Exit
from server.commands.output import say, show
from server.ledger import ApiKeyRow, Database, create_api_key, find_api_key, list_api_keys, revoke_api_key, rotate_api_key
from server.settings import Settings

Network = IPv4Network | IPv6Network


async def create(
    db: Database,
    *,
    name: str,
    scopes: list[str],
    user_ids: list[str] | None,
    kinds: list[str] | None,
    networks: list[Network] | None,
    lifetime: timedelta | None,
    as_json: bool,
) -> None:
    """`coffer key create`. The key is shown this once; the database keeps only a digest. None is no restriction."""
    if Scope.ADMIN in scopes and (user_ids or kinds):
        raise CommandFailed("a key with the scope admin cannot be restricted to users or types: make two keys", Exit.USAGE)
    key = api_keys.NewApiKey.generate()
    await create_api_key(
        db,
        key_id=key.key_id,
        name=name,
        secret_sha256=key.secret_sha256,
        scopes=[scope.value for scope in Scope if scope in scopes],
        user_ids=user_ids,
        kinds=kinds,
        networks=networks,
        lifetime=lifetime,
    )
    row = await _found(db, key.key_id)
    say(f"made key {key.key_id} with {', '.join(row.scopes)}; it is shown only now:")
    _show_new(row, key, as_json)


async def show_all(db: Database, *, as_json: bool) -> None:
    """`coffer key list`"""
    columns = ("key_id", "name", "scopes", "user_ids", "kinds", "networks", "created_at", "expires_at", "last_used_at", "revoked_at")
    show([{column: _facts(row)[column] for column in columns} for row in await list_api_keys(db)], columns, as_json)


async def rotate(db: Database, *, key_id: str, overlap: timedelta, lifetime: timedelta | None, as_json: bool) -> None:
    """`coffer key rotate`: a new key with the same rights; the old one works on for the overlap, so that apps can change over."""
    key = api_keys.NewApiKey.generate()
    row = await rotate_api_key(db, key_id, key_id=key.key_id, secret_sha256=key.secret_sha256, overlap=overlap, lifetime=lifetime)
    if row is None:
        old = await _found(db, key_id)
        raise CommandFailed(f"key {key_id} ({old.name}) has ended: make a new one with `coffer key create`", Exit.REFUSED)
    old = await _found(db, key_id)
    say(f"key {key_id} ({old.name}) ends at {old.expires_at:%Y-%m-%d %H:%M:%S} UTC")
    say(f"key {key.key_id} takes its place; it is shown only now:")
    _show_new(row, key, as_json)


async def revoke(db: Database, settings: Settings, *, key_id: str, for_real: bool) -> None:
    """`coffer key revoke`"""
    row = await _found(db, key_id)
    if row.revoked_at is not None:
        say(f"key {key_id} ({row.name}) was revoked at {row.revoked_at:%Y-%m-%d %H:%M:%S} UTC")
    elif not for_real:
        say(f"would revoke key {key_id} ({row.name}: {', '.join(row.scopes)}). Nothing was changed; repeat with --for-real")
    else:
        await revoke_api_key(db, key_id)
        say(f"revoked key {key_id} ({row.name}); running servers stop taking it within {settings.api_key_cache_seconds} s")


async def _found(db: Database, key_id: str) -> ApiKeyRow:
    row = await find_api_key(db, key_id)
    if row is None:
        raise CommandFailed(f"there is no key {key_id}", Exit.NOT_FOUND)
    return row


def _show_new(row: ApiKeyRow, key: api_keys.NewApiKey, as_json: bool) -> None:
    if as_json:
        columns = ("key_id", "name", "scopes", "user_ids", "kinds", "networks", "expires_at")
        show([{column: _facts(row)[column] for column in columns} | {"key": key.text}], (), as_json=True)
    else:
        print(key.text)


def _facts(row: ApiKeyRow) -> dict[str, Any]:
    """What may be told of a key. Its restrictions are None where there are none."""
    return {
        "key_id": row.key_id,
        "name": row.name,
        "scopes": row.scopes,
        "user_ids": row.user_ids,
        "kinds": row.kinds,
        "networks": None if row.networks is None else [str(each) for each in row.networks],
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "last_used_at": row.last_used_at,
        "revoked_at": row.revoked_at,
    }
