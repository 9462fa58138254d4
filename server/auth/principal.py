"""Somebody who has been recognised, and the rights they hold."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from server.errors import InvalidRequest


class Scope(StrEnum):
    """A right that credentials carry. None implies another."""

    FILES_READ = "files:read"
    FILES_WRITE = "files:write"
    LINKS_WRITE = "links:write"
    JOBS_WRITE = "jobs:write"
    ADMIN = "admin"


USER_TOKEN_SCOPES = frozenset({Scope.FILES_READ, Scope.FILES_WRITE, Scope.LINKS_WRITE})
"""What a user may do with a token of their own, whatever it claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """`user_id` is the user acted for; None only where the route does not concern one user's files.

    `key_id` names the API key; None is a user token, whose subject the user is. `kinds` are the only ones that the
    credentials give access to; None is all.
    """

    user_id: str | None
    key_id: str | None
    scopes: frozenset[str]
    kinds: frozenset[str] | None = None

    @property
    def owner(self) -> str:
        """The user whose files are meant. Raises `InvalidRequest` when the request named nobody."""
        if self.user_id is None:
            raise InvalidRequest("X-User-Id", "is required with an API key: it names the user acted for")
        return self.user_id

    @property
    def credentials(self) -> Literal["api_key", "user_token"]:
        """By what they were recognised, for the log."""
        return "user_token" if self.key_id is None else "api_key"
