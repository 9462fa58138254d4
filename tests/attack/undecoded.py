"""1: what the first look did not refuse meets the decoders: none runs that is not allowed, and none draws what the row does not say."""

import shutil
import sys
from pathlib import Path

import imageio_ffmpeg

from tests.attack.dressed import never_stored
from tests.attack.previewing import PLANTABLE, plant, worker_beside
from tests.attack.target import Tally, Target
from tests.previews.pictures import photo

SETTLE_SECONDS = 60
REASONS = {"damaged", "unsupported"}
FILE = "file"  # a library of PgQueuer's asks it, when the worker starts, whether Python has 32 bits


def attack(target: Target, tally: Tally) -> str:
    planted = {}
    with target.user("undecoded") as client:
        images = _decodable()
        for what, body in images.items():
            for mime_type in target.some([each for each in PLANTABLE if each.startswith("image/")], 2):
                planted[plant(target, client, mime_type, body)] = f"{what} as {mime_type}"
        bodies = target.some(never_stored().items(), 6)
        for what, (body, _) in bodies:
            for mime_type in target.random.sample(PLANTABLE, 2):
                planted[plant(target, client, mime_type, body)] = f"{what} as {mime_type}"
        with worker_beside(target, traced=True) as worker:
            tally.check(worker.settle("undecoded", SETTLE_SECONDS), f"{worker.pending('undecoded')} previews are not settled")
            found = worker.found("undecoded")
            worker.stop(tally)
    for file_id, what in planted.items():
        state, reason, files = found[file_id]
        tally.check(state in {"failed", "unsupported"} and reason in REASONS and not files, f"{what}: {state} {reason}, {files} files")
    programs, allowed = worker.programs(), {_program(each) for each in ("setpriv", sys.executable, imageio_ffmpeg.get_ffmpeg_exe(), FILE)}
    tally.check(programs <= allowed, f"programs were run: {sorted(programs - allowed)}")
    return f"{len(planted)} files of {len(images) + len(bodies)} formats passed off as six: no preview; {len(programs)} programs were run"


def _decodable() -> dict[str, bytes]:
    """Whole images, which libvips would draw if it were let."""
    image = photo(64, 48)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"><circle cx="32" cy="24" r="20" fill="red"/></svg>'
    pixels = bytes(image.write_to_memory())
    return {
        "a whole SVG": svg.encode(),
        "a whole TIFF": bytes(image.tiffsave_buffer()),
        "a whole PPM": b"P6\n64 48\n255\n" + pixels,
        "a whole PGM": b"P5\n64 48\n255\n" + pixels[::3],
    }


def _program(name: str) -> str:
    return str(Path(shutil.which(name) or name).resolve())
