"""The storage of users who come with tokens of their own: made at first sight, or refused."""

import time
from collections.abc import Callable

from server.errors import CommitUnknown, DatabaseUnavailable, NotFound, UserUnknown
from server.ledger import Database, ensure_user, get_user
from server.settings import Settings

_KNOWN_SECONDS = 60.0
_MOST_KNOWN = 10_000


class TokenUsers:
    """Remembers who is known, so that a request costs no round trip. Lives in one event loop.

    Where tokens make users, one who was erased is made anew at the latest after a minute, at once by an upload. Where they
    do not, a user who was erased is refused after `api_key_cache_seconds`, as a revoked key is, and by an upload at once.
    """

    def __init__(self, settings: Settings, db: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._known: dict[str, float] = {}  # until when

    def is_known(self, user_id: str) -> bool:
        """Whether `admit` has nothing to ask."""
        now = self._clock()
        return now < self._known.get(user_id, now)

    async def admit(self, user_id: str) -> None:
        """The user has a row when this returns. Raises `UserUnknown` where tokens make none, and `DatabaseUnavailable`."""
        if self.is_known(user_id):
            return
        now = self._clock()
        if self._settings.token_users_are_created:
            try:
                # The first upload chooses the volume: a volume that is away keeps nobody from looking at a list.
                await ensure_user(self._db, user_id, max_bytes=self._settings.default_quota_bytes, volume_id=None)
            except CommitUnknown as problem:
                raise DatabaseUnavailable from problem  # asking again is safe
            seconds = _KNOWN_SECONDS
        else:
            try:
                await get_user(self._db, user_id)
            except NotFound as problem:
                raise UserUnknown from problem
            seconds = self._settings.api_key_cache_seconds
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[user_id] = now + seconds
