"""The end of users: asked for, certified, or because nobody has used them for long."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from server import ledger
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, say, show
from server.commands.users import unknown
from server.errors import CofferError, NotFound
from server.intake import Intake
from server.ledger import AuditQuery, AuditRecord, Database, Unseen, User
from server.settings import Settings
from server.vault import Vault

_PAGE = 1_000
_MEANING = (
    "All files of this user, their previews and the user's rows were removed from the volumes and the database. sha256_of_digests is the "
    "SHA-256 of the files' SHA-256 (32 bytes each), one after the other, in the order of the files' ids. Both records stand in the trail. "
    "Backups that were made before erased_at are not touched, and end by their own age."
)


async def delete(db: Database, settings: Settings, *, user_id: str, for_real: bool, certificate: Path | None) -> None:
    """`coffer user delete`: every byte and row, then a certificate. Interrupted, a repetition or the server itself finishes it."""
    try:
        user = await ledger.get_user(db, user_id)
    except NotFound:
        raise unknown(user_id) from None
    holds = f"{user.file_count} files, {human_bytes(user.total_bytes)}"
    if user.held_at is not None:
        raise CommandFailed(f"a legal hold keeps user {user_id!r}: {user.hold_reason}", Exit.REFUSED)
    if not for_real:
        say(f"would erase user {user_id!r} ({holds}) for ever. Nothing was changed; repeat with --for-real")
        return
    if certificate is not None and certificate.exists():
        raise CommandFailed(f"{certificate} exists; a certificate replaces nothing. Nothing was changed", Exit.REFUSED)
    async with _intake(db, settings) as intake:
        await intake.erase_user(user_id)
    say(f"erased user {user_id!r} ({holds})")
    await certify(db, user_id=user_id, to=certificate)


async def certify(db: Database, *, user_id: str, to: Path | None) -> None:
    """`coffer user certificate`: what the audit trail tells of the last erasure of that id, as JSON."""
    text = msgspec.json.format(msgspec.json.encode(await _certificate(db, user_id)), indent=2).decode() + "\n"
    if to is None:
        sys.stdout.write(text)
        return
    with to.open("x") as file:
        file.write(text)
    say(f"wrote {to}")


async def cleanup(db: Database, settings: Settings, *, unseen_days: int, any_quota: bool, for_real: bool, as_json: bool) -> None:
    """`coffer user cleanup`: erases users without files whose rows nobody has changed for so long."""
    unseen = Unseen(unseen_days, settings.default_quota_bytes, any_quota)
    found: list[User] = []
    while page := await ledger.unseen_users(db, unseen, found[-1].user_id if found else None, _PAGE):
        found += page
    erased = 0
    if for_real:
        async with _intake(db, settings) as intake:
            for user in found:
                try:
                    await intake.erase_user(user.user_id, unseen)
                except NotFound:
                    continue  # used since we looked
                except CofferError as problem:
                    say(f"user {user.user_id!r} stays: {problem}")
                    continue
                erased += 1
    show(
        ({"user_id": user.user_id, "tier": user.tier, "updated_at": user.updated_at, "created_at": user.created_at} for user in found),
        ("user_id", "tier", "updated_at", "created_at"),
        as_json,
    )
    if for_real:
        say(f"erased {erased} of {len(found)} users")
    else:
        say(f"would erase {len(found)} users. Nothing was changed; repeat with --for-real")


@asynccontextmanager
async def _intake(db: Database, settings: Settings) -> AsyncIterator[Intake]:
    vault = Vault(settings.volume_reserve_bytes)
    try:
        await vault.refresh(await ledger.list_volumes(db))
        yield Intake(settings, db, vault)
    finally:
        vault.close()


async def _certificate(db: Database, user_id: str) -> dict[str, Any]:
    """Raises `CommandFailed` where no such erasure has ended, or its records have left the trail."""
    ended = await _last_record(db, AuditQuery(user_id=user_id, action="user.erased", limit=1))
    begun = None if ended is None else await _last_record(db, AuditQuery(user_id=user_id, action="user.erasing", until=ended.at, limit=1))
    if ended is None or begun is None:
        raise CommandFailed(f"the audit trail knows of no erasure of user {user_id!r} that has ended", Exit.NOT_FOUND)
    return {
        "certificate": "coffer erasure 1",
        "user_id": user_id,
        "requested_at": begun.at,
        "requested_by": {"kind": begun.actor_kind, "id": begun.actor_id, "request_id": begun.request_id},
        "erased_at": ended.at,
        "erased_by": {"kind": ended.actor_kind, "id": ended.actor_id},
        "files": begun.detail["file_count"],
        "bytes": begun.detail["total_bytes"],
        "sha256_of_digests": begun.detail.get("sha256_of_digests"),
        "records": [begun.id, ended.id],
        "meaning": _MEANING,
    }


async def _last_record(db: Database, query: AuditQuery) -> AuditRecord | None:
    """The newest one. A page of a filter may be empty and not the last: between the two lies a record for each file."""
    while True:
        page = await ledger.list_trail(db, query)
        if page.records or page.next_cursor is None:
            return page.records[0] if page.records else None
        query = msgspec.structs.replace(query, cursor=page.next_cursor)
