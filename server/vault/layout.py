"""Where a file lies on its volume. Nothing that a client sends becomes part of a path."""

import hashlib
import re
from uuid import UUID

from server.kinds import DIRECTORIES

SENTINEL = ".coffer-volume"
INCOMING = "incoming"
USERS = "users"
PREVIEWS = "previews"
QUARANTINE = "quarantine"
WITHHELD = "withheld"
"""Bytes of deleted files that a backup still wants, flat: a stored file's own name is no other's."""

_PLAIN_USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_STORED_PATH = re.compile(
    r"users/(?:[A-Za-z0-9][A-Za-z0-9_-]{0,127}|~[0-9a-f]{64})/(?:videos|images|scenes|projects|audio)/"
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\.[0-9]{1,9}\.[a-z0-9]{1,10}"
)
_PREVIEWS_PATH = re.compile(
    r"users/(?:[A-Za-z0-9][A-Za-z0-9_-]{0,127}|~[0-9a-f]{64})/previews/[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
)
PREVIEW_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}\.[a-z0-9]{1,10}")


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


def previews_directory(stored: str, file_id: UUID) -> str:
    """Where the previews of a stored file lie: a directory of their own below its user's, relative to the volume of both."""
    return checked_previews(f"{'/'.join(checked(stored).split('/', 2)[:2])}/{PREVIEWS}/{file_id}")


def preview_path(stored: str, file_id: UUID, name: str) -> str:
    """Where the preview called `name` of a stored file lies, relative to the volume of both."""
    return f"{previews_directory(stored, file_id)}/{checked_preview_name(name)}"


def checked_previews(path: str) -> str:
    """As `checked`, for a directory of previews."""
    if not _PREVIEWS_PATH.fullmatch(path):
        raise ValueError("not the path of a file's previews")
    return path


def is_previews(path: str) -> bool:
    """Whether a path is that of a directory of previews, or of a preview in it."""
    return path.split("/", 3)[2:3] == [PREVIEWS]  # a user, too, may be called so


def checked_preview_name(name: str) -> str:
    """The name, if a preview may have it. Raises `ValueError`."""
    if not PREVIEW_NAME.fullmatch(name):
        raise ValueError("not the name of a preview")
    return name


def checked_readable(path: str) -> str:
    """As `checked`, for a stored file or a preview of one."""
    if not is_previews(path):
        return checked(path)
    directory, _, name = path.rpartition("/")
    checked_previews(directory)
    checked_preview_name(name)
    return path


def checked(path: str) -> str:
    """The path, if it has the layout's form. A row changed by hand must not lead anywhere else: raises `ValueError`."""
    if not _STORED_PATH.fullmatch(path):
        raise ValueError("not the path of a stored file")
    return path
