"""Starts commands in the jail: `python -m server.previews.commands <descriptor>`.

It is warm and runs nothing itself: for each command it forks a child, which confines itself for good and becomes the command. A Python
that starts for each would take longer than a short command does.
"""

import os
import signal
import socket
import sys

import msgspec

from server.previews.confinement import Limits, confine, end_with_parent, filter_calls, filter_program, limit, yield_processor

INPUT_FD, _REPORT_FD = 3, 4
NICE = 10
"""Decoders yield the processor to uploads and downloads."""
_LONGEST_COMMAND_BYTES = 2**17


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A program and its arguments, the first of which is its name; `directory` is where it runs. See `confinement` for the paths.

    With it come three descriptors: its `INPUT_FD`, its standard output and its standard error.
    """

    program: str
    arguments: list[str]
    directory: str
    readable: list[str]
    executable: list[str]
    writable: list[str]
    limits: Limits


class Ended(msgspec.Struct, frozen=True):
    """How a command ended: its status (negative is the signal that killed it), and what the sandbox could not have.

    The latter is None for what never became the command; then its standard error tells why.
    """

    status: int
    missing: list[str] | None


def main() -> None:
    """Serves commands, one at a time, from the socket that `argv[1]` names until it is closed. A command ends with this process.

    A stop of the service is for the worker to hear: a command in hand goes on.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    yield_processor(NICE)
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    program = filter_program(may_execute=True)
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, _LONGEST_COMMAND_BYTES, 3)
        if not request:
            return
        report, report_inside = os.pipe()
        parent, child = os.getpid(), os.fork()
        if not child:
            _become(request, descriptors, report_inside, parent, program)
        for each in (*descriptors, report_inside):
            os.close(each)
        _, status = os.waitpid(child, 0)
        told = os.read(report, 4096)
        os.close(report)
        ended = Ended(os.waitstatus_to_exitcode(status), msgspec.msgpack.decode(told, type=list[str]) if told else None)
        control.sendall(msgspec.msgpack.encode(ended))


def _become(request: bytes, descriptors: list[int], report: int, parent: int, program: bytes | None) -> None:
    """The child's way into its command, from which it does not come back."""
    try:
        end_with_parent(parent)
        source, stdout, stderr = descriptors
        # None lies yet where one before it goes: descriptors are given out from the lowest, and the report's was the last.
        for fd, to in ((stdout, 1), (stderr, 2), (source, INPUT_FD), (report, _REPORT_FD)):
            os.dup2(fd, to)
        os.set_inheritable(_REPORT_FD, False)
        for fd in {*descriptors, report} - {0, 1, 2, INPUT_FD, _REPORT_FD}:
            os.close(fd)
        command = msgspec.msgpack.decode(request, type=Command)
        os.chdir(command.directory)
        missing = confine(readable=command.readable, executable=command.executable, writable=command.writable)
        if not filter_calls(program):
            missing.append("system calls")
        os.write(_REPORT_FD, msgspec.msgpack.encode(missing))
        limit(command.limits, with_threads="namespaces" not in missing)
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"}
        os.execve(command.program, command.arguments, environment)  # noqa: S606 - no shell is what is wanted
    except BaseException as problem:  # noqa: BLE001 - whatever it is, this process ends by it
        os.write(2, f"{type(problem).__name__}: {problem}".encode()[:1000])
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
