"""The README tells the truth: its tour runs as written, and its tables are complete."""

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from server import errors
from server.settings import Settings, variable
from tests.clamd import clamd_running
from tests.setup.media import make_photo, make_video
from tests.setup.test_make_run import supervised

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_setting_stands_in_the_table_with_its_meaning() -> None:
    for each in fields(Settings):
        assert re.search(rf"^\| `{variable(each.name)}` \| .* \| {re.escape(each.metadata['meaning'])} \|$", README, re.MULTILINE), (
            each.name
        )
    assert set(re.findall(r"^\| `(COFFER_\w+)`", README, re.MULTILINE)) == {variable(each.name) for each in fields(Settings)}


def test_every_error_code_stands_in_the_table() -> None:
    codes = {error.code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.CofferError)}
    assert not {code for code in codes if f"`{code}`" not in README}


def test_the_tour_runs_as_written(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (Debian package curl)")
    tour = re.search(r"<!-- tour.*?```bash\n(.*?)```", README, re.DOTALL)
    assert tour is not None
    photo, video = make_photo(tmp_path / "photo.jpg"), make_video(tmp_path / "film.mp4")
    with supervised(tmp_path / ".coffer") as supervisor:
        run = supervisor.wait_until_ready()
        done = run_as_written(tour[1], tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
        stored = [hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(run["volume"]).glob("users/*/*/*") if path.is_file()]
    decoder, at, answers = json.JSONDecoder(), 0, []
    while (at := done.stdout.find("{", at)) >= 0:
        answer, at = decoder.raw_decode(done.stdout, at)
        answers.append(answer)
    image, film, listed, used, _, refused, _, freed = answers
    assert (image["mime_type"], image["tags"], image["sha256"]) == ("image/jpeg", ["beach", "sun"], hashlib.sha256(photo).hexdigest())
    assert (film["mime_type"], film["file_name"], film["sha256"]) == ("video/mp4", "Our film.mp4", hashlib.sha256(video).hexdigest())
    assert {file["id"] for file in listed["files"]} == {image["id"], film["id"]}
    assert used["used_bytes"] == len(photo) + len(video)
    assert (refused["code"], refused["used_bytes"], refused["limit_bytes"]) == ("quota_exceeded", len(photo) + len(video), 1000)
    assert "refused" in done.stdout
    assert (freed["used_bytes"], freed["limit_bytes"]) == (len(photo), 10 * 2**30)
    assert stored == [image["sha256"]]


def test_the_way_onto_the_internet_runs_as_written(tmp_path: Path) -> None:
    start, walk = (found[1] for found in re.finditer(r"<!-- internet, \w+:.*?```bash\n(.*?)```", README, re.DOTALL))
    photo = make_photo(tmp_path / "photo.jpg")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with clamd_running() as clamd:
        # What is this machine's own: the port, and where clamd listens. `make run` is run by the test.
        start = start.replace(":3001", f":{port}").replace("unix:/run/clamav/clamd.ctl", clamd.unix)
        assert start.endswith("make run\n")
        told = run_as_written(start.removesuffix("make run\n") + "env -0 >environment\n", tmp_path)
        assert told.returncode == 0, told.stderr
        variables = dict(each.split("=", 1) for each in (tmp_path / "environment").read_text().split("\0") if each.startswith("COFFER_"))
        with supervised(tmp_path / ".coffer", port, **variables) as supervisor:
            run = supervisor.wait_until_ready()
            assert run["url"] == variables["COFFER_PUBLIC_URL"]
            done = run_as_written(walk, tmp_path)
            assert done.returncode == 0, done.stderr + done.stdout
    said = done.stdout
    for refusal, words in (
        ("forbidden", "never an admin"),
        ("forbidden", "it may not write"),
        ("link_invalid", "not a character of it can be changed"),
        ("not_found", "revoked"),
        ("link_used", "once is once"),
        ("infected", "refused"),
    ):
        assert re.search(rf'"code":"{refusal}"[^\n]*{words}\n', said), (refusal, said)
        said = said[said.index(words) :]
    actions = ("user.created", "file.created", "key.created", "links.revoked", "upload_link.created")
    assert all(action in said for action in actions), said
    stored = [path.read_bytes() for path in Path(run["volume"]).glob("users/*/*/*") if path.is_file()]
    assert stored == [photo, photo]


def run_as_written(commands: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", commands], cwd=directory, capture_output=True, text=True, check=False)
