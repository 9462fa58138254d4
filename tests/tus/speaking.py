"""tus, request by request."""

import base64
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import httpx

VERSION = {"Tus-Resumable": "1.0.0"}
PIECE = VERSION | {"Content-Type": "application/offset+octet-stream"}
ENDPOINT = "/api/tus/"


def metadata(**pairs: str) -> str:
    """As `Upload-Metadata` has it."""
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in pairs.items())


def raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as they are sent, so that any byte may stand in a value."""
    return [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]


def post(client: httpx.Client, length: int | None = None, content: Any = None, **headers: str) -> httpx.Response:
    """The answer to a creation. Underscores in the names of headers stand for hyphens; `length` None sends none."""
    sent = dict(VERSION if content is None else PIECE)
    if length is not None:
        sent["Upload-Length"] = str(length)
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(ENDPOINT, headers=sent, content=content)


def create(client: httpx.Client, length: int | None = None, content: Any = None, **headers: str) -> str:
    """The path of a new upload, of a length that is not known yet where none is given."""
    if length is None:
        headers["Upload_Defer_Length"] = "1"
    answer = post(client, length, content, **headers)
    assert answer.status_code == 201, answer.text
    return httpx.URL(answer.headers["location"]).path


def patch(client: httpx.Client, path: str, offset: int | str, content: Any, **headers: str) -> httpx.Response:
    sent = PIECE | {"Upload-Offset": str(offset)} | {name.replace("_", "-"): value for name, value in headers.items()}
    return client.patch(path, headers=sent, content=content)


def head(client: httpx.Client, path: str, **headers: str) -> httpx.Response:
    return client.head(path, headers=VERSION | {name.replace("_", "-"): value for name, value in headers.items()})


def offset(client: httpx.Client, path: str) -> int:
    """How far an upload is."""
    answer = head(client, path)
    assert answer.status_code == 200, answer.status_code
    return int(answer.headers["upload-offset"])


def delete(client: httpx.Client, path: str) -> httpx.Response:
    return client.delete(path, headers=VERSION)


def upload_id(path: str) -> UUID:
    return UUID(path.rpartition("/")[2])
