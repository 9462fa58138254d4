"""The admin routes of users, with ids that hold anything."""

from urllib.parse import quote

import pytest

from server.auth import Scope
from tests.samples import image
from tests.serving import RunningServer

IDS = [
    "plain",
    "user/a",
    "user%2Fa",
    "a%b",
    "a b+c",
    "ü",
    "日本語 🐬",
    "e\u0301",
    "..",
    ".",
    "quota",
    "a?b#c",
    "~x",
    "a;b",
    "x" * 255,
    "\u202eabc",
]


def path_of(user_id: str) -> str:
    # Clients remove dot segments from a URL, percent-encoded or not, unless they are told otherwise.
    return f"/api/users/{quote(user_id, safe='')}"


@pytest.mark.parametrize("user_id", [each for each in IDS if each not in {".", ".."}], ids=ascii)
def test_every_id_is_taken_as_it_is(api: RunningServer, user_id: str) -> None:
    with api.client(user_id) as client:
        assert client.get(path_of(user_id)).status_code == 404
        made = client.put(f"{path_of(user_id)}/quota", json={"max_bytes": 5_000})
        assert (made.status_code, made.json()["user_id"], made.json()["max_bytes"]) == (200, user_id, 5_000)
        file = client.post("/api/files/upload", content=image()).json()
        assert file["user_id"] == user_id
        assert client.get(path_of(user_id)).json()["total_bytes"] == 1_000
        assert client.get("/api/storage/usage").json()["available_bytes"] == 4_000
        assert client.delete(path_of(user_id)).status_code == 204
        assert client.get(path_of(user_id)).status_code == 404
        assert client.get(f"/api/files/{file['id']}").status_code == 404


@pytest.mark.parametrize("segment", ["%00", "%0a", "%ff", "%ed%a0%80", "x" * 256, "%e2%80%a8"])
def test_ids_that_are_none_are_refused(api: RunningServer, segment: str) -> None:
    with api.client() as admin:
        for answer in (admin.get(f"/api/users/{segment}"), admin.put(f"/api/users/{segment}/quota", json={"max_bytes": 1})):
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


def test_quotas(api: RunningServer) -> None:
    with api.client("quotas") as client:
        for value in (0, None, 2**63 - 1, 10):
            assert client.put("/api/users/quotas/quota", json={"max_bytes": value}).json()["max_bytes"] == value
        for body in (
            {},
            {"max_bytes": -1},
            {"max_bytes": 2**63},
            {"max_bytes": 1.5},
            {"max_bytes": True},
            {"max_bytes": 1, "tier": "x"},
        ):
            assert client.put("/api/users/quotas/quota", json=body).status_code == 400
        assert client.get("/api/users/quotas").json()["max_bytes"] == 10
        refused = client.post("/api/files/upload", content=image())
        assert (refused.status_code, refused.json()["code"]) == (413, "quota_exceeded")


def test_all_users_are_listed_once(api: RunningServer) -> None:
    names = {f"listed-{number:02}" for number in range(25)} | {"listed/ü", "listed'; drop table"}
    for name in names:
        api.set_quota(name, 1)
    found: list[str] = []
    cursor: str | None = None
    with api.client() as admin:
        while True:
            page = admin.get("/api/users", params={"limit": 7} | ({"cursor": cursor} if cursor else {})).json()
            assert len(page["users"]) <= 7
            found += [user["user_id"] for user in page["users"]]
            if (cursor := page["next_cursor"]) is None:
                break
        assert len(found) == len(set(found)) and names <= set(found)
        for bad in ({"limit": 0}, {"limit": 201}, {"limit": "x"}, {"cursor": ""}, {"cursor": "\0"}):
            assert admin.get("/api/users", params=bad).status_code == 400


def test_only_admins_come_in(api: RunningServer) -> None:
    key = api.new_key(Scope.FILES_READ, Scope.FILES_WRITE)
    with api.client("ada", api_key=key) as client:
        for answer in (
            client.get("/api/users"),
            client.get("/api/users/ada"),
            client.put("/api/users/ada/quota", json={"max_bytes": None}),
            client.delete("/api/users/ada"),
        ):
            assert (answer.status_code, answer.json()["needed_scope"]) == (403, "admin")


def test_a_deleted_user_leaves_nothing_behind(api: RunningServer) -> None:
    with api.client("leaving") as client:
        before = set(api.stored_paths())
        for seed in range(5):
            assert client.post("/api/files/upload", content=image(1_000, seed)).status_code == 201
        assert len(set(api.stored_paths()) - before) == 5
        assert client.delete("/api/users/leaving").status_code == 204
        assert set(api.stored_paths()) == before
        assert client.delete("/api/users/leaving").status_code == 404
        assert client.get("/api/storage/usage").json()["used_bytes"] == 0
        assert client.post("/api/files/upload", content=image()).status_code == 201  # a new user of the same name starts anew
