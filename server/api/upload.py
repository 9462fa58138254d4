"""Bytes in over HTTP: `POST /api/files/upload` as a form or a raw body, and `PUT /api/files/{id}/content`.

Bare ASGI: a framework's request and form objects cost more than the whole upload of a small file does here. Everything but
HTTP is in `server/intake`.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

import msgspec

from server import ledger
from server.api.door import act_in, admit, check_kinds
from server.api.files import file_json
from server.api.multipart import Event, Field, FileData, FileEnd, FileStart, FormReader
from server.api.problems import RAW_COMMON_HEADERS, Problem
from server.api.services import Services
from server.auth import Principal, Scope
from server.delivery.conditions import evaluate_if_match
from server.delivery.headers import etag
from server.errors import CofferError, Conflict, DigestMismatch, IncompleteBody, InvalidRequest, PreconditionFailed
from server.fields import clean_name, clean_package_name, parse_metadata, parse_tags
from server.intake import Details, Upload
from server.kinds import KINDS
from server.ledger.models import File

ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_REPLAYED = (b"idempotency-replayed", b"true")
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_DICTIONARY_MEMBER = re.compile(r"\s*([a-z*][a-z0-9_.*-]*)\s*=\s*:([A-Za-z0-9+/=]*):\s*")
_DIGEST_BYTES = {"sha-256": 32, "sha-512": 64, "md5": 16}


async def upload(services: Services, scope: ASGIScope, receive: Receive, send: Send) -> None:
    """Stores what is sent and answers 201, after the commit. Refuses before reading the body wherever it can."""
    principal = await admit(services, scope, Scope.FILES_WRITE)
    content_type = _header(scope, b"content-type") or ""
    if _header(scope, b"content-encoding") not in (None, "identity"):
        raise InvalidRequest("Content-Encoding", "encoded bodies are not accepted; send the file's own bytes")
    key = _header(scope, b"idempotency-key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest("Idempotency-Key", "must be 1 to 200 visible ASCII characters")
    if content_type.lower().startswith("multipart/form-data"):
        await _upload_form(services, principal, content_type, key, scope, receive, send)
    else:
        await _upload_raw(services, principal, key, scope, receive, send)


async def replace(services: Services, file_id: UUID, scope: ASGIScope, receive: Receive, send: Send) -> None:
    """Replaces a file's bytes. With `If-Match` only those that the client has seen; the old ones live until the commit."""
    principal = await admit(services, scope, Scope.FILES_WRITE)
    await check_kinds(services, principal, file_id)
    old = await ledger.get_file(services.db, principal.owner, file_id)
    if_match = _header(scope, b"if-match")
    if if_match is not None and not evaluate_if_match(if_match, etag(old.sha256)):
        raise PreconditionFailed
    begun = await services.intake.begin(principal.owner, declared_bytes=_content_length(scope), expected=_digests(scope), replacing=old)
    try:
        async for chunk in body_pieces(receive):
            await begun.write(chunk)
        file = await begun.replace(old)
    except PreconditionFailed as lost:
        if if_match is None:
            raise Conflict from lost
        raise
    finally:
        await begun.abort()
    await _answer(send, 200, file)


async def upload_by_link(services: Services, token: str, scope: ASGIScope, receive: Receive, send: Send) -> None:
    """Takes the one upload of an upload link, from a browser that has no other credentials.

    The link's own name wins over `?name=`. Raises `LinkInvalid`, `LinkExpired` and `LinkUsed` before a byte of the body is read. An
    upload that fails leaves the link to be tried again.
    """
    upload_id = services.links.verify_upload(token)
    act_in(scope, "upload_link", str(upload_id))
    texts = _query(scope)
    if unknown := texts.keys() - {"name"}:
        raise InvalidRequest(min(unknown), "is not taken from whoever uploads by a link")
    name = clean_name(texts["name"]) if "name" in texts else None
    begun, link = await services.intake.begin_linked(upload_id, declared_bytes=_content_length(scope), expected=_digests(scope))
    try:
        async for chunk in body_pieces(receive):
            await begun.write(chunk)
        file = await begun.finish(
            Details(
                file_name=link.file_name or name,
                kind=link.kind,
                package_name=link.package_name,
                tags=link.tags,
                metadata=link.metadata,
            )
        )
    finally:
        await begun.abort()
    await _answer(send, 201, file)


async def _upload_raw(services: Services, principal: Principal, key: str | None, scope: ASGIScope, receive: Receive, send: Send) -> None:
    texts = _query(scope)
    details = _details(texts, texts.get("name"))
    begun = await _begin(services, principal, key, declared_bytes=_content_length(scope), likely_bytes=0, expected=_digests(scope))
    if isinstance(begun, File):
        await _answer(send, 201, begun, replayed=True)
        return
    try:
        async for chunk in body_pieces(receive):
            await begun.write(chunk)
        file = await begun.finish(details)
    finally:
        await begun.abort()
    await _answer(send, 201, file)


async def _upload_form(
    services: Services, principal: Principal, content_type: str, key: str | None, scope: ASGIScope, receive: Receive, send: Send
) -> None:
    form = _Form(services, principal, key, _content_length(scope), _query(scope))
    reader = FormReader(content_type)
    expected = _digests(scope)
    hashes = {name: hashlib.new(name.replace("-", ""), usedforsecurity=False) for name in expected}  # of the form, as RFC 9530 has it
    try:
        async for chunk in body_pieces(receive):
            for each in hashes.values():
                each.update(chunk)
            for event in reader.feed(chunk):
                await form.take(event)
            form.consumed_bytes += len(chunk)
        reader.close()
        for name, digest in expected.items():
            if hashes[name].digest() != digest:
                raise DigestMismatch(name)
        results = await form.finish()
    finally:
        await form.abort()
    if len(results) == 1:
        (result,) = results
        if isinstance(result, CofferError):
            raise result
        await _answer(send, 201, result, replayed=form.replayed)
        return
    failed = any(isinstance(result, CofferError) for result in results)
    answer = {"results": [_result(scope, result) for result in results]}
    await send_json(send, 207 if failed else 201, answer, [_REPLAYED] if form.replayed else [])


class _Form:
    """The files of one form. They are published when the form has ended, for any field may follow any file."""

    def __init__(
        self, services: Services, principal: Principal, key: str | None, content_length: int | None, fields: dict[str, str]
    ) -> None:
        self.consumed_bytes = 0
        self.replayed = False
        self._services = services
        self._principal = principal
        self._key = key
        self._content_length = content_length
        self._fields = fields  # the query's, which the form's own replace
        self._from_query = set(fields)
        self._names: list[str] = []
        self._files: list[Upload | File | CofferError] = []

    async def take(self, event: Event) -> None:
        match event:
            case FileData(data):  # thousands of times per GiB
                current = self._files[-1]
                if isinstance(current, Upload):
                    try:
                        await current.write(data)
                    except CofferError as refused:
                        await self._give_up(current, refused)
            case Field(name, value):
                joined = name in self._fields and name == "tags" and name not in self._from_query
                self._from_query.discard(name)
                self._fields[name] = f"{self._fields[name]},{value}" if joined else value
            case FileStart():
                await self._start(event)
            case FileEnd():
                current = self._files[-1]
                if isinstance(current, Upload):
                    try:
                        await current.pause()
                    except CofferError as refused:
                        await self._give_up(current, refused)

    async def _start(self, part: FileStart) -> None:
        number = len(self._files)
        self._names.append(part.file_name)
        # The key names the request, so each file in it gets a key of its own. No client's key holds a space.
        key = None if self._key is None else self._key if number == 0 else f"{self._key} {number}"
        likely = max(0, self._content_length - self.consumed_bytes) if self._content_length else 0
        expected = _parse_digests(part.headers.get("content-digest"), part.headers.get("content-md5"))
        try:
            begun = await _begin(self._services, self._principal, key, declared_bytes=None, likely_bytes=likely, expected=expected)
        except CofferError as refused:
            self._refuse(number, refused)
            self._files.append(refused)
        else:
            self._files.append(begun)

    async def _give_up(self, current: Upload, refused: CofferError) -> None:
        await current.abort()
        self._refuse(len(self._files) - 1, refused)
        self._files[-1] = refused

    @staticmethod
    def _refuse(number: int, refused: CofferError) -> None:
        """The first file's failure ends the form at once, instead of receiving a gigabyte to no avail; a later one is told at the end."""
        if number == 0:
            raise refused

    async def finish(self) -> list[File | CofferError]:
        """Publishes what has arrived well, file by file; one file's failure leaves the others."""
        if not self._files:
            raise InvalidRequest("file", "the form holds no file")
        if len(self._files) > 1 and "name" in self._fields:
            raise InvalidRequest("name", "names one file; with several, each part's filename counts")
        results: list[File | CofferError] = []
        for each, name in zip(self._files, self._names, strict=True):
            if isinstance(each, Upload):
                try:
                    results.append(await each.finish(_details(self._fields, self._fields.get("name", name or None))))
                except CofferError as refused:
                    results.append(refused)
            else:
                self.replayed = self.replayed or isinstance(each, File)
                results.append(each)
        return results

    async def abort(self) -> None:
        for each in self._files:
            if isinstance(each, Upload):
                await each.abort()


async def _begin(
    services: Services, principal: Principal, key: str | None, *, declared_bytes: int | None, likely_bytes: int, expected: dict[str, bytes]
) -> Upload | File:
    begin = services.intake.begin if key is None else partial(services.intake.begin_once, idempotency_key=key)
    return await begin(principal.owner, declared_bytes=declared_bytes, likely_bytes=likely_bytes, expected=expected, kinds=principal.kinds)


def _query(scope: ASGIScope) -> dict[str, str]:
    try:
        query = parse_qs(scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=100, errors="strict")
    except ValueError as problem:
        raise InvalidRequest("query", "must be at most 100 percent-encoded UTF-8 parameters") from problem
    return {name: ",".join(values) if name == "tags" else values[-1] for name, values in query.items()}


def _details(texts: dict[str, str], name: str | None) -> Details:
    kind = texts.get("type") or None
    if kind is not None and kind not in KINDS:
        raise InvalidRequest("type", f"must be one of {', '.join(KINDS)}")
    return Details(
        file_name=None if name is None else clean_name(name),
        kind=kind,
        package_name=clean_package_name(texts.get("package_name")),
        tags=parse_tags(texts.get("tags", "")),
        metadata=parse_metadata(texts["metadata"]) if "metadata" in texts else {},
    )


async def body_pieces(receive: Receive) -> AsyncIterator[bytes]:
    """The body's pieces. Raises `IncompleteBody` when the client goes away."""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise IncompleteBody
        if chunk := message.get("body"):
            yield chunk
        if not message.get("more_body"):
            return


def _header(scope: ASGIScope, wanted: bytes) -> str | None:
    """The first header of that name (lower case), as latin-1."""
    for name, value in scope["headers"]:
        if name == wanted:
            text: str = value.decode("latin-1")
            return text
    return None


def _content_length(scope: ASGIScope) -> int | None:
    text = _header(scope, b"content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequest("Content-Length", "must be a whole number")
    return int(text)


def _digests(scope: ASGIScope) -> dict[str, bytes]:
    content, representation = _header(scope, b"content-digest"), _header(scope, b"repr-digest")
    return _parse_digests(representation, None) | _parse_digests(content, _header(scope, b"content-md5"))


def _parse_digests(dictionary: str | None, content_md5: str | None) -> dict[str, bytes]:
    """`Content-Digest` and `Repr-Digest` (RFC 9530; sha-256 and sha-512, others are ignored) and `Content-MD5` (RFC 1864)."""
    found: dict[str, bytes] = {}
    for member in dictionary.split(",") if dictionary else ():
        match = _DICTIONARY_MEMBER.fullmatch(member)
        if match is None:
            raise InvalidRequest("Content-Digest", "must be a dictionary such as sha-256=:base64:")
        if match[1] in ("sha-256", "sha-512"):
            found[match[1]] = _unbase64(match[2], match[1], "Content-Digest")
    if content_md5 is not None:
        found["md5"] = _unbase64(content_md5.strip(), "md5", "Content-MD5")
    return found


def _unbase64(text: str, algorithm: str, field: str) -> bytes:
    try:
        digest = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != _DIGEST_BYTES[algorithm]:
        raise InvalidRequest(field, f"is not a base64 {algorithm} digest")
    return digest


def _result(scope: ASGIScope, result: File | CofferError) -> dict[str, object]:
    if isinstance(result, CofferError):
        problem = Problem.of(result, scope["state"]["request_id"])
        return {"status": problem.status, "problem": msgspec.Raw(problem.body)}
    return {"status": 201, "file": file_json(result)}


async def _answer(send: Send, status: int, file: File, *, replayed: bool = False) -> None:
    headers = [(b"etag", etag(file.sha256).encode())]
    if status == 201:
        headers.append((b"location", f"/api/files/{file.id}".encode()))
    if replayed:
        headers.append(_REPLAYED)
    await send_json(send, status, file_json(file), headers)


async def send_json(send: Send, status: int, content: object, headers: list[tuple[bytes, bytes]]) -> None:
    body = msgspec.json.encode(content)
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *RAW_COMMON_HEADERS, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
