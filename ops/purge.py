"""`coffer purge`: removes what is beyond its time, and files by lifecycle rules. server/decisions/0020 says what may go.

What a running server's housekeeping removes by itself (expired reservations and resumable uploads, the audit trail's old records) is
removed by the same code, for stores whose server does not run.
"""

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from ops.tool import Desk, Finding, State
from server import ledger
from server.commands.lifecycle import meaning
from server.commands.output import human_bytes
from server.errors import CofferError, LegalHold
from server.intake import Housekeeping, Intake
from server.intake.housekeeping import EXPIRED_UPLOADS_KNOWN_SECONDS
from server.ledger import LifecycleRule
from server.ledger import audit as rows
from server.ledger.lifecycle import Ruled
from server.ledger.trash import OldTrash, Position
from server.vault import Volume, inventory
from server.vault.layout import user_directory

_PAGE = 10_000
_AT_ONCE = 1_000
"""Files that one transaction deletes: it holds their user's row, so the user's uploads wait for it to commit."""
_EVENTS_AT_ONCE = 5_000
_JOBS_AT_ONCE = 1_000

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}T\d{6}Z")
_AGAIN = "coffer purge --for-real"


@dataclass
class _Sum:
    """Files and their bytes; and those that a legal hold keeps."""

    files: int = 0
    size_bytes: int = 0
    held: int = 0

    def add(self, size_bytes: int) -> None:
        self.files += 1
        self.size_bytes += size_bytes


async def run(desk: Desk) -> str:
    """Everything once: rules before the trash, which they may fill and whose oldest files they may delete; then what is no file."""
    purge = _Purge(desk)
    await purge.apply_rules()
    await purge.empty_trash()
    await purge.drop_overdue()
    await purge.empty_quarantines()
    desk.figures |= {"files": purge.total.files, "bytes": purge.total.size_bytes, "held_files": purge.total.held}
    done = "removed" if purge.for_real else "would remove"
    return f"{done} {purge.total.files:,} files ({human_bytes(purge.total.size_bytes)})"


class _Purge:
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.for_real: bool = desk.arguments.for_real
        self.total = _Sum()
        self._intake = Intake(desk.settings, desk.db, desk.vault)
        self._housekeeping = Housekeeping(desk.settings, desk.db, desk.vault, self._intake)

    @property
    def _state(self) -> State:
        return "removed" if self.for_real else "removable"

    def _found(self, kind: str, state: State, text: str, **facts: Any) -> None:
        if state == "removable":
            facts.setdefault("command", _AGAIN)
        self.desk.found(Finding(kind=kind, state=state, text=text, **facts))

    def _tell(self, kind: str, what: str, found: _Sum, **facts: Any) -> None:
        if found.files:
            text = f"{found.files:,} files ({human_bytes(found.size_bytes)}) {what}"
            self._found(kind, self._state, text, count=found.files, size_bytes=found.size_bytes, **facts)
        if found.held:
            self._found("held", "waiting", f"{found.held:,} files {what} are kept by legal holds", count=found.held, **facts)
        self.total.files += found.files
        self.total.size_bytes += found.size_bytes
        self.total.held += found.held

    # Files

    async def apply_rules(self) -> None:
        """One pass over all rows in the order of their ids, whatever the number of rules."""
        desk = self.desk
        rules = {rule.id: rule for rule in await ledger.list_rules(desk.db)}
        has_trash = bool(desk.settings.trash_days)
        for rule in rules.values():
            if rule.action == "trash" and not has_trash:
                text = f"rule {rule.id} moves to the trash, and there is none: COFFER_TRASH_DAYS is 0"
                self._found("rule", "look", text, rule_id=rule.id, command=f"coffer lifecycle remove {rule.id}")
        found: dict[int, _Sum] = defaultdict(_Sum)
        files, _ = await rows.count_stored(desk.db) if rules else (0, 0)
        after: UUID | None = None
        with desk.progress("lifecycle", files, " files") as bar:
            while rules:
                page = await ledger.page_of_ruled(desk.db, after, _PAGE, with_trash=has_trash)
                if page.last is None:
                    break
                after = page.last
                bar.update(_PAGE)
                for (user_id, rule_id), group in _grouped(page.files).items():
                    # A rule that somebody has made since is applied next time.
                    if rule_id in rules:
                        await self._apply(rules[rule_id], user_id, group, found[rule_id])
        for rule_id, done in sorted(found.items()):
            rule = rules[rule_id]
            verb = {"delete": "deleted", "trash": "moved to the trash"}[rule.action]
            what = f"to be {verb} by rule {rule_id} ({meaning(rule)}, after {rule.after_days} days)"
            self._tell("rule", what, done, rule_id=rule_id)

    async def _apply(self, rule: LifecycleRule, user_id: str, files: list[Ruled], done: _Sum) -> None:
        async def remove(ids: list[UUID]) -> set[UUID]:
            if rule.action == "trash":
                return await self._intake.trash(user_id, ids, rule.id)
            return await self._intake.buried(await ledger.delete_ruled(self.desk.db, user_id, ids, rule.id))

        await self._remove({file.id: file.size_bytes for file in files if not file.is_held}, remove, done, user_id)
        done.held += sum(file.is_held for file in files)

    async def empty_trash(self) -> None:
        """What has been in the trash for its time. Without a time it stays until somebody says what is to become of it."""
        desk, days = self.desk, self.desk.settings.trash_days
        if not days:
            return
        done, after = _Sum(), None
        while page := await ledger.page_of_old_trash(desk.db, days, after, _PAGE):
            after = _position(page[-1])
            by_user: dict[str, list[OldTrash]] = defaultdict(list)
            for file in page:
                by_user[file.user_id].append(file)
            for user_id, files in by_user.items():

                async def remove(ids: list[UUID], user_id: str = user_id) -> set[UUID]:
                    return await self._intake.buried(await ledger.delete_old_trash(desk.db, user_id, ids, days))

                await self._remove({file.id: file.size_bytes for file in files if not file.is_held}, remove, done, user_id)
                done.held += sum(file.is_held for file in files)
        self._tell("trash", f"in the trash for {days} days", done)

    async def _remove(self, sizes: dict[UUID, int], remove: Callable[[list[UUID]], Awaitable[set[UUID]]], done: _Sum, user_id: str) -> None:
        """Removes files of one user, some at once; a rehearsal only counts them. What somebody has changed meanwhile stays."""
        ids = list(sizes)
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            removed = set(some)
            if self.for_real:
                await self.desk.lock.check()
                try:
                    removed = await remove(some)
                except LegalHold:  # set since we looked
                    done.held += len(some)
                    continue
                except CofferError as problem:
                    if problem.code == "database_unavailable":
                        raise
                    self._found("kept", "look", f"{len(some)} files of user {user_id!r} stay: {problem}", user_id=user_id)
                    continue
            for file_id in removed:
                done.add(sizes[file_id])

    # Everything else

    async def drop_overdue(self) -> None:
        """Reservations, resumable uploads, records, events and jobs."""
        desk, settings = self.desk, self.desk.settings
        found = await ledger.count_overdue(
            desk.db,
            uploads_seconds=EXPIRED_UPLOADS_KNOWN_SECONDS,
            records_days=settings.audit_log_days or None,
            events_days=settings.events_days or None,
            jobs_days=settings.jobs_days or None,
        )
        counts = {
            "reservation": (found.reservations, f"reservations ({human_bytes(found.reserved_bytes)}) have expired"),
            "resumable_upload": (found.resumable_uploads, "resumable uploads expired over 7 days ago"),
            "record": (found.records, f"records of the audit trail are older than {settings.audit_log_days} days"),
            "event": (found.events, f"events are older than {settings.events_days} days"),
            "job": (found.jobs, f"generation jobs ended over {settings.jobs_days} days ago"),
        }
        if self.for_real:
            await desk.lock.check()
            while await self._housekeeping.release_expired():
                pass
            await self._housekeeping.forget_uploads()
            await self._housekeeping.forget_records()
            while settings.events_days and await ledger.purge_events(desk.db, settings.events_days, _EVENTS_AT_ONCE) == _EVENTS_AT_ONCE:
                pass
            while settings.jobs_days and await ledger.purge_jobs(desk.db, settings.jobs_days, _JOBS_AT_ONCE) == _JOBS_AT_ONCE:
                pass
        for kind, (count, what) in counts.items():
            if count:
                self._found(kind, self._state, f"{count:,} {what}", count=count)

    async def empty_quarantines(self) -> None:
        """What the audit set aside, and neither anybody nor a legal hold wants. What bears no audit's name is not ours to remove."""
        days = self.desk.settings.quarantine_days
        for volume in self.desk.vault.volumes:
            if volume.state == "unavailable":
                text = f"volume {volume.id} at {volume.mount} is unavailable: {volume.reason}"
                self._found("volume", "look", text, volume_id=volume.id, command="coffer volume list")
            elif days:
                await self._empty_quarantine(volume, datetime.now(UTC) - timedelta(days=days))

    async def _empty_quarantine(self, volume: Volume, before: datetime) -> None:
        run = self.desk.vault.run
        for name in await run(inventory.quarantined, volume):
            path = f"quarantine/{name}"
            set_aside_at = _time_of(name)
            if set_aside_at is None:
                text = f"{volume.mount / path} is nothing that the audit makes"
                self._found("strange", "look", text, volume_id=volume.id, path=path, command=f"ls -lad {volume.mount / path}")
                continue
            if set_aside_at >= before:
                continue
            if self.for_real:
                await self.desk.lock.check()
            held = {user_directory(user_id) for user_id in await ledger.held_users(self.desk.db)}
            files, size_bytes, kept = await run(inventory.measure_quarantined, volume, name, held)
            if self.for_real:
                await run(inventory.check_sentinel, volume)
                try:
                    await run(inventory.remove_quarantined, volume, name, held)
                except CofferError as problem:
                    self._found("kept", "look", f"{volume.mount / path} stays: {problem}", volume_id=volume.id, path=path)
                    continue
            self._tell("quarantine", f"in {volume.mount / path}", _Sum(files, size_bytes, kept), volume_id=volume.id, path=path)


def _grouped(files: list[Ruled]) -> dict[tuple[str, int], list[Ruled]]:
    groups: dict[tuple[str, int], list[Ruled]] = defaultdict(list)
    for file in files:
        groups[file.user_id, file.rule_id].append(file)
    return groups


def _position(file: OldTrash) -> Position:
    return file.deleted_at, file.id


def _time_of(name: str) -> datetime | None:
    """When an audit began, by the name that it gave."""
    if not _DATE.fullmatch(name):
        return None
    try:
        return datetime.strptime(name, "%Y-%m-%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None
