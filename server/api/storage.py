"""What a user has stored, and how much more fits."""

from typing import Any

import msgspec
from litestar import Request, Router, get

from server import ledger
from server.api.door import needs, principal_of, services_of
from server.auth import Scope
from server.kinds import KINDS


class KindUsageAnswer(msgspec.Struct):
    """Stored files of one type. Reserved bytes are in none: an upload's type is known once its bytes are."""

    file_count: int
    total_bytes: int


class UsageAnswer(msgspec.Struct, kw_only=True):
    """`limit_bytes`, `available_bytes` and `percent` are null when the user's storage is unlimited.

    `reserved_bytes` is held by uploads under way; `percent` is what is used of the limit.
    `preview_bytes` are used by previews. They are not in `used_bytes`; whether the limit counts them is a setting.
    """

    used_bytes: int
    reserved_bytes: int
    limit_bytes: int | None
    available_bytes: int | None
    percent: float | None
    file_count: int
    preview_bytes: int
    by_type: dict[str, KindUsageAnswer]


@get("/usage", guards=[needs(Scope.FILES_READ)])
async def show_usage(request: Request[Any, Any, Any]) -> UsageAnswer:
    """The user's storage. A user who has stored nothing yet has the default limit.

    A key that is restricted to some types is told of those alone, and of the sum of all.
    """
    services, principal = services_of(request), principal_of(request)
    user, by_kind = await ledger.usage(services.db, principal.owner)
    used, reserved = (user.total_bytes, user.reserved_bytes) if user else (0, 0)
    limit = user.max_bytes if user else services.settings.default_quota_bytes
    previews = user.preview_bytes if user else 0
    counted = used + previews if services.settings.previews_in_quota else used
    return UsageAnswer(
        used_bytes=used,
        reserved_bytes=reserved,
        limit_bytes=limit,
        available_bytes=None if limit is None else max(0, limit - counted - reserved),
        percent=None if limit is None else _percent(counted, limit),
        file_count=user.file_count if user else 0,
        preview_bytes=previews,
        by_type={
            kind: KindUsageAnswer(by_kind[kind].file_count, by_kind[kind].total_bytes) if kind in by_kind else KindUsageAnswer(0, 0)
            for kind in KINDS
            if principal.kinds is None or kind in principal.kinds
        },
    )


def _percent(used: int, limit: int) -> float:
    return round(100 * used / limit, 2) if limit else 100.0


router = Router(path="/api/storage", route_handlers=[show_usage], tags=["Storage"])
