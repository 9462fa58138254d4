"""What a backup consists of in the repository, and which ones are kept.

A set is several snapshots with one tag: the dump, the files of each volume, what each volume withheld meanwhile, and at last the manifest.
A set without its manifest was interrupted, and nobody restores it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import msgspec

from ops.restic import Snapshot

MARK = "coffer"
DUMP, MANIFEST = "coffer.dump", "manifest.json"
_FILES = "files/"
_INTERRUPTED_KEPT = timedelta(days=1)
_TIME = "%Y%m%dT%H%M%S.%fZ"


class VolumeManifest(msgspec.Struct, frozen=True):
    """A volume as it was: its id, its place, and what the dump says lies on it."""

    id: UUID
    mount_path: str
    files: int
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup says of itself. `at` is the moment that its rows show; `server_version` is PostgreSQL's (160004)."""

    format: int = 1
    id: UUID
    at: datetime
    server_version: int
    has_previews: bool
    volumes: list[VolumeManifest]

    @property
    def files(self) -> int:
        """Of all volumes."""
        return sum(each.files for each in self.volumes)

    @property
    def size_bytes(self) -> int:
        """Of all volumes."""
        return sum(each.size_bytes for each in self.volumes)


@dataclass
class BackupSet:
    """The snapshots of one backup. `at` is None while there is no manifest."""

    id: UUID
    at: datetime | None = None
    snapshots: list[Snapshot] = field(default_factory=list)

    def part(self, name: str) -> str | None:
        """The id of the snapshot that is this part."""
        found = [each.id for each in self.snapshots if f"part={name}" in each.tags]
        return found[-1] if found else None

    def volume_ids(self) -> list[UUID]:
        """The volumes whose files are there."""
        parts = (tag.removeprefix("part=") for each in self.snapshots for tag in each.tags)
        return [UUID(part.removeprefix(_FILES)) for part in parts if part.startswith(_FILES)]


def tags(set_id: UUID, part: str, at: datetime | None = None) -> list[str]:
    """What a snapshot is found by."""
    return [MARK, f"set={set_id}", f"part={part}", *([f"at={at.astimezone(UTC).strftime(_TIME)}"] if at else [])]


def files_of(volume_id: UUID) -> str:
    """The part that holds a volume's files."""
    return f"{_FILES}{volume_id}"


def withheld_of(volume_id: UUID) -> str:
    """The part that holds what was deleted from a volume while its files were read."""
    return f"withheld/{volume_id}"


def sets_of(snapshots: Iterable[Snapshot]) -> list[BackupSet]:
    """The sets that there are, the oldest first; interrupted ones come before all others."""
    found: dict[UUID, BackupSet] = {}
    for snapshot in snapshots:
        values = dict(tag.partition("=")[::2] for tag in snapshot.tags)
        if MARK not in values or "set" not in values:
            continue
        each = found.setdefault(UUID(values["set"]), BackupSet(UUID(values["set"])))
        each.snapshots.append(snapshot)
        if "at" in values:
            each.at = datetime.strptime(values["at"], _TIME).replace(tzinfo=UTC)
    return sorted(found.values(), key=lambda each: each.at or datetime.min.replace(tzinfo=UTC))


def whole(sets: Iterable[BackupSet], until: datetime | None = None) -> list[BackupSet]:
    """Those that can be restored and show a moment not after `until`, the oldest first."""
    return [each for each in sets if each.at is not None and (until is None or each.at <= until)]


def kept(times: Sequence[datetime], *, daily: int, weekly: int, monthly: int) -> set[datetime]:
    """The newest of all, and the newest of each of the last so many days, weeks and months that have any. Times are UTC."""
    newest_first = sorted(times, reverse=True)
    chosen = set(newest_first[:1])
    periods: list[tuple[int, Callable[[datetime], object]]] = [
        (daily, lambda time: time.date()),
        (weekly, lambda time: time.isocalendar()[:2]),
        (monthly, lambda time: (time.year, time.month)),
    ]
    for count, period in periods:
        seen: set[object] = set()
        for time in newest_first:
            if len(seen) < count and period(time) not in seen:
                seen.add(period(time))
                chosen.add(time)
    return chosen


def to_forget(sets: Sequence[BackupSet], now: datetime, *, daily: int, weekly: int, monthly: int) -> list[str]:
    """The ids of the snapshots of all sets that are not kept, and of those that were interrupted a day ago or longer."""
    keep = kept([each.at for each in sets if each.at is not None], daily=daily, weekly=weekly, monthly=monthly)
    gone = [
        each
        for each in sets
        if (each.at not in keep if each.at is not None else max(one.time for one in each.snapshots) < now - _INTERRUPTED_KEPT)
    ]
    return [snapshot.id for each in gone for snapshot in each.snapshots]
