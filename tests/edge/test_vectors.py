"""Every link of vectors.json, before the server's verifier and before nginx: zero differences."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.delivery.links import LinkedFile, Links
from server.errors import LinkExpired, LinkInvalid
from server.previews.variants import Variant
from server.vault.layout import preview_path
from tests.edge.make_vectors import BAD_PREVIEWS, BODY, KEYS, VECTORS, Vector
from tests.edge.nginx import Nginx
from tests.edge.stub import stubbed_nginx
from tests.waiting import until

PREVIEW = b"a preview of any length"


def server_takes(path: str) -> LinkedFile | None:
    """What the server's verifier makes of a request's target, as `server/api/front.py` and `linked.py` hand it over."""
    raw, _, query = path.partition("?")
    token, slash, segment = raw[3:].partition("/")
    if raw[:3] != "/f/" or not slash or query:
        return None
    try:
        return Links(KEYS).verify_download(token, segment)
    except (LinkInvalid, LinkExpired):
        return None


def is_made_on_demand(vector: Vector) -> bool:
    link = server_takes(vector.path)
    return link is not None and Variant.of_name(link.preview or "") is not None


def is_preview(vector: Vector) -> bool:
    link = server_takes(vector.path)
    return link is not None and link.preview is not None


def read() -> list[Vector]:
    return [Vector(*each) for each in json.loads(VECTORS.read_text())]


def test_there_are_thousands_and_they_are_made_anew_alike() -> None:
    assert len(read()) > 2_500
    before = VECTORS.read_text()
    subprocess.run([sys.executable, "-m", "tests.edge.make_vectors"], check=True)
    assert VECTORS.read_text() == before


def test_the_servers_verifier_decides_so() -> None:
    wrong = [each for each in read() if (server_takes(each.path) is None) != (each.verdict == "refused")]
    assert not wrong


def put_files(volume: Path) -> None:
    """A file for every link that the server takes; those of some users as their names say."""
    for vector in read():
        link = server_takes(vector.path)
        if link is None or not link.user_directory.replace("_", "").replace("-", "").strip("~").isalnum() or len(link.file_path) > 250:
            continue
        path = volume / link.file_path
        user = volume / "users" / link.user_directory
        if link.user_directory == "nobody":
            continue
        if link.user_directory == "linked-directory":
            elsewhere = volume / "elsewhere"
            (elsewhere / path.parent.name).mkdir(parents=True)
            user.symlink_to(elsewhere)
        path.parent.mkdir(parents=True, exist_ok=True)
        match link.user_directory:
            case "shorter":
                path.write_bytes(BODY[1:])
            case "linked":
                (volume / "target").write_bytes(BODY)
                path.symlink_to(volume / "target")
            case "pipe":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case "no-original":
                pass
            case _:
                path.write_bytes(BODY)
        if link.preview and link.user_directory != "no-preview":
            preview = volume / preview_path(link.file_path, link.id, link.preview)
            preview.parent.mkdir(parents=True, exist_ok=True)
            preview.write_bytes(PREVIEW)
    # No name is refused just because nothing is there.
    link = server_takes(read()[0].path)
    assert link is not None
    for name in BAD_PREVIEWS:
        if "\0" not in name:
            wrong = volume / "users" / link.user_directory / "previews" / str(link.id) / name
            wrong.parent.mkdir(parents=True, exist_ok=True)
            wrong.write_bytes(PREVIEW)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    """In front of nothing but a voice that says that a request was passed on."""
    put_files(tmp_path / "volume")
    newest = max(path.stat().st_ctime for path in (tmp_path / "volume").glob("users/*/previews/*/*"))
    until(lambda: time.time() > newest + 3)  # younger ones are the server's
    nginx = stubbed_nginx(tmp_path, "return 299 passed;")
    nginx.start()
    yield nginx
    nginx.stop()


def asked(port: int, path: str) -> tuple[int, bytes]:
    """The status and body for a request's target, sent as it is."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def test_nginx_decides_so(nginx: Nginx) -> None:
    wrong = []
    for vector in read():
        if vector.verdict == "served" and is_made_on_demand(vector):
            # The first one in an hour is the server's, which notes that it is used (test_revocation.py).
            assert asked(nginx.port, vector.path) == (299, b"passed")
        status, body = asked(nginx.port, vector.path)
        if vector.verdict == "served":
            right = status == 200 and body in (BODY, PREVIEW) and asked(nginx.port, vector.path) == (status, body)
        else:
            # Passed on, or what nginx itself does not take for a request of HTTP, such as a NUL or a line that is too long.
            right = status == 299 or (status in {400, 414} and not body.startswith((BODY, PREVIEW)))
        if not right:
            wrong.append((vector, status, body[:50]))
    assert not wrong, wrong[:10]
    assert nginx.counted("answered") == 2 * sum(vector.verdict == "served" for vector in read())


def test_what_takes_a_files_place_is_not_sent(nginx: Nginx, tmp_path: Path) -> None:
    """Not even while the way to the file is believed to lead through no symbolic link."""
    vector = next(each for each in read() if each.verdict == "served")
    link = server_takes(vector.path)
    assert link is not None
    path = tmp_path / "volume" / link.file_path
    target = path.with_name("0123456789")  # so that the link to it is as long as the file
    target.write_bytes(BODY)
    put: dict[str, Callable[[], object]] = {
        "a symbolic link": lambda: path.symlink_to(target.name),
        "a pipe": lambda: os.mkfifo(path),
        "a directory": path.mkdir,
        "a shorter file": lambda: path.write_bytes(BODY[1:]),
        "nothing": lambda: None,
    }
    sent = {}
    for name, take_its_place in put.items():
        assert asked(nginx.port, vector.path) == (200, BODY)
        path.rename(tmp_path / "aside")
        take_its_place()
        sent[name] = asked(nginx.port, vector.path)
        if path.is_dir():
            path.rmdir()
        (tmp_path / "aside").replace(path)
    assert len(target.name) == len(BODY)
    assert sent == dict.fromkeys(put, (299, b"passed"))


def test_a_directory_that_becomes_a_symbolic_link_is_noticed(nginx: Nginx, tmp_path: Path) -> None:
    vector = next(each for each in read() if each.verdict == "served")
    link = server_takes(vector.path)
    assert link is not None
    assert asked(nginx.port, vector.path) == (200, BODY)
    user = tmp_path / "volume" / "users" / link.user_directory
    user.rename(tmp_path / "elsewhere")
    user.symlink_to(tmp_path / "elsewhere")
    until(lambda: asked(nginx.port, vector.path) == (299, b"passed"))


def test_a_preview_that_takes_anothers_place_is_never_sent_as_that(nginx: Nginx, tmp_path: Path) -> None:
    """New contents get previews of the same names; nginx may have the old ones open."""
    vector = next(each for each in read() if each.verdict == "served" and is_preview(each) and not is_made_on_demand(each))
    link = server_takes(vector.path)
    assert link is not None and link.preview is not None
    preview = tmp_path / "volume" / preview_path(link.file_path, link.id, link.preview)
    until(lambda: asked(nginx.port, vector.path) == (200, PREVIEW) and nginx.holds(preview))
    for number in range(20):
        (tmp_path / "new").write_bytes(f"the preview number {number:02}".encode())
        (tmp_path / "new").rename(preview)
        for _ in range(5):
            assert asked(nginx.port, vector.path) == (299, b"passed")
    until(lambda: asked(nginx.port, vector.path) == (200, preview.read_bytes()))
