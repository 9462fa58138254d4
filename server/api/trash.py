"""The JSON routes of the trash: what was deleted and may come back."""

import base64
from datetime import datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Router, delete, get, post
from litestar.params import FromPath, QueryParameter

from server import ledger
from server.api.door import needs, principal_of, services_of
from server.api.files import FileAnswer, file_json
from server.api.reading import DEFAULT_PAGE, known_query_only, page_size
from server.auth import Scope
from server.errors import InvalidRequest, NotFound
from server.ledger import File

Http = Request[Any, Any, Any]
_Position = tuple[Annotated[datetime, msgspec.Meta(tz=True)], UUID]
_cursors = msgspec.json.Decoder(_Position)


class TrashedAnswer(FileAnswer, kw_only=True):
    """`deletes_at` is when it may go for good; null while the server has no such time."""

    deleted_at: datetime
    deletes_at: datetime | None


class TrashList(msgspec.Struct):
    """The last deleted first. `next_cursor` asks for the page after this one; null when there is none."""

    files: list[TrashedAnswer]
    next_cursor: str | None


@get("/trash", guards=[needs(Scope.FILES_READ)], before_request=known_query_only)
async def list_trash(
    request: Http,
    limit: Annotated[int | None, QueryParameter(ge=1, description=f"Files on the page; {DEFAULT_PAGE} when left out.")] = None,
    cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before.")] = None,
) -> TrashList:
    """What is in the user's trash. It counts against the quota, and cannot be read until it is restored."""
    services, principal = services_of(request), principal_of(request)
    after = None if cursor is None else _read_cursor(cursor)
    wanted = page_size(services, limit)
    files = await ledger.list_trash(services.db, principal.owner, principal.kinds, after, wanted + 1)
    days = services.settings.trash_days
    answers = [_answer(file, days) for file in files[:wanted]]
    return TrashList(answers, _write_cursor(files[wanted - 1]) if len(files) > wanted else None)


@post("/files/{file_id:uuid}/restore", guards=[needs(Scope.FILES_WRITE)], status_code=200)
async def restore_file(request: Http, file_id: FromPath[UUID]) -> FileAnswer:
    """Takes a file out of the trash. One that is not in it stays as it is. Its links do not come back."""
    return file_json(await ledger.restore_file(services_of(request).db, principal_of(request).owner, file_id))


@delete("/trash/{file_id:uuid}", guards=[needs(Scope.FILES_WRITE)])
async def delete_from_trash(request: Http, file_id: FromPath[UUID]) -> None:
    """Deletes a file in the trash for good. Its quota is free when this is answered."""
    if not await services_of(request).intake.delete_from_trash(principal_of(request).owner, [file_id]):
        raise NotFound


def _answer(file: File, days: int) -> TrashedAnswer:
    if file.deleted_at is None:
        raise ValueError("this file is not in the trash")
    facts = {name: getattr(answer, name) for answer in (file_json(file),) for name in FileAnswer.__struct_fields__}
    return TrashedAnswer(**facts, deleted_at=file.deleted_at, deletes_at=file.deleted_at + timedelta(days=days) if days else None)


def _write_cursor(file: File) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((file.deleted_at, file.id))).rstrip(b"=").decode()


def _read_cursor(cursor: str) -> _Position:
    try:
        position: _Position = _cursors.decode(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, msgspec.MsgspecError) as problem:
        raise InvalidRequest(field="cursor", reason="it is not one that a page of this list gave") from problem
    return position


router = Router(path="/api", route_handlers=[list_trash, restore_file, delete_from_trash], tags=["Trash"])
