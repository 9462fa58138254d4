"""Linking: a URL becomes an asset. Nothing is fetched here."""

from datetime import datetime
from uuid import UUID

import msgspec
from uuid_utils.compat import uuid7

from server import ledger
from server.assets.drive import direct_url
from server.errors import InvalidRequest
from server.fetching import Rules
from server.intake import Details
from server.ledger import Asset, AssetSubject, Database

MOST_ASSETS = 10_000
"""Of one user. They take no quota, and each is looked at every day."""
FRESH_SECONDS = 30.0
"""What was looked at within this is not looked at anew, however often it is asked for."""


async def link(
    db: Database,
    rules: Rules,
    user_id: str,
    url: str,
    details: Details,
    *,
    entity_type: str | None = None,
    entity_id: str | None = None,
    project_id: str | None = None,
) -> Asset:
    """An asset of a known user, to be looked at at once; with a kind in `details` media too. Raises `UrlRefused`, `InvalidRequest`."""
    if (entity_type is None) != (entity_id is None):
        raise InvalidRequest("entity_id", "comes with entity_type")
    if details.kind is None and (entity_id is not None or project_id is not None):
        raise InvalidRequest("type", "is needed for media of an entity or a project")
    shown, fetched = _urls(rules, url)
    encoded = msgspec.json.encode(details).decode()
    shows = AssetSubject(media_type=details.kind, entity_type=entity_type, entity_id=entity_id, project_id=project_id)
    asset = await ledger.add_asset(
        db, asset_id=uuid7(), user_id=user_id, url=shown, fetch_url=fetched, details=encoded, most=MOST_ASSETS, shows=shows
    )
    if asset is None:
        raise InvalidRequest("url", f"would be one asset more than the {MOST_ASSETS} that a user may have")
    return asset


async def relink(db: Database, rules: Rules, user_id: str, asset_id: UUID, url: str) -> Asset:
    """The asset with another URL. Raises `UrlRefused`, `NotFound`."""
    shown, fetched = _urls(rules, url)
    return await ledger.replace_asset(db, user_id, asset_id, url=shown, fetch_url=fetched)


async def ask_for_check(db: Database, user_id: str, asset_id: UUID) -> datetime | None:
    """When a look at the asset was asked for. None where it is known well enough."""
    return await ledger.ask_for_asset_check(db, user_id, asset_id, FRESH_SECONDS)


def notice_of(asset_id: UUID) -> str:
    """What `Notices` calls an asset."""
    return f"asset/{asset_id}"


def _urls(rules: Rules, url: str) -> tuple[str, str]:
    """The URL in its plainest form, and where its bytes are."""
    shown = rules.read(url).url
    direct = direct_url(shown)
    return shown, shown if direct is None else rules.read(direct).url
