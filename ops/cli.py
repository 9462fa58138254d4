"""The whole `coffer` command: what the server has, and the tools of this room, which the server does not know."""

import argparse
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

from ops import (
    audit,
    backup,
    disks,
    doctor,
    drill,
    purge,
    rebalance,
    restore,
    restore_user,
    restore_volume,
    scrub,
    status,
    tool,
    top,
    usage,
)
from ops.tool import Desk
from server import cli


def main() -> NoReturn:
    """Runs one command and exits with its code."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    return cli.run(arguments, more=_add_tools)


def _add_tools(commands: Any) -> None:
    check = tool.add(commands, "audit", audit.run, "compare rows, files and counters, in both directions")
    check.add_argument("--repair", action="store_true", help="repair what is safe; without this, it is only told what would be done")
    check.add_argument(
        "--older-than",
        type=_hours,
        default=audit.GARBAGE_AGE_SECONDS,
        metavar="HOURS",
        help="how old a file without a row must be, and then seen by two audits, to be set aside; 24 when left out",
    )
    verify = tool.add(commands, "scrub", scrub.run, "read stored files again and compare their SHA-256; goes on where it stopped")
    verify.add_argument("--rate", type=_rate, help="bytes a second, such as 20MiB, or unlimited; all within 30 days when left out")
    verify.add_argument("--file", type=UUID, action="append", help="only this file, at once; may be repeated")
    verify.add_argument("--damaged", action="store_true", help="only files known to be damaged, to see whether they are restored")
    meaning = "move users between volumes: off those that are drained, onto their own, or evenly; they notice nothing"
    move = tool.add(commands, "rebalance", rebalance.run, meaning)
    move.add_argument("--for-real", action="store_true", help="do it; without this, it is only told what would be done")
    move.add_argument("--user", type=cli.user_id_of, help="only this user, to the volume --to")
    move.add_argument("--to", type=UUID, metavar="VOLUME")
    move.add_argument("--evenly", action="store_true", help="also even out how full the shared volumes are")
    move.add_argument("--rate", type=_rate, help="bytes a second, such as 20MiB; as fast as it goes when left out")
    move.add_argument(
        "--keep-old",
        type=_seconds,
        default=rebalance.KEEP_OLD_SECONDS,
        metavar="SECONDS",
        help="how long the old copy of a moved file stays for whoever is about to read it; %(default)g when left out",
    )
    save = tool.add(
        commands,
        "backup",
        backup.run,
        "save rows and files as one pair, encrypted and deduplicated",
        failure_command=lambda settings: settings.backup_failed,
    )
    save.add_argument("--init", action="store_true", help="make the repository first; without this, one must be there")
    save.add_argument("--tar", type=Path, metavar="PLACE", help="instead, one plain .tar.gz: a file, or a directory that keeps several")
    _add_restore(commands)
    prove = tool.add(
        commands,
        "drill",
        drill.run,
        "prove the newest backup by restoring it to scratch",
        failure_command=lambda settings: settings.backup_failed,
    )
    prove.add_argument("--full", action="store_true", help="read the bytes of all files; without this, of some by chance")
    prove.add_argument("--sample", type=_count, default=drill.SAMPLE_FILES, metavar="FILES", help="how many; 100 when left out")
    prove.add_argument("--backup", type=UUID, metavar="ID", help="this backup, as `coffer restore list` names it")
    sweep = tool.add(commands, "purge", purge.run, "remove what is beyond its time, and files by lifecycle rules; for a daily timer")
    sweep.add_argument("--for-real", action="store_true", help="do it; without this, it is only told what would be removed")
    meaning = "sum up what users stored on each finished day, and tell a month's usage for invoices; for a daily timer"
    account = tool.add(commands, "usage", usage.run, meaning, needs_store=lambda _: False)
    account.add_argument("--month", type=_month, metavar="YYYY-MM", help="also tell of each user what was stored in this month (UTC)")
    account.add_argument("--user", type=cli.user_id_of, help="only of this user")
    _add_hetzner(commands)
    for each in (doctor, status, top):
        each.add(commands)


def _add_restore(commands: Any) -> None:
    meaning = "bring back a whole store, one volume, one user or one file from a backup"

    async def work(desk: tool.Desk) -> str:
        match desk.arguments.what:
            case "user":
                return await restore_user.run(desk)
            case "volume":
                return await restore_volume.run(desk)
            case _:
                return await restore.run(desk)

    back = tool.add(commands, "restore", work, meaning, needs_store=lambda arguments: restore.needs_store(arguments.what))
    whats = back.add_subparsers(dest="what", metavar="WHAT", required=True)
    whats.add_parser("list", help="the backups that there are")
    everything = whats.add_parser("all", help="rows and files, into an empty database and empty directories")
    everything.add_argument("--to", type=Path, metavar="DIRECTORY", help="below which the volumes go; their old places when left out")
    rows = whats.add_parser("rows", help="the rows alone, into an empty database, for volumes that are whole and in their places")
    one = whats.add_parser("file", help="the bytes of one damaged file, in its place")
    one.add_argument("file_id", type=UUID, metavar="ID")
    volume = whats.add_parser("volume", help="what an empty disk lacks that has taken the place of a lost one, while the store runs")
    volume.add_argument("volume_id", type=UUID, metavar="ID")
    for each in (everything, rows, volume):
        each.add_argument("--tar", type=Path, metavar="FILE", help="from this archive, and not from the repository")
    theirs = whats.add_parser("user", help="the files that a user had and has no more, into a store that runs")
    theirs.add_argument("user_id", metavar="USER")
    for each in (everything, rows, one, volume, theirs):
        each.add_argument("--at", type=_moment, metavar="TIME", help="the newest backup that is not younger, such as 2026-01-31T12:00")
        each.add_argument("--backup", type=UUID, metavar="ID", help="this backup, as `coffer restore list` names it")
    whats.add_parser("clear", help="take uploads again: this store is the one that counts")
    for part in whats.choices.values():
        tool.add_options(part)


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= 10_000:
        raise argparse.ArgumentTypeError("say a number of files, such as 100")
    return count


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("say a time as ISO 8601 has it, such as 2026-01-31T12:00") from None
    return moment.astimezone(UTC)  # one without a zone is of this machine's


def _month(text: str) -> date:
    try:
        return datetime.strptime(text, "%Y-%m").replace(tzinfo=UTC).date()
    except ValueError:
        raise argparse.ArgumentTypeError("say a month, such as 2026-01") from None


def _add_hetzner(commands: Any) -> None:
    meaning = "volumes of Hetzner Cloud: ordered, mounted, grown while in use"
    group = commands.add_parser("hetzner", help=meaning, description=meaning).add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )

    def command(name: str, meaning: str) -> argparse.ArgumentParser:
        async def work(desk: Desk) -> str:
            from ops import hetzner  # noqa: PLC0415 - the other commands start faster without the cloud's library

            does: tool.Work = getattr(hetzner, name)
            return await does(desk)

        parser = tool.add(group, name, work, meaning, tool="hetzner")
        parser.add_argument("--for-real", action="store_true", help="do it; without this, it is only told what would be done")
        parser.add_argument(
            "--server", default=socket.gethostname(), help="this machine's name or number in the cloud; %(default)s when left out"
        )
        parser.add_argument("--devices", type=Path, default=Path("/dev/disk/by-id"), help="where volumes appear; %(default)s when left out")
        parser.add_argument("--fstab", type=Path, default=disks.FSTAB, help="%(default)s when left out")
        parser.add_argument("--units", type=Path, default=disks.UNITS, help="where mount units are; %(default)s when left out")
        return parser

    create = command("create", "order a volume, attach it, make a file system on it, mount it, and make it a volume of Coffer")
    attach = command("attach", "attach a volume that Coffer has made before, and mount it")
    detach = command("detach", "unmount a volume and detach it; its files stay on it")
    grow = command("grow", "make a volume larger, in use as it is")
    for each in (create, attach, detach):
        each.add_argument("name")
        each.add_argument("--mount", type=Path, help="where it is mounted; /srv/coffer/NAME when left out")
    for each in (create, attach):
        each.add_argument("--owner", help="the server's account, which the volume is given to; coffer, if there is one, when left out")
    create.add_argument("--size-gb", type=int, help="from 10 to 10240; needed unless the volume is there")
    create.add_argument("--fs", choices=disks.KINDS, default="ext4", help="%(default)s when left out")
    create.add_argument("--for-user", type=cli.user_id_of, metavar="USER", help="the volume is this user's alone")
    create.add_argument("--replace", type=UUID, metavar="ID", help="the volume takes the place of this one of Coffer, whose disk is lost")
    grow.add_argument("name", nargs="?", help="all that are attached here when left out")
    grow.add_argument("--when-free-below", type=float, metavar="PERCENT", help="only where less than this share of the bytes is free")
    grow.add_argument("--add-gb", type=int, help="by how much; a tenth, and at least 10, when left out")
    for each in (create, grow):
        each.add_argument("--max-eur", type=_euros, help="refuse when all volumes of Coffer would then cost more a month, VAT included")


def _euros(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal(-1)
    if not 0 <= amount <= 1_000_000:
        raise argparse.ArgumentTypeError("say an amount such as 25 or 25.50")
    return amount


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1
    if not 0 <= hours <= 10_000:
        raise argparse.ArgumentTypeError("say a number of hours, such as 24")
    return hours * 3600


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError("say a number of seconds, such as 15")
    return seconds


def _rate(text: str) -> float:
    size = cli.quantity(text)
    if size is not None and size < 1:
        raise argparse.ArgumentTypeError("say how many bytes a second, such as 20MiB, or unlimited")
    return float("inf") if size is None else float(size)


if __name__ == "__main__":
    main()
