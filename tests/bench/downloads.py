"""downloads: the server without an edge, against nginx serving the very same stored files with sendfile."""

import json
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.bench import servers
from tests.bench.clients import Connection
from tests.bench.harness import KIB, MIB, Round, Stage, image, interleave, table, verdict
from tests.bench.processes import BenchError
from tests.bench.programs import debian_program
from tests.bench.servers import Coffer, Peer, Request, Server

CLIENTS = 8
ROUNDS = 5
MANY = 2_000  # different files: more than are asked for within the second for which an answered link is remembered
_NO_LIMIT = "1000000/1"  # counted all the same
_LINKS_AT_ONCE = 500
_USER = "downloads"
_REQUESTS = re.compile(r"(\d+) requests in ([\d.]+)s")


class Size:
    """How long one round of files of this size takes, and what is aimed at, as multiples of nginx."""

    def __init__(self, name: str, size_bytes: int, seconds: int, rate_at_least: float | None, cpu_at_most: float | None) -> None:
        self.name, self.size_bytes, self.seconds = name, size_bytes, seconds
        self.rate_at_least, self.cpu_at_most = rate_at_least, cpu_at_most


SIZES = (
    Size("4 KiB", 4 * KIB, 1, None, None),
    Size("200 KiB", 200 * KIB, 1, 0.6, None),
    Size("5 MiB", 5 * MIB, 2, 0.95, 1.5),
    Size("100 MiB", 100 * MIB, 4, 0.95, 1.5),
)


def measure(stage: Stage) -> None:
    """Targets for one link asked for again and again; owners, and links that nobody asked for a moment ago, are reported."""
    with servers.coffer(stage.scratch, "downloads", COFFER_RATE_LINKS_PER_ADDRESS=_NO_LIMIT, COFFER_RATE_PER_USER=_NO_LIMIT) as coffer:
        _measure(stage, coffer, stage.nginx)


def _measure(stage: Stage, coffer: Coffer, nginx: Peer | None) -> None:
    wrk = debian_program("wrk", "usr/bin/wrk", stage.scratch)
    results: dict[str, list[Round]] = {}
    for size in SIZES:
        (file_id,) = _stored(coffer, [image(size.size_bytes)])
        rounds = {
            f"link, {size.name}": _asking(wrk, coffer, [Request("GET", each) for each in _links(coffer, [file_id])], size.seconds),
            f"owner, {size.name}": _asking(wrk, coffer, [coffer.download(_USER, file_id)], size.seconds),
        }
        if nginx:
            name = _shown(coffer, nginx, file_id)
            rounds[f"nginx, {size.name}"] = _asking(wrk, nginx, [Request("GET", f"/{name}")], size.seconds)
        results |= interleave(rounds, ROUNDS)
    many = SIZES[1]
    ids = _stored(coffer, [image(many.size_bytes)] * MANY)
    rounds = {f"links, {many.name}": _asking(wrk, coffer, [Request("GET", each) for each in _links(coffer, ids)], many.seconds)}
    if nginx:
        rounds[f"nginx, {MANY} files"] = _asking(
            wrk, nginx, [Request("GET", f"/{_shown(coffer, nginx, each)}") for each in ids], many.seconds
        )
    results |= interleave(rounds, ROUNDS)
    table(results, "files/s", "CPU ms/file", 1000)
    if nginx:
        nginx.clean()
        for size in SIZES:
            _compare(results, f"link, {size.name}", f"nginx, {size.name}", size.rate_at_least, size.cpu_at_most)
            _compare(results, f"owner, {size.name}", f"nginx, {size.name}")
        _compare(results, f"links, {many.name}", f"nginx, {MANY} files")


def _compare(
    results: dict[str, list[Round]], name: str, base: str, rate_at_least: float | None = None, cpu_at_most: float | None = None
) -> None:
    """Medians of the ratios of a round and its neighbour, so that a slow minute of the machine counts for neither."""
    pairs = list(zip(results[name], results[base], strict=True))
    rate = statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)
    # Of a contestant with so few requests, a clock that ticks 100 times a second may have seen nothing.
    cpu = statistics.median(ours.cpu_seconds / max(theirs.cpu_seconds, 1e-9) for ours, theirs in pairs)
    verdict(f"{name} / nginx: rate", rate, at_least=rate_at_least)
    verdict(f"{name} / nginx: CPU per file", cpu, at_most=cpu_at_most)


def _asking(wrk: str, server: Server, requests: Sequence[Request], seconds: int) -> Callable[[], Round]:
    """A round of clients that ask for these in turn."""
    script = server.directory.parent / f"wrk-{id(requests)}.lua"
    lines = [f"{{{json.dumps(each.path)}, {_lua(each.headers)}}}" for each in requests]
    script.write_text(
        f"local asked, requests, at = {{{', '.join(lines)}}}, {{}}, 0\n"
        "function init(args) for i, each in ipairs(asked) do requests[i] = wrk.format('GET', each[1], each[2]) end end\n"
        "function request() at = at % #requests + 1; return requests[at] end\n"
    )
    command = [wrk, "-t1", f"-c{CLIENTS}", f"-d{seconds}s", "--timeout", "30", "-s", str(script), f"http://127.0.0.1:{server.port}"]
    return partial(_round, command, server)


def _lua(headers: Sequence[str]) -> str:
    pairs = (header.split(": ", 1) for header in headers)
    return "{" + ", ".join(f"[{json.dumps(name)}] = {json.dumps(value)}" for name, value in pairs) + "}"


def _round(command: Sequence[str], server: Server) -> Round:
    before = server.cpu_seconds()
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    match = _REQUESTS.search(printed)
    if match is None or "Non-2xx" in printed or "Socket errors" in printed:
        raise BenchError(f"wrk says: {printed}")
    count = int(match[1])
    return Round(count / float(match[2]), (server.cpu_seconds() - before) / count)


def _stored(coffer: Coffer, bodies: Sequence[bytes]) -> list[str]:
    connection = Connection(coffer.port)
    upload = coffer.upload(_USER, "image/png")
    return [json.loads(connection.ask(upload, body, str(number)))["id"] for number, body in enumerate(bodies)]


def _links(coffer: Coffer, ids: Sequence[str]) -> list[str]:
    connection = Connection(coffer.port)
    request = Request("POST", "/api/links", (*coffer.headers(_USER), "Content-Type: application/json"))
    urls = []
    for start in range(0, len(ids), _LINKS_AT_ONCE):
        wish = json.dumps({"ids": ids[start : start + _LINKS_AT_ONCE]}).encode()
        urls += [each["url"] for each in json.loads(connection.ask(request, wish))["links"]]
    return ["/" + each.split("/", 3)[3] if "://" in each else each for each in urls]


def _shown(coffer: Coffer, nginx: Peer, file_id: str) -> str:
    """Has nginx serve the stored file itself, under a name that this returns."""
    stored: Path = next(coffer.directory.glob(f"users/{_USER}/*/{file_id}.*"))
    os.link(stored, nginx.directory / file_id)
    return file_id
