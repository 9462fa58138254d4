"""`coffer status`: how it is, on one screen. It tells and does not judge; `coffer doctor` does."""

import asyncio
import importlib.metadata
from datetime import UTC, datetime
from typing import Any

import msgspec

from ops import machine
from server import ledger
from server.commands.output import human_bytes, printable
from server.errors import CofferError
from server.ledger import Database, overview
from server.settings import Settings
from server.vault import Vault


def add(commands: Any) -> None:
    """Declares the command."""
    meaning = "how it is, on one screen: server, database, volumes, files, jobs, the tools' last runs"
    parser = commands.add_parser("status", help=meaning, description=meaning)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.set_defaults(run=lambda arguments: asyncio.run(_run(as_json=arguments.json)))


async def _run(*, as_json: bool) -> None:
    status = await look(Settings.load())
    if as_json:
        print(msgspec.json.encode(status).decode())
        return
    for line in lines(status, datetime.now(UTC)):
        print(printable(line))


async def look(settings: Settings) -> dict[str, Any]:
    """Everything that is known; null is what cannot be known now, such as all of the database while that is away."""
    answer = await asyncio.to_thread(machine.ask, settings, "/health/ready")
    status: dict[str, Any] = {
        "version": importlib.metadata.version("coffer"),
        "release": machine.release(),
        "address": machine.address(settings),
        "server": "away" if answer is None else "ready" if answer.status_code == 200 else "not_ready",
        "services": {
            name: told["ActiveState"] for name in machine.SERVICES if (told := await asyncio.to_thread(machine.unit, name, "ActiveState"))
        },
        "tools": {tool: last for tool in machine.TOOLS if (last := await asyncio.to_thread(machine.last_run, settings, tool))},
    }
    db, vault = Database(settings), Vault(settings.volume_reserve_bytes)
    await db.open()
    try:
        return status | await _stored(db, vault)
    except CofferError as problem:
        return (
            status
            | dict.fromkeys(("database", "volumes", "stored", "uploads", "previews", "jobs", "damaged_files", "backups"))
            | {"problem": str(problem)}
        )
    finally:
        vault.close()
        await db.close()


async def _stored(db: Database, vault: Vault) -> dict[str, Any]:
    rows = await ledger.list_volumes(db)
    await vault.refresh(rows)
    facts = await overview.database_facts(db)
    waiting, failed = await ledger.count_previews(db)
    backups = await overview.last_backups(db)
    return {
        "database": {
            "version": facts.version_text,
            "size_bytes": facts.size_bytes,
            "connections": facts.connections,
            "connections_at_most": facts.connections_at_most,
            "pending_migrations": len(await ledger.pending(db)),
        },
        "volumes": [
            {
                "id": volume.id,
                "mount": str(volume.mount),
                "state": volume.state,
                "free_bytes": None if volume.state == "unavailable" else volume.free_bytes(),
            }
            for volume in vault.volumes
        ],
        "stored": (await overview.stored_totals(db))._asdict(),
        "uploads": (await overview.uploads_under_way(db, 1))[1],
        "previews": {"waiting": waiting, "failed": sum(failed.values())},
        "jobs": {each.state: each.jobs for each in await overview.count_jobs(db)},
        "damaged_files": await overview.count_damaged(db),
        "backups": None if backups is None else backups._asdict(),
    }


def lines(status: dict[str, Any], now: datetime) -> list[str]:
    """What `look` found, for people."""
    services = ", ".join(f"{name.removesuffix('.service')} {state}" for name, state in status["services"].items())
    told = [
        f"Coffer    {status['version']} ({status['release']})",
        f"server    {status['server'].replace('_', ' ')} at {status['address']}{f'   {services}' if services else ''}",
    ]
    if status["database"] is None:
        told.append(f"database  away: {status['problem']}")
    else:
        told += _stored_lines(status)
    for tool, last in status["tools"].items():
        told.append(f"{tool:<9} {_ago(now, last.ended_at)}, exit code {last.exit_code}")
    if backups := status.get("backups"):
        proven = f"proven {_ago(now, backups['proven_at'])}" if backups["proven_at"] else "unproven"
        told.append(f"backups   {'last ' + _ago(now, backups['done_at']) if backups['done_at'] else 'none'}, {proven}")
    return told


def _stored_lines(status: dict[str, Any]) -> list[str]:
    database, stored, jobs = status["database"], status["stored"], status["jobs"]
    pending = f", {database['pending_migrations']} migrations PENDING" if database["pending_migrations"] else ""
    connections = f"{database['connections']} of {database['connections_at_most']} connections"
    told = [f"database  PostgreSQL {database['version']}, {human_bytes(database['size_bytes'])}, {connections}{pending}"]
    for volume in status["volumes"]:
        free = "" if volume["free_bytes"] is None else f", {human_bytes(volume['free_bytes'])} free"
        told.append(f"volume    {volume['mount']}: {volume['state'].replace('_', ' ')}{free}")
    if not status["volumes"]:
        told.append("volume    none")
    damaged = f", {status['damaged_files']} DAMAGED" if status["damaged_files"] else ""
    told += [
        f"stored    {stored['files']:,} files, {human_bytes(stored['total_bytes'])}, {stored['users']:,} users{damaged}",
        f"uploads   {status['uploads']} under way, {human_bytes(stored['reserved_bytes'])} reserved",
        f"previews  {status['previews']['waiting']} wait, {status['previews']['failed']} failed",
        f"jobs      {', '.join(f'{count} {state}' for state, count in sorted(jobs.items())) or 'none'}",
    ]
    return told


def _ago(now: datetime, then: datetime) -> str:
    minutes = max(0.0, (now - then).total_seconds() / 60)
    return (
        f"{minutes:.0f} min ago"
        if minutes < 120
        else f"{minutes / 60:.0f} h ago"
        if minutes < 72 * 60
        else f"{minutes / 1440:.0f} days ago"
    )
