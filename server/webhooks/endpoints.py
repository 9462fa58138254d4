"""Endpoints: made, and given new secrets. A secret is told once, to whoever makes it."""

import base64
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Literal
from uuid import UUID

from uuid_utils.compat import uuid7

from server import ledger
from server.errors import InvalidRequest
from server.fetching import Rules
from server.ledger import Database

EventType = Literal[
    "file.created",
    "file.replaced",
    "file.trashed",
    "file.restored",
    "file.deleted",
    "file.infected",
    "file.damaged",
    "file.recovered",
    "preview.ready",
    "preview.failed",
    "quota.warning",
    "job.completed",
    "job.failed",
    "job.cancelled",
]

MOST_ENDPOINTS = 20
"""Each costs a row for each event."""

_SECRET_BYTES = 32  # Standard Webhooks: 24 to 64


def _new_secret() -> str:
    """As Standard Webhooks writes them."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


async def register(db: Database, rules: Rules, *, url: str, types: Sequence[EventType] | None, description: str) -> tuple[UUID, str]:
    """A new endpoint that is told of events of these types (None: of all) from now on; its id and its secret.

    The URL is judged by its text now, and by its address whenever something is sent. Raises `UrlRefused`, `InvalidRequest`.
    """
    target = rules.read(url)
    endpoint_id, secret = uuid7(), _new_secret()
    added = await ledger.add_webhook_endpoint(
        db, endpoint_id=endpoint_id, url=target.url, types=types, description=description, secret=secret, most=MOST_ENDPOINTS
    )
    if not added:
        raise InvalidRequest("url", f"would be one endpoint more than the {MOST_ENDPOINTS} that there may be: delete one")
    return endpoint_id, secret


async def rotate(db: Database, endpoint_id: UUID, overlap_seconds: int) -> tuple[str, datetime]:
    """The endpoint's new secret, and until when the one before signs too. Raises `NotFound`."""
    secret = _new_secret()
    return secret, await ledger.rotate_webhook_secret(db, endpoint_id, secret, overlap_seconds)
