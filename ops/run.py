"""`make run` and `make stop`: everything that Coffer needs, as children of one process, on one machine.

    <data>/postgres    the embedded PostgreSQL, unless DATABASE_URL names another one
    <data>/volume      the volume
    <data>/logs        server.log and worker.log (PostgreSQL's is postgres/log)
    <data>/api_key     a key with all scopes, made once; mode 0600
    <data>/link_keys   what signs links, made once; mode 0600
    <data>/run.json    while everything runs: url, api_key, database_url, volume, pids; mode 0600
    <data>/lock        held by the process that runs everything; its number is inside

The supervisor does little on purpose. Any end of it ends its children: they are told on Ctrl-C, SIGTERM and `stop`, and
the kernel tells them when the supervisor is killed. A child that ends by itself ends the rest.
"""

import argparse
import asyncio
import contextlib
import errno
import fcntl
import http.client
import json
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ops.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError
from server.auth import Scope, api_keys
from server.commands.failures import CommandFailed
from server.commands.volumes import register_volume
from server.errors import CofferError
from server.ledger import Database, MigrationError, create_api_key, find_api_key, migrate
from server.settings import SettingError, Settings, read_with_sources

READY_SECONDS = 60
# A server whose supervisor was killed lets go of its port this soon.
PORT_SECONDS = 5
# Longer than the server waits for requests under way when it is told to stop.
CHILD_STOP_SECONDS = 40
STOP_SECONDS = 120
KEPT_LOG_BYTES = 10 * 2**20


class RunError(Exception):
    """Something that the person at the terminal can mend. The message says how."""


class _Stop(Exception):
    """Someone asked us to stop."""


class Signals:
    """Notes that someone asked us to stop, and lets us sleep until then.

    Nothing is raised inside of what happens to run: we look between two steps, none of which is long. The second request
    ends us at once, and with us, by the kernel, our children.
    """

    def __init__(self) -> None:
        self._asked = False
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What we were told to ignore stays ignored: nohup does that, and shells for what runs in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def look(self) -> None:
        """Raises `_Stop` if it was asked for."""
        if self._asked:
            raise _Stop

    def sleep(self, seconds: float | None = None) -> None:
        """Until a signal, the end of a child among them, or for that long. Raises `_Stop` if it was asked for."""
        select.select([self._reader], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self.look()


@dataclass(frozen=True, slots=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


def start(data: Path, port: int) -> NoReturn:
    """Starts everything, says so, and stays until it is told to stop (`_Stop`) or something fails (`RunError`).

    Whichever it is, everything has stopped when it is raised.
    """
    if not data.exists():
        data.mkdir(parents=True)
        # PostgreSQL's own user, when we are root, must be able to pass through; what is inside has modes of its own.
        data.chmod(0o711)
    with _only_one(data), contextlib.ExitStack() as stack:
        # What is started registers its end here, so the order of stopping is the reverse: server and worker, then PostgreSQL.
        signals = Signals()
        stack.callback((data / "run.json").unlink, missing_ok=True)
        host = os.environ.get("COFFER_HOST", "127.0.0.1")
        # A run.json without a holder of the lock: the last supervisor was killed, and its server may just be ending.
        port = _available(host, port, PORT_SECONDS if (data / "run.json").exists() else 0)
        postgres, database_url = _database(stack, data)
        signals.look()
        volume, key = asyncio.run(_prepare(database_url, data))
        signals.look()
        children = _children(
            stack,
            data,
            {
                "COFFER_DATABASE_URL": postgres.socket_url if postgres else database_url,
                "COFFER_HOST": host,
                "COFFER_PORT": str(port),
                **_link_keys(data / "link_keys"),
            },
        )
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not bound to
        _wait_until_ready(signals, reachable, port, children)
        url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
        pids = {"supervisor": os.getpid()} | {each.name: each.process.pid for each in children}
        if postgres and postgres.pid:
            pids["postgres"] = postgres.pid
        run = {"url": url, "api_key": key, "database_url": database_url, "volume": str(volume), "pids": pids}
        _write_privately(data / "run.json", json.dumps(run, indent=2) + "\n")
        _welcome(data, url, key)
        _wait_for_an_end(signals, children, postgres)


def stop(data: Path) -> None:
    """Stops what `start` started on this directory and returns when it has ended. Nothing to stop is no failure."""
    lock = data / "lock"
    if not lock.exists():
        _say(f"nothing was ever started in {data}")
        return
    with lock.open("r+") as file:
        asked: set[int] = set()
        deadline = time.monotonic() + STOP_SECONDS
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise RunError(f"what runs in {data} has not stopped after {STOP_SECONDS} s; its processes are in {data / 'run.json'}")
            pid = int(lock.read_text() or 0)
            if pid and pid not in asked and _runs_coffer(pid):
                asked.add(pid)
                _say(f"stopping process {pid}")
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.05)
        if not asked:
            _say(f"nothing runs in {data}")
        # Left behind when the supervisor was killed; nothing in it is true any more.
        (data / "run.json").unlink(missing_ok=True)


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Holds the directory's lock, with our process id in it."""
    with os.fdopen(os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        if not _try_lock(file.fileno()):
            raise RunError(f"Coffer already runs in {data}; `make stop DATA={shlex.quote(str(data))}` stops it")
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _runs_coffer(pid: int) -> bool:
    """The number may be of a supervisor that was killed, and belong to someone else by now."""
    with contextlib.suppress(OSError):
        return b"ops.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _available(host: str, port: int, patience_seconds: float) -> int:
    """The port, or a free one for 0. Found out first, because everything else takes longer."""
    deadline = time.monotonic() + patience_seconds
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                chosen: int = probe.getsockname()[1]
                return chosen
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise RunError(f"cannot listen on {host}:{port}: {problem.strerror}. Another port: make run PORT=...") from None
        time.sleep(0.1)


def _database(stack: contextlib.ExitStack, data: Path) -> tuple[EmbeddedPostgres | None, str]:
    given, source = read_with_sources(os.environ)["database_url"]
    if given:
        _say(f"using the database of {source}")
        return None, given
    postgres = EmbeddedPostgres(data / "postgres")
    stack.callback(postgres.stop)
    _say(f"starting PostgreSQL in {postgres.data_directory}")
    return postgres, postgres.start()


async def _prepare(database_url: str, data: Path) -> tuple[Path, str]:
    """Brings the database up to date, registers the volume and makes the key; each only where it is still to do."""
    for name in await migrate(database_url):
        _say(f"applied migration {name}")
    db = Database(Settings(database_url=database_url))
    await db.open()
    try:
        volume = data / "volume"
        volume.mkdir(mode=0o700, exist_ok=True)
        if await register_volume(db, volume):
            _say(f"made the volume {volume}")
        return volume, await _api_key(db, data / "api_key")
    finally:
        await db.close()


async def _api_key(db: Database, path: Path) -> str:
    """The key kept in `path`, known to the database. First the file, then the row: a crash between them is made good here."""
    if not path.exists():
        _write_privately(path, api_keys.NewApiKey.generate().text)
    text = path.read_text().strip()
    parsed = api_keys.parse(text)
    if parsed is None:
        raise RunError(f"{path} holds no API key; remove it, and the next start makes a new one")
    key_id, secret_sha256 = parsed
    if await find_api_key(db, key_id) is None:
        await create_api_key(db, key_id=key_id, name="make run", secret_sha256=secret_sha256, scopes=[str(scope) for scope in Scope])
        _say(f"made an API key with all scopes, kept in {path}")
    return text


def _link_keys(path: Path) -> dict[str, str]:
    """The setting of the keys that sign links, unless the environment has it: kept in `path`, so that links survive a restart."""
    if read_with_sources(os.environ)["link_keys"][0]:
        return {}
    if not path.exists():
        _write_privately(path, secrets.token_urlsafe(32) + "\n")
    return {"COFFER_LINK_KEYS_FILE": str(path.resolve())}


def _children(stack: contextlib.ExitStack, data: Path, settings: dict[str, str]) -> list[Child]:
    logs = data / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    children = []
    for name, command in (("server", "serve"), ("worker", "worker")):
        log = logs / f"{name}.log"
        if log.exists() and log.stat().st_size > KEPT_LOG_BYTES:
            log.rename(logs / f"{name}.log.1")
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as output:
            process = subprocess.Popen(
                # The kernel ends it with us, should we be killed.
                ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "server.cli", command],
                env=os.environ | settings,
                cwd=Path(__file__).resolve().parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Its own group: Ctrl-C at a terminal reaches only us, so PostgreSQL stays until the server has finished.
                process_group=0,
            )
        children.append(Child(name, process, log))
        stack.callback(_end, children[-1])
    return children


def _end(child: Child) -> None:
    child.process.terminate()
    try:
        child.process.wait(CHILD_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _say(f"the {child.name} does not stop; killing it")
        child.process.kill()
        child.process.wait()


def _wait_until_ready(signals: Signals, host: str, port: int, children: list[Child]) -> None:
    _say("waiting until the server is ready")
    deadline = time.monotonic() + READY_SECONDS
    answer = "it does not answer"
    while time.monotonic() < deadline:
        for child in children:
            if child.process.poll() is not None:
                raise RunError(_obituary(child))
        connection = http.client.HTTPConnection(host, port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health/ready")
            response = connection.getresponse()
            answer = response.read(2000).decode(errors="replace")
            if response.status == http.client.OK:
                return
        signals.sleep(0.05)
    raise RunError(f"the server is not ready after {READY_SECONDS} s: {answer}")


def _obituary(child: Child) -> str:
    lines = child.log.read_text(errors="replace").splitlines()[-15:]
    return f"the {child.name} ended by itself with status {child.process.poll()}; the end of {child.log}:\n" + "\n".join(lines)


def _wait_for_an_end(signals: Signals, children: list[Child], postgres: EmbeddedPostgres | None) -> NoReturn:
    """Sleeps until we are asked to stop (`_Stop`) or a child ends by itself (`RunError`)."""
    while True:
        for child in children:
            if child.process.poll() is not None:
                raise RunError(_obituary(child))
        if postgres and postgres.poll() is not None:
            raise RunError(f"PostgreSQL ended by itself with status {postgres.poll()}; see {postgres.log_path}")
        signals.sleep()


def _welcome(data: Path, url: str, key: str) -> None:
    user = "X-User-Id: user_1"
    print(
        f"""
Coffer is ready at {url}   (API description: {url}/schema, logs: {data / "logs"})
API key, all scopes: {key}

The first upload, in another terminal:

  export COFFER_URL={url} COFFER_API_KEY={key}
  curl -H "Authorization: Bearer $COFFER_API_KEY" -H "{user}" -F file=@photo.jpg "$COFFER_URL/api/files/upload"
  curl -H "Authorization: Bearer $COFFER_API_KEY" -H "{user}" "$COFFER_URL/api/files"
  curl -H "Authorization: Bearer $COFFER_API_KEY" -H "{user}" "$COFFER_URL/api/storage/usage"

Ctrl-C or `make stop DATA={shlex.quote(str(data))}` stops everything.
""",
        flush=True,
    )


def _write_privately(path: Path, text: str) -> None:
    """Whole or not at all, and readable by us alone from its first byte."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def _say(text: str) -> None:
    print(f"coffer: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.run", description="Runs everything on one machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (("start", "start everything and stay"), ("stop", "stop what was started")):
        command = commands.add_parser(name, help=meaning)
        command.add_argument("--data", type=Path, default=Path(".coffer"), help="directory of all data")
        if name == "start":
            command.add_argument("--port", type=int, default=3001, help="TCP port to listen on; 0 picks a free one")
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    try:
        if arguments.command == "start":
            start(data, arguments.port)
        stop(data)
    except _Stop:
        _say("stopped")
    except (RunError, CommandFailed, EmbeddedPostgresError, MigrationError, SettingError, CofferError, OSError) as problem:
        print(f"coffer: {problem}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
