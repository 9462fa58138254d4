"""A client that does what tus clients do when the network fails: asks how far it is, and goes on there, for as long as it takes."""

import time
from collections import Counter
from collections.abc import Sequence

import httpx

VERSION = {"Tus-Resumable": "1.0.0"}
PIECE = VERSION | {"Content-Type": "application/offset+octet-stream"}
ENDPOINT = "/api/tus/"
_PAUSE_SECONDS = 0.05


class PersistentUpload:
    """One upload, by one thread. `answers` counts the statuses that came, and failures as 0; `waited_seconds` is the longest time
    from a failure to knowing how far the upload is."""

    def __init__(
        self,
        urls: Sequence[str],
        headers: dict[str, str],
        body: bytes,
        *,
        piece_bytes: int | None = None,
        timeout_seconds: float = 5,
        give_up_seconds: float = 240,
    ) -> None:
        """`urls` are servers of the same uploads, which are asked in turn. A piece is one PATCH; None: all that is left."""
        self._clients = [httpx.Client(base_url=url, headers=headers, timeout=timeout_seconds) for url in urls]
        self._turn = 0
        self._body = body
        self._piece_bytes = piece_bytes or max(1, len(body))
        self._give_up_at = time.monotonic() + give_up_seconds
        self.answers: Counter[int] = Counter()
        self.waited_seconds = 0.0
        self.furthest_bytes = 0  # that was ever acknowledged
        self.path = ""
        self.file_id = ""

    def run(self) -> "PersistentUpload":
        """Returns when the file is stored. AssertionError when an answer is none that a client may get, or it takes too long."""
        self._begin()
        offset: int | None = 0
        failed_at = time.monotonic()
        while not self.file_id:
            if offset is not None:
                offset = self._send(offset)
                failed_at = time.monotonic()
            elif (offset := self._look()) is not None:
                self.waited_seconds = max(self.waited_seconds, time.monotonic() - failed_at)
            else:
                time.sleep(_PAUSE_SECONDS)
        return self

    def close(self) -> None:
        """No connection stays."""
        for client in self._clients:
            client.close()

    def _begin(self) -> None:
        while not self.path:
            answer = self._ask("POST", ENDPOINT, VERSION | {"Upload-Length": str(len(self._body))})
            if answer is not None and answer.status_code == 201:
                self.path = httpx.URL(answer.headers["location"]).path
            else:
                time.sleep(_PAUSE_SECONDS)

    def _look(self) -> int | None:
        answer = self._ask("HEAD", self.path, VERSION)
        if answer is None or answer.status_code != 200:
            return None
        self.file_id = answer.headers.get("coffer-file-id", "")
        return self._told(answer)

    def _send(self, offset: int) -> int | None:
        piece = self._body[offset : offset + self._piece_bytes]
        answer = self._ask("PATCH", self.path, PIECE | {"Upload-Offset": str(offset)}, piece)
        if answer is None or answer.status_code != 204:
            return None
        self.file_id = answer.headers.get("coffer-file-id", "")
        return self._told(answer)

    def _told(self, answer: httpx.Response) -> int:
        offset = int(answer.headers["upload-offset"])
        assert offset >= self.furthest_bytes, f"{self.furthest_bytes} bytes were acknowledged, and now {offset}"
        self.furthest_bytes = offset
        return offset

    def _ask(self, method: str, path: str, headers: dict[str, str], content: bytes | None = None) -> httpx.Response | None:
        """The answer, or None when there is none, after which the next server has its turn."""
        assert time.monotonic() < self._give_up_at, f"not done; so far {self.answers}"
        client = self._clients[self._turn % len(self._clients)]
        try:
            answer = client.request(method, path, headers=headers, content=content)
        except httpx.TransportError:
            self.answers[0] += 1
            self._turn += 1
            return None
        self.answers[answer.status_code] += 1
        assert answer.status_code in (200, 201, 204, 408, 409, 423, 503), f"{method}: {answer.status_code} {answer.text}"
        if answer.status_code in (408, 423, 503):
            self._turn += 1
        return answer
