"""What every answer tells a browser about itself: how to reach us, who may draw it into a page, that it is not to be run."""

from collections.abc import Iterator

import httpx
import pytest

from server.delivery.headers import CONTENT_SECURITY_POLICY
from server.kinds import KNOWN
from server.settings import SettingError, Settings
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, SharedServer, execute

HSTS = "strict-transport-security"
BY_TLS = {"X-Forwarded-Proto": "https"}


@pytest.fixture(scope="module")
def proxied(shared_server: SharedServer) -> Iterator[RunningServer]:
    """A server that takes these tests for its proxy."""
    with shared_server(COFFER_TRUSTED_PROXIES="127.0.0.1") as server:
        yield server


def every_way_out(
    server: RunningServer, user: str, body: bytes, kind: str = "image", headers: dict[str, str] | None = None
) -> dict[str, httpx.Response]:
    """A file by each route that gives its bytes: its owner's, a signed link, a public URL."""
    with server.client(user) as owner, httpx.Client(base_url=server.url, headers=headers) as browser:
        owner.headers.update(headers or {})
        file_id = owner.post("/api/files/upload", params={"type": kind}, content=body).json()["id"]
        link = owner.post(f"/api/files/{file_id}/link").json()["url"]
        public = owner.put(f"/api/files/{file_id}/public", json={"is_public": True}).json()["url"]
        return {"owner": owner.get(f"/api/files/{file_id}/download"), "link": browser.get(link), "public": browser.get(public)}


def test_hsts_is_for_those_who_came_by_tls(proxied: RunningServer) -> None:
    answers = every_way_out(proxied, "hsts", image(), headers=BY_TLS)
    plain = every_way_out(proxied, "plain", image())
    paths = ("/health/live", "/api/files", "/api/nowhere", "/f/token/x", "/schema")
    answers |= {path: httpx.get(f"{proxied.url}{path}", headers=BY_TLS) for path in paths}
    plain |= {path: httpx.get(f"{proxied.url}{path}", headers={"X-Forwarded-Proto": "http"}) for path in paths}
    for name, answer in answers.items():
        assert answer.headers[HSTS] == "max-age=31536000", name
    for name, answer in plain.items():
        assert HSTS not in answer.headers, name


def test_hsts_can_be_set_and_left_out(start_server: ServerFactory) -> None:
    for seconds, expected in (("60", "max-age=60"), ("0", None)):
        server = start_server(COFFER_TRUSTED_PROXIES="127.0.0.1", COFFER_HSTS_SECONDS=seconds)
        assert httpx.get(f"{server.url}/health/live", headers=BY_TLS).headers.get(HSTS) == expected


@pytest.mark.parametrize(
    ("kind", "body", "disposition"),
    [("image", image(), "inline"), ("video", video(), "inline"), ("scene", b'{"a": 1}'.ljust(500), "attachment")],
)
def test_stored_bytes_are_shown_and_never_run(proxied: RunningServer, kind: str, body: bytes, disposition: str) -> None:
    answers = every_way_out(proxied, "bytes", body, kind)
    for name, answer in answers.items():
        assert (answer.status_code, answer.content) == (200, body), name
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == ("same-origin" if name == "owner" else "cross-origin")
        assert answer.headers["content-disposition"].startswith(f"{disposition};")


@pytest.mark.parametrize(
    "mime_type", ["text/html", "image/svg+xml", "application/xhtml+xml", "text/xml", "application/pdf", "text/javascript"]
)
def test_active_content_is_saved_however_it_came_into_a_row(proxied: RunningServer, mime_type: str) -> None:
    """Coffer stores none of these; a row that says so was written by hand. A link that asks for `inline` changes nothing."""
    assert mime_type not in KNOWN
    user = mime_type.replace("/", "-").replace("+", "-")
    with proxied.client(user) as owner:
        file_id = owner.post("/api/files/upload", content=image()).json()["id"]
        execute(proxied.database_url, "update user_files set mime_type = $1 where id = $2::text::uuid", mime_type, file_id)
        link = owner.post(f"/api/files/{file_id}/link", json={"disposition": "inline"}).json()["url"]
        public = owner.put(f"/api/files/{file_id}/public", json={"is_public": True}).json()["url"]
        owners = owner.get(f"/api/files/{file_id}/download", params={"disposition": "inline"})
        for answer in (owners, httpx.get(proxied.url + link), httpx.get(proxied.url + public)):
            assert (answer.status_code, answer.headers["content-type"]) == (200, mime_type)
            assert answer.headers["content-disposition"].startswith("attachment;")
            assert answer.headers["content-security-policy"].startswith("sandbox;")
            assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("policy", ["same-site", "same-origin"])
def test_who_may_draw_a_link_into_a_page_can_be_set(start_server: ServerFactory, policy: str) -> None:
    answers = every_way_out(start_server(COFFER_LINK_RESOURCE_POLICY=policy), "ada", image())
    assert {name: answer.headers["cross-origin-resource-policy"] for name, answer in answers.items()} == {
        "owner": "same-origin",
        "link": policy,
        "public": policy,
    }
    with pytest.raises(SettingError, match="COFFER_LINK_RESOURCE_POLICY: say cross-origin or same-site or same-origin"):
        Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_LINK_RESOURCE_POLICY": "none"})


def test_everything_else_is_for_its_own_origin_and_for_no_cache(proxied: RunningServer) -> None:
    with proxied.client("json") as client:
        stored = client.post("/api/files/upload", content=image())
        upload_link = client.post("/api/uploads/links", json={"max_bytes": 10_000}).json()["url"]
        form = client.post("/api/files/upload", files=[("file", ("a.png", image(seed=1))), ("file", ("b.png", b"nonsense"))])
        by_link = httpx.put(proxied.url + upload_link, content=image())
        replaced = client.put(f"/api/files/{stored.json()['id']}/content", content=image(seed=2))
        answers = [stored, form, by_link, replaced, client.get("/api/files"), client.get("/api/nowhere"), client.get("/f/token/x")]
        answers += [client.get("/p/x"), httpx.put(f"{proxied.url}/u/token", content=b"x"), client.get("/health/ready")]
    assert [answer.status_code for answer in answers] == [201, 207, 201, 200, 200, 404, 403, 404, 403, 200]
    for answer in answers:
        for name, value in (
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("cross-origin-resource-policy", "same-origin"),
            ("referrer-policy", "no-referrer"),
        ):
            assert answer.headers.get_list(name) == [value], (answer.request.url, name)
