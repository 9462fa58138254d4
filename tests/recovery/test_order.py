"""What the kernel saw of each upload: sync the file, link it, sync the directory, commit, answer (FAULTS 3)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.recovery.journal import WAYS, send
from tests.samples import image
from tests.serving import RunningServer
from tests.waiting import until

UPLOADS_PER_WAY = 8

if shutil.which("strace") is None:
    pytest.skip("strace is not installed (Debian package strace)", allow_module_level=True)


@pytest.mark.parametrize("size", [20_000, 2_000_000], ids=["small", "large"])
@pytest.mark.parametrize("way", WAYS)
def test_the_order_is_the_promise(server: RunningServer, tmp_path: Path, way: str, size: int) -> None:
    trace = tmp_path / "trace"
    calls = "trace=fdatasync,fsync,linkat,link,write,writev,sendto,sendmsg"
    with subprocess.Popen(
        ["strace", "-f", "-y", "-s", "2000", "-e", calls, "-o", trace, "-p", str(server.pid)], stderr=subprocess.PIPE
    ) as strace:
        assert strace.stderr is not None and b"attached" in strace.stderr.readline()
        with server.client("ada") as client:
            ids = []
            for number in range(UPLOADS_PER_WAY):
                answer = send(client, way, image(size, seed=number), f"order-{way}-{number}.png")
                assert answer.status_code == 201, answer.text
                ids.append(answer.json()["id"])
        strace.terminate()
    lines = until(lambda: trace.read_text(errors="replace")).splitlines()
    for number, file_id in enumerate(ids):
        steps = _steps(lines, file_id, f"order-{way}-{number}.png")
        assert steps == ["sync file", "link", "sync directory", "commit", "answer"], f"upload {number} went {steps}"


def _steps(lines: list[str], file_id: str, name: str) -> list[str]:
    """The steps of one upload in the order in which they began (commit, answer) or were over (the rest)."""
    steps: list[str] = []
    started: dict[str, str] = {}
    incoming: str | None = None
    for line in lines:
        if (link := re.search(rf'linkat\(.*?"incoming/([0-9a-f-]+)".*"{file_id}\.1\.png"', line)) is not None:
            incoming = link[1]
    assert incoming is not None
    for line in lines:
        thread = line.split(" ", 1)[0]
        step = None
        if re.search(rf"fdatasync\(\d+<[^>]*incoming/{incoming}>", line):
            step = "sync file"
        elif "linkat(" in line and f"incoming/{incoming}" in line:
            step = "link"
        elif "link" in steps and "sync directory" not in steps and re.search(r"fsync\(\d+<[^>]*/users/ada/images>", line):
            step = "sync directory"
        elif (
            name in line
            and re.search(r" (?:sendto|write|sendmsg|writev)\(\d+<[^>]*>", line)
            and "HTTP/1.1" not in line
            and "file.created" not in line
        ):
            step = "commit" if "sync directory" in steps or "POST" not in line else None
        if step is not None and "<unfinished" in line and step != "commit":
            started[thread] = step  # counts when it is over
            continue
        if "resumed>" in line and thread in started:
            step = started.pop(thread)
        if step == "commit" and name in line and '"level"' in line:
            step = None  # a log line
        if "HTTP/1.1 201" in line and file_id in line:
            step = "answer"
        if step is not None and step not in steps:
            steps.append(step)
    return steps
