"""Somebody who has been recognised, and the rights they hold."""

from dataclasses import dataclass
from enum import StrEnum

from server.errors import InvalidRequest


class Scope(StrEnum):
    """A right that credentials carry. None implies another."""

    FILES_READ = "files:read"
    FILES_WRITE = "files:write"
    LINKS_WRITE = "links:write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """`user_id` is the user acted for; None only where the route does not concern one user's files."""

    user_id: str | None
    key_id: str
    scopes: frozenset[str]

    @property
    def owner(self) -> str:
        """The user whose files are meant. Raises `InvalidRequest` when the request named nobody."""
        if self.user_id is None:
            raise InvalidRequest("X-User-Id", "is required with an API key: it names the user acted for")
        return self.user_id
