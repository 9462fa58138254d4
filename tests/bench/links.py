"""links: signing and verifying signed links, in the processor time of one core, beside itsdangerous' own serializer."""

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

from itsdangerous import URLSafeTimedSerializer

from server.delivery.links import Links
from tests.bench.harness import Round, Stage, interleave, ratio, verdict
from tests.download.samples import a_file

CALLS = 500  # the most links of one request
ROUNDS = 15
FILE_ID = UUID("01900000-0000-7000-8000-000000000001")
LATER = 4_000_000_000


def measure(stage: Stage) -> None:
    """Targets: verifying under 60 µs, signing 500 under 30 ms."""
    del stage  # nothing is served here
    file = a_file(
        b"x",
        id=FILE_ID,
        file_path=f"users/user_2abcdefghijklmnopqrstuvwxyz/images/{FILE_ID}.1.jpg",
        file_name="A photo of the sea (2).jpg",
        mime_type="image/jpeg",
        content_changed_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
    links, rotating = Links(["k" * 43]), Links(["n" * 43, "o" * 43, "k" * 43])
    serializer = URLSafeTimedSerializer("k" * 43)
    says = {"id": str(FILE_ID), "expires_at": LATER, "sha256": file.sha256.hex(), "disposition": "inline"}
    token, segment = links.download(file, 1, expires_at=LATER).split("/")[2:]
    theirs = serializer.dumps(says)
    found = interleave(
        {
            "verify": _round(lambda: links.verify_download(token, segment)),
            "verify, third of three keys": _round(lambda: rotating.verify_download(token, segment)),
            "verify by the serializer": _round(lambda: serializer.loads(theirs)),
            "sign": _round(lambda: links.download(file, 1, expires_at=LATER)),
            "sign by the serializer": _round(lambda: serializer.dumps(says)),
        },
        ROUNDS,
    )
    micros = {name: statistics.median(1e6 / each.rate for each in rounds) for name, rounds in found.items()}
    verdict("verify", micros["verify"], at_most=60, unit=" µs")
    verdict("verify, third of three keys", micros["verify, third of three keys"], at_most=60, unit=" µs")
    verdict(f"sign {CALLS}", micros["sign"] * CALLS / 1000, at_most=30, unit=" ms")
    ratio(found, "verify", "verify by the serializer")
    ratio(found, "sign", "sign by the serializer")


def _round(call: Callable[[], object]) -> Callable[[], Round]:
    def run() -> Round:
        began = time.process_time()
        for _ in range(CALLS):
            call()
        return Round(CALLS / (time.process_time() - began))

    return run
