"""`coffer user export`: all files of a user, without a server."""

import os
import secrets
import sys
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from server import ledger
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, say
from server.commands.users import unknown
from server.delivery.export import Export
from server.errors import NotFound
from server.ledger import Database, User
from server.settings import Settings
from server.vault import Vault


async def export(db: Database, settings: Settings, *, user_id: str, to: str) -> None:
    """The archive appears under its name, readable by its owner alone, once it is whole. `-` is standard output."""
    try:
        user = await ledger.get_user(db, user_id)
    except NotFound:
        raise unknown(user_id) from None
    vault = Vault(settings.volume_reserve_bytes)
    try:
        await vault.refresh(await ledger.list_volumes(db))
        archive = Export(db, vault, user, audit_reads=settings.audit_reads)
        if to == "-":
            await archive.begin()
            await _write(archive, user, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        target = Path(to)
        if target.exists():
            raise CommandFailed(f"{target} exists; an export replaces nothing", Exit.REFUSED)
        draft = target.with_name(f".coffer-{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                await archive.begin()
                await _write(archive, user, file)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(target)
        finally:
            draft.unlink(missing_ok=True)
        say(f"wrote {target} ({human_bytes(target.stat().st_size)})")
    finally:
        vault.close()


async def _write(archive: Export, user: User, file: BinaryIO) -> None:
    with tqdm(desc="export", total=user.total_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:
        async for piece in archive.pieces():
            file.write(piece)
            bar.update(len(piece))
