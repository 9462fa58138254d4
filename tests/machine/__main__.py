"""`make try-install`: installs Coffer on this machine as a sysadmin would, uses, breaks and upgrades it, and takes it away again.

For a machine to throw away: an empty Debian with systemd (a virtual machine, or a container that boots), as root. It is in two parts, with
a reboot between them; started again after the reboot, it goes on with the second. One line for each step; exit code 1 when one fails.
Nothing but Python's standard library is used, for that is what an empty machine has.
"""

import json
import os
import re
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.machine.doors import Doors
from tests.machine.load import KEPT, Failed, Load, Server, picture

CHECKOUT = Path(__file__).resolve().parents[2]
STATE = Path("/var/lib/coffer-tried.json")
"""What the second part must find: in root's hands, for it holds a key."""
SERVICES = ("coffer-api.service", "coffer-worker.service")
TOOLS = ("audit", "scrub", "backup", "drill", "purge", "usage")
MOST_EXPOSED = {"coffer-api.service": 15, "coffer-worker.service": 20}
"""Tenths, as `systemd-analyze security` counts them."""
CODE = ("server", "ops", "sql", "systemd", "Makefile", "README.md", "pyproject.toml", "requirements.lock")
"""What a release is made of (ops/install.sh)."""
NOT_CODE = shutil.ignore_patterns(".git", ".venv", ".coffer", "__pycache__")


def install() -> str:
    """On the empty machine, as the README has it, with a certificate of the test's own in the place of one from the internet."""
    live = Path("/etc/letsencrypt/live/media.example.com")
    live.mkdir(parents=True, exist_ok=True)
    certificate = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 90 -subj /CN=media.example.com "
        f"-addext subjectAltName=DNS:media.example.com -keyout {live}/privkey.pem -out {live}/fullchain.pem"
    )
    script = re.sub(r"^certbot .*$", certificate, readme("production").replace(" certbot\n", "\n"), flags=re.MULTILINE)
    command("bash", "-euo", "pipefail", "-c", script)
    since = {each: show(each, "ActiveEnterTimestampMonotonic") for each in SERVICES}
    make("install")
    assert since == {each: show(each, "ActiveEnterTimestampMonotonic") for each in SERVICES}, "a second installation restarted something"
    for each in (*SERVICES, "coffer-api.socket", "coffer.target"):
        assert show(each, "ActiveState") == "active", each
    for name in ("database_url", "link_keys"):
        mode = Path("/etc/coffer/credentials", name).stat().st_mode & 0o777
        assert mode == 0o600, f"{name} has mode {mode:o}"
    command("systemctl", "start", "nginx")  # where packages start nothing by themselves
    command("coffer", "edge", "check")
    with Path("/etc/hosts").open("a") as hosts:
        hosts.write("127.0.0.1 media.example.com\n")
    context = ssl.create_default_context(cafile=live / "fullchain.pem")

    as_ada = {"Authorization": f"Bearer {new_key()}", "X-User-Id": "ada", "Content-Type": "application/octet-stream"}

    def ask(url: str, body: bytes | None = None, **headers: str) -> bytes:
        request = urllib.request.Request(url, body, as_ada | headers)  # noqa: S310 - an address of this function
        with urllib.request.urlopen(request, context=context, timeout=60) as answer:  # noqa: S310
            content: bytes = answer.read()
            return content

    address, content = "https://media.example.com/api/files", picture(10, 10)
    stored = json.loads(ask(f"{address}/upload?name=a.png", content))
    assert ask(f"{address}/{stored['id']}/download") == content
    link = json.loads(ask(f"{address}/{stored['id']}/link", b"{}", **{"Content-Type": "application/json"}))["url"]
    assert link.startswith("https://media.example.com/f/")
    as_ada.clear()
    assert ask(link) == content
    return "by the README's commands, again without a change; an upload, its download and its link by TLS"


def install_previous() -> str:
    """The version before this one, from nothing: this one's database, settings and files go for good."""
    make("uninstall")
    command("runuser", "-u", "postgres", "--", "psql", "-qc", "drop database coffer", "-c", "drop role coffer")
    for each in ("/etc/coffer", "/var/lib/coffer"):
        shutil.rmtree(each)
    before, name = previous()
    make("install", before)
    return name


def change() -> str:
    """Settings that somebody wrote are taken up by the next installation, an address too, and nothing is written over."""
    settings = Path("/etc/coffer/coffer.env")
    before, text = main_process(), settings.read_text()
    server = remembered()[0]
    settings.write_text(f"{text}COFFER_STOP_GRACE_SECONDS=60\n")
    make("install")
    assert main_process() != before
    assert "COFFER_STOP_GRACE_SECONDS=60" in Path(f"/proc/{main_process()}/environ").read_text()
    settings.write_text(f"{text}COFFER_PORT=3099\n")
    make("install")
    Server(server.host, 3099, server.api_key).get("/api/files")
    settings.write_text(text)
    make("install")
    server.get("/api/files")
    assert settings.read_text() == text
    return "a setting, and the address and back"


def use() -> str:
    key = new_key()
    server = Server("127.0.0.1", 3001, key)
    content = picture(800, 600)
    stored = server.upload(content)
    assert server.get(f"/api/files/{stored['id']}/download") == content
    waited = json.loads(server.get(f"/api/files/{stored['id']}?wait=preview&links=1"))
    assert waited["width"] == 800, waited
    # The jail, whole, within the confinement of the unit.
    lacking = sorted(
        set(re.findall(r'"missing":"([a-z ]+)"', log_of("coffer-worker.service")))
    )  # a container may refuse some of it; a machine does not
    STATE.touch(mode=0o600)
    STATE.write_text(json.dumps({"key": key, "file": stored["id"], "boot": boot_id()}))
    return f"a picture stored, shown, and its preview made in a jail{f' without {lacking}' if lacking else ''}"


def doors() -> str:
    """They work within the unit, also for several processes, and leave no error in the logs."""
    for processes in (1, 2):
        setting = Path("/run/systemd/system/coffer-api.service.d/processes.conf")
        setting.parent.mkdir(parents=True, exist_ok=True)
        setting.write_text(f"[Service]\nEnvironment=COFFER_PROCESSES={processes}\n")
        try:
            command("systemctl", "daemon-reload")
            command("systemctl", "restart", "coffer-api.service")
            tried = Doors(Server("127.0.0.1", 3001, new_key("jobs:write")))
            tried.resumable()
            tried.links()
            tried.previews()
            tried.job()
            tried.metrics(of_one_process=processes == 1)
            errors = [line for each in SERVICES for line in log_of(each).splitlines() if '"level":"error"' in line]
            assert not errors, errors
        finally:
            shutil.rmtree(setting.parent)
    command("systemctl", "daemon-reload")
    command("systemctl", "restart", "coffer-api.service")
    return "resumable uploads, links, previews of a picture and a film, a sheet, a job, metrics; by one process and by two"


def log_of(unit: str) -> str:
    """What the service has written since it was started."""
    return command("journalctl", f"_SYSTEMD_INVOCATION_ID={show(unit, 'InvocationID')}", "--output", "cat")


def confinement() -> str:
    told = []
    for unit, most in MOST_EXPOSED.items():
        lines = command("systemd-analyze", "security", "--no-pager", f"--threshold={most}", unit)
        told.append(f"{unit} {re.findall(r': ([0-9.]+) ', lines)[-1]}")
    assert "openat2" not in log_of("coffer-api.service")
    return ", ".join(told)


def timers() -> str:
    for tool in TOOLS:
        assert show(f"coffer-{tool}.timer", "ActiveState") == "active", tool
    soon = Path("/run/systemd/system/coffer-audit.timer.d/soon.conf")
    soon.parent.mkdir(parents=True)
    soon.write_text("[Timer]\nOnActiveSec=1s\nRandomizedDelaySec=0\nAccuracySec=1s\n")
    before = show("coffer-audit.service", "ExecMainStartTimestampMonotonic")
    try:
        command("systemctl", "daemon-reload")
        command("systemctl", "restart", "coffer-audit.timer")
        until(lambda: show("coffer-audit.service", "ExecMainStartTimestampMonotonic") != before, 60)
        until(lambda: show("coffer-audit.service", "ActiveState") == "inactive", 60)
    finally:
        shutil.rmtree(soon.parent)
        command("systemctl", "daemon-reload")
        command("systemctl", "restart", "coffer-audit.timer")
    for tool in ("scrub", "purge", "usage"):
        command("systemctl", "start", f"coffer-{tool}.service")
    for tool in ("audit", "scrub", "purge", "usage"):
        assert show(f"coffer-{tool}.service", "Result") == "success", tool
        assert Path("/var/lib/coffer/metrics", f"coffer_{tool}.prom").exists()
    return f"{', '.join(TOOLS)}; that of the audit fired, scrub, purge and usage ran"


def backups() -> str:
    """As the README has it, with a repository on this machine; backup and drill in the confinement of their units."""
    command("install", "-d", "-o", "coffer", "-g", "coffer", "-m", "750", "/var/backups/coffer")
    script = re.sub(r"sftp:\S+", "/var/backups/coffer/repository", readme("backups"))
    command("bash", "-euo", "pipefail", "-c", script)
    for tool in ("backup", "drill"):
        command("systemctl", "start", f"coffer-{tool}.service")
        assert show(f"coffer-{tool}.service", "Result") == "success", tool
    assert json.loads(command("coffer", "status", "--json"))["backups"]["proven_at"]
    server, file_id, _ = remembered()
    (stored,) = Path("/var/lib/coffer/volume/users").glob(f"*/images/{file_id}.*")
    stored.unlink()
    command("coffer", "restore", "file", file_id)
    assert server.get(f"/api/files/{file_id}/download") == picture(800, 600)
    return "made and proven by their units; a file that was gone is back"


def restored() -> str:
    """Everything, as the README has it."""
    command("coffer", "backup")
    command("bash", "-euo", "pipefail", "-c", readme("restore"))
    shutil.rmtree("/var/lib/coffer/volume.lost")
    command("coffer", "audit")
    server, file_id, _ = remembered()
    assert server.get(f"/api/files/{file_id}/download") == picture(800, 600)
    server.upload(picture(10, 10))
    return "rows, files and keys from the backup"


def administration() -> str:
    """What the README and the runbooks have root type: some of it is done as root, the rest as Coffer's account."""
    volume = Path("/srv/coffer/second/volume")
    command("install", "-d", "-o", "coffer", "-g", "coffer", "-m", "750", str(volume))
    has_edge = Path("/etc/nginx/conf.d/coffer.conf").exists()
    listed = [json.loads(line) for line in command("coffer", "volume", "init", str(volume), "--json").splitlines()]
    (volume_id,) = (each["id"] for each in listed if each["mount_path"] == str(volume))
    if has_edge:
        assert fails("coffer", "edge", "check"), "nginx does not know the new volume, and nobody says so"
        command("coffer", "edge", "install", "--for-real")
        command("coffer", "edge", "check")
    command("coffer", "volume", "verify")
    command("coffer", "volume", "drain", volume_id)
    command("coffer", "rebalance", "--for-real")
    command("coffer", "volume", "retire", volume_id, "--for-real")
    shutil.rmtree(volume.parent)
    if has_edge:
        command("coffer", "edge", "install", "--for-real")
    archive = Path.home() / "ada.tar"  # root's, where nobody else may write
    command("coffer", "user", "export", "ada", "--output", str(archive))
    with tarfile.open(archive) as exported:
        assert "index.html" in {Path(name).name for name in exported.getnames()}
    archive.unlink()
    for each in ("config", "key list", "user list", "trail", "previews list-failed", "lifecycle list", "audit", "status", "top --count 1"):
        command("coffer", *each.split())
    others = {path for path in Path("/var/lib/coffer/volume").rglob("*") if path.owner() != "coffer"}
    assert not others, f"not Coffer's own: {others}"
    looks = [json.loads(line) for line in command("coffer", "doctor", "--json").splitlines()]
    return f"a volume came and went, an export; doctor: {looks[-1]['summary']}"


def killed() -> str:
    """Requests that come while there is no server wait for the next one."""
    server = remembered()[0]
    before = main_process()
    os.kill(before, signal.SIGKILL)
    began = time.monotonic()
    for _ in range(20):
        server.get("/api/files")
    assert main_process() != before
    return f"20 requests answered, the first after {time.monotonic() - began:.1f} s in all"


def hung() -> str:
    """A server whose event loop stands still is ended by systemd's watchdog, and replaced."""
    server = remembered()[0]
    before = main_process()
    os.kill(before, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: main_process() not in (0, before), 120)
    server.get("/api/files")
    return f"replaced after {time.monotonic() - began:.0f} s"


def pace() -> str:
    """How long a list takes on a kept connection, the median of 100: `make bench` measures servers that systemd did not start."""
    told: list[str] = []
    for server in (remembered()[0], through_nginx()):
        if server is not None:
            connection, seconds = server.connect(), []
            for _ in range(100):
                began = time.perf_counter()
                server.ask(connection, "GET", "/api/files")
                seconds.append(time.perf_counter() - began)
            connection.close()
            told.append(f"{statistics.median(seconds) * 1_000:.1f} ms{' through nginx' if told else ''}")
    return ", ".join(told)


def upgrade() -> str:
    """From the version before, under load: no request fails, none has to be repeated."""
    return under_load(CHECKOUT)


def back() -> str:
    """As the runbook has it: to the release before, which is still there, and forward again."""
    now = release()
    (before,) = (each for each in Path("/opt/coffer/releases").iterdir() if each.name != Path(now).name)
    told = under_load(before)
    make("upgrade")
    assert release() == now
    return told


def under_load(source: Path) -> str:
    """`make upgrade` there, while all sorts of requests come, directly and through nginx."""
    before, site = release(), nginx_site()
    loads = [Load(server) for server in (remembered()[0], through_nginx()) if server]
    releases = set(Path("/opt/coffer/releases").glob("*/.complete"))
    with subprocess.Popen(["make", "-C", str(source), "upgrade"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as upgrading:
        if source.parent != Path("/opt/coffer/releases"):
            # Downloading packages takes minutes; what matters begins when they are there.
            until(lambda: upgrading.poll() is not None or set(Path("/opt/coffer/releases").glob("*/.complete")) - releases, 1800)
        for load in loads:
            load.start()
        try:
            told = upgrading.communicate()[0]
            time.sleep(2)
        finally:
            for load in loads:
                load.stop()
    assert upgrading.returncode == 0 and release() != before, told
    for load in loads:
        still = f"this machine stood still for {load.stood_still_seconds:.1f} s"
        assert not load.failures, f"{len(load.failures)} of {load.requests} requests failed, while {still}: {load.failures[:5]}"
        # Debian's nginx closes idle connections when it takes a new configuration (decisions/0022), and nobody else does.
        may_close = load.server.port != 3001 and nginx_site() != site
        assert load.closed_idle <= (KEPT if may_close else 0), f"{load.closed_idle} kept connections ended without an answer, while {still}"
    assert not Path("/run/systemd/system/coffer-api-standby.service").exists()
    return "; ".join(
        f"{load.requests} requests {'through nginx, ' if number else ''}none failed, the slowest {load.longest_seconds:.1f} s"
        f"{f', {load.closed_idle} sent again as nginx closed their connections' if load.closed_idle else ''}"
        for number, load in enumerate(loads)
    )


def bad_upgrade() -> str:
    """A release that does not start is not brought into use: the old server goes on."""
    before = main_process()
    broken = Path("/var/tmp/coffer-broken")
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(CHECKOUT, broken, ignore=NOT_CODE, symlinks=True)
    with (broken / "server" / "app.py").open("a") as file:
        file.write("\n\nraise RuntimeError('broken on purpose')\n")
    release_before = release()
    tried = subprocess.run(["make", "-C", str(broken), "upgrade"], capture_output=True, text=True, check=False)
    shutil.rmtree(broken)
    assert tried.returncode != 0, "the broken release was taken"
    assert main_process() == before, "the old server did not go on"
    assert release() == release_before, "the broken release stayed in use"
    remembered()[0].get("/api/files")
    return "refused, and the old server went on"


def rebooted() -> str:
    server, file_id, boot = remembered()
    assert boot != boot_id(), "this machine was not rebooted"
    for each in (*SERVICES, "coffer-api.socket", "coffer.target", "coffer-audit.timer"):
        until(lambda each=each: show(each, "ActiveState") == "active", 120)  # type: ignore[misc]
    content = server.get(f"/api/files/{file_id}/download")
    assert content == picture(800, 600)
    server.upload(picture(10, 10))
    failed = command("systemctl", "list-units", "--failed", "--no-legend", "coffer*")
    assert not failed, failed
    return "everything came back by itself, the file too"


def uninstall() -> str:
    make("uninstall")
    assert not Path("/opt/coffer").exists()
    left = [str(path) for path in Path("/usr/local/lib/systemd/system").glob("coffer*")]
    assert not left, left
    assert Path("/etc/coffer/credentials/link_keys").exists()
    make("install")
    server, file_id, _ = remembered()
    assert server.get(f"/api/files/{file_id}/download") == picture(800, 600)
    return "and installed again: the file is there"


FIRST: list[Callable[[], str]] = [
    install,
    install_previous,
    use,
    pace,
    upgrade,
    pace,
    back,
    bad_upgrade,
    change,
    doors,
    confinement,
    timers,
    backups,
    restored,
    administration,
    killed,
    hung,
]
SECOND: list[Callable[[], str]] = [rebooted, uninstall]


def main() -> int:
    if os.geteuid() != 0 or not Path("/run/systemd/system").exists():
        print("this is for root, on a machine to throw away that runs systemd", file=sys.stderr)
        return 2
    names = sys.argv[1:]
    is_second = STATE.exists() and json.loads(STATE.read_text())["boot"] != boot_id()
    steps = [each for each in FIRST + SECOND if each.__name__ in names] if names else SECOND if is_second else FIRST
    for step in steps:
        began = time.monotonic()
        try:
            print(f"{step.__name__}: {step()}  ok ({time.monotonic() - began:.0f} s)", flush=True)
        except (AssertionError, OSError, Failed, subprocess.CalledProcessError) as problem:
            print(f"{step.__name__}: {type(problem).__name__}: {problem}  FAILED", flush=True)
            if isinstance(problem, subprocess.CalledProcessError):
                print(problem.stdout, problem.stderr, sep="\n", file=sys.stderr)
            return 1
    if not names:
        print("all is well" if is_second else "now reboot this machine, and start this again")
    return 0


def new_key(*more_scopes: str) -> str:
    scopes = [word for scope in ("files:read", "files:write", "links:write", *more_scopes) for word in ("--scope", scope)]
    return str(json.loads(command("coffer", "key", "create", "try", *scopes, "--json"))["key"])


def readme(name: str) -> str:
    """The commands that stand there below that name."""
    found = re.search(rf"<!-- {name}:.*?```bash\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert found, f"the README has lost its block {name}"
    return found[1]


def make(target: str, directory: Path = CHECKOUT) -> str:
    return command("make", "-C", str(directory), target)


def command(*words: str) -> str:
    return subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()


def fails(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode != 0


def previous() -> tuple[Path, str]:
    """The version before this one, by git; or this code and a comment, where git does not know, or has nothing that can be installed."""
    before = Path("/var/tmp/coffer-previous")
    shutil.rmtree(before, ignore_errors=True)
    before.mkdir()
    commit = subprocess.run(
        ["git", "-C", str(CHECKOUT), "log", "-1", "--format=%h~1", "--", *CODE], capture_output=True, text=True, check=False
    ).stdout.strip()
    unpacked = not fails("bash", "-euo", "pipefail", "-c", f"git -C '{CHECKOUT}' archive '{commit}' | tar -x -C '{before}'")
    if unpacked and (before / "ops" / "install.sh").exists():
        return before, f"the version before, {commit}"
    shutil.rmtree(before)
    shutil.copytree(CHECKOUT, before, ignore=NOT_CODE, symlinks=True)
    with (before / "server" / "__init__.py").open("a") as file:
        file.write("# before\n")
    return before, "this code and a comment"


def show(unit: str, what: str) -> str:
    return command("systemctl", "show", unit, "--property", what, "--value")


def main_process() -> int:
    return int(show("coffer-api.service", "MainPID"))


def release() -> str:
    return str(Path("/opt/coffer/current").readlink())


def boot_id() -> str:
    """When the first process began: a container has its machine's boot id."""
    return Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]


def remembered() -> tuple[Server, str, str]:
    state: dict[str, Any] = json.loads(STATE.read_text())
    return Server("127.0.0.1", 3001, state["key"]), state["file"], state["boot"]


def through_nginx() -> Server | None:
    """The same server by way of nginx, where `make install` has found one and it speaks plain HTTP."""
    port = re.search(r"^ *listen (?:[0-9.]+:)?([0-9]+);", nginx_site(), re.MULTILINE)
    return Server("127.0.0.1", int(port[1]), remembered()[0].api_key) if port else None


def nginx_site() -> str:
    site = Path("/etc/nginx/conf.d/coffer.conf")
    return site.read_text() if site.exists() else ""


def until(predicate: Callable[[], Any], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not predicate():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s"
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
