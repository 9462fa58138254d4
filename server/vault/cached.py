"""Opening a file without waiting for its disk: openat2(2) with RESOLVE_CACHED, which Python has no function for.

It looks the path up in what the kernel has in memory, or fails at once. So the event loop may call it; a thread, which takes a dozen calls
to walk the path and must get Python's lock back after each, took several times as long (decisions/0017).
"""

import ctypes
import os
from pathlib import Path

_OPENAT2 = 437  # the same on every architecture that Coffer runs on
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH, _CACHED = 0x02, 0x04, 0x08, 0x20


class _How(ctypes.Structure):
    """`struct open_how` of linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_how = _How(os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH | _CACHED)
_syscall = ctypes.PyDLL(None).syscall  # keeps Python's lock, for it does not wait
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)


def open_cached(root: int, path: str) -> int | None:
    """A read-only descriptor of a file below `root`, reached through no symbolic link. None when that cannot be had at once.

    That says nothing of the file: its path may not be in memory, or `can_open_cached` be false.
    """
    fd: int = _syscall(_OPENAT2, root, path.encode("ascii"), ctypes.byref(_how), ctypes.sizeof(_how))
    return fd if fd >= 0 else None


def can_open_cached() -> bool:
    """Whether a file whose path is in memory can be had so at all. Kernels before 5.12 cannot, and confinement may forbid it."""
    here = Path(__file__).resolve()
    directory = os.open(here.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(3):  # somebody may be renaming something on the way
            here.stat()
            if (fd := open_cached(directory, here.name)) is not None:
                os.close(fd)
                return True
        return False
    finally:
        os.close(directory)
