"""Clients of one user who do everything that a user does, all the time, and take no answer but success."""

import random
import threading
from collections.abc import Callable
from typing import Self
from uuid import UUID

import httpx

from tests.samples import image
from tests.serving import RunningServer
from tests.tus import speaking
from tests.waiting import until

_PAUSE_SECONDS = 0.05
"""Between two rounds: what all of them have stored is moved to and fro."""


class Traffic:
    """`kept` is what is stored and was acknowledged, by file. The oracle is here, not in the server."""

    def __init__(self, server: RunningServer, user_id: str, kept: dict[str, bytes]) -> None:
        """`kept` are files to be downloaded again and again, by links made now, too."""
        self.strange: list[str] = []
        self.kept = dict(kept)
        self._old = list(kept.items())
        self._server, self._user_id = server, user_id
        self._stop = threading.Event()
        self._lock = threading.Lock()
        with self._client() as client:
            answer = client.post("/api/links", json={"ids": list(kept)}).json()
        self._links = [(each["url"], kept[each["id"]]) for each in answer["links"]]
        works: tuple[Callable[[httpx.Client, random.Random, int], None], ...] = (
            self._upload,
            self._download,
            self._follow_links,
            self._change,
            self._resume,
        )
        self.rounds = {work.__name__: 0 for work in works}
        self._threads = [threading.Thread(target=self._repeat, args=(work,)) for work in works]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_rounds(self, more: int) -> None:
        """Until everybody has done what they do so many times more, or something went wrong."""
        before = dict(self.rounds)
        until(lambda: self.strange or all(count >= before[name] + more for name, count in self.rounds.items()))

    def _client(self) -> httpx.Client:
        return self._server.client(self._user_id, timeout=60)

    def _repeat(self, work: Callable[[httpx.Client, random.Random, int], None]) -> None:
        chance = random.Random(work.__name__)
        with self._client() as client:
            while not self._stop.is_set() and not self.strange:
                try:
                    work(client, chance, self.rounds[work.__name__])
                except (AssertionError, httpx.HTTPError) as problem:
                    self.strange.append(f"{work.__name__}: {problem!r}")
                self.rounds[work.__name__] += 1
                self._stop.wait(_PAUSE_SECONDS)

    def _upload(self, client: httpx.Client, chance: random.Random, number: int) -> None:
        self._keep(client, image(chance.choice((1_000, 50_000, 2_000_000)), 10_000 + number))

    def _keep(self, client: httpx.Client, body: bytes) -> str:
        answer = _ok(client.post("/api/files/upload", content=body))
        file_id: str = answer.json()["id"]
        with self._lock:
            self.kept[file_id] = body
        return file_id

    def _download(self, client: httpx.Client, chance: random.Random, _: int) -> None:
        file_id, body = chance.choice(self._old)
        assert _ok(client.get(f"/api/files/{file_id}/download")).content == body
        part = _ok(client.get(f"/api/files/{file_id}/download", headers={"Range": "bytes=10-99"}))
        assert part.content == body[10:100]

    def _follow_links(self, _: httpx.Client, chance: random.Random, __: int) -> None:
        url, body = chance.choice(self._links)
        assert _ok(httpx.get(f"{self._server.url}{httpx.URL(url).raw_path.decode()}", timeout=60)).content == body

    def _change(self, client: httpx.Client, chance: random.Random, number: int) -> None:
        """A file's whole life: stored, replaced, its links revoked, copied, deleted."""
        file_id = _ok(client.post("/api/files/upload", content=image(3_000, 20_000 + number))).json()["id"]
        url = f"/api/files/{file_id}"
        body = image(4_000, 30_000 + number)
        _ok(client.put(f"{url}/content", content=body))
        _ok(client.post(f"{url}/revoke-links"))
        assert _ok(client.get(f"{url}/download")).content == body
        copy = _ok(client.post(f"{url}/copy")).json()["id"]
        with self._lock:
            self.kept[copy] = body
        if chance.random() < 0.7:
            _ok(client.delete(url))
            assert client.get(f"{url}/download").status_code == 404
        else:
            with self._lock:
                self.kept[file_id] = body

    def _resume(self, client: httpx.Client, _: random.Random, number: int) -> None:
        """An upload in three parts, with pauses in which it lies there unfinished."""
        body = image(300_000, 40_000 + number)
        path = speaking.create(client, len(body))
        for at in range(0, len(body), 100_000):
            assert speaking.offset(client, path) == at
            assert speaking.patch(client, path, at, body[at : at + 100_000]).status_code == 204
            self._stop.wait(0.3)
        with self._lock:
            self.kept[str(UUID(path.rsplit("/", 1)[1]))] = body

    def check(self) -> None:
        """Everything that was acknowledged is there, byte for byte, and nobody was told anything strange."""
        assert not self.strange, self.strange[:3]
        with self._client() as client:
            for file_id, body in self.kept.items():
                assert _ok(client.get(f"/api/files/{file_id}/download")).content == body


def _ok(answer: httpx.Response) -> httpx.Response:
    assert answer.is_success, (answer.request.method, answer.request.url.path, answer.status_code, answer.text[:300])
    return answer
