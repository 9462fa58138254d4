"""API keys that are good for some users, types of files or networks alone, for a time, and are replaced by others."""

import asyncio
import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any

import asyncpg
import httpx
import pytest

from server import ledger
from server.auth import Authenticator, NewApiKey, Scope, authenticator
from server.errors import DatabaseUnavailable, Forbidden, Unauthenticated
from server.ledger import Database, listing
from server.settings import Settings
from tests.samples import image, video
from tests.serving import RunningServer, SharedServer, execute
from tests.waiting import before_its_end, until

MISSING = "01900000-0000-7000-8000-000000000000"
EVERY_RIGHT_OF_USERS = [Scope.FILES_READ.value, Scope.FILES_WRITE.value, Scope.LINKS_WRITE.value]


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> Iterator[RunningServer]:
    with shared_server() as server:
        yield server


def new_key(database_url: str, **restrictions: Any) -> NewApiKey:
    """A key with all of a user's rights, restricted."""
    key = NewApiKey.generate()

    async def create() -> None:
        db = Database(Settings(database_url=database_url))
        await db.open()
        try:
            options: dict[str, Any] = {"name": "test", "scopes": EVERY_RIGHT_OF_USERS} | restrictions
            await ledger.create_api_key(db, key_id=key.key_id, secret_sha256=key.secret_sha256, **options)
        finally:
            await db.close()

    asyncio.run(create())
    return key


def client(server: RunningServer, user_id: str, **restrictions: Any) -> httpx.Client:
    return server.client(user_id, api_key=new_key(server.database_url, **restrictions).text)


def stored(client: httpx.Client, body: bytes) -> str:
    answer = client.post("/api/files/upload", content=body)
    assert answer.status_code == 201, answer.text
    file_id: str = answer.json()["id"]
    return file_id


def told(answer: httpx.Response) -> tuple[int, dict[str, Any]]:
    """All of a refusal but the request's id."""
    problem = answer.json()
    assert problem.pop("request_id")
    return answer.status_code, problem


# Users


def test_a_key_for_some_users_is_good_for_no_other(server: RunningServer) -> None:
    with server.client("carol") as carol:
        file_id = stored(carol, image())
    key = new_key(server.database_url, user_ids=["ada", "bob"]).text
    for user_id in ("ada", "bob"):
        with server.client(user_id, api_key=key) as good:
            assert good.get(f"/api/files/{stored(good, image())}/download").status_code == 200
    refusals = set()
    for user_id in ("carol", "nobody", "Ada", "ada,bob", "adab"):
        with server.client(user_id, api_key=key) as wrong:
            for answer in (
                wrong.get("/api/files"),
                wrong.get(f"/api/files/{file_id}"),
                wrong.get(f"/api/files/{file_id}/download"),
                wrong.post("/api/files/upload", content=image()),
            ):
                status, problem = told(answer)
                assert (status, problem["code"]) == (403, "forbidden"), user_id
                refusals.add(json.dumps(problem))
    assert len(refusals) == 2  # of reading and of writing: whether there is such a user is not told
    with server.client(None, api_key=key) as nobody:
        assert nobody.get("/api/files").status_code == 400


# Types


def routes_of_a_file(server: RunningServer) -> Iterator[tuple[str, str]]:
    """Every described route that names a stored file."""
    paths = httpx.get(f"{server.url}/schema/openapi.json").json()["paths"]
    for path, item in paths.items():
        if "{file_id}" in path and path != "/api/uploads/links/{file_id}":
            for method in item.keys() & {"get", "head", "put", "post", "patch", "delete"}:
                yield method, path


BODIES: dict[str, Any] = {
    "/api/files/{file_id}/tags": {"tags": ["a"]},
    "/api/files/{file_id}/public": {"is_public": True},
    "/api/files/{file_id}": {"file_name": "b"},
}


def test_a_file_of_another_type_is_missing_on_every_route(server: RunningServer) -> None:
    with server.client("ada") as ada:
        film, photo = stored(ada, video()), stored(ada, image())
        before = ada.get(f"/api/files/{film}").json()
        with client(server, "ada", kinds=["image"]) as images:
            assert images.get(f"/api/files/{photo}/download").content == image()
            routes = list(routes_of_a_file(server))
            assert len(routes) >= 14
            for method, path in routes:
                if path.endswith("/content"):
                    sent: dict[str, Any] = {"content": video(2_000)}
                else:
                    sent = {"json": BODIES[path]} if path in BODIES and method in ("put", "patch") else {}
                answers = [images.request(method, path.replace("{file_id}", file_id), **sent) for file_id in (film, MISSING)]
                assert [answer.status_code for answer in answers] == [404, 404], (method, path)
                if method != "head":
                    assert told(answers[0]) == told(answers[1]), (method, path)
        assert ada.get(f"/api/files/{film}").json() == before


def test_lists_hold_the_types_that_a_key_is_good_for(server: RunningServer) -> None:
    with server.client("lists") as all_types:
        films = [stored(all_types, video(seed=seed)) for seed in range(3)]
        photos = [stored(all_types, image(seed=seed)) for seed in range(3)]
        scene = all_types.post("/api/files/upload", params={"type": "scene"}, content=b'{"a": 1}').json()["id"]
        project = all_types.post("/api/files/upload", params={"type": "project"}, content=b'{"a": 1}').json()["id"]
        for file_id in (films[0], photos[0]):
            all_types.post(f"/api/files/{file_id}/favorite")
            all_types.put(f"/api/files/{file_id}/tags", json={"tags": ["beach"]})
            all_types.patch(f"/api/files/{file_id}", json={"file_name": "beach", "package_name": "p"})
    with client(server, "lists", kinds=["image", "scene"]) as some:

        def listed(**query: Any) -> set[str]:
            answer = some.get("/api/files", params=query)
            assert answer.status_code == 200, answer.text
            return {file["id"] for file in answer.json()["files"]}

        assert listed() == listed(links=1) == {*photos, scene}
        assert listed(type="image") == listed(mime="image/png") == set(photos)
        for query in ({"type": "video"}, {"mime": "video/mp4"}, {"type": "project"}, {"type": "video", "mime": "image/png"}):
            assert listed(**query) == set(), query
        filters: list[dict[str, Any]] = [{"favorite": True}, {"tag": "beach"}, {"package_name": "p"}, {"name": "beach"}]
        for query in filters:
            assert listed(**query) == {photos[0]}, query
            assert listed(**query, type="video") == set(), query
        for sort in ("created", "-created", "name", "-name", "size", "-size"):
            assert listed(sort=sort) == {*photos, scene}
        first = some.get("/api/files", params={"limit": 3}).json()
        second = some.get("/api/files", params={"limit": 3, "cursor": first["next_cursor"]}).json()
        assert {file["id"] for page in (first, second) for file in page["files"]} == {*photos, scene}
        assert project not in listed(mime="application/json") == {scene}
        assert some.get("/api/storage/usage").json()["by_type"].keys() == {"image", "scene"}

        for path, name, done in (("/api/links", "links", "linked"), ("/api/files/delete", "results", "deleted")):
            results = some.post(path, json={"ids": [films[0], MISSING, photos[1]]}).json()[name]
            assert [each["status"] for each in results] == ["not_found", "not_found", done]
    with server.client("lists") as all_types:
        assert all_types.get(f"/api/files/{films[0]}").status_code == 200


def test_a_cursor_tells_nothing_of_other_types(server: RunningServer) -> None:
    """A search reads past files of other types, and its page may end at one of them."""
    with server.client("cara") as cara:
        stored(cara, video())
        assert cara.post("/api/files/upload", params={"name": "secret picture.png"}, content=image()).status_code == 201
        execute(
            server.database_url,
            "insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path)"
            " select m.id, f.user_id, 'secret plan ' || m.n, f.file_type, f.mime_type, 1, f.sha256, f.volume_id,"
            "        regexp_replace(f.file_path, '[^/]+\\.1\\.', m.id || '.1.')"
            "   from user_files f, (select gen_random_uuid() as id, n from generate_series(1, $1::integer) n) m"
            "  where f.user_id = 'cara' and f.file_type = 'video'",
            listing.SEARCH_AT_MOST + 10,
        )
        anybodys = cara.get("/api/files", params={"name": "secret", "limit": 1}).json()["next_cursor"]
    with client(server, "cara", kinds=["image"]) as some:
        found, cursor, pages = [], None, 0
        while pages == 0 or cursor is not None:
            answer = some.get("/api/files", params={"name": "secret"} | ({"cursor": cursor} if cursor else {}))
            assert answer.status_code == 200, answer.text
            found += [file["file_name"] for file in answer.json()["files"]]
            cursor, pages = answer.json()["next_cursor"], pages + 1
            if cursor is not None:
                assert b"plan" not in base64.urlsafe_b64decode(cursor + "==")
        assert (found, pages) == (["secret picture.png"], 2)
        for made_up in (anybodys, "", "x", "ü", "gAAAAAB" * 20):
            assert told(some.get("/api/files", params={"name": "secret", "cursor": made_up}))[1]["code"] == "invalid_request"


def test_bytes_of_another_type_are_not_stored(server: RunningServer) -> None:
    with client(server, "uploads", kinds=["image", "scene"]) as some:
        photo = stored(some, image())
        for body in (video(), video(3 * 2**20)):
            refused = some.post("/api/files/upload", content=body)
            assert (refused.status_code, refused.json()["code"], refused.json()["detected"]) == (415, "unsupported_type", "video/mp4")
            assert "video/mp4" not in refused.json()["allowed"] and "image/png" in refused.json()["allowed"]
        named = some.post("/api/files/upload", params={"type": "project"}, content=b"{}")
        assert (named.status_code, named.json()["code"]) == (415, "type_mismatch")
        # JSON could be a project too; for this key it can be but a scene.
        assert some.post("/api/files/upload", content=b'{"a": 1}').json()["file_type"] == "scene"
        form = some.post("/api/files/upload", files=[("file", ("a.png", image(seed=1))), ("file", ("b.mp4", video()))])
        assert [each["status"] for each in form.json()["results"]] == [201, 415]
        replaced = some.put(f"/api/files/{photo}/content", content=video())
        assert (replaced.status_code, replaced.json()["code"]) == (415, "type_mismatch")
        assert some.put(f"/api/files/{photo}/content", content=image(seed=2)).status_code == 200


def test_an_idempotency_key_shows_no_file_of_another_type(server: RunningServer) -> None:
    headers = {"Idempotency-Key": "same"}
    with server.client("again") as all_types, client(server, "again", kinds=["image"]) as images:
        all_types.post("/api/files/upload", content=video(), headers=headers).raise_for_status()
        refused = images.post("/api/files/upload", content=video(), headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")


def test_an_upload_link_takes_what_its_key_may_store(server: RunningServer) -> None:
    wish = {"max_bytes": 10_000}
    with server.client("linked") as all_types, client(server, "linked", kinds=["image"]) as images:
        link = images.post("/api/uploads/links", json=wish).json()
        refused = httpx.put(server.url + link["url"], content=video())
        assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_type")
        assert httpx.put(server.url + link["url"], content=image()).status_code == 201
        by_mime = images.post("/api/uploads/links", json=wish | {"types": ["video/mp4", "image/png"]}).json()
        assert httpx.put(server.url + by_mime["url"], content=video()).status_code == 415
        assert httpx.put(server.url + by_mime["url"], content=image()).status_code == 201
        for beyond in ({"type": "video"}, {"types": ["image", "video"]}):
            impossible = images.post("/api/uploads/links", json=wish | beyond)
            assert (impossible.status_code, impossible.json()["field"]) == (400, "types")
        assert images.post("/api/uploads/links", json=wish | {"type": "image", "types": ["image"]}).status_code == 201

        # It may give up its own kind of link, and no other.
        own = images.post("/api/uploads/links", json=wish).json()["file_id"]
        with client(server, "linked", kinds=["image", "video"]) as more:
            wider = more.post("/api/uploads/links", json=wish).json()["file_id"]
            unrestricted = all_types.post("/api/uploads/links", json=wish).json()["file_id"]
            for file_id in (wider, unrestricted):
                assert images.delete(f"/api/uploads/links/{file_id}").status_code == 404
            assert images.delete(f"/api/uploads/links/{own}").status_code == 204
            assert more.delete(f"/api/uploads/links/{wider}").status_code == 204
        assert all_types.delete(f"/api/uploads/links/{unrestricted}").status_code == 204


def test_ending_all_links_is_beyond_some_types(server: RunningServer) -> None:
    with server.client("revoking") as all_types, client(server, "revoking", kinds=["image"]) as images:
        film = stored(all_types, video())
        link = all_types.post(f"/api/files/{film}/link").json()["url"]
        assert told(images.post("/api/links/revoke"))[1]["code"] == "forbidden"
        assert httpx.get(server.url + link).status_code == 200


# Networks


def test_a_key_is_good_from_its_networks_alone(server: RunningServer) -> None:
    outside = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"), ip_network("127.0.0.2")]
    for networks, status in ((outside, 403), ([*outside, ip_network("127.0.0.0/8")], 200), ([ip_network("0.0.0.0/0")], 200)):
        with client(server, "ada", networks=networks) as some:
            answers = [some.get("/api/files"), some.post("/api/files/delete", json={"ids": ["x"]})]
            assert {answer.status_code for answer in answers} == {status}, networks
            # Nobody but the connection says where a request came from.
            said = some.get("/api/files", headers={"X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1", "X-Real-IP": "10.0.0.1"})
            assert said.status_code == status
    assert '"message":"an API key was used outside of its networks"' in server.logged()


def test_an_admins_key_may_have_networks(server: RunningServer) -> None:
    for network, status in (("10.0.0.0/8", 403), ("127.0.0.1", 200)):
        with client(server, "ada", scopes=["admin"], networks=[ip_network(network)]) as admin:
            assert admin.get("/api/users").status_code == status


@pytest.mark.parametrize(
    ("address", "within"),
    [
        ("10.1.2.3", True),
        ("11.0.0.1", False),
        ("::ffff:10.1.2.3", True),  # an IPv4 caller of an IPv6 socket
        ("::ffff:11.0.0.1", False),
        ("2001:db8:1::1", True),
        ("2001:db9::1", False),
        ("::a01:203", False),
        (None, False),
        ("", False),
        ("unix:", False),
    ],
)
def test_addresses_within_networks(address: str | None, within: bool) -> None:
    assert authenticator._is_within(address, [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]) is within


# Restrictions that no key may have


@pytest.mark.parametrize(
    "restrictions",
    [
        {"scopes": ["files:read", "admin"], "user_ids": ["ada"]},
        {"scopes": ["admin"], "kinds": ["image"]},
        {"user_ids": []},
        {"kinds": []},
        {"networks": []},
        {"kinds": ["text"]},
    ],
)
def test_the_database_holds_no_key_with_senseless_restrictions(database_url: str, restrictions: dict[str, Any]) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        row = {"scopes": EVERY_RIGHT_OF_USERS, "user_ids": None, "kinds": None, "networks": None} | restrictions
        execute(
            database_url,
            "insert into api_keys (key_id, name, secret_sha256, scopes, user_ids, kinds, networks) values ('a', 'a', $1, $2, $3, $4, $5)",
            bytes(32),
            *row.values(),
        )


# Ends, and what follows them


def test_a_key_ends_when_it_was_made_to(server: RunningServer) -> None:
    def used(seconds: int) -> str | None:
        key = new_key(server.database_url, lifetime=timedelta(seconds=seconds)).text
        with server.client("ada", api_key=key) as brief:
            return key if brief.get("/api/files").status_code == 200 else None

    key = before_its_end(used)
    with server.client("ada", api_key=key) as brief, client(server, "ada", lifetime=timedelta(days=1)) as long:
        until(lambda: brief.get("/api/files").status_code == 401, timeout_seconds=20)
        assert long.get("/api/files").status_code == 200


pytestmark = pytest.mark.anyio


async def rotated(db: Database, old: NewApiKey, overlap: timedelta, lifetime: timedelta | None = None) -> NewApiKey | None:
    new = NewApiKey.generate()
    row = await ledger.rotate_api_key(
        db, old.key_id, key_id=new.key_id, secret_sha256=new.secret_sha256, overlap=overlap, lifetime=lifetime
    )
    return None if row is None else new


async def kept(db: Database, **restrictions: Any) -> NewApiKey:
    key = NewApiKey.generate()
    options: dict[str, Any] = {"name": "app", "scopes": ["files:read"]} | restrictions
    await ledger.create_api_key(db, key_id=key.key_id, secret_sha256=key.secret_sha256, **options)
    return key


async def test_rotation_hands_every_right_on(db: Database) -> None:
    restrictions = {"user_ids": ["ada"], "kinds": ["image"], "networks": [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]}
    old = await kept(db, **restrictions, lifetime=timedelta(days=90))
    before = await ledger.find_api_key(db, old.key_id)
    new = await rotated(db, old, timedelta(hours=24))
    assert before is not None and new is not None
    ending, taking_over = await ledger.find_api_key(db, old.key_id), await ledger.find_api_key(db, new.key_id)
    assert ending is not None and taking_over is not None
    for right in ("name", "scopes", "user_ids", "kinds", "networks"):
        assert getattr(taking_over, right) == getattr(before, right) == getattr(ending, right)
    assert taking_over.secret_sha256 == new.secret_sha256 and taking_over.last_used_at is None
    assert ending.expires_at == taking_over.created_at + timedelta(hours=24)
    assert taking_over.expires_at == taking_over.created_at + timedelta(days=90)


async def test_an_overlap_makes_no_life_longer(db: Database) -> None:
    old = await kept(db, lifetime=timedelta(hours=1))
    before = await ledger.find_api_key(db, old.key_id)
    assert await rotated(db, old, timedelta(hours=24))
    after = await ledger.find_api_key(db, old.key_id)
    assert before is not None and after is not None and after.expires_at == before.expires_at


async def test_the_old_key_ends_at_once_without_an_overlap(db: Database) -> None:
    old = await kept(db)
    good = Authenticator(db, cache_seconds=0)
    assert (await good.principal(f"Bearer {old.text}", "ada", Scope.FILES_READ)).key_id == old.key_id
    new = await rotated(db, old, timedelta(0))
    assert new is not None
    with pytest.raises(Unauthenticated):
        await good.principal(f"Bearer {old.text}", "ada", Scope.FILES_READ)
    assert (await good.principal(f"Bearer {new.text}", "ada", Scope.FILES_READ)).key_id == new.key_id


async def test_a_key_that_has_ended_is_not_rotated(db: Database) -> None:
    revoked, expired = await kept(db), await kept(db, lifetime=timedelta(0))
    await ledger.revoke_api_key(db, revoked.key_id)
    for key in (revoked, expired, NewApiKey.generate()):
        assert await rotated(db, key, timedelta(hours=1)) is None
    assert len(await ledger.list_api_keys(db)) == 2


async def test_two_rotations_at_once_make_two_keys_of_one(db: Database) -> None:
    old = await kept(db)
    made = await asyncio.gather(*(rotated(db, old, timedelta(0)) for _ in range(5)))
    # The first ends the old key, and the others find it ended.
    assert len([key for key in made if key is not None]) == 1
    assert len(await ledger.list_api_keys(db)) == 2


# The last use


async def test_uses_are_written_together_and_not_by_requests(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[dict[str, datetime]] = []

    async def note(db: Database, used: dict[str, datetime]) -> None:
        writes.append(used)
        await ledger.note_api_keys_used(db, used)

    monkeypatch.setattr(authenticator, "note_api_keys_used", note)
    first, second, unused = await kept(db), await kept(db), await kept(db)
    good = Authenticator(db, cache_seconds=60)
    began = datetime.now(UTC)
    for key in (first, second, first, first):
        await good.principal(f"Bearer {key.text}", "ada", Scope.FILES_READ)
    with pytest.raises(Forbidden):
        await good.principal(f"Bearer {unused.text}", "ada", Scope.FILES_WRITE)
    assert writes == []
    await good.note_uses()
    await good.note_uses()
    assert [set(used) for used in writes] == [{first.key_id, second.key_id}]
    rows = {row.key_id: row.last_used_at for row in await ledger.list_api_keys(db)}
    assert rows.pop(unused.key_id) is None
    assert all(used is not None and began <= used <= datetime.now(UTC) for used in rows.values())


async def test_a_use_never_goes_back_in_time(db: Database) -> None:
    key = await kept(db)
    late, early = datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
    for moment in (late, early):
        await ledger.note_api_keys_used(db, {key.key_id: moment, "unknown": moment})
    row = await ledger.find_api_key(db, key.key_id)
    assert row is not None and row.last_used_at == late


async def test_uses_wait_for_a_database_that_is_away(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(_: Database, used: dict[str, datetime]) -> None:
        raise DatabaseUnavailable

    key = await kept(db)
    good = Authenticator(db, cache_seconds=60)
    await good.principal(f"Bearer {key.text}", "ada", Scope.FILES_READ)
    with monkeypatch.context() as broken:
        broken.setattr(authenticator, "note_api_keys_used", away)
        await good.note_uses()
    await good.note_uses()
    row = await ledger.find_api_key(db, key.key_id)
    assert row is not None and row.last_used_at is not None


def test_a_stopping_server_writes_the_last_use(server: RunningServer) -> None:
    key = new_key(server.database_url)
    with server.client("ada", api_key=key.text) as some:
        assert some.get("/api/files").status_code == 200
    query = "select last_used_at from api_keys where key_id = $1"
    assert execute(server.database_url, query, key.key_id)[0]["last_used_at"] is None
    server.restart()
    assert execute(server.database_url, query, key.key_id)[0]["last_used_at"] is not None
