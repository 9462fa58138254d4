"""Contact sheets through the API, a server and a worker: stored once for the same pictures and layout, and nothing where it cannot be."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import pyvips

from server.auth import Scope
from tests.previews.conftest import RealWorkerFactory
from tests.previews.media import TEST_CARD, record
from tests.previews.test_gallery import upload
from tests.serving import RunningServer, ServerFactory, execute
from tests.waiting import until

RED, GREEN, BLUE = [255, 0, 0], [0, 255, 0], [0, 0, 255]
LAYOUT = {"cell_width": 40, "cell_height": 40, "padding": 0, "format": "png"}


def plain(colour: list[int]) -> bytes:
    return bytes((pyvips.Image.black(40, 40, bands=3) + colour).cast("uchar").copy(interpretation="srgb").pngsave_buffer())


def compose(client: httpx.Client, files: list[str], **wish: Any) -> httpx.Response:
    return client.post("/api/compose", json={"files": files} | LAYOUT | wish)


def shown(client: httpx.Client, file_id: str) -> list[list[int]]:
    """The middle of each cell, row after row."""
    image = pyvips.Image.new_from_buffer(client.get(f"/api/files/{file_id}/download").content, "")
    return [[round(each) for each in image.getpoint(x, y)] for y in range(20, image.height, 40) for x in range(20, image.width, 40)]


def used_bytes(client: httpx.Client) -> int:
    usage = client.get("/api/storage/usage").json()
    assert usage["reserved_bytes"] == 0
    found: int = usage["used_bytes"]
    return found


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_the_same_sheet_is_made_once(server: RunningServer, start_real_worker: RealWorkerFactory) -> None:
    start_real_worker()
    with server.client("ada", timeout=60) as ada:
        red, green, blue = (upload(ada, plain(each), "a.png") for each in (RED, GREEN, BLUE))
        before = used_bytes(ada)
        made = compose(ada, [red, green, blue], columns=3, file_name="Drei.png", tags=["reference"], package_name="heroes")
        assert made.status_code == 201, made.text
        sheet = made.json()
        assert made.headers["location"] == f"/api/files/{sheet['id']}"
        assert (sheet["file_type"], sheet["mime_type"], sheet["file_name"]) == ("image", "image/png", "Drei.png")
        assert (sheet["tags"], sheet["package_name"]) == (["reference"], "heroes")
        assert shown(ada, sheet["id"]) == [RED, GREEN, BLUE]
        assert used_bytes(ada) == before + sheet["file_size"]

        again = compose(ada, [red, green, blue], columns=3, background="#FFFFFF")
        assert (again.status_code, again.json()["id"]) == (200, sheet["id"])
        # By the bytes, not by the files: another file with the same ones.
        copy = ada.post(f"/api/files/{red}/copy").json()["id"]
        assert compose(ada, [copy, green, blue], columns=3).json()["id"] == sheet["id"]
        # The order and the layout count.
        assert shown(ada, compose(ada, [blue, green, red], columns=3).json()["id"]) == [BLUE, GREEN, RED]
        square = compose(ada, [red, green, blue])
        assert (square.status_code, shown(ada, square.json()["id"])) == (201, [RED, GREEN, BLUE, [255, 255, 255]])
        assert execute(server.database_url, "select count(*) as n from sheets")[0]["n"] == 0

        ada.delete(f"/api/files/{sheet['id']}").raise_for_status()
        anew = compose(ada, [red, green, blue], columns=3)
        assert anew.status_code == 201
        assert anew.json()["id"] != sheet["id"]
        # Somebody puts other bytes in its place: then it is no sheet any more.
        ada.put(f"/api/files/{anew.json()['id']}/content", content=plain(RED)).raise_for_status()
        third = compose(ada, [red, green, blue], columns=3)
        assert (third.status_code, shown(ada, third.json()["id"])) == (201, [RED, GREEN, BLUE])


def test_many_who_ask_at_once_get_one_file(server: RunningServer, start_real_worker: RealWorkerFactory) -> None:
    start_real_worker()
    start_real_worker()
    with server.client("ada", timeout=60) as ada:
        files = [upload(ada, plain(each), "a.png") for each in (RED, GREEN)]
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: compose(ada, files), range(20)))
        assert {answer.status_code for answer in answers} <= {200, 201}
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert len(ada.get("/api/files").json()["files"]) == 3


def test_other_files_stand_with_their_pictures(server: RunningServer, start_real_worker: RealWorkerFactory, tmp_path: Path) -> None:
    start_real_worker()
    film = record(tmp_path / "a.mp4", TEST_CARD, "-c:v", "libx264", "-pix_fmt", "yuv420p")
    sound = record(tmp_path / "a.mp3", "sine=f=440:r=44100:d=1")
    with server.client("ada", timeout=60) as ada:
        red, with_picture = upload(ada, plain(RED), "a.png"), upload(ada, film.read_bytes(), "a.mp4")
        without = upload(ada, sound.read_bytes(), "a.mp3")
        # Asked for at once: its picture may still have to be made.
        made = compose(ada, [red, with_picture], fit="cover")
        assert made.status_code == 201, made.text
        first, second = shown(ada, made.json()["id"])
        assert first == RED
        assert second != [255, 255, 255]
        refused = compose(ada, [red, without])
        assert problem(refused) == (400, "invalid_request")
        assert refused.json()["detail"].startswith("files[1]")
        damaged = upload(ada, plain(RED)[:60], "a.png")
        refused = compose(ada, [damaged, red])
        assert problem(refused) == (400, "invalid_request")
        assert refused.json()["detail"].startswith("files[0]")
        assert len(ada.get("/api/files").json()["files"]) == 5


def test_a_sheet_beyond_the_quota_is_not_stored(server: RunningServer, start_real_worker: RealWorkerFactory) -> None:
    start_real_worker()
    with server.client("ada", timeout=60) as ada:
        files = [upload(ada, plain(each), "a.png") for each in (RED, GREEN)]
        used = used_bytes(ada)
        server.set_quota("ada", used + 10)
        refused = compose(ada, files)
        assert problem(refused) == (413, "quota_exceeded"), refused.text
        assert refused.json()["limit_bytes"] == used + 10
        assert used_bytes(ada) == used
        server.set_quota("ada", None)
        assert compose(ada, files).status_code == 201


def test_only_ones_own_pictures_with_the_right_to_store_files(server: RunningServer) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        mine, his = upload(ada, plain(RED), "a.png"), upload(bob, plain(RED), "a.png")
        for stranger in (his, str(uuid4())):
            assert problem(compose(ada, [mine, stranger])) == (404, "not_found")
        with server.client("ada", api_key=server.new_key(Scope.FILES_READ)) as reader:
            assert problem(compose(reader, [mine])) == (403, "forbidden")
    assert execute(server.database_url, "select count(*) as n from sheets")[0]["n"] == 0


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"format": "jpeg", "background": "transparent"}, "background"),
        ({"cell_width": 4096, "columns": 3}, "files"),
        ({"cell_width": 4096, "cell_height": 4096, "padding": 0, "columns": 1}, "files"),
    ],
)
def test_what_no_sheet_can_be(server: RunningServer, wish: dict[str, Any], field: str) -> None:
    with server.client("ada") as ada:
        refused = compose(ada, [upload(ada, plain(RED), "a.png")] * 3, **wish)
        assert problem(refused) == (400, "invalid_request")
        assert refused.json()["detail"].startswith(field)


def test_bytes_that_are_replaced_meanwhile_are_no_others_sheet(
    start_server: ServerFactory, start_real_worker_of: Callable[[RunningServer], object]
) -> None:
    server = start_server(COFFER_PREVIEW_WAIT_SECONDS="1")
    with server.client("ada", timeout=60) as ada:
        file_id = upload(ada, plain(RED), "a.png")
        assert problem(compose(ada, [file_id])) == (503, "preview_pending")
        ada.put(f"/api/files/{file_id}/content", content=plain(GREEN)).raise_for_status()
        start_real_worker_of(server)
        until(lambda: execute(server.database_url, "select problem is not null as told from sheets")[0]["told"])
        for colour in (GREEN, RED):
            ada.put(f"/api/files/{file_id}/content", content=plain(colour)).raise_for_status()
            until(lambda: compose(ada, [file_id]).status_code in {200, 201})
            assert shown(ada, compose(ada, [file_id]).json()["id"]) == [colour]


def test_without_a_worker_it_is_to_be_asked_for_again(start_server: ServerFactory) -> None:
    server = start_server(COFFER_PREVIEW_WAIT_SECONDS="1")
    with server.client("ada") as ada:
        pending = compose(ada, [upload(ada, plain(RED), "a.png")])
        assert problem(pending) == (503, "preview_pending")
        assert int(pending.headers["retry-after"]) > 0
