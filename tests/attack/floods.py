"""13: slow and started uploads by the thousand, and made-up addresses: others hardly notice, and every limit holds to the unit."""

import itertools
import resource
import socket
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, suppress
from types import TracebackType

from tests.attack.target import BODY, Tally, Target, errors_in
from tests.attack.wire import Headers, Wire, request
from tests.samples import image
from tests.serving import RunningServer
from tests.waiting import until

PROXY, LIAR = "127.0.0.2", "127.0.0.3"  # this machine too: the one is trusted to name its clients, the other is not
FROM_ONE_ADDRESS = 20
MOST_SPARE_FILES = 1_000  # this process has others open than the connections of the crowd
SLOW_SIZES = (3_000_000, 100_000)  # goes to the disk; waits in memory
DROP_BYTES = 1_000
BATCH = 10
WORST_MEDIAN_RATIO = 3.0


def attack(target: Target, tally: Tally) -> str:
    uploads_at_once, links = target.many(256, 8), target.many(1_000, 10)
    environment = {
        "COFFER_UPLOADS_AT_ONCE_PER_USER": str(uploads_at_once),
        "COFFER_UPLOAD_LINKS_PER_USER": str(links),
        "COFFER_RATE_FAILURES_PER_ADDRESS": f"{FROM_ONE_ADDRESS}/1000000",
        "COFFER_RATE_LINKS_PER_ADDRESS": f"{FROM_ONE_ADDRESS}/1000000",
        "COFFER_TRUSTED_PROXIES": PROXY,
    }
    with target.another_server(**environment) as server:
        before = _measure(target, tally, server, None)
        with Crowd(target, server) as slow, Crowd(target, server) as crowd:
            slow.start_uploads(target.many(500, 20))
            _check_admitted(tally, server, slow, uploads_at_once)
            crowd.start_uploads(most := target.many(_affordable(5_000), 25))
            crowd.start_heads(most)
            until(lambda: len(crowd.statuses()) >= most, timeout_seconds=60)
            tally.check(crowd.statuses() == [429] * most, f"started uploads beyond the limit: {sorted(set(crowd.statuses()))}")
            during = _measure(target, tally, server, slow)
            tally.check(server.in_flight() == uploads_at_once, f"{server.in_flight()} uploads under way at the end")
            held = slow.held() + crowd.held()
        until(lambda: server.in_flight() == 0, timeout_seconds=60)
        with server.client(slow.user_id) as client:
            usage = client.get("/api/storage/usage").json()
        tally.check(usage["used_bytes"] == usage["reserved_bytes"] == 0, f"given up uploads leave {usage}")
        _start_by_links(target, tally, server, links)
        addresses = _make_addresses_up(tally, server, target)
        tally.check(not (errors := errors_in(server.logged())), f"{len(errors)} errors in the log, the first: {errors[:1]}")
    ratios = {what: (during[what][0] / before[what][0], during[what][1] / before[what][1]) for what in before}
    if target.thorough:  # a short run has too few requests to judge by
        worst = max(median for median, _ in ratios.values())
        tally.check(worst <= WORST_MEDIAN_RATIO, f"others' requests take {worst:.1f} times as long")
    told = ", ".join(f"{what} {median:.2f} (p99 {p99:.2f})" for what, (median, p99) in ratios.items())
    return (
        f"with {held:,} connections held, others' time is that of before times: {told}; {uploads_at_once} uploads and {links:,} links "
        f"admitted, as the limits say; {addresses} made-up addresses: no new bucket"
    )


class Crowd(AbstractContextManager["Crowd"]):
    """Connections of one user that have begun something and hold on to it."""

    user_id = "impatient"

    def __init__(self, target: Target, server: RunningServer) -> None:
        self._server = server
        self._bodies = [image(size) for size in SLOW_SIZES]
        self._key = target.server.api_key
        self._connections: list[socket.socket] = []
        self._at = itertools.count()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each in self._connections:
            each.close()

    def start_uploads(self, count: int) -> None:
        """Sends the head of an upload and a little of its body, each from an address that is made up."""
        for number in range(count):
            body = self._bodies[number % len(self._bodies)]
            headers = [("Authorization", f"Bearer {self._key}"), ("X-User-Id", self.user_id), *_made_up(number)]
            head, _, _ = request("POST", "/api/files/upload", headers, body).partition(b"\r\n\r\n")
            self._connect().sendall(head + b"\r\n\r\n" + body[:DROP_BYTES])

    def start_heads(self, count: int) -> None:
        """Sends heads without their ends."""
        for _ in range(count):
            self._connect().sendall(b"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nX-A: ")

    def drip(self, share: int, shares: int) -> None:
        """Sends each upload of one share of them that is not answered yet a little more."""
        for each in self._connections[share::shares]:
            if _status(each) is None:
                with suppress(OSError):
                    each.sendall(bytes(DROP_BYTES))

    def statuses(self) -> list[int]:
        """Of the answers so far."""
        return [status for each in self._connections if (status := _status(each))]

    def held(self) -> int:
        """How many connections the server has not hung up on."""
        return sum(_status(each) != 0 for each in self._connections)

    def _connect(self) -> socket.socket:
        connection = socket.create_connection((self._server.host, self._server.port), timeout=20)
        connection.setblocking(False)  # what we send fits into its buffer
        self._connections.append(connection)
        return connection


def _status(connection: socket.socket) -> int | None:
    """Of the answer that waits to be read; None when there is none yet, 0 when the server has hung up without one."""
    try:
        start = connection.recv(12, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return 0
    return int(start[9:12] or 0)


def _affordable(wanted: int) -> int:
    """As many as this process may have open, twice."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return min(wanted, (most - MOST_SPARE_FILES) // 2)


def _made_up(number: int) -> list[tuple[str, str]]:
    """Every header that could name an address, with another address each time."""
    address = f"203.0.{number // 250 % 250}.{number % 250 + 1}"
    return [("X-Forwarded-For", address), ("Forwarded", f"for={address}"), ("X-Real-IP", address)]


def _check_admitted(tally: Tally, server: RunningServer, crowd: Crowd, limit: int) -> None:
    started = crowd.held()
    until(lambda: len(crowd.statuses()) + server.in_flight() == started, timeout_seconds=60)
    refused = crowd.statuses()
    tally.check(
        len(refused) == started - limit and set(refused) == {429}, f"of {started} slow uploads {started - len(refused)} are admitted"
    )


def _measure(target: Target, tally: Tally, server: RunningServer, slow: Crowd | None) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile of the seconds that another user's lists and small uploads take."""
    headers = [("Authorization", f"Bearer {server.api_key}"), ("X-User-Id", "patient")]
    requests = {"lists": request("GET", "/api/files?limit=20", headers), "uploads": request("POST", "/api/files/upload", headers, BODY)}
    seconds: dict[str, list[float]] = {what: [] for what in requests}
    with closing(Wire(server.host, server.port)) as wire:
        for _ in range(target.many(60, 3)):
            for number, (what, sent) in enumerate(BATCH * list(requests.items())):
                if slow is not None:  # not all at the same time: these clients know nothing of each other
                    slow.drip(number, BATCH * len(requests))
                began = time.perf_counter()
                answer = wire.expect(sent)
                seconds[what].append(time.perf_counter() - began)
                tally.check(answer.status < 300, f"another user's {what}: {answer.status}")
    return {what: (statistics.median(each), statistics.quantiles(each, n=100)[-1]) for what, each in seconds.items()}


def _start_by_links(target: Target, tally: Tally, server: RunningServer, limit: int) -> None:
    asked = limit + target.many(500, 20)
    body = b'{"max_bytes":10}'
    headers = [("Authorization", f"Bearer {server.api_key}"), ("X-User-Id", "linker"), ("Content-Type", "application/json")]
    with closing(Wire(server.host, server.port)) as wire:
        answers = [wire.expect(request("POST", "/api/uploads/links", [*headers, *_made_up(number)], body)) for number in range(asked)]
    admitted = sum(answer.status == 201 for answer in answers)
    tally.check(admitted == limit, f"{admitted} upload links are admitted, not {limit}")
    others = {(answer.status, answer.code) for answer in answers if answer.status != 201}
    tally.check(others == {(429, "too_many_uploads")}, f"upload links beyond the limit: {others}")


def _make_addresses_up(tally: Tally, server: RunningServer, target: Target) -> int:
    """Returns how many addresses were made up."""
    asked = 3 * FROM_ONE_ADDRESS
    wrong = [("Authorization", f"Bearer {target.server.api_key[:-3]}AAA"), ("X-User-Id", "ada")]
    for path, headers in (("/api/files", wrong), ("/f/x/y", [])):
        rotating = [_made_up(number) for number in range(asked)]
        admitted = _admitted(server, LIAR, path, headers, rotating)
        tally.check(admitted == FROM_ONE_ADDRESS, f"{path} from one who is not trusted: {admitted}")
        # What a trusted proxy appends is believed; what the client wrote before it is not.
        behind = [[("X-Forwarded-For", f"203.0.113.{number + 1}, 198.51.100.7")] for number in range(asked)]
        admitted = _admitted(server, PROXY, path, headers, behind)
        tally.check(admitted == FROM_ONE_ADDRESS, f"{path} from one behind a proxy: {admitted}")
        each_its_own = [[("X-Forwarded-For", f"203.0.113.{number + 1}")] for number in range(asked)]
        admitted = _admitted(server, PROXY, path, headers, each_its_own)
        tally.check(admitted == asked, f"{path} from as many clients behind a proxy: {admitted}")
    with server.client("ada") as ada:
        tally.check(ada.get("/api/files").status_code == 200, "those limits are everybody's")
    return 4 * asked


def _admitted(server: RunningServer, source: str, path: str, headers: Headers, addresses: Sequence[Headers]) -> int:
    """How many requests from this address are answered by more than the rate limit."""
    with closing(Wire(server.host, server.port, source=source)) as wire:
        answers = [wire.expect(request("GET", path, [*headers, *each])) for each in addresses]
    return sum(answer.code != "rate_limited" for answer in answers)
