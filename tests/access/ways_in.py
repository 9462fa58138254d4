"""The ways in which new bytes come to Coffer."""

from collections.abc import Callable, Iterator

import httpx

WayIn = Callable[[httpx.Client, bytes], httpx.Response]


def in_pieces(body: bytes) -> Iterator[bytes]:
    yield from (body[at : at + 100_000] for at in range(0, len(body), 100_000))


def raw(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/api/files/upload", content=body)


def chunked(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/api/files/upload", content=in_pieces(body))


def form(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/api/files/upload", files={"file": ("a.png", body)})


def with_key(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/api/files/upload", content=body, headers={"Idempotency-Key": f"{hash(body)}"})


def by_link(client: httpx.Client, body: bytes) -> httpx.Response:
    """By an upload link, which is given up when it did not bring the file."""
    asked = client.post("/api/uploads/links", json={"max_bytes": len(body)})
    assert asked.status_code == 201, asked.text
    link = asked.json()
    answer = httpx.put(f"{client.base_url}{link['url']}", content=body)
    if answer.status_code >= 400:
        client.delete(f"/api/uploads/links/{link['file_id']}")
    return answer


WAYS_IN: list[WayIn] = [raw, chunked, form, with_key, by_link]
