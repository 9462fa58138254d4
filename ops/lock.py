"""Refreshes `requirements.lock` (`make lock`): one universal, hash-pinned file with a section for each set of dependencies.

A section holds what its set needs beyond the sections before it, so the file up to the end of a section installs
that set. The Makefile cuts at the `# set:` lines.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SETS = ("runtime", "worker", "embedded", "development")
HEADER = """\
# Every dependency of Coffer, exact and with hashes, for Linux and each supported Python. Made by `make lock`; not for editing.
# A set is installed by this file's text up to the end of its section.
"""
# Where [tool.uv] limits the resolution. True wherever Coffer runs, so on every line it would only be noise.
LIMITS = ("python_full_version < '3.14'", "platform_python_implementation == 'CPython'", "sys_platform == 'linux'")


def main() -> int:
    """Resolves everything together, then deals the result out to the first set that needs each package."""
    requires = tomllib.loads((PROJECT / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as directory:
        # pip builds Coffer itself without isolation, so that nothing unhashed is fetched: its build backend is locked too.
        build = Path(directory, "build.in")
        build.write_text("\n".join(requires))
        everything = Path(directory, "everything.txt")
        everything.write_text(_compile(build, SETS, "--generate-hashes"))
        entries = _entries(everything.read_text())
        dealt: set[str] = set()
        text = HEADER
        for position, name in enumerate(SETS, start=1):
            needed = _entries(_compile(build, SETS[:position], "--constraints", str(everything))).keys() - dealt
            text += f"\n# set: {name}\n" + "".join(entry for package, entry in entries.items() if package in needed)
            dealt |= needed
    (PROJECT / "requirements.lock").write_text(text)
    return 0


def _compile(build: Path, sets: tuple[str, ...], *options: str) -> str:
    extras = [f"--extra={name}" for name in sets if name != "runtime"]
    command = [
        str(Path(sys.prefix, "bin", "uv")),
        "pip",
        "compile",
        "pyproject.toml",
        str(build),
        *extras,
        "--universal",
        "--quiet",
        "--upgrade",
    ]
    command += ["--no-emit-index-url", "--no-header", "--no-annotate", *options]
    return subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _entries(compiled: str) -> dict[str, str]:
    """Package name to its lines, markers that hold everywhere removed."""
    entries = {}
    for entry in re.split(r"^(?=\w)", compiled, flags=re.MULTILINE):
        if not entry:
            continue
        requirement, _, rest = entry.partition("\n")
        pin, _, marker = requirement.removesuffix(" \\").partition(" ; ")
        marker = " and ".join(clause for clause in marker.split(" and ") if clause not in LIMITS)
        entries[pin.partition("==")[0]] = pin + (f" ; {marker}" if marker else "") + (" \\\n" + rest if rest else "\n")
    return entries


if __name__ == "__main__":
    sys.exit(main())
