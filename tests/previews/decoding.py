"""Has bytes previewed as the worker does, in jailed decoders."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips

from server.previews.decoders import Decoders
from server.previews.making import Made, MadeFile, Unmakeable, Variant, Wishes
from server.previews.sheets import Sheet

WISHES = Wishes()


@dataclass(frozen=True)
class Previews:
    """What was made, with the files' bytes by their names."""

    made: Made
    contents: dict[str, bytes]

    def image(self, name: str = "320.webp", **options: Any) -> Any:
        return pyvips.Image.new_from_buffer(self.contents[name], "", **options)


@dataclass(frozen=True)
class Studio:
    """Decoders, and a directory for what goes in and comes out."""

    decoders: Decoders
    directory: Path

    def previews(self, content: bytes, mime_type: str, wishes: Wishes = WISHES) -> Previews:
        source, output = self._paths(content)
        made = asyncio.run(self.decoders.make(source, mime_type, output, wishes))
        contents = {path.name: path.read_bytes() for path in output.iterdir()}
        assert contents.keys() == {each.name for each in made.files}
        return Previews(made, contents)

    def refusal(self, content: bytes, mime_type: str) -> str:
        """The reason why there are no previews of it; there must be none."""
        source, output = self._paths(content)
        try:
            made = asyncio.run(self.decoders.make(source, mime_type, output, Wishes()))
        except Unmakeable as problem:
            assert list(output.iterdir()) == []
            return problem.reason
        raise AssertionError(made)

    def variant(self, content: bytes, mime_type: str, variant: Variant) -> tuple[MadeFile, bytes]:
        source, output = self._paths(content)
        made = asyncio.run(self.decoders.make_variant(source, mime_type, output, variant))
        assert [path.name for path in output.iterdir()] == [variant.name] == [made.name]
        return made, (output / made.name).read_bytes()

    def _paths(self, content: bytes) -> tuple[Path, Path]:
        inside = Path(tempfile.mkdtemp(dir=self.directory))
        (inside / "output").mkdir()
        (inside / "source").write_bytes(content)
        return inside / "source", inside / "output"

    def sheet(self, pictures: Sequence[tuple[bytes, str]], sheet: Sheet) -> Any:
        """The sheet, decoded."""
        sources = [(self._paths(content)[0], mime_type) for content, mime_type in pictures]
        output = self._paths(b"")[1]
        made = asyncio.run(self.decoders.make_sheet(sources, output, sheet))
        assert [path.name for path in output.iterdir()] == [sheet.name] == [made.name]
        image = pyvips.Image.new_from_file(str(output / made.name))
        assert (image.width, image.height) == (made.width, made.height) == sheet.size(len(pictures))
        return image
