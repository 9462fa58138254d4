"""What is told of a request that is over: metrics, and a line in the access log."""

import re
import time
from datetime import UTC, datetime

from uuid_utils import uuid7

from server import logs
from server.metrics import Metrics

Header = tuple[bytes, bytes]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_USABLE_REQUEST_ID = re.compile(rb"(?!cof_)[A-Za-z0-9._-]{1,64}")  # an API key in the wrong header must not be told to everybody


def request_id_of(headers: list[Header]) -> str:
    """What the client calls its request, or a new name for it."""
    for name, value in headers:
        if name == b"x-request-id" and _USABLE_REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return str(uuid7())


def account(
    metrics: Metrics,
    *,
    began: float,
    request_id: str,
    method: str,
    route: str | None,
    path: str | None,
    status: int,
    bytes_in: int,
    bytes_out: int,
    client: tuple[str, int] | None,
    principal: str | None = None,
    user_id: str | None = None,
) -> None:
    """Counts and logs a request that `metrics.started` has counted. `began` is of `time.perf_counter`; a `path` that is secret is None."""
    seconds = time.perf_counter() - began
    route, method = route or "unmatched", method if method in _METHODS else "OTHER"
    metrics.finished(route, method, status, seconds, bytes_in=bytes_in, bytes_out=bytes_out)
    logs.access(
        logs.AccessLine(
            time=datetime.now(UTC),
            level="info",
            logger="coffer.access",
            message="request",
            request_id=request_id,
            method=method,
            route=route,
            path=path,
            status=status,
            duration_ms=round(seconds * 1000, 2),
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            principal=principal,
            user_id=user_id,
            client=client[0] if client else None,
        )
    )
