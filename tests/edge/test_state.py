"""What the server tells nginx, as a file."""

from pathlib import Path

import pytest

from server.delivery.edge import write_state


def test_it_says_when_and_whose(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, {"user_b": 2, "ada": 7}, 1_000.5)
    head, *lines = path.read_text().splitlines()
    assert head.startswith("coffer-edge 1 1000.500 ") and lines == ["ada 7", "user_b 2"]
    assert path.stat().st_mode & 0o777 == 0o644
    digest = head.split()[-1]
    write_state(path, {"ada": 7, "user_b": 2}, 1_001.0)
    assert path.read_text().split("\n")[0] == f"coffer-edge 1 1001.000 {digest}"  # the same list: nginx need not read it
    write_state(path, {"ada": 8, "user_b": 2}, 1_002.0)
    assert digest not in path.read_text()


def test_who_looked_earlier_does_not_write_over_who_looked_later(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, {"ada": 8}, 1_002.0)
    later = path.read_text()
    write_state(path, {"ada": 7}, 1_001.0)
    assert path.read_text() == later


@pytest.mark.parametrize("left", [b"", b"coffer-edge 1", b"nonsense\n", b"\xff\xfe", b"coffer-edge 1 x y\n"])
def test_what_a_crash_left_is_replaced(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "state"
    path.write_bytes(left)
    (tmp_path / ".state.draft").write_bytes(left)
    write_state(path, {"ada": 1}, 5.0)
    assert path.read_text().splitlines()[1:] == ["ada 1"]


def test_where_it_cannot_be_written_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_state(tmp_path / "missing" / "state", {}, 5.0)
    assert list(tmp_path.iterdir()) == []
