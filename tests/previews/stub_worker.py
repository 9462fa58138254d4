"""A worker whose decoder is a stub: it copies the file's first bytes."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from server import logs
from server.previews.making import Made, MadeFile, Unmakeable, Wishes
from server.previews.variants import MIME_TYPES, Variant
from server.settings import Settings
from server.worker import work

HEARTBEAT_SECONDS = 2.0
"""So that a killed worker's jobs are taken over within the tests' patience."""


async def make(seconds_each: float, source: Path, mime_type: str, output: Path, wishes: Wishes) -> Made:
    """A preview of the file's own first bytes. What a file holds decides what goes wrong with it."""
    head = source.read_bytes()[:1000]
    if b"deadly" in head:
        os.kill(os.getpid(), signal.SIGKILL)
    if b"never" in head:
        raise Unmakeable("damaged")
    if b"unknown" in head:
        raise Unmakeable("unsupported")
    if b"broken" in head:
        raise RuntimeError("the stub was told to fail")
    await asyncio.sleep(seconds_each)
    for width in wishes.image_widths[:2]:
        (output / f"{width}.webp").write_bytes(head)
    return Made(
        files=[
            MadeFile(variant=str(width), name=f"{width}.webp", mime_type="image/webp", width=width, height=2)
            for width in wishes.image_widths[:2]
        ],
        width=1920,
        height=1080,
        duration_seconds=150.2 if mime_type.startswith("video/") else None,
        thumbhash=b"hash",
        average_color="#102030",
    )


async def make_variant(seconds_each: float, source: Path, mime_type: str, output: Path, variant: Variant) -> MadeFile:
    """A picture that says what was asked for. Its log says how often."""
    head = source.read_bytes()[:1000]
    if b"no survivors" in head:
        os.kill(os.getpid(), signal.SIGKILL)
    if b"no picture" in head:
        raise Unmakeable("damaged")
    await asyncio.sleep(seconds_each)
    logging.getLogger("stub").info("made %s", variant.name)
    (output / variant.name).write_bytes(f"{mime_type} {variant.name} ".encode() + head[-100:])
    return MadeFile(
        variant=variant.name, name=variant.name, mime_type=MIME_TYPES[variant.format], width=variant.width, height=variant.height
    )


def main(arguments: Sequence[str]) -> None:
    """Its one argument: how many seconds each making takes."""
    settings = Settings.load()
    logs.configure(settings.log_level)
    slowly = float(arguments[0])
    asyncio.run(work(settings, partial(make, slowly), partial(make_variant, slowly), heartbeat_seconds=HEARTBEAT_SECONDS))
