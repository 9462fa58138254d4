"""edge: signed links that nginx verifies and sends by itself, against the same nginx serving the same files directly."""

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from urllib.request import Request as HttpRequest
from urllib.request import urlopen
from uuid import UUID

from server.delivery.links import Links
from server.vault.layout import SENTINEL
from tests.bench import servers
from tests.bench.clients import Connection, send_large
from tests.bench.harness import KIB, MIB, Round, Stage, image, interleave, say, table, verdict
from tests.bench.processes import BenchError, cpu_seconds, free_port
from tests.bench.servers import Coffer
from tests.download.samples import a_file
from tests.edge.nginx import Nginx

CLIENTS, MANY_CLIENTS = 8, 32
ROUND_SECONDS = 1
ROUNDS = 15  # thrice as many where the target is near: one round's ratio scatters by a sixth
MIXED_SECONDS = 5
MIXED_UPLOADS, MIXED_UPLOAD_BYTES = 4, 32 * MIB
DISTINCT_LINKS = 10_000  # more than nginx remembers
_USER = "edge"
_KEY = "a-key-that-signs-the-links-of-benches"


class Outcome(NamedTuple):
    """What wrk tells of a run."""

    requests_per_second: float
    bytes_per_second: float
    p99_seconds: float
    errors: int


def measure(stage: Stage) -> None:
    """Targets: 0.6 of the direct file at 4 KiB and 0.95 from 200 KiB on; p99 within 1.3 times; no errors under mixed load."""
    if shutil.which("wrk") is None:
        raise BenchError("wrk is not installed (apt-get install wrk)")
    with ExitStack() as stack:
        coffer = stack.enter_context(_coffer(stage))
        nginx, direct = stack.enter_context(_nginx(stage, coffer))
        bodies = {"4 KiB": image(4 * KIB), "200 KiB": image(200 * KIB), "5 MiB": image(5 * MIB), "100 MiB": image(100 * MIB)}
        links: dict[str, str] = {}
        files: dict[str, str] = {}
        ids: dict[str, str] = {}
        for name, body in bodies.items():
            stored = json.loads(Connection(coffer.port).ask(coffer.upload(_USER, "image/png"), body, "stored"))
            ids[name] = stored["id"]
            files[name] = f"http://127.0.0.1:{direct}/{_path(coffer, stored['id'])}"
            links[name] = f"http://127.0.0.1:{nginx.port}{_link(coffer, stored['id'])}"
        small = json.loads(Connection(coffer.port).ask(coffer.upload(_USER, "image/png"), bodies["4 KiB"], "stored"))
        for name, at_least, rounds in (("4 KiB", 0.6, 1), ("200 KiB", 0.95, 3), ("5 MiB", 0.95, 1), ("100 MiB", 0.95, 1)):
            _compare(nginx, name, files[name], links[name], at_least, by_bytes=len(bodies[name]) > MIB, rounds=rounds * ROUNDS)
        part = ("-H", f"Range: bytes={10 * MIB}-{10 * MIB + 999_999}")
        _compare(nginx, "1 MB of 100 MiB", files["100 MiB"], links["100 MiB"], 0.95, *part)
        rewritten = files["100 MiB"].replace("/users/", "/rewritten/")
        _compare(nginx, "1 MB of 100 MiB, behind one `rewrite` and nothing else", files["100 MiB"], rewritten, None, *part)
        distinct = _script(stage.scratch / "distinct.lua", _distinct(coffer, small))
        _compare(nginx, "4 KiB, each link another", files["4 KiB"], links["4 KiB"], None, "-s", str(distinct))
        owner = f"http://127.0.0.1:{nginx.port}/api/files/{ids['200 KiB']}/download"
        headers = [part for header in coffer.headers(_USER) for part in ("-H", header)]
        _compare(nginx, "200 KiB, its owner (X-Accel-Redirect)", files["200 KiB"], owner, 0.5, *headers)
        public = _ask(coffer, "PUT", f"/api/files/{ids['200 KiB']}/public", b'{"is_public": true}')["url"]
        _compare(nginx, "200 KiB, public (the same without a row)", files["200 KiB"], f"http://127.0.0.1:{nginx.port}{public}", 0.6)
        _latency(files["200 KiB"], links["200 KiB"])
        _mixed(stage, coffer, nginx, links)
        if nginx.counted("passed"):
            say(f"NOT MEASURED AS MEANT: nginx passed {nginx.counted('passed')} links to the server")


def _compare(
    nginx: Nginx, name: str, direct: str, link: str, at_least: float | None, *options: str, by_bytes: bool = False, rounds: int = ROUNDS
) -> None:
    def run(url: str, *options: str) -> Round:
        before = cpu_seconds(nginx.pid)
        outcome = wrk(url, *options)
        if outcome.errors:
            raise BenchError(f"{name}: {outcome.errors} errors")
        rate = outcome.bytes_per_second / MIB if by_bytes else outcome.requests_per_second
        return Round(rate, (cpu_seconds(nginx.pid) - before) / rate / ROUND_SECONDS)

    directly = options if "-H" in options else ()  # a script asks for paths of its own
    found = interleave({f"{name}, direct": partial(run, direct, *directly), name: partial(run, link, *options)}, rounds)
    table(found, "MiB/s" if by_bytes else "answers/s", f"CPU us/{'MiB' if by_bytes else 'answer'}", 1e6)
    # Of each round, because the machine's pace changes from one to the next.
    ratios = [edge.rate / direct.rate for edge, direct in zip(found[name], found[f"{name}, direct"], strict=True)]
    verdict(f"{name}, of the direct file", statistics.median(ratios), at_least=at_least)


def _latency(direct: str, link: str) -> None:
    def run(url: str) -> Round:
        return Round(1 / wrk(url, clients=MANY_CLIENTS).p99_seconds)

    found = interleave({"direct": partial(run, direct), "link": partial(run, link)}, ROUNDS)
    ratios = [base.rate / edge.rate for edge, base in zip(found["link"], found["direct"], strict=True)]
    verdict(f"200 KiB, {MANY_CLIENTS} clients, p99, of the direct file's", statistics.median(ratios), at_most=1.3)


def _mixed(stage: Stage, coffer: Coffer, nginx: Nginx, links: dict[str, str]) -> None:
    """Links of several sizes at full speed while uploads run through the same nginx."""
    script = _script(stage.scratch / "mixed.lua", [links[name].split("/", 3)[3] for name in ("4 KiB", "4 KiB", "4 KiB", "200 KiB")])
    behind = servers.Coffer(nginx.port, coffer.pid, coffer.directory, coffer.api_key, coffer.database_url, coffer.worker_pid)
    body, ended = stage.file(MIXED_UPLOAD_BYTES), time.monotonic() + MIXED_SECONDS
    uploaded, refused = 0, list[str]()

    def upload() -> None:
        nonlocal uploaded
        while time.monotonic() < ended and not refused:
            try:
                send_large(behind, [behind.upload(_USER, "video/mp4")] * MIXED_UPLOADS, body)
                uploaded += MIXED_UPLOADS
            except BenchError as problem:
                refused.append(str(problem))

    uploading = Thread(target=upload)
    uploading.start()
    outcome = wrk(links["4 KiB"], "-s", str(script), clients=MANY_CLIENTS, seconds=MIXED_SECONDS)
    uploading.join()
    verdict(f"mixed links/s while {MIXED_UPLOADS} uploads run ({uploaded} done)", outcome.requests_per_second, at_least=2_000)
    for each in refused:
        say(each)
    verdict("errors meanwhile", outcome.errors + len(refused), at_most=0)


def wrk(url: str, *options: str, clients: int = CLIENTS, seconds: int = ROUND_SECONDS) -> Outcome:
    """Runs wrk with one thread, and reads what it says."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", "--timeout", "30s", *options, url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds_of = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
    bytes_of = {"B": 1, "KB": KIB, "MB": MIB, "GB": 2**30}
    p99, unit = re.search(r"99%\s+([\d.]+)(us|ms|s|m)", text).groups()  # type: ignore[union-attr]
    transfer, transfer_unit = re.search(r"Transfer/sec:\s+([\d.]+)(B|KB|MB|GB)", text).groups()  # type: ignore[union-attr]
    requests = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])  # type: ignore[index]
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    errors = int(refused[1]) if refused else 0
    errors += sum(int(each) for each in broken.groups()) if broken else 0
    return Outcome(requests, float(transfer) * bytes_of[transfer_unit], float(p99) * seconds_of[unit], errors)


def _script(path: Path, paths: list[str]) -> Path:
    """A script with which wrk asks for one path after the other."""
    listed = ",\n".join(f'"/{each.removeprefix("/")}"' for each in paths)
    asking = "local at = 0\nfunction request()\n  at = at % #paths + 1\n  return wrk.format(nil, paths[at])\nend\n"
    path.write_text(f"local paths = {{ {listed} }}\n{asking}")
    return path


def _distinct(coffer: Coffer, stored: dict[str, str]) -> list[str]:
    """Links to one file, each of another name."""
    link = Links([_KEY]).verify_download(*_link(coffer, stored["id"]).split("/")[2:])
    file = a_file(
        b"",
        id=link.id,
        file_path=link.file_path,
        generation=link.generation,
        sha256=link.sha256,
        file_size=link.file_size,
        volume_id=UUID((coffer.directory / SENTINEL).read_text().strip()),
        content_changed_at=link.content_changed_at,
    )
    return [Links([_KEY]).download(file, 0, expires_at=link.expires_at, name=f"Number {n}.png") for n in range(DISTINCT_LINKS)]


@contextmanager
def _coffer(stage: Stage) -> Iterator[Coffer]:
    settings = {
        "COFFER_LINK_KEYS": _KEY,
        "COFFER_EDGE_STATE_FILE": str(stage.scratch / "edge-state"),
        "COFFER_TRUSTED_PROXIES": "127.0.0.1",
        "COFFER_ACCEL_REDIRECT_PREFIX": "/coffer-files",
        "COFFER_RATE_LINKS_PER_ADDRESS": "off",
        "COFFER_RATE_EXEMPT_ADDRESSES": "127.0.0.1",
    }
    with servers.coffer(stage.scratch, "edge-coffer", **settings) as coffer:
        yield coffer


@contextmanager
def _nginx(stage: Stage, coffer: Coffer) -> Iterator[tuple[Nginx, int]]:
    """nginx as `coffer edge install` sets it up, and the port at which it serves the volume's files directly."""
    port = free_port()
    # What lies under /rewritten/ tells what nginx's own way from an address to another file's name costs, without Lua, limits and headers.
    rewritten = f"location /rewritten/ {{ set $mount {coffer.directory}; rewrite ^/rewritten/(.*)$ /users/$1 break; root $mount; }}"
    directly = f"""server {{
        listen 127.0.0.1:{port}; root {coffer.directory}; sendfile on; tcp_nopush on; types {{ image/png png; }}
        {rewritten}
    }}"""
    nginx = Nginx(
        stage.scratch / "edge-nginx",
        more=f"access_log {stage.scratch}/direct.log combined buffer=64k flush=1s; keepalive_requests 100000; {directly}",
    )
    environment = {
        "COFFER_DATABASE_URL": coffer.database_url,
        "COFFER_PORT": str(coffer.port),
        "COFFER_LINK_KEYS": _KEY,
        "COFFER_EDGE_STATE_FILE": str(stage.scratch / "edge-state"),
        "COFFER_RATE_LINKS_PER_ADDRESS": "off",
        "COFFER_RATE_EXEMPT_ADDRESSES": "127.0.0.1",
    }
    options = ["--directory", str(nginx.directory), "--log-directory", str(nginx.directory), "--nginx", str(nginx.command)]
    options += ["--listen", f"127.0.0.1:{nginx.port}", "--metrics-listen", f"127.0.0.1:{nginx.metrics_port}"]
    command = [sys.executable, "-m", "server.cli", "edge", "install", "--for-real", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"coffer edge install failed: {done.stderr}")
    try:
        nginx.start()
        yield nginx, port
    finally:
        nginx.stop()


def _ask(coffer: Coffer, method: str, path: str, body: bytes = b"{}") -> dict[str, str]:
    request = HttpRequest(f"http://127.0.0.1:{coffer.port}{path}", method=method, data=body)
    for header in (*coffer.headers(_USER), "Content-Type: application/json"):
        request.add_header(*header.split(": ", 1))
    with urlopen(request, timeout=30) as answer:  # noqa: S310
        found: dict[str, str] = json.load(answer)
        return found


def _link(coffer: Coffer, file_id: str) -> str:
    return _ask(coffer, "POST", f"/api/files/{file_id}/link")["url"]


def _path(coffer: Coffer, file_id: str) -> str:
    return str(next(coffer.directory.glob(f"users/{_USER}/*/{file_id}.*")).relative_to(coffer.directory))
