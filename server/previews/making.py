"""Makes a file's previews, whatever it is: the one door to the decoders."""

from collections.abc import Sequence
from pathlib import Path

from server.previews import audio, decoders, video
from server.previews.decoders import Sign
from server.previews.ffmpeg import DEMUXERS
from server.previews.images import LOADERS
from server.previews.marks import TYPES, Mark
from server.previews.models import Made, MadeFile, Unmakeable, Wishes
from server.previews.scenes import SCENES
from server.previews.sheets import Sheet
from server.previews.variants import Variant

__all__ = ["Made", "MadeFile", "Unmakeable", "Variant", "Wishes", "make", "make_sheet", "make_variant", "mark", "read_statements"]


async def make(source: Path, mime_type: str, output: Path, wishes: Wishes) -> Made:
    """Makes previews of the file `source`, whose type was found to be `mime_type`, in the empty directory `output`.

    Raises `Unmakeable`; anything else may be tried again. Then nothing is left in `output`.
    """
    if mime_type in LOADERS or mime_type in SCENES:
        return await decoders.shared().make(source, mime_type, output, wishes)
    if mime_type in DEMUXERS:
        try:
            if mime_type.startswith("audio/"):
                return await audio.make(source, mime_type, output, wishes)
            return await video.make(source, mime_type, output, wishes)
        except BaseException:
            _clear(output)
            raise
    raise Unmakeable("unsupported")


async def make_variant(source: Path, mime_type: str, output: Path, variant: Variant) -> MadeFile:
    """Makes the file `variant.name` in the directory `output` of `source`: a still, of an image or a scene's own. Raises as `make`."""
    if mime_type in LOADERS or mime_type in SCENES:
        return await decoders.shared().make_variant(source, mime_type, output, variant)
    raise Unmakeable("unsupported")


async def make_sheet(pictures: Sequence[tuple[Path, str]], output: Path, sheet: Sheet) -> MadeFile:
    """Makes the file `sheet.name` in the directory `output` of images with their types, in their order. Raises as `make`, with the number
    of the picture that is to blame.
    """
    for number, (_, mime_type) in enumerate(pictures):
        if mime_type not in LOADERS:
            raise Unmakeable("unsupported", number)
    return await decoders.shared().make_sheet(pictures, output, sheet)


async def read_statements(source: Path, mime_type: str, output: Path) -> MadeFile:
    """Writes what a file, whatever it is, says of its making into the directory `output`: `Statements` as JSON. Raises as `make`."""
    return await decoders.reader().read_statements(source, mime_type, output)


async def mark(source: Path, mime_type: str, target_fd: int, mark: Mark, sign: Sign) -> None:
    """Writes a file with a mark into the empty file of `target_fd`, which may be read and written. `sign` makes the signature, as DER, of
    what it is given, in a thread. Raises as `make`; then the target may hold anything.
    """
    if mime_type not in TYPES[mark.kind]:
        raise Unmakeable("unsupported")
    await decoders.marker().mark(source, mime_type, target_fd, mark, sign)


def _clear(directory: Path) -> None:
    for each in directory.iterdir():
        each.unlink()
