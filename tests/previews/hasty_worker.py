"""The real worker, but it takes over the jobs of dead ones within a second."""

import asyncio
from collections.abc import Sequence

from server import logs
from server.previews import making
from server.settings import Settings
from server.worker import work


def main(_: Sequence[str]) -> None:
    settings = Settings.load()
    logs.configure(settings.log_level)
    asyncio.run(work(settings, making.make, making.make_variant, heartbeat_seconds=1))
