"""`PUT /api/files/{id}/content`, `POST .../copy`, and deleting: the other ways in which bytes change."""

import hashlib

import pytest

from tests.samples import image, video
from tests.serving import RunningServer

MIB = 2**20


@pytest.mark.parametrize("sizes", [(1_000, 2_000), (3 * MIB, 1_000), (1_000, 3 * MIB)])
def test_new_bytes_take_the_place_of_the_old(server: RunningServer, sizes: tuple[int, int]) -> None:
    old, new = image(sizes[0], 1), image(sizes[1], 2)
    with server.client("ada") as client:
        file = client.post("/api/files/upload", content=old, params={"name": "a.png"}).json()
        url = f"/api/files/{file['id']}"
        stale = client.put(f"{url}/content", content=new, headers={"If-Match": '"someone else\'s"'})
        assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")
        answer = client.put(f"{url}/content", content=new, headers={"If-Match": file["etag"]})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["id"], answer.json()["file_name"], answer.json()["file_size"]) == (file["id"], "a.png", sizes[1])
        assert client.get(f"{url}/download").content == new
        assert client.put(f"{url}/content", content=old, headers={"If-Match": file["etag"]}).status_code == 412
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["reserved_bytes"], usage["file_count"]) == (sizes[1], 0, 1)
    assert server.stored_files() == {hashlib.sha256(new).hexdigest()}


def test_a_replacement_pays_only_for_what_it_grows_by(server: RunningServer) -> None:
    with server.client("ada") as client:
        server.set_quota("ada", 4 * MIB)
        url = "/api/files/" + client.post("/api/files/upload", content=image(4 * MIB)).json()["id"]
        assert client.put(f"{url}/content", content=image(4 * MIB, 1)).status_code == 200
        refused = client.put(f"{url}/content", content=image(4 * MIB + 1, 2))
        assert (refused.status_code, refused.json()["code"]) == (413, "quota_exceeded")
        assert client.get(f"{url}/download").content == image(4 * MIB, 1)


def test_a_replacement_keeps_the_kind_and_the_owner(server: RunningServer) -> None:
    with server.client("ada") as ada, server.client("bob") as bob:
        url = "/api/files/" + ada.post("/api/files/upload", content=image()).json()["id"]
        assert ada.put(f"{url}/content", content=video()).json()["code"] == "type_mismatch"
        assert bob.put(f"{url}/content", content=image()).status_code == 404
        assert ada.get(f"{url}/download").content == image()


def test_a_copy_is_a_file_of_its_own(server: RunningServer) -> None:
    body = image(2 * MIB)
    with server.client("ada") as client, server.client("bob") as bob:
        first = client.post("/api/files/upload", content=body, params={"name": "a.png", "tags": "x"}).json()
        assert bob.post(f"/api/files/{first['id']}/copy").status_code == 404
        answer = client.post(f"/api/files/{first['id']}/copy")
        assert answer.status_code == 201, answer.text
        second = answer.json()
        assert second["id"] != first["id"] and (second["file_name"], second["tags"]) == ("a.png", ["x"])
        assert client.get("/api/storage/usage").json()["used_bytes"] == 4 * MIB
        assert client.delete(f"/api/files/{first['id']}").status_code == 204
        assert client.get(f"/api/files/{second['id']}/download").content == body
        assert client.get("/api/storage/usage").json()["used_bytes"] == 2 * MIB


def test_deleting_gives_the_quota_back_and_leaves_no_byte(server: RunningServer) -> None:
    with server.client("ada") as client:
        ids = [client.post("/api/files/upload", content=image(1_000, seed)).json()["id"] for seed in range(5)]
        assert client.delete(f"/api/files/{ids[0]}").status_code == 204
        assert client.delete(f"/api/files/{ids[0]}").status_code == 404
        answer = client.post("/api/files/delete", json={"ids": ids}).json()
        assert [each["status"] for each in answer["results"]] == ["not_found"] + ["deleted"] * 4
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["file_count"]) == (0, 0)
    assert server.stored_files() == set()


def test_erasing_a_user_leaves_nothing(server: RunningServer) -> None:
    with server.client("ada") as ada, server.client("bob") as bob, server.client() as admin:
        for seed in range(3):
            ada.post("/api/files/upload", content=image(1_000, seed))
        kept = bob.post("/api/files/upload", content=image(1_000, 9)).json()["id"]
        assert admin.delete("/api/users/ada").status_code == 204
        assert admin.get("/api/users/ada").status_code == 404
        assert ada.get("/api/files").json()["files"] == []
        assert bob.get(f"/api/files/{kept}/download").content == image(1_000, 9)
        assert [path.name for path in (server.volume / "users").iterdir()] == ["bob"]
        assert ada.post("/api/files/upload", content=image()).status_code == 201
