"""The servers that are compared: Coffer as `make run` starts it, and its peers."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from tests.bench.processes import START_SECONDS, BenchError, check_alive, cpu_seconds, free_port, running, wait_for_port
from tests.bench.programs import debian_program

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends before the body. `{n}` in `path` stands for a number that no other request has."""

    method: str
    path: str
    headers: tuple[str, ...] = ()


@dataclass(slots=True)
class Server:
    """A server on loopback. `pid` is the process whose CPU time and memory count, with its descendants."""

    port: int
    pid: int
    directory: Path

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)


@dataclass(slots=True)
class Coffer(Server):
    api_key: str
    database_url: str
    worker_pid: int

    def upload(self, user: str, mime_type: str) -> Request:
        """A raw body."""
        return Request("POST", "/api/files/upload?name=bench-{n}", (*self.headers(user), f"Content-Type: {mime_type}"))

    def form(self, user: str) -> Request:
        return Request("POST", "/api/files/upload", self.headers(user))

    def download(self, user: str, file_id: str) -> Request:
        return Request("GET", f"/api/files/{file_id}/download", self.headers(user))

    def headers(self, user: str) -> tuple[str, ...]:
        return (f"Authorization: Bearer {self.api_key}", f"X-User-Id: {user}")

    def erase(self, *users: str) -> None:
        """Every byte and row of these users, so that rounds do not pile up on the disk."""
        for user in users:
            request = HttpRequest(f"http://127.0.0.1:{self.port}/api/users/{user}", method="DELETE")
            request.add_header("Authorization", f"Bearer {self.api_key}")
            try:
                urlopen(request, timeout=60).close()  # noqa: S310
            except HTTPError as refused:
                if refused.code != 404:
                    raise BenchError(f"cannot erase {user}: {refused.read().decode()}") from refused


@dataclass(slots=True)
class Peer(Server):
    """nginx or the bare handler: stores what is PUT under a name, and nginx gives it back."""

    def put(self, group: str = "all") -> Request:
        return Request("PUT", f"/{group}/{{n}}")

    def clean(self) -> None:
        """Removes what was stored."""
        for path in self.directory.rglob("*"):
            if path.is_file():
                path.unlink()


@contextmanager
def coffer(scratch: Path, name: str = "coffer", **settings: str) -> Iterator[Coffer]:
    """Everything that `make run` starts, on a free port, with room for the largest body measured here. `settings` by their variables."""
    data, log = scratch / name, scratch / f"{name}.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
    environment |= {"COFFER_DEFAULT_QUOTA_BYTES": "unlimited", "COFFER_MAX_FILE_BYTES": str(16 * GIB)} | settings
    with running([sys.executable, "-m", "ops.run", "start", "--data", data, "--port", "0"], log, environment) as process:
        deadline = time.monotonic() + START_SECONDS
        while not (data / "run.json").exists():
            check_alive(process, log)
            if time.monotonic() > deadline:
                raise BenchError(f"Coffer has not started after {START_SECONDS} s; see {log}")
            time.sleep(0.05)
        run = json.loads((data / "run.json").read_text())
        port = int(run["url"].rpartition(":")[2])
        pids = run["pids"]
        yield Coffer(port, pids["server"], Path(run["volume"]), run["api_key"], run["database_url"], pids["worker"])


@contextmanager
def bare(scratch: Path) -> Iterator[Peer]:
    """A bare ASGI handler under the same server software, with the same order of write, sync and link, and no database."""
    directory, port, log = scratch / "bare", free_port(), scratch / "bare.log"
    with running([sys.executable, "-m", "tests.bench.bare", directory, str(port)], log) as process:
        wait_for_port(port, process, log)
        yield Peer(port, process.pid, directory)


@contextmanager
def nginx(scratch: Path) -> Iterator[Peer]:
    """nginx with its DAV module: it receives into a temporary file and renames it, without hashing or syncing.

    `sendfile`, `tcp_nopush` and a worker for each processor are what Debian's nginx.conf has.
    """
    program = debian_program("nginx", "usr/sbin/nginx", scratch)
    directory, port, log = scratch / "nginx", free_port(), scratch / "nginx.log"
    (directory / "root").mkdir(parents=True)
    # As root nginx would hand its workers to a user who cannot write here.
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "\n".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (directory / "nginx.conf").write_text(f"""
        {user} daemon off; worker_processes 2; pid {directory}/pid; error_log stderr;
        events {{ worker_connections 512; }}
        http {{
            access_log off; sendfile on; tcp_nopush on; client_max_body_size 0; keepalive_requests 1000000; {temporary}
            server {{
                listen 127.0.0.1:{port}; root {directory}/root;
                location / {{ dav_methods PUT; create_full_put_path on; dav_access user:rw; }}
            }}
        }}
    """)
    with running([program, "-e", "stderr", "-p", directory, "-c", directory / "nginx.conf"], log) as process:
        wait_for_port(port, process, log)
        yield Peer(port, process.pid, directory / "root")
