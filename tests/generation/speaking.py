"""An app and a pipeline, as the tests of generation speak for them."""

import time
import uuid
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
from standardwebhooks import Webhook

OLD_SECRET = "whsec_" + b64encode(b"the old secret of a pipeline....").decode()
NEW_SECRET = "whsec_" + b64encode(b"the new secret of a pipeline....").decode()
PIPELINES = [{"name": "painter", "secrets": [NEW_SECRET, OLD_SECRET]}, {"name": "quiet"}]


def ask(client: httpx.Client, **wish: Any) -> dict[str, Any]:
    """A new job, by default of one image of at most 10,000 bytes; the answer."""
    answer = client.post("/api/generate", json={"outputs": [{"type": "image", "max_bytes": 10_000}]} | wish)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def status(client: httpx.Client, job_id: str) -> dict[str, Any]:
    answer = client.get(f"/api/generate/status/{job_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def usage(client: httpx.Client) -> tuple[int, int]:
    answer = client.get("/api/storage/usage").json()
    return answer["used_bytes"], answer["reserved_bytes"]


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def signed(secret: str, body: bytes, message_id: str | None = None, at: float | None = None, prefix: str = "webhook") -> dict[str, str]:
    """The headers of a message."""
    message_id = message_id or f"msg_{uuid.uuid4().hex}"
    moment = datetime.fromtimestamp(at or time.time(), UTC)
    return {
        f"{prefix}-id": message_id,
        f"{prefix}-timestamp": str(int(moment.timestamp())),
        f"{prefix}-signature": Webhook(secret).sign(message_id, moment, body.decode()),
    }


def message(kind: str, job_id: str, **data: Any) -> bytes:
    return msgspec.json.encode({"type": kind, "data": {"job_id": job_id} | data})


def tell(client: httpx.Client, job: dict[str, Any], kind: str, *, message_id: str | None = None, **data: Any) -> httpx.Response:
    """What the holder of a job's secret says of it."""
    body = message(kind, job["job_id"], **data)
    return client.post(job["webhook"]["url"], content=body, headers=signed(job["webhook"]["secret"], body, message_id))


def inline(content: bytes, index: int = 0) -> dict[str, Any]:
    return {"index": index, "base64": b64encode(content).decode()}
