"""`coffer status` and `coffer top` tell what is, whatever is missing."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from ops import cli, machine, status, top
from ops.top import Counters, Moment
from server.commands.failures import Exit
from server.ledger.overview import Jobs, UploadUnderWay
from tests.ops.conftest import store
from tests.serving import RunningServer, execute
from tests.waiting import until


@pytest.fixture
def served(server: RunningServer, monkeypatch: pytest.MonkeyPatch, database: str) -> RunningServer:
    """A server where the settings say."""
    monkeypatch.setenv("COFFER_PORT", str(server.port))
    monkeypatch.setenv("COFFER_VOLUME_RESERVE_BYTES", str(2**20))
    monkeypatch.setattr(machine, "has_systemd", lambda: False)
    return server


def test_one_line_of_json_tells_all(served: RunningServer, database_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    store(served, "ada", 3, size_bytes=1_000)
    store(served, "eve", 1, size_bytes=500)
    execute(database_url, "update user_files set damaged_at = now() where user_id = 'eve'")
    capfd.readouterr()
    assert cli.run(["status", "--json"]) == Exit.OK
    told = json.loads(capfd.readouterr().out)
    assert (told["server"], told["address"]) == ("ready", served.url)
    assert told["stored"] == {"users": 2, "files": 4, "total_bytes": 3_500, "reserved_bytes": 0}
    assert [(each["mount"], each["state"]) for each in told["volumes"]] == [(str(served.volume), "open")]
    assert told["previews"] == {"waiting": 4, "failed": 0}
    assert sum(told["jobs"].values()) == 4
    assert told["damaged_files"] == 1
    assert told["database"]["pending_migrations"] == 0


def test_one_screen_tells_people(served: RunningServer, capfd: pytest.CaptureFixture[str]) -> None:
    store(served, "ada", 2, size_bytes=1_000)
    capfd.readouterr()
    assert cli.run(["status"]) == Exit.OK
    screen = capfd.readouterr().out
    assert len(screen.splitlines()) < 24
    assert f"server    ready at {served.url}" in screen
    assert "stored    2 files, 2.0 KiB, 1 users" in screen
    assert f"volume    {served.volume}: open" in screen


def test_it_tells_what_it_can_without_server_and_database(
    database: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    monkeypatch.setenv("COFFER_PORT", "1")
    assert cli.run(["status", "--json"]) == Exit.OK
    told = json.loads(capfd.readouterr().out)
    assert (told["server"], told["database"], told["stored"]) == ("away", None, None)
    assert cli.run(["status"]) == Exit.OK
    assert "database  away: The database is not available." in capfd.readouterr().out
    assert cli.run(["top", "--seconds", "0.1", "--count", "1"]) == Exit.OK
    screen = capfd.readouterr().out
    assert "The server does not answer." in screen and "The database does not answer." in screen


@pytest.mark.parametrize(
    ("age", "text"), [(timedelta(minutes=5), "5 min ago"), (timedelta(hours=5), "5 h ago"), (timedelta(days=5), "5 days ago")]
)
def test_ages(age: timedelta, text: str) -> None:
    now = datetime.now(UTC)
    assert status._ago(now, now - age) == text


def test_an_upload_under_way_is_seen(served: RunningServer, database_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with served.client("ada") as client:
        created = client.post("/api/tus/", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "5000000", "Upload-Metadata": ""})
        assert created.status_code == 201, created.text
    until(lambda: execute(database_url, "select count(*) from uploads")[0][0] == 1)
    capfd.readouterr()
    assert cli.run(["top", "--seconds", "0.1", "--count", "2"]) == Exit.OK
    screens = capfd.readouterr().out
    assert screens.count("Uploads under way: 1") == 2
    assert "4.8 MiB" in screens and "resumable" in screens
    assert "/metrics" in screens  # its own request, of the look before


def moment(at: float, counters: Counters | None) -> Moment:
    return Moment(at, counters, ([UploadUnderWay("ada", 2**20, 3.0, "link", True)], 7), [Jobs("queued", 5, 60.0)])


def test_rates_are_differences() -> None:
    route = ("/api/files", "GET")
    before = moment(10, Counters({route: 100}, {route: 1.0}, 0, 2**20, 0))
    now = moment(12, Counters({route: 140, ("/f", "GET"): 2}, {route: 1.2}, 2 * 2**20, 5 * 2**20, 3))
    screen = list(top.lines(before, now))
    assert "21 requests/s, 3 under way, 1.0 MiB/s in, 2.0 MiB/s out" in screen
    assert any(line.split() == ["GET", "/api/files", "20.0/s", "5.0", "ms"] for line in screen)
    assert "Jobs: 5 queued (oldest 60 s)" in screen
    assert "Uploads under way: 7" in screen
    assert any("link, waits" in line for line in screen)


def test_a_server_that_began_anew_has_no_rates_yet() -> None:
    route = ("/api/files", "GET")
    screen = list(top.lines(moment(10, Counters({route: 100}, {}, 5, 5, 0)), moment(11, Counters({route: 1}, {}, 0, 0, 1))))
    assert "1 requests under way; the server has just been started" in screen


@pytest.mark.parametrize("wrong", ["0", "soon", "-1", "99999"])
def test_a_wrong_pace_is_refused(wrong: str, database: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(["top", "--seconds", wrong])
    assert stopped.value.code == Exit.USAGE
