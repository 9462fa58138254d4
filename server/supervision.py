"""What systemd hands to a process and hears from it: a socket that listens already, readiness, signs of life.

The protocols are sd_listen_fds(3) and sd_notify(3), and they are environment variables and datagrams. Without systemd, which sets the
variables, nothing here does anything.
"""

import asyncio
import faulthandler
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START

log = logging.getLogger("coffer")


def inherited_listener() -> socket.socket | None:
    """The socket that systemd listens on for this process, if it does; ValueError when there are several.

    It outlives this process: who connects while none accepts waits instead of being refused.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if (count := os.environ.get("LISTEN_FDS")) != "1":
        raise ValueError(f"systemd hands over {count} sockets, and one is wanted: say one ListenStream= in coffer-api.socket")
    return socket.socket(fileno=_FIRST_DESCRIPTOR)


@asynccontextmanager
async def supervised() -> AsyncIterator[None]:
    """On entering, systemd is told that the process is ready; within, that its event loop turns; on leaving, that it stops.

    Of several server processes each tells so, and the first makes the service ready. One that is stuck beside others that are not would not
    be missed by systemd, so each process looks after itself, too (`_give_signs_of_life`); uvicorn starts another one in its place, and also
    finds those of which no thread runs any more.
    """
    tell("READY=1")
    signs_of_life = asyncio.create_task(_give_signs_of_life())
    try:
        yield
    finally:
        tell("STOPPING=1")
        signs_of_life.cancel()
        with suppress(asyncio.CancelledError):
            await signs_of_life


async def _give_signs_of_life() -> None:
    """Twice as often as systemd wants them (WatchdogSec=), from the event loop: they stop when that is stuck.

    Without them the process ends itself after the same time, with code 1, and writes to standard error what each of its threads was at.
    """
    seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1_000_000
    try:
        while seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)
            tell("WATCHDOG=1")
            await asyncio.sleep(seconds / 2)
    finally:
        faulthandler.cancel_dump_traceback_later()


def tell(state: str) -> None:
    """Sends one line of sd_notify(3). A manager that does not take it is no reason to stop: it is logged."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            datagrams.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            datagrams.send(state.encode())
    except OSError as problem:
        log.warning("systemd could not be told %s: %s", state, problem)
