"""What `previews` compares with, in processes of their own: `python -m tests.bench.photos make|loop ...`.

The benchmark forks its clients, so it must not have libvips and its threads in its own process.
"""

import sys
from pathlib import Path
from typing import Any

import pyvips


def make(path: Path, width: int, height: int, quality: int, grain: int) -> None:
    """A JPEG like a photo: soft shapes, texture at several scales, and a sensor's grain of that standard deviation."""
    bands = []
    for seed in range(3):
        band = pyvips.Image.perlin(width, height, cell_size=width // 5, seed=seed) * 90
        for cells, contrast in ((20, 50), (80, 35), (400, 25)):
            band += pyvips.Image.perlin(width, height, cell_size=max(2, width // cells), seed=seed * 10 + cells) * contrast
        bands.append(band)
    noise = pyvips.Image.gaussnoise(width, height, sigma=grain, mean=128, seed=1)
    photo: Any = bands[0].bandjoin([0.7 * bands[0] + 0.5 * bands[1], 0.7 * bands[0] + 0.5 * bands[2]]) + noise
    photo.cast("uchar").copy(interpretation="srgb").jpegsave(str(path), Q=quality)


def loop(source: Path, output: Path, width: int) -> None:
    """For each number read, a thumbnail made that often, at the decoders' own quality; answers with a line."""
    pyvips.cache_set_max(0)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            image = pyvips.Image.thumbnail(str(source), width, height=4 * width, size="down")
            output.write_bytes(image.webpsave_buffer(Q=80, effort=2, keep="none"))
        print("done", flush=True)


SHARP = """
const sharp = require("sharp"), [source, output, width, atOnce, threads] = process.argv.slice(1);
sharp.cache(false); sharp.concurrency(+threads);
const one = n => sharp(source).rotate().resize(+width).webp({ quality: 80, effort: 2 }).toFile(`${output}.${n}`);
const run = async (n, times) => { for (let i = 0; i < times; i++) await one(n); };
console.log("ready");
require("readline").createInterface({ input: process.stdin }).on("line", async line => {
  await Promise.all([...Array(+atOnce).keys()].map(n => run(n, +line / atOnce)));
  console.log("done");
});
"""
"""The same for npm's sharp, in one process as its users have it, with so many photos in hand and so many threads for each."""


if __name__ == "__main__":
    what, path, *rest = sys.argv[1:]
    if what == "make":
        make(Path(path), *map(int, rest))
    else:
        loop(Path(path), Path(rest[0]), int(rest[1]))
