"""downloads: the embedded server against nginx serving the same files with sendfile. Reported without a target."""

import json
from functools import partial

from tests.bench.clients import Connection, fetch_large, send_large, send_small
from tests.bench.harness import GIB, KIB, MIB, Round, Stage, counted, image, interleave, ratio, table, timed
from tests.bench.servers import Request, Server

LARGE_BYTES, LARGE_CLIENTS = 200 * MIB, 4
SMALL_BYTES, SMALL_CLIENTS = 200 * KIB, 8
ROUND_SECONDS = 1.0
ROUNDS = 5
_USER = "downloads"


def measure(stage: Stage) -> None:
    coffer, nginx = stage.coffer, stage.nginx
    gib = LARGE_CLIENTS * LARGE_BYTES / GIB

    def large(server: Server, request: Request) -> Round:
        return timed(server, gib, partial(fetch_large, server, [request] * LARGE_CLIENTS))

    def small(server: Server, request: Request) -> Round:
        return counted(server, partial(send_small, server, [request] * SMALL_CLIENTS, b"", seconds=ROUND_SECONDS), ROUND_SECONDS)

    large_body, small_body = stage.file(LARGE_BYTES), image(SMALL_BYTES)
    large_id = _stored(stage, large_body.read_bytes(), "video/mp4")
    small_id = _stored(stage, small_body, "image/png")
    larges = {"200 MiB": partial(large, coffer, coffer.download(_USER, large_id))}
    smalls = {"200 KiB": partial(small, coffer, coffer.download(_USER, small_id))}
    if nginx:
        (nginx.directory / "small").write_bytes(small_body)
        send_large(nginx, [Request("PUT", "/large")], large_body)
        larges["nginx, 200 MiB"] = partial(large, nginx, Request("GET", "/large"))
        smalls["nginx, 200 KiB"] = partial(small, nginx, Request("GET", "/small"))
    large_results, small_results = interleave(larges, ROUNDS), interleave(smalls, ROUNDS)
    coffer.erase(_USER)
    if nginx:
        nginx.clean()
    in_mib = {name: [Round(each.rate * 1024, each.cpu_seconds) for each in rounds] for name, rounds in large_results.items()}
    table(in_mib, "MiB/s", "CPU s/GiB")
    table(small_results, "files/s", "CPU ms/file", 1000)
    ratio(large_results, "200 MiB", "nginx, 200 MiB")
    ratio(small_results, "200 KiB", "nginx, 200 KiB")


def _stored(stage: Stage, body: bytes, mime_type: str) -> str:
    answer = Connection(stage.coffer.port).ask(stage.coffer.upload(_USER, mime_type), body, "stored")
    file_id: str = json.loads(answer)["id"]
    return file_id
