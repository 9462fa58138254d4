"""What nginx is told, so that it can judge signed links by itself: whose links were revoked, as of when.

The file's first line is `coffer-edge 1 <Unix time of the look at the database> <digest of the rest>`, and each further one
`<directory of user> <link epoch>`. nginx passes every link to the server once that time is some seconds past (ops/nginx/coffer_edge.lua),
so a server that cannot look, or does not want nginx to answer, just does not write.
"""

import fcntl
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

_VERSION = "coffer-edge 1"


def write_state(path: Path, epochs: Mapping[str, int], looked_at: float) -> None:
    """Writes what was true at `looked_at` (Unix time, before the database was asked). `epochs` are by user directory.

    Whole or not at all. What another process found out later stays. Nothing is synced: after a crash of the machine it is written anew.
    Raises `OSError`.
    """
    lines = "".join(f"{directory} {epoch}\n" for directory, epoch in sorted(epochs.items()))
    digest = sha256(lines.encode("ascii")).hexdigest()[:32]
    with os.fdopen(os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o640)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _known_at(path) >= looked_at:
            return
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(f"{_VERSION} {looked_at:.3f} {digest}\n{lines}", encoding="ascii")
        draft.chmod(0o644)  # it holds no secret, and nginx's workers are another user
        draft.rename(path)


def _known_at(path: Path) -> float:
    try:
        with path.open(encoding="ascii") as file:
            return float(file.readline().removeprefix(_VERSION).split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
