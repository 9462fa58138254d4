"""`coffer edge install` and `coffer edge check`."""

import json
import shutil
import stat
from functools import partial
from pathlib import Path
from uuid import UUID

import httpx

from tests.edge.conftest import StartEdge
from tests.edge.nginx import Edge
from tests.linking import BODY, link, stored
from tests.samples import image
from tests.serving import execute
from tests.waiting import until

OTHER_KEY = "another-key-that-signs-the-links-of-tests"


def test_it_rehearses_first_and_repeating_changes_nothing(start_edge: StartEdge) -> None:
    edge = start_edge()
    written = [*(edge.nginx.directory / "coffer").iterdir(), edge.nginx.directory / "conf.d" / "coffer.conf"]
    assert sorted(path.name for path in written) == ["coffer.conf", "coffer_edge.lua", "coffer_settings.lua", "keys"]
    again = edge.coffer("install", "--for-real")
    assert (again.returncode, again.stdout) == (0, "") and "as they should be" in again.stderr
    edge.environment["COFFER_LINK_CACHE"] = "public"
    before = {path: path.read_text() for path in written}
    rehearsal = edge.coffer("install")
    assert rehearsal.returncode == 0 and "would write" in rehearsal.stdout and "+" in rehearsal.stdout
    assert {path: path.read_text() for path in written} == before
    stale = edge.coffer("check")
    assert stale.returncode == 1 and "coffer.conf" in stale.stderr


def test_keys_are_for_roots_eyes_alone_and_not_the_secret_itself(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_LINK_KEYS=OTHER_KEY)
    keys = edge.nginx.directory / "coffer" / "keys"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    for path in edge.nginx.directory.rglob("*"):
        if path.is_file():
            assert OTHER_KEY not in path.read_text(errors="replace"), path
    rehearsed = edge.coffer("install")
    assert keys.read_text().strip() not in rehearsed.stdout + rehearsed.stderr
    keys.chmod(0o644)
    assert edge.coffer("check").returncode == 1
    keys.chmod(0o600)
    checked = edge.coffer("check")
    assert checked.returncode == 0, checked.stderr


def test_keys_rotate_by_installing_again(start_edge: StartEdge) -> None:
    edge = start_edge(COFFER_LINK_KEYS=OTHER_KEY)
    with edge.client("ada") as ada, edge.browser() as browser:
        file_id = stored(ada)
        old = link(ada, file_id)
        new_key = "a-third-key-that-signs-the-links-of-tests"
        edge.environment["COFFER_LINK_KEYS"] = f"{new_key} {OTHER_KEY}"
        edge.install()
        answered = edge.nginx.counted("answered")
        until(lambda: browser.get(old).status_code == 200 and edge.nginx.counted("answered") > answered)
        edge.environment["COFFER_LINK_KEYS"] = new_key
        edge.install()
        passed = edge.nginx.counted("passed")
        # The server that runs still has the old one, so it is asked, and answers.
        until(lambda: httpx.get(f"{edge.nginx.url}{old}").status_code == 200 and edge.nginx.counted("passed") > passed)


def test_what_nginx_refuses_is_taken_back(start_edge: StartEdge) -> None:
    edge = start_edge()
    site = edge.nginx.directory / "conf.d" / "coffer.conf"
    before = site.read_text()
    done = edge.coffer("install", "--for-real", "--certificate", "/nonexistent.pem", "--certificate-key", "/nonexistent.key")
    assert done.returncode == 4 and "nonexistent" in done.stderr
    assert site.read_text() == before
    assert httpx.get(f"{edge.nginx.url}/f/x").status_code == 403  # it runs on


def test_nothing_foreign_gets_into_the_configuration(start_edge: StartEdge) -> None:
    edge = start_edge()
    for arguments in (
        ["--server-name", "a; return 200"],
        ["--certificate", "/a"],
        ["--trusted-proxy", "0.0.0.0/0"],
        ["--trusted-proxy", "10.0.0.0/8; return 200"],
        ["--metrics-listen", "1;}"],
        ["--certificate", "/a b", "--certificate-key", "/c"],
    ):
        done = edge.coffer("install", "--for-real", *arguments)
        assert done.returncode == 2, arguments
    edge.environment["COFFER_EDGE_STATE_FILE"] = ""
    assert edge.coffer("install").returncode == 2


def test_check_tells_of_a_server_that_is_away(start_edge: StartEdge) -> None:
    edge = start_edge()
    assert edge.coffer("check").returncode == 0
    edge.server.kill()
    until(lambda: edge.coffer("check").returncode == 5, timeout_seconds=20)


def lines_about(edge: Edge, request_id: str) -> list[str]:
    return [line for line in edge.server.logged().splitlines() if f'"request_id":"{request_id}"' in line]


def test_every_volume_is_served_and_a_new_one_once_installed(start_edge: StartEdge, tmp_path: Path) -> None:
    edge = start_edge(COFFER_ACCEL_REDIRECT_PREFIX="/coffer-files")
    second = tmp_path / "second"
    second.mkdir()
    with edge.client("ada") as ada, edge.browser() as browser:
        moving, staying = stored(ada), stored(ada, image(500), name="stays.png")
        hint_of_before = link(ada, moving)
        made = edge.run("volume", "init", str(second), "--json")
        assert made.returncode == 0, made.stderr
        assert "coffer edge install --for-real" in made.stderr
        assert edge.coffer("check").returncode == 1  # nginx does not know it
        edge.install()
        assert edge.coffer("check").returncode == 0
        edge.server.restart()
        # As a move of volumes does it: the bytes first, then the row.
        (path,) = [path for path in edge.server.stored_paths() if moving in path.name]
        there = second / path.relative_to(edge.server.volume)
        there.parent.mkdir(parents=True)
        shutil.copyfile(path, there)
        execute(
            edge.server.database_url,
            "update user_files set volume_id = (select id from volumes where mount_path = $1) where id = $2",
            str(second),
            UUID(moving),
        )
        path.unlink()
        passed = edge.nginx.counted("passed")
        assert browser.get(hint_of_before).content == BODY
        assert edge.nginx.counted("passed") == passed + 1  # the server found it
        answered = edge.nginx.counted("answered")
        for url, body in ((link(ada, moving), BODY), (link(ada, staying), image(500))):
            until(lambda url=url, body=body: browser.get(url).content == body)  # type: ignore[misc]
        assert edge.nginx.counted("answered") >= answered + 2
        for file_id, body in ((moving, BODY), (staying, image(500))):
            downloaded = ada.get(f"/api/files/{file_id}/download", headers={"X-Request-Id": file_id})
            assert downloaded.content == body
            (line,) = until(partial(lines_about, edge, file_id))
            assert json.loads(line)["bytes_out"] == 0  # nginx sent them
