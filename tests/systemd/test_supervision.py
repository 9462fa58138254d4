"""What systemd hands to the server and the worker and hears from them; a manager of the test's own stands in for it."""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from server.api import pace
from server.api.pace import PATIENCE, PatientProtocol
from server.api.sendfile import SENDFILE
from server.api.streams import STREAMS, Streams
from server.settings import Settings
from tests.serving import DEFAULTS, RunningServer, new_server
from tests.waiting import until

# Where a shell puts the socket is where systemd does, and the process id is that of what it becomes.
_AS_SYSTEMD = ("setpriv", "--pdeathsig", "KILL", "bash", "-c", 'exec 3<&"$1"; shift; export LISTEN_PID=$$; exec "$@"', "bash")
_ENDED = (0, -signal.SIGTERM)
"""uvicorn, when it has stopped, ends by the signal that told it to; systemd takes either for success."""


class Manager:
    """Listens for a service, starts it with the socket, and hears what it says."""

    def __init__(self, prepared: RunningServer, directory: Path) -> None:
        self._prepared = prepared
        self._log = directory / "service.log"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(str(directory / "notify"))
        self._heard.settimeout(60)
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, command: str, *, sockets: int = 1, **environment: str) -> subprocess.Popen[bytes]:
        names = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))}
        names |= DEFAULTS | {"COFFER_DATABASE_URL": self._prepared.database_url, "COFFER_PORT": "1", **environment}
        names |= {"NOTIFY_SOCKET": str(self._directory / "notify"), "LISTEN_FDS": str(sockets)}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*_AS_SYSTEMD, str(self.listener.fileno()), sys.executable, "-m", "server.cli", command],
                env=names,
                stdout=log,
                stderr=log,
                pass_fds=(self.listener.fileno(),),
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def hear(self) -> str:
        """The next thing said to it."""
        return self._heard.recv(4096).decode()

    def logged(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        for each in self._started:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()
        self.listener.close()
        self._heard.close()


@pytest.fixture
def manager(database_url: str, tmp_path: Path) -> Iterator[Manager]:
    with closing(Manager(new_server(database_url, tmp_path, None, {}), tmp_path)) as made:
        yield made


def test_a_server_takes_the_socket_that_it_is_given_and_says_how_it_is(manager: Manager) -> None:
    process = manager.start("serve", WATCHDOG_USEC="200000")
    assert manager.hear() == "READY=1"
    assert httpx.get(f"{manager.url}/health/ready", timeout=10).status_code == 200
    assert [manager.hear() for _ in range(3)] == ["WATCHDOG=1"] * 3
    process.terminate()
    while (said := manager.hear()) == "WATCHDOG=1":
        pass
    assert said == "STOPPING=1"
    assert process.wait(60) in _ENDED


def test_a_server_that_is_stuck_gives_no_sign_of_life(manager: Manager) -> None:
    process = manager.start("serve", WATCHDOG_USEC="200000")
    assert manager.hear() == "READY=1"
    os.kill(process.pid, signal.SIGSTOP)
    manager._heard.setblocking(False)
    until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    with pytest.raises(BlockingIOError):
        while True:  # what was said before
            manager.hear()


def test_several_processes_share_the_socket(manager: Manager) -> None:
    process = manager.start("serve", COFFER_PROCESSES="2")
    assert manager.hear() == "READY=1"
    assert manager.hear() == "READY=1"
    assert httpx.get(f"{manager.url}/health/ready", timeout=10).status_code == 200
    process.terminate()
    assert process.wait(60) in _ENDED


@pytest.mark.parametrize("processes", [1, 2])
def test_short_packets_do_not_wait_for_the_client(manager: Manager, processes: int) -> None:
    """As on a socket of the server's own: where it thinks the listener a Unix socket, nothing asks for TCP_NODELAY."""
    process = manager.start("serve", COFFER_PROCESSES=str(processes))
    for _ in range(processes):
        assert manager.hear() == "READY=1"
    with socket.create_connection(manager.listener.getsockname()) as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: coffer.test\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        with _other_end(client, process.pid) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _other_end(client: socket.socket, pid: int) -> socket.socket:
    """The server's end of a connection, taken from the process that has it: this one or a child (pidfd_getfd(2))."""
    for server in (pid, *(int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
        handle = os.pidfd_open(server)
        try:
            for descriptor in Path(f"/proc/{server}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile, or not connected
                    if not str(descriptor.readlink()).startswith("socket:"):
                        continue
                    with socket.socket(fileno=_pidfd_getfd(handle, int(descriptor.name))) as taken:
                        if taken.getpeername() == client.getsockname():
                            return taken.dup()
        finally:
            os.close(handle)
    raise AssertionError("nobody of whom this may be asked has the connection")


def _pidfd_getfd(handle: int, descriptor: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    taken: int = libc.syscall(438, handle, descriptor, 0)  # glibc has a name for it from 2.36 on only
    if taken < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return taken


def test_who_comes_while_no_server_runs_waits_for_the_next_one(manager: Manager) -> None:
    first = manager.start("serve")
    assert manager.hear() == "READY=1"
    first.kill()
    first.wait()
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(httpx.get(f"{manager.url}/health/live", timeout=60).status_code))
    asking.start()
    manager.start("serve")
    asking.join()
    assert answers == [200]


def test_two_servers_answer_on_one_socket_and_one_may_leave(manager: Manager) -> None:
    """As in an upgrade: no request of those that come all the time fails."""
    old = manager.start("serve")
    assert manager.hear() == "READY=1"
    failed: list[Exception] = []
    answered = 0
    stopping = threading.Event()

    def ask(*, keeps: bool) -> None:
        nonlocal answered
        with httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=10 if keeps else 0)) as client:
            while not stopping.is_set():
                try:
                    client.get(f"{manager.url}/health/live").raise_for_status()
                    answered += 1
                except httpx.HTTPError as problem:
                    failed.append(problem)
                    return

    asking = [threading.Thread(target=ask, kwargs={"keeps": keeps}) for keeps in (True, True, False)]
    for each in asking:
        each.start()
    until(lambda: answered > 50)
    new = manager.start("serve")
    assert manager.hear() == "READY=1"
    old.terminate()
    assert old.wait(60) in _ENDED
    before = answered
    until(lambda: answered > before + 50 or failed)
    stopping.set()
    for each in asking:
        each.join()
    assert failed == []
    assert new.poll() is None


def test_a_second_socket_is_refused_with_the_remedy(manager: Manager) -> None:
    assert manager.start("serve", sockets=2).wait(60) == 2
    assert "say one ListenStream= in coffer-api.socket" in manager.logged()


def test_the_worker_says_how_it_is(manager: Manager) -> None:
    process = manager.start("worker", WATCHDOG_USEC="200000")
    assert manager.hear() == "READY=1"
    assert manager.hear() == "WATCHDOG=1"
    process.terminate()
    while (said := manager.hear()) == "WATCHDOG=1":
        pass
    assert said == "STOPPING=1"
    assert process.wait(60) == 0


STUCK = """
import asyncio, os, sys, time
import uvicorn
from server.supervision import supervised

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        async with supervised():
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/stuck":
        time.sleep(3600)  # other threads go on, such as the one that answers uvicorn
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})

if __name__ == "__main__":
    uvicorn.run("stuck:app", fd=int(sys.argv[1]), workers=2)
"""


def test_of_several_processes_one_that_is_stuck_is_replaced(tmp_path: Path) -> None:
    """Though the others give signs of life. What it was at is told."""
    (tmp_path / "stuck.py").write_text(STUCK)
    names = os.environ | {"WATCHDOG_USEC": "2000000", "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    with socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "log").open("wb") as log:
        listening = listener.fileno()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "stuck.py", str(listening)]
        parent = subprocess.Popen(command, cwd=tmp_path, env=names, stdout=log, stderr=log, pass_fds=(listening,))
        try:
            first = until(lambda: _who_answers(url))
            second = until(lambda: _who_answers(url, first))
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{url}/stuck", timeout=60)
            until(lambda: _who_answers(url, first, second))
            assert not all(Path(f"/proc/{each}").exists() for each in (first, second))
            assert 'stuck.py", line' in (tmp_path / "log").read_text()
        finally:
            parent.terminate()
            parent.wait(60)


def _who_answers(url: str, *known: int | None) -> int | None:
    """The process that does, if it is not known yet."""
    try:
        answered = int(httpx.get(url, timeout=60).text)
    except httpx.TransportError:
        return None
    return None if answered in known else answered


# What a stopping server does with connections that are idle


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def connection(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[PatientProtocol, socket.socket]]:
    """A client's end of a connection, and what serves the other."""
    config = Config(_answer, http=PatientProtocol, ws="none", log_config=None)
    config.load()
    state = {PATIENCE: Settings(database_url="postgresql://localhost/none"), STREAMS: Streams(), SENDFILE: False}
    protocol = PatientProtocol(config=config, server_state=ServerState(), app_state=state, _loop=loop)
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    ours.settimeout(60)
    transport, _ = loop.run_until_complete(loop.connect_accepted_socket(lambda: protocol, theirs))
    try:
        yield protocol, ours
    finally:
        transport.abort()
        ours.close()
        loop.run_until_complete(asyncio.sleep(0))


def ask(loop: asyncio.AbstractEventLoop, client: socket.socket) -> bytes:
    """The whole answer: its head and its body may come apart."""
    client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\nok"):
        piece = loop.run_until_complete(loop.run_in_executor(None, client.recv, 4096))
        assert piece, f"the answer broke off: {answer!r}"
        answer += piece
    return answer


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.run_until_complete(made.shutdown_default_executor())
    made.close()


def test_a_request_that_was_on_its_way_when_the_server_stopped_is_answered(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "FAREWELL_SECONDS", 3600.0)
    with connection(loop) as (protocol, client):
        first = ask(loop, client)
        assert first.startswith(b"HTTP/1.1 200") and b"connection: close" not in first
        protocol.shutdown()
        client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        second = loop.run_until_complete(loop.run_in_executor(None, client.makefile("rb").read))  # until the connection's end
        assert second.startswith(b"HTTP/1.1 200") and b"connection: close" in second


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_connection_that_stays_idle_is_closed(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, asked_before: bool
) -> None:
    monkeypatch.setattr(pace, "FAREWELL_SECONDS", 0.0)
    with connection(loop) as (protocol, client):
        if asked_before:
            ask(loop, client)
        protocol.shutdown()
        assert loop.run_until_complete(loop.run_in_executor(None, client.recv, 1)) == b""


def test_a_head_that_has_begun_to_come_is_waited_for(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FAREWELL_SECONDS", 0.0)
    with connection(loop) as (protocol, client):
        client.sendall(b"GET / HTTP/1.1\r\n")
        until(lambda: loop.run_until_complete(asyncio.sleep(0.001)) or protocol._in_message)
        farewells, part = list[None](), protocol._part
        monkeypatch.setattr(protocol, "_part", lambda: farewells.append(part()))
        protocol.shutdown()
        until(lambda: loop.run_until_complete(asyncio.sleep(0)) or farewells)
        client.sendall(b"host: a\r\n\r\n")
        answer = loop.run_until_complete(loop.run_in_executor(None, client.makefile("rb").read))
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer
