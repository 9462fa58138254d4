"""Rows of a dump that was restored to scratch, and their way back into the store."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from server.actor import actor_json
from server.ledger.database import COMMIT_PATIENCE_SECONDS, Database
from server.ledger.statements import statement

_USER = statement("saved_user")
_FILES = statement("saved_files")
_SET_TIER = statement("set_tier")
_GENERATION = statement("latest_generation")
_RESTORE = statement("restore_file")
_ASSETS = statement("saved_assets")
_RESTORE_ASSET = statement("restore_asset")


class SavedUser(NamedTuple):
    """A user as the dump has them."""

    tier: str
    max_bytes: int | None


class SavedFile(NamedTuple):
    """A file as the dump has it; `record` is its whole row, `media` that of how it was made, for `restore_file`."""

    id: UUID
    volume_id: UUID
    file_type: str
    file_path: str
    file_size: int
    sha256: bytes
    record: str
    media: str | None


class SavedAsset(NamedTuple):
    """A linked asset as the dump has it; `record` is its whole row, for `restore_asset`."""

    id: UUID
    record: str


async def saved_user(scratch: Database, user_id: str) -> SavedUser | None:
    """The user in the dump, if there."""
    rows = await scratch.read(_USER, user_id)
    return SavedUser(*rows[0]) if rows else None


async def saved_files(scratch: Database, user_id: str, after: UUID | None, limit: int) -> Sequence[SavedFile]:
    """The next `limit` files of the user in the dump, in the order of their ids."""
    return [SavedFile(*row) for row in await scratch.read(_FILES, user_id, after or UUID(int=0), limit)]


async def set_tier(db: Database, user_id: str, tier: str) -> None:
    """Gives a user a tier; their quota stays."""
    await db.write(_SET_TIER, user_id, tier)


async def latest_generation(db: Database, file_id: UUID) -> int:
    """The youngest generation of a deleted file whose bytes may still lie there; 0: none."""
    generation: int = (await db.read(_GENERATION, file_id))[0]["generation"]
    return generation


async def restore_file(db: Database, file: SavedFile, volume_id: UUID, path: str, generation: int) -> bool:
    """Adds the row, whose bytes are synced under that path, and how it was made, and charges it. False when there is such a file by now.

    Raises `QuotaExceeded`, `UserErasing`, `UploadsStopped`, `CommitUnknown` (the bytes must stay) and `DatabaseUnavailable`.
    """
    rows = await db.write(_RESTORE, file.record, volume_id, path, generation, actor_json(), file.media, patience=COMMIT_PATIENCE_SECONDS)
    return bool(rows)


async def saved_assets(scratch: Database, user_id: str, after: UUID | None, limit: int) -> Sequence[SavedAsset]:
    """The next `limit` linked assets of the user in the dump, in the order of their ids."""
    return [SavedAsset(*row) for row in await scratch.read(_ASSETS, user_id, after or UUID(int=0), limit)]


async def restore_asset(db: Database, asset: SavedAsset) -> bool:
    """Links it again, after the files. False when it is linked by now."""
    return bool(await db.write(_RESTORE_ASSET, asset.record, actor_json()))
