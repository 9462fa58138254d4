"""Who is let in: keys, scopes, and the user acted for."""

import asyncio
import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import cast

import httpx
import pytest

from server.auth import Authenticator, NewApiKey, Scope, api_keys, authenticator
from server.errors import Forbidden, InvalidRequest, Unauthenticated
from server.ledger import ApiKeyRow, Database
from tests.serving import RunningServer, execute
from tests.waiting import before_its_end, until


def test_a_key_is_256_random_bits_of_which_only_a_hash_is_kept() -> None:
    keys = [NewApiKey.generate() for _ in range(100)]
    assert len({key.key_id for key in keys}) == 100
    for key in keys:
        secret = key.text.removeprefix(f"cof_{key.key_id}_")
        assert len(secret) == 43 and key.secret_sha256 == hashlib.sha256(secret.encode()).digest()
        assert api_keys.parse(key.text) == (key.key_id, key.secret_sha256)
        assert secret not in repr(key)


def test_text_of_another_shape_is_no_key() -> None:
    text = NewApiKey.generate().text
    for wrong in (
        "",
        "cof_",
        text[:-1],
        f"{text}A",
        text.upper(),
        f" {text}",
        f"{text}\n",
        text.replace("cof_", "xof_"),
        text.replace("_", "-", 1),
    ):
        assert api_keys.parse(wrong) is None


class Keys:
    """A ledger of keys in memory that counts look-ups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, ApiKeyRow] = {}
        self.asked = 0
        self.now = 100.0
        monkeypatch.setattr(authenticator, "find_api_key", self._find)
        self.authenticator = Authenticator(cast("Database", None), cache_seconds=3, clock=lambda: self.now)

    async def _find(self, _: Database, key_id: str) -> ApiKeyRow | None:
        self.asked += 1
        return self.rows.get(key_id)

    def add(self, *scopes: Scope, expires_at: datetime | None = None, revoked_at: datetime | None = None) -> NewApiKey:
        key = NewApiKey.generate()
        self.rows[key.key_id] = ApiKeyRow(
            key_id=key.key_id,
            name="test",
            secret_sha256=key.secret_sha256,
            scopes=list(scopes),
            created_at=datetime.now(UTC),
            expires_at=expires_at,
            revoked_at=revoked_at,
        )
        return key

    def user_of(self, authorization: str | None, acting_user: str | None = "ada", needed: Scope = Scope.FILES_READ) -> str | None:
        return asyncio.run(self.authenticator.principal(authorization, acting_user, needed)).user_id


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    return Keys(monkeypatch)


def test_a_good_key_acts_for_the_named_user(keys: Keys) -> None:
    key = keys.add(Scope.FILES_READ)
    assert keys.user_of(f"Bearer {key.text}") == "ada"
    assert keys.user_of(f"bearer  {key.text}", "bob") == "bob"
    assert keys.asked == 1


def test_bad_credentials_are_told_apart_by_nobody(keys: Keys) -> None:
    good, other = keys.add(Scope.FILES_READ), keys.add(Scope.FILES_READ)
    crossed = f"cof_{good.key_id}_{other.text.split('_', 2)[2]}"
    past = datetime.now(UTC) - timedelta(seconds=1)
    bad = [
        None,
        "",
        "Bearer",
        "Bearer ",
        good.text,
        f"Basic {good.text}",
        f"Bearer {good.text} x",
        f"Bearer {good.text[:-1]}",
        f"Bearer {crossed}",
    ]
    bad += [f"Bearer {NewApiKey.generate().text}", f"Bearer {keys.add(expires_at=past).text}", f"Bearer {keys.add(revoked_at=past).text}"]
    for authorization in bad:
        # Wrong credentials win over a wrong user id, so nobody learns about anything else without a key.
        with pytest.raises(Unauthenticated) as refused:
            keys.user_of(authorization, "a\0b")
        assert refused.value.extra() == {}


def test_text_of_another_shape_costs_no_query(keys: Keys) -> None:
    with pytest.raises(Unauthenticated):
        keys.user_of("Bearer nonsense")
    assert keys.asked == 0


def test_scopes_do_not_imply_each_other(keys: Keys) -> None:
    for held in Scope:
        authorization = f"Bearer {keys.add(held).text}"
        for needed in Scope:
            if needed is held:
                assert keys.user_of(authorization, "ada", needed) == "ada"
            else:
                with pytest.raises(Forbidden) as refused:
                    keys.user_of(authorization, "ada", needed)
                assert refused.value.needed_scope == needed


def test_only_admins_may_act_for_nobody(keys: Keys) -> None:
    authorization = f"Bearer {keys.add(*Scope).text}"
    assert keys.user_of(authorization, None, Scope.ADMIN) is None
    for acting_user in (None, "", "a\nb", "x" * 256, "\udcff"):
        with pytest.raises(InvalidRequest):
            keys.user_of(authorization, acting_user)


def test_a_revoked_key_works_no_longer_than_the_cache_holds_it(keys: Keys) -> None:
    key = keys.add(Scope.FILES_READ)
    authorization = f"Bearer {key.text}"
    keys.user_of(authorization)
    keys.rows.clear()
    keys.now += 2.9
    keys.user_of(authorization)
    keys.now += 0.2
    with pytest.raises(Unauthenticated):
        keys.user_of(authorization)


def test_a_hit_of_the_cache_needs_the_whole_secret(keys: Keys) -> None:
    key = keys.add(Scope.FILES_READ)
    keys.user_of(f"Bearer {key.text}")
    with pytest.raises(Unauthenticated):
        keys.user_of(f"Bearer {key.text[:-2]}{'AA' if key.text[-2:] != 'AA' else 'BB'}")


def test_a_key_expires_while_it_is_cached(keys: Keys) -> None:
    def is_good(authorization: str) -> bool:
        try:
            keys.user_of(authorization)
        except Unauthenticated:
            return False
        return True

    def used(seconds: int) -> str | None:
        authorization = f"Bearer {keys.add(Scope.FILES_READ, expires_at=datetime.now(UTC) + timedelta(seconds=seconds)).text}"
        return authorization if is_good(authorization) else None

    authorization = before_its_end(used)
    until(lambda: not is_good(authorization), timeout_seconds=30)


def test_a_refusal_is_not_remembered_and_the_cache_is_bounded(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authenticator, "_MOST_CACHED_KEYS", 3)
    key = keys.add(Scope.FILES_READ)
    row = keys.rows.pop(key.key_id)
    with pytest.raises(Unauthenticated):
        keys.user_of(f"Bearer {key.text}")
    keys.rows[key.key_id] = row
    keys.user_of(f"Bearer {key.text}")
    for _ in range(10):
        keys.user_of(f"Bearer {keys.add(Scope.FILES_READ).text}")
    assert len(keys.authenticator._cache) == 3


# Over HTTP


def every_route(api: RunningServer) -> Iterator[tuple[str, str]]:
    """Every described route that needs a key, with ids filled in."""
    description = httpx.get(f"{api.url}/schema/openapi.json").json()
    for path, item in description["paths"].items():
        for method in item.keys() & {"get", "head", "put", "post", "patch", "delete"}:
            if item[method].get("security") != []:
                yield method, re.sub(r"\{\w+_id\}", "01890000-0000-7000-8000-000000000000", path.replace("{user_id}", "ada"))


def test_every_route_asks_who_is_there_before_anything_else(api: RunningServer) -> None:
    no_scope = api.new_key()
    routes = list(every_route(api))
    assert len(routes) >= 26
    with httpx.Client(base_url=api.url) as client:
        for method, path in routes:
            nobody = client.request(method, path, content=b"\xff")
            assert (nobody.status_code, nobody.headers["www-authenticate"]) == (401, 'Bearer realm="coffer"'), (method, path)
            powerless = client.request(method, path, content=b"\xff", headers={"Authorization": f"Bearer {no_scope}", "X-User-Id": "ada"})
            assert powerless.status_code == 403, (method, path)
            if method != "head":
                assert nobody.json()["code"] == "unauthenticated"
                assert powerless.json()["code"] == "forbidden" and powerless.json()["needed_scope"] in {
                    "files:read",
                    "files:write",
                    "links:write",
                    "jobs:write",
                    "admin",
                }


def test_a_revoked_key_is_refused_within_five_seconds(api: RunningServer) -> None:
    key = api.new_key(Scope.FILES_READ)
    with api.client("ada", api_key=key) as client:
        assert client.get("/api/files").status_code == 200
        execute(api.database_url, "update api_keys set revoked_at = now() where key_id = $1", key.split("_")[1])
        until(lambda: client.get("/api/files").status_code == 401, timeout_seconds=20)


def test_the_user_is_named_once_and_in_utf8(api: RunningServer) -> None:
    authorization = (b"Authorization", f"Bearer {api.api_key}".encode())
    with httpx.Client(base_url=api.url) as client:
        for user_id in ("ada", "user/a", "ü/%2F", "日本語 🐬", "e\u0301"):
            stored = client.get("/api/storage/usage", headers=[authorization, (b"X-User-Id", user_id.encode())])
            assert stored.status_code == 200
        for bad in ([], [b"a", b"a"], [b"\xff"], [b"a" * 256], [b"\xc2\x85"]):
            refused = client.get("/api/files", headers=[authorization, *((b"X-User-Id", value) for value in bad)])
            assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (400, "invalid_request", "X-User-Id"), bad
        twice = client.get("/api/files", headers=[authorization, authorization, (b"X-User-Id", b"ada")])
        assert twice.status_code == 401
