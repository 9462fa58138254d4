"""A repository of restic's own making whose password is derived in no time.

Each run of restic derives its key by scrypt, for half a second: more than all else that it does in a test. Of the one key of a new
repository the same master key is written once more, under the same password with scrypt's least parameters; the rest is as it was.
"""

import base64
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from cryptography.hazmat.primitives.poly1305 import Poly1305

PASSWORD = "the password of the tests"
_CHEAP = {"N": 2, "r": 1, "p": 1}
_NONCE_BYTES = _MAC_BYTES = 16


def make_cheap_repository(directory: Path) -> None:
    """Makes an empty repository there."""
    environment = os.environ | {"RESTIC_REPOSITORY": str(directory), "RESTIC_PASSWORD": PASSWORD}
    subprocess.run(["restic", "init", "--no-cache"], env=environment, check=True, capture_output=True)
    (path,) = (directory / "keys").iterdir()
    key = json.loads(path.read_bytes())
    data = base64.b64decode(key["data"])
    nonce, sealed, mac = data[:_NONCE_BYTES], data[_NONCE_BYTES:-_MAC_BYTES], data[-_MAC_BYTES:]
    assert _mac(_user_key(key), nonce, sealed) == mac, "restic's design has it otherwise"
    master_key = _crypt(_user_key(key), nonce, sealed)
    key |= _CHEAP
    sealed = _crypt(_user_key(key), nonce, master_key)
    key["data"] = base64.b64encode(nonce + sealed + _mac(_user_key(key), nonce, sealed)).decode()
    cheap = json.dumps(key).encode()
    path.unlink()
    path.with_name(hashlib.sha256(cheap).hexdigest()).write_bytes(cheap)


# As restic's design document has it, in "Keys, Encryption and MAC" and "Repository, Keys".


def _user_key(key: dict[str, Any]) -> bytes:
    salt = base64.b64decode(key["salt"])
    return hashlib.scrypt(PASSWORD.encode(), salt=salt, n=key["N"], r=key["r"], p=key["p"], maxmem=2**28, dklen=64)


def _crypt(user_key: bytes, nonce: bytes, data: bytes) -> bytes:
    return Cipher(AES(user_key[:32]), CTR(nonce)).encryptor().update(data)


def _mac(user_key: bytes, nonce: bytes, sealed: bytes) -> bytes:
    once = Cipher(AES(user_key[32:48]), ECB()).encryptor().update(nonce)  # noqa: S305 - Poly1305-AES encrypts one block
    return Poly1305.generate_tag(user_key[48:64] + once, sealed)
