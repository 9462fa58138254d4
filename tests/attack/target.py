"""What an attack has before it: a running server with two users, and a count of what held and what did not."""

import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from server.auth import Scope
from tests.access.forged_tokens import Issuers
from tests.attack.wire import Answer, Headers, Wire, request
from tests.samples import image
from tests.serving import RunningServer, new_server

MISSING = "01900000-0000-7000-8000-000000000000"
MOST_BREACHES_TOLD = 5
BODY = image(20_000)
# The limits per address are an attack of their own; all of the others come from one address.
ENVIRONMENT = {
    "COFFER_LOG_LEVEL": "debug",
    "COFFER_RATE_FAILURES_PER_ADDRESS": "off",
    "COFFER_RATE_LINKS_PER_ADDRESS": "off",
}

T = TypeVar("T")


class Breach(AssertionError):
    """Something that must be refused was not. Says how often, and shows the first few."""


class Target(AbstractContextManager["Target"]):
    """A server with the users `ada` (who is attacked) and `bob` (who attacks), each with a file.

    `thorough` is for `make attack`; without it, counts are small enough for `make test`. `secrets` are all keys and tokens made so
    far: none of them may ever turn up in the log. `public_ids` are no secrets, but no log should collect them either. `random` has a
    fixed seed, so a run can be repeated.
    """

    def __init__(self, server: RunningServer, issuers: Issuers, *, thorough: bool, scratch: Path) -> None:
        self.server = server
        self.issuers = issuers
        self.servers = [server]
        self._environment = ENVIRONMENT | issuers.environment
        self.thorough = thorough
        self.scratch = scratch
        self.random = random.Random(20_260_101)
        self.secrets: set[str] = set()
        self.public_ids: set[str] = set()
        self.wire = Wire(server.host, server.port)
        self.nobody = httpx.Client(base_url=server.url, timeout=30)
        self._keep(server.api_key)
        self.ada, self.bob = self.user("ada"), self.user("bob")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wire.close()
        for client in (self.nobody, self.ada, self.bob):
            client.close()

    def __enter__(self) -> "Target":
        return self

    def many(self, thorough: int, short: int) -> int:
        """How often to try."""
        return thorough if self.thorough else short

    def some(self, candidates: Iterable[T], short: int) -> list[T]:
        """All of them, or without thoroughness that many of them, always the same."""
        candidates = list(candidates)
        return candidates if self.thorough or len(candidates) <= short else self.random.sample(candidates, short)

    def user(self, user_id: str) -> httpx.Client:
        """A client that acts for this user."""
        return self.server.client(user_id, timeout=30)

    def new_key(self, *scopes: Scope) -> str:
        """A new API key with these scopes."""
        key = self.server.new_key(*scopes)
        self._keep(key)
        return key

    def token(self, user_id: str, /, **claims: Any) -> str:
        """A user token that is good for a few minutes, with further claims."""
        token = self.issuers.clerk.token(sub=user_id, **claims)
        self.secrets |= {token, *token.split(".")[1:]}  # the header is alike for all
        return token

    @contextmanager
    def another_server(self, **environment: str) -> Iterator[RunningServer]:
        """One more server with the same data and keys, and these settings besides the first one's. It has a log of its own."""
        log = self.scratch / f"log-{len(self.servers)}"
        server = RunningServer(self.server.database_url, self.server.volume, log, self.server.api_key, self._environment | environment)
        self.servers.append(server)
        try:
            server.start()
            yield server
        finally:
            server.kill()

    def logged(self) -> str:
        """What all servers have written."""
        return "".join(server.logged() for server in self.servers)

    def upload(self, client: httpx.Client, body: bytes = BODY, **fields: str) -> dict[str, Any]:
        """Stores a file and returns its fields."""
        answer = client.post("/api/files/upload", content=body, params={"name": "file.png"} | fields)
        assert answer.status_code == 201, answer.text
        file: dict[str, Any] = answer.json()
        return file

    def link(self, client: httpx.Client, file_id: str, **wish: Any) -> str:
        """A signed link to a file."""
        answer = client.post(f"/api/files/{file_id}/link", json=wish)
        assert answer.status_code == 200, answer.text
        return self._kept_link(answer.json()["url"])

    def upload_link(self, client: httpx.Client, **wish: Any) -> tuple[str, str]:
        """An upload link and the id of the file that it will bring."""
        answer = client.post("/api/uploads/links", json={"max_bytes": 100_000} | wish)
        assert answer.status_code == 201, answer.text
        return self._kept_link(answer.json()["url"]), answer.json()["file_id"]

    def public_url(self, client: httpx.Client, file_id: str) -> str:
        """The URL under which a file is public from now on."""
        answer = client.put(f"/api/files/{file_id}/public", json={"is_public": True})
        assert answer.status_code == 200, answer.text
        url: str = answer.json()["url"]
        self.public_ids.add(url.removeprefix("/p/"))
        return url

    def get(self, target: str | bytes, headers: Headers = ()) -> Answer:
        """The answer to a GET by nobody in particular."""
        return self.wire.expect(request("GET", target, headers))

    def headers_of(self, user_id: str) -> list[tuple[str, str]]:
        """The credentials with which a backend acts for this user."""
        return [("Authorization", f"Bearer {self.server.api_key}"), ("X-User-Id", user_id)]

    def listed(self, client: httpx.Client) -> list[dict[str, Any]]:
        """All fields of all the user's files: equal before and after an attack on them."""
        answer = client.get("/api/files", params={"limit": "200"})
        assert answer.status_code == 200, answer.text
        files: list[dict[str, Any]] = answer.json()["files"]
        return files

    def resident_bytes(self) -> int:
        """Memory of the server that is resident now."""
        for line in Path(f"/proc/{self.server.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel does not tell")

    def _keep(self, api_key: str) -> None:
        self.secrets |= {api_key, api_key.split("_", 2)[2]}

    def _kept_link(self, url: str) -> str:
        token = url.split("/")[2]
        self.secrets |= {token, *token.split(".")}
        return url


@contextmanager
def target_on(database_url: str, scratch: Path, *, thorough: bool) -> Iterator[Target]:
    """A target on an empty database, running until the end. What it leaves in `scratch` is for its maker to remove."""
    with Issuers(scratch) as issuers:
        server = new_server(database_url, scratch, None, ENVIRONMENT | issuers.environment)
        try:
            server.start()
            with Target(server, issuers, thorough=thorough, scratch=scratch) as target:
                yield target
        finally:
            server.kill()


def errors_in(log: str) -> list[str]:
    """The lines that tell of an error, or are none of ours."""
    return [line for line in log.splitlines() if '"level":"error"' in line or not line.startswith("{")]


class Tally:
    """Counts what was tried, and keeps what was not as it must be."""

    def __init__(self) -> None:
        self.tried = 0
        self.breaches: list[str] = []

    def check(self, holds: object, what: str) -> None:
        """One try. `what` tells what would be wrong."""
        self.tried += 1
        if not holds:
            self.breaches.append(what)

    def refused(self, answer: Answer, what: object, expected: Collection[tuple[int, str]]) -> None:
        """One try that must be answered with one of these statuses and codes."""
        self.check((answer.status, answer.code) in expected, f"{what!r}: {answer.status} {answer.code or answer.body[:80]!r}")

    def settle(self) -> None:
        """Raises `Breach` unless everything held."""
        if self.breaches:
            more = len(self.breaches) - MOST_BREACHES_TOLD
            told = [*self.breaches[:MOST_BREACHES_TOLD], *([f"and {more:,} more"] if more > 0 else [])]
            raise Breach(f"{len(self.breaches):,} of {self.tried:,}:\n  " + "\n  ".join(told))
