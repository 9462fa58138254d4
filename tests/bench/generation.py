"""generation: 200 outputs of 3 MB that eight pipelines bring by their links, against plain uploads of the same bytes."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection

from tests.bench.harness import Round, Stage, image, interleave, ratio, table, timed
from tests.bench.processes import BenchError
from tests.bench.servers import Coffer

BODY_BYTES = 3_000_000
PIPELINES = 8
OUTPUTS_EACH = 25
ROUNDS = 5
_USERS = [f"generation_{number}" for number in range(PIPELINES)]


def measure(stage: Stage) -> None:
    coffer = stage.coffer
    body = image(BODY_BYTES)

    def plain() -> Round:
        paths = [["/api/files/upload?name=bench"] * OUTPUTS_EACH for _ in _USERS]
        return _round(coffer, "POST", paths, body)

    def outputs() -> Round:
        return _round(coffer, "PUT", [_links(coffer, user) for user in _USERS], body)

    contestants: dict[str, Callable[[], Round]] = {"plain uploads": plain, "outputs by link": outputs}
    results = interleave(contestants, ROUNDS)
    table(results, "files/s", "CPU ms/file", 1000)
    ratio(results, "outputs by link", "plain uploads", at_least=0.8)


def _round(coffer: Coffer, method: str, paths: list[list[str]], body: bytes) -> Round:
    outcome = timed(coffer, PIPELINES * OUTPUTS_EACH, partial(_send, coffer, method, paths, body))
    coffer.erase(*_USERS)
    return outcome


def _links(coffer: Coffer, user: str) -> list[str]:
    """The addresses of the outputs of a new job."""
    connection = HTTPConnection("127.0.0.1", coffer.port, timeout=60)
    wish = {"outputs": [{"type": "image", "max_bytes": BODY_BYTES}] * OUTPUTS_EACH}
    connection.request("POST", "/api/generate", json.dumps(wish), _headers(coffer, user) | {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 201:
        raise BenchError(f"no job: {answer.read()[:500]!r}")
    urls = [place["url"] for place in json.loads(answer.read())["uploads"]]
    connection.close()
    return [url[url.index("/u/") :] for url in urls]


def _send(coffer: Coffer, method: str, paths: list[list[str]], body: bytes) -> float:
    """The seconds that all took, each user's one after the other on one connection."""

    def send(user: str, addresses: list[str]) -> None:
        headers = _headers(coffer, user) if method == "POST" else {}
        connection = HTTPConnection("127.0.0.1", coffer.port, timeout=60)
        for address in addresses:
            connection.request(method, address, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 201:
                raise BenchError(f"{answer.status} {content[:500]!r}")
        connection.close()

    began = time.perf_counter()
    with ThreadPoolExecutor(PIPELINES) as pool:
        for done in [pool.submit(send, user, addresses) for user, addresses in zip(_USERS, paths, strict=True)]:
            done.result()
    return time.perf_counter() - began


def _headers(coffer: Coffer, user: str) -> dict[str, str]:
    return dict(header.split(": ", 1) for header in coffer.headers(user))
