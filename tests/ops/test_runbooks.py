"""The runbooks, followed step by step: their commands as they are written, by bash, beside a server whose volume is a disk of its own.

`coffer` and `systemctl` are what a sysadmin has; here the one is this working tree, and the other stops and starts the test's server.
"""

import asyncio
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from ops.embedded_postgres import binaries_for
from server.ledger import migrate
from server.ledger.migrations import MIGRATIONS
from tests.conftest import PostgresServer
from tests.ops.conftest import drifted, path_of, store
from tests.recovery.disks import why_no_disks
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

PROJECT = Path(__file__).parents[2]
RUNBOOKS = PROJECT / "ops" / "runbooks"
PAGES = sorted(path.stem for path in RUNBOOKS.glob("*.md") if path.stem != "README")
MIB = 2**20
BACKUP = ("COFFER_BACKUP_REPOSITORY", "COFFER_BACKUP_PASSWORD", "RESTIC_CACHE_DIR")

BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>given|step|by hand)(?:: (?P<name>[^\n]+?))? -->\n)?^```bash\n(?P<script>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    kind: str | None
    name: str | None
    script: str


def blocks_of(page: str) -> list[Block]:
    text = (RUNBOOKS / f"{page}.md").read_text()
    return [Block(found["kind"], found["name"], found["script"]) for found in BLOCK.finditer(text)]


def steps_of(page: str) -> list[str]:
    return [str(block.name) for block in blocks_of(page) if block.kind == "step"]


class Sysadmin:
    """Follows a page: each of its steps once, in their order."""

    def __init__(self, page: str, server: RunningServer, bin_directory: Path) -> None:
        self._left = {str(block.name): block.script for block in blocks_of(page) if block.kind == "step"}
        self.done: list[str] = []
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("COFFER_", "DATABASE_URL", "PG"))} | {
            "PATH": f"{bin_directory}:{binaries_for(None)}:{os.environ['PATH']}",
            "DATABASE_URL": server.database_url,
            "COFFER_VOLUME_RESERVE_BYTES": str(MIB),
            "URL": server.url,
        }

    def follow(self, step: str, **given: object) -> str:
        """Does a step, and returns what it printed."""
        assert step == next(iter(self._left)), f"the page goes on with another step: {list(self._left)}"
        script = self._left.pop(step)
        self.done.append(step)
        self.environment |= {name: str(value) for name, value in given.items()}
        return self.run(script, step)

    def run(self, script: str, step: str = "by hand") -> str:
        """What a page has by hand, or does not have."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self.environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{step} ended with {done.returncode}:\n{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def is_through(self) -> bool:
        return not self._left


class Disk:
    """A small file system on a loop device, mounted: ext4, or XFS, which needs no capability beyond mounting to grow in use."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.file = directory / "disk"
        with self.file.open("wb") as disk:
            disk.truncate((64 if kind == "ext4" else 320) * MIB)  # mkfs.xfs makes none of less than 300 MiB
        subprocess.run([f"mkfs.{kind}", "-q", self.file], check=True)
        losetup = subprocess.run(["losetup", "--find", "--show", self.file], check=True, capture_output=True, text=True)
        self.device = Path(losetup.stdout.strip())
        self.mount = directory / "mount"
        self.mount.mkdir()
        subprocess.run(["mount", self.device, self.mount], check=True)

    def enlarge(self, size_bytes: int) -> None:
        """As a cloud would: the device is larger, the file system is not."""
        with self.file.open("ab") as disk:
            disk.truncate(size_bytes)
        subprocess.run(["losetup", "--set-capacity", self.device], check=True)

    def free_bytes(self) -> int:
        facts = os.statvfs(self.mount)
        return facts.f_bavail * facts.f_frsize

    def close(self) -> None:
        for mount in [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[0] == str(self.device)]:
            subprocess.run(["umount", "--lazy", mount], check=False)
        subprocess.run(["losetup", "--detach", self.device], check=False)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    if why_not := why_no_disks():
        pytest.skip(why_not)
    directory = tmp_path / "disk"
    directory.mkdir()
    disk = Disk(directory, getattr(request, "param", "ext4"))
    yield disk
    disk.close()


@pytest.fixture
def server(start_server: ServerFactory, disk: Disk) -> Iterator[RunningServer]:
    server = start_server(volume=disk.mount)
    yield server
    server.stop()


@pytest.fixture
def follow(server: RunningServer, tmp_path: Path) -> Iterator[Callable[[str], Sysadmin]]:
    """A sysadmin for a page. At the end every step of it must have been done."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    failures: list[BaseException] = []

    class Control(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                if self.path in ("/stop", "/restart"):
                    server.stop()
                if self.path in ("/start", "/restart"):
                    server.start(wait_ready=False)
            except BaseException as problem:  # noqa: BLE001 - it is told below
                failures.append(problem)
            self.send_response(500 if failures else 200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

    control = HTTPServer(("127.0.0.1", 0), Control)  # of one thread: a server ends with the thread that started it
    thread = threading.Thread(target=control.serve_forever, args=(0.05,))
    thread.start()
    for name, script in (
        ("coffer", f'PYTHONPATH="{PROJECT}" exec "{sys.executable}" -m ops.cli "$@"'),
        ("systemctl", f'[ "$2" = coffer.target ] && exec curl -fsS "http://127.0.0.1:{control.server_address[1]}/$1"'),
    ):
        (bin_directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_directory / name).chmod(0o755)
    sysadmins: list[Sysadmin] = []

    def begin(page: str) -> Sysadmin:
        sysadmins.append(Sysadmin(page, server, bin_directory))
        return sysadmins[-1]

    yield begin
    control.shutdown()
    thread.join()
    control.server_close()
    assert not failures
    assert all(each.is_through() for each in sysadmins)


Follow = Callable[[str], Sysadmin]


def volume_id(server: RunningServer) -> str:
    return str(execute(server.database_url, "select id from volumes")[0]["id"])


def state_of(server: RunningServer) -> str:
    return str(httpx.get(f"{server.url}/health/ready").json()["volumes"][0]["state"])


def answers(server: RunningServer) -> bool:
    try:
        return httpx.get(f"{server.url}/health/live").status_code == 200
    except httpx.TransportError:
        return False


def wait_until_ready(server: RunningServer) -> None:
    until(lambda: answers(server) and httpx.get(f"{server.url}/health/ready").status_code == 200)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_a_step_or_says_why_it_is_none(page: str) -> None:
    blocks = blocks_of(page)
    assert blocks and all(block.kind for block in blocks), [block.script for block in blocks if not block.kind]
    assert all((block.name is None) == (block.kind == "given") for block in blocks)
    steps = steps_of(page)
    assert len(set(steps)) == len(steps) > 0
    for block in blocks:
        subprocess.run(["bash", "-n", "-c", block.script], check=True)
    scripts = "".join(block.script for block in blocks)
    set_here = set(re.findall(r"\b([A-Z_]+)=", scripts)) | set(re.findall(r"\bread (?:-\w+ )*([A-Z_]+)", scripts))
    assert set(re.findall(r"\$\{?([A-Z][A-Z_]+)(?!\w|:-)", scripts)) <= set_here


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_followed_and_listed(page: str) -> None:
    assert f'follow("{page}")' in Path(__file__).read_text()
    assert f"]({page}.md)" in (RUNBOOKS / "README.md").read_text()


def test_links_lead_somewhere() -> None:
    for page in RUNBOOKS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text()):
            assert (RUNBOOKS / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("disk", ["xfs"], indirect=True)
def test_disk_full(follow: Follow, server: RunningServer, disk: Disk) -> None:
    sysadmin = follow("disk-full")
    with server.client("ada") as client:
        kept = client.post("/api/files/upload", content=image(3 * MIB)).json()["id"]
        old = server.volume / "quarantine" / "2026-01-01"
        old.mkdir(parents=True)
        (old / "garbage").write_bytes(bytes(2 * MIB))
        os.utime(old, (0, 0))
        young = server.volume / "quarantine" / "today"
        young.mkdir()
        ballast = disk.free_bytes() - 24 * MIB
        subprocess.run(["fallocate", "--length", str(ballast), disk.mount / "something else"], check=True)
        seeds = itertools.count()

        def upload() -> int:
            return client.post("/api/files/upload", content=image(4 * MIB, next(seeds))).status_code

        until(lambda: upload() == 507)
        given = {"VOLUME": disk.mount, "DEVICE": disk.device}
        assert "/quarantine" in sysadmin.follow("look", **given)
        assert "ada" in sysadmin.follow("who")
        sysadmin.follow("quarantine")
        assert not old.exists() and young.exists()
        until(lambda: upload() == 507)
        disk.enlarge(640 * MIB)
        sysadmin.follow("grow")
        until(lambda: upload() == 201)
        assert " open " in sysadmin.follow("after")
        assert client.get(f"/api/files/{kept}/download").content == image(3 * MIB)


def test_volume_lost(follow: Follow, server: RunningServer, disk: Disk, tmp_path: Path) -> None:
    sysadmin = follow("volume-lost")
    with server.client("ada") as client:
        kept = client.post("/api/files/upload", content=image()).json()["id"]
        subprocess.run(["umount", "--lazy", disk.mount], check=True)
        until(lambda: state_of(server) == "unavailable")
        given = {"VOLUME": disk.mount, "DEVICE": disk.device, "ID": volume_id(server)}
        said = sysadmin.follow("look", **given)
        assert "unavailable" in said and "nothing is mounted" in said
        assert volume_id(server) in sysadmin.follow("mount")
        until(lambda: client.post("/api/files/upload", content=image(1_000, 1)).status_code == 201)
        execute(server.database_url, "update volumes set state = 'read_only'")  # as the server does after an I/O error
        until(lambda: state_of(server) == "read_only")
        sysadmin.follow("check the file system")
        until(lambda: answers(server) and state_of(server) == "read_only")
        sysadmin.follow("reopen")
        until(lambda: client.post("/api/files/upload", content=image(1_000, 2)).status_code == 201)
        assert client.get(f"/api/files/{kept}/download").content == image()

        # And then it dies.
        sysadmin.environment |= {
            "COFFER_BACKUP_REPOSITORY": str(tmp_path / "repository"),
            "COFFER_BACKUP_PASSWORD": "the password of the tests",
            "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
        }
        subprocess.run(["coffer", "backup", "--init"], env=sysadmin.environment, check=True, capture_output=True)
        newer = client.post("/api/files/upload", content=image(1_000, 3)).json()["id"]
        execute(server.database_url, "update volumes set state = 'read_only'")
        empty = tmp_path / "empty"
        empty.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "coffer", empty], check=True)
        try:
            sysadmin.follow("let the old disk go", NEW_VOLUME=empty)
            sysadmin.follow("an empty disk in its place")
            until(lambda: client.post("/api/files/upload", content=image(1_000, 4)).status_code == 201)
            assert newer in sysadmin.follow("the files")
            assert client.get(f"/api/files/{kept}/download").content == image()
            assert client.get(f"/api/files/{newer}/download").json()["code"] == "damaged"
            sysadmin.follow("previews")
            server.stop()
        finally:
            subprocess.run(["umount", "--lazy", empty], check=True)


def test_database_lost(follow: Follow, server: RunningServer, repository: Path, postgres_server: PostgresServer) -> None:
    sysadmin = follow("database-lost")
    kept, deleted = store(server, "ada", 2)
    assert '"status":"ready"' in sysadmin.follow("look")
    assert "2 rows" in sysadmin.follow("compare")
    sysadmin.environment |= {name: os.environ[name] for name in BACKUP}
    sysadmin.run("coffer backup")
    with server.client("ada") as client:
        assert client.delete(f"/api/files/{deleted}").status_code == 204
        server.settle()
        sysadmin.follow("stop")
        lost, server.database_url = server.database_url, postgres_server.clone(empty=True)
        sysadmin.environment["DATABASE_URL"] = server.database_url
        assert f"coffer restore file {deleted}" in sysadmin.follow("restore")
        sysadmin.run(f"coffer restore file {deleted}")
        wait_until_ready(server)
        for number, file_id in enumerate((kept, deleted)):
            assert client.get(f"/api/files/{file_id}/download").content == image(2_000, number)
        assert client.post("/api/files/upload", content=image(1_000, 9)).status_code == 503
        sysadmin.follow("open")
        assert client.post("/api/files/upload", content=image(1_000, 9)).status_code == 201
    old = execute(lost, "select id from backups")[0]["id"]
    assert str(old) in sysadmin.follow("make room", OLD=old)
    sysadmin.follow("prove")
    left = sysadmin.run("coffer restore list")
    assert "1 backups" in left and str(old) not in left
    server.stop()
    postgres_server.drop(server.database_url)


def test_corrupted_files(follow: Follow, server: RunningServer, repository: Path, disk: Disk, tmp_path: Path) -> None:
    sysadmin = follow("corrupted-files")
    first, second = store(server, "ada", 2)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", f"{server.volume}/.", copy], check=True)
    sysadmin.environment |= {name: os.environ[name] for name in BACKUP}
    sysadmin.run("coffer backup")

    def damage() -> None:
        path = path_of(server, first)
        rotten = bytearray(path.read_bytes())
        rotten[1_000] ^= 1
        path.write_bytes(rotten)
        sysadmin.run(f"coffer scrub --file {first} || [ $? -eq 6 ]")

    damage()
    wrong = "update user_storage set total_bytes = 7"
    execute(server.database_url, f"do $$ begin set local session_replication_role = replica; {wrong}; end $$")
    with server.client("ada") as client:
        assert client.get(f"/api/files/{first}/download").status_code == 410
        said = sysadmin.follow("look", VOLUME=disk.mount, FILE=first, COPY=copy)
        assert first in said and second not in said
        assert "file.damaged" in sysadmin.follow("trail")
        sysadmin.follow("restore from a backup")
        assert client.get(f"/api/files/{first}/download").content == image(2_000, 0)
        damage()
        assert client.get(f"/api/files/{first}/download").status_code == 410
        sysadmin.follow("restore from a copy")
        assert client.get(f"/api/files/{first}/download").content == image(2_000, 0)
    assert "ada" in sysadmin.follow("counters")
    assert drifted(server.database_url) == []
    sysadmin.follow("after")


def test_leaked_signing_key(follow: Follow, server: RunningServer, tmp_path: Path) -> None:
    sysadmin = follow("leaked-signing-key")
    keys = tmp_path / "link_keys"
    keys.write_text("the-key-that-will-have-leaked-in-the-end\n")
    server.stop()
    del server._environment["COFFER_LINK_KEYS"]
    server._environment["COFFER_LINK_KEYS_FILE"] = str(keys)
    server.start()
    (file_id,) = store(server, "ada", 1)

    def link() -> str:
        with server.client("ada") as client:
            return str(client.post(f"/api/files/{file_id}/link").json()["url"])

    old = link()
    assert httpx.get(server.url + old).status_code == 200
    sysadmin.follow("replace", KEYS=keys)
    wait_until_ready(server)
    assert keys.stat().st_mode & 0o777 == 0o600 and "leaked" not in keys.read_text()
    refused = httpx.get(server.url + old)
    assert (refused.status_code, refused.json()["code"]) == (403, "link_invalid")
    assert httpx.get(server.url + link()).status_code == 200
    with server.client("ada") as client:
        key_id = execute(server.database_url, "select key_id from api_keys")[0]["key_id"]
        assert "key.revoked" not in sysadmin.follow("api key", KEY_ID=key_id)
        until(lambda: client.get("/api/files").status_code == 401)


def test_bigger_server(follow: Follow, server: RunningServer, disk: Disk, postgres_server: PostgresServer, tmp_path: Path) -> None:
    sysadmin = follow("bigger-server")
    (file_id,) = store(server, "ada", 1)
    given = {"VOLUME": disk.mount, "NEW_VOLUME": tmp_path / "new", "DUMP": tmp_path / "dump"}
    sysadmin.follow("stop", **given)
    sysadmin.follow("dump")
    server.database_url = postgres_server.clone(empty=True)
    sysadmin.follow("load", NEW_DATABASE_URL=server.database_url)
    sysadmin.environment["DATABASE_URL"] = server.database_url  # from here on the new machine
    subprocess.run(["umount", disk.mount], check=True)
    (tmp_path / "new").mkdir()
    subprocess.run(["mount", disk.device, tmp_path / "new"], check=True)
    assert str(tmp_path / "new") in sysadmin.follow("volume")
    sysadmin.follow("start")
    with server.client("ada") as client:
        assert client.get(f"/api/files/{file_id}/download").content == image(2_000, 0)
        assert client.post("/api/files/upload", content=image(1_000, 7)).status_code == 201
    server.stop()
    postgres_server.drop(server.database_url)


def test_upgrade_gone_wrong(follow: Follow, server: RunningServer, tmp_path: Path) -> None:
    """The schema is that of the version before: made by all migrations but the last."""
    sysadmin = follow("upgrade-gone-wrong")
    server.stop()
    (volume,) = execute(server.database_url, "select id, mount_path from volumes")
    execute(server.database_url, "drop schema public cascade")
    execute(server.database_url, "create schema public")
    before = Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))
    last = max(before.glob("*.sql"))
    last.unlink()
    asyncio.run(migrate(server.database_url, before))
    execute(server.database_url, "insert into volumes (id, mount_path) values ($1, $2)", volume["id"], volume["mount_path"])
    server.start(wait_ready=False)
    assert "migrations have not been applied" in sysadmin.follow("look")
    assert last.stem in sysadmin.follow("migrate")
    assert "0 rows" in sysadmin.follow("after")
