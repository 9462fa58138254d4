"""Owners who are answered as soon as their file's row is there: the same answers, counted and logged alike, on every connection."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any
from uuid import UUID, uuid4

import pytest

from server.api import express
from server.auth import Scope
from server.errors import DatabaseUnavailable
from server.ledger import Database, File
from server.ledger.lookups import FileLookups, Gathering
from server.metrics import Metrics
from server.setting_values import Rate, TokenIssuer
from server.vault.volume import Volume
from tests.access.issuers import Issuer, SigningKey
from tests.access.test_key_restrictions import new_key
from tests.download.here import Reply, Stage, connected, is_same, reply, request, serving_here, settings_of, told_of_requests
from tests.linking import link, stored
from tests.samples import image
from tests.serving import RunningServer, SharedServer, execute
from tests.waiting import until

SMALL, LARGE = image(20_000), image(3 * 2**20, seed=1)
VARYING = {"date", "x-request-id", "ratelimit"}
ROUTE = "/api/files/{file_id}/download"


@dataclass
class Owners(Stage):
    """Its paths are those of downloads."""

    ids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths = {name: f"/api/files/{file_id}/download" for name, file_id in self.ids.items()}

    def request(self, name: str, *headers: str) -> bytes:
        return super().request(name if name in self.paths else f"/api/files/{name}/download", *headers)


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> Iterator[RunningServer]:
    """One for all tests: what they look at is in this process."""
    with shared_server() as server:
        yield server


@pytest.fixture
def stage(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Owners]:
    """Whoever asks is known to it already."""
    told = told_of_requests(monkeypatch)
    with server.client("ada") as ada:
        ids = {"small": stored(ada, SMALL, "Sonne ☀.png"), "large": stored(ada, LARGE)}
    settings = settings_of(
        server,
        trusted_proxies=(ip_network("127.0.0.1"),),
        accel_redirect_prefix="/files",
        cors_origins=("https://a.example",),
        rate_per_user=Rate(500, 86_400),  # none comes back while a test counts them
    )
    with serving_here(settings) as here:
        stage = Owners(server, here, told, ids=ids)
        stage.ask("small")
        until(lambda: told)
        del told[:], here.extensions[:]
        yield stage


def left(answer: Reply) -> int:
    """How many more requests its user may send."""
    return int(answer.headers["ratelimit"].rpartition(";r=")[2].partition(";")[0])


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("headers", [(), ("X-Forwarded-For: 192.0.2.7",), ("Origin: https://a.example",)], ids=["", "nginx", "page"])
def test_the_same_answer(stage: Owners, monkeypatch: pytest.MonkeyPatch, name: str, headers: tuple[str, ...]) -> None:
    is_nginxs = bool(headers) and "Forwarded" in headers[0]
    other = stage.ask(name, "X-Request-Id: mine", *headers)
    assert other.body == (b"" if is_nginxs else LARGE if name == "large" else SMALL) and other.headers["x-request-id"] == "mine"
    assert ("x-accel-redirect" in other.headers) == is_nginxs
    assert stage.passed_on == (1 if name == "large" and not is_nginxs else 0)  # that is not sent in one turn
    before = stage.passed_on
    monkeypatch.setattr(express.Express, "ask", lambda *_: None)
    one = stage.ask(name, *headers)
    assert stage.passed_on == before + 1
    assert is_same(one, other, VARYING) and one.body == other.body and left(one) == left(other) - 1


def test_it_is_told_alike(stage: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [("small",), ("large",), ("small", "X-Forwarded-For: 192.0.2.7")]
    for each in asked:
        stage.ask(each[0], "X-Request-Id: mine", *each[1:])
    until(lambda: len(stage.told) == 3)
    monkeypatch.setattr(express.Express, "ask", lambda *_: None)
    for each in asked:
        stage.ask(each[0], "X-Request-Id: mine", *each[1:])
    until(lambda: len(stage.told) == 6)
    told = [{key: value for key, value in each.items() if key != "began"} | {"client": each["client"][0]} for each in stage.told]
    assert told[:3] == told[3:]
    assert [facts["bytes_out"] for facts in told[:3]] == [len(SMALL), len(LARGE), 0]
    assert [facts["client"] for facts in told[:3]] == ["127.0.0.1", "127.0.0.1", "192.0.2.7"]
    for facts in told:
        assert (facts["route"], facts["principal"], facts["user_id"], facts["status"]) == (ROUTE, "api_key", "ada", 200)
        assert facts["path"] in [f"/api/files/{each}/download" for each in stage.ids.values()]


def test_what_asks_for_more_goes_the_ordinary_way(stage: Owners) -> None:
    lines = "".join(f"{line}\r\n" for line in stage.request("small").decode().split("\r\n")[1:-2])
    target = f"/api/files/{stage.ids['small']}/download"
    for asked, status in (
        (f"HEAD {target} HTTP/1.1\r\n{lines}\r\n", 200),
        (f"GET {target}?disposition=attachment HTTP/1.1\r\n{lines}\r\n", 200),
        (f"GET {target}/ HTTP/1.1\r\n{lines}\r\n", 404),
        (f"GET {target} HTTP/1.0\r\n{lines}Connection: keep-alive\r\n\r\n", 200),
        (f"GET {target} HTTP/1.1\r\n{lines}Range: bytes=0-0\r\n\r\n", 206),
        (f"GET {target} HTTP/1.1\r\n{lines}If-None-Match: *\r\n\r\n", 304),
        (f"GET {target} HTTP/1.1\r\n{lines}Content-Length: 3\r\n\r\nabc", 200),
        (f"GET {target} HTTP/1.1\r\n{lines}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200),
        (f"GET {target} HTTP/1.1\r\n{lines}X-User-Id: ada\r\n\r\n", 400),
        (f"GET {target} HTTP/1.1\r\n{lines}Authorization: Bearer x\r\n\r\n", 401),
        (f"GET /api/files/{'x' * 36}/download HTTP/1.1\r\n{lines}\r\n", 404),
    ):
        before = stage.passed_on
        with closing(stage.connect()) as client, client.makefile("rb") as stream:
            client.sendall(asked.encode())
            assert (reply(stream, to_head=asked.startswith("HEAD")).status, stage.passed_on) == (status, before + 1), asked
            client.sendall(stage.request("small"))
            assert "HTTP/1.0" in asked or reply(stream).body == SMALL
    with closing(stage.connect()) as client, client.makefile("rb") as stream:
        before = stage.passed_on
        client.sendall(stage.request("small", "Connection: close"))
        answer = reply(stream)
        assert (answer.body, answer.headers["connection"], stream.read(), stage.passed_on) == (SMALL, "close", b"", before + 1)


def test_answers_come_in_the_order_of_their_requests(stage: Owners) -> None:
    """To a client that reads late, of owners, of links and of everything else."""
    with stage.server.client("ada") as ada:
        url = link(ada, stage.ids["small"])
    names = ["small", "large", "small", "small", "large", "small"] * 3
    with closing(stage.connect(receive_buffer_bytes=16_384)) as client, client.makefile("rb") as stream:
        asked = [stage.request(name) + request(stage.server, url) + request(stage.server, "/health/live") for name in names]
        client.sendall(b"".join(asked))
        until(lambda: stage.told)
        for name in names:
            assert reply(stream).body == (LARGE if name == "large" else SMALL)
            assert reply(stream).body == SMALL
            assert reply(stream).status == 200
    until(lambda: len(stage.told) == 3 * len(names))
    sizes = [each["bytes_out"] for each in stage.told if each["route"] == ROUTE]
    assert sizes == [len(LARGE) if name == "large" else len(SMALL) for name in names]


def test_a_row_is_asked_for_once_whatever_the_way(stage: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = Gathering.soon

    def noting(gathering: Any, key: Any) -> Any:
        asked.append(key)
        return real(gathering, key)

    monkeypatch.setattr(Gathering, "soon", noting)
    for name in ("small", "large"):
        assert stage.ask(name).status == 200
    monkeypatch.setattr(Volume, "open_at_once", lambda *_: None)  # as where nothing of the file is in memory
    assert stage.ask("small").body == SMALL and stage.passed_on == 2
    assert asked == [("ada", UUID(stage.ids[name])) for name in ("small", "large", "small")]


def test_what_is_not_there_or_not_theirs_is_refused_and_counted_once(stage: Owners) -> None:
    with stage.server.client("bob") as bob:
        theirs = stored(bob, SMALL)
    remaining = left(stage.ask("small"))
    for place, name in enumerate((theirs, str(uuid4()), theirs), start=1):
        answer = stage.ask(name)
        assert (answer.status, left(answer)) == (404, remaining - place)
    assert stage.passed_on == 3
    until(lambda: len(stage.told) == 4)
    assert [each["status"] for each in stage.told] == [200, 404, 404, 404]


def test_what_another_process_does_is_seen_by_the_next_download(stage: Owners) -> None:
    def disposition() -> str:
        return stage.ask("small").headers["content-disposition"]

    with stage.server.client("ada") as ada:
        for name in ("one.png", "two.png"):
            ada.patch(f"/api/files/{stage.ids['small']}", json={"file_name": name}).raise_for_status()
            assert disposition() == f'inline; filename="{name}"'
        ada.put(f"/api/files/{stage.ids['small']}/content", content=image(10_000, seed=3)).raise_for_status()
        assert stage.ask("small").body == image(10_000, seed=3) and stage.passed_on == 0
        execute(stage.server.database_url, "update user_files set damaged_at = now() where id = $1", UUID(stage.ids["small"]))
        assert stage.ask("small").status == 410
        execute(stage.server.database_url, "update user_files set damaged_at = null where id = $1", UUID(stage.ids["small"]))
        assert stage.ask("small").status == 200
        ada.delete(f"/api/files/{stage.ids['small']}").raise_for_status()
        assert stage.ask("small").status == 404


def test_a_file_that_is_missing_or_short_is_damaged(stage: Owners) -> None:
    (path,) = [each for each in stage.server.stored_paths() if each.name.startswith(stage.ids["small"])]
    os.truncate(path, len(SMALL) - 1)
    assert stage.ask("small").status == 410
    path.unlink()
    assert stage.ask("small").status == 410


def as_another(stage: Owners, credentials: str) -> bytes:
    return stage.request("small").replace(stage.server.api_key.encode(), credentials.encode())


@pytest.mark.parametrize(
    ("restrictions", "status"),
    [
        ({"scopes": [Scope.FILES_WRITE.value]}, 403),
        ({"kinds": ["video"]}, 404),
        ({"kinds": ["image"]}, 200),
        ({"user_ids": ["bob"]}, 403),
        ({"networks": [ip_network("192.0.2.0/24")]}, 403),
        ({"networks": [ip_network("127.0.0.0/8")]}, 200),
    ],
)
def test_keys_are_good_for_what_they_are_good_for(
    stage: Owners, caplog: pytest.LogCaptureFixture, restrictions: dict[str, Any], status: int
) -> None:
    """However often they were seen."""
    asked = as_another(stage, new_key(stage.server.database_url, **restrictions).text)
    for _ in range(3):
        answer = stage.send(asked)
        assert answer.status == status
        assert status == 200 or SMALL not in answer.body
    assert stage.passed_on == 3
    assert caplog.text.count("used outside of its networks") == (3 if status == 403 and "networks" in restrictions else 0)


def test_a_key_ends(stage: Owners) -> None:
    key = new_key(stage.server.database_url)
    asked = as_another(stage, key.text)
    assert [stage.send(asked).status for _ in range(2)] == [200, 200] and stage.passed_on == 1
    execute(stage.server.database_url, "update api_keys set expires_at = now() where key_id = $1", key.key_id)
    until(lambda: stage.send(asked).status == 401)  # after `api_key_cache_seconds`


def test_a_users_own_token(server: RunningServer) -> None:
    issuer = Issuer(SigningKey("ES256", "one"))
    trusted = TokenIssuer(issuer=issuer.url, jwks_url=issuer.jwks_url, algorithms=("ES256",))
    with server.client("ada") as ada, serving_here(settings_of(server, token_issuers=(trusted,))) as here:
        stage = Owners(server, here, ids={"small": stored(ada, SMALL)})
        hers, bobs = (issuer.token(sub=user_id) for user_id in ("ada", "bob"))
        assert [stage.send(as_another(stage, hers)).body for _ in range(3)] == [SMALL] * 3 and stage.passed_on == 1
        for _ in range(3):
            assert stage.send(as_another(stage, bobs)).status == 403  # the request says that it is ada's
            assert stage.send(as_another(stage, bobs).replace(b"X-User-Id: ada", b"X-User-Id: bob")).status == 404
            assert stage.send(as_another(stage, hers[:-2] + "xx")).status == 401
        assert stage.passed_on == 10
    issuer.down()


def test_limits_hold(server: RunningServer) -> None:
    with server.client("limited") as limited:
        file_id = stored(limited, SMALL)
    settings = settings_of(server, rate_per_user=Rate(6, 3600))
    with serving_here(settings) as here:
        stage = Owners(server, here, ids={"small": file_id})
        asked = stage.request("small").replace(b"X-User-Id: ada", b"X-User-Id: limited")
        answers = [stage.send(asked) for _ in range(9)]
        assert [each.status for each in answers] == [200] * 6 + [429] * 3
        assert [left(each) for each in answers] == [5, 4, 3, 2, 1, 0, 0, 0, 0]
        assert stage.passed_on == 4  # the first, whose key was not known, and the refused


class Held:
    """Rows that come when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[Callable[[File | None], object]] = []
        self.rows: list[File | None] = []
        real = FileLookups.owned_soon

        def soon(lookups: FileLookups, user_id: str, file_id: UUID) -> "asyncio.Future[File | None]":
            loop = asyncio.get_running_loop()
            held: asyncio.Future[File | None] = loop.create_future()
            real(lookups, user_id, file_id).add_done_callback(lambda found: self.rows.append(found.result()))
            self.waiting.append(lambda row: loop.call_soon_threadsafe(held.set_result, row))
            return held

        monkeypatch.setattr(FileLookups, "owned_soon", soon)

    def settle(self, *, found: bool) -> None:
        """The first that waits gets its row, or none."""
        row = until(lambda: self.rows).pop(0)
        self.waiting.pop(0)(row if found else None)


def test_a_file_waits_for_the_answers_before_it(stage: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which lie in memory, for a client that reads late."""
    protocols, buffered = connected(monkeypatch), []
    send_now = express.ExpressProtocol.send_now

    def noting(protocol: Any, *arguments: Any) -> Any:
        buffered.append(protocol.transport.get_write_buffer_size())
        return send_now(protocol, *arguments)

    monkeypatch.setattr(express.ExpressProtocol, "send_now", noting)
    held = Held(monkeypatch)
    with closing(stage.connect(receive_buffer_bytes=8_192)) as client, client.makefile("rb") as stream:
        until(lambda: protocols)
        protocols[0].transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        client.sendall(request(stage.server, "/schema/openapi.json") + stage.request("small"))
        until(lambda: held.waiting)
        assert protocols[0].transport.get_write_buffer_size() > 0
        held.settle(found=True)
        until(lambda: stage.passed_on == 2)
        assert reply(stream).status == 200 and reply(stream).body == SMALL and buffered == []
        client.sendall(stage.request("small"))
        until(lambda: held.waiting)
        held.settle(found=True)
        assert reply(stream).body == SMALL and buffered == [0]


def test_while_the_row_is_awaited_the_request_is_in_flight(stage: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = Metrics.started

    def started(metrics: Metrics) -> None:
        counted.append(1)
        real(metrics)

    monkeypatch.setattr(Metrics, "started", started)
    held = Held(monkeypatch)
    with closing(stage.connect()) as client, client.makefile("rb") as stream:
        client.sendall(stage.request("small"))
        until(lambda: held.waiting)
        assert (len(counted), stage.told) == (1, [])
        held.settle(found=False)
        assert reply(stream).body == SMALL  # the application asked once more
    until(lambda: stage.told)
    assert (len(counted), len(stage.told), stage.passed_on) == (1, 1, 1)


def test_a_database_that_is_away_is_told(stage: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def away(_: Database, sql: str, *arguments: Any, **named: Any) -> Any:
        if "wanted_id" in sql:
            asked.append(arguments[0])
        raise DatabaseUnavailable

    remaining = left(stage.ask("small"))
    monkeypatch.setattr(Database, "read", away)
    answer = stage.ask("small")
    assert (answer.status, left(answer), asked) == (503, remaining - 1, [("ada",)])


def test_a_client_that_leaves_before_the_row_is_there(stage: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with closing(stage.connect()) as client:
        client.sendall(stage.request("large"))
        until(lambda: held.waiting)
    held.settle(found=False)
    (facts,) = until(lambda: list(stage.told))
    assert (facts["status"], facts["bytes_out"]) in ((499, 0), (200, 0))
    monkeypatch.undo()
    assert stage.ask("small").body == SMALL


def test_a_server_that_stops_says_so(stage: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    protocols = connected(monkeypatch)
    held = Held(monkeypatch)
    with closing(stage.connect()) as client, client.makefile("rb") as stream:
        client.sendall(stage.request("small"))
        until(lambda: held.waiting)
        (protocol,) = protocols
        protocol.loop.call_soon_threadsafe(protocol.shutdown)
        until(lambda: protocol._is_stopping)
        held.settle(found=False)
        answer = reply(stream)
        assert (answer.body, answer.headers["connection"], stream.read()) == (SMALL, "close", b"")


@pytest.mark.parametrize("place", ["is_resident", "nginx_sends", "admit_at_once"])
def test_what_cannot_be_answered_at_once_goes_the_ordinary_way(
    stage: Owners, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    remaining = left(stage.ask("small"))
    monkeypatch.setattr(express, place, lambda *_: 1 / 0)
    answer = stage.ask("small")
    assert (answer.body, left(answer), stage.passed_on) == (SMALL, remaining - 1, 1)
    assert "ZeroDivisionError" in caplog.text


def test_reads_that_are_recorded_go_the_ordinary_way(server: RunningServer) -> None:
    with server.client("ada") as ada:
        file_id = stored(ada, SMALL)
    with serving_here(settings_of(server, audit_reads=True)) as here:
        stage = Owners(server, here, ids={"small": file_id})
        for _ in range(3):
            assert stage.ask("small").body == SMALL
        assert stage.passed_on == 3
    recorded = execute(
        server.database_url, "select count(*) from audit_log where action = 'file.downloaded' and file_id = $1", UUID(file_id)
    )
    assert recorded[0]["count"] == 3
