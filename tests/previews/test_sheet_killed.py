"""The worker is killed in the middle of a contact sheet, before its file is there or after: there is one file in the end, charged once."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.ops.conftest import drifted
from tests.previews import hasty_worker
from tests.previews.test_compose import BLUE, RED, compose, plain, shown, used_bytes
from tests.previews.test_gallery import upload
from tests.serving import ServerFactory, execute
from tests.waiting import until
from tests.working import BackgroundWorker

LEASE: dict[str, Any] = {"COFFER_RESERVATION_LEASE_SECONDS": "5"}


@contextmanager
def held(database_url: str, lock: str) -> Iterator[None]:
    """Nobody gets past the lock meanwhile."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(database_url))
    try:
        loop.run_until_complete(connection.execute(f"begin; {lock}"))
        yield
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


def waits(database_url: str, statement: str) -> bool:
    """Whether somebody waits for a lock with such a statement."""
    sql = "select from pg_stat_activity where wait_event_type = 'Lock' and query like $1"
    return bool(execute(database_url, sql, f"%{statement}%"))


@pytest.mark.parametrize(
    ("table", "statement", "files_by_then"), [("events", "insert into user_files", 0), ("sheets", "delete from sheets where id = ", 1)]
)
def test_one_file_whenever_the_worker_dies(
    start_server: ServerFactory, tmp_path: Path, table: str, statement: str, files_by_then: int
) -> None:
    server = start_server(**LEASE)
    sheets = "select id from user_files where idempotency_key like 'sheet %'"
    workers: list[BackgroundWorker] = []

    def work() -> BackgroundWorker:
        workers.append(BackgroundWorker(server, tmp_path / f"worker-{len(workers)}.log", LEASE, hasty_worker.main))
        return workers[-1]

    try:
        with server.client("ada", timeout=60) as ada, ThreadPoolExecutor(1) as pool:
            pictures = [upload(ada, plain(colour), f"{number}.png") for number, colour in enumerate((RED, BLUE))]
            work()
            until(lambda: all(ada.get(f"/api/files/{each}").json()["preview_state"] == "ready" for each in pictures))
            workers[0].stop()
            before = used_bytes(ada)
            asked = pool.submit(compose, ada, pictures)
            until(lambda: execute(server.database_url, "select from sheets"))
            with held(server.database_url, f"lock table {table} in share mode"):
                dying = work()
                until(lambda: waits(server.database_url, statement))
                dying.kill()
                assert len(execute(server.database_url, sheets)) == files_by_then
            work()
            asked.result()  # a file, or to be asked for again
            until(lambda: compose(ada, pictures).is_success)
            (sheet,) = execute(server.database_url, sheets)
            assert shown(ada, str(sheet["id"])) == [RED, BLUE]
            until(lambda: execute(server.database_url, "select from uploads") == [])
            assert used_bytes(ada) == before + ada.get(f"/api/files/{sheet['id']}").json()["file_size"]
            until(lambda: execute(server.database_url, "select from sheets") == [])
        assert drifted(server.database_url) == []
    finally:
        for worker in workers:
            worker.kill()
