"""Tells endpoints of events, by Standard Webhooks: at least once, those of one file in their order, and for three days if need be.

A delivery is a row until its endpoint has answered 2xx. Who sends it moves its time on first, so one whose worker died comes back.
"""

import asyncio
import logging
from datetime import UTC, datetime
from uuid import UUID

import msgspec
from standardwebhooks import Webhook

from server import ledger
from server.errors import CofferError, UrlRefused
from server.fetching import Fetcher, FetchFailed
from server.ledger import Database, Delivery, DueWebhook, WorkCounts

SEND_SECONDS = 15.0
"""How long an endpoint may take to answer."""
_LEASE_SECONDS = 2 * SEND_SECONDS
_LOOK_AGAIN_SECONDS = 5.0
"""However much is due, the endpoint is read anew after this: its secret may be another."""
AT_ONCE = 8
"""Requests to one endpoint."""
FIRST_DELAY_SECONDS = 5.0
LONGEST_DELAY_SECONDS = 6 * 3_600.0
"""Before the second try, and between late ones: 5 s, 20 s, 80 s, 5 min, 21 min, 85 min, 6 h, 6 h, ... for three days are 18 tries."""

log = logging.getLogger("coffer.webhooks")


class Sender:
    """Lives in one event loop of a worker. Several workers may send at once."""

    def __init__(
        self, db: Database, fetcher: Fetcher, counts: WorkCounts | None = None, *, first_delay_seconds: float = FIRST_DELAY_SECONDS
    ) -> None:
        self._db = db
        self._fetcher = fetcher
        self._counts = counts or WorkCounts()
        self._first_delay_seconds = first_delay_seconds
        self._sending: dict[UUID, asyncio.Task[None]] = {}
        self._stopping = False

    async def look(self) -> None:
        """Begins to send what is due. Each endpoint has a task of its own: a slow one holds up no other."""
        for webhook in await ledger.due_webhooks(self._db):
            if webhook.id not in self._sending and not self._stopping:
                self._sending[webhook.id] = asyncio.create_task(self._send_all(webhook))

    async def stop(self) -> None:
        """Sends nothing new, and waits for answers that are outstanding, at most `SEND_SECONDS`."""
        self._stopping = True
        await asyncio.gather(*self._sending.values(), return_exceptions=True)

    async def _send_all(self, webhook: DueWebhook) -> None:
        clock = asyncio.get_running_loop().time
        until = clock() + _LOOK_AGAIN_SECONDS
        try:
            while (
                not self._stopping
                and clock() < until
                and (due := await ledger.claim_deliveries(self._db, webhook.id, AT_ONCE, _LEASE_SECONDS))
            ):
                failures = await asyncio.gather(*(self._send(webhook, each) for each in due))
                # One after the other, as PostgreSQL would have them wait for the endpoint's row anyway.
                if told := [each.id for each, failure in zip(due, failures, strict=True) if failure is None]:
                    await ledger.end_deliveries(self._db, webhook.id, told)
                    for _ in told:
                        self._counts.count("delivery", "told")
                for each, failure in zip(due, failures, strict=True):
                    if failure is not None:
                        delay_seconds = min(self._first_delay_seconds * 4.0 ** min(each.tries - 1, 10), LONGEST_DELAY_SECONDS)
                        is_dead = await ledger.put_off_delivery(self._db, each, delay_seconds, failure)
                        self._counts.count("delivery", "dead" if is_dead else "failed")
        except CofferError as problem:  # what was sent is sent again when its lease is over
            log.warning("deliveries will be looked at again: %s", problem)
        except Exception:
            log.exception("deliveries will be looked at again")
        finally:
            del self._sending[webhook.id]

    async def _send(self, webhook: DueWebhook, delivery: Delivery) -> str | None:
        """Why it failed, in a word; None when it was told."""
        body = body_of(delivery)
        headers = signed(delivery, body, webhook.secrets, datetime.now(UTC))
        try:
            async with (
                asyncio.timeout(SEND_SECONDS),
                self._fetcher.request("POST", webhook.url, headers=headers, body=body, redirects=0) as answer,
            ):
                return None if 200 <= answer.status < 300 else f"status_{answer.status}"
        except TimeoutError:
            return "timeout"
        except FetchFailed as problem:
            return problem.reason
        except UrlRefused:
            return "refused"


def message_id(delivery: Delivery) -> str:
    """The same however often an event is told, so that its receiver can tell a repetition. Another one after a restore of the database,
    when the events' numbers begin again at an old one.
    """
    return f"evt_{delivery.event_id}_{int(delivery.created_at.timestamp() * 1_000_000):x}"


def body_of(delivery: Delivery) -> bytes:
    """What an endpoint reads."""
    data = {**delivery.payload, "user_id": delivery.user_id, "file_id": delivery.file_id}
    return msgspec.json.encode({"type": delivery.type, "timestamp": delivery.created_at, "data": data})


def signed(delivery: Delivery, body: bytes, secrets: list[str], now: datetime) -> dict[str, str]:
    """The headers of Standard Webhooks, with a signature by each secret."""
    name = message_id(delivery)
    return {
        "content-type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(name, now, body.decode()) for secret in secrets),
    }
