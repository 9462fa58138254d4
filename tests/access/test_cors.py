"""Pages of other origins: what a browser is told that they may ask and read."""

from collections.abc import Iterator

import httpx
import pytest

from server.settings import SettingError, Settings
from tests.samples import image
from tests.serving import RunningServer, ServerFactory, SharedServer
from tests.waiting import until

APP, OTHER, EVIL = "https://app.example.com", "http://localhost:5173", "https://evil.example"
MISSING = "01900000-0000-7000-8000-000000000000"
ALLOW = "access-control-allow-origin"


@pytest.fixture(scope="module")
def strict(shared_server: SharedServer) -> Iterator[RunningServer]:
    """A server for these two origins. Tests keep apart by acting for users of their own."""
    with shared_server(COFFER_CORS_ORIGINS=f"{APP} {OTHER}") as server:
        yield server


@pytest.fixture
def page(strict: RunningServer) -> Iterator[httpx.Client]:
    """A page of the app, without credentials."""
    with httpx.Client(base_url=strict.url, headers={"Origin": APP}) as client:
        yield client


def preflight(client: httpx.Client, path: str, method: str = "PUT", origin: str | None = APP) -> httpx.Response:
    headers = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,x-user-id"}
    return client.options(path, headers=headers | ({} if origin is None else {"Origin": origin}))


def names(header: str) -> set[str]:
    return {name.strip().lower() for name in header.split(",")}


def test_a_preflight_needs_no_credentials(page: httpx.Client) -> None:
    paths = ["/api/files", f"/api/files/{MISSING}", "/api/files/upload", f"/api/files/{MISSING}/content", f"/api/files/{MISSING}/download"]
    paths += ["/api/users/a%2Fb/quota", "/api/storage/usage", "/api/links", "/api/uploads/link"]
    for path in [*paths, "/f/token/name.png", "/p/AAAAAAAAAAAAAAAAAAAAAA", "/u/token"]:
        for origin in (APP, OTHER):
            answer = preflight(page, path, origin=origin)
            assert (answer.status_code, answer.content) == (204, b""), path
            assert answer.headers[ALLOW] == origin
            assert answer.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in answer.headers
            assert names(answer.headers["access-control-allow-methods"]) == {"get", "head", "post", "put", "patch", "delete"}
            wanted = {"authorization", "content-type", "x-user-id", "idempotency-key", "range", "if-match", "if-none-match", "if-range"}
            wanted |= {"content-digest", "repr-digest", "content-md5", "x-request-id", "if-modified-since", "if-unmodified-since"}
            wanted |= {"tus-resumable", "upload-length", "upload-defer-length", "upload-offset", "upload-metadata", "upload-checksum"}
            wanted |= {"upload-concat", "upload-link", "x-http-method-override", "x-requested-with"}
            assert names(answer.headers["access-control-allow-headers"]) == wanted
            assert int(answer.headers["access-control-max-age"]) > 0


def test_every_header_that_a_route_reads_may_be_asked_for(page: httpx.Client) -> None:
    described = page.get("/schema/openapi.json").json()
    del described["paths"]["/api/generate/webhook"]  # no page signs: its secret is a pipeline's
    of_routes = [parameter for item in described["paths"].values() for each in item.values() for parameter in each.get("parameters", ())]
    read = {each["name"].lower() for each in of_routes if each.get("in") == "header"}
    read |= {each["name"].lower() for each in described["components"]["parameters"].values()}
    assert read and read <= names(preflight(page, "/api/files").headers["access-control-allow-headers"])


@pytest.mark.parametrize("origin", [EVIL, APP.upper(), APP + "/", APP + ":443", APP + ".evil.example", "null", "*", "", "é", None])
def test_an_unknown_origin_gets_no_permission(page: httpx.Client, origin: str | None) -> None:
    headers = [] if origin is None else [(b"Origin", origin.encode())]
    del page.headers["Origin"]
    for path in ("/api/files/upload", "/u/token", "/api/files", "/api/users"):
        answer = page.options(path, headers=[*headers, (b"Access-Control-Request-Method", b"PUT")])
        assert answer.status_code == 204 and answer.headers["allow"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    answer = page.get("/api/files", headers=headers)
    assert answer.status_code == 401 and answer.headers["vary"] == "Origin"
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_several_origins_are_none(page: httpx.Client) -> None:
    del page.headers["Origin"]
    assert ALLOW in page.get("/api/files", headers=[("Origin", APP)]).headers
    assert ALLOW not in page.get("/api/files", headers=[("Origin", APP), ("Origin", APP)]).headers


def test_answers_and_failures_can_be_read(strict: RunningServer, page: httpx.Client) -> None:
    with strict.client("ada") as ada:
        ada.headers["Origin"] = APP
        stored = ada.post("/api/files/upload", content=image())
        file_id = stored.json()["id"]
        linked = ada.post(f"/api/files/{file_id}/link")
        public = ada.put(f"/api/files/{file_id}/public", json={"is_public": True})
        strict.set_quota("ada", 10)
        answers = [
            (201, stored),
            (200, ada.get("/api/files")),
            (404, ada.get(f"/api/files/{MISSING}")),
            (404, ada.get("/api/nowhere")),
            (405, ada.put("/api/files")),
            (413, ada.post("/api/files/upload", content=image(seed=1))),
            (401, page.get("/api/files")),
            (401, page.post("/api/files/upload", content=image())),
            (206, ada.get(f"/api/files/{file_id}/download", headers={"Range": "bytes=0-9"})),
            (416, ada.get(f"/api/files/{file_id}/download", headers={"Range": "bytes=9999-"})),
            (304, ada.get(f"/api/files/{file_id}/download", headers={"If-None-Match": stored.headers["etag"]})),
            (200, page.get(linked.json()["url"])),
            (403, page.get("/f/token/x")),
            (200, page.get(public.json()["url"])),
            (404, page.get("/p/AAAAAAAAAAAAAAAAAAAAAA")),
            (403, page.put("/u/token", content=b"x")),
        ]
    exposed = {"etag", "location", "content-range", "accept-ranges", "content-disposition", "content-length", "x-request-id"}
    exposed |= {"ratelimit", "ratelimit-policy", "retry-after", "repr-digest", "idempotency-replayed", "www-authenticate"}
    exposed |= {"tus-resumable", "tus-version", "tus-extension", "tus-max-size", "tus-checksum-algorithm", "coffer-file-id"}
    exposed |= {"upload-length", "upload-defer-length", "upload-offset", "upload-metadata", "upload-expires", "upload-concat"}
    for status, answer in answers:
        assert answer.status_code == status, (answer.request.url, answer.text)
        assert (answer.headers[ALLOW], answer.headers["vary"]) == (APP, "Origin"), answer.request.url
        assert names(answer.headers["access-control-expose-headers"]) == exposed
        assert "access-control-allow-credentials" not in answer.headers


def test_a_cache_keeps_an_image_and_a_fetch_apart(strict: RunningServer) -> None:
    """An <img> sends no Origin. Without Vary its answer would be handed to the page's script, which may not read it."""
    assert httpx.get(f"{strict.url}/p/AAAAAAAAAAAAAAAAAAAAAA").headers["vary"] == "Origin"


def test_what_is_not_the_api_is_for_no_page(page: httpx.Client) -> None:
    for path in ("/metrics", "/health/ready", "/schema/openapi.json", "/"):
        assert ALLOW not in page.get(path).headers, path
        assert "access-control-allow-methods" not in preflight(page, path).headers


def test_a_link_in_a_preflight_is_not_logged(strict: RunningServer, page: httpx.Client) -> None:
    preflight(page, "/u/s3cret")
    page.options("/u/s3cret")
    page.get("/health/live", headers={"X-Request-Id": "after-the-secrets"})
    until(lambda: "after-the-secrets" in strict.logged())
    assert "s3cret" not in strict.logged() and '"preflight"' in strict.logged()


@pytest.mark.parametrize("origin", [APP, EVIL, "null", None])
def test_any_origin(start_server: ServerFactory, origin: str | None) -> None:
    """One answer for all, which a CDN keeps once."""
    server = start_server(COFFER_CORS_ORIGINS="*")
    headers = {} if origin is None else {"Origin": origin}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        for answer in (client.get("/api/files"), client.get("/f/token/x"), preflight(client, "/api/files", origin=origin)):
            assert answer.headers[ALLOW] == "*" and "vary" not in answer.headers
            assert "access-control-allow-credentials" not in answer.headers
        assert preflight(client, "/u/x", origin=origin).headers["access-control-allow-methods"]


def test_without_origins_nothing_is_said(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, headers={"Origin": APP}) as client:
        for answer in (client.get("/api/files"), client.get("/f/token/x"), preflight(client, "/api/files"), preflight(client, "/u/x")):
            assert "vary" not in answer.headers
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/api/files", {"GET"}),
        (f"/api/files/{MISSING}", {"GET", "PATCH", "DELETE"}),
        ("/api/users/a%2Fb/quota", {"PUT"}),
        ("/api/files/upload", {"POST"}),
        (f"/api/files/{MISSING}/content", {"PUT"}),
        (f"/api/files/{MISSING}/download", {"GET", "HEAD"}),
        ("/f/token/name", {"GET", "HEAD"}),
        ("/p/AAAAAAAAAAAAAAAAAAAAAA", {"GET", "HEAD"}),
        ("/u/token", {"PUT"}),
    ],
)
def test_options_tells_the_methods(strict: RunningServer, path: str, methods: set[str]) -> None:
    answer = httpx.options(f"{strict.url}{path}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert {name.strip() for name in answer.headers["allow"].split(",")} == methods | {"OPTIONS"}


def test_options_of_nothing(strict: RunningServer) -> None:
    assert httpx.options(f"{strict.url}/api/nowhere").json()["code"] == "not_found"


@pytest.mark.parametrize(
    "text",
    [
        "app.example.com",
        "https://app.example.com/",
        "https://app.example.com/x",
        "https://app.example.com:443",
        "https://app.example.com:x",
        "http://app.example.com:80",
        "https://*.example.com",
        f"* {APP}",
        "null",
        "https://",
        "https://a@b",
        "https://münchen.de",
        "é://x",
    ],
)
def test_origins_that_are_none(text: str) -> None:
    with pytest.raises(SettingError, match=r"COFFER_CORS_ORIGINS: say \* alone"):
        Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_CORS_ORIGINS": text})


def test_origins() -> None:
    text = "https://App.Example.com, http://localhost:5173\ncapacitor://localhost http://[::1]:8080 http://x:443"
    loaded = Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_CORS_ORIGINS": text})
    assert loaded.cors_origins == (APP, OTHER, "capacitor://localhost", "http://[::1]:8080", "http://x:443")
    for text, origins in (("*", ("*",)), ("", ())):
        assert Settings.load({"DATABASE_URL": "postgresql://x/y", "COFFER_CORS_ORIGINS": text}).cors_origins == origins
