"""The warm image decoders that a process keeps (`images` is their program): `shared().make` runs one image through one of them."""

import array
import asyncio
import atexit
import functools
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec

import server
from server.previews import images
from server.previews.images import Answer, Job
from server.previews.jail import tell_missing
from server.previews.marks import Mark
from server.previews.models import Made, MadeFile, Unmakeable, Wishes
from server.previews.sheets import Sheet
from server.previews.variants import Variant
from server.settings import read_with_sources

COMMAND = (sys.executable, "-m", images.__name__)
READER_COMMAND = (sys.executable, "-m", "server.previews.provenance")
MARKER_COMMAND = (sys.executable, "-m", "server.previews.marking")
WALL_SECONDS = 60.0
_START_SECONDS = 60.0
_LONGEST_ANSWER_BYTES = 32 * 2**20

_LONGEST_CLAIM_BYTES = 64 * 2**10
_SIGNED = b"\x84jSignature1"
"""How all begins that COSE has signed by one (RFC 9052, section 4.4): the key signs nothing else."""

Sign = Callable[[bytes], bytes]

_MAGIC = {
    "image/webp": (0, b"RIFF"),
    "image/avif": (4, b"ftypavif"),
    "image/jpeg": (0, b"\xff\xd8\xff"),
    "image/png": (0, b"\x89PNG"),
    "application/json": (0, b"{"),
}

log = logging.getLogger("coffer.previews")


class Broken(Exception):
    """A decoder ended without an answer, or with one that makes no sense, for no fault of the image that could be told."""


@functools.cache
def shared() -> "Decoders":
    """This process's own, `COFFER_PREVIEWS_AT_ONCE` many; closed when it ends."""
    at_once: int = read_with_sources(os.environ)["previews_at_once"][0]
    decoders = Decoders(at_once)
    atexit.register(decoders.close)
    return decoders


@functools.cache
def reader() -> "Decoders":
    """One for what files say of their making; started when it is first needed."""
    decoders = Decoders(1, READER_COMMAND)
    atexit.register(decoders.close)
    return decoders


@functools.cache
def marker() -> "Decoders":
    """One that marks files; started when it is first needed."""
    decoders = Decoders(1, MARKER_COMMAND)
    atexit.register(decoders.close)
    return decoders


class Decoders:
    """As many decoders as may work at once. Each is started when it is first needed, and again after it was killed."""

    def __init__(self, at_once: int, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="decoder")
        self._idle: queue.LifoQueue[Decoder] = queue.LifoQueue()
        self.peak_bytes = 0
        """The most memory that any image's decoding had resident, libraries included, of images that were answered."""

    async def make(self, source: Path, mime_type: str, output: Path, wishes: Wishes, *, wall_seconds: float = WALL_SECONDS) -> Made:
        """Like `making.make`, for the types in `images.LOADERS`. Once begun it runs to its end in a thread, within `wall_seconds`."""
        return await self._run([source], Job((mime_type,), wishes=wishes), output, wall_seconds)

    async def make_variant(self, source: Path, mime_type: str, output: Path, variant: Variant) -> MadeFile:
        """Like `making.make_variant`, for the same types."""
        return (await self._run([source], Job((mime_type,), variant=variant), output, WALL_SECONDS)).files[0]

    async def make_sheet(self, pictures: Sequence[tuple[Path, str]], output: Path, sheet: Sheet) -> MadeFile:
        """Makes the file `sheet.name` of pictures with their types, in their order. Raises as `making.make`; `Unmakeable.number` is
        the picture's.
        """
        job = Job(tuple(mime_type for _, mime_type in pictures), sheet=sheet)
        wall_seconds = WALL_SECONDS * min(len(pictures), images.MOST_AT_LENGTH)
        return (await self._run([source for source, _ in pictures], job, output, wall_seconds)).files[0]

    async def read_statements(self, source: Path, mime_type: str, output: Path) -> MadeFile:
        """Like `making.read_statements`, by those of `reader`."""
        return (await self._run([source], Job((mime_type,), statements=True), output, WALL_SECONDS)).files[0]

    async def mark(self, source: Path, mime_type: str, target_fd: int, mark: Mark, sign: Sign) -> None:
        """Like `making.mark`, by those of `marker`."""
        wall_seconds = WALL_SECONDS * images.MOST_AT_LENGTH
        job = Job((mime_type,), mark=mark)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._mark, source, job, target_fd, sign, wall_seconds)

    def _mark(self, source: Path, job: Job, target_fd: int, sign: Sign, wall_seconds: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            signing = threading.Thread(target=_sign_once, args=(ours, sign), name="signer")
            signing.start()
            try:
                with theirs:
                    answer = self._answered([source], job, wall_seconds, passed=(target_fd, theirs.fileno()))
            finally:
                signing.join()  # it ends with the last who has the other end
        _raise(answer, job)

    def close(self) -> None:
        """Ends all decoders, after the images they have in hand."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get_nowait().kill()

    async def _run(self, sources: Sequence[Path], job: Job, output: Path, wall_seconds: float) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._make, sources, job, output, wall_seconds)

    def _make(self, sources: Sequence[Path], job: Job, output: Path, wall_seconds: float) -> Made:
        answer = self._answered(sources, job, wall_seconds)
        _raise(answer, job)
        _check(answer, job)
        _store(answer, output)
        return answer.made

    def _answered(self, sources: Sequence[Path], job: Job, wall_seconds: float, passed: Sequence[int] = ()) -> Answer:
        decoder = self._taken()
        try:
            answer = decoder.ask(sources, job, wall_seconds, passed)
        except BaseException:
            decoder.kill()
            raise
        self.peak_bytes = max(self.peak_bytes, decoder.peak_bytes)
        self._idle.put(decoder)
        return answer

    def _taken(self) -> "Decoder":
        """One that is idle and still lives, or a new one."""
        while True:
            try:
                decoder = self._idle.get_nowait()
            except queue.Empty:
                return Decoder(self._command)
            if decoder.lives():
                return decoder
            decoder.kill()


class Decoder:
    """One process of `images`. Used by one thread at a time; it ends with the thread that started it."""

    peak_bytes = 0
    """The most memory that the last image's decoding had resident, of itself and of libraries that it shares."""

    def __init__(self, command: Sequence[str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={
                    "PYTHONPATH": str(Path(server.__file__).parent.parent),
                    "LC_ALL": "C.UTF-8",
                    "VIPS_CONCURRENCY": "1",
                    "VIPS_DISC_THRESHOLD": "2g",  # there is no disk to go to: past its memory an image is refused
                    "VIPS_WARNING": "0",
                },
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        try:
            self._control.settimeout(_START_SECONDS)
            self.missing = msgspec.msgpack.decode(self._control.recv(4096), type=list[str])
            tell_missing(self.missing)
        except BaseException:
            self.kill()
            raise

    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, sources: Sequence[Path], job: Job, wall_seconds: float, passed: Sequence[int] = ()) -> Answer:
        """The answer of a child that is given the sources, opened, and the descriptors `passed`.

        Raises `Unmakeable` past the wall-clock time, `Broken` when the decoder or its child died. After any error, kill it.
        """
        deadline = time.monotonic() + wall_seconds
        with ExitStack() as opened:
            descriptors = [opened.enter_context(source.open("rb", buffering=0)).fileno() for source in sources]
            ours, theirs = os.pipe()
            try:
                try:
                    socket.send_fds(self._control, [msgspec.msgpack.encode(job)], [*descriptors, *passed, theirs])
                except OSError as problem:
                    raise Broken(f"it does not listen: {problem}") from problem
                finally:
                    os.close(theirs)
                encoded = _read(ours, deadline)
            finally:
                os.close(ours)
        status = self._status(deadline)
        if status == -signal.SIGXCPU:
            return Answer(reason="too_slow")
        if status == images.OUT_OF_MEMORY or len(encoded) > _LONGEST_ANSWER_BYTES:
            return Answer(reason="too_large")
        if status != 0:
            raise Broken(f"the decoder's child ended with {status}: {bytes(encoded[:500])!r}")
        try:
            return msgspec.msgpack.decode(encoded, type=Answer)
        except msgspec.DecodeError as problem:
            raise Broken(f"the decoder's answer is not one: {problem}") from problem

    def kill(self) -> None:
        """Ends the process; its child ends with it."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _status(self, deadline: float) -> int:
        """How the child ended; negative is the signal that killed it."""
        try:
            self._control.settimeout(max(0.001, deadline - time.monotonic()))
            said = self._control.recv(16)
        except TimeoutError:
            raise Unmakeable("too_slow") from None
        except OSError as problem:
            raise Broken(f"the decoder died: {problem}") from problem
        if not said:
            raise Broken(f"the decoder died: {self._process.wait()}")
        status, self.peak_bytes = array.array("q", said)
        return status


def _sign_once(asked: socket.socket, sign: Sign) -> None:
    """Signs the first message that comes, if it may be signed, and no other. Returns when nobody can ask any more."""
    claim = asked.recv(_LONGEST_CLAIM_BYTES + 1)
    try:
        if claim.startswith(_SIGNED) and len(claim) <= _LONGEST_CLAIM_BYTES:
            asked.send(sign(claim))
    except OSError:  # it has died meanwhile
        return
    finally:
        asked.shutdown(socket.SHUT_RDWR)


def _raise(answer: Answer, job: Job) -> None:
    if answer.reason is not None:
        log.info("not decoded: %s", answer.reason, extra={"mime_types": job.mime_types, "detail": answer.detail})
        raise Unmakeable(answer.reason, answer.number)


def _read(pipe: int, deadline: float) -> bytearray:
    """All that comes, and no more than a byte past the longest answer. Raises `Unmakeable` past the deadline."""
    read = bytearray()
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    while len(read) <= _LONGEST_ANSWER_BYTES:
        if not waiting.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise Unmakeable("too_slow")
        piece = os.read(pipe, 2**20)
        if not piece:
            break
        read += piece
    return read


def _check(answer: Answer, job: Job) -> None:
    """Raises `Broken` unless the files are what was asked for: the child that decoded may have been taken over by its image."""
    names = [each.name for each in answer.made.files]
    if not names or len(names) != len(answer.contents) or len(set(names)) != len(names) or not job.names.issuperset(names):
        raise Broken("the decoder's files are not those asked for")
    for each, content in zip(answer.made.files, answer.contents, strict=True):
        at, magic = _MAGIC.get(each.mime_type, (0, b"?"))
        if not content.startswith(magic, at) or each.variant not in {each.name, each.name.removesuffix(".webp")}:
            raise Broken("the decoder's files are not of the type asked for")


def _store(answer: Answer, output: Path) -> None:
    """All of the files, or none."""
    paths = [output / each.name for each in answer.made.files]
    try:
        for path, content in zip(paths, answer.contents, strict=True):
            path.write_bytes(content)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
