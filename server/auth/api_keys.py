"""API keys as text: how they are made, recognised and hashed.

A key is `cof_<key_id>_<secret>`: 16 characters of lower-case base32 that name its row, and 256 random bits in base64url.
Only the SHA-256 of the secret is stored. It needs no salt and no slow hash, because 256 random bits cannot be guessed.
"""

import hashlib
import re
import secrets
from base64 import b32encode
from dataclasses import dataclass, field

_KEY = re.compile(r"cof_([a-z2-7]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key just made. `text` is shown once to its holder; `key_id` and `secret_sha256` are what a row keeps."""

    key_id: str
    secret_sha256: bytes
    text: str = field(repr=False)

    @classmethod
    def generate(cls) -> "NewApiKey":
        """A key from the system's randomness: 80 bits of id, 256 of secret. It opens nothing until its row is stored."""
        key_id = b32encode(secrets.token_bytes(10)).decode("ascii").lower()
        secret = secrets.token_urlsafe(32)
        return cls(key_id, _digest(secret), f"cof_{key_id}_{secret}")


def parse(text: str) -> tuple[str, bytes] | None:
    """The key id and the SHA-256 of the secret, or None when the text has not the shape of a key."""
    match = _KEY.fullmatch(text)
    return (match[1], _digest(match[2])) if match else None


def _digest(secret: str) -> bytes:
    # Of the text, not of the 32 bytes it encodes: the last base64 character has spare bits, so those have four spellings.
    return hashlib.sha256(secret.encode("ascii")).digest()
