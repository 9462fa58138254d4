"""A database and a directory for an hour."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from ops import postgres_tools
from ops.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError, binaries_for
from server.ledger.scratch import drop_scratch, make_scratch
from server.settings import Settings

_ONE_VERSION = 10_000
_PREFIX = "coffer-scratch-"
_MOMENT_SECONDS = 60


@asynccontextmanager
async def scratch_database(settings: Settings, name: str, server_version: int, directory: Path) -> AsyncIterator[str]:
    """Within it, the URL of an empty database for a dump of a server of that version (160004).

    It is a PostgreSQL of its own below `directory`, where the embedded one is installed and not older; otherwise a database called `name`
    on the server itself, whose role must be allowed to create some.
    """
    if await _embedded_version() >= server_version // _ONE_VERSION:
        postgres = EmbeddedPostgres(directory / "postgres", settings={"fsync": "off", "full_page_writes": "off"})
        try:
            yield postgres.start()
        finally:
            postgres.stop()
        return
    # Two stores may share a server.
    name = f"{name}_{hashlib.sha256(urlsplit(settings.database_url).path.encode()).hexdigest()[:8]}"
    try:
        yield await make_scratch(settings, name)
    finally:
        await drop_scratch(settings, name)


@asynccontextmanager
async def scratch_directory() -> AsyncIterator[Path]:
    """A directory in TMPDIR, or else in /var/tmp: what is restored may be more than a /tmp in memory holds.

    What killed ones have left there is removed: it holds rows and bytes of users.
    """
    parent = Path(tempfile.gettempdir() if tempfile.gettempdir() != "/tmp" else "/var/tmp")  # noqa: S108 - only compared
    with directory_for_now(parent, _PREFIX) as directory:
        yield directory


@contextmanager
def directory_for_now(parent: Path, prefix: str, before_removal: Callable[[Path], object] = lambda _: None) -> Iterator[Path]:
    """A directory below `parent` that ends with the block, or, when this process is killed, with the next one of that prefix.

    Others may only pass it: PostgreSQL, which refuses to be root, may have its place below. `before_removal` is told of each that a
    killed one has left.
    """
    _remove_left_overs(parent, prefix, before_removal)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    life = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(life, fcntl.LOCK_EX)
        directory.chmod(0o711)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(life)


def _remove_left_overs(parent: Path, prefix: str, before_removal: Callable[[Path], object]) -> None:
    """Who lives has locked its directory, but for the moment after it was made."""
    for directory in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            life = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                facts = os.fstat(life)
                if facts.st_uid == os.geteuid() and facts.st_mtime < time.time() - _MOMENT_SECONDS:
                    fcntl.flock(life, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    before_removal(directory)
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(life)


async def _embedded_version() -> int:
    try:
        binary = binaries_for(None) / "pg_dump"
    except EmbeddedPostgresError:
        return 0
    return await postgres_tools.version_of(binary) or 0
