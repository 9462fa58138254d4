"""The ledger: what Coffer knows, as rows in PostgreSQL. The only room that imports asyncpg."""

from server.ledger.database import Database
from server.ledger.files import (
    delete_files,
    find_file_anywhere,
    find_file_by_idempotency_key,
    get_file,
    publish_file,
    replace_content,
    set_favorite,
    set_tags,
    update_file,
)
from server.ledger.keys import create_api_key, find_api_key, list_api_keys, revoke_api_key
from server.ledger.listing import list_files
from server.ledger.migrations import MigrationError, migrate, pending
from server.ledger.models import (
    ApiKeyRow,
    File,
    FilePage,
    FileQuery,
    KindUsage,
    NewFile,
    ReplacedContent,
    Tombstone,
    User,
    VolumeRow,
)
from server.ledger.publisher import Publisher
from server.ledger.tombstones import drop_tombstones, pending_tombstones
from server.ledger.uploads import (
    live_uploads,
    open_reservation,
    release_expired,
    release_reservation,
    renew_reservations,
    resize_reservation,
)
from server.ledger.users import (
    begin_erasing,
    ensure_user,
    erase_batch,
    finish_erasing,
    get_user,
    list_users,
    set_quota,
    usage,
    users_being_erased,
)
from server.ledger.volumes import add_volume, list_volumes, set_volume_state

__all__ = [
    "ApiKeyRow",
    "Database",
    "File",
    "FilePage",
    "FileQuery",
    "KindUsage",
    "MigrationError",
    "NewFile",
    "Publisher",
    "ReplacedContent",
    "Tombstone",
    "User",
    "VolumeRow",
    "add_volume",
    "begin_erasing",
    "create_api_key",
    "delete_files",
    "drop_tombstones",
    "ensure_user",
    "erase_batch",
    "find_api_key",
    "find_file_anywhere",
    "find_file_by_idempotency_key",
    "finish_erasing",
    "get_file",
    "get_user",
    "list_api_keys",
    "list_files",
    "list_users",
    "list_volumes",
    "live_uploads",
    "migrate",
    "open_reservation",
    "pending",
    "pending_tombstones",
    "publish_file",
    "release_expired",
    "release_reservation",
    "renew_reservations",
    "replace_content",
    "resize_reservation",
    "revoke_api_key",
    "set_favorite",
    "set_quota",
    "set_tags",
    "set_volume_state",
    "update_file",
    "usage",
    "users_being_erased",
]
