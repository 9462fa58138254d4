"""Where a file lies on its volume. Nothing that a client sends becomes part of a path."""

import hashlib
import re
from uuid import UUID

from server.kinds import DIRECTORIES

SENTINEL = ".coffer-volume"
INCOMING = "incoming"
USERS = "users"
QUARANTINE = "quarantine"

_PLAIN_USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_STORED_PATH = re.compile(
    r"users/(?:[A-Za-z0-9][A-Za-z0-9_-]{0,127}|~[0-9a-f]{64})/(?:videos|images|scenes|projects|audio)/"
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\.[0-9]{1,9}\.[a-z0-9]{1,10}"
)


def user_directory(user_id: str) -> str:
    """The name of a user's directory: the id itself where that is safe on any file system, else `~` and its SHA-256.

    Plain ids cannot start with `~`, so the two forms never meet.
    """
    if _PLAIN_USER_ID.fullmatch(user_id):
        return user_id
    return "~" + hashlib.sha256(user_id.encode()).hexdigest()


def stored_path(user_id: str, kind: str, file_id: UUID, generation: int, extension: str) -> str:
    """A stored file's path, relative to its volume. `extension` is the detected type's, without a dot."""
    path = f"{USERS}/{user_directory(user_id)}/{DIRECTORIES[kind]}/{file_id}.{generation}.{extension}"
    return checked(path)


def checked(path: str) -> str:
    """The path, if it has the layout's form. A row changed by hand must not lead anywhere else: raises `ValueError`."""
    if not _STORED_PATH.fullmatch(path):
        raise ValueError("not the path of a stored file")
    return path
