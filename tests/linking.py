"""Files that are stored, and links to them that are made, as an app's backend does it."""

from typing import Any

import httpx

from tests.samples import image

BODY = image(300_000)


def stored(client: httpx.Client, body: bytes = BODY, name: str = "Sonne 🌅.png", **query: str) -> str:
    """The file's id."""
    answer = client.post("/api/files/upload", content=body, params={"name": name, **query})
    assert answer.status_code == 201, answer.text
    file_id: str = answer.json()["id"]
    return file_id


def link(client: httpx.Client, file_id: str, **wish: Any) -> str:
    """Its address."""
    answer = client.post(f"/api/files/{file_id}/link", json=wish)
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["url"]
    return url
