"""How often somebody may ask: the buckets, and a server of two processes that share them."""

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from server import rates
from server.api.limits import Limits, rate_headers
from server.auth import Scope
from server.commands.failures import Exit, code_of, code_of_status
from server.errors import RateLimited
from server.rates import Buckets
from server.setting_values import Rate
from server.settings import SettingError, Settings
from tests.access.test_download_links import code
from tests.linking import link, stored
from tests.processes import command_of
from tests.serving import RunningServer, ServerFactory
from tests.waiting import until

SECOND = 1_000_000_000
ELSEWHERE = "127.0.0.2"  # also this machine, but another address


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000 * SECOND

    def __call__(self) -> int:
        return self.now


# The buckets


def test_a_bucket_gives_what_it_holds_and_fills_evenly() -> None:
    clock = Clock()
    buckets, rate = Buckets(clock), Rate(3, 30)
    assert [tuple(buckets.take("a", rate)) for _ in range(4)] == [(True, 2, 10), (True, 1, 10), (True, 0, 10), (False, 0, 10)]
    clock.now += 10 * SECOND - 1
    assert tuple(buckets.take("a", rate)) == (False, 0, 1)
    clock.now += 1
    assert tuple(buckets.look("a", rate)) == (True, 1, 10)
    assert tuple(buckets.take("a", rate)) == (True, 0, 10)
    clock.now += 14 * SECOND
    assert tuple(buckets.take("a", rate)) == (True, 0, 6)
    clock.now += 1_000_000 * SECOND  # however long nobody asks, it holds no more than it holds
    assert [buckets.take("a", rate).admitted for _ in range(4)] == [True, True, True, False]


def test_looking_takes_nothing_and_names_are_apart() -> None:
    buckets, rate = Buckets(Clock()), Rate(1, 60)
    assert all(buckets.look("a", rate).admitted for _ in range(5))
    assert buckets.take("a", rate).admitted and not buckets.look("a", rate).admitted
    assert buckets.take("b", rate).admitted and buckets.take("\udcff", rate).admitted


@pytest.mark.parametrize("rate", [Rate(1, 1), Rate(7, 10), Rate(60_000, 60), Rate(3, 86_400)], ids=str)
def test_any_history_agrees_with_a_token_bucket(rate: Rate) -> None:
    clock, chance = Clock(), random.Random(rate.requests)
    buckets, unit = Buckets(clock), rate.seconds * SECOND // rate.requests
    tokens, last = Fraction(rate.requests), clock.now
    refusals = 0
    for _ in range(5_000):
        clock.now += chance.choice([0, 1, unit // 3, unit - 1, unit, 2 * unit])
        tokens, last = min(Fraction(rate.requests), tokens + Fraction(clock.now - last, unit)), clock.now
        admitted = tokens >= 1
        refusals += not admitted
        tokens -= admitted
        standing = buckets.take("a", rate)
        assert (standing.admitted, standing.remaining) == (admitted, int(tokens))
    assert refusals > 0 or rate.requests > 5_000


def test_memory_is_bounded_and_the_emptiest_buckets_stay() -> None:
    clock = Clock()
    buckets, rate = Buckets(clock), Rate(10, 1_000)
    while buckets.take("exhausted", rate).admitted:
        pass
    before = Path("/proc/self/statm").read_text().split()[1]
    for number in range(150_000):  # more than twice what there is room for
        assert buckets.take(f"passer-by {number}", rate).remaining == 9
    assert int(Path("/proc/self/statm").read_text().split()[1]) - int(before) < 4_096  # pages, of which the table is 256
    assert not buckets.take("exhausted", rate).admitted


def test_a_process_that_is_killed_inside_leaves_the_bucket_usable() -> None:
    """The clock is asked while the lock is held."""
    killed_inside = "import os, signal; from server.rates import *; from server.setting_values import Rate\n"
    killed_inside += "Buckets(clock=lambda: print('inside', flush=True) or signal.pause()).take('a', Rate(2, 60))"
    with rates.shared_by_processes():
        buckets = Buckets()
        assert buckets.take("a", Rate(2, 60)).remaining == 1
        with subprocess.Popen([sys.executable, "-c", killed_inside], stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout is not None and other.stdout.readline() == "inside\n"
                with pytest.raises(BlockingIOError):
                    fcntl.lockf(buckets._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                other.kill()
        assert [buckets.take("a", Rate(2, 60)).admitted for _ in range(2)] == [True, False]


# The policies


def limits(**settings: Any) -> Limits:
    return Limits(Settings(**settings), Buckets(Clock()))


def scope_from(address: str) -> dict[str, Any]:
    return {"client": (address, 1), "state": {}}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", True),
        ("2001:db8:1:2::1", "2001:0DB8:1:2::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    some = limits(rate_links_per_address=Rate(1, 60))
    some.count_link(scope_from(one))
    if same:
        with pytest.raises(RateLimited):
            some.count_link(scope_from(other))
    else:
        some.count_link(scope_from(other))


def test_some_addresses_are_not_limited() -> None:
    networks = Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_RATE_EXEMPT_ADDRESSES": "10.0.0.7, 2001:db8::/48"})
    some = limits(rate_links_per_address=Rate(1, 60), rate_exempt_addresses=networks.rate_exempt_addresses)
    for address in ("10.0.0.7", "::ffff:10.0.0.7", "2001:db8:0:9::1"):
        for _ in range(3):
            some.count_link(scope_from(address))
    nobodies: list[dict[str, Any]] = [{"state": {}}, {"client": None}, scope_from(""), scope_from("unix")]
    for nobody in nobodies:
        for _ in range(3):
            some.count_link(nobody)
    for address in ("10.0.0.8", "2001:db8:1::1"):
        some.count_link(scope_from(address))
        with pytest.raises(RateLimited):
            some.count_link(scope_from(address))


def test_users_and_keys_have_buckets_of_their_own() -> None:
    some = limits(rate_per_user=Rate(1, 60), rate_per_key=Rate(3, 60))
    told, scope = [], scope_from("")
    tokens = [(None, user_id) for user_id in ("ada", "ada", "bob", "eve", "kim")]
    for key_id, user_id in (*tokens, ("k", "ada"), ("k", "ada"), ("k", "bob"), ("k", "eve"), ("other", "ada"), ("other", None)):
        scope = scope_from("")
        try:
            some.count_request(scope, key_id, user_id)
            told.append("in")
        except RateLimited as refused:
            told.append(refused.policy)
    assert told == ["in", "user", "in", "in", "in", *("in", "user", "in", "key", "in", "in")]
    assert rate_headers(scope) == [
        (b"ratelimit-policy", b'"key";q=3;w=60, "user";q=1;w=60'),
        (b"ratelimit", b'"key";r=1;t=20, "user";r=0;t=60'),
    ]


@pytest.mark.parametrize("text", ["600", "600/0", "0/60", "-1/60", "1.5/60", "600/60/1", "many/60", "1/"])
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="COFFER_RATE_PER_USER: say requests/seconds"):
        Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_RATE_PER_USER": text})


def test_rates_as_text() -> None:
    environment = {"DATABASE_URL": "postgresql://x/y", "COFFER_RATE_PER_USER": " 1_000 / 5 ", "COFFER_RATE_LINKS_PER_ADDRESS": "off"}
    settings = Settings.load(environment)
    assert (settings.rate_per_user, settings.rate_links_per_address) == (Rate(1_000, 5), None)
    with pytest.raises(SettingError, match="COFFER_RATE_EXEMPT_ADDRESSES: say addresses or networks"):
        Settings.load({**environment, "COFFER_RATE_EXEMPT_ADDRESSES": "10.0.0.7/8"})


def test_the_command_says_that_later_is_worth_a_try() -> None:
    assert code_of_status(429) is code_of(RateLimited("user", 1)) is Exit.UNAVAILABLE


# Over HTTP


def status_of(server: RunningServer, path: str, key: str | None = None, *, user: str = "ada", address: str = "127.0.0.1") -> httpx.Response:
    """One request on a connection of its own, so that any of the processes may get it."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}", "X-User-Id": user}
    with httpx.Client(base_url=server.url, transport=httpx.HTTPTransport(local_address=address)) as client:
        return client.get(path, headers=headers)


@pytest.fixture
def two_processes(start_server: ServerFactory) -> Iterator[RunningServer]:
    """Every bucket is small and does not fill while the test runs."""
    server = start_server(
        COFFER_PROCESSES="2",
        COFFER_RATE_PER_USER="20/1000000",
        COFFER_RATE_LINKS_PER_ADDRESS="10/1000000",
        COFFER_RATE_FAILURES_PER_ADDRESS="10/1000000",
    )
    until(lambda: server.logged().count('"message":"started"') == 2)
    yield server
    server.stop()
    assert "Traceback" not in server.logged()


def children(server: RunningServer) -> set[int]:
    pids = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return {int(pid) for pid in pids if "spawn_main" in command_of(int(pid))}


def test_processes_count_a_users_requests_together(two_processes: RunningServer) -> None:
    server = two_processes
    answers = [status_of(server, "/api/files", server.api_key) for _ in range(60)]
    assert [answer.status_code for answer in answers] == [200] * 20 + [429] * 40
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"user";q=20;w=1000000'}
    standings = [answer.headers["ratelimit"].partition(";t=") for answer in answers]
    assert [standing[0] for standing in standings] == [f'"user";r={left}' for left in [*range(19, -1, -1), *[0] * 40]]
    refused = answers[-1]
    assert refused.headers["retry-after"] == standings[-1][2] and 49_000 < int(standings[-1][2]) <= 50_000
    assert refused.headers["content-type"] == "application/problem+json"
    body = refused.json()
    assert (body["code"], body["policy"], body["retry_after_seconds"]) == ("rate_limited", "user", int(standings[-1][2]))
    assert "retry-after" not in answers[0].headers

    # Others are not touched, and a process that is killed takes no count with it.
    assert status_of(server, "/api/files", server.api_key, user="bob").status_code == 200
    assert status_of(server, "/api/files", server.new_key(Scope.FILES_READ)).status_code == 200
    victim = next(iter(children(server)))
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim not in children(server) and server.logged().count('"message":"started"') == 3)
    assert {code(status_of(server, "/api/files", server.api_key)) for _ in range(20)} == {(429, "rate_limited")}


def test_wrong_credentials_are_limited_by_address(two_processes: RunningServer) -> None:
    server = two_processes
    wrong = f"{server.api_key[:-3]}AAA"
    answers = [status_of(server, "/api/files", wrong) for _ in range(30)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 20
    assert answers[9].headers["ratelimit"].startswith('"failures";r=0;t=')
    assert answers[10].json()["policy"] == "failures"
    # From there also a right key is refused, or a guess that hits would be told from one that does not.
    assert code(status_of(server, "/api/files", server.api_key)) == (429, "rate_limited")
    assert code(status_of(server, "/api/nowhere")) == (404, "not_found")
    assert status_of(server, "/health/live").status_code == 200
    # Elsewhere nothing has happened, and what succeeds is never counted as a failure.
    assert {status_of(server, "/api/files", server.api_key, address=ELSEWHERE).status_code for _ in range(15)} == {200}
    assert status_of(server, "/api/files", wrong, address=ELSEWHERE).status_code == 401


def test_links_are_limited_by_address(two_processes: RunningServer) -> None:
    server = two_processes
    with server.client("ada") as ada:
        url = link(ada, stored(ada))
    answers = [status_of(server, url) for _ in range(30)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429] * 20
    assert "ratelimit" not in answers[0].headers  # which caches keep
    assert answers[10].headers["ratelimit-policy"] == '"links";q=10;w=1000000'
    assert (answers[10].json()["policy"], answers[10].headers["cache-control"]) == ("links", "no-store")
    for path in ("/f/x/y", "/p/AAAAAAAAAAAAAAAAAAAAAA"):
        assert code(status_of(server, path)) == (429, "rate_limited")
    assert code(httpx.put(f"{server.url}/u/x")) == (429, "rate_limited")
    assert status_of(server, "/api/files", server.api_key).status_code == 200
    assert status_of(server, url, address=ELSEWHERE).status_code == 200


def test_requests_that_are_refused_count_too(start_server: ServerFactory) -> None:
    server = start_server(COFFER_RATE_PER_KEY="3/1000000")
    weak = server.new_key(Scope.FILES_READ)
    with server.client("ada", api_key=weak) as client:
        answers = [client.delete(f"/api/files/{uuid4()}"), client.get("/api/files", headers={"X-User-Id": 256 * "x"})]
        answers += [client.get("/api/users") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [403, 400, 403, 429, 429]


def test_an_upload_is_refused_before_its_body(start_server: ServerFactory) -> None:
    server = start_server(COFFER_RATE_PER_USER="1/1000000")
    head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\nX-User-Id: ada\r\n"
    assert status_of(server, "/api/files", server.api_key).status_code == 200
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: 1000000\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 429"


def test_limits_can_be_off_and_ordinary_ones_are_told(start_server: ServerFactory) -> None:
    server = start_server()
    answer = status_of(server, "/api/files", server.api_key)
    assert (answer.headers["ratelimit-policy"], answer.headers["ratelimit"]) == ('"user";q=60000;w=60', '"user";r=59999;t=1')
    assert "ratelimit" not in status_of(server, "/health/live").headers
    server = start_server(COFFER_RATE_PER_USER="off", COFFER_RATE_LINKS_PER_ADDRESS="off", COFFER_RATE_FAILURES_PER_ADDRESS="off")
    for path, key in (("/api/files", server.api_key), ("/api/files", "wrong"), ("/f/x/y", None)):
        assert "ratelimit" not in status_of(server, path, key).headers
