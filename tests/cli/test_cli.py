"""The `coffer` command, run as a person or a script runs it."""

import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from server import cli, errors
from server.commands.failures import MEANING, Exit, code_of
from server.commands.output import printable
from server.errors import CofferError
from server.settings import Settings, variable
from tests.samples import image, video
from tests.serving import RunningServer

USER = "üser/1"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Coffer = Callable[..., Done]


@pytest.fixture
def coffer(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Coffer:
    """Runs `coffer` against a server of this test's own, in a directory of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in list(os.environ):
        if name.startswith(("COFFER_", "DATABASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COFFER_URL", server.url)
    monkeypatch.setenv("COFFER_API_KEY", server.api_key)
    monkeypatch.setenv("COFFER_USER", USER)
    monkeypatch.setenv("DATABASE_URL", server.database_url)

    def run(*arguments: str, **environment: str) -> Done:
        capfd.readouterr()
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            try:
                code = cli.run(arguments)
            except SystemExit as stopped:  # argparse
                code = int(stopped.code or 0)
        return Done(code, *capfd.readouterr())

    return run


def uploaded(coffer: Coffer, path: Path, *options: str) -> str:
    done = coffer("upload", str(path), "--json", *options)
    assert done.returncode == 0, done.stderr
    file_id: str = json.loads(done.stdout)["id"]
    return file_id


def test_a_file_goes_up_is_listed_comes_back_and_goes(coffer: Coffer, tmp_path: Path) -> None:
    path = tmp_path / "Ein Bild ü.png"
    path.write_bytes(image(3_000_000))
    file_id = uploaded(coffer, path, "--tags", "a,b", "--package-name", "p")
    (listed,) = coffer("ls", "--json").stdout.splitlines()
    assert json.loads(listed) | {"file_name": path.name, "tags": ["a", "b"], "package_name": "p"} == json.loads(listed)
    assert path.name in coffer("ls", "--type", "image", "--tag", "a").stdout
    assert coffer("ls", "--type", "video").stdout == ""
    assert coffer("get", file_id).returncode == 0
    assert (tmp_path / "here" / path.name).read_bytes() == path.read_bytes()
    assert coffer("get", file_id).returncode == Exit.REFUSED
    assert coffer("get", file_id, "--force", "-o", str(tmp_path / "elsewhere")).returncode == 0
    rehearsed = coffer("rm", file_id)
    assert (rehearsed.returncode, "Nothing was changed" in rehearsed.stderr) == (0, True)
    assert coffer("ls").stdout != ""
    assert coffer("rm", file_id, "--for-real").stdout.split() == [file_id]
    assert coffer("rm", file_id, "--for-real").returncode == Exit.NOT_FOUND
    assert coffer("get", file_id).returncode == Exit.NOT_FOUND
    assert coffer("ls").stdout == ""
    assert [each.name for each in (tmp_path / "here").iterdir()] == [path.name]


def test_ls_follows_the_pages(coffer: Coffer, tmp_path: Path) -> None:
    paths = []
    for number in range(60):
        paths.append(tmp_path / f"{number:02}.png")
        paths[-1].write_bytes(image(200, seed=number))
    assert coffer("upload", *map(str, paths)).returncode == 0
    names = [json.loads(line)["file_name"] for line in coffer("ls", "--json", "--sort", "name").stdout.splitlines()]
    assert names == [path.name for path in paths]
    assert len(coffer("ls", "--limit", "55").stdout.splitlines()) == 55
    for limit in ("0", "-1", "many", "1.5"):
        refused = coffer("ls", "--limit", limit)
        assert (refused.returncode, "--limit: say a whole number from 1" in refused.stderr) == (Exit.USAGE, True)


def test_ls_filters_by_favorite_and_date(coffer: Coffer, server: RunningServer, tmp_path: Path) -> None:
    stored = []
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image(200, seed=number))
        stored.append(uploaded(coffer, tmp_path / f"{number}.png"))

    def listed(*options: str) -> list[str]:
        done = coffer("ls", "--json", "--sort", "created", *options)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["id"] for line in done.stdout.splitlines()]

    with server.client(USER) as client:
        client.post(f"/api/files/{stored[1]}/favorite")
        moment = client.get(f"/api/files/{stored[1]}").json()["upload_date"]
    assert listed("--favorite") == [stored[1]]
    assert listed("--since", moment) == stored[1:]
    assert listed("--until", moment) == stored[:1]
    elsewhere = datetime.fromisoformat(moment).astimezone(timezone(timedelta(hours=5))).isoformat()
    assert listed("--since", elsewhere, "--until", "2999-12-31") == stored[1:]  # its + arrives as one
    for option in ("--since", "--until"):
        refused = coffer("ls", option, "yesterday")
        assert (refused.returncode, f"{option}: say a date" in refused.stderr) == (Exit.USAGE, True)


def test_one_bad_file_does_not_keep_the_others_back(coffer: Coffer, tmp_path: Path) -> None:
    good, text = tmp_path / "good.mp4", tmp_path / "text.mp4"
    good.write_bytes(video())
    text.write_text("just text")
    done = coffer("upload", "/nonexistent", str(text), str(tmp_path), str(good))
    assert done.returncode == Exit.NOT_FOUND
    assert len(done.stdout.splitlines()) == 1
    assert "unsupported_type" in done.stderr


def test_a_refused_upload_says_why(coffer: Coffer, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image(3_000_000))
    assert coffer("user", "set-quota", USER, "1MiB").returncode == 0
    done = coffer("upload", str(path))
    assert done.returncode == Exit.REFUSED
    assert "quota_exceeded" in done.stderr
    assert "needed_bytes: 3000000" in done.stderr


def test_a_name_that_is_a_path_is_not_written_to(coffer: Coffer, server: RunningServer, tmp_path: Path) -> None:
    names = ("../outside", "/tmp/x", "..", ".profile")
    with server.client(USER) as client:
        ids = [client.post("/api/files/upload", params={"name": name}, content=image()).json()["id"] for name in names]
    for file_id in ids:
        assert coffer("get", file_id).returncode == Exit.REFUSED
    assert coffer("get", ids[0], "-o", "-").returncode == 0


def test_a_terminal_sees_progress_and_no_control_characters(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image(1_000_000))
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    os.set_blocking(outer, False)
    environment = {"COFFER_URL": server.url, "COFFER_API_KEY": server.api_key, "COFFER_USER": USER, "PATH": os.defpath, "TERM": "xterm"}
    command = [sys.executable, "-m", "server.cli", "upload", str(path)]
    done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, stderr=inner, timeout=30)
    seen = os.read(outer, 100_000)
    os.close(inner)
    os.close(outer)
    assert done.returncode == 0
    assert b"a.png" in seen
    assert b"0.00/977k" in seen
    assert printable("a\x1b[2Jb\u202ec") == "a\\x1b[2Jb\\u202ec"


def test_keys(coffer: Coffer) -> None:
    made = json.loads(coffer("key", "create", "an app", "--scope", "files:read", "--json").stdout)
    assert coffer("ls", COFFER_API_KEY=made["key"]).returncode == 0
    assert coffer("rm", made["key_id"].ljust(36, "0"), "--for-real", COFFER_API_KEY=made["key"]).returncode == Exit.USAGE
    assert "an app" in coffer("key", "list").stdout
    assert made["key"] not in coffer("key", "list", "--json").stdout
    assert coffer("key", "revoke", made["key_id"]).returncode == 0
    assert coffer("ls", COFFER_API_KEY=made["key"]).returncode == 0
    assert coffer("key", "revoke", made["key_id"], "--for-real").returncode == 0
    assert json.loads(coffer("key", "list", "--json").stdout.splitlines()[-1])["revoked_at"]
    assert coffer("key", "revoke", "unknown").returncode == Exit.NOT_FOUND


def test_keys_with_restrictions(coffer: Coffer) -> None:
    options = "--scope files:read --scope links:write --user ada --user bob --kind image --network 10.0.0.0/8 --network 2001:db8::/32"
    made = json.loads(coffer("key", "create", "k", *options.split(), "--expires", "90d", "--json").stdout)
    assert made["scopes"] == ["files:read", "links:write"]
    assert (made["user_ids"], made["kinds"], made["networks"]) == (["ada", "bob"], ["image"], ["10.0.0.0/8", "2001:db8::/32"])
    until_end = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=89) < until_end < timedelta(days=91)
    listed = coffer("key", "list").stdout
    for word in ("ada,bob", "image", "10.0.0.0/8,2001:db8::/32", "last_used_at", "expires_at"):
        assert word in listed
    assert coffer("ls", COFFER_API_KEY=made["key"]).returncode == Exit.REFUSED  # not from here
    for wrong in ("--network 10.0.0.1/8", "--network x", "--expires 90", "--expires 9999d", "--expires -1d", "--kind text", "--scope all"):
        assert coffer("key", "create", "k", *wrong.split()).returncode == Exit.USAGE, wrong
    for wrong in ("--user ada", "--kind image"):
        assert coffer("key", "create", "k", "--scope", "admin", *wrong.split()).returncode == Exit.USAGE, wrong


def test_a_rotated_key_works_on_for_the_overlap(coffer: Coffer) -> None:
    old = json.loads(coffer("key", "create", "app", "--user", USER, "--expires", "90d", "--json").stdout)
    new = json.loads(coffer("key", "rotate", old["key_id"], "--overlap", "24h", "--json").stdout)
    assert {name: new[name] for name in ("name", "scopes", "user_ids", "kinds")} == {
        name: old[name] for name in ("name", "scopes", "user_ids", "kinds")
    }
    assert timedelta(days=89) < datetime.fromisoformat(new["expires_at"]) - datetime.now(UTC) < timedelta(days=91)
    for key in (old, new):
        assert coffer("ls", COFFER_API_KEY=key["key"]).returncode == 0
    ends = json.loads(coffer("key", "list", "--json").stdout.splitlines()[1])["expires_at"]
    assert timedelta(hours=23) < datetime.fromisoformat(ends) - datetime.now(UTC) <= timedelta(hours=24)
    assert coffer("key", "rotate", new["key_id"], "--overlap", "0s", "--json").returncode == 0
    assert coffer("key", "rotate", new["key_id"]).returncode == Exit.REFUSED
    assert coffer("key", "rotate", "unknown").returncode == Exit.NOT_FOUND


def test_users(coffer: Coffer, server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image(1_000))
    uploaded(coffer, path)
    shown = json.loads(coffer("user", "show", USER, "--json").stdout)
    assert shown | {"total_bytes": 1_000, "file_count": 1, "by_type": {"image": {"file_count": 1, "total_bytes": 1_000}}} == shown
    assert json.loads(coffer("user", "set-quota", "new", "unlimited", "--json").stdout)["max_bytes"] is None
    assert json.loads(coffer("user", "set-quota", "new", "2GiB", "--json").stdout)["max_bytes"] == 2 * 2**30
    assert [json.loads(line)["user_id"] for line in coffer("user", "list", "--json").stdout.splitlines()] == ["new", USER]
    assert coffer("user", "delete", USER).returncode == 0
    assert len(server.stored_paths()) == 1
    assert coffer("user", "delete", USER, "--for-real").returncode == 0
    assert server.stored_paths() == []
    for command in ("show", "delete"):
        assert coffer("user", command, USER).returncode == Exit.NOT_FOUND


def test_volumes(coffer: Coffer, server: RunningServer, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    assert coffer("volume", "init", str(second)).returncode == 0
    listed = [json.loads(line) for line in coffer("volume", "list", "--json").stdout.splitlines()]
    assert [(line["mount_path"], line["state"]) for line in listed] == [(str(server.volume), "open"), (str(second), "open")]
    assert coffer("volume", "init", str(second)).returncode == 0
    assert coffer("volume", "reopen", listed[1]["id"]).returncode == 0
    (second / ".coffer-volume").unlink()
    assert coffer("volume", "init", str(second)).returncode == Exit.REFUSED
    assert coffer("volume", "init", str(tmp_path / "nowhere")).returncode == Exit.NOT_FOUND


def test_config_tells_every_setting_and_no_secret(coffer: Coffer, server: RunningServer) -> None:
    done = coffer("config", "--json")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["variable"] for line in told] == [variable(each.name) for each in fields(Settings)]
    assert all(line["meaning"] for line in told)
    assert told[0]["source"] == "DATABASE_URL"
    assert server.database_url not in done.stdout
    wrong = coffer("config", COFFER_PORT="many")
    assert (wrong.returncode, "COFFER_PORT" in wrong.stderr) == (Exit.USAGE, True)


NO_DATABASE_URLS = (
    "garbage",
    "localhost/x",
    "mysql://a:b@127.0.0.1/x",
    "postgresql://a:secret/x@127.0.0.1/x",
    "postgresql://a:p@secret@127.0.0.1/x",
    "postgresql://127.0.0.1:many/x",
    "postgresql://127.0.0.1:99999/x",
    "postgresql://a,b:x/y",
    "postgresql://[::1/x",
)


def test_a_database_url_that_is_none_names_its_variable(coffer: Coffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL")
    for url in NO_DATABASE_URLS:
        (tmp_path / "url").write_text(url)
        for name, value in (("COFFER_DATABASE_URL", url), ("DATABASE_URL", url), ("DATABASE_URL_FILE", str(tmp_path / "url"))):
            for command in ("migrate", "user list", "config"):
                done = coffer(*command.split(), **{name: value})
                assert done.returncode == Exit.USAGE, (url, done)
                assert f"coffer: {name}: say postgresql://" in done.stderr
                assert "secret" not in done.stderr and "garbage" not in done.stderr


def test_a_database_url_that_is_missing_or_empty(coffer: Coffer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "coffer: DATABASE_URL is empty" in coffer("user", "list", DATABASE_URL="").stderr
    monkeypatch.delenv("DATABASE_URL")
    missing = coffer("user", "list")
    assert (missing.returncode, "COFFER_DATABASE_URL (or DATABASE_URL) is not set" in missing.stderr) == (Exit.USAGE, True)


def test_database_urls_that_postgresql_takes() -> None:
    for url in (
        "postgres://h/x",
        "postgresql:///x?host=/run/postgresql",
        "postgresql://a:p%2Fw@[::1]:5432/x",
        "postgresql://a@h1:1,h2:2/x?sslmode=require",
        "postgresql://h",
        "postgresql://",
    ):
        assert Settings.load({"DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("url", ["", "garbage", "127.0.0.1:3001", "ftp://h", "http://", "http://[::1", "http://h:many", "http://h:99999"])
def test_a_server_url_that_is_none_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    monkeypatch.setenv("COFFER_API_KEY", "cof_some")
    monkeypatch.setenv("COFFER_URL", url)
    assert cli.run(["ls", "--user", "ada"]) == Exit.USAGE
    assert "coffer: COFFER_URL: say where" in capsys.readouterr().err


def test_migrate_without_a_database_to_migrate(coffer: Coffer, database_url: str) -> None:
    for url in (database_url + "_missing", "postgresql://nobody@127.0.0.1:1/x", database_url + "?sslmode=nonsense"):
        done = coffer("migrate", DATABASE_URL=url)
        assert (done.returncode, "Traceback" in done.stderr) == (Exit.UNAVAILABLE, False), done.stderr


def test_migrate_says_when_there_is_nothing_to_do(coffer: Coffer, empty_database_url: str) -> None:
    first = coffer("migrate", DATABASE_URL=empty_database_url)
    assert first.stdout.splitlines()[0].startswith("0001_") and "current" not in first.stderr
    again = coffer("migrate", DATABASE_URL=empty_database_url)
    assert (again.returncode, again.stdout, "the schema is current" in again.stderr) == (0, "", True)


def test_exit_codes(coffer: Coffer) -> None:
    nobody = "postgresql://a:b@127.0.0.1:1/x"
    for arguments, environment, code in (
        ("", {}, Exit.USAGE),
        ("user set-quota u 10apples", {}, Exit.USAGE),
        ("user show " + 256 * "x", {}, Exit.USAGE),
        ("user list", {"DATABASE_URL": ""}, Exit.USAGE),
        ("user list", {"DATABASE_URL": nobody}, Exit.UNAVAILABLE),
        ("migrate", {"DATABASE_URL": nobody}, Exit.UNAVAILABLE),
        ("migrate", {}, Exit.OK),
        ("ls", {"COFFER_URL": "http://127.0.0.1:1"}, Exit.UNAVAILABLE),
        ("ls", {"COFFER_API_KEY": ""}, Exit.USAGE),
        ("ls", {"COFFER_USER": ""}, Exit.USAGE),
        ("ls", {"COFFER_API_KEY": "cof_wrong"}, Exit.REFUSED),
    ):
        done = coffer(*arguments.split(), **environment)
        assert done.returncode == code, (arguments, environment, done)


def test_a_server_that_cannot_start_fails(database_url: str) -> None:
    command = [sys.executable, "-m", "server.cli", "serve"]
    environment = {"DATABASE_URL": database_url, "COFFER_HOST": "192.0.2.1", "COFFER_LINK_KEYS": 43 * "k", "PATH": os.defpath}
    assert subprocess.run(command, env=environment, check=False, capture_output=True, timeout=30).returncode == Exit.FAILURE


def test_every_exit_code_is_documented_and_every_error_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    shown = capsys.readouterr().out
    for code in Exit:
        assert MEANING[code] in shown
    for error in {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, CofferError)}:
        assert code_of(error.__new__(error)) is not Exit.OK
