"""Cursors for credentials that may not see every file which a list reads past: encrypted, for a position may be that of such a file.

Where filters let few rows through, a page ends after so many rows, at one that is not on it; and a cursor that a client could make up
would choose which one that is.
"""

import hashlib
from base64 import urlsafe_b64encode
from functools import lru_cache

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from server.errors import InvalidRequest


def sealed(cursor: str, link_keys: tuple[str, ...]) -> str:
    """The cursor as only `opened` can read it."""
    return _cipher(link_keys).encrypt(cursor.encode()).decode("ascii")


def opened(cursor: str, link_keys: tuple[str, ...]) -> str:
    """The cursor that was sealed with one of these keys. Raises `InvalidRequest` for every other text."""
    try:
        return _cipher(link_keys).decrypt(cursor).decode()
    except (InvalidToken, ValueError) as problem:  # the latter where it is no ASCII
        raise InvalidRequest(field="cursor", reason="it is not one that a page of this list gave") from problem


@lru_cache(1)
def _cipher(link_keys: tuple[str, ...]) -> MultiFernet:
    """With keys derived from those of links, so that all processes have the same, and a link says nothing of them."""
    return MultiFernet(
        [Fernet(urlsafe_b64encode(hashlib.blake2b(key.encode(), digest_size=32, person=b"coffer cursors").digest())) for key in link_keys]
    )
