"""4: every route of the OpenAPI description with another user's ids: the answer is that of a missing file."""

import statistics
import time
from typing import Any, NamedTuple
from urllib.parse import quote

from server.auth import Scope
from tests.attack.routes import ADMINS, APPS, UUIDS, Operation, content_of, operations_of
from tests.attack.target import BODY, MISSING, Tally, Target
from tests.attack.wire import request

MISSING_PUBLIC_ID = "A" * 22
NAMING = ("file_id", "job_id", "media_id", "user_id", "public_id")

# Headers that must not make a difference either: they are about bytes that a stranger has no part in.
CONDITIONS: list[list[tuple[str, str]]] = [
    [],
    [("If-Match", "*")],
    [("If-None-Match", "{etag}")],
    [("If-Match", "{etag}")],
    [("Range", "bytes=0-0")],
]


class Credential(NamedTuple):
    """Somebody who is not ada. `admits` says whether some routes let them in at all, `is_admin` whether every user is their business."""

    name: str
    headers: list[tuple[str, str]]
    admits: bool
    is_admin: bool = False


class Belonging(NamedTuple):
    """Something of ada's, by the parameter that would name it, and what is like it and does not exist."""

    parameter: str
    value: str
    missing: str


def attack(target: Target, tally: Tally) -> str:
    file = target.upload(target.ada, name="adas-secret-name.png", tags="adas-secret-tag", package_name="adas-secret-package")
    target.upload(target.ada, name="adas-secret-other.png")
    target.upload(target.bob, name="his.png")
    link = target.link(target.ada, file["id"])
    _, upload_id = target.upload_link(target.ada)
    asset = target.ada.post("/api/assets/link", json={"url": "https://adas-secret.example/"}).json()
    job = target.ada.post("/api/generate", json={"outputs": [{"max_bytes": 100_000}] * 2, "prompt": "adas-secret-prompt"}).json()
    target.nobody.put(job["uploads"][0]["url"], content=BODY).raise_for_status()
    belongings = [
        Belonging("asset_id", asset["id"], MISSING),
        Belonging("job_id", job["job_id"], MISSING),
        Belonging("media_id", job["uploads"][0]["file_id"], MISSING),
        Belonging("file_id", file["id"], MISSING),
        Belonging("file_id", upload_id, MISSING),
        # Uuids have other spellings, and every one of them is another user's.
        Belonging("file_id", file["id"].upper(), MISSING.upper()),
        Belonging("public_id", file["id"].replace("-", "")[:22], MISSING_PUBLIC_ID),
    ]
    before = _all_of_hers(target)
    operations = operations_of(target, tally)
    for operation in operations:
        for credential in _credentials(target):
            if operation.parameters or "{id}" in str(operation.body):
                for each in belongings:
                    _compare(target, tally, operation, credential, each, file["etag"])
            elif operation.method != "DELETE":
                _look_around(target, tally, operation, credential)
    _look_for_leaks(target, tally, file)
    tally.check(before == _all_of_hers(target), "ada's files, usage or assets are not what they were")
    tally.check(target.get(link).status == 200, "ada's link was revoked")
    tally.check(target.ada.delete(f"/api/uploads/links/{upload_id}").status_code == 204, "ada's upload link was given up")
    tally.check(target.ada.delete(f"/api/assets/{asset['id']}").status_code == 204, "ada's asset was forgotten")
    return f"{len(operations)} routes, {tally.tried:,} comparisons alike; foreign/missing time {_timing(target, file['id'])}"


def _all_of_hers(target: Target) -> list[Any]:
    return [target.listed(target.ada), *(target.ada.get(path).json() for path in ("/api/storage/usage", "/api/assets"))]


def _credentials(target: Target) -> list[Credential]:
    """Who tries."""
    powerless = target.new_key()
    token = target.link(target.bob, target.listed(target.bob)[0]["id"]).split("/")[2]
    upload_token = target.upload_link(target.bob)[0].split("/")[2]
    return [
        Credential("an API key for bob", target.headers_of("bob"), admits=True, is_admin=True),
        Credential("an API key for somebody new", target.headers_of("nobody-yet"), admits=True, is_admin=True),
        Credential("an API key for ada's twin in capitals", target.headers_of("ADA"), admits=True, is_admin=True),
        Credential("bob's user token", [("Authorization", f"Bearer {target.token('bob')}")], admits=True),
        Credential("bob's user token for ada", [("Authorization", f"Bearer {target.token('bob')}"), ("X-User-Id", "ada")], admits=False),
        Credential("an API key without scopes for bob", [("Authorization", f"Bearer {powerless}"), ("X-User-Id", "bob")], admits=False),
        Credential("bob's link", [("Authorization", f"Bearer {token}"), ("X-User-Id", "ada")], admits=False),
        Credential("bob's upload link", [("Authorization", f"Bearer {upload_token}"), ("X-User-Id", "ada")], admits=False),
        Credential("nothing", [("X-User-Id", "ada")], admits=False),
    ]


def _compare(target: Target, tally: Tally, operation: Operation, credential: Credential, belonging: Belonging, etag: str) -> None:
    named = {"user_id": ("ada", "nobody-at-all"), "token": ("A" * 150 + "." + "A" * 43,) * 2, "name": ("x.png",) * 2}
    if belonging.parameter not in operation.parameters and not (belonging.parameter == "file_id" and "{id}" in str(operation.body)):
        if not set(operation.parameters) & named.keys():
            return
        if credential.is_admin and "user_id" in operation.parameters:
            return
    named[belonging.parameter] = (belonging.value, belonging.missing)
    for condition in CONDITIONS:
        answers = []
        for which in (0, 1):
            path = operation.path
            for name in operation.parameters:
                path = path.replace(f"{{{name}}}", quote(named[name][which], safe="") if name in named else MISSING)
            ids = named.get("file_id", (MISSING, MISSING))
            headers = [*credential.headers, *((name, value.replace("{etag}", etag)) for name, value in condition)]
            answer = target.wire.expect(request(operation.method, path, *content_of(operation.body, ids[which], headers)))
            answers.append(answer.comparable(*(named[name][which] for name in (*UUIDS, "user_id", "public_id") if name in named)))
        what = f"{operation.method} {operation.path} with {credential.name}, {condition}, {belonging.parameter} {belonging.value}"
        tally.check(answers[0] == answers[1], f"{what}: {answers[0]} is not {answers[1]}")
        bulk = "{id}" in str(operation.body)
        expected = {404, 200} if bulk else {404}
        if not _is_let_in(credential, operation) and not operation.path.startswith(("/f/", "/p/", "/u/")):
            expected = {401, 403}
        elif {"token"} & set(operation.parameters):
            expected = {403}
        tally.check(answers[0][0] in expected, f"{what}: {answers[0][0]}, not one of {expected}")
        if bulk:
            tally.check(not any(each in answers[0][2] for each in (b'"deleted"', b'"linked"', b'"url"')), f"{what}: {answers[0][2]!r}")


def _is_let_in(credential: Credential, operation: Operation) -> bool:
    """`is_admin` are API keys of all scopes, which alone are an app's, too."""
    is_apps = operation.path.startswith(APPS) and operation.method != "GET"
    return credential.admits and (credential.is_admin or not (is_apps or operation.path.startswith(ADMINS)))


def _look_around(target: Target, tally: Tally, operation: Operation, credential: Credential) -> None:
    """A route that names no file: nothing of ada's is in its answer."""
    if operation.path.startswith(ADMINS) and credential.is_admin:
        return
    answer = target.wire.expect(request(operation.method, operation.path, *content_of(operation.body, MISSING, credential.headers)))
    what = f"{operation.method} {operation.path} with {credential.name}"
    tally.check(_is_let_in(credential, operation) or answer.status in {401, 403}, f"{what}: {answer.status}")
    tally.check(b"adas-secret" not in answer.body and b'"ada"' not in answer.body, f"{what} shows {answer.body[:200]!r}")


def _look_for_leaks(target: Target, tally: Tally, file: dict[str, Any]) -> None:
    """Ada's words, cursors and keys, used by bob."""
    sorts = ("created", "-name", "size")
    cursors = [target.ada.get("/api/files", params={"limit": 1, "sort": sort}).json()["next_cursor"] for sort in sorts]
    filters: list[dict[str, Any]] = [
        *({"sort": sort, "limit": 50, "cursor": cursor} for sort, cursor in zip(sorts, cursors, strict=True)),
        {"tag": "adas-secret-tag"},
        {"package_name": "adas-secret-package"},
        {"name": "adas"},
        {"links": "1"},
        {"mime": "image/png"},
    ]
    for query in filters:
        answer = target.bob.get("/api/files", params=query)
        tally.check(answer.status_code in {200, 400} and "adas-secret" not in answer.text, f"a list with {query}: {answer.text[:200]}")
    key = {"Idempotency-Key": f"key-of-{file['id']}"}
    mine = target.ada.post("/api/files/upload", content=BODY, headers=key)
    his = target.bob.post("/api/files/upload", content=BODY, headers=key)
    different = mine.json()["id"] != his.json()["id"] and "idempotency-replayed" not in his.headers and his.json()["user_id"] == "bob"
    tally.check(different, "ada's Idempotency-Key gave bob ada's file")
    for client, answer in ((target.ada, mine), (target.bob, his)):
        client.delete(f"/api/files/{answer.json()['id']}").raise_for_status()
    reading = target.server.client("bob", api_key=target.new_key(Scope.FILES_READ))
    with reading:
        for refused in (
            reading.get("/api/users/ada"),
            reading.get("/api/users"),
            reading.delete("/api/users/ada"),
            reading.put("/api/users/ada/quota"),
        ):
            tally.check(refused.status_code == 403 and "ada" not in refused.json()["detail"], f"an API key without admin: {refused.text}")


def _timing(target: Target, file_id: str) -> str:
    """How long another user's file takes of how long a missing one takes, as medians of alternating requests; the furthest from 1."""
    furthest = 1.0
    for path in ("/api/files/{}", "/api/files/{}/download"):
        seconds: dict[str, list[float]] = {file_id: [], MISSING: []}
        for _ in range(target.many(400, 20)):
            for each in (file_id, MISSING):
                sent = request("GET", path.format(each), target.headers_of("bob"))
                began = time.perf_counter()
                target.wire.expect(sent)
                seconds[each].append(time.perf_counter() - began)
        ratio = statistics.median(seconds[file_id]) / statistics.median(seconds[MISSING])
        furthest = max(furthest, ratio, key=lambda each: abs(each - 1))
    return f"{furthest:.2f}"
