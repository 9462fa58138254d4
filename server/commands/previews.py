"""Previews: which failed and why, and having them made again."""

from uuid import UUID

from server import ledger
from server.commands.output import say, show
from server.errors import NotFound
from server.ledger import Database, File

_PAGE = 1_000
_COLUMNS = ("id", "user_id", "mime_type", "reason")


async def list_failed(db: Database, *, as_json: bool) -> None:
    """`coffer previews list-failed`"""
    rows = (
        {"id": str(file.id), "user_id": file.user_id, "mime_type": file.mime_type, "reason": file.preview_reason}
        for file in await _failed(db)
    )
    show(rows, _COLUMNS, as_json)


async def retry(db: Database, *, ids: list[UUID], for_all: bool) -> None:
    """`coffer previews retry`: lets failed previews be made again. The worker finds them within seconds."""
    count = 0
    # All as of now, not until none is left: what fails once more meanwhile would be tried for ever.
    failed = [file.id for file in await _failed(db)] if for_all else ids
    for start in range(0, len(failed), _PAGE):
        count += await ledger.retry_failed_previews(db, failed[start : start + _PAGE], _PAGE)
    if count < len(failed) and not for_all:
        say(f"{len(failed) - count} of {len(failed)} are no files whose preview failed")
        raise NotFound
    print(f"{count} previews will be made again")


async def rebuild(db: Database, *, user_id: str | None, for_real: bool) -> None:
    """`coffer previews rebuild`: has all previews made anew, of one user or of all; also of files from before there were previews."""
    whose = "all users" if user_id is None else f"user {user_id!r}"
    if not for_real:
        say(f"would make the previews of {whose} anew; those there are stay till then. Nothing was changed; repeat with --for-real")
        return
    count, last = 0, None
    while True:
        last, changed = await ledger.rebuild_previews(db, last, user_id, _PAGE)
        count += changed
        if last is None:
            break
    print(f"{count} previews will be made")


async def _failed(db: Database) -> list[File]:
    found: list[File] = []
    while page := await ledger.failed_previews(db, found[-1].id if found else None, _PAGE):
        found += page
    return found
