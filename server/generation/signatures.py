"""Who speaks for a job: the secrets, and the signatures of messages by Standard Webhooks (https://www.standardwebhooks.com).

Each job has a secret of its own, derived from the link keys: no row holds it, a dump of the database opens nothing, and it can be told
again. A pipeline of the settings has secrets of its own as well, good for all of its jobs.
"""

import hmac
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from uuid import UUID

from standardwebhooks import Webhook, WebhookVerificationError

from server.errors import Unauthenticated

TOLERANCE_SECONDS = 300
"""How old or how far ahead a message's timestamp may be; the library's own."""
MESSAGE_ID_CHARACTERS = 255

_PURPOSE = b"coffer generation job"
_MOST_SIGNATURES_BYTES = 4096


def job_secrets(link_keys: Sequence[str], job_id: UUID) -> list[str]:
    """The secrets of a job as the library takes them: the first is told and signs, the others are of older link keys and verify."""
    return [f"whsec_{b64encode(hmac.digest(key.encode(), _PURPOSE + job_id.bytes, sha256)).decode('ascii')}" for key in link_keys]


def check(secrets: Sequence[str], headers: Mapping[str, str], body: bytes) -> None:
    """Whether one of the secrets signed this body, lately. `headers` are `webhook-id`, `webhook-timestamp` and `webhook-signature`.

    The body is judged as bytes; nothing of it is parsed. Raises `Unauthenticated`, and does not tell why.
    """
    if len(headers.get("webhook-id", "")) > MESSAGE_ID_CHARACTERS or len(headers.get("webhook-signature", "")) > _MOST_SIGNATURES_BYTES:
        raise Unauthenticated
    for secret in secrets:
        try:
            Webhook(secret).verify(body, dict(headers), json_parse=False)
        except (WebhookVerificationError, ValueError):  # the latter for what is no UTF-8, no base64, no pair of version and signature
            continue
        return
    raise Unauthenticated
