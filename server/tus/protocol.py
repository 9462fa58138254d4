"""What tus 1.0.0 writes into headers, read strictly. https://tus.io/protocols/resumable-upload"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import msgspec

from server import fields
from server.errors import InvalidRequest
from server.intake import Details
from server.kinds import KINDS

PREFIX = "/api/tus"
"""Below this path everything is tus."""
VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,creation-defer-length,termination,expiration,checksum,concatenation"
CHECKSUMS = {"sha1": hashlib.sha1, "sha256": hashlib.sha256, "md5": hashlib.md5}
MOST_PARTS = 1_000

_WHOLE = re.compile(r"[0-9]{1,18}")
_METADATA_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]+")  # ASCII without space and comma
_UPLOAD_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # as we write it: what has two names would be two parts
_LONGEST_METADATA_BYTES = 16_384
_NAME_KEYS = ("filename", "name", "fileName")
_KEYS_WITHOUT_MEANING = frozenset({"filetype", *_NAME_KEYS})  # the type is found in the bytes


class Checksum(msgspec.Struct, frozen=True):
    """What a piece is to hash to, by which algorithm."""

    algorithm: str
    digest: bytes

    def hasher(self) -> Any:
        """A hash object of the algorithm."""
        return CHECKSUMS[self.algorithm](usedforsecurity=False)

    def matches(self, hasher: Any) -> bool:
        """Whether it is that of the bytes which `hasher` was given."""
        return hmac.compare_digest(self.digest, hasher.digest())


class Concat(msgspec.Struct, frozen=True):
    """`parts` None: a partial upload; else one that is made of these."""

    parts: list[UUID] | None


def whole(value: str | None, field: str) -> int | None:
    """A number of bytes, or None where the header is missing. Raises `InvalidRequest`."""
    if value is None:
        return None
    if not _WHOLE.fullmatch(value):
        raise InvalidRequest(field, "must be a whole number of bytes")
    return int(value)


def length(headers: Mapping[str, str]) -> int | None:
    """`Upload-Length`, or None for `Upload-Defer-Length: 1`. Raises `InvalidRequest` unless it is just one of the two."""
    declared, deferred = whole(headers.get("upload-length"), "Upload-Length"), headers.get("upload-defer-length")
    if deferred is not None and deferred != "1":
        raise InvalidRequest("Upload-Defer-Length", "must be 1")
    if (declared is None) == (deferred is None):
        raise InvalidRequest("Upload-Length", "must be declared, or deferred by Upload-Defer-Length: 1")
    return declared


def metadata(value: str) -> dict[str, str]:
    """The pairs of `Upload-Metadata`; a key without a value has an empty one. Raises `InvalidRequest`."""
    if len(value) > _LONGEST_METADATA_BYTES:
        raise InvalidRequest("Upload-Metadata", f"must be at most {_LONGEST_METADATA_BYTES} bytes")
    pairs: dict[str, str] = {}
    for pair in value.split(",") if value.strip(" ") else ():
        key, _, encoded = pair.strip(" ").partition(" ")
        if not _METADATA_KEY.fullmatch(key) or key in pairs:
            raise InvalidRequest("Upload-Metadata", "keys must be ASCII without spaces or commas, each once")
        try:
            pairs[key] = base64.b64decode(encoded, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError, ValueError) as problem:
            raise InvalidRequest("Upload-Metadata", "values must be UTF-8 text in base64") from problem
    return pairs


def details(pairs: Mapping[str, str]) -> Details:
    """What is to be known of the file: names, type (kind), package and tags have fields of their own, the rest becomes its metadata.

    Raises `InvalidRequest`.
    """
    rest = {key: value for key, value in pairs.items() if key not in _KEYS_WITHOUT_MEANING | {"type", "package_name", "tags"}}
    name = next((pairs[key] for key in _NAME_KEYS if pairs.get(key)), None)
    kind = pairs.get("type") or None
    # Clients put the MIME type there, too, which is not theirs to say.
    if kind is not None and kind not in KINDS:
        if "/" not in kind:
            raise InvalidRequest("type", f"must be one of {', '.join(KINDS)}")
        kind = None
    return Details(
        file_name=None if name is None else fields.clean_name(name),
        kind=kind,
        package_name=fields.clean_package_name(pairs.get("package_name") or None),
        tags=fields.parse_tags(pairs.get("tags", "")),
        metadata=fields.clean_metadata(rest),
    )


def checksum(value: str | None) -> Checksum | None:
    """`Upload-Checksum`. Raises `InvalidRequest`, also for an algorithm that is not offered."""
    if value is None:
        return None
    algorithm, _, encoded = value.partition(" ")
    if algorithm not in CHECKSUMS:
        raise InvalidRequest("Upload-Checksum", f"must be by one of {', '.join(CHECKSUMS)}")
    try:
        digest = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise InvalidRequest("Upload-Checksum", "must be an algorithm and a digest in base64") from problem
    found = Checksum(algorithm, digest)
    if len(digest) != found.hasher().digest_size:
        raise InvalidRequest("Upload-Checksum", "has another length than the algorithm's")
    return found


def concat(value: str | None) -> Concat | None:
    """`Upload-Concat`, whose parts are addresses of uploads, as URLs or paths. Raises `InvalidRequest`.

    A URL may be anything in front of `PREFIX`: what proxies make of hosts and paths is not known here.
    """
    if value is None:
        return None
    if value == "partial":
        return Concat(None)
    form, _, addresses = value.partition(";")
    found = [upload_id(each[each.find(f"{PREFIX}/") :]) for each in addresses.split(" ") if each] if form == "final" else []
    parts = [each for each in found if each is not None]
    if not parts or len(parts) < len(found) or len(parts) > MOST_PARTS or len(set(parts)) < len(parts):
        raise InvalidRequest(
            "Upload-Concat", f"must be partial, or final; and the addresses of up to {MOST_PARTS} partial uploads, each once"
        )
    return Concat(parts)


def upload_id(path: str) -> UUID | None:
    """The upload that a path below `PREFIX` names, or None when it is no address of one."""
    name = path.removeprefix(f"{PREFIX}/")
    return UUID(name) if name != path and _UPLOAD_ID.fullmatch(name) else None
