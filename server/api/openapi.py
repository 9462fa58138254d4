"""The OpenAPI description at `/schema`, and a page that shows it without loading anything from elsewhere.

Litestar describes its own routes. What it cannot know is added here: the byte routes of `front.py`, the user that an API key
acts for, and the shape of failures.
"""

import html
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, Router, get
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from server.api.problems import MEDIA_TYPE
from server.delivery.export import MEDIA_TYPE as EXPORT_MEDIA_TYPE
from server.fields import NAME_CHARACTERS, PACKAGE_NAME_CHARACTERS, USER_ID_CHARACTERS
from server.kinds import KINDS

Json = dict[str, Any]
Handler = HTTPRouteHandler | Router

_METHODS = ("get", "head", "post", "put", "patch", "delete")
_WEBHOOK = "/api/generate/webhook"
_ACTS_FOR_A_USER = (
    "/api/assets",
    "/api/files",
    "/api/generate",
    "/api/links",
    "/api/media",
    "/api/storage",
    "/api/trash",
    "/api/uploads",
)
_OPEN = ("/health", "/f/", "/p/", "/u/", _WEBHOOK)
# Request bodies that refuse unknown fields, which Litestar does not tell.
_CLOSED = (
    "FileChanges",
    "FavoriteChange",
    "TagsChange",
    "FileIds",
    "QuotaChange",
    "LinkWish",
    "LinksWish",
    "PublicWish",
    "UploadLinkWish",
    "WebhookWish",
    "RotationWish",
    "RedeliveryWish",
    "AssetWish",
    "AssetReplacement",
    "GenerateWish",
    "OutputSpec",
    "CallbackWish",
    "CharacterWish",
    "MoodboardWish",
    "AnimationWish",
    "PrimaryChange",
)

_ABOUT = """Coffer stores media files for users, each within a quota.

Every route but `/health` and the links needs an API key in `Authorization: Bearer cof_...` or, where issuers are set up, a user's own
token (a JWT). With a key, routes of files, links and storage act for the user named in `X-User-Id`; with a token, for the token's
subject. Failures are `application/problem+json` with a stable `code`. Too many requests or uploads are answered 429 with
`Retry-After`; `RateLimit-Policy` and `RateLimit` tell where a request stands."""


def handlers(described: list[Handler]) -> list[Handler]:
    """The routes that serve the description of the `described` routes."""

    @cache  # made when first asked for: it takes longer than the rest of the start-up
    def description() -> Json:
        return describe(described)

    @get("/schema", include_in_schema=False, media_type="text/html", sync_to_thread=False)
    def schema(request: Request[Any, Any, Any]) -> Response[bytes]:
        """The page for browsers, the description for everybody else."""
        if "text/html" not in request.headers.get("accept", ""):
            return _json(description())
        return Response(page(description()).encode(), media_type="text/html", headers=_PAGE_HEADERS)

    @get("/schema/openapi.json", include_in_schema=False, sync_to_thread=False)
    def schema_json() -> Response[bytes]:
        return _json(description())

    return [schema, schema_json]


def _json(description: Json) -> Response[bytes]:
    return Response(msgspec.json.encode(description), media_type="application/json", headers={"vary": "Accept"})


def describe(described: list[Handler]) -> Json:
    """The whole description as JSON data."""
    config = OpenAPIConfig(
        title="Coffer", version="1", description=_ABOUT, use_handler_docstrings=True, render_plugins=[JsonRenderPlugin()]
    )
    description: Json = Litestar(described, openapi_config=config, logging_config=None).openapi_schema.to_schema()
    description["security"] = [{"ApiKey": []}]
    components = description.setdefault("components", {})
    components["securitySchemes"] = {
        "ApiKey": {"type": "http", "scheme": "bearer", "description": "An API key: `cof_...`."},
        "UserToken": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "A user's own token, never an admin's."},
    }
    components["parameters"] = {"ActingUser": _ACTING_USER}
    components["responses"] = {"Problem": {"description": "A failure.", "content": {MEDIA_TYPE: {"schema": _ref("Problem")}}}}
    components["schemas"] = dict(
        sorted(
            {
                **components.get("schemas", {}),
                "Problem": _PROBLEM,
                "UploadResults": _UPLOAD_RESULTS,
                "PipelineMessage": _PIPELINE_MESSAGE,
                "PipelineAnswer": _PIPELINE_ANSWER,
            }.items()
        )
    )
    for name in _CLOSED:
        components["schemas"][name]["additionalProperties"] = False
    for path in ("/api/files/{file_id}/favorite", "/api/files/{file_id}/link"):
        description["paths"][path]["post"]["requestBody"]["required"] = False
    for path in ("/api/generate", "/api/generate/character", "/api/generate/moodboard", "/api/generate/animation"):
        description["paths"][path]["post"].setdefault("parameters", []).append(
            _header("Idempotency-Key", "Requests with the same key register one job, however often they are repeated.")
        )
    for path, operations in _BYTE_ROUTES.items():
        description["paths"].setdefault(path, {}).update(deepcopy(operations))  # they are completed below
    for path, _, operation in _operations(description):
        _complete(path, operation)
    description["paths"] = dict(sorted(description["paths"].items()))
    return description


def _complete(path: str, operation: Json) -> None:
    responses: Json = operation.setdefault("responses", {})
    responses.pop("400", None)  # Litestar's own shape of it, which we never send
    problem = {"$ref": "#/components/responses/Problem"}
    if path.startswith(_OPEN):
        operation["security"] = []
        if path == "/health/ready":
            responses["503"] = {**responses["200"], "description": "Not ready; the checks tell why."}
    else:
        responses |= {"401": problem, "403": problem}
    responses["default"] = problem
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "query":  # a query cannot say null
            parameter["schema"] = _without_null(parameter["schema"])
    if path.startswith(_ACTS_FOR_A_USER) and path != _WEBHOOK:
        operation["security"] = [{"ApiKey": []}, {"UserToken": []}]
        operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/ActingUser"})


def _without_null(schema: Json) -> Json:
    choices = [choice for choice in schema.get("oneOf", ()) if choice != {"type": "null"}]
    schema = choices[0] if len(choices) == 1 else schema
    if "enum" in schema:
        schema = {**schema, "type": "string", "enum": [value for value in schema["enum"] if value is not None]}
    return schema


def _operations(description: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in description["paths"].items():
        for method in _METHODS:
            if method in item:
                yield path, method, item[method]


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _query(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _header(name: str, description: str, *, required: bool = False) -> Json:
    return {"name": name, "in": "header", "schema": {"type": "string"}, "description": description, "required": required}


def _answer(description: str, schema: Json, **headers: str) -> Json:
    answer: Json = {"description": description, "content": {"application/json": {"schema": schema}}}
    if headers:
        answer["headers"] = {name: {"schema": {"type": "string"}, "description": text} for name, text in headers.items()}
    return answer


_ACTING_USER: Json = {
    "name": "X-User-Id",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": USER_ID_CHARACTERS},
    "description": "The user acted for, in UTF-8. Required with an API key; with a user token it may be left out.",
}

_PROBLEM: Json = {
    "type": "object",
    "description": "RFC 9457. Some codes have further fields, such as the sizes of `quota_exceeded`.",
    "required": ["type", "title", "status", "detail", "code", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "Stable; for programs."},
        "request_id": {"type": "string", "description": "Also in the X-Request-Id header and in the log."},
    },
}

_UPLOAD_RESULTS: Json = {
    "type": "object",
    "required": ["results"],
    "properties": {
        "results": {
            "type": "array",
            "description": "In the order of the form's files.",
            "items": {
                "type": "object",
                "required": ["status"],
                "properties": {"status": {"type": "integer"}, "file": _ref("FileAnswer"), "problem": _ref("Problem")},
            },
        }
    },
}

_FILE_ID: Json = {"name": "file_id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
_BINARY: Json = {"type": "string", "format": "binary"}
_KIND: Json = {"type": "string", "enum": list(KINDS)}
_DIGESTS = [
    _header("Content-Digest", "RFC 9530, `sha-256=:...:` or sha-512. Bytes that do not match are refused, and nothing is stored."),
    _header("Repr-Digest", "As Content-Digest."),
    _header("Content-MD5", "The MD5 of the bytes in base64."),
]

_UPLOAD: Json = {
    "tags": ["Bytes"],
    "operationId": "Upload",
    "summary": "Upload",
    "description": (
        "Stores a file: the raw body, or the file parts of a form. Answered once the bytes and their row are durable. "
        "The type is taken from the bytes; `type` is needed only where they fit several kinds (JSON and zip)."
    ),
    "parameters": [
        _query("name", {"type": "string", "minLength": 1, "maxLength": NAME_CHARACTERS}, "The file's name (raw body only)."),
        _query("type", _KIND, "The kind that the bytes must be of."),
        _query("package_name", {"type": "string", "maxLength": PACKAGE_NAME_CHARACTERS}, "The package that the file belongs to."),
        _query("tags", {"type": "string"}, "Tags, separated by commas."),
        _query("metadata", {"type": "string"}, "A JSON object."),
        _header("Idempotency-Key", "Requests with the same key store one file, however often they are repeated."),
        *_DIGESTS,
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {**_BINARY, "description": "May be repeated."},
                        "type": _KIND,
                        "package_name": {"type": "string"},
                        "tags": {"type": "string"},
                        "metadata": {"type": "string", "description": "A JSON object."},
                    },
                }
            },
        },
    },
    "responses": {
        "201": _answer(
            "Stored. For a form with several files, one result for each.",
            {"anyOf": [_ref("FileAnswer"), _ref("UploadResults")]},
            Location="Where the file's fields are.",
        ),
        "207": _answer("Of several files some were refused; one result for each.", _ref("UploadResults")),
    },
}

_REPLACE: Json = {
    "tags": ["Bytes"],
    "operationId": "ReplaceContent",
    "summary": "ReplaceContent",
    "description": "Replaces a file's bytes with the raw body. The old bytes stay until the new ones are durable.",
    "parameters": [
        _FILE_ID,
        _header("If-Match", "The ETag of the bytes that are meant. Other bytes stay."),
        *_DIGESTS,
    ],
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BINARY}}},
    "responses": {"200": _answer("Replaced.", _ref("FileAnswer"))},
}

_BYTES_HEADERS: Json = {
    name: {"schema": {"type": "string"}} for name in ("ETag", "Last-Modified", "Accept-Ranges", "Content-Disposition", "Content-Length")
}


def _download(method: str, description: str) -> Json:
    content = {"*/*": {"schema": _BINARY}} if method == "get" else {}
    return {
        "tags": ["Bytes"],
        "operationId": "Download" if method == "get" else "DownloadHead",
        "summary": "Download" if method == "get" else "DownloadHead",
        "description": description,
        "parameters": [
            _FILE_ID,
            _query("disposition", {"type": "string", "enum": ["inline", "attachment"]}, "How a browser is to treat the bytes."),
            _header("Range", "One range of bytes, such as `bytes=0-499`."),
            _header("If-Range", "The ETag or date for which the range is meant; else all bytes are sent."),
            _header("If-None-Match", "ETags that the client has."),
            _header("If-Match", "ETags that the client accepts."),
            _header("If-Modified-Since", "An HTTP date."),
            _header("If-Unmodified-Since", "An HTTP date."),
        ],
        "responses": {
            "200": {"description": "All bytes.", "headers": _BYTES_HEADERS, "content": content},
            "206": {"description": "The range.", "headers": _BYTES_HEADERS, "content": content},
            "304": {"description": "The client has these bytes."},
        },
    }


def _segment(name: str, description: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": description}


_TOKEN = _segment("token", "As it stands in the link.")


def _linked(method: str, description: str, *segments: Json) -> Json:
    download = _download(method, description)
    name = "Public" if len(segments) == 1 else "Linked"
    name += "" if method == "get" else "Head"
    conditions = [each for each in download["parameters"] if each["in"] == "header"]
    refusals = {} if len(segments) == 1 else {"403": {"$ref": "#/components/responses/Problem"}}
    return {
        **download,
        "operationId": name,
        "summary": name,
        "parameters": [*segments, *conditions],
        "responses": {**download["responses"], **refusals},
    }


_LINKED = (_TOKEN, _segment("name", "As it stands in the link."))
_PUBLIC = (_segment("public_id", "As it stands in the public URL."),)

_UPLOAD_BY_LINK: Json = {
    "tags": ["Bytes"],
    "operationId": "UploadByLink",
    "summary": "UploadByLink",
    "description": "Stores the raw body as the one file of an upload link. What fails leaves the link to be tried again until it expires.",
    "parameters": [
        _TOKEN,
        _query("name", {"type": "string", "minLength": 1, "maxLength": NAME_CHARACTERS}, "The file's name, unless the link has one."),
        *_DIGESTS,
    ],
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BINARY}}},
    "responses": {"201": _answer("Stored.", _ref("FileAnswer")), "403": {"$ref": "#/components/responses/Problem"}},
}

_EVENTS: Json = {
    "tags": ["Files"],
    "operationId": "FollowFiles",
    "summary": "Follow files",
    "description": (
        "Server-sent events: `preview` for each of the user's files whose preview is finished, whatever became of it; its `data` is the "
        "file as in other answers, a FileAnswer. What is finished after the answer has begun is told, or the stream ends: list the files "
        "anew whenever you have connected. It ends after 5 minutes at the latest; connect again then. A comment comes every 15 s. A user "
        "may have 10 streams open."
    ),
    "responses": {"200": {"description": "The stream.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}},
}

_EXPORT: Json = {
    "tags": ["Bytes"],
    "operationId": "Export",
    "summary": "Export",
    "description": (
        "All files of a user, in the trash or not, in one tar archive that is made while it is sent: the files under names for people, "
        "`metadata.json` and a page, `index.html`. For an admin's key, the user's own token, or a key with `files:read` that acts for the "
        "user (`X-User-Id`) and is not restricted to some types. An archive without its end was cut off."
    ),
    "security": [{"ApiKey": []}, {"UserToken": []}],
    "parameters": [_segment("user_id", "The user's id, percent-encoded: `user/a` is `user%2Fa`.")],
    "responses": {"200": {"description": "The archive.", "content": {EXPORT_MEDIA_TYPE: {"schema": _BINARY}}}},
}

_JOB_EVENTS: Json = {
    "tags": ["Generation"],
    "operationId": "FollowJob",
    "summary": "Follow a job",
    "description": (
        "Server-sent events: `job` at once, and whenever the job has changed, until it has ended; its `data` is the job as in other "
        "answers, a JobAnswer. It ends after 5 minutes at the latest; connect again then. A comment comes every 15 s. A user may have 10 "
        "streams open."
    ),
    "parameters": [{"name": "job_id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}],
    "responses": {"200": {"description": "The stream.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}},
}

_PIPELINE_MESSAGE: Json = {
    "type": "object",
    "additionalProperties": False,
    "required": ["type", "data"],
    "properties": {
        "type": {"type": "string", "enum": ["job.progress", "job.completed", "job.failed"]},
        "timestamp": {"type": "string"},
        "data": {
            "type": "object",
            "additionalProperties": False,
            "required": ["job_id"],
            "properties": {
                "job_id": {"type": "string", "format": "uuid"},
                "outputs": {
                    "type": "array",
                    "maxItems": 100,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["index"],
                        "description": "Its bytes in `base64`, or a `url` that Coffer is to fetch it from.",
                        "properties": {
                            "index": {"type": "integer", "minimum": 0, "maximum": 99},
                            "base64": {"type": "string", "format": "byte"},
                            "url": {"type": "string", "maxLength": 4096},
                        },
                    },
                },
                "progress_percent": {"type": "integer", "minimum": 0, "maximum": 100},
                "credits_used": {"type": "number", "minimum": 0},
                "error": {"type": "string", "maxLength": 2000},
            },
        },
    },
}

_PIPELINE_ANSWER: Json = {
    "type": "object",
    "required": ["status", "outputs"],
    "properties": {
        "status": {"type": "string", "enum": ["accepted", "repeated", "late"]},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "state", "file_id", "code"],
                "properties": {
                    "index": {"type": "integer"},
                    "state": {"type": "string", "enum": ["awaited", "fetching", "stored", "failed", "refused", "late", "unknown"]},
                    "file_id": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"], "description": "Why it was refused; another message may bring it again."},
                },
            },
        },
    },
}

_WEBHOOK_IN: Json = {
    "tags": ["Pipelines"],
    "operationId": "PipelineWebhook",
    "summary": "Hear a pipeline",
    "description": (
        "What a pipeline says of a job: progress, outputs, cost, its end. Signed by Standard Webhooks with the job's secret (`?job=`) or "
        "one of the pipeline's (`?pipeline=`); svix' names of the headers are taken too. A message counts once, however often it is sent."
    ),
    "parameters": [
        _query("job", {"type": "string", "format": "uuid"}, "The job whose secret signed."),
        _query("pipeline", {"type": "string"}, "Or the pipeline whose secret signed."),
        _header("webhook-id", "The message's id: the same when it is sent again."),
        _header("webhook-timestamp", "Unix seconds, at most 5 minutes off."),
        _header("webhook-signature", "`v1,` and the base64 of the HMAC-SHA256; several, separated by spaces."),
    ],
    "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("PipelineMessage")}}},
    "responses": {
        "200": _answer("Heard.", _ref("PipelineAnswer")),
        "401": {"$ref": "#/components/responses/Problem"},
    },
}

_BYTE_ROUTES: dict[str, Json] = {
    "/api/users/{user_id}/export": {"get": _EXPORT},
    "/api/generate/events/{job_id}": {"get": _JOB_EVENTS},
    _WEBHOOK: {"post": _WEBHOOK_IN},
    "/api/files/events": {"get": _EVENTS},
    "/api/files/upload": {"post": _UPLOAD},
    "/api/files/{file_id}/content": {"put": _REPLACE},
    "/api/files/{file_id}/download": {
        "get": _download("get", "The file's bytes."),
        "head": _download("head", "What a download would answer, without the bytes."),
    },
    "/f/{token}/{name}": {
        "get": _linked("get", "The bytes of a signed link.", *_LINKED),
        "head": _linked("head", "What the link would answer, without the bytes.", *_LINKED),
    },
    "/p/{public_id}": {
        "get": _linked("get", "The bytes of a public file.", *_PUBLIC),
        "head": _linked("head", "What the public URL would answer, without the bytes.", *_PUBLIC),
    },
    "/u/{token}": {"put": _UPLOAD_BY_LINK},
}

# The page has no scripts and loads nothing, and says so to the browser.
_PAGE_HEADERS = {"vary": "Accept", "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }  article { margin: 1.5rem 0 }
code { background: #f3f3f3; padding: 0 .2em }  .method { font-weight: bold; display: inline-block; min-width: 4.5em }
table { border-collapse: collapse; margin: .5rem 0 }  td, th { border: 1px solid #ddd; padding: .2rem .6rem; text-align: left }
"""


def page(description: Json) -> str:
    """The description as one self-contained HTML page."""
    by_tag: dict[str, list[str]] = {}
    for path, method, operation in _operations(description):
        by_tag.setdefault(operation.get("tags", ["Other"])[0], []).append(_article(description, path, method, operation))
    sections = "".join(f"<h2>{_text(tag)}</h2>{''.join(articles)}" for tag, articles in sorted(by_tag.items()))
    about = "".join(f"<p>{_text(part)}</p>" for part in _ABOUT.split("\n\n"))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Coffer API</title><style>{_STYLE}</style></head><body>'
        f'<h1>Coffer API</h1>{about}<p>For programs: <a href="/schema/openapi.json">openapi.json</a>.</p>{sections}</body></html>'
    )


def _article(description: Json, path: str, method: str, operation: Json) -> str:
    parts = [f"<article><code><span class=method>{method.upper()}</span> {_text(path)}</code>"]
    parts.append(f"<p>{_text(operation.get('description', ''))}</p>")
    fields = [_resolved(description, parameter) for parameter in operation.get("parameters", [])]
    rows = [(each["name"], each["in"] + (", required" if each.get("required") else ""), each.get("description", "")) for each in fields]
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(description, content.get("schema", {}))
        rows.append((media_type, "body", ", ".join(schema.get("properties", {})) or schema.get("format", "")))
    if rows:
        cells = "".join(f"<tr><td><code>{_text(name)}</code><td>{_text(place)}<td>{_text(about)}" for name, place, about in rows)
        parts.append(f"<table><tr><th>Name<th>In<th>Meaning{cells}</table>")
    answers = ", ".join(
        f"{status} {_resolved(description, answer).get('description', '')}" for status, answer in operation["responses"].items()
    )
    parts.append(f"<p>Answers: {_text(answers)}</p></article>")
    return "".join(parts)


def _resolved(description: Json, value: Json) -> Json:
    """What a `$ref` points to, or the value itself; of several choices, the first."""
    value = next(iter(value.get("oneOf", ())), value)
    target: Json = description
    if "$ref" not in value:
        return value
    for part in value["$ref"].removeprefix("#/").split("/"):
        target = target[part]
    return target


def _text(text: str) -> str:
    return html.escape(text)
