"""The OpenAPI description: complete, and honest enough that generated requests meet no 500 and no undescribed answer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx

from server.api.application import DESCRIBED
from server.api.openapi import describe
from tests.serving import RunningServer, ServerFactory

ROUTES = {
    "POST /api/files/upload",
    "GET /api/files",
    "GET /api/files/{file_id}",
    "PATCH /api/files/{file_id}",
    "DELETE /api/files/{file_id}",
    "POST /api/files/{file_id}/favorite",
    "POST /api/files/{file_id}/copy",
    "GET /api/files/events",
    "GET /api/files/{file_id}/download",
    "HEAD /api/files/{file_id}/download",
    "PUT /api/files/{file_id}/content",
    "PUT /api/files/{file_id}/tags",
    "POST /api/files/delete",
    "GET /api/trash",
    "DELETE /api/trash/{file_id}",
    "POST /api/files/{file_id}/restore",
    "GET /api/storage/usage",
    "GET /api/storage/{file_id}/url",
    "POST /api/files/{file_id}/link",
    "POST /api/files/{file_id}/revoke-links",
    "GET /api/files/{file_id}/public",
    "PUT /api/files/{file_id}/public",
    "POST /api/links",
    "POST /api/links/revoke",
    "POST /api/uploads/links",
    "DELETE /api/uploads/links/{file_id}",
    "GET /f/{token}/{name}",
    "HEAD /f/{token}/{name}",
    "GET /p/{public_id}",
    "HEAD /p/{public_id}",
    "PUT /u/{token}",
    "POST /api/generate",
    "POST /api/compose",
    "GET /api/files/{file_id}/provenance",
    "POST /api/generate/character",
    "POST /api/generate/moodboard",
    "POST /api/generate/animation",
    "GET /api/generate",
    "GET /api/generate/status/{job_id}",
    "GET /api/generate/events/{job_id}",
    "POST /api/generate/{job_id}/cancel",
    "POST /api/generate/webhook",
    "GET /api/media",
    "POST /api/media",
    "GET /api/media/{media_id}",
    "GET /api/media/{media_id}/lineage",
    "PUT /api/media/{media_id}/primary",
    "GET /api/audit",
    "POST /api/assets/link",
    "GET /api/assets",
    "GET /api/assets/{asset_id}",
    "GET /api/assets/{asset_id}/check",
    "PUT /api/assets/{asset_id}/replace",
    "POST /api/assets/{asset_id}/import",
    "DELETE /api/assets/{asset_id}",
    "POST /api/webhooks",
    "GET /api/webhooks",
    "GET /api/webhooks/{webhook_id}",
    "DELETE /api/webhooks/{webhook_id}",
    "POST /api/webhooks/{webhook_id}/rotate-secret",
    "GET /api/webhooks/{webhook_id}/dead-letters",
    "POST /api/webhooks/{webhook_id}/redeliver",
    "GET /api/webhooks/callbacks/dead-letters",
    "POST /api/webhooks/callbacks/redeliver",
    "GET /api/users",
    "GET /api/users/{user_id}",
    "PUT /api/users/{user_id}/quota",
    "DELETE /api/users/{user_id}",
    "GET /api/users/{user_id}/export",
    "GET /health/live",
    "GET /health/ready",
}
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance", "ignored_auth"]


def test_every_route_is_described(api: RunningServer) -> None:
    description = httpx.get(f"{api.url}/schema/openapi.json").json()
    described = {f"{method.upper()} {path}" for path, item in description["paths"].items() for method in item}
    assert described == ROUTES
    upload = description["paths"]["/api/files/upload"]["post"]["requestBody"]["content"]
    assert upload.keys() == {"application/octet-stream", "multipart/form-data"}
    identifiers = [operation["operationId"] for item in description["paths"].values() for operation in item.values()]
    assert len(set(identifiers)) == len(identifiers)
    text = json.dumps(description)
    for reference in set(re.findall(r'"#/components/(\w+)/(\w+)"', text)):
        assert reference[1] in description["components"][reference[0]], reference


def test_it_is_the_same_each_time_that_it_is_made() -> None:
    assert describe(DESCRIBED) == describe(DESCRIBED)


def test_browsers_get_a_page_that_needs_nothing_from_elsewhere(api: RunningServer) -> None:
    page = httpx.get(f"{api.url}/schema", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<script|https?://|src=|@import|url\(", page.text)
    for route in ROUTES:
        method, path = route.split(" ")
        assert f"<span class=method>{method}</span> {path}</code>" in page.text
    anyone = httpx.get(f"{api.url}/schema")
    assert anyone.headers["content-type"] == "application/json" and anyone.json() == httpx.get(f"{api.url}/schema/openapi.json").json()


def test_the_description_can_be_switched_off(start_server: ServerFactory) -> None:
    server = start_server(COFFER_SCHEMA_DOCUMENTATION="false")
    for path in ("/schema", "/schema/openapi.json"):
        assert httpx.get(f"{server.url}{path}").status_code == 404


def test_generated_requests_meet_no_500_and_what_is_described(start_server: ServerFactory, tmp_path: Path) -> None:
    server = start_server(COFFER_PREVIEW_WAIT_SECONDS="0")  # no worker runs here
    with server.client("ada") as client:
        file_id = client.post("/api/files/upload", content=b'{"asset":{"version":"2.0"},"scenes":[]}').json()["id"]
    # An id that exists, so that more than 404s are met. One process of the generator at a time, and the same requests each time.
    (tmp_path / "schemathesis.toml").write_text(
        f"""
        headers = {{ Authorization = "Bearer {server.api_key}", X-User-Id = "ada" }}
        [[operations]]
        include-path = "/api/files/{{file_id}}/provenance"
        enabled = false  # it waits for a worker; tests/previews/test_provenance.py has it
        [[operations]]
        include-path-regex = "file_id"
        include-method = ["GET", "PUT", "POST", "HEAD", "PATCH"]
        parameters = {{ "path.file_id" = "{file_id}" }}
        [[operations]]
        include-path = "/api/files/events"
        enabled = false  # it does not end; tests/previews/test_events.py has it
        [[operations]]
        include-path = "/api/generate/events/{{job_id}}"
        enabled = false  # nor does this; tests/generation/test_jobs.py has it
        """
    )
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file",
        "schemathesis.toml",
        "run",
        f"{server.url}/schema/openapi.json",
    ]
    # `make attack` tries more, with links and a user who may be erased.
    options = ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "8", "--seed", "1", "--no-shrink"]
    ran = subprocess.run([*command, *options], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=480)
    assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-2_000:]
    assert '"level":"error"' not in server.logged()
