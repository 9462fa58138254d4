"""A decoder that was taken over by its image: what it tries, from where a decoder runs, and what becomes of it."""

import asyncio
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.previews import jail
from server.previews.confinement import _REFUSED, filter_program
from server.previews.decoders import COMMAND, Broken, Decoder, Decoders
from server.previews.images import Answer, Job
from server.previews.making import Unmakeable, Wishes
from tests.previews.captive import LIES
from tests.previews.pictures import photo
from tests.processes import has_ended
from tests.waiting import until

ALL = "namespaces,files,system calls,limits"
NOBODY = 65_534
REFUSED_BY = {
    "system calls": {
        *("make_socket", "make_unix_socket", "make_socket_pair", "connect", "fork", "spawn", "execute", "signal_worker", "signal_all"),
        *("trace_worker", "limit_worker", "new_namespace", "change_mode", "change_mode_at", "change_times"),
        *("write_code", "execute_what_was_written"),
    },
    "files": {
        *("read", "list_files", "overwrite", "append", "create", "delete", "rename", "link", "execute", "spawn"),
        *("connect", "trace_worker", "signal_worker"),
    },
    "namespaces": {"connect"},
    "limits": {"raise_limit", "append"},
}
"""By layer, what it refuses by itself. Landlock's refusal of TCP is of Linux 6.7, that of signals of 6.12."""
ATTEMPTS = sorted(set().union(*REFUSED_BY.values()))
HARMLESS = sorted(set(ATTEMPTS) - {"delete", "rename", "overwrite", "append", "execute", "signal_all", "trace_worker"})
"""Without the last: `confine` drops capabilities whatever the layers, and Yama may leave tracing to those who have them."""


def _namespaces_can_be_had() -> bool:
    """Whether this system lets anybody have a user namespace: not within a chroot, nor in most containers."""
    program = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)"
    return subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


HAS_NAMESPACES = _namespaces_can_be_had()
with_namespaces = pytest.mark.skipif(not HAS_NAMESPACES, reason="this system refuses user namespaces (a chroot or a container)")


def captive(layers: str = ALL, user_id: int = 0) -> list[str]:
    return [sys.executable, "-m", "tests.previews.captive", layers, str(user_id)]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that anybody may change, in a directory where anybody may."""
    for each in (tmp_path, *tmp_path.parents[:2]):
        each.chmod(0o777)
    path = tmp_path / "canary"
    path.write_bytes(b"canary")
    path.chmod(0o666)
    yield path
    assert path.read_bytes() == b"canary"
    assert path.stat().st_mode & 0o777 in {0o666, 0o600}


@pytest.fixture
def port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield str(listener.getsockname()[1])


def tried(decoder: Decoder, name: str, argument: object = "", *, wall_seconds: float = 20) -> Answer:
    return decoder.ask([Path(__file__)], Job((f"{name} {argument}",)), wall_seconds)


def outcomes(command: list[str], names: list[str], canary: Path, port: str) -> tuple[dict[str, str], list[str]]:
    """How each attempt ended, and which layers were said to be missing."""
    decoder = Decoder(command)
    try:
        found = {name: tried(decoder, name, port if name == "connect" else canary).detail for name in names}
        return found, decoder.missing
    finally:
        decoder.kill()


@pytest.mark.parametrize("user_id", [0, NOBODY])
def test_everything_is_refused(canary: Path, port: str, user_id: int) -> None:
    found, missing = outcomes(captive(user_id=user_id), ATTEMPTS, canary, port)
    assert missing == ([] if HAS_NAMESPACES else ["namespaces"])
    assert {name for name, outcome in found.items() if not outcome.startswith("refused")} == set()
    assert sorted(path.name for path in canary.parent.iterdir()) == ["canary"]
    assert canary.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/proc/1/environ", sys.executable, "/dev/null"])
def test_no_file_of_the_system_can_be_read(path: str) -> None:
    decoder = Decoder(captive())
    try:
        assert tried(decoder, "read", path).detail == "refused: EACCES"
    finally:
        decoder.kill()


@pytest.mark.parametrize("user_id", [0, NOBODY])
@pytest.mark.parametrize("layer", [pytest.param(each, marks=with_namespaces if each == "namespaces" else ()) for each in REFUSED_BY])
def test_each_layer_holds_alone(canary: Path, port: str, layer: str, user_id: int) -> None:
    names = sorted(REFUSED_BY[layer])
    found, missing = outcomes(captive(layer, user_id), names, canary, port)
    assert set(missing) == {"namespaces", "files", "system calls"} - {layer}
    assert {name for name, outcome in found.items() if not outcome.startswith("refused")} == set()


def test_every_refused_call_is_refused() -> None:
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    decoder = Decoder(captive("system calls"))
    try:
        for name, numbers in _REFUSED.items():
            if name not in {"fork", "vfork"} and numbers[column] is not None:  # those two are tried above
                assert (name, tried(decoder, "call", numbers[column]).detail) == (name, "refused: EPERM")
    finally:
        decoder.kill()


def test_without_the_jail_they_succeed(canary: Path, port: str) -> None:
    """That the attempts are real ones."""
    found, _ = outcomes(captive("none"), HARMLESS, canary, port)
    assert {name for name, outcome in found.items() if not outcome.startswith("done")} == (set() if HAS_NAMESPACES else {"new_namespace"})


@pytest.mark.parametrize("layers", [ALL, "limits", "limits,namespaces"])
def test_memory_and_time_are_bounded(layers: str) -> None:
    decoder = Decoder(captive(layers))
    try:
        assert tried(decoder, "take_memory").reason == "too_large"
        assert tried(decoder, "spin").reason == "too_slow"
        assert tried(decoder, "flood").reason == "too_large"
        assert tried(decoder, "remember", "still well").detail == "done: ['still well']"
    finally:
        decoder.kill()


@with_namespaces
def test_threads_are_bounded() -> None:
    """In a namespace of their own, and not for root: the kernel has no such bound for it."""
    decoder = Decoder(captive("namespaces,limits", NOBODY))
    try:
        assert tried(decoder, "start_threads").detail == "refused: EAGAIN"
    finally:
        decoder.kill()


def test_nothing_of_one_image_is_left_for_the_next() -> None:
    decoder = Decoder(captive())
    try:
        before = tried(decoder, "descriptors").detail
        assert tried(decoder, "remember", "a secret").detail == "done: ['a secret']"
        assert tried(decoder, "remember", "nothing").detail == "done: ['nothing']"
        assert tried(decoder, "descriptors").detail == before == "done: 5"  # three standard ones, the image, the answer
    finally:
        decoder.kill()


def test_a_decoder_that_hangs_is_killed_with_its_child(tmp_path: Path, own_children: Callable[[], list[int]]) -> None:
    decoders = Decoders(1, captive())
    try:
        with pytest.raises(Unmakeable, match="too_slow"):
            make(decoders, "hang", tmp_path, wall_seconds=1.0)
        until(lambda: own_children() == [])
        with pytest.raises(Broken):
            make(decoders, "crash", tmp_path)
        until(lambda: own_children() == [])
    finally:
        decoders.close()
    assert list(tmp_path.iterdir()) == []


def make(decoders: Decoders, attempt: str, output: Path, wall_seconds: float = 20.0) -> object:
    return asyncio.run(decoders.make(Path(__file__), attempt, output, Wishes(), wall_seconds=wall_seconds))


def children_of(process_id: int) -> list[int]:
    found = Path(f"/proc/{process_id}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


@pytest.fixture
def own_children() -> Callable[[], list[int]]:
    """Tells the children that the test started; the process has others, PostgreSQL among them."""
    before = set(children_of(os.getpid()))
    return lambda: [each for each in children_of(os.getpid()) if each not in before]


def test_a_decoder_that_is_killed_is_replaced(tmp_path: Path, own_children: Callable[[], list[int]]) -> None:
    """Between two images nobody notices; with one in hand that one is to be tried again. A stop meant for the worker kills neither."""
    decoders = Decoders(1)
    source = tmp_path / "source"
    source.write_bytes(photo().pngsave_buffer())
    outputs = [tmp_path / str(number) for number in range(3)]
    for output in outputs:
        output.mkdir()
    try:
        asyncio.run(decoders.make(source, "image/png", outputs[0], Wishes()))
        (first,) = own_children()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(first, number)
        asyncio.run(decoders.make(source, "image/png", outputs[1], Wishes()))
        assert own_children() == [first]
        os.kill(first, signal.SIGKILL)
        until(lambda: Path(f"/proc/{first}/stat").read_text().split()[2] == "Z")
        asyncio.run(decoders.make(source, "image/png", outputs[2], Wishes()))
        (second,) = own_children()
        assert second != first
        assert len({frozenset(path.name for path in output.iterdir()) for output in outputs}) == 1
    finally:
        decoders.close()
    assert own_children() == []


@pytest.mark.parametrize("which", ["decoder", "child"])
def test_a_decoder_killed_with_an_image_in_hand_is_broken(tmp_path: Path, which: str, own_children: Callable[[], list[int]]) -> None:
    decoders = Decoders(1, captive())

    async def killed() -> None:
        hanging = asyncio.create_task(decoders.make(Path(__file__), "hang", tmp_path, Wishes(), wall_seconds=20))
        grandchildren = await asyncio.to_thread(until, lambda: [each for child in own_children() for each in children_of(child)])
        (decoder,) = own_children()
        os.kill(decoder if which == "decoder" else grandchildren[0], signal.SIGKILL)
        with pytest.raises(Broken):
            await hanging
        until(lambda: has_ended(grandchildren[0]))

    try:
        asyncio.run(killed())
        assert own_children() == []
    finally:
        decoders.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_not_believed(tmp_path: Path, lie: str) -> None:
    (tmp_path / "output").mkdir()
    decoders = Decoders(1, captive())
    try:
        with pytest.raises(Broken):
            make(decoders, f"lie {lie}", tmp_path / "output")
    finally:
        decoders.close()
    assert list((tmp_path / "output").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_no_half_of_the_files_is_left(tmp_path: Path, studio_source: Path) -> None:
    """The second cannot be written: the first goes, too."""
    (tmp_path / "output" / "640.webp").mkdir(parents=True)
    decoders = Decoders(1)
    try:
        with pytest.raises(OSError, match="Is a directory"):
            asyncio.run(decoders.make(studio_source, "image/png", tmp_path / "output", Wishes()))
    finally:
        decoders.close()
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["640.webp"]


@pytest.fixture
def studio_source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(photo(700, 500).pngsave_buffer())
    return path


def test_the_filter_knows_where_it_is() -> None:
    assert filter_program(may_execute=False, machine="riscv64") is None
    for machine in ("x86_64", "aarch64"):
        program = filter_program(may_execute=False, machine=machine)
        assert program
        assert len(program) % 8 == 0


def test_decoders_close_with_their_process() -> None:
    """`shared` is closed when the process ends, without a word on its output."""
    program = f"""
import asyncio, tempfile
from pathlib import Path
from server.previews.making import Unmakeable, Wishes, make
async def main():
    try:
        await make(Path({__file__!r}), "image/png", Path(tempfile.gettempdir()), Wishes())
    except Unmakeable as problem:
        print(problem.reason)
asyncio.run(main())
"""
    command = [sys.executable, "-W", "error", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (0, "damaged\n")
    assert [line for line in run.stderr.splitlines() if "the preview sandbox runs without" not in line] == []


def test_a_command_ends_with_its_starter(tmp_path: Path, own_children: Callable[[], list[int]]) -> None:
    """However it is ended: by its time, by who waits for it, or by a signal to the starter. Nothing of it writes on."""
    source = Path(__file__)
    endless = ["/bin/sh", "-c", "while :; do echo more >> written; done"]

    async def ended(how: str) -> None:
        running = asyncio.create_task(jail.run(endless, source, tmp_path, wall_seconds=1.0 if how == "time" else 60.0))
        await asyncio.to_thread(until, (tmp_path / "written").exists)
        (starter,) = own_children()
        (command,) = children_of(starter)
        if how == "cancel":
            running.cancel()
        if how == "kill":
            os.kill(starter, signal.SIGKILL)
        with pytest.raises({"time": Unmakeable, "cancel": asyncio.CancelledError, "kill": RuntimeError}[how]):
            await running
        (tmp_path / "written").unlink()  # nobody would see a second one
        assert not Path(f"/proc/{command}/exe").exists()  # it may still wait to be asked for its status

    jail.close_starters()
    for how in ("time", "cancel", "kill"):
        asyncio.run(ended(how))
        assert own_children() == []


def test_a_starter_serves_again(tmp_path: Path, own_children: Callable[[], list[int]]) -> None:
    """One after the other by the same; nothing of a command is left for the next. A stop that is meant for the worker does not end it."""
    jail.close_starters()
    show = ["/bin/sh", "-c", "read line <&3; echo $line $HOME; umask; umask 0; ulimit -n; ulimit -n 10; echo $$ > /proc/self/cwd/pid"]
    found = []
    for number in range(3):
        source = tmp_path / str(number)
        source.write_text(f"{number}\n")
        found.append(asyncio.run(jail.run(show, source, tmp_path)).stdout)
        (starter,) = own_children()
        os.kill(starter, signal.SIGTERM)
    assert found == [f"{number} /nonexistent\n0022\n64\n".encode() for number in range(3)]
    jail.close_starters()
    assert own_children() == []


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not share the processor out by sessions")
def test_decoders_yield_the_processor(tmp_path: Path, own_children: Callable[[], list[int]]) -> None:
    """Their sessions, too: a process' own niceness counts only among those of its session (sched(7))."""
    jail.close_starters()
    asyncio.run(jail.run(["/bin/true"], Path(__file__), tmp_path))
    decoder = Decoder(COMMAND)
    try:
        for child in own_children():
            niceness = os.getpriority(os.PRIO_PROCESS, child)
            assert niceness >= 10
            assert Path(f"/proc/{child}/autogroup").read_text().endswith(f" nice {niceness}\n")
        assert len(own_children()) == 2
    finally:
        decoder.kill()
        jail.close_starters()


@pytest.mark.parametrize("parent_is_ours", [True, False])
def test_a_child_whose_parent_has_gone_ends(parent_is_ours: bool) -> None:
    """The parent may die between the fork and the request to die with it; then the parent is another."""
    parent = os.getpid() if parent_is_ours else 2**22 + 1
    program = f"from server.previews.confinement import end_with_parent; end_with_parent({parent}); print('begun')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == ((0, "begun\n") if parent_is_ours else (1, ""))
