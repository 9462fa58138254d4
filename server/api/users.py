"""The admin routes of users. Their ids may hold any text, so they arrive percent-encoded and are decoded here, once."""

from datetime import datetime
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import msgspec
from litestar import Request, Router, delete, get, put
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import Meta

from server import fields, ledger
from server.api.door import needs, services_of
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.auth import Scope
from server.ledger import User

_LARGEST_BIGINT = 2**63 - 1

Http = Request[Any, Any, Any]
UserId = Annotated[str, PathParameter(description="The user's id, percent-encoded: `user/a` is `user%2Fa`.")]


class UserAnswer(msgspec.Struct, kw_only=True):
    """`max_bytes` null is unlimited. `erasing_at` is set once the user is being deleted, `held_at` while a legal hold keeps the files.

    `warned_percent`: the event `quota.warning` has told of 80, 90 or 100 % last, and use has not fallen well below since; 0: none.
    """

    user_id: str
    tier: str
    max_bytes: int | None
    total_bytes: int
    reserved_bytes: int
    file_count: int
    warned_percent: int
    erasing_at: datetime | None
    held_at: datetime | None
    created_at: datetime
    updated_at: datetime


class UserList(msgspec.Struct):
    """`next_cursor` asks for the users after these. Null when there are none; after a full last page it leads to an empty one."""

    users: list[UserAnswer]
    next_cursor: str | None


class QuotaChange(msgspec.Struct, forbid_unknown_fields=True):
    """`max_bytes` counts what is stored and what is reserved. Null is unlimited, 0 lets no byte in."""

    max_bytes: Annotated[int, Meta(ge=0, le=_LARGEST_BIGINT)] | None


@get("/", before_request=known_query_only)
async def list_users(
    request: Http,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Users on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before.")] = None,
) -> UserList:
    """All users, in the order of their ids."""
    services = services_of(request)
    wanted = page_size(services, limit)
    users = await ledger.list_users(services.db, None if cursor is None else fields.clean_user_id(cursor, "cursor"), wanted)
    return UserList([_answer(user) for user in users], users[-1].user_id if len(users) == wanted else None)


@get("/{user_id:str}")
async def show_user(request: Http, user_id: UserId) -> UserAnswer:
    """One user's quota and what is used of it."""
    return _answer(await ledger.get_user(services_of(request).db, decoded(user_id)))


@put("/{user_id:str}/quota")
async def set_quota(request: Http, user_id: UserId, data: JSONBody[QuotaChange]) -> UserAnswer:
    """Sets a user's quota, and makes the user if there is none. A quota below what is used only blocks new bytes."""
    return _answer(await ledger.set_quota(services_of(request).db, decoded(user_id), data.max_bytes))


@delete("/{user_id:str}")
async def delete_user(request: Http, user_id: UserId) -> None:
    """Erases every byte and row of a user before it answers. If that is interrupted, the server goes on by itself."""
    await services_of(request).intake.erase_user(decoded(user_id))


def decoded(segment: str) -> str:
    """The user id in a path segment that `front.py` left as it was sent."""
    return fields.clean_user_id(unquote_to_bytes(segment.encode("latin-1")).decode("utf-8", "surrogateescape"))


def _answer(user: User) -> UserAnswer:
    return UserAnswer(
        user_id=user.user_id,
        tier=user.tier,
        max_bytes=user.max_bytes,
        total_bytes=user.total_bytes,
        reserved_bytes=user.reserved_bytes,
        file_count=user.file_count,
        warned_percent=user.warned_percent,
        erasing_at=user.erasing_at,
        held_at=user.held_at,
        created_at=user.created_at,
        updated_at=user.updated_at,
    )


router = Router(
    path="/api/users", route_handlers=[list_users, show_user, set_quota, delete_user], guards=[needs(Scope.ADMIN)], tags=["Users"]
)
