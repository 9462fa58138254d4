"""User tokens against a running server: who is believed, and everybody who is not."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from tests.access.forged_tokens import EC, ED, OFFLINE, RSA, Issuers, entry, refused_tokens
from tests.access.issuers import Issuer, SigningKey, listener
from tests.samples import image
from tests.serving import DEFAULTS, RunningServer, ServerFactory, SharedServer, execute
from tests.waiting import before_its_end, until

NEVER = "3600"  # seconds: no second fetch within a test


def get(server: RunningServer, token: str, path: str = "/api/files", **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers={"Authorization": f"Bearer {token}"} | headers)


class Tokens:
    """A server, and whose tokens it takes."""

    def __init__(self, issuers: Issuers, server: RunningServer) -> None:
        self.issuers = issuers
        self.clerk, self.other = issuers.clerk, issuers.other
        self.server = server

    def get(self, token: str, path: str = "/api/files", **headers: str) -> httpx.Response:
        return get(self.server, token, path, **headers)

    def client(self, token: str) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, headers={"Authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def tokens(shared_server: SharedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokens]:
    with Issuers(tmp_path_factory.mktemp("tokens")) as issuers:
        environment = issuers.environment | {"COFFER_TOKEN_KEYS_REFETCH_SECONDS": NEVER, "COFFER_LOG_LEVEL": "debug"}
        with shared_server(**environment) as server:
            yield Tokens(issuers, server)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


# Who is believed


def test_a_token_acts_for_its_subject(tokens: Tokens) -> None:
    good = {
        "rs": tokens.clerk.token(sub="rs"),
        "es": tokens.other.token(sub="es", aud="coffer", azp=None),
        "ed": ED.sign(tokens.other.claims(sub="ed", aud=["x", "media"])),
        "off": OFFLINE.sign(tokens.clerk.claims(iss="offline", sub="off", aud="coffer"), kid="whatever"),
        "user/ü 🐬": tokens.clerk.token(sub="user/ü 🐬"),
        "typed": RSA.sign(tokens.clerk.claims(sub="typed", sts="active"), typ="at+JWT"),
        "nameless": jwt.encode(tokens.clerk.claims(sub="nameless"), RSA.private, "RS256"),
        "just ended": OFFLINE.sign(tokens.clerk.claims(iss="offline", sub="just ended", aud="coffer", exp=int(time.time()) - 5)),
    }
    for user_id, token in good.items():
        with tokens.client(token) as client:
            stored = client.post("/api/files/upload", content=image())
            assert (stored.status_code, stored.json()["user_id"]) == (201, user_id)
            assert [each["id"] for each in client.get("/api/files").json()["files"]] == [stored.json()["id"]]
            link = client.post(f"/api/files/{stored.json()['id']}/link").json()["url"]
            assert httpx.get(tokens.server.url + link).content == image()
            assert client.delete(f"/api/files/{stored.json()['id']}").status_code == 204


def test_another_users_file_is_missing(tokens: Tokens) -> None:
    with tokens.client(tokens.clerk.token(sub="ada")) as ada, tokens.client(tokens.clerk.token(sub="eve")) as eve:
        file_id = ada.post("/api/files/upload", content=image()).json()["id"]
        assert eve.get(f"/api/files/{file_id}").status_code == eve.get(f"/api/files/{file_id}/download").status_code == 404
        assert ada.get(f"/api/files/{file_id}/download").content == image()


def test_a_token_follows_its_subjects_previews_alone(tokens: Tokens) -> None:
    """There is no worker: what it would say of both files is said by hand."""
    finish = "select pg_notify('coffer_notice', id || ' ' || user_id) from user_files where user_id = any($1) order by user_id"
    with (
        tokens.client(tokens.clerk.token(sub="zoe")) as zoe,
        tokens.client(tokens.clerk.token(sub="eva")) as eva,
        zoe.stream("GET", "/api/files/events", timeout=20) as answer,
    ):
        lines = answer.iter_lines()
        assert [next(lines), next(lines)] == ["retry: 2000", ""]
        ids = [each.post("/api/files/upload", content=image()).json()["id"] for each in (eva, zoe)]
        execute(tokens.server.database_url, "update user_files set preview_state = 'ready' where user_id in ('eva', 'zoe')")
        execute(tokens.server.database_url, finish, ["eva", "zoe"])
        assert next(lines) == "event: preview"
        assert json.loads(next(lines).removeprefix("data: "))["id"] == ids[1]
        assert zoe.get("/api/files/events", headers={"X-User-Id": "eva"}).status_code == 403


def test_a_token_speaks_for_nobody_else(tokens: Tokens) -> None:
    token = tokens.clerk.token(sub="ada")
    assert tokens.get(token).status_code == tokens.get(token, X_User_Id="ada").status_code == 200
    for other in ("eve", "Ada", "", "ada,eve", "x" * 300):
        refused = tokens.get(token, **{"X-User-Id": other})
        assert code(refused) == (403, "forbidden"), other
    twice = httpx.get(
        f"{tokens.server.url}/api/files", headers=[("Authorization", f"Bearer {token}"), ("X-User-Id", "ada"), ("X-User-Id", "ada")]
    )
    assert code(twice) == (400, "invalid_request")


def test_claims_give_no_rights(tokens: Tokens) -> None:
    token = tokens.clerk.token(sub="eve", scope="admin files:read", scopes=["admin"], role="admin", admin=True, permissions=["admin"])
    assert tokens.get(token).status_code == 200
    with tokens.client(token) as client:
        for answer in (
            client.get("/api/users"),
            client.get("/api/users/eve"),
            client.put("/api/users/eve/quota", json={"max_bytes": None}),
            client.delete("/api/users/eve"),
        ):
            assert (code(answer), answer.json()["needed_scope"]) == ((403, "forbidden"), "admin")


# Who is not


def test_everything_else_is_refused_alike(tokens: Tokens) -> None:
    fetches = tokens.issuers.fetches
    names = set()
    for name, token in refused_tokens(tokens.issuers):
        names.add(name)
        answer = httpx.get(f"{tokens.server.url}/api/files", headers=[(b"Authorization", b"Bearer " + token.encode())])
        problem = answer.json()
        assert problem.pop("request_id")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="coffer"'), name
        assert problem == {
            "type": "urn:coffer:problem:unauthenticated",
            "title": "This request needs valid credentials.",
            "detail": "This request needs valid credentials.",
            "status": 401,
            "code": "unauthenticated",
        }, name
    assert len(names) > 80
    assert tokens.get(tokens.clerk.token()).status_code == 200
    assert tokens.issuers.fetches == fetches


def test_keys_that_a_token_names_are_not_fetched(tokens: Tokens) -> None:
    with listener() as (url, called):
        for name in ("jku", "x5u"):
            for changes in ({}, {"kid": "elsewhere"}):
                forged = EC.sign(tokens.clerk.claims(), alg="ES256", **changes, **{name: url})
                signed = RSA.sign(tokens.clerk.claims(), **changes, **{name: url})
                for token in (forged, signed):
                    assert tokens.get(token).status_code == 401
        from_there = RSA.sign(tokens.clerk.claims(iss=url.removesuffix("/keys.json")))
        assert tokens.get(from_there).status_code == 401
        assert not called()


def test_a_flood_of_unknown_keys_causes_no_fetch(tokens: Tokens) -> None:
    fetches = tokens.clerk.fetches
    assert fetches == 1
    forged = [RSA.sign(tokens.clerk.claims(), kid=f"unknown-{number}") for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status_code for answer in pool.map(tokens.get, forged)} == {401}
    assert tokens.clerk.fetches == fetches
    assert tokens.get(tokens.clerk.token()).status_code == 200


def test_a_token_comes_once_and_as_bearer(tokens: Tokens) -> None:
    token = tokens.clerk.token()
    url = f"{tokens.server.url}/api/files"
    wrong: list[list[tuple[str, str]]] = [
        [("Authorization", f"Bearer {token}"), ("Authorization", f"Bearer {token}")],
        [("Authorization", f"Bearer {token}"), ("Authorization", f"Bearer {tokens.server.api_key}"), ("X-User-Id", "ada")],
        [("Authorization", token)],
        [("Authorization", f"Basic {token}")],
        [("Authorization", f"Bearer {token} {token}")],
        [("Authorization", f"Bearer {token}, Bearer {token}")],
        [("Cookie", f"__session={token}")],
        [("X-Authorization", f"Bearer {token}")],
    ]
    for headers in wrong:
        assert code(httpx.get(url, headers=headers)) == (401, "unauthenticated"), headers
    for query in (f"access_token={token}", f"token={token}"):
        assert httpx.get(f"{url}?{query}").status_code == 401
    assert httpx.get(url, headers={"Authorization": f"bearer {token}"}).status_code == 200


def test_the_body_is_not_read_for_a_bad_token(tokens: Tokens) -> None:
    with tokens.client(tokens.clerk.token(sts="pending")) as client:
        assert code(client.post("/api/files/upload", content=image(5 * 2**20))) == (401, "unauthenticated")


def test_a_token_that_was_believed_ends_with_its_time(tokens: Tokens) -> None:
    def believed(seconds: int) -> str | None:
        token = tokens.clerk.token(exp=time.time() + seconds)
        return token if tokens.get(token).status_code == 200 else None

    token = before_its_end(believed)
    until(lambda: tokens.get(token).status_code == 401, timeout_seconds=20)


def test_the_log_tells_why_and_shows_no_token(tokens: Tokens) -> None:
    changes: list[dict[str, Any]] = [{}, {"sts": "pending"}, {"exp": 1}, {"sub": "logged" + "x" * 250}]
    seen = [tokens.clerk.token(**each) for each in changes]
    for token in seen:
        tokens.get(token)
    log = tokens.server.logged()
    reasons = {line["reason"] for line in map(json.loads, log.splitlines()) if line["message"] == "refused a user token"}
    assert {"pending session", "ExpiredSignatureError", "subject"} <= reasons
    for token in seen:
        for piece in token.split(".")[1:]:
            assert piece not in log
    assert "logged" + "x" * 250 not in log
    assert '"principal":"user_token"' in log


# Issuers that fail, and their keys


def test_a_rotated_key_is_taken_and_an_outage_survived(start_server: ServerFactory) -> None:
    clerk, second = Issuer(RSA), SigningKey("RS256", "ins_2")
    try:
        server = start_server(COFFER_TOKEN_ISSUERS=json.dumps([entry(clerk)]), COFFER_TOKEN_KEYS_REFETCH_SECONDS="1")
        assert get(server, clerk.token()).status_code == 200
        clerk.keys = [second, RSA]
        until(lambda: get(server, clerk.token()).status_code == 200)
        assert get(server, RSA.sign(clerk.claims(sub="old key"))).status_code == 200
        clerk.down()
        for key in (RSA, second):
            assert get(server, key.sign(clerk.claims(sub=f"during the outage {key.kid}"))).status_code == 200
        assert get(server, RSA.sign(clerk.claims(), kid="ins_3")).status_code == 401
    finally:
        clerk.down()


def test_an_issuer_that_was_never_reached(start_server: ServerFactory) -> None:
    clerk = Issuer(RSA)
    clerk.down()
    try:
        server = start_server(COFFER_TOKEN_ISSUERS=json.dumps([entry(clerk)]), COFFER_TOKEN_KEYS_REFETCH_SECONDS="1")
        refused = get(server, clerk.token())
        assert (code(refused), refused.headers["retry-after"]) == ((503, "token_keys_unavailable"), "10")
        assert get(server, clerk.token(iss="https://elsewhere.example.com")).status_code == 401
        with server.client("ada") as ada:
            assert ada.get("/api/files").status_code == 200
        clerk.up()
        until(lambda: get(server, clerk.token()).status_code == 200)
    finally:
        clerk.down()


def test_a_server_without_issuers_takes_no_tokens(server: RunningServer) -> None:
    clerk = Issuer(RSA)
    try:
        answer = httpx.get(f"{server.url}/api/files", headers={"Authorization": f"Bearer {clerk.token()}"})
        assert code(answer) == (401, "unauthenticated")
        assert clerk.fetches == 0
    finally:
        clerk.down()


# Users who come with a token


def offline_setting(directory: Path) -> str:
    (directory / "key.pem").write_bytes(OFFLINE.pem())
    return json.dumps([{"issuer": "offline", "public_key_file": str(directory / "key.pem"), "audiences": ["coffer"]}])


def offline_token(user_id: str) -> str:
    now = int(time.time())
    return OFFLINE.sign({"iss": "offline", "sub": user_id, "iat": now, "exp": now + 300, "aud": "coffer"})


def test_the_first_request_makes_the_user_once(start_server: ServerFactory, tmp_path: Path) -> None:
    server = start_server(
        COFFER_TOKEN_ISSUERS=offline_setting(tmp_path),
        COFFER_DEFAULT_QUOTA_BYTES="5000",
        COFFER_PROCESSES="2",
        COFFER_DATABASE_CONNECTIONS="5",
    )

    def first(number: int) -> int:
        headers = {"Authorization": f"Bearer {offline_token('new')}"}
        if number % 2:
            return httpx.post(f"{server.url}/api/files/upload", content=image(100), headers=headers).status_code
        return httpx.get(f"{server.url}/api/storage/usage", headers=headers).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(first, range(32))) == {200, 201}
    (user,) = execute(server.database_url, "select user_id, tier, max_bytes, total_bytes, file_count from user_storage")
    assert tuple(user) == ("new", "standard", 5_000, 1_600, 16)
    records = """
        select action, actor_kind, actor_id, acting_user_id, count(*) from audit_log where user_id = 'new' group by 1, 2, 3, 4 order by 1
    """
    assert [tuple(row) for row in execute(server.database_url, records)] == [
        ("file.created", "user_token", "new", "new", 16),
        ("user.created", "user_token", "new", "new", 1),
    ]


def test_unknown_users_are_refused_where_tokens_make_none(start_server: ServerFactory, tmp_path: Path) -> None:
    server = start_server(COFFER_TOKEN_ISSUERS=offline_setting(tmp_path), COFFER_TOKEN_USERS_ARE_CREATED="false")
    headers = {"Authorization": f"Bearer {offline_token('ada')}"}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        for answer in (client.get("/api/files"), client.post("/api/files/upload", content=image())):
            assert code(answer) == (403, "user_unknown")
        assert execute(server.database_url, "select from user_storage") == []
        server.set_quota("ada", 10_000)
        assert client.post("/api/files/upload", content=image()).status_code == 201
        with server.client() as admin:
            assert admin.delete("/api/users/ada").status_code < 300
        until(lambda: client.get("/api/files").status_code == 403)
        assert execute(server.database_url, "select from user_storage") == []


def test_an_erased_user_does_not_come_back_where_tokens_make_none(start_server: ServerFactory, tmp_path: Path) -> None:
    server = start_server(
        COFFER_TOKEN_ISSUERS=offline_setting(tmp_path),
        COFFER_TOKEN_USERS_ARE_CREATED="false",
        COFFER_API_KEY_CACHE_SECONDS="3600",  # so the token's user is still taken for known
    )
    server.set_quota("ada", 10_000)
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {offline_token('ada')}"}) as ada, server.client() as admin:
        file_id = ada.post("/api/files/upload", content=image()).json()["id"]
        assert ada.post(f"/api/files/{file_id}/copy").status_code == 201
        assert admin.delete("/api/users/ada").status_code == 204
        for answer in (
            ada.post("/api/files/upload", content=image()),
            ada.post("/api/files/upload", content=image(), headers={"Idempotency-Key": "k"}),
            ada.post("/api/files/upload", files={"file": image()}),
            ada.post("/api/uploads/links", json={"max_bytes": 1_000}),
        ):
            assert code(answer) == (403, "user_unknown")
        assert admin.get("/api/users/ada").status_code == 404
        server.set_quota("ada", 10_000)
        assert ada.post("/api/files/upload", content=image()).status_code == 201


def test_a_server_with_a_wrong_key_file_does_not_start(database_url: str, tmp_path: Path) -> None:
    setting = offline_setting(tmp_path)
    (tmp_path / "key.pem").write_text("nonsense")
    environment = DEFAULTS | {"PATH": os.environ["PATH"], "DATABASE_URL": database_url, "COFFER_PORT": "0", "COFFER_TOKEN_ISSUERS": setting}
    command = [sys.executable, "-m", "server.cli", "serve"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("coffer: COFFER_TOKEN_ISSUERS: public_key_file of offline: holds no PEM public key")
