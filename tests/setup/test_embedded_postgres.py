"""The embedded PostgreSQL: who it runs as, what it asks for, how it ends and how it comes back."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ops.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError, binaries_for, processes_in
from tests.processes import has_ended
from tests.waiting import until

# A supervisor in a process of its own, so that it can be killed. It prints its PostgreSQL's pid and URL, then waits.
SUPERVISOR = """
import signal, sys
from pathlib import Path
from ops.embedded_postgres import EmbeddedPostgres
postgres = EmbeddedPostgres(Path(sys.argv[1]))
url = postgres.start()
print(postgres.pid, url, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests of this module, since making a cluster is most of the work. Each test starts and stops it."""
    return tmp_path_factory.mktemp("a place with spaces") / "postgres"


@contextlib.contextmanager
def started(data_directory: Path, **settings: str) -> Iterator[tuple[EmbeddedPostgres, str]]:
    postgres = EmbeddedPostgres(data_directory, settings=settings)
    try:
        yield postgres, postgres.start()
    finally:
        postgres.stop()


@contextlib.contextmanager
def supervised(data_directory: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(data_directory)], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout
    try:
        with supervisor.stdout:
            pid, url = supervisor.stdout.readline().split()
        yield supervisor, int(pid), url
    finally:
        supervisor.kill()
        supervisor.wait()


def psql(url: str, statement: str, **environment: str) -> subprocess.CompletedProcess[str]:
    parts = urlsplit(url)
    environment = {
        "PGHOST": str(parts.hostname),
        "PGPORT": str(parts.port),
        "PGUSER": str(parts.username),
        "PGPASSWORD": str(parts.password),
        "PGDATABASE": parts.path[1:],
    } | environment
    command: list[str | Path] = [
        binaries_for(None) / "psql",
        "--no-psqlrc",
        "--no-password",
        "-qAt",
        "-v",
        "ON_ERROR_STOP=1",
        "-c",
        statement,
    ]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)


def answer(url: str, statement: str) -> str:
    done = psql(url, statement)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_durable_and_asks_for_a_password(data_directory: Path) -> None:
    with started(data_directory) as (_, url):
        for setting, expected in {
            "data_checksums": "on",
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
            "password_encryption": "scram-sha-256",
            "listen_addresses": "127.0.0.1",
            "server_encoding": "UTF8",
        }.items():
            assert answer(url, f"SHOW {setting}") == expected
        assert answer(url, "SELECT string_agg(DISTINCT auth_method, ',') FROM pg_hba_file_rules") == "scram-sha-256"
        sockets = answer(url, "SHOW unix_socket_directories").strip('"')
        for host in ("127.0.0.1", sockets):
            assert psql(url, "SELECT 1", PGHOST=host).returncode == 0
            assert psql(url, "SELECT 1", PGHOST=host, PGPASSWORD="wrong").returncode != 0
    assert (data_directory / "password").stat().st_mode & 0o777 == 0o600
    assert (data_directory / "cluster").stat().st_mode & 0o777 == 0o700


def test_it_keeps_data_port_and_password_when_started_again(data_directory: Path) -> None:
    with started(data_directory) as (postgres, url):
        answer(url, "CREATE TABLE kept AS SELECT 42 AS value")
        postgres.stop()
        assert postgres.start() == url
        assert answer(url, "SELECT value FROM kept") == "42"


def test_it_takes_settings(data_directory: Path) -> None:
    with started(data_directory, fsync="off", max_connections="17") as (_, url):
        assert answer(url, "SELECT current_setting('fsync') || current_setting('max_connections')") == "off17"


def test_a_long_path_does_not_matter(tmp_path: Path) -> None:
    with started(tmp_path / ("x" * 120), fsync="off") as (_, url):
        sockets = Path(answer(url, "SHOW unix_socket_directories").strip('"'))
        assert sockets.stat().st_mode & 0o777 == 0o700
        assert psql(url, "SELECT 1", PGHOST=str(sockets)).returncode == 0
    assert not sockets.exists()


@pytest.mark.parametrize("parent_mode", [0o700, 0o755])
def test_it_is_never_root_and_opens_no_parent(parent_mode: int) -> None:
    parent = Path(tempfile.mkdtemp(prefix="coffer-test-", dir="/tmp"))
    try:
        parent.chmod(parent_mode)
        with started(parent / "postgres", fsync="off") as (postgres, _):
            status = Path(f"/proc/{postgres.pid}/status").read_text().splitlines()
            # None, or (below a chroot, where no user namespace is allowed) the one to search and read past a directory of root's.
            assert {"CapEff:\t0000000000000000", "CapEff:\t0000000000000004"} & set(status)
        assert parent.stat().st_mode & 0o777 == parent_mode
    finally:
        shutil.rmtree(parent)


def test_it_ends_with_its_parent_and_comes_back_with_everything_committed(data_directory: Path) -> None:
    with supervised(data_directory) as (supervisor, pid, url):
        answer(url, "CREATE TABLE survived_parent AS SELECT 1 AS value")
        supervisor.kill()
        until(lambda: has_ended(pid))
    with started(data_directory) as (_, url):
        assert answer(url, "SELECT value FROM survived_parent") == "1"


def test_it_starts_at_once_after_a_kill_while_the_old_one_is_still_dying(data_directory: Path) -> None:
    with supervised(data_directory) as (supervisor, _, url):
        answer(url, "CREATE TABLE survived_overlap AS SELECT 1 AS value")
        supervisor.kill()
        supervisor.wait()
        with started(data_directory) as (_, new_url):
            assert answer(new_url, "SELECT value FROM survived_overlap") == "1"


def test_it_recovers_after_everything_was_killed(data_directory: Path) -> None:
    with supervised(data_directory) as (supervisor, _, url):
        answer(url, "CREATE TABLE survived_all AS SELECT 1 AS value")
        # Stopped first, the postmaster cannot act on its parent's end before its own.
        everything = [*processes_in(data_directory / "cluster"), supervisor.pid]
        for pid in everything:
            os.kill(pid, signal.SIGSTOP)
        for pid in everything:
            os.kill(pid, signal.SIGKILL)
    with started(data_directory) as (_, url):
        assert answer(url, "SELECT value FROM survived_all") == "1"


def test_a_stale_pid_file_that_names_a_living_stranger_is_no_obstacle(data_directory: Path) -> None:
    with started(data_directory):
        held = (data_directory / "cluster" / "postmaster.pid").read_text()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (data_directory / "cluster" / "postmaster.pid").write_text("\n".join([str(stranger.pid), *held.splitlines()[1:]]) + "\n")
        with started(data_directory) as (_, url):
            assert answer(url, "SELECT 1") == "1"
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_kill_while_the_cluster_is_made_leaves_a_start_that_works(tmp_path: Path) -> None:
    directory = tmp_path / "postgres"
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(directory)], stdout=subprocess.DEVNULL)
    until(lambda: list(directory.glob(".cluster-*/*")))
    supervisor.kill()
    supervisor.wait()
    assert not (directory / "cluster").exists()
    with started(directory, fsync="off") as (_, url):
        assert answer(url, "SELECT 1") == "1"
    assert not list(directory.glob(".cluster-*"))


def test_one_cluster_has_one_postgres(data_directory: Path) -> None:
    with started(data_directory) as (_, url):
        with pytest.raises(EmbeddedPostgresError, match="another process"), started(data_directory):
            pass
        assert answer(url, "SELECT 1") == "1"


def test_a_lost_password_is_told_and_nothing_is_made_anew(data_directory: Path) -> None:
    password = data_directory / "password"
    password.rename(password.with_name("elsewhere"))
    try:
        with pytest.raises(EmbeddedPostgresError, match="password is missing"), started(data_directory):
            pass
    finally:
        password.with_name("elsewhere").rename(password)


def test_an_end_by_itself_is_noticed(data_directory: Path) -> None:
    with started(data_directory) as (postgres, _):
        assert postgres.poll() is None
        assert postgres.pid
        os.kill(postgres.pid, signal.SIGINT)
        assert until(lambda: postgres.poll() is not None)


def test_a_thread_may_not_start_it(data_directory: Path) -> None:
    refused: list[EmbeddedPostgresError] = []

    def start() -> None:
        try:
            EmbeddedPostgres(data_directory).start()
        except EmbeddedPostgresError as problem:
            refused.append(problem)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert refused
