"""The oracle of every recovery test: what clients were told, outside the server, and what must therefore be true."""

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from tests.samples import image
from tests.serving import RunningServer
from tests.waiting import until

WAYS = ("raw", "chunked", "form", "keyed")


def send(client: httpx.Client, way: str, body: bytes, name: str) -> httpx.Response:
    """Uploads through one of the ways in."""
    match way:
        case "chunked":

            def pieces() -> Iterator[bytes]:
                yield from (body[at : at + 60_000] for at in range(0, len(body), 60_000))

            return client.post("/api/files/upload", content=pieces(), params={"name": name})
        case "form":
            return client.post("/api/files/upload", files={"file": (name, body)})
        case "keyed":
            return client.post("/api/files/upload", content=body, params={"name": name}, headers={"Idempotency-Key": name.encode().hex()})
        case _:
            return client.post("/api/files/upload", content=body, params={"name": name})


class Journal:
    """Acknowledged writes by user: file id to SHA-256. Deletes that were asked for, whether answered or not."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stored: dict[str, dict[str, str]] = {}
        self.delete_asked: set[str] = set()
        self.delete_answered: set[str] = set()
        self.strange: list[str] = []

    def acknowledged(self, user_id: str, answer: httpx.Response, body: bytes) -> None:
        with self.lock:
            self.stored.setdefault(user_id, {})[answer.json()["id"]] = hashlib.sha256(body).hexdigest()

    def check(self, server: RunningServer) -> None:
        """Every acknowledged file is there with its bytes; every row has its file; totals are the sums; deleted is gone."""
        assert not self.strange, self.strange[:3]
        on_disk = server.stored_files()
        for user_id, acknowledged in self.stored.items():
            with server.client(user_id) as client:
                rows: dict[str, Any] = {}
                cursor: str | None = None
                while True:
                    page = client.get("/api/files", params={"limit": 200} | ({"cursor": cursor} if cursor else {})).json()
                    rows |= {file["id"]: file for file in page["files"]}
                    cursor = page["next_cursor"]
                    if cursor is None:
                        break
                lost = {file_id for file_id in acknowledged if file_id not in rows} - self.delete_asked
                assert not lost, f"{len(lost)} acknowledged files of {user_id} are lost"
                assert not self.delete_answered & rows.keys()
                assert {file["sha256"] for file in rows.values()} <= on_disk, "a row without its file"
                for file_id in rows.keys() & acknowledged.keys():
                    assert hashlib.sha256(client.get(f"/api/files/{file_id}/download").content).hexdigest() == acknowledged[file_id]
                usage = client.get("/api/storage/usage").json()
                assert usage["used_bytes"] == sum(file["file_size"] for file in rows.values())
                assert usage["file_count"] == len(rows)


class Load:
    """Clients that upload (and delete, with `deleting`) until told to stop, through every way in, journaling what is answered."""

    def __init__(
        self, server: RunningServer, clients: int, *, deleting: bool = False, sizes: tuple[int, ...] = (1_000, 200_000, 2_000_000)
    ) -> None:
        self.journal = Journal()
        self._server = server
        self._sizes = sizes
        self._deleting = deleting
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Lets the clients go on until the condition holds."""
        until(condition)

    @property
    def count(self) -> int:
        with self.journal.lock:
            return sum(len(each) for each in self.journal.stored.values())

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        user_id = f"user-{number % 3}"
        serial = 0
        while not self._stop.is_set():
            try:
                with self._server.client(user_id, timeout=20) as client:
                    while not self._stop.is_set():
                        serial += 1
                        body = image(chance.choice(self._sizes), seed=number * 1_000_000 + serial)
                        answer = send(client, chance.choice(WAYS), body, f"{number}-{serial}.png")
                        if answer.status_code == 201:
                            self.journal.acknowledged(user_id, answer, body)
                            if self._deleting and chance.random() < 0.6:
                                self._delete(client, answer.json()["id"])
                        elif answer.status_code != 503:
                            self.journal.strange.append(f"{answer.status_code} {answer.text}")
            except httpx.TransportError:
                continue  # the server is down: nothing was acknowledged

    def _delete(self, client: httpx.Client, file_id: str) -> None:
        with self.journal.lock:
            self.journal.delete_asked.add(file_id)
        answer = client.delete(f"/api/files/{file_id}")
        if answer.status_code == 204:
            with self.journal.lock:
                self.journal.delete_answered.add(file_id)
        elif answer.status_code != 503:
            self.journal.strange.append(f"{answer.status_code} {answer.text}")
