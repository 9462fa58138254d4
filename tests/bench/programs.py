"""Programs of Debian that the comparisons need."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.bench.processes import BenchError


def debian_program(package: str, path: str, scratch: Path) -> str:
    """The system's program, or the one at `path` unpacked from its Debian package: installing that might start a service.

    Raises `BenchError` where neither can be had.
    """
    name = Path(path).name
    if found := shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return found
    if not shutil.which("apt-get"):
        raise BenchError(f"{name} is not installed")
    unpacked = scratch / f"{package}-package"
    unpacked.mkdir()
    unpacked.chmod(0o777)  # apt fetches as its own user where it can
    steps = (["apt-get", "download", package], ["sh", "-c", f"dpkg-deb -x {package}_*.deb ."])
    for attempt in (steps, (["apt-get", "update"], *steps)) if os.geteuid() == 0 else (steps,):
        if all(subprocess.run(step, cwd=unpacked, capture_output=True, check=False).returncode == 0 for step in attempt):
            return str(unpacked / path)
    raise BenchError(f"{name} is not installed and its package {package} cannot be fetched")
