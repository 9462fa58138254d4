"""A worker that makes no previews and loses patience with dead ones soon."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from server import logs
from server.previews.models import Made, MadeFile, Unmakeable, Wishes
from server.previews.variants import Variant
from server.settings import Settings
from server.worker import work
from tests.serving import RunningServer
from tests.working import BackgroundWorker


async def make(_source: Path, _mime_type: str, _output: Path, _wishes: Wishes) -> Made:
    raise Unmakeable("unsupported")


async def make_variant(_source: Path, _mime_type: str, _output: Path, _variant: Variant) -> MadeFile:
    raise Unmakeable("unsupported")


def main(_: Sequence[str]) -> None:
    settings = Settings.load()
    logs.configure(settings.log_level)
    asyncio.run(work(settings, make, make_variant, heartbeat_seconds=1))


def impatient_worker(server: RunningServer, log: Path, settings: dict[str, str]) -> BackgroundWorker:
    """One in a process of its own, beside a server; it ends with whoever started it."""
    return BackgroundWorker(server, log, settings | {"COFFER_PUBLIC_URL": server.url}, main)
