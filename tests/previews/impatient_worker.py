"""The real worker, but for the wall-clock time that it grants an image: tests have less."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from server import logs
from server.previews import decoders, making
from server.previews.models import Made, Wishes
from server.settings import Settings
from server.worker import HEARTBEAT_SECONDS, work

WALL_SECONDS = 6.0


async def make(source: Path, mime_type: str, output: Path, wishes: Wishes) -> Made:
    """As `making.make` for images."""
    return await decoders.shared().make(source, mime_type, output, wishes, wall_seconds=WALL_SECONDS)


def main(_: Sequence[str]) -> None:
    settings = Settings.load()
    logs.configure(settings.log_level)
    asyncio.run(work(settings, make, making.make_variant, heartbeat_seconds=HEARTBEAT_SECONDS))
