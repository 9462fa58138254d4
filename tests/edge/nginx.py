"""A real nginx in front of a real server, set up by `coffer edge install` in a directory of its own."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx

from tests.serving import DEFAULTS, RunningServer
from tests.waiting import until

MODULES = Path("/usr/lib/nginx/modules")


def program() -> str:
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert found, "these tests need nginx (apt-get install nginx-light libnginx-mod-http-lua)"
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Nginx:
    """nginx with a directory, a main configuration and a log of its own. The system's one is not touched."""

    def __init__(self, directory: Path, *, workers: int = 1, more: str = "") -> None:
        """`more` stands in http {}, before what is in conf.d."""
        self.directory = directory
        self.log = directory / "log"
        self.port = free_port()
        self.metrics_port = free_port()
        self.command = directory / "nginx"
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "conf.d").mkdir(parents=True)
        temporary = "\n".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        # As root nginx would hand its workers to a user who cannot read the directories of tests.
        user = "user root;" if os.geteuid() == 0 else ""
        (directory / "nginx.conf").write_text(f"""
            load_module {MODULES}/ndk_http_module.so;
            load_module {MODULES}/ngx_http_lua_module.so;
            {user} daemon off; worker_processes {workers}; pid {directory}/pid; error_log {directory}/error.log notice;
            events {{ worker_connections 1024; }}
            http {{
                {temporary}
                {more}
                include {directory}/conf.d/*.conf;
            }}
        """)
        self.command.write_text(f'#!/bin/sh\nexec {program()} -e stderr -p {directory} -c {directory}/nginx.conf "$@"\n')
        self.command.chmod(0o755)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", self.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"nginx ended by itself:\n{self.log.read_text()}"
        try:
            return httpx.get(f"http://127.0.0.1:{self.metrics_port}/status").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def counted(self, outcome: str) -> int:
        """How many links nginx has `answered`, or `passed` to the server."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        return next(
            int(line.split()[1]) for line in text.splitlines() if line.startswith(f'coffer_edge_links_total{{outcome="{outcome}"}}')
        )

    @property
    def pid(self) -> int:
        """The master's."""
        return int((self.directory / "pid").read_text())

    def accepting(self) -> set[int]:
        """Its workers that take new connections; none while it does not run."""
        if self._process is None:
            return set()
        workers = set()
        for worker in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with suppress(OSError):  # ended meanwhile
                if b"shutting down" not in Path(f"/proc/{worker}/cmdline").read_bytes():
                    workers.add(int(worker))
        return workers

    def holds(self, path: Path) -> bool:
        """Whether a worker has the file open, be its name gone or not."""
        workers = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for descriptor in (each for worker in workers for each in Path(f"/proc/{worker}/fd").iterdir()):
            with suppress(FileNotFoundError):  # closed meanwhile
                if str(descriptor.readlink()) in {str(path), f"{path} (deleted)"}:
                    return True
        return False


class Edge:
    """A server that tells nginx what it must know, and the nginx in front of it."""

    def __init__(self, server: RunningServer, nginx: Nginx, state: Path, environment: dict[str, str]) -> None:
        self.server = server
        self.nginx = nginx
        self.state = state
        self.environment = environment

    def coffer(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `coffer edge ...` with the server's settings."""
        nginx = self.nginx
        options = ["--directory", str(nginx.directory), "--log-directory", str(nginx.directory), "--nginx", str(nginx.command)]
        options += ["--listen", f"127.0.0.1:{nginx.port}", "--metrics-listen", f"127.0.0.1:{nginx.metrics_port}"]
        old = nginx.accepting()
        done = self.run("edge", arguments[0], *options, *arguments[1:])
        if done.returncode == 0 and {"install", "--for-real"} <= set(arguments):
            # It has told nginx to reload. Until they hear of it, the old workers take connections, too.
            until(lambda: not old & nginx.accepting())
        return done

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `coffer ...` with the server's settings."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        environment |= DEFAULTS | self.environment | {"COFFER_DATABASE_URL": self.server.database_url, "COFFER_PORT": str(self.server.port)}
        command = [sys.executable, "-m", "server.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def install(self) -> None:
        done = self.coffer("install", "--for-real")
        assert done.returncode == 0, done.stderr

    def browser(self) -> httpx.Client:
        """Nobody, in front of nginx."""
        return httpx.Client(base_url=self.nginx.url, timeout=60)

    def client(self, user_id: str) -> httpx.Client:
        """That user's app, in front of nginx."""
        return httpx.Client(
            base_url=self.nginx.url, timeout=60, headers={"Authorization": f"Bearer {self.server.api_key}", "X-User-Id": user_id}
        )
