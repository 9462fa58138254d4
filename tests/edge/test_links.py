"""Signed links at the edge: nginx answers them itself, and says what the server would have said."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.edge.nginx import Edge
from tests.linking import BODY, link, stored
from tests.samples import image

# Of the connection.
OWN = frozenset({"date", "server", "connection"})


def said(answer: httpx.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    """All of an answer that both must say alike."""
    return answer.status_code, sorted((name, value) for name, value in answer.headers.multi_items() if name not in OWN), answer.content


def both(
    edge: Edge, browser: httpx.Client, url: str, method: str = "GET", headers: dict[str, str] | list[tuple[str, str]] | None = None
) -> httpx.Response:
    """nginx's answer, once the server has said the same in the same second: `max-age` counts down."""
    headers = [*(headers.items() if isinstance(headers, dict) else headers or ()), ("X-Request-Id", "the.same")]
    while True:
        second = int(time.time())
        ours = httpx.request(method, f"{edge.server.url}{url}", headers=headers)
        theirs = browser.request(method, url, headers=headers)
        if int(time.time()) == second:
            assert said(theirs) == said(ours)
            return theirs


@pytest.fixture(scope="module")
def browser(edge: Edge) -> Iterator[httpx.Client]:
    with edge.browser() as client:
        yield client


def test_nginx_answers_a_link_by_itself(edge: Edge, browser: httpx.Client) -> None:
    with edge.client("ada") as ada:
        url = link(ada, stored(ada))
    answered, passed = edge.nginx.counted("answered"), edge.nginx.counted("passed")
    answer = browser.get(url)
    assert (answer.status_code, answer.content) == (200, BODY)
    assert (edge.nginx.counted("answered"), edge.nginx.counted("passed")) == (answered + 1, passed)
    assert both(edge, browser, url).content == BODY


KINDS_OF_FILES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("Sonne.png", {}, {}),
    ("Grüße aus Zürich 🌅.png", {}, {}),
    ("a b (2)'s; 100%.png", {}, {"disposition": "attachment"}),
    ('x"; filename=evil.exe\\.png', {}, {}),
    ("..", {}, {"name": "a~b_c!#$&+^`|{}[]=@,.png"}),
    ("-\u202e\u200bgnp.exe", {}, {}),
    ("é" * 200 + ".png", {}, {}),
]


@pytest.mark.parametrize(("name", "query", "wish"), KINDS_OF_FILES, ids=[str(n) for n in range(len(KINDS_OF_FILES))])
def test_every_name_is_told_alike(edge: Edge, browser: httpx.Client, name: str, query: dict[str, str], wish: dict[str, Any]) -> None:
    with edge.client("ada") as ada:
        url = link(ada, stored(ada, image(500), name, **query), **wish)
    answered = edge.nginx.counted("answered")
    assert both(edge, browser, url).status_code == 200
    assert both(edge, browser, url, "HEAD").content == b""
    assert edge.nginx.counted("answered") >= answered + 2


TYPES = [
    (image(500), "image", "inline"),
    (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100), "audio", "inline"),
    (bytes.fromhex("0000001c6674797069736f6d0000020069736f6d69736f326d703431") + b"\x00\x00\x00\x08free" + bytes(500), "video", "inline"),
    (b'{"asset": {"version": "2.0"}}', "scene", "attachment"),
    (b'{"any": "project"}', "project", "attachment"),
]


@pytest.mark.parametrize(("body", "kind", "disposition"), TYPES, ids=[kind for _, kind, _ in TYPES])
def test_every_kind_of_file_is_told_alike(edge: Edge, browser: httpx.Client, body: bytes, kind: str, disposition: str) -> None:
    with edge.client("ada") as ada:
        url = link(ada, stored(ada, body, "a file", type=kind))
    answered = edge.nginx.counted("answered")
    answer = both(edge, browser, url)
    assert answer.content == body
    assert answer.headers["content-disposition"].startswith(disposition)
    assert edge.nginx.counted("answered") > answered


SIZE = len(BODY)
RANGES = [
    *("bytes=0-0", "bytes=10-19", "bytes=0-", f"bytes={SIZE - 1}-", f"bytes={SIZE}-", "bytes=-1", "bytes=-0", f"bytes=-{SIZE + 5}"),
    *(
        f"bytes=0-{SIZE + 99}",
        "bytes=9-3",
        "bytes=-",
        "bytes=0-1,3-4",
        "bytes=0-1, 3-4",
        "bytes= 0-1",
        "BYTES=0-1",
        "bytes=0-0,",
        "items=0-1",
    ),
    *(
        "bytes=a-b",
        "bytes",
        "",
        "bytes=99999999999999999999-",
        "bytes=0-99999999999999999999999",
        "bytes=1-1-1",
        "bytes=+1-2",
        "bytes=0x0-1",
    ),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("value", RANGES)
def test_every_range_is_answered_alike(edge: Edge, browser: httpx.Client, big: str, method: str, value: str) -> None:
    both(edge, browser, big, method, {"Range": value})


def test_the_edge_answers_what_players_ask(edge: Edge, browser: httpx.Client, big: str) -> None:
    tag = browser.get(big).headers["etag"]
    for headers in (
        {"Range": "bytes=0-"},
        {"Range": "bytes=100-"},
        {"Range": "bytes=-5"},
        {"Range": "bytes=1-2", "If-Range": tag},
        {"If-None-Match": tag},
        {"If-None-Match": f"W/{tag}", "If-Modified-Since": "Fri, 02 Jan 2026 00:00:00 GMT"},
    ):
        passed = edge.nginx.counted("passed")
        assert both(edge, browser, big, headers=headers).status_code in {206, 304}
        assert edge.nginx.counted("passed") == passed


CONDITIONS: list[list[tuple[str, str]]] = [
    *([("If-None-Match", value)] for value in ("{tag}", "W/{tag}", "*", '"x", {tag}', '"x"', "{tag},", "", "x")),
    *([("If-Match", value)] for value in ("{tag}", "W/{tag}", "*", '"x"', "")),
    *([("If-Modified-Since", value)] for value in ("{date}", "Fri, 02 Jan 1970 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT", "x", "")),
    *([("If-Unmodified-Since", value)] for value in ("{date}", "Fri, 02 Jan 1970 00:00:00 GMT", "x", "")),
    [("If-None-Match", "{tag}"), ("If-Modified-Since", "Fri, 02 Jan 1970 00:00:00 GMT")],
    [("If-None-Match", '"x"'), ("If-Modified-Since", "{date}")],
    [("If-None-Match", "{tag}"), ("Range", "bytes=0-1")],
    [("If-Match", "{tag}"), ("If-None-Match", "{tag}")],
    *(
        [("Range", "bytes=5-9"), ("If-Range", value)]
        for value in ("{tag}", "W/{tag}", '"x"', "{date}", "Fri, 02 Jan 1970 00:00:00 GMT", "x", "")
    ),
    [("If-Range", "{tag}")],
    [("If-Range", '"x"')],
    [("Range", "bytes=5-9"), ("Range", "bytes=1-2")],
    [("Range", f"bytes={SIZE}-"), ("If-Range", '"x"')],
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("headers", CONDITIONS, ids=str)
def test_every_condition_is_answered_alike(
    edge: Edge, browser: httpx.Client, big: str, method: str, headers: list[tuple[str, str]]
) -> None:
    whole = browser.head(big)
    known = {"tag": whole.headers["etag"], "date": whole.headers["last-modified"]}
    both(edge, browser, big, method, [(name, value.format(**known)) for name, value in headers])


def test_an_empty_request_and_methods(edge: Edge, browser: httpx.Client, big: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        both(edge, browser, big, method)
    both(edge, browser, f"{big}?")
    both(edge, browser, f"{big}?x=1")


@pytest.fixture(scope="module")
def big(edge: Edge) -> str:
    with edge.client("ada") as ada:
        return link(ada, stored(ada, name="Sonne und Meer.png"))
