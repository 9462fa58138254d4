"""Links outlive a move to another volume, and end in all places when they are revoked meanwhile."""

from pathlib import Path
from uuid import UUID

import pytest

from ops import cli
from server.commands.failures import Exit
from tests.edge.conftest import StartEdge
from tests.edge.nginx import Edge
from tests.linking import BODY, link, stored
from tests.serving import execute
from tests.waiting import until


@pytest.fixture
def edge(start_edge: StartEdge, monkeypatch: pytest.MonkeyPatch) -> Edge:
    """With ada on its only volume."""
    edge = start_edge()
    monkeypatch.setenv("DATABASE_URL", edge.server.database_url)
    execute(edge.server.database_url, "insert into user_storage (user_id, volume_id) select 'ada', id from volumes")
    return edge


def second_volume(edge: Edge, mount: Path) -> UUID:
    mount.mkdir()
    assert cli.run(["volume", "init", str(mount)]) == Exit.OK
    with edge.server.client() as client:
        until(lambda: len(client.get("/health/ready").json()["volumes"]) == 2)
    rows = execute(edge.server.database_url, "update volumes set created_at = created_at - interval '1 minute' returning id, mount_path")
    volume_id: UUID = next(row["id"] for row in rows if row["mount_path"] == str(mount))
    return volume_id


def test_links_outlive_a_move(edge: Edge, tmp_path: Path) -> None:
    with edge.client("ada") as app, edge.browser() as browser:
        old = link(app, stored(app))
        target = second_volume(edge, tmp_path / "second")
        edge.install()
        assert cli.run(["rebalance", "--user", "ada", "--to", str(target), "--for-real", "--keep-old", "0"]) == Exit.OK
        assert edge.server.stored_files() == set()
        passed = edge.nginx.counted("passed")
        assert browser.get(old).content == BODY
        assert edge.nginx.counted("passed") == passed + 1  # to the server, which asked the row
        file_id = app.get("/api/files").json()["files"][0]["id"]
        answered = edge.nginx.counted("answered")
        assert browser.get(link(app, file_id)).content == BODY
        assert edge.nginx.counted("answered") == answered + 1


@pytest.mark.parametrize("how", ["revoked", "deleted"])
def test_an_old_copy_is_no_way_around(edge: Edge, tmp_path: Path, how: str) -> None:
    """The mover has ended with the old copy in its place, as when it is killed: nginx could still serve it by the old link."""
    with edge.client("ada") as app, edge.browser() as browser:
        file_id = stored(app)
        old = link(app, file_id)
        target = second_volume(edge, tmp_path / "second")
        edge.install()
        (path,) = edge.server.stored_paths()
        copy = path.read_bytes()
        assert cli.run(["rebalance", "--user", "ada", "--to", str(target), "--for-real", "--keep-old", "0"]) == Exit.OK
        path.write_bytes(copy)
        execute(
            edge.server.database_url,
            "insert into tombstones (volume_id, file_path, file_id, generation) select v.id, f.file_path, f.id, f.generation"
            " from user_files f, volumes v where v.id <> f.volume_id",
        )
        answered = edge.nginx.counted("answered")
        assert browser.get(old).content == BODY
        assert edge.nginx.counted("answered") == answered + 1
        answer = app.post(f"/api/files/{file_id}/revoke-links") if how == "revoked" else app.delete(f"/api/files/{file_id}")
        assert answer.is_success
        assert not path.exists()
        assert browser.get(old).status_code == 404
