"""Rows of files for tests of the way out."""

import hashlib
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from server.ledger.models import File

VOLUME_ID = UUID(int=7)
FILE_ID = UUID(int=42)
OWNER = "user_2abc"
_MOMENT = datetime(2026, 11, 21, 12, 30, 15, 500_000, tzinfo=UTC)


def a_file(data: bytes, **changes: Any) -> File:
    """The row of a JPEG with these bytes, belonging to `OWNER`."""
    file = File(
        id=FILE_ID,
        user_id=OWNER,
        file_name="sunset.jpg",
        file_type="image",
        mime_type="image/jpeg",
        file_size=len(data),
        sha256=hashlib.sha256(data).digest(),
        volume_id=VOLUME_ID,
        file_path=f"users/{OWNER}/images/{FILE_ID}.1.jpg",
        generation=1,
        thumbnail_path=None,
        resolution=None,
        width=None,
        height=None,
        duration=None,
        duration_seconds=None,
        preview_state=None,
        preview_reason=None,
        preview_tries=0,
        thumbhash=None,
        average_color=None,
        frame_rate=None,
        video_codec=None,
        audio_codec=None,
        package_name=None,
        tags=[],
        is_favorite=False,
        public_id=None,
        metadata={},
        upload_date=_MOMENT,
        content_changed_at=_MOMENT,
        created_at=_MOMENT,
        updated_at=_MOMENT,
        damaged_at=None,
        deleted_at=None,
    )
    return msgspec.structs.replace(file, **changes)
