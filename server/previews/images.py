"""The image decoder's process: `python -m server.previews.images <descriptor>`.

It is warm but never decodes: it loads libvips, confines itself, and forks a child for each image. The child takes the filter of system
calls and the limits upon itself, decodes, answers and ends, so nothing of one user's image is left for the next. Neither can open any
file or connect anywhere: an image comes as an open descriptor, and its previews go back as bytes through a pipe.
"""

import array
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from server.previews.confinement import Limits, confine, end_with_parent, filter_calls, filter_program, limit, yield_processor
from server.previews.marks import Mark
from server.previews.models import Made, Reason, Wishes
from server.previews.sheets import MOST_PICTURES, Sheet
from server.previews.statements import NAME as STATEMENTS_NAME
from server.previews.variants import Variant

MIB = 2**20

LOADERS: Mapping[str, tuple[str, int]] = {
    "image/jpeg": ("VipsForeignLoadJpeg", 250_000_000),
    "image/png": ("VipsForeignLoadPng", 100_000_000),
    "image/webp": ("VipsForeignLoadWebp", 100_000_000),
    "image/gif": ("VipsForeignLoadNsgif", 50_000_000),
    "image/avif": ("VipsForeignLoadHeif", 100_000_000),
    "image/heic": ("VipsForeignLoadHeif", 100_000_000),
    "image/heif": ("VipsForeignLoadHeif", 100_000_000),
}
"""The one loader that each type is given, and the most pixels it may have. In bytes: progressive JPEG keeps 3 a pixel (two for each
coefficient, colour at a quarter of the resolution), interlaced PNG of 16 bits with alpha 8, AVIF of 10 bits 3 and then 6 as RGB, GIF two
canvases of 4. All stay below 900 MB; phones take up to 200 megapixels."""

FRAME = "image/x-portable-pixmap"
"""Of a film's frame (ppm(5), 8 bits), which only ffmpeg hands over: it needs no loader. As PNG it would take longer than all the rest."""

MOST_FRAMES = 5_000
"""Of a moving image. All are counted before any is decoded."""

LIMITS = Limits(memory_bytes=1536 * MIB, cpu_seconds=30, file_bytes=0)
"""Memory: the 900 MB above, 350 of libvips' own address space, and the previews. No file is written, but by `marking`."""

MOST_AT_LENGTH = 4
"""Of a sheet's images, that many may each take as long as an image may alone: processor and wall-clock time are so many times as much. So
are they for a file to mark, of any length."""

NICE = 10

OUT_OF_MEMORY = 2
"""The status with which a child ends for which there was not even the memory to say so."""


class Job(msgspec.Struct, frozen=True):
    """An image to decode, for its previews or for a variant, or several for a sheet; or a file of which to read the `statements`, or to
    which to give a `mark`. With it come descriptors: of each image, of what `marking` needs besides, and of the pipe for the `Answer`.
    """

    mime_types: tuple[str, ...]
    wishes: Wishes | None = None
    variant: Variant | None = None
    sheet: Sheet | None = None
    statements: bool = False
    mark: Mark | None = None

    @property
    def limits(self) -> Limits:
        """What doing it may use."""
        if self.mark is not None:
            return msgspec.structs.replace(LIMITS, cpu_seconds=LIMITS.cpu_seconds * MOST_AT_LENGTH, file_bytes=self.mark.most_bytes)
        return msgspec.structs.replace(LIMITS, cpu_seconds=LIMITS.cpu_seconds * min(len(self.mime_types), MOST_AT_LENGTH))

    @property
    def names(self) -> set[str]:
        """What the files may be called that it is answered with."""
        if self.statements:
            return {STATEMENTS_NAME}
        if self.mark is not None:
            return set()
        if (one := self.variant or self.sheet) is not None:
            return {one.name}
        return {"animated.webp", *(f"{width}.webp" for width in (self.wishes or Wishes()).image_widths)}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What was made, with the bytes of each of its files; or the `reason` why nothing was, for `Unmakeable`."""

    made: Made = Made()
    contents: list[bytes] = []
    reason: Reason | None = None
    detail: str = ""
    number: int = 0
    """Which of the job's images the reason is about."""


Render = Callable[[Sequence[int], Job], Answer]


def main() -> None:
    """Serves jobs for previews, variants and sheets."""
    from server.previews.rendering import render  # noqa: PLC0415 - libvips: the worker imports this module, and must never have it

    serve(render)


def serve(render: Render, *, may_write_code: bool = False) -> None:
    """Serves jobs by `render` from the socket that `argv[1]` names until it is closed. Says first what the sandbox could not have.

    `may_write_code` is for libraries that call Python back, for which ctypes writes code. A stop of the service is for the worker to hear:
    an image in hand is finished.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    yield_processor(NICE)
    end_with_parent()
    missing = confine()
    program = filter_program(may_execute=False, may_write_code=may_write_code)
    control.sendall(msgspec.msgpack.encode(missing if program else [*missing, "system calls"]))
    has_namespaces = "namespaces" not in missing
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 65_536, MOST_PICTURES + 1)
        if not request:
            return
        parent, child = os.getpid(), os.fork()
        if not child:
            _answer(render, control, parent, program, has_namespaces, request, descriptors)
        for each in descriptors:
            os.close(each)
        _, status, used = os.wait4(child, 0)
        control.sendall(array.array("q", [os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024]).tobytes())


def _answer(
    render: Render,
    control: socket.socket,
    parent: int,
    program: bytes | None,
    has_namespaces: bool,
    request: bytes,
    descriptors: list[int],
) -> None:
    """The child's whole life. It leaves by `_exit`, for there is nothing to tidy up."""
    status = 1
    *image_fds, answer_fd = descriptors
    try:
        control.close()
        end_with_parent(parent)
        job = msgspec.msgpack.decode(request, type=Job)
        limit(job.limits, with_threads=has_namespaces)
        filter_calls(program)
        answer = render(image_fds, job)
        rest = memoryview(msgspec.msgpack.encode(answer))
        while rest:
            rest = rest[os.write(answer_fd, rest) :]
        status = 0
    except MemoryError:
        status = OUT_OF_MEMORY
    except Exception as problem:  # noqa: BLE001 - whatever it is, this process ends by it
        os.write(answer_fd, f"{type(problem).__name__}: {problem}".encode()[:1000])
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
