"""`coffer doctor` finds what is wrong with a machine, says what to do, and goes on whatever is missing."""

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ops import cli, doctor, machine
from server.commands.failures import Exit
from server.vault import Volume
from tests.ops.conftest import Tool, path_of, store
from tests.serving import RunningServer, execute

pytestmark = pytest.mark.anyio

Look = Callable[[], dict[str, list[tuple[str, str]]]]


@pytest.fixture
def look(tool: Tool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Look:
    """Runs it; by check, what was seen as state and text. This machine's own installation is none of the tests' business."""
    monkeypatch.setattr(doctor, "CREDENTIALS", tmp_path / "etc" / "credentials")
    monkeypatch.setattr(doctor, "EDGE_OPTIONS", tmp_path / "edge.options")
    monkeypatch.setattr(machine, "has_systemd", lambda: False)

    def run() -> dict[str, list[tuple[str, str]]]:
        told = tool("doctor")
        seen: dict[str, list[tuple[str, str]]] = {}
        for each in told.findings:
            seen.setdefault(each["check"], []).append((each["state"], each["text"]))
        is_wrong = any(state == "wrong" for looks in seen.values() for state, _ in looks)
        assert told.code == told.summary["exit_code"] == (Exit.FOUND if is_wrong else Exit.OK)
        return seen

    return run


@pytest.fixture
def served(server: RunningServer, database: str, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server where the settings say."""
    monkeypatch.setenv("COFFER_PORT", str(server.port))
    monkeypatch.setenv("COFFER_VOLUME_RESERVE_BYTES", str(2**20))
    return server


def states(looks: list[tuple[str, str]]) -> set[str]:
    return {state for state, _ in looks}


def test_a_healthy_machine(served: RunningServer, look: Look) -> None:
    served.volume.chmod(0o750)
    seen = look()
    assert states(seen["versions"]) <= {"ok", "advice"}
    assert states(seen["volume"]) <= {"ok", "advice"}
    assert seen["server"] == [("ok", f"ready at {served.url}")]
    assert states(seen["decoders"]) == {"ok"} and len(seen["decoders"]) == 2
    assert states(seen["clamd"]) == {"ok"}
    assert "wrong" not in states(seen["mount"])


def test_settings_of_postgresql_that_break_promises(served: RunningServer, look: Look, database_url: str) -> None:
    names = ("fsync", "full_page_writes", "synchronous_commit")
    off = {name for name in names if execute(database_url, f"show {name}")[0][0] == "off"}
    found = {text.split()[0] for state, text in look()["database"] if state == "wrong"}
    assert found == off
    execute(database_url, f"alter database {database_url.rsplit('/', 1)[1]} set synchronous_commit = off")
    assert ("wrong", "synchronous_commit is off: what was acknowledged may be gone after a crash") in look()["database"]


def test_more_connections_than_postgresql_allows(served: RunningServer, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COFFER_PROCESSES", "3")
    monkeypatch.setenv("COFFER_DATABASE_CONNECTIONS", "200")
    ((state, text),) = [each for each in look()["database"] if "during an upgrade" in each[1]]
    # Three servers and the worker have 200 each, the servers three for notices, and the worker four for either queue; all of it twice.
    assert state == "advice" and text.endswith("servers and worker may want 1622 during an upgrade")


def test_migrations_that_are_not_applied(served: RunningServer, look: Look, database_url: str) -> None:
    execute(database_url, "delete from schema_migrations where name = (select max(name) from schema_migrations)")
    assert ("wrong", "1 migrations are not applied") in look()["database"]


def test_everything_else_is_looked_at_without_a_database(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    monkeypatch.setenv("COFFER_PORT", "1")
    seen = look()
    assert seen["database"] == [("wrong", "PostgreSQL does not answer")]
    assert seen["server"] == [("wrong", "nobody answers at http://127.0.0.1:1")]
    assert {"clock", "permissions", "decoders", "clamd", "nginx", "certificate"} <= set(seen)


def test_without_settings_it_says_which(database: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("DATABASE_URL")
    assert cli.run(["doctor"]) == Exit.USAGE
    assert "COFFER_DATABASE_URL" in capfd.readouterr().err


def test_people_are_told_what_to_do(served: RunningServer, look: Look, capfd: pytest.CaptureFixture[str]) -> None:
    served.volume.chmod(0o755)
    assert cli.run(["doctor"]) == Exit.FOUND
    stdout, stderr = capfd.readouterr()
    assert f"WRONG   volume       {served.volume} is open to everybody on this machine" in stdout
    assert f"-> chmod o= {served.volume}" in stdout
    assert stdout.splitlines()[-1].startswith("doctor: ")
    assert "somebody must look" in stderr


def test_a_volume_that_is_away(served: RunningServer, look: Look) -> None:
    (served.volume / ".coffer-volume").unlink()
    ((state, text),) = look()["volume"]
    assert state == "wrong" and text.startswith(f"{served.volume}: unavailable")


def test_no_volume(look: Look) -> None:
    assert look()["volume"] == [("wrong", "there is no volume")]


def test_directories_of_somebody_else(served: RunningServer, look: Look) -> None:
    assert os.geteuid() == 0, "only root gives files away"
    os.chown(served.volume / "incoming", 65534, 65534)
    text = f"{served.volume}, incoming/ and users/ belong to different accounts: who serves cannot write in all of them"
    assert ("wrong", text) in look()["volume"]


# What is left


def history(database_url: str, *changes: tuple[float, int]) -> None:
    """The store's history is these changes: how many days ago, and by how many bytes."""
    execute(database_url, "delete from usage_ledger")
    for days, delta_bytes in changes:
        statement = (
            "insert into usage_ledger (user_id, changed_at, delta_bytes, total_bytes) values ('ada', now() - $1 * interval '1 day', $2, 0)"
        )
        execute(database_url, statement, days, delta_bytes)


@pytest.mark.parametrize(
    ("days_left", "state", "told"),
    [(1000, "ok", "full in 1000 days"), (5, "advice", "full in 5 days"), (0.5, "wrong", "full within a day")],
)
def test_when_a_volume_is_full(
    served: RunningServer, look: Look, database_url: str, monkeypatch: pytest.MonkeyPatch, days_left: float, state: str, told: str
) -> None:
    store(served, "ada", 1)
    free_bytes = 2**40
    monkeypatch.setattr(Volume, "free_bytes", lambda volume: free_bytes)
    # What is older than two weeks does not count, and is the sign that there were two.
    history(database_url, (20, 2**50), (10, int(free_bytes / days_left * 10)), (3, int(free_bytes / days_left * 4)))
    ((found, text),) = look()["forecast"]
    assert (found, text.split(": ")[1].split(",")[0]) == (state, told)
    assert "at the pace of the last 14 days" in text


def test_a_pace_is_that_of_the_history_that_there_is(
    served: RunningServer, look: Look, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(served, "ada", 1)
    monkeypatch.setattr(Volume, "free_bytes", lambda volume: 150 * 2**30)
    history(database_url, (2, 2**40), (1, 3 * 2**30))
    assert look()["forecast"] == [("ok", f"{served.volume}: full in 100 days, at the pace of the last 48 h, 1.5 GiB a day")]
    history(database_url, (2, 2**40), (1, -(2**30)))
    assert look()["forecast"] == [("ok", f"{served.volume}: does not fill, at the pace of the last 48 h")]
    history(database_url, (0.1, 2**40))
    assert "forecast" not in look()  # an afternoon is no pace


def test_a_busy_store_is_judged_by_its_latest_changes(
    served: RunningServer, look: Look, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(served, "ada", 1)
    monkeypatch.setattr(doctor, "_FORECAST_FROM_CHANGES", 2)
    monkeypatch.setattr(Volume, "free_bytes", lambda volume: 150 * 2**30)
    history(database_url, (5, 2**40), (2, 2**40), (1, 3 * 2**30))
    assert look()["forecast"] == [("ok", f"{served.volume}: full in 100 days, at the pace of the last 48 h, 1.5 GiB a day")]


def test_files_that_are_damaged(served: RunningServer, look: Look, database_url: str) -> None:
    (file_id,) = store(served, "ada", 1)
    assert path_of(served, file_id).exists()
    assert "files" not in look()
    execute(database_url, "update user_files set damaged_at = now()")
    assert look()["files"] == [("wrong", "1 files are damaged")]


# fsync


def test_a_flush_that_goes_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fdatasync", lambda handle: None)
    assert doctor._flush(tmp_path).state == "wrong"
    assert list(tmp_path.iterdir()) == []


def test_a_flush_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    seen = doctor._flush(tmp_path)
    assert (seen.state, seen.text) == ("wrong", f"{tmp_path}: Input/output error")


def test_where_it_cannot_be_tried_it_says_so() -> None:
    assert doctor._flush(Path("/proc/self")).state == "unknown"


SAFE = "nosuid,nodev,noexec"


@pytest.mark.parametrize(
    ("options", "state"), [(f"{SAFE},nobarrier", "wrong"), (f"{SAFE},barrier=0", "wrong"), ("nosuid", "advice"), (SAFE, "ok")]
)
def test_options_of_the_mount(options: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = machine.Mount("/srv/one", "ext4", frozenset(options.split(",")), "8:1")
    monkeypatch.setattr(machine, "mount_of", lambda path: mount)
    assert state in {each.state for each in doctor._mount_options(Path("/srv/one/volume"))}


def shown_mount(path: Path) -> machine.Mount:
    """Not in a chroot whose own file system is mounted outside of it."""
    mount = machine.mount_of(path)
    if mount is None:
        pytest.skip(f"the kernel does not show what {path} lies on")
    return mount


def test_the_kernels_word_on_mounts(tmp_path: Path) -> None:
    mount = shown_mount(tmp_path)
    assert str(tmp_path).startswith(mount.point)
    proc = machine.mount_of(Path("/proc/self"))
    assert proc is not None and (proc.point, proc.kind) == ("/proc", "proc")


def test_a_disk_that_says_it_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown_mount(tmp_path)
    monkeypatch.setattr(machine, "disk_cache", lambda device: "write through")
    monkeypatch.setattr(doctor, "_FASTEST_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "_SLOW_FLUSH_SECONDS", 3600.0)
    assert "says it has no cache to flush" in doctor._flush(tmp_path).text


def test_the_kernels_word_on_disks() -> None:
    disks = {machine.disk_cache(each.name) for each in Path("/sys/dev/block").iterdir()}
    assert disks <= {"write back", "write through"}
    assert machine.disk_cache("0:0") is None


# Secrets, certificates, other programs


def test_secrets_that_others_can_read(served: RunningServer, look: Look) -> None:
    doctor.CREDENTIALS.mkdir(parents=True)
    secret = doctor.CREDENTIALS / "link_keys"
    secret.touch(mode=0o600)
    assert states(look()["permissions"]) == {"ok"}
    secret.chmod(0o640)
    assert look()["permissions"] == [("wrong", f"{secret} can be read by others")]


def test_settings_that_others_can_read_or_change(served: RunningServer, look: Look) -> None:
    doctor.CREDENTIALS.mkdir(parents=True)
    settings = doctor.CREDENTIALS.parent / "coffer.env"
    settings.touch()
    for mode, state in ((0o640, "ok"), (0o644, "wrong"), (0o660, "wrong")):
        settings.chmod(mode)
        assert (state == "wrong") == ("wrong" in states(look()["permissions"]))


def certificate(path: Path, name: str, life: timedelta) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now - timedelta(days=90), now + life)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(("days", "state"), [(60, "ok"), (10, "advice"), (2, "wrong"), (-1, "wrong")])
async def test_certificates_that_end(days: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "chain.pem", tmp_path / "edge.options"
    certificate(path, "media.example.com", timedelta(days=days, hours=1))
    options.write_text(f"--server-name media.example.com --certificate {path} --certificate-key /key.pem\n")
    monkeypatch.setattr(doctor, "EDGE_OPTIONS", options)
    assert [each.state async for each in doctor.certificate(None)] == [state]  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "covered"), [("media.example.com", True), ("other.example.com", False)])
@pytest.mark.parametrize("issued_to", ["media.example.com", "*.example.com"])
async def test_certificates_for_other_names(
    issued_to: str, name: str, covered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = tmp_path / "chain.pem", tmp_path / "edge.options"
    certificate(path, issued_to, timedelta(days=60))
    options.write_text(f"--server-name {name} --certificate {path}\n")
    monkeypatch.setattr(doctor, "EDGE_OPTIONS", options)
    found = [each.state async for each in doctor.certificate(None)]  # type: ignore[arg-type]
    assert ("wrong" not in found) == (covered or issued_to.startswith("*"))


def test_a_scanner_that_does_not_answer(served: RunningServer, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COFFER_CLAMD", "unix:/nonexistent/clamd.ctl")
    ((state, text),) = look()["clamd"]
    assert state == "wrong" and text.endswith("does not answer")


# The tools


def test_tools_that_failed_or_have_not_run(
    served: RunningServer, look: Look, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COFFER_METRICS_DIRECTORY", str(tmp_path))
    assert ("advice", "no run of audit is known") in look()["timers"]
    assert tool("audit").code == Exit.OK
    assert ("ok", "audit ended 0 min ago with 0") in look()["timers"]
    (file_id,) = store(served, "ada", 1)
    path_of(served, file_id).unlink()
    assert tool("audit").code == Exit.FOUND
    assert ("wrong", "audit ended 0 min ago with 6") in look()["timers"]
    (tmp_path / "coffer_backup.prom").write_text(
        f"coffer_backup_end_timestamp_seconds {datetime.now(UTC).timestamp()}\ncoffer_backup_exit_code 1\n"
    )
    assert ("wrong", "backup ended 0 min ago with 1") in look()["timers"]
    metrics = tmp_path / "coffer_scrub.prom"
    old = (datetime.now(UTC) - timedelta(days=4)).timestamp()
    metrics.write_text(f"coffer_scrub_end_timestamp_seconds {old}\ncoffer_scrub_exit_code 0\n")
    assert ("wrong", "scrub ended 4 days ago with 0") in look()["timers"]
