"""A volume in a directory of its own, without any database."""

from pathlib import Path

import pytest

from server.vault import Volume
from server.vault.sentinel import init_volume


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


@pytest.fixture
def volume(mount: Path) -> Volume:
    volume = Volume(init_volume(mount), mount, reserve_bytes=0)
    volume.probe()
    assert volume.state == "open"
    return volume
