"""PostgreSQL's own programs: which of those installed suits a server, and how they are told where it is."""

import asyncio
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from ops.embedded_postgres import EmbeddedPostgresError, binaries_for
from server.commands.failures import CommandFailed

_DEBIAN = Path("/usr/lib/postgresql")


async def program(name: str, server_version: int) -> Path:
    """The oldest installed `name` that is not older than the server (`server_version_num`, such as 160004).

    An older one refuses to dump, and writes what an older server cannot read. Raises `CommandFailed`.
    """
    wanted = server_version // 10_000
    found: dict[int, Path] = {}
    for each in _candidates(name):
        if (version := await version_of(each)) is not None:
            found.setdefault(version, each)
    suitable = [version for version in found if version >= wanted]
    if not suitable:
        raise CommandFailed(f"PostgreSQL {wanted} needs a {name} that is not older; install postgresql-client-{wanted}")
    return found[min(suitable)]


async def version_of(binary: Path) -> int | None:
    """The major version of one of PostgreSQL's programs; None when it does not tell."""
    process = await asyncio.create_subprocess_exec(binary, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    said, _ = await process.communicate()  # pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
    version = said.decode(errors="replace").partition(") ")[2].partition(".")[0]
    return int(version) if process.returncode == 0 and version.isdecimal() else None


def _candidates(name: str) -> list[Path]:
    candidates = sorted(_DEBIAN.glob(f"*/bin/{name}"))
    with suppress(EmbeddedPostgresError):  # it is not installed
        candidates.append(binaries_for(None) / name)
    on_path = shutil.which(name)
    candidates += [Path(on_path)] if on_path else []
    return [each for each in candidates if each.exists()]


def connection(database_url: str) -> tuple[str, dict[str, str]]:
    """The URL without its password, which everybody on the machine may see in a command line, and an environment with it."""
    parts = urlsplit(database_url)
    account, at, place = parts.netloc.rpartition("@")
    user, _, password = account.partition(":")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
    if password:
        environment["PGPASSWORD"] = unquote(password)
    return urlunsplit(parts._replace(netloc=f"{user}{at}{place}")), environment


def dump_options(snapshot: str) -> Sequence[str]:
    """What a dump is made with: restic and gzip compress it themselves, and compressed it would share nothing with the day before."""
    return ("--format=custom", "--compress=0", "--no-owner", "--no-privileges", f"--snapshot={snapshot}")
