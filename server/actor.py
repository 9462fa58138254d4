"""Who is at work, for the audit trail.

Every write of the ledger records the actor whom it finds here. A door sets it once the request is let in, and the task of that
request carries it along, as it does the request's id for the log; a parameter of every function in between could be forgotten by
one of them. What nobody has asked for, such as housekeeping, is done by the system.
"""

from contextvars import ContextVar
from typing import Literal

import msgspec

Kind = Literal["api_key", "user_token", "download_link", "upload_link", "public_link", "pipeline", "cli", "system"]


class Actor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`id` tells one of a kind from another: a key's id, a token's subject, an upload link's id, an account of the machine.

    Nothing here opens anything: no key, no token, no link. `user_id` is the user acted for, `address` the client's IP address.
    """

    kind: Kind
    id: str | None = None
    user_id: str | None = None
    address: str | None = None
    request_id: str | None = None


_current: ContextVar[Actor] = ContextVar("actor", default=Actor(kind="system"))  # noqa: B039 - it is frozen


def act_as(actor: Actor) -> None:
    """From here on it is this actor who does what this task does, and what tasks do that it starts."""
    _current.set(actor)


def acting() -> Kind:
    """As what the actor of this task was let in."""
    return _current.get().kind


def actor_json() -> str:
    """The actor of this task, as the statements take it."""
    return msgspec.json.encode(_current.get()).decode()
