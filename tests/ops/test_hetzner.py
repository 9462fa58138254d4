"""`coffer hetzner` against a cloud of real HTTP and real disks: what it orders, mounts and grows, and that it goes on after anything."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ops import disks, hetzner
from ops.disks import Place
from server.commands.failures import CommandFailed, Exit
from tests.ops.conftest import Told, Tool
from tests.ops.hetzner_cloud import TOKEN, HetznerCloud, Refusal
from tests.recovery.disks import why_no_disks
from tests.samples import image
from tests.serving import ServerFactory, execute
from tests.waiting import until

GIB = 2**30
REAL = "--for-real"


@pytest.fixture
def cloud(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HetznerCloud]:
    if why_not := why_no_disks():
        pytest.skip(why_not)
    directory = tmp_path / "cloud"
    directory.mkdir()
    cloud = HetznerCloud(directory)
    monkeypatch.setenv("COFFER_HETZNER_URL", cloud.url)
    monkeypatch.setenv("COFFER_HETZNER_TOKEN", TOKEN)
    monkeypatch.setattr(hetzner, "_POLL_SECONDS", 0.01)
    yield cloud
    for name in reversed([line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]):
        if name.startswith(str(tmp_path)):
            subprocess.run(["umount", "--lazy", name], check=False)
    cloud.close()
    for bare in (tmp_path / "mounts").glob("*"):
        subprocess.run(["chattr", "-i", bare], check=False)


class Operator:
    """A sysadmin of media-1 whose fstab, units and mounts are in a directory of the test's own."""

    def __init__(self, tool: Tool, cloud: HetznerCloud, directory: Path) -> None:
        self._tool = tool
        self._cloud = cloud
        self.fstab = directory / "fstab"
        self.fstab.write_text("# static\nUUID=1 / ext4 errors=remount-ro 0 1\n")
        self.units = directory / "units"
        self.mounts = directory / "mounts"
        self.mounts.mkdir()

    def mount(self, name: str) -> Path:
        return self.mounts / name

    def __call__(self, command: str, name: str | None, *more: str, server: str = "media-1") -> Told:
        arguments = [command, *([name] if name else []), "--server", server, "--devices", str(self._cloud.devices)]
        arguments += ["--fstab", str(self.fstab), "--units", str(self.units)]
        if command != "grow" and "--mount" not in more:
            arguments += ["--mount", str(self.mount(str(name)))]
        return self._tool("hetzner", *arguments, *more)


@pytest.fixture
def operator(tool: Tool, cloud: HetznerCloud, tmp_path: Path) -> Operator:
    return Operator(tool, cloud, tmp_path)


def steps(told: Told) -> list[str]:
    return [each["step"] for each in told.findings if "step" in each]


def volume_rows(database_url: str) -> list[str]:
    return [row["mount_path"] for row in execute(database_url, "select mount_path from volumes")]


def is_mounted(path: Path) -> bool:
    return os.path.ismount(path)


# Creating


def test_rehearsing_says_what_it_costs_and_does_nothing(operator: Operator, cloud: HetznerCloud, database: str) -> None:
    told = operator("create", "media", "--size-gb", "100")
    assert told.code == Exit.OK
    assert "100 GB more cost 4.40 EUR a month (5.24 with VAT); all 100 GB" in told.stderr
    assert len(steps(told)) == 4 and cloud.writes() == [] and cloud.volumes == {}
    assert volume_rows(database) == [] and not operator.mount("media").exists() and "media" not in operator.fstab.read_text()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_new_volume_is_formatted_mounted_and_stored_on(
    operator: Operator, cloud: HetznerCloud, database: str, start_server: ServerFactory, kind: str
) -> None:
    told = operator("create", "media", "--size-gb", "10", "--fs", kind, REAL)
    assert told.code == Exit.OK, told.stderr
    mount, device = operator.mount("media"), cloud.device("media")
    assert disks.mounted_at(device) == (mount, kind)
    assert cloud.writes() == ["POST /volumes"] and cloud.named("media")["labels"] == {"coffer": "volume"}
    options = next(line.split()[3] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(mount)).split(",")
    assert {"noatime", "nodev", "nosuid", "noexec"} <= set(options)
    if kind == "ext4":
        assert "Remount read-only" in subprocess.run(["tune2fs", "-l", device], capture_output=True, text=True, check=True).stdout
    assert volume_rows(database) == [str(mount)]
    server = start_server(volume=mount)
    with server.client("ada") as client:
        assert client.post("/api/files/upload", content=image()).status_code == 201
    server.stop()


def test_the_volume_is_given_to_the_account_of_the_server(operator: Operator, cloud: HetznerCloud) -> None:
    assert operator("create", "media", "--size-gb", "10", "--owner", "nobody-at-all", REAL).code == Exit.USAGE
    assert cloud.volumes == {}
    assert operator("create", "media", "--size-gb", "10", "--owner", "daemon", REAL).code == Exit.OK
    mount = operator.mount("media")
    assert {path.owner() for path in (mount, mount / ".coffer-volume", mount / "incoming", mount / "users")} == {"daemon"}


def test_the_bare_mountpoint_takes_nothing(operator: Operator, cloud: HetznerCloud) -> None:
    operator("create", "media", "--size-gb", "10", REAL)
    mount = operator.mount("media")
    subprocess.run(["umount", mount], check=True)
    with pytest.raises(PermissionError):
        (mount / "users").mkdir()
    assert operator("create", "media", REAL).code == Exit.OK and is_mounted(mount)


def test_fstab_and_unit_say_the_same(operator: Operator, cloud: HetznerCloud) -> None:
    operator("create", "media", "--size-gb", "10", REAL)
    mount, device = operator.mount("media"), cloud.device("media")
    first, second, line = operator.fstab.read_text().splitlines()
    assert (first, second) == ("# static", "UUID=1 / ext4 errors=remount-ro 0 1")
    what, where, kind, options, _, passes = line.split()
    assert (what, where, kind, passes) == (str(device), str(mount), "ext4", "2") and "nofail" in options
    name = subprocess.run(["systemd-escape", "--path", "--suffix=mount", mount], capture_output=True, text=True, check=True).stdout.strip()
    unit = operator.units / name
    text = unit.read_text()
    assert f"What={what}\nWhere={where}\nType={kind}\nOptions={options}\n" in text
    assert (operator.units / "multi-user.target.wants" / name).resolve() == unit
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "Unknown" not in verified.stderr and "Invalid" not in verified.stderr and "doesn't match" not in verified.stderr
    before = (operator.fstab.stat().st_ino, unit.stat().st_ino)
    operator("create", "media", REAL)
    assert (operator.fstab.stat().st_ino, unit.stat().st_ino) == before  # nothing to write anew


@pytest.mark.parametrize("path", ["/srv/coffer/a-b", "/.hidden/.x", "/mnt/ü b", "/a//b/"])
def test_units_have_the_names_that_systemd_takes(path: str) -> None:
    name = subprocess.run(["systemd-escape", "--path", "--suffix=mount", path], capture_output=True, text=True, check=True).stdout.strip()
    assert Place(Path(path)).unit.name == name


class Crashed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_every_step_may_be_the_last_before_a_crash(
    operator: Operator, cloud: HetznerCloud, database: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    left = 0

    def crashing(real: Any) -> Any:
        """Crashes in the place of the n-th change, whichever it is."""

        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Crashed
            return real(*arguments, **named)

        return step

    for where, name in (
        (hetzner.Cloud, "create"),
        (disks, "_write"),
        (disks, "_run"),
        (disks, "_tell_systemd"),
        (hetzner, "register_volume"),
        (hetzner, "_give_to"),
    ):
        monkeypatch.setattr(where, name, crashing(getattr(where, name)))
    crashes = 0
    for when in range(1, 40):
        left, volume = when, f"media-{when}"
        try:
            operator("create", volume, "--size-gb", "10", "--fs", kind, REAL)
        except Crashed:
            crashes += 1
        else:
            break
        again = operator("create", volume, "--size-gb", "10", "--fs", kind, REAL)
        assert again.code == Exit.OK, again.stderr
        assert disks.mounted_at(cloud.device(volume)) == (operator.mount(volume), kind)
        assert volume_rows(database)[-1] == str(operator.mount(volume))
        subprocess.run(["umount", operator.mount(volume)], check=True)
    assert crashes == 9  # the order, mkfs, chattr, fstab, the unit, systemd, mount, the volume's row, its owner
    assert len(cloud.volumes) == crashes + 1 == operator.fstab.read_text().count("scsi-0HC")


def test_an_order_whose_answer_was_lost_is_found_again(operator: Operator, cloud: HetznerCloud) -> None:
    cloud.faults.append(("POST /volumes", "drop"))
    lost = operator("create", "media", "--size-gb", "10", REAL)
    assert (lost.code, len(cloud.volumes)) == (Exit.UNAVAILABLE, 1) and "run the same command again" in lost.stderr
    assert operator("create", "media", "--size-gb", "10", REAL).code == Exit.OK
    assert len(cloud.volumes) == 1 and is_mounted(operator.mount("media"))


def test_a_busy_cloud_is_waited_for(operator: Operator, cloud: HetznerCloud) -> None:
    cloud.faults.append(("POST /volumes", Refusal(429, "rate_limit_exceeded", "limit of 3600 requests per hour reached")))
    assert operator("create", "media", "--size-gb", "10", REAL).code == Exit.OK
    assert cloud.writes() == ["POST /volumes"] * 2 and len(cloud.volumes) == 1


def test_an_action_that_failed_is_told_and_made_up_for(operator: Operator, cloud: HetznerCloud) -> None:
    cloud.faults.append(("attach_volume", "fail"))
    failed = operator("create", "media", "--size-gb", "10", REAL)
    assert failed.code == Exit.FAILURE and "Action failed" in failed.stderr
    assert operator("create", "media", REAL).code == Exit.OK
    assert cloud.writes() == ["POST /volumes", "POST /volumes/ID/actions/attach"] and is_mounted(operator.mount("media"))


# What is refused


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Refusal(401, "unauthorized"), Exit.USAGE),
        (Refusal(403, "resource_limit_exceeded", "volume limit reached"), Exit.REFUSED),
        (Refusal(412, "no_space_left_in_location"), Exit.REFUSED),
        (Refusal(503, "unavailable"), Exit.UNAVAILABLE),
        (Refusal(423, "locked"), Exit.UNAVAILABLE),
    ],
)
def test_refusals_of_the_cloud_have_their_codes(operator: Operator, cloud: HetznerCloud, fault: Refusal, code: Exit) -> None:
    cloud.faults.append(("POST /volumes", fault))
    told = operator("create", "media", "--size-gb", "10", REAL)
    assert (told.code, cloud.volumes) == (code, {}) and fault.code in told.stderr and TOKEN not in told.stderr


def test_without_a_token_or_with_a_wrong_one_nothing_is_done(
    operator: Operator, cloud: HetznerCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COFFER_HETZNER_TOKEN", "wrong")
    wrong = operator("create", "media", "--size-gb", "10", REAL)
    monkeypatch.delenv("COFFER_HETZNER_TOKEN")
    missing = operator("create", "media", "--size-gb", "10", REAL)
    assert (wrong.code, missing.code) == (Exit.USAGE, Exit.USAGE) and "COFFER_HETZNER_TOKEN" in missing.stderr


@pytest.mark.parametrize("name", ["../etc", ".a", "a-", "a b", "a/b", "a" * 65])
def test_names_that_are_none(operator: Operator, cloud: HetznerCloud, name: str) -> None:
    assert operator("create", name, "--size-gb=10", REAL).code == Exit.USAGE
    assert cloud.writes() == []


@pytest.mark.parametrize("size", ["9", "10241", "-1"])
def test_sizes_that_are_not_sold(operator: Operator, cloud: HetznerCloud, size: str) -> None:
    assert operator("create", "media", f"--size-gb={size}", REAL).code == Exit.REFUSED
    assert cloud.writes() == []


def test_more_than_the_limit_is_not_spent(operator: Operator, cloud: HetznerCloud) -> None:
    assert operator("create", "media", "--size-gb", "100", "--max-eur", "5.23", REAL).code == Exit.REFUSED
    assert cloud.volumes == {}
    assert operator("create", "media", "--size-gb", "10", "--max-eur", "0.53", REAL).code == Exit.OK
    more = operator("create", "other", "--size-gb", "10", "--max-eur", "1.04", REAL)  # both together cost 1.0472
    assert more.code == Exit.REFUSED and len(cloud.volumes) == 1
    cloud.currency = "USD"
    assert operator("create", "other", "--size-gb", "10", "--max-eur", "100", REAL).code == Exit.REFUSED


def test_volumes_of_others_are_left_alone(operator: Operator, cloud: HetznerCloud) -> None:
    operator("create", "media", "--size-gb", "10", REAL)
    cloud.named("media")["labels"] = {}
    for command in ("create", "attach", "detach", "grow"):
        told = operator(command, "media", REAL)
        assert (told.code, "was not made by Coffer" in told.stderr) == (Exit.REFUSED, True), command
    cloud.named("media")["labels"] = {"coffer": "volume"}
    assert operator("attach", "media", REAL, server="media-2").code == Exit.REFUSED  # it is at media-1
    assert operator("detach", "media", REAL, server="media-2").code == Exit.REFUSED
    assert operator("create", "media", "--size-gb", "10", server="media-3").code == Exit.NOT_FOUND
    assert operator("attach", "nothing", REAL).code == Exit.NOT_FOUND


def test_nothing_is_formatted_that_holds_something(operator: Operator, cloud: HetznerCloud) -> None:
    operator("create", "media", "--size-gb", "10", REAL)
    operator("detach", "media", REAL)
    operator("attach", "media", REAL)
    device = cloud.device("media")
    subprocess.run(["umount", operator.mount("media")], check=True)
    subprocess.run(["wipefs", "--all", "--quiet", device], check=True)
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    refused = operator("create", "media", REAL)
    assert refused.code == Exit.REFUSED and "swap" in refused.stderr
    with pytest.raises(CommandFailed, match="swap"):
        disks.make_file_system(device, "ext4")
    subprocess.run(["wipefs", "--all", "--quiet", device], check=True)
    assert operator("attach", "media", REAL).code == Exit.REFUSED  # it only mounts
    assert disks.file_system_of(device) is None


def test_nothing_is_hidden_by_a_mount(operator: Operator, cloud: HetznerCloud) -> None:
    operator.mount("media").mkdir()
    (operator.mount("media") / "photos").write_text("dear to somebody")
    told = operator("create", "media", "--size-gb", "10", REAL)
    assert told.code == Exit.REFUSED and "not empty" in told.stderr and not is_mounted(operator.mount("media"))
    assert cloud.volumes == {} and "scsi" not in operator.fstab.read_text()


def test_another_line_for_the_mountpoint_is_not_replaced(operator: Operator, cloud: HetznerCloud) -> None:
    other = f"/dev/sdz {operator.mount('media')} ext4 defaults 0 2\n"
    operator.fstab.write_text(other)
    told = operator("create", "media", "--size-gb", "10", REAL)
    assert told.code == Exit.REFUSED and operator.fstab.read_text() == other


# Detaching and attaching


def test_a_volume_moves_with_its_files(operator: Operator, cloud: HetznerCloud, database: str, start_server: ServerFactory) -> None:
    operator("create", "media", "--size-gb", "10", REAL)
    mount = operator.mount("media")
    server = start_server(volume=mount)
    with server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=image()).json()["id"]
        busy = operator("detach", "media", REAL)
        assert (busy.code, is_mounted(mount)) == (Exit.REFUSED, True) and "stop Coffer" in busy.stderr
        server.stop()
        assert operator("detach", "media").code == Exit.OK and is_mounted(mount)  # rehearsed
        assert operator("detach", "media", REAL).code == Exit.OK and not is_mounted(mount)
        assert cloud.named("media")["server"] is None
        assert "scsi" not in operator.fstab.read_text() and list(operator.units.glob("*.mount")) == []
        assert operator("detach", "media", REAL).code == Exit.OK  # again
        elsewhere = operator.mounts / "elsewhere"
        assert operator("attach", "media", "--mount", str(elsewhere), REAL).code == Exit.OK
        assert volume_rows(database) == [str(elsewhere)]
        server.start()
        assert client.get(f"/api/files/{file_id}/download").content == image()
        server.stop()


# Growing


def fill(mount: Path, percent_free: float) -> None:
    facts = os.statvfs(mount)
    size = int(facts.f_bavail * facts.f_frsize - facts.f_blocks * facts.f_frsize * percent_free / 100)
    subprocess.run(["fallocate", "--length", str(size), mount / "ballast"], check=True)


def test_a_volume_grows_under_a_server_once_it_is_nearly_full(operator: Operator, cloud: HetznerCloud, start_server: ServerFactory) -> None:
    operator("create", "media", "--size-gb", "10", "--fs", "xfs", REAL)
    mount = operator.mount("media")
    server = start_server(volume=mount)
    with server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=image()).json()["id"]
        fine = operator("grow", None, "--when-free-below", "20", REAL)
        assert fine.summary["grown_volumes"] == 0, fine.stderr
        fill(mount, 10)
        rehearsed = operator("grow", None, "--when-free-below", "20")
        assert "from 10 to 20 GB" in steps(rehearsed)[0] and cloud.named("media")["size"] == 10
        assert "all 20 GB of Coffer's volumes then 0.88 EUR" in rehearsed.stderr
        told = operator("grow", None, "--when-free-below", "20", REAL)
        assert told.code == Exit.OK, told.stderr
        assert (told.summary["grown_volumes"], told.summary["size_gb"]) == (1, 20)
        assert size_of(mount) > 19 * GIB
        again = operator("grow", None, "--when-free-below", "20", REAL)
        assert again.summary["grown_volumes"] == 0, again.stderr
        assert client.get(f"/api/files/{file_id}/download").content == image()
        assert client.post("/api/files/upload", content=image(2_000, 1)).status_code == 201
    server.stop()


def size_of(mount: Path) -> int:
    facts = os.statvfs(mount)
    return facts.f_blocks * facts.f_frsize


def may_enlarge_mounted_ext4() -> bool:
    """Linux asks for CAP_SYS_RESOURCE (capability 24), which containers often have not; for XFS it asks for none but that of mounting."""
    capabilities = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(capabilities.split()[1], 16) >> 24 & 1)


def test_ext4_grows_or_says_why_not(operator: Operator, cloud: HetznerCloud) -> None:
    operator("create", "media", "--size-gb", "10", REAL)
    mount, device = operator.mount("media"), cloud.device("media")
    told = operator("grow", "media", REAL)
    assert cloud.named("media")["size"] == 20
    if may_enlarge_mounted_ext4():
        assert told.code == Exit.OK, told.stderr
    else:
        assert told.code == Exit.FAILURE and "Permission denied to resize" in told.stderr
        subprocess.run(["umount", mount], check=True)
        subprocess.run(["e2fsck", "-f", "-p", device], check=True, capture_output=True)
        disks.grow(device, mount, "ext4")
        assert operator("attach", "media", REAL).code == Exit.OK
    assert size_of(mount) > 19 * GIB
    assert operator("grow", "media", "--when-free-below", "20", REAL).summary["grown_volumes"] == 0


def test_what_was_bought_and_not_used_is_used_before_more_is_bought(operator: Operator, cloud: HetznerCloud) -> None:
    operator("create", "media", "--size-gb", "10", "--fs", "xfs", REAL)
    mount = operator.mount("media")
    fill(mount, 10)
    cloud.faults.append(("GET /actions", "drop"))
    lost = operator("grow", "media", "--when-free-below", "20", "--add-gb", "15", REAL)
    assert lost.code == Exit.UNAVAILABLE and size_of(mount) < 11 * GIB
    told = operator("grow", "media", "--when-free-below", "20", "--add-gb", "15", REAL)
    assert told.code == Exit.OK, told.stderr
    assert (told.summary["grown_volumes"], cloud.named("media")["size"]) == (0, 25)
    assert size_of(mount) > 24 * GIB
    assert [each for each in cloud.writes() if "resize" in each] == ["POST /volumes/ID/actions/resize"]


def test_growth_has_limits(operator: Operator, cloud: HetznerCloud) -> None:
    operator("create", "media", "--size-gb", "10", REAL)
    assert operator("grow", "media", "--add-gb", "10", "--max-eur", "1", REAL).code == Exit.REFUSED
    assert operator("grow", "media", "--add-gb", "20000", REAL).code == Exit.REFUSED
    assert operator("grow", None, REAL).code == Exit.USAGE
    assert cloud.named("media")["size"] == 10
    subprocess.run(["umount", operator.mount("media")], check=True)
    away = operator("grow", None, "--when-free-below", "50", REAL)
    assert (away.code, [each.get("kind") for each in away.findings]) == (Exit.FOUND, ["volume"])


# A volume for one user, and one in the place of another


def test_a_volume_is_made_for_one_user(
    operator: Operator, cloud: HetznerCloud, tool: Tool, database: str, start_server: ServerFactory
) -> None:
    assert operator("create", "shared", "--size-gb", "10", REAL).code == Exit.OK
    server = start_server(volume=operator.mount("shared"))
    with server.client("ada") as ada, server.client("bob") as bob:
        before = ada.post("/api/files/upload", content=image()).json()["id"]  # placed where there was room
        rehearsed = operator("create", "adas", "--size-gb", "10", "--for-user", "ada")
        assert rehearsed.code == Exit.OK and steps(rehearsed)[-1].endswith("for user 'ada' alone")
        assert operator("create", "adas", "--size-gb", "10", "--for-user", "ada", REAL).code == Exit.OK
        assert operator("create", "adas", "--for-user", "ada", REAL).code == Exit.OK  # once more
        until(lambda: len(ada.get("/health/ready").json()["volumes"]) == 2)
        assert bob.post("/api/files/upload", content=image(2_000, 1)).status_code == 201
        assert tool("rebalance", "--for-real", "--keep-old", "0").code == Exit.OK
        assert ada.get(f"/api/files/{before}/download").content == image()
        placed = execute(
            database, "select distinct f.user_id, v.mount_path from user_files f join volumes v on v.id = f.volume_id order by 1"
        )
        assert [(row["user_id"], row["mount_path"]) for row in placed] == [
            ("ada", str(operator.mount("adas"))),
            ("bob", str(operator.mount("shared"))),
        ]
    server.stop()


def test_a_second_volume_for_a_user_is_not_ordered(operator: Operator, cloud: HetznerCloud, database: str) -> None:
    assert operator("create", "adas", "--size-gb", "10", "--for-user", "ada", REAL).code == Exit.OK
    for for_real in ([], [REAL]):
        refused = operator("create", "other", "--size-gb", "10", "--for-user", "ada", *for_real)
        assert refused.code == Exit.REFUSED and "reserved for user 'ada'" in refused.stderr
    assert len(cloud.volumes) == 1 and len(volume_rows(database)) == 1


def test_an_empty_volume_takes_the_place_of_a_lost_one(
    operator: Operator, cloud: HetznerCloud, tool: Tool, database: str, start_server: ServerFactory
) -> None:
    operator("create", "media", "--size-gb", "10", "--for-user", "ada", REAL)
    row = execute(database, "select * from volumes")[0]
    replace = ["--size-gb", "10", "--replace", str(row["id"])]
    there = operator("create", "media-2", *replace, REAL)
    assert there.code == Exit.REFUSED and "can be read" in there.stderr
    assert operator("create", "media-2", "--size-gb", "10", "--replace", str(UUID(int=1)), REAL).code == Exit.NOT_FOUND
    subprocess.run(["umount", operator.mount("media")], check=True)
    assert operator("create", "media-2", *replace, "--for-user", "bob", REAL).code == Exit.REFUSED
    assert len(cloud.volumes) == 1
    execute(database, "update volumes set state = 'read_only'")  # as after the I/O error that was its last
    assert "in the place" in steps(operator("create", "media-2", *replace))[-1] and len(cloud.volumes) == 1
    assert operator("create", "media-2", *replace, REAL).code == Exit.OK
    assert operator("create", "media-2", *replace, REAL).code == Exit.OK  # as after a crash
    now = execute(database, "select * from volumes")
    assert [(each["id"], each["mount_path"], each["state"], each["reserved_for"]) for each in now] == [
        (row["id"], str(operator.mount("media-2")), "open", "ada")
    ]
    assert len(cloud.volumes) == 2
    server = start_server(volume=operator.mount("media-2"))
    with server.client("ada") as client:
        assert client.post("/api/files/upload", content=image()).status_code == 201
    server.stop()
    # What holds anything is no empty disk, and what is another volume not this one.
    for name in ("garbage", "other"):
        operator.mount(name).mkdir()
    (operator.mount("garbage") / "users").mkdir()
    assert tool("volume", "init", str(operator.mount("other"))).code == Exit.OK
    subprocess.run(["umount", operator.mount("media-2")], check=True)
    for name in ("garbage", "other"):
        assert tool("volume", "init", str(operator.mount(name)), "--replace", str(row["id"])).code == Exit.REFUSED, name
    bare = tool("volume", "init", str(operator.mount("media-2")), "--replace", str(row["id"]))
    assert bare.code == Exit.REFUSED and "Is it mounted?" in bare.stderr
    assert volume_rows(database)[0] == str(operator.mount("media-2"))
