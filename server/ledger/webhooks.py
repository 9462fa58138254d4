"""Endpoints that are told of events, and what is still to be told. Deliveries come with the events, by a trigger (sql/migrations/0021)."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from server.actor import actor_json
from server.errors import NotFound
from server.ledger.database import LONG_PATIENCE_SECONDS, Database, Row
from server.ledger.models import DeadDelivery, Delivery, DueWebhook, WebhookEndpoint
from server.ledger.statements import statement

_ENDPOINT = ", ".join(f"w.{name}" for name in WebhookEndpoint.__struct_fields__ if name not in ("pending", "dead"))
_ADD = statement("add_webhook_endpoint")
_LIST = statement("list_webhook_endpoints", endpoint=_ENDPOINT)
_GET = statement("get_webhook_endpoint", endpoint=_ENDPOINT)
_DELETE = statement("delete_webhook_endpoint")
_ROTATE = statement("rotate_webhook_secret")
_DUE = statement("due_webhooks")
_CLAIM = statement("claim_deliveries")
_END = statement("end_deliveries")
_PUT_OFF = statement("put_off_delivery")
_DEAD = statement("list_dead_deliveries")
_REDELIVER = statement("redeliver")
_DEAD_CALLBACKS = statement("list_dead_callbacks")
_REDELIVER_CALLBACKS = statement("redeliver_callbacks")
_PURGE = statement("purge_deliveries")
_FORGET_SECRETS = statement("forget_callback_secrets")


async def add_webhook_endpoint(
    db: Database, *, endpoint_id: UUID, url: str, types: Sequence[str] | None, description: str, secret: str, most: int
) -> bool:
    """From its return on, every event of these types (None: of all) is told to the endpoint. False when there are `most` already."""
    wanted = None if types is None else list(types)
    return bool(await db.write(_ADD, endpoint_id, url, wanted, description, secret, most, actor_json()))


async def list_webhook_endpoints(db: Database) -> list[WebhookEndpoint]:
    """All, the oldest first."""
    return [_endpoint_of(row) for row in await db.read(_LIST, patience=LONG_PATIENCE_SECONDS)]


async def get_webhook_endpoint(db: Database, endpoint_id: UUID) -> WebhookEndpoint:
    """One. Raises `NotFound`."""
    rows = await db.read(_GET, endpoint_id, patience=LONG_PATIENCE_SECONDS)
    if not rows:
        raise NotFound
    return _endpoint_of(rows[0])


async def delete_webhook_endpoint(db: Database, endpoint_id: UUID) -> None:
    """Deletes it, with what it has not been told yet. Raises `NotFound`."""
    if not await db.write(_DELETE, endpoint_id, actor_json(), patience=LONG_PATIENCE_SECONDS):
        raise NotFound


async def rotate_webhook_secret(db: Database, endpoint_id: UUID, secret: str, overlap_seconds: int) -> datetime:
    """Signs with another secret, and for a while with the one before too; tells until when. Raises `NotFound`."""
    rows = await db.write(_ROTATE, endpoint_id, secret, overlap_seconds, actor_json())
    if not rows:
        raise NotFound
    until: datetime = rows[0]["old_secret_until"]
    return until


async def due_webhooks(db: Database) -> list[DueWebhook]:
    """Endpoints for which something is due."""
    return [DueWebhook(**dict(row)) for row in await db.read(_DUE)]


async def claim_deliveries(db: Database, endpoint_id: UUID, most: int, lease_seconds: float) -> list[Delivery]:
    """Takes what is due, of each file the first that is untold. It comes back when it is not ended or put off within the lease."""
    rows = await db.write(_CLAIM, endpoint_id, most, lease_seconds)
    return [Delivery(**dict(row) | {"payload": msgspec.json.decode(row["payload"])}) for row in rows]


async def end_deliveries(db: Database, endpoint_id: UUID, ids: Sequence[int]) -> None:
    """These were told."""
    await db.write(_END, endpoint_id, list(ids))


async def put_off_delivery(db: Database, delivery: Delivery, delay_seconds: float, failure: str) -> bool:
    """Tries it again after a while, with all that follows it in its order. True when that would be too late: it is given up."""
    rows = await db.write(_PUT_OFF, delivery.id, delivery.tries, delay_seconds, failure)
    return bool(rows) and rows[0]["state"] == "dead"


async def list_dead_deliveries(db: Database, endpoint_id: UUID, after: int, limit: int) -> list[DeadDelivery]:
    """A page of what the endpoint was never told, in the order of ids."""
    return _letters_of(await db.read(_DEAD, endpoint_id, after, limit))


async def redeliver(db: Database, endpoint_id: UUID, ids: Sequence[int] | None, limit: int) -> int:
    """Makes up to `limit` of what was given up due again, of these or of all, for as long as new ones. Tells how many."""
    wanted = None if ids is None else list(ids)
    count: int = (await db.write(_REDELIVER, endpoint_id, wanted, limit, actor_json(), patience=LONG_PATIENCE_SECONDS))[0]["count"]
    return count


async def list_dead_callbacks(db: Database, after: int, limit: int) -> list[DeadDelivery]:
    """A page of the jobs' ends that those whom they name were never told, of all users, in the order of ids."""
    return _letters_of(await db.read(_DEAD_CALLBACKS, after, limit))


async def redeliver_callbacks(db: Database, ids: Sequence[int] | None, limit: int) -> int:
    """As `redeliver`, of callbacks."""
    wanted = None if ids is None else list(ids)
    count: int = (await db.write(_REDELIVER_CALLBACKS, wanted, limit, actor_json(), patience=LONG_PATIENCE_SECONDS))[0]["count"]
    return count


async def purge_deliveries(db: Database, days: int, limit: int) -> None:
    """Forgets what was given up so many days ago, and what is left of deleted endpoints; secrets of callbacks once they are of no use."""
    await db.write(_PURGE, days, limit, patience=LONG_PATIENCE_SECONDS)
    await db.write(_FORGET_SECRETS, limit, patience=LONG_PATIENCE_SECONDS)


def _letters_of(rows: list[Row]) -> list[DeadDelivery]:
    return [DeadDelivery(**dict(row) | {"payload": msgspec.json.decode(row["payload"])}) for row in rows]


def _endpoint_of(row: Row) -> WebhookEndpoint:
    return WebhookEndpoint(**{name: row[name] for name in WebhookEndpoint.__struct_fields__})
