"""Answers tus requests, as bare ASGI. Who asks is decided before anything else, and before a byte of the body is read."""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from email.utils import format_datetime
from typing import Any, NamedTuple
from uuid import UUID

from server.api.door import act_in, admit
from server.api.front import ANSWER_HEADERS
from server.api.problems import HttpRefusal
from server.api.services import Services
from server.api.upload import body_pieces
from server.auth import Scope
from server.errors import (
    ChecksumMismatch,
    CofferError,
    CommitUnknown,
    InvalidRequest,
    LinkUsed,
    NotFound,
    OffsetMismatch,
    UploadExpired,
)
from server.intake import Details, Resumable, ResumableUploads, Writer
from server.tus import protocol
from server.tus.protocol import PREFIX, Checksum

ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_PIECE = "application/offset+octet-stream"
_LINK_HEADER = "upload-link"
_NO_CONTENT = (b"content-length", b"0")


class _Caller(NamedTuple):
    """Whose uploads may be touched. `link_id` is the one upload that the holder of an upload link has."""

    user_id: str
    kinds: frozenset[str] | None
    link_id: UUID | None


class TusDoor:
    """One per process."""

    def __init__(self, services: Services, uploads: ResumableUploads) -> None:
        self._services = services
        self._uploads = uploads

    def template(self, path: str) -> str:
        """The route of a path below `PREFIX`, for logs and metrics."""
        return PREFIX if path.rstrip("/") == PREFIX else f"{PREFIX}/{{upload_id}}"

    async def answer(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Answers a request below `PREFIX`. Raises domain errors, and `HttpRefusal` for what only HTTP or tus knows."""
        scope["state"][ANSWER_HEADERS] = [(b"tus-resumable", protocol.VERSION.encode())]
        if scope["method"] == "OPTIONS":
            await _send(send, 200, self._capabilities())
            return
        headers, repeated = _headers(scope)
        method: str = scope["method"]
        if method == "POST":  # of clients whose HTTP stack, or whose proxy, knows no PATCH
            method = headers.get("x-http-method-override", method).upper()
        at = scope["path"].removesuffix("/")
        creates = at == PREFIX and method == "POST"
        caller = await self._caller(scope, headers, creates=creates)
        if repeated is not None:  # two readers could pick different ones
            raise InvalidRequest(repeated, "may be sent once only")
        if headers.get("tus-resumable") != protocol.VERSION:
            raise HttpRefusal(412, {"tus-version": protocol.VERSION})
        if creates:
            await self._create(caller, scope, headers, receive, send)
            return
        if at == PREFIX:
            raise HttpRefusal(405, {"allow": "POST, OPTIONS"})
        handler = {"HEAD": self._tell, "PATCH": self._go_on, "DELETE": self._end}.get(method)
        if handler is None:
            raise HttpRefusal(405, {"allow": "HEAD, PATCH, DELETE, POST, OPTIONS"})
        upload_id = protocol.upload_id(at)
        if upload_id is None or (caller.link_id is not None and caller.link_id != upload_id):
            raise NotFound
        await handler(caller, upload_id, headers, receive, send)

    def _capabilities(self) -> Headers:
        return [
            (b"tus-version", protocol.VERSION.encode()),
            (b"tus-extension", protocol.EXTENSIONS.encode()),
            (b"tus-checksum-algorithm", ",".join(protocol.CHECKSUMS).encode()),
            (b"tus-max-size", str(self._services.settings.max_file_bytes).encode()),
            (b"allow", b"POST, HEAD, PATCH, DELETE, OPTIONS"),
            _NO_CONTENT,
        ]

    async def _caller(self, scope: ASGIScope, headers: dict[str, str], *, creates: bool) -> _Caller:
        """Judges the credentials: an API key, a user's token, or an upload link in the header `Upload-Link`."""
        link = headers.get(_LINK_HEADER)
        if link is None:
            principal = await admit(self._services, scope, Scope.FILES_WRITE)
            return _Caller(principal.owner, principal.kinds, None)
        self._services.limits.count_link(scope)
        token = link.rpartition("/")[2]
        # An upload that began in time may be finished: its own life is what limits it then.
        link_id = self._services.links.verify_upload(token, may_have_expired=not creates)
        act_in(scope, "upload_link", str(link_id))
        user_id = await self._uploads.user_of_link(link_id)
        return _Caller(user_id, None, link_id)

    # Creation

    async def _create(self, caller: _Caller, scope: ASGIScope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        concat = protocol.concat(headers.get("upload-concat"))
        text = headers.get("upload-metadata", "")
        details = protocol.details(protocol.metadata(text))
        if concat is not None and concat.parts is not None:
            if caller.link_id is not None:
                raise InvalidRequest("Upload-Concat", "is not for upload links")
            if "upload-length" in headers or "upload-defer-length" in headers:
                raise InvalidRequest("Upload-Length", "must not be sent for a final upload: its parts say it")
            made = await self._uploads.join(caller.user_id, concat.parts, upload_metadata=text, details=details, kinds=caller.kinds)
            await self._send_created(scope, made, send)
            return
        length_bytes = protocol.length(headers)
        checksum = protocol.checksum(headers.get("upload-checksum"))
        with_upload = headers.get("content-type") is not None
        if with_upload and headers["content-type"] != _PIECE:
            if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
                raise HttpRefusal(415)
            with_upload = False
        if caller.link_id is not None:
            if concat is not None:
                raise InvalidRequest("Upload-Concat", "is not for upload links")
            made = await self._create_linked(caller, caller.link_id, length_bytes, text, details)
        else:
            made = await self._uploads.create(
                caller.user_id,
                length_bytes=length_bytes,
                upload_metadata=text,
                details=details,
                kinds=caller.kinds,
                is_partial=concat is not None,
            )
        if with_upload or length_bytes == 0:
            try:
                made = await self._write(caller.user_id, made.id, 0, None, checksum, receive if with_upload else None)
            except CommitUnknown:  # it may be a file by now
                raise
            except BaseException:
                # Nobody was told where it is, so nobody could go on with it, or give its quota back.
                with suppress(CofferError):
                    await self._uploads.end(caller.user_id, made.id)
                raise
        await self._send_created(scope, made, send)

    async def _create_linked(
        self, caller: _Caller, link_id: UUID, length_bytes: int | None, upload_metadata: str, details: Details
    ) -> Resumable:
        """The upload of an upload link. Asked again before a byte has come, it is the same: the first answer may have been lost."""
        try:
            return await self._uploads.create_linked(link_id, length_bytes=length_bytes, upload_metadata=upload_metadata, details=details)
        except LinkUsed as used:
            try:
                made = await self._uploads.look(caller.user_id, link_id)
            except (NotFound, UploadExpired):
                raise used from None
            if made.is_finished or (made.offset_bytes, made.length_bytes, made.upload_metadata) != (0, length_bytes, upload_metadata):
                raise
            return made

    async def _send_created(self, scope: ASGIScope, made: Resumable, send: Send) -> None:
        await _send(send, 201, [(b"location", self._location(scope, made.id)), *_described(made), _NO_CONTENT])

    def _location(self, scope: ASGIScope, upload_id: UUID) -> bytes:
        path = f"{PREFIX}/{upload_id}"
        settings = self._services.settings
        if not settings.tus_absolute_locations:
            return path.encode("ascii")
        if settings.public_url:
            return f"{settings.public_url}{path}".encode("ascii")
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        return b"%b://%b%b" % (scope["scheme"].encode("ascii"), host, path.encode("ascii")) if host else path.encode("ascii")

    # One upload

    async def _tell(self, caller: _Caller, upload_id: UUID, headers: dict[str, str], receive: Receive, send: Send) -> None:
        found = await self._uploads.look(caller.user_id, upload_id)
        answer = [*_described(found), (b"cache-control", b"no-store"), _NO_CONTENT]
        if found.length_bytes is None:
            answer.append((b"upload-defer-length", b"1"))
        else:
            answer.append((b"upload-length", str(found.length_bytes).encode()))
        if found.upload_metadata:
            answer.append((b"upload-metadata", found.upload_metadata.encode("ascii")))
        if found.is_partial:
            answer.append((b"upload-concat", b"partial"))
        elif found.parts is not None:
            answer.append((b"upload-concat", f"final;{' '.join(f'{PREFIX}/{part}' for part in found.parts)}".encode("ascii")))
        await _send(send, 200, answer)

    async def _go_on(self, caller: _Caller, upload_id: UUID, headers: dict[str, str], receive: Receive, send: Send) -> None:
        if headers.get("content-type") != _PIECE:
            raise HttpRefusal(415)
        offset_bytes = protocol.whole(headers.get("upload-offset"), "Upload-Offset")
        if offset_bytes is None:
            raise InvalidRequest("Upload-Offset", "is missing")
        length_bytes = protocol.whole(headers.get("upload-length"), "Upload-Length")
        checksum = protocol.checksum(headers.get("upload-checksum"))
        try:
            done = await self._write(caller.user_id, upload_id, offset_bytes, length_bytes, checksum, receive)
        except OffsetMismatch as mismatch:  # which all offsets are for an upload that is whole
            if (await self._uploads.look(caller.user_id, upload_id)).parts is not None:
                raise HttpRefusal(403) from mismatch
            raise
        await _send(send, 204, _described(done))

    async def _end(self, caller: _Caller, upload_id: UUID, headers: dict[str, str], receive: Receive, send: Send) -> None:
        await self._uploads.end(caller.user_id, upload_id)
        await _send(send, 204, [])

    async def _write(
        self,
        user_id: str,
        upload_id: UUID,
        offset_bytes: int,
        length_bytes: int | None,
        checksum: Checksum | None,
        receive: Receive | None,
    ) -> Resumable:
        """Takes a piece, and publishes an upload that is whole by it. What a client that goes away has sent stays, and raises
        `IncompleteBody`."""
        async with self._uploads.writing(user_id, upload_id, is_checked=checksum is not None) as writer:
            if offset_bytes != writer.received_bytes:
                raise OffsetMismatch(writer.received_bytes)
            if length_bytes is not None:
                await writer.declare_length(length_bytes)
            if receive is not None:
                await _take(writer, receive, checksum)
            if writer.is_whole and not writer.upload.is_partial:
                await writer.finish_upload()
        return writer.seen


async def _take(writer: Writer, receive: Receive, checksum: Checksum | None) -> None:
    if checksum is None:
        await writer.take(body_pieces(receive))
        return
    hasher = checksum.hasher()

    async def hashed() -> AsyncIterator[bytes]:
        async for piece in body_pieces(receive):
            hasher.update(piece)
            yield piece

    await writer.take(hashed())
    if not checksum.matches(hasher):
        raise ChecksumMismatch  # what came does not count before `keep`
    await writer.keep()


def _described(upload: Resumable) -> Headers:
    """What every answer about an upload says."""
    headers = [(b"upload-offset", str(upload.offset_bytes).encode())]
    if upload.is_finished:
        headers.append((b"coffer-file-id", str(upload.id).encode()))
    else:
        headers.append((b"upload-expires", format_datetime(upload.expires_at, usegmt=True).encode()))
    return headers


def _headers(scope: ASGIScope) -> tuple[dict[str, str], str | None]:
    """By lower-case name; and one that came twice, of those that the door reads."""
    found: dict[str, str] = {}
    repeated = None
    for raw_name, raw_value in scope["headers"]:
        name = raw_name.decode("latin-1")
        if name in found and name.startswith(("upload-", "tus-", "x-http-method", "content-type")):
            repeated = name
        found[name] = raw_value.decode("latin-1")
    return found, repeated


async def _send(send: Send, status: int, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
