"""A CDN in front of the edge, with nginx's own cache as the stand-in: what it keeps, for how long, and what it must not."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.edge.conftest import StartEdge
from tests.edge.nginx import Edge, Nginx
from tests.linking import BODY, link, stored


@pytest.fixture
def cdn(tmp_path: Path) -> Iterator[Nginx]:
    """Set up and not started: it obeys `Cache-Control` and nothing else."""
    nginx = Nginx(tmp_path / "cdn", more=f"proxy_cache_path {tmp_path}/cache keys_zone=cdn:1m;")
    yield nginx
    nginx.stop()


def put_before(cdn: Nginx, edge: Edge) -> None:
    (cdn.directory / "conf.d" / "cdn.conf").write_text(f"""
        server {{
            listen 127.0.0.1:{cdn.port};
            location / {{
                proxy_pass {edge.nginx.url};
                proxy_cache cdn;
                proxy_cache_key $request_uri;
                proxy_cache_revalidate on;
                add_header X-Cache $upstream_cache_status always;
            }}
        }}
        server {{ listen 127.0.0.1:{cdn.metrics_port}; location = /status {{ stub_status; }} }}
    """)
    cdn.start()


def test_public_links_are_kept_and_served_without_us(start_edge: StartEdge, cdn: Nginx) -> None:
    edge = start_edge(COFFER_LINK_CACHE="public")
    put_before(cdn, edge)
    with edge.client("ada") as ada, httpx.Client(base_url=cdn.url) as browser:
        file_id = stored(ada, name="Sonne.png")
        url = link(ada, file_id)
        first, second = browser.get(url), browser.get(url)
        assert (first.headers["x-cache"], second.headers["x-cache"]) == ("MISS", "HIT")
        assert first.content == second.content == BODY
        assert edge.nginx.counted("answered") == 1
        part = browser.get(url, headers={"Range": "bytes=5-9"})
        assert (part.status_code, part.content, part.headers["x-cache"]) == (206, BODY[5:10], "HIT")
        unchanged = browser.get(url, headers={"If-None-Match": first.headers["etag"]})
        assert (unchanged.status_code, unchanged.headers["x-cache"]) == (304, "HIT")
        # Another signature is another link, and what is refused is not kept.
        for _ in range(2):
            refused = browser.get(f"{url[:-5]}x.png")
            assert (refused.status_code, refused.headers["x-cache"]) == (403, "MISS")
        # What it has it gives until the link ends: who needs to take links back makes them private, or short.
        assert ada.post(f"/api/files/{file_id}/revoke-links").status_code == 200
        assert browser.get(url).headers["x-cache"] == "HIT"
        assert browser.get(link(ada, file_id)).headers["x-cache"] == "MISS"


def test_private_links_and_the_api_are_never_kept(start_edge: StartEdge, cdn: Nginx) -> None:
    edge = start_edge()
    put_before(cdn, edge)
    with edge.client("ada") as ada, httpx.Client(base_url=cdn.url) as browser:
        file_id = stored(ada)
        url = link(ada, file_id)
        assert [browser.get(url).headers["x-cache"] for _ in range(2)] == ["MISS", "MISS"]
        for path in ("/api/files", f"/api/files/{file_id}", f"/api/files/{file_id}/download"):
            assert [browser.get(path, headers=dict(ada.headers)).headers["x-cache"] for _ in range(2)] == ["MISS", "MISS"], path
