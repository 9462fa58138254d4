"""Every route of the OpenAPI description, with what it takes to ask it."""

from typing import Any, NamedTuple

import msgspec

from tests.attack.target import BODY, Tally, Target
from tests.attack.wire import Headers

ADMINS = ("/api/users", "/api/audit", "/api/webhooks")  # an admin's routes: every user is its business
UUIDS = ("file_id", "job_id", "media_id", "asset_id", "webhook_id")
APPS = ("/api/generate",)  # what changes a job is an app's: a user's own token does not
_METHODS = ("get", "head", "post", "put", "patch", "delete")

# A body for each type of body that routes take; {id} is the file meant. A new type needs a line here, or the attack fails.
BODIES: dict[str, Any] = {
    "FileChanges": {"file_name": "stolen"},
    "FavoriteChange": {"is_favorite": True},
    "TagsChange": {"tags": ["stolen"]},
    "FileIds": {"ids": ["{id}", "nonsense", "{id}"]},
    "LinkWish": {"ttl_seconds": 60},
    "LinksWish": {"ids": ["{id}", "nonsense", "{id}"]},
    "PublicWish": {"is_public": True},
    "UploadLinkWish": {"max_bytes": 10},
    "QuotaChange": {"max_bytes": None},
    "WebhookWish": {"url": "https://stolen.example/"},
    "RotationWish": {},
    "RedeliveryWish": {},
    "AssetWish": {"url": "https://stolen.example/"},
    "AssetReplacement": {"url": "https://stolen.example/"},
    "GenerateWish": {"outputs": [{"max_bytes": 10}]},
    "CharacterWish": {"entity_id": "1", "max_bytes": 10},
    "MoodboardWish": {"entity_id": "1", "max_bytes": 10},
    "AnimationWish": {"entity_id": "1", "max_bytes": 10, "image_id": "01890000-0000-7000-8000-000000000000"},
    "PrimaryChange": {"is_primary": True},
    "UploadedMedia": {"file_id": "{id}", "entity_type": "character", "entity_id": "stolen"},
    "ComposeWish": {"files": ["{id}"]},
}


class Operation(NamedTuple):
    method: str
    path: str
    parameters: list[str]
    body: Any


def operations_of(target: Target, tally: Tally) -> list[Operation]:
    """Every operation described, with its path parameters and a body. What this module does not know how to fill in is a breach."""
    description = target.nobody.get("/schema/openapi.json").json()
    found = []
    for path, item in description["paths"].items():
        for method in _METHODS:
            if method not in item or path.startswith("/health") or path in {"/api/files/events", "/api/generate/webhook"}:
                continue  # health is everybody's; events have no other user's id in them, and no end; the webhook has its own attack
            parameters = [each["name"] for each in item[method].get("parameters", ()) if each.get("in") == "path"]
            unknown = set(parameters) - {*UUIDS, "public_id", "user_id", "token", "name"}
            tally.check(not unknown, f"{method.upper()} {path}: nobody knows what another user's {', '.join(sorted(unknown))} is")
            body, known = _body(item[method])
            tally.check(known, f"{method.upper()} {path}: nobody knows a body for it")
            if known and not unknown:
                found.append(Operation(method.upper(), path, parameters, body))
    tally.check(len(found) >= 30, "the description holds too few routes to be whole")
    return found


def _body(operation: dict[str, Any]) -> tuple[Any, bool]:
    content = operation.get("requestBody", {}).get("content", {})
    if not content:
        return None, True
    if "application/octet-stream" in content:
        return BODY, True
    schema = content.get("application/json", {}).get("schema", {})
    references = [each["$ref"] for each in (schema, *schema.get("oneOf", ()), *schema.get("anyOf", ())) if "$ref" in each]
    name = references[0].rpartition("/")[2] if references else ""
    return BODIES.get(name), name in BODIES


def content_of(body: Any, file_id: str, headers: Headers) -> tuple[list[tuple[str, str]], bytes]:
    """Headers and body of a request to an operation with this body, about that file."""
    if body is None:
        return list(headers), b""
    if isinstance(body, bytes):
        return list(headers), body
    return [*headers, ("Content-Type", "application/json")], msgspec.json.encode(body).replace(b"{id}", file_id.encode())
