"""What Linux tells of processes."""

from pathlib import Path


def has_ended(pid: int) -> bool:
    """Also when nobody has asked for its status yet: an orphan's may be left to a first process that does not care."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return True


def command_of(pid: int) -> str:
    """Its arguments, with a NUL after each; nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def open_below(directory: Path, pid: int | str = "self") -> list[str]:
    """The files below a directory that a process has open, each as often as it has."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    return [target for target in found if target.startswith(f"{directory}/")]
