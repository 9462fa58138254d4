"""memory: what the server holds resident after each hundred of 1,000 uploads of 5 MiB. It must be flat."""

import statistics

from tests.bench.clients import send_small
from tests.bench.harness import MIB, MP4_START, Stage, say, verdict
from tests.bench.processes import resident_bytes

BODY_BYTES = 5 * MIB
CLIENTS = 4
STEPS, STEP_UPLOADS = 10, 100
_USERS = [f"memory_{number}" for number in range(CLIENTS)]


def measure(stage: Stage) -> None:
    coffer = stage.coffer
    body = MP4_START + bytes(BODY_BYTES - len(MP4_START))
    held = [resident_bytes(coffer.pid) / MIB]
    for _ in range(STEPS):
        send_small(coffer, [coffer.upload(user, "video/mp4") for user in _USERS], body, each=STEP_UPLOADS // CLIENTS)
        held.append(resident_bytes(coffer.pid) / MIB)
    coffer.erase(*_USERS)
    say("resident MiB, before and after each 100 uploads: " + " ".join(f"{each:.0f}" for each in held))
    # The first steps fill pools and caches; a leak would show between the middle and the end.
    verdict("growth from the middle to the end", statistics.mean(held[-3:]) - statistics.mean(held[3:6]), at_most=4, unit=" MiB")
