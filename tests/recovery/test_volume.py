"""Volumes that go away and volumes that fill up (FAULTS 5, 6 and 7)."""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.samples import image
from tests.serving import RunningServer, ServerFactory
from tests.waiting import until

MIB = 2**20


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB of its own."""
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount], check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    yield mount
    subprocess.run(["umount", "-l", mount], check=False)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, "" if answer.is_success else answer.json()["code"]


def test_an_unmounted_volume_takes_no_byte_and_says_so(start_server: ServerFactory, small_mount: Path) -> None:
    server = start_server(volume=small_mount)
    with server.client("ada") as client:
        kept = client.post("/api/files/upload", content=image()).json()["id"]
        subprocess.run(["umount", "-l", small_mount], check=True)
        until(lambda: code(client.post("/api/files/upload", content=image())) == (503, "volume_unavailable"), timeout_seconds=20)
        assert code(client.post("/api/files/upload", content=image(3 * MIB))) == (503, "volume_unavailable")
        assert code(client.get(f"/api/files/{kept}/download")) == (503, "volume_unavailable")
        assert client.get("/health/ready").status_code == 503 and client.get("/health/live").status_code == 200
        assert client.get("/api/files").status_code == 200
        assert list(small_mount.iterdir()) == []


def test_a_volume_absent_at_start_is_waited_for(server: RunningServer) -> None:
    with server.client("ada") as client:
        kept = client.post("/api/files/upload", content=image()).json()["id"]
        server.stop()
        away = server.volume.rename(server.volume.with_name("away"))
        server.volume.mkdir()
        server.start(wait_ready=False)
        assert code(client.post("/api/files/upload", content=image())) == (503, "volume_unavailable")
        assert list(server.volume.iterdir()) == []
        server.volume.rmdir()
        away.rename(server.volume)
        until(lambda: client.get("/health/ready").status_code == 200, timeout_seconds=20)
        assert client.get(f"/api/files/{kept}/download").content == image()
        assert client.post("/api/files/upload", content=image()).status_code == 201


def test_a_read_only_volume_is_still_read(start_server: ServerFactory, small_mount: Path) -> None:
    server = start_server(volume=small_mount)
    with server.client("ada") as client:
        kept = client.post("/api/files/upload", content=image()).json()["id"]
        subprocess.run(["mount", "-o", "remount,ro", small_mount], check=True)
        statuses = {code(client.post("/api/files/upload", content=image(n * MIB))) for n in (1, 2, 3)}
        assert statuses == {(503, "volume_read_only")}
        assert client.get(f"/api/files/{kept}/download").content == image()
        subprocess.run(["mount", "-o", "remount,rw", small_mount], check=True)
        until(lambda: client.post("/api/files/upload", content=image()).status_code == 201, timeout_seconds=20)


def test_a_full_volume_refuses_before_the_body_and_deletes_still_work(start_server: ServerFactory, small_mount: Path) -> None:
    server = start_server(volume=small_mount, COFFER_VOLUME_RESERVE_BYTES=str(16 * MIB))
    with server.client("ada") as client:
        ids: list[str] = []
        while (answer := client.post("/api/files/upload", content=image(5 * MIB, len(ids)))).status_code == 201:
            ids.append(answer.json()["id"])
        assert code(answer) == (507, "volume_full") and len(ids) >= 6

        def one_more(number: int) -> tuple[int, str]:
            body = image(5 * MIB, 100 + number)
            with server.client("ada", timeout=60) as own:
                if number % 2:
                    return code(own.post("/api/files/upload", content=iter([body[: 2 * MIB], body[2 * MIB :]])))
                return code(own.post("/api/files/upload", content=body))

        with ThreadPoolExecutor(16) as threads:
            assert set(threads.map(one_more, range(50))) == {(507, "volume_full")}
        facts = os.statvfs(small_mount)
        assert facts.f_bavail * facts.f_frsize >= 14 * MIB  # the reserve, less at most a batch or two
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"]) == (5 * MIB * len(ids), 0)
        assert client.delete(f"/api/files/{ids[0]}").status_code == 204
        assert client.delete(f"/api/files/{ids[1]}").status_code == 204
        until(lambda: client.post("/api/files/upload", content=image(5 * MIB, 999)).status_code == 201, timeout_seconds=20)
