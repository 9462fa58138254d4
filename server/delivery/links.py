"""Signed links: what a link says, byte by byte, and how it is signed and verified (server/decisions/0011).

A download link is `/f/<payload>.<signature>/<name>`. The signature is over `<payload>/<name>` exactly as they stand in the URL, so no
character of it can be changed. An upload link is `/u/<payload>.<signature>`. Both are HMAC-SHA256 with a key derived for their
purpose (itsdangerous' `hmac` derivation: HMAC-SHA256 of the salt under the secret), in base64url without padding.
"""

import hmac
import re
import struct
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import PurePosixPath
from urllib.parse import quote, unquote
from uuid import UUID

import msgspec
from itsdangerous import Signer
from itsdangerous.encoding import base64_decode, base64_encode
from itsdangerous.exc import BadData

from server.delivery.headers import Disposition, fitting_name
from server.errors import LinkExpired, LinkInvalid
from server.kinds import DIRECTORIES, KNOWN
from server.ledger.models import File
from server.vault.layout import PREVIEW_NAME

DOWNLOAD_SALT = b"coffer.download.1"
UPLOAD_SALT = b"coffer.upload.1"

VERSION = 1
_ATTACHMENT = 1
# version, flags, expiry (Unix seconds), volume (first 4 bytes of its UUID), generation, link epoch of the user, file id, SHA-256,
# size in bytes, last change of the bytes (Unix seconds), kind (index in DIRECTORIES), length of the preview's name (0: the file itself),
# length of the extension; then the extension, the preview's name, and the user's directory to the end. Numbers are big-endian.
_DOWNLOAD = struct.Struct(">BBI4sII16s32sQIBBB")
_UPLOAD = struct.Struct(">BxI16s")  # version, an unused byte, expiry, upload id

_LONGEST_TOKEN = 512
_LONGEST_SEGMENT_BYTES = 255  # of the name in the URL, percent-encoded
_TOKEN = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]{43})")
_KINDS = tuple(DIRECTORIES)
_MIME_TYPES = {each.extension: each.mime_type for each in KNOWN.values()}
_DOTS = re.compile(r"\.{1,2}")


class LinkedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a link's holder may read: enough to serve the bytes without asking the database.

    `preview` is the name of a preview of the file, when the link is to that; the other fields are the file's all the same, but for
    `file_name`. `volume_id` is nil until somebody who knows the volumes finds the one of the prefix.
    """

    id: UUID
    generation: int
    link_epoch: int
    volume_prefix: bytes
    volume_id: UUID = UUID(int=0)
    user_directory: str
    file_path: str
    file_name: str
    mime_type: str
    file_size: int
    sha256: bytes
    content_changed_at: datetime
    disposition: Disposition
    expires_at: int
    preview: str | None = None


class Links:
    """Signs and verifies links. `keys` are secrets of at least 32 characters; the first signs, the others still verify."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._downloads = [_signer(key, DOWNLOAD_SALT) for key in keys]
        self._uploads = [_signer(key, UPLOAD_SALT) for key in keys]

    def download(
        self,
        file: File,
        link_epoch: int,
        *,
        expires_at: int,
        disposition: Disposition = "inline",
        name: str | None = None,
        preview: str | None = None,
    ) -> str:
        """The path of a link to these very bytes or to a preview of them, until `expires_at` (Unix seconds). Same arguments, same link."""
        path = PurePosixPath(file.file_path)
        user_directory, kind_directory = path.parts[1:3]
        extension = path.suffix[1:].encode("ascii")
        payload = base64_encode(
            _DOWNLOAD.pack(
                VERSION,
                _ATTACHMENT if disposition == "attachment" else 0,
                expires_at,
                file.volume_id.bytes[:4],
                file.generation,
                link_epoch,
                file.id.bytes,
                file.sha256,
                file.file_size,
                int(file.content_changed_at.timestamp()),
                list(DIRECTORIES.values()).index(kind_directory),
                len(preview or ""),
                len(extension),
            )
            + extension
            + (preview or "").encode("ascii")
            + user_directory.encode("ascii")
        ).decode("ascii")
        segment = name_segment(name or (file.file_name if preview is None else f"{PurePosixPath(file.file_name).stem}-{preview}"))
        return f"/f/{payload}.{_signature(self._downloads[0], f'{payload}/{segment}')}/{segment}"

    def verify_download(self, token: str, segment: str) -> LinkedFile:
        """What the link says. `token` and `segment` as they stand in the URL. Raises `LinkInvalid`, `LinkExpired`."""
        packed = _verified(self._downloads, token, segment)
        try:
            version, flags, expires_at, volume_prefix, generation, epoch, file_id, digest, size, changed_at, kind, *lengths = (
                _DOWNLOAD.unpack_from(packed)
            )
            preview_length, extension_length = lengths
            preview_at, directory_at = _DOWNLOAD.size + extension_length, _DOWNLOAD.size + extension_length + preview_length
            extension = packed[_DOWNLOAD.size : preview_at].decode("ascii")
            preview = packed[preview_at:directory_at].decode("ascii")
            user_directory = packed[directory_at:].decode("ascii")
            directory, mime_type = DIRECTORIES[_KINDS[kind]], _MIME_TYPES[extension]
        except (struct.error, UnicodeDecodeError, LookupError) as problem:  # signed by us, so only a later version of us says this
            raise LinkInvalid from problem
        if version != VERSION or flags & ~_ATTACHMENT or not user_directory or (preview and not PREVIEW_NAME.fullmatch(preview)):
            raise LinkInvalid
        if expires_at <= time.time():
            raise LinkExpired
        known_id = UUID(bytes=file_id)
        return LinkedFile(
            id=known_id,
            generation=generation,
            link_epoch=epoch,
            volume_prefix=volume_prefix,
            user_directory=user_directory,
            file_path=f"users/{user_directory}/{directory}/{known_id}.{generation}.{extension}",
            file_name=unquote(segment),
            mime_type=mime_type,
            file_size=size,
            sha256=digest,
            content_changed_at=datetime.fromtimestamp(changed_at, UTC),
            disposition="attachment" if flags & _ATTACHMENT else "inline",
            expires_at=expires_at,
            preview=preview or None,
        )

    def upload(self, upload_id: UUID, *, expires_at: int) -> str:
        """The path of a link that takes one upload. What may be uploaded stands in the reservation's row."""
        payload = base64_encode(_UPLOAD.pack(VERSION, expires_at, upload_id.bytes)).decode("ascii")
        return f"/u/{payload}.{_signature(self._uploads[0], payload)}"

    def verify_upload(self, token: str, *, may_have_expired: bool = False) -> UUID:
        """The upload that the link is for. Raises `LinkInvalid`, `LinkExpired`."""
        packed = _verified(self._uploads, token, None)
        if len(packed) != _UPLOAD.size:
            raise LinkInvalid
        version, expires_at, upload_id = _UPLOAD.unpack(packed)
        if version != VERSION:
            raise LinkInvalid
        if expires_at <= time.time() and not may_have_expired:
            raise LinkExpired
        return UUID(bytes=upload_id)


def expiry(ttl_seconds: int, window_seconds: int, now: float | None = None) -> int:
    """When a link made now for at least `ttl_seconds` ends (Unix seconds): the same for everyone who asks within a window.

    So caches see one URL. It lives `ttl_seconds` and up to a window longer; the window is never more than half of the life asked for.
    """
    window = max(1, min(window_seconds, ttl_seconds // 2))
    at_least = int(time.time() if now is None else now) + ttl_seconds
    return -(-at_least // window) * window


def name_segment(name: str) -> str:
    """A file's name as the last segment of a link: percent-encoded, at most 255 bytes, nothing that a client would rewrite."""
    name = name.replace("/", "_").replace("\\", "_")
    name = "_" * len(name) if _DOTS.fullmatch(name) else name  # clients remove the segments `.` and `..`
    return _quoted(fitting_name(name, _LONGEST_SEGMENT_BYTES, _quoted))


def _quoted(name: str) -> str:
    return quote(name, safe="", encoding="utf-8", errors="replace")


def _signer(key: str, salt: bytes) -> Signer:
    return Signer(key, salt=salt, key_derivation="hmac", digest_method=sha256)


def _signature(signer: Signer, signed: str) -> str:
    return signer.get_signature(signed.encode("ascii")).decode("ascii")


def _verified(signers: Sequence[Signer], token: str, segment: str | None) -> bytes:
    match = _TOKEN.fullmatch(token) if len(token) <= _LONGEST_TOKEN else None
    if match is None or (segment is not None and not segment.isascii()):
        raise LinkInvalid
    payload, presented = match.groups()
    signed = payload if segment is None else f"{payload}/{segment}"
    # The text is compared, not what it decodes to: the last character of base64 has spare bits, so those have several spellings.
    # Every key is tried, so the time does not tell which one signed.
    matches = [hmac.compare_digest(_signature(signer, signed), presented) for signer in signers]
    if not any(matches):
        raise LinkInvalid
    try:
        return base64_decode(payload)
    except BadData as problem:
        raise LinkInvalid from problem


def link_cache_control(cache: str, expires_at: int) -> str:
    """For the rest of the link's life, `cache` being `private` or `public`. A link names these very bytes, so nobody need ask again."""
    return f"{cache}, max-age={max(0, expires_at - int(time.time()))}, immutable, no-transform"
