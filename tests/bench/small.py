"""small: 200 KiB uploads from eight clients, durable, against a bare handler with the same steps on the disk, and nginx."""

from functools import partial

from tests.bench.clients import send_small
from tests.bench.harness import KIB, Round, Stage, counted, image, interleave, ratio, table
from tests.bench.processes import standing_still
from tests.bench.servers import Peer, Request, Server

BODY_BYTES = 200 * KIB
CLIENTS = 8
ROUND_SECONDS = 1.5
ROUNDS = 5
_USERS = [f"small_{number}" for number in range(CLIENTS)]


def measure(stage: Stage) -> None:
    coffer = stage.coffer
    body = image(BODY_BYTES)

    def send(server: Server, requests: list[Request]) -> Round:
        # Nothing is removed between rounds: ext4 looks for a free inode one by one past those deleted lately.
        return counted(server, partial(send_small, server, requests, body, seconds=ROUND_SECONDS), ROUND_SECONDS)

    def put(peer: Peer, groups: list[str]) -> list[Request]:
        return [peer.put(group) for group in groups]

    apart, together = [f"directory-{number}" for number in range(CLIENTS)], ["directory"] * CLIENTS
    contestants = {
        "8 users": partial(send, coffer, [coffer.upload(user, "image/png") for user in _USERS]),
        "1 user": partial(send, coffer, [coffer.upload("small", "image/png")] * CLIENTS),
        "bare handler, 8 directories": partial(send, stage.bare, put(stage.bare, apart)),
        "bare handler, 1 directory": partial(send, stage.bare, put(stage.bare, together)),
    }
    if nginx := stage.nginx:
        contestants["nginx DAV, 8 directories"] = partial(send, nginx, put(nginx, apart))
    with standing_still(coffer.worker_pid):  # `previews` tells what uploads feel of it; the others have none
        results = interleave(contestants, ROUNDS)
    table(results, "files/s", "CPU ms/file", 1000)
    ratio(results, "8 users", "bare handler, 8 directories", at_least=0.5)
    ratio(results, "1 user", "bare handler, 1 directory", at_least=0.5)
    ratio(results, "8 users", "nginx DAV, 8 directories")
    coffer.erase("small", *_USERS)
    for peer in (stage.bare, stage.nginx):
        if peer:
            peer.clean()
