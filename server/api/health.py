"""What load balancers and monitoring ask. Open to whoever reaches the port; a proxy in front should not pass `/metrics` on."""

from contextlib import suppress
from typing import Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Response, get

from server import ledger
from server.api.door import services_of
from server.errors import CofferError
from server.metrics import MEDIA_TYPE, BackupState, PreviewFacts, StoreFacts, VolumeFacts, WorkFacts
from server.vault import Volume

Http = Request[Any, Any, Any]


class Alive(msgspec.Struct):
    """Always the same: that it is sent at all is the message."""

    status: Literal["alive"] = "alive"


class DatabaseCheck(msgspec.Struct):
    """`ok` when PostgreSQL answered and no migration is missing; `detail` is for people and holds no address and no password."""

    ok: bool
    detail: str


class VolumeCheck(msgspec.Struct):
    """`free_bytes` is what uploads may still take, above the reserve; null while nobody can tell."""

    id: UUID
    ok: bool
    state: str
    free_bytes: int | None


class ScannerCheck(msgspec.Struct):
    """Whether clamd answers. While it does not, uploads are refused and everything else works, so it does not decide about readiness."""

    ok: bool


class Readiness(msgspec.Struct):
    """Ready when the database and every volume are ok; without a volume there is nowhere to store anything. No scanner is null."""

    status: Literal["ready", "not_ready"]
    database: DatabaseCheck
    volumes: list[VolumeCheck]
    scanner: ScannerCheck | None


@get("/health/live", tags=["Operation"])
async def live() -> Alive:
    """200 as long as the process answers at all. Says nothing about the database or the volumes."""
    return Alive()


@get("/health/ready", tags=["Operation"])
async def ready(request: Http) -> Response[Readiness]:
    """200 when requests can be served: the database answers and is migrated, every volume is mounted, writable and has room. Else 503."""
    services = services_of(request)
    database = await _check_database(services.db)
    volumes = [_check_volume(volume) for volume in services.vault.volumes]
    scanner = None if services.scanner is None else ScannerCheck(await services.scanner.answers())
    is_ready = database.ok and bool(volumes) and all(volume.ok for volume in volumes)
    return Response(Readiness("ready" if is_ready else "not_ready", database, volumes, scanner), status_code=200 if is_ready else 503)


@get("/metrics", media_type="text/plain", include_in_schema=False)
async def metrics(request: Http) -> Response[bytes]:
    """Everything that is counted, as Prometheus reads it."""
    services = services_of(request)
    previews = store = backups = work = None
    with suppress(CofferError):  # a database that is down must not hide the rest
        backups = _backups(await ledger.backup_facts(services.db), services.settings.drill_max_age_days)
        previews = PreviewFacts(*await ledger.count_previews(services.db), _made(await ledger.preview_figures(services.db)))
        figures = await services.figures.get()
        store, work = _store_facts(figures), _work_facts(figures.work)
    facts = [_facts(volume) for volume in services.vault.volumes]
    text = await services.vault.run(lambda: services.metrics.expose(facts, previews, store, backups, work))
    return Response(text, media_type=MEDIA_TYPE)


async def _check_database(db: ledger.Database) -> DatabaseCheck:
    try:
        await db.check()
        missing = await ledger.pending(db)
    except (CofferError, ledger.MigrationError) as problem:
        return DatabaseCheck(False, str(problem))
    if missing:
        return DatabaseCheck(False, f"{len(missing)} migrations have not been applied: run `coffer migrate`")
    return DatabaseCheck(True, "reachable and migrated")


def _check_volume(volume: Volume) -> VolumeCheck:
    facts = _facts(volume)
    return VolumeCheck(volume.id, facts.state == "open" and (facts.free_bytes or 0) > 0, facts.state, facts.free_bytes)


def _made(figures: list[ledger.PreviewFigure]) -> dict[tuple[str, str], list[tuple[float, int, float]]]:
    """By type and state; every bound is there, whether anything was counted below it or not."""
    counted = {(each.file_type, each.state, each.upto_seconds): (each.files, each.seconds) for each in figures}
    return {
        (kind, state): [(bound, *counted.get((kind, state, bound), (0, 0.0))) for bound in ledger.PREVIEW_BOUNDS_SECONDS]
        for kind, state in dict.fromkeys((each.file_type, each.state) for each in figures)
    }


def _backups(facts: ledger.BackupFacts, max_age_days: int) -> BackupState:
    return BackupState(
        last_good_at=facts.last_good_at.timestamp() if facts.last_good_at else None,
        last_proof_at=facts.last_proof_at.timestamp() if facts.last_proof_at else None,
        are_proven=facts.are_proven(max_age_days),
        uploads_are_stopped=facts.uploads_are_stopped,
    )


def _store_facts(figures: ledger.StoreFigures) -> StoreFacts:
    return StoreFacts(
        users=figures.users,
        files=figures.file_count,
        stored_bytes=figures.total_bytes,
        reserved_bytes=figures.reserved_bytes,
        quota_bytes=figures.limit_bytes,
        unlimited_users=figures.unlimited_users,
        warned_users={80: figures.warned_80, 90: figures.warned_90, 100: figures.warned_100},
        damaged_files=figures.damaged_files,
        reservation_overdue_seconds=figures.reservation_overdue_seconds,
        tombstone_age_seconds=figures.tombstone_age_seconds,
        worker_connections=figures.worker_connections,
    )


def _work_facts(figures: ledger.WorkFigures) -> WorkFacts:
    return WorkFacts(**{name: getattr(figures, name) for name in figures.__struct_fields__})


def _facts(volume: Volume) -> VolumeFacts:
    """By the last look at it: who asks for the state of a disk must not wait for one that does not answer."""
    try:
        free_bytes = max(0, volume.free_bytes_seen())
        room = volume.room()
    except CofferError:
        return VolumeFacts(str(volume.id), volume.state, None)
    return VolumeFacts(str(volume.id), volume.state, free_bytes, room.size_bytes, room.inodes, room.free_inodes)


handlers = [live, ready, metrics]
