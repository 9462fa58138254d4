"""`coffer top`: what goes on now, refreshed each second: requests by route, bytes in and out, uploads, jobs.

Rates are differences of the server's own counters (`/metrics`); uploads and jobs are rows. So it sees all processes of this machine's
server, and the uploads and jobs of all machines.
"""

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from ops import machine
from server.commands.output import human_bytes, printable
from server.errors import CofferError
from server.ledger import Database, overview
from server.ledger.overview import Jobs, UploadUnderWay
from server.settings import Settings

_HOME_AND_CLEAR = "\x1b[H\x1b[2J"
_MOST_ROUTES, _MOST_UPLOADS = 12, 20


class Counters(NamedTuple):
    """What the server has counted since it began; requests by route and method."""

    requests: dict[tuple[str, str], float]
    seconds: dict[tuple[str, str], float]
    received_bytes: float
    sent_bytes: float
    in_flight: float


class Moment(NamedTuple):
    """One look. `counters`: None while no server answers; the rest, while the database does not."""

    at: float
    counters: Counters | None
    uploads: tuple[list[UploadUnderWay], int] | None
    jobs: list[Jobs] | None


def add(commands: Any) -> None:
    """Declares the command."""
    meaning = "what goes on now, refreshed each second: requests, bytes, uploads, jobs; Ctrl-C ends it"
    parser = commands.add_parser("top", help=meaning, description=meaning)
    parser.add_argument("--seconds", type=_seconds, default=1.0, help="between two looks; %(default)s when left out")
    parser.add_argument("--count", type=int, help="end after so many; without it, go on")
    parser.set_defaults(run=lambda arguments: asyncio.run(_run(arguments.seconds, arguments.count)))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("say seconds, from 0.1 to 3600")
    return seconds


async def _run(seconds: float, count: int | None) -> None:
    settings = Settings.load()
    db = Database(settings)
    await db.open()
    try:
        before = await look(settings, db)
        shown = 0
        while count is None or shown < count:
            await asyncio.sleep(seconds)
            now = await look(settings, db)
            screen = "\n".join(printable(line) for line in lines(before, now))
            print(f"{_HOME_AND_CLEAR}{screen}" if sys.stdout.isatty() else f"{screen}\n", flush=True)
            before, shown = now, shown + 1
    finally:
        await db.close()


async def look(settings: Settings, db: Database) -> Moment:
    """Asks the server and the database."""
    answer = await asyncio.to_thread(machine.ask, settings, "/metrics")
    counters = counters_of(answer.text) if answer is not None and answer.status_code == 200 else None
    try:
        return Moment(time.monotonic(), counters, await overview.uploads_under_way(db, _MOST_UPLOADS), await overview.count_jobs(db))
    except CofferError:
        return Moment(time.monotonic(), counters, None, None)


def counters_of(text: str) -> Counters:
    """Reads a scrape."""
    requests: dict[tuple[str, str], float] = {}
    seconds: dict[tuple[str, str], float] = {}
    plain: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.labels.get("route", ""), sample.labels.get("method", ""))
            match sample.name:
                case "coffer_http_requests_total":
                    requests[key] = requests.get(key, 0) + sample.value
                case "coffer_http_request_duration_seconds_sum":
                    seconds[key] = sample.value
                case name if not sample.labels:
                    plain[name] = sample.value
    return Counters(
        requests,
        seconds,
        plain.get("coffer_http_received_bytes_total", 0),
        plain.get("coffer_http_sent_bytes_total", 0),
        plain.get("coffer_http_requests_in_flight", 0),
    )


def lines(before: Moment, now: Moment) -> Iterator[str]:
    """The screen. Two looks at different servers, one started between them, tell no rates."""
    yield f"Coffer, {time.strftime('%H:%M:%S')}"
    yield from _traffic(before, now)
    yield ""
    if now.uploads is None or now.jobs is None:
        yield "The database does not answer."
        return
    jobs = ", ".join(f"{each.jobs} {each.state} (oldest {each.oldest_seconds:.0f} s)" for each in sorted(now.jobs)) or "none"
    yield f"Jobs: {jobs}"
    uploads, all_uploads = now.uploads
    yield f"Uploads under way: {all_uploads}"
    width = max(20, min(60, shutil.get_terminal_size().columns - 40))
    for each in uploads:
        way = f"{each.way}, waits" if each.waits else each.way
        yield f"  {each.user_id[:width]:<{width}} {human_bytes(each.reserved_bytes):>10} {each.age_seconds:>6.0f} s  {way}"


def _traffic(before: Moment, now: Moment) -> Iterator[str]:
    if now.counters is None:
        yield "The server does not answer."
        return
    old = before.counters
    if old is None or sum(now.counters.requests.values()) < sum(old.requests.values()):
        yield f"{now.counters.in_flight:.0f} requests under way; the server has just been started"
        return
    seconds = now.at - before.at
    new = {key: value - old.requests.get(key, 0) for key, value in now.counters.requests.items() if value > old.requests.get(key, 0)}
    received = human_bytes(int((now.counters.received_bytes - old.received_bytes) / seconds))
    sent = human_bytes(int((now.counters.sent_bytes - old.sent_bytes) / seconds))
    yield f"{sum(new.values()) / seconds:.0f} requests/s, {now.counters.in_flight:.0f} under way, {received}/s in, {sent}/s out"
    for key, count in sorted(new.items(), key=lambda item: -item[1])[:_MOST_ROUTES]:
        each_ms = 1000 * (now.counters.seconds.get(key, 0) - old.seconds.get(key, 0)) / count
        yield f"  {key[1]:<7} {key[0]:<40} {count / seconds:>8.1f}/s {each_ms:>9.1f} ms"
