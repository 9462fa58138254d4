"""What a process gives up before it touches an untrusted byte. Linux only, by the C library alone.

`confine` works from inside: it takes away the calling process's rights for good, and its children's. Four layers, each of which holds
without the others, and of which a system may refuse some (`confine` says which):

- limits: memory, CPU time, file size, open files (setrlimit(2)), always to be had;
- system calls: a seccomp filter that knows no sockets, no new processes, no signals, no tracing, no mounts, no code that was written
  (seccomp(2));
- files: Landlock rules, so that nothing can be opened but what is named (landlock(7), Linux 5.13);
- namespaces: a user, network and IPC namespace of its own (unshare(2); containers and some distributions refuse it).
"""

import contextlib
import ctypes
import mmap
import os
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

import msgspec

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SIGKILL = 1, 22, 38, 9


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one decoding may use. Past its memory an allocation fails; past the others the kernel kills it.

    `memory_bytes` is address space, programs and libraries included (about 300 MiB of it for libvips, of which little is resident).
    """

    memory_bytes: int
    cpu_seconds: int
    file_bytes: int
    open_files: int = 64
    threads: int = 64


def confine(*, readable: Iterable[str] = (), executable: Iterable[str] = (), writable: Iterable[str] = ()) -> list[str]:
    """Closes the network and the file system but for these paths, and drops all capabilities; returns what could not be had.

    Files open already stay usable. `executable` may be read, too. Call it while there is one thread: rules hold for the caller's only.
    Raises OSError when new privileges cannot be renounced, which every Linux can.
    """
    missing = []
    if not _leave_namespaces():
        missing.append("namespaces")
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _drop_capabilities()
    if not _restrict_files(readable, executable, writable):
        missing.append("files")
    return missing


def limit(limits: Limits, *, with_threads: bool) -> None:
    """Sets the limits, which cannot be raised again. `with_threads` only in a user namespace of one's own: elsewhere the kernel counts
    all threads of the same user, the server's too. It does not count root's, for whom memory is the only bound."""
    for what, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
        *([(resource.RLIMIT_NPROC, limits.threads)] if with_threads else []),
    ):
        # A second between the signal that says why (SIGXCPU) and the one that cannot be caught.
        resource.setrlimit(what, (most, most + 1 if what == resource.RLIMIT_CPU else most))


def yield_processor(niceness: int) -> None:
    """Lets others go first, by `niceness` (0 to 19) more than before; for a process that leads a session of its own.

    By sessions is how the kernel shares the processor out where no cgroup says otherwise, and a process' own niceness counts only among
    those of the same (sched(7), "autogroup"; its niceness is set apart).
    """
    niceness = os.nice(niceness)
    with contextlib.suppress(OSError):  # there are none where the kernel was built or started without
        Path("/proc/self/autogroup").write_text(str(niceness))


def end_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the thread that started it ends; with the id of its process, also if that has ended already."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# Namespaces and capabilities

_NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_NET = 0x04000000, 0x08000000, 0x10000000, 0x40000000


def _leave_namespaces() -> bool:
    """A network without even a loopback that is up. The user namespace stays unmapped: nobody, with no rights over anything."""
    return bool(_libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC | _NEW_UTS) == 0)


def _drop_capabilities() -> None:
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    _checked(_libc.capset(header, bytes(24)))


# Landlock: numbers and bits from linux/landlock.h, the same on all architectures

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 5, 1 << 8, 1 << 14
_FILE_BITS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_LAST_FILE_BIT = {1: 12, 2: 13, 3: 14, 4: 14}  # by version of the interface; 15 from version 5 on


def _restrict_files(readable: Iterable[str], executable: Iterable[str], writable: Iterable[str]) -> bool:
    """Also forbids TCP (version 4), and signals and abstract sockets to those outside (6), where the kernel knows how."""
    version = _libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    handled = (1 << (_LAST_FILE_BIT.get(version, 15) + 1)) - 1
    fields = [handled, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        for paths, bits in (
            (readable, _READ_FILE | _READ_DIR),
            (executable, _READ_FILE | _READ_DIR | _EXECUTE),
            (writable, _READ_FILE | _READ_DIR | _WRITE_FILE | _MAKE_REG | _REMOVE_FILE | _TRUNCATE),
        ):
            for path in paths:
                _permit(ruleset, path, bits & handled)
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


def _permit(ruleset: int, path: str, bits: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # what does not exist needs no permission
    try:
        rule = struct.pack("=Qi", bits if os.path.isdir(path) else bits & _FILE_BITS, fd)  # noqa: PTH112 - pathlib is slow to import
        _checked(_libc.syscall(_ADD_RULE, ruleset, 1, rule, 0))
    finally:
        os.close(fd)


# The filter of system calls. Numbers as (x86_64, aarch64); None where an architecture lacks the call.

# fmt: off
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # sockets: none can be made, and none that was left open can be used to pass anything on
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendmsg": (46, 211), "recvmsg": (47, 212), "sendmmsg": (307, 269),
    # other processes
    "fork": (57, None), "vfork": (58, None), "ptrace": (101, 117), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274), "kcmp": (312, 272),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    # what is said about files: Landlock leaves it to their owner, whom a decoder runs as
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    # file systems and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "mknod": (133, None), "mknodat": (259, 33),
    # wide doors into the kernel, and what only an administrator does
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "personality": (135, 92), "init_module": (175, 105), "finit_module": (313, 273),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "syslog": (103, 116),
}
# fmt: on
_EXECUTING: tuple[tuple[int, int], ...] = ((59, 221), (322, 281))  # execve, execveat
_CLONE, _CLONE3 = (56, 220), 435
_MMAP, _MPROTECT, _PKEY_MPROTECT = (9, 222), (10, 226), (329, 288)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # AUDIT_ARCH_* of linux/audit.h
_LOAD, _AND, _EQUAL, _AT_LEAST, _BITS_SET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_PROTECTION = 32  # where the filter finds the third argument
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _CLONE_THREAD, _X32 = 1, 38, 0x00010000, 0x40000000


def filter_program(*, may_execute: bool, may_write_code: bool = False, machine: str | None = None) -> bytes | None:
    """The seccomp filter in the form of linux/filter.h, or None where its numbers are unknown (only x86_64 and aarch64 are).

    Unless it `may_write_code`, memory that was written cannot be executed, as with systemd's MemoryDenyWriteExecute=.
    """
    try:
        column, architecture = _MACHINES[machine or os.uname().machine]
    except KeyError:
        return None
    refused = [numbers[column] for numbers in _REFUSED.values()]
    refused += [] if may_execute else [numbers[column] for numbers in _EXECUTING]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:  # the x32 calls have numbers of their own
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    # Of limits, one's own only: the server's processes belong to the same user.
    program += [(_EQUAL, 0, 3, _REFUSED["prlimit64"][column] or 0), (_LOAD, 0, 0, 16), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
    program += [(_LOAD, 0, 0, 0)]
    if not may_write_code:
        writable_code = mmap.PROT_WRITE | mmap.PROT_EXEC
        program += [(_EQUAL, 0, 5, _MMAP[column]), (_LOAD, 0, 0, _PROTECTION), (_AND, 0, 0, writable_code)]
        program += [(_EQUAL, 0, 1, writable_code), (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
        for protects in (_MPROTECT[column], _PKEY_MPROTECT[column]):
            program += [(_EQUAL, 0, 4, protects), (_LOAD, 0, 0, _PROTECTION), (_BITS_SET, 0, 1, mmap.PROT_EXEC)]
            program += [(_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    for number in refused:
        if number is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    # clone3 hides its flags from a filter; told that there is none, the C library falls back to clone, which may start threads only.
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS), (_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, 16)]
    program += [(_BITS_SET, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *each) for each in program)


def filter_calls(program: bytes | None) -> bool:
    """Puts the filter on this thread and all it will start; False where there is none. Needs `confine` before it."""
    if program is None:
        return False
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: unsigned short, padding, pointer
    header = struct.pack("H6xQ", len(program) // 8, ctypes.addressof(instructions))
    return bool(_libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0)
