"""large: 200 MiB uploads, four at a time, durable, against nginx's DAV PUT, which neither hashes nor syncs."""

from functools import partial

from tests.bench.clients import send_large
from tests.bench.harness import GIB, MIB, Round, Stage, interleave, ratio, table, timed
from tests.bench.servers import Peer, Request

BODY_BYTES = 200 * MIB
UPLOADS = 4
ROUNDS = 5
_USERS = [f"large_{number}" for number in range(UPLOADS)]


def measure(stage: Stage) -> None:
    coffer, nginx = stage.coffer, stage.nginx
    body = stage.file(BODY_BYTES)
    gib = UPLOADS * BODY_BYTES / GIB

    def upload(requests: list[Request], as_form: bool) -> Round:
        outcome = timed(coffer, gib, partial(send_large, coffer, requests, body, as_form=as_form))
        coffer.erase(*_USERS)
        return outcome

    def put(peer: Peer) -> Round:
        outcome = timed(peer, gib, partial(send_large, peer, [peer.put()] * UPLOADS, body))
        peer.clean()
        return outcome

    contestants = {
        "raw": partial(upload, [coffer.upload(user, "video/mp4") for user in _USERS], False),
        "form": partial(upload, [coffer.form(user) for user in _USERS], True),
        "bare handler": partial(put, stage.bare),
    }
    if nginx:
        contestants["nginx DAV"] = partial(put, nginx)
    results = interleave(contestants, ROUNDS)
    in_mib = {name: [Round(each.rate * 1024, each.cpu_seconds) for each in rounds] for name, rounds in results.items()}
    table(in_mib, "MiB/s", "CPU s/GiB")
    ratio(results, "raw", "nginx DAV", at_least=0.75)
    ratio(results, "form", "raw", at_least=0.9)
    ratio(results, "raw", "bare handler")
