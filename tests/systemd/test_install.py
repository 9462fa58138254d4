"""What `make install` would do: told without root, without systemd, and without doing it. `make try-install` does it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ops" / "install.sh"


def rehearse(command: str, **environment: str) -> str:
    done = subprocess.run(
        [SCRIPT, "--rehearse", command], env=os.environ | environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def elsewhere() -> None:
    """These tests say nothing on a machine where Coffer is installed."""
    assert not Path("/opt/coffer").exists() and not Path("/etc/coffer").exists(), "run them where Coffer is not installed"


@pytest.mark.usefixtures("elsewhere")
def test_a_rehearsal_tells_everything_and_does_nothing() -> None:
    told = rehearse("install", EDGE="--server-name media.example.com")
    for path in (ROOT / "systemd").rglob("*"):
        if path.is_file() and "examples" not in path.parts:
            assert f"would write: /usr/local/lib/systemd/system/{path.relative_to(ROOT / 'systemd')}" in told
    for path_text in ("/etc/coffer/coffer.env", "/etc/coffer/credentials/link_keys", "/etc/coffer/edge.options", "/usr/local/bin/coffer"):
        assert f"would write: {path_text}" in told
    for unit in ("coffer.target", "coffer-api.socket", "coffer-api.service", "coffer-worker.service", "coffer-audit.timer"):
        assert f"would run: systemctl enable --quiet {unit}" in told
    assert not Path("/opt/coffer").exists() and not Path("/etc/coffer").exists()


@pytest.mark.usefixtures("elsewhere")
def test_a_database_elsewhere_needs_none_here_and_its_password_is_not_told() -> None:
    told = rehearse("install", DATABASE_URL="postgresql://coffer:hunter2@db.example.com/coffer")
    assert "would write: /etc/coffer/credentials/database_url" in told
    assert "hunter2" not in told and "pg_hba.conf" not in told


@pytest.mark.usefixtures("elsewhere")
def test_what_is_not_installed_is_not_upgraded() -> None:
    done = subprocess.run([SCRIPT, "--rehearse", "upgrade"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "nothing is installed here" in done.stderr


def test_without_a_command_it_explains_itself() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "install | upgrade | uninstall" in done.stdout and "set -euo" not in done.stdout


def test_services_may_write_where_the_readme_says() -> None:
    text = (ROOT / "systemd" / "coffer-.service.d" / "10-confinement.conf").read_text()
    paths = re.search(r"^ReadWritePaths=(.*)$", text, re.MULTILINE)
    assert paths is not None
    volumes = {"/var/lib/coffer", "/srv/coffer", "/mnt", "/media"}
    assert {each.lstrip("-") for each in paths[1].split()} == volumes | {"/var/lib/prometheus/node-exporter"}
    assert "Services may write below `/var/lib/coffer`, `/srv/coffer`, `/mnt` and `/media`" in (ROOT / "README.md").read_text()
