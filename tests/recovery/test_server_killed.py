"""The server is killed while it writes and deletes (FAULTS 1 and 12, in short form)."""

import os
import random
import socket

from tests.recovery.journal import Load
from tests.samples import image
from tests.serving import RunningServer
from tests.waiting import until

KILLS = int(os.environ.get("COFFER_TEST_KILLS", "6"))


def test_no_acknowledged_upload_is_lost_and_no_quota_drifts(server: RunningServer) -> None:
    chance = random.Random(1)
    with Load(server, clients=8) as load:
        for _ in range(KILLS):
            wanted = load.count + chance.randrange(5, 40)
            load.wait_for(lambda wanted=wanted: load.count >= wanted)  # type: ignore[misc]
            server.kill()
            server.start()  # ready within its 10 seconds, or this raises
    load.journal.check(server)


def test_killed_deletes_leave_no_ghost_and_give_quota_back_once(server: RunningServer) -> None:
    chance = random.Random(2)
    with Load(server, clients=8, deleting=True, sizes=(1_000, 50_000)) as load:
        for _ in range(KILLS):
            wanted = len(load.journal.delete_answered) + chance.randrange(5, 40)
            load.wait_for(lambda wanted=wanted: len(load.journal.delete_answered) >= wanted)  # type: ignore[misc]
            server.kill()
            server.start()
    load.journal.check(server)
    server.settle()
    with server.client() as admin:
        users = admin.get("/api/users").json()["users"]
    rows = sum(user["file_count"] for user in users)
    # What a killed upload published and could not commit is garbage for the audit. No row's bytes, and no deleted row's, are among it.
    assert len(server.stored_paths()) - rows <= KILLS * 8


def test_a_crashed_uploads_quota_comes_back_and_its_bytes_go(server: RunningServer) -> None:
    with server.client("ada") as client:
        with socket.create_connection((server.host, server.port)) as connection:
            head = (
                f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\n"
                "X-User-Id: ada\r\nContent-Length: 5000000\r\n\r\n"
            )
            connection.sendall(head.encode() + image(3_000_000))
            until(server.incoming)
            assert client.get("/api/storage/usage").json()["reserved_bytes"] == 5_000_000
            server.kill()
        server.start()
        until(lambda: client.get("/api/storage/usage").json()["reserved_bytes"] == 0)
        until(lambda: server.incoming() == [])
