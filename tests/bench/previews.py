"""previews: from the queue to the row, against libvips, vipsthumbnail, sharp and ffmpeg left alone; and what others feel of it."""

import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import asyncpg
import imageio_ffmpeg

from server.previews import making
from server.previews.decoders import Decoders
from server.previews.models import Wishes
from tests.bench.clients import Connection
from tests.bench.harness import MIB, Round, Stage, interleave, ratio, say, table, verdict
from tests.bench.photos import SHARP
from tests.bench.processes import BenchError, cpu_seconds, resident_bytes, standing_still
from tests.bench.servers import Coffer, Request, coffer

WIDTH = 320
AT_ONCE = 2  # COFFER_PREVIEWS_AT_ONCE's default, and the cores of the machine that the targets were set on
FILES, ROUNDS = 60, 5
FILMS_EACH = 4
SINGLES = 60
USERS, FLOOD, FLOODS = 8, 1_000, 3
DRAIN_SECONDS = 200
JPEG = "image/jpeg"
ONE_WIDTH = Wishes(image_widths=(WIDTH,))

_FFMPEG = imageio_ffmpeg.get_ffmpeg_exe
_fork = multiprocessing.get_context("fork")


def measure(stage: Stage) -> None:
    directory = stage.scratch / "previews"
    directory.mkdir()
    photo, small, tiny = (_photo(directory, *each) for each in ((4000, 3000, 85, 11), (1600, 1200, 75, 5), (64, 64, 85, 5)))
    with coffer(stage.scratch, "coffer-one-width", COFFER_PREVIEW_WIDTHS=str(WIDTH)) as narrow:
        _throughput(narrow, photo, directory)
    _one_decoder(photo, tiny)
    _posters(directory)
    with coffer(stage.scratch, "coffer-all-widths") as whole:
        _latency(whole, photo, small)
        _flood(whole, small.read_bytes())


# Throughput


def _throughput(server: Coffer, photo: Path, directory: Path) -> None:
    """Photos of 12 megapixels and 4 MB, at the default quality and effort everywhere; two at once everywhere."""
    body = photo.read_bytes()
    with ExitStack() as stack:
        loops: list[str | Path] = [sys.executable, "-m", "tests.bench.photos", "loop", photo]
        vips = [stack.enter_context(_answering([*loops, directory / f"loop-{number}", str(WIDTH)])) for number in range(AT_ONCE)]
        contestants: dict[str, Callable[[], Round]] = {
            "queue, jail, file, row": partial(_worked_off, server, body),
            "bare pyvips, 2 processes": partial(_looped, vips),
        }
        if shutil.which("vipsthumbnail"):
            contestants["vipsthumbnail, 2 processes"] = partial(_vipsthumbnail, photo, directory)
        else:
            say("without vipsthumbnail: it is not installed (apt-get install libvips-tools)")
        try:
            sharp = _sharp(directory)
            for name, at_once, threads in (("sharp in a loop, 2 threads", 1, AT_ONCE), ("sharp, 2 photos at once", AT_ONCE, 1)):
                settings = [str(WIDTH), str(at_once), str(threads)]
                process = stack.enter_context(_answering(["node", "-e", SHARP, photo, directory / "sharp.webp", *settings], sharp))
                contestants[name] = partial(_looped, [process])
        except BenchError as missing:
            say(f"without sharp: {missing}")
        results = interleave(contestants, ROUNDS)
    table(results, "photos/s", "CPU ms/photo", 1000)
    ratio(results, "queue, jail, file, row", "bare pyvips, 2 processes", at_least=0.7)
    ratio(results, "queue, jail, file, row", "vipsthumbnail, 2 processes", at_least=0.7)
    ratio(results, "queue, jail, file, row", "sharp in a loop, 2 threads", at_least=1.0)
    ratio(results, "queue, jail, file, row", "sharp, 2 photos at once")
    if (os.cpu_count() or 0) < os.getloadavg()[0] / 2:
        say("this machine has other work: the worker, at the lowest priority, comes last; compare processor time")


def _worked_off(server: Coffer, body: bytes) -> Round:
    """The worker stands still until all photos are stored; its clock runs from when it goes on until the last row is ready."""
    with standing_still(server.worker_pid):
        _upload(server, body, USERS, FILES)
    spent, began = cpu_seconds(server.worker_pid), time.perf_counter()
    _drain(server)
    seconds = time.perf_counter() - began
    return Round(FILES / seconds, (cpu_seconds(server.worker_pid) - spent) / FILES)


@contextmanager
def _answering(command: list[str | Path], directory: Path | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A process that answers each line, once it is ready."""
    environment = os.environ | {"VIPS_CONCURRENCY": "1"}
    with subprocess.Popen(command, cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            _hear(process, "ready")
            yield process
        finally:
            process.kill()


def _hear(process: "subprocess.Popen[str]", expected: str) -> None:
    assert process.stdout is not None
    if process.stdout.readline().strip() != expected:
        raise BenchError(f"a peer ended; see above ({process.args!r:.200})")


def _looped(processes: list["subprocess.Popen[str]"]) -> Round:
    spent, began = sum(cpu_seconds(each.pid) for each in processes), time.perf_counter()
    for each in processes:
        assert each.stdin is not None
        each.stdin.write(f"{FILES // len(processes)}\n")
        each.stdin.flush()
    for each in processes:
        _hear(each, "done")
    seconds = time.perf_counter() - began
    return Round(FILES / seconds, (sum(cpu_seconds(each.pid) for each in processes) - spent) / FILES)


def _vipsthumbnail(photo: Path, directory: Path) -> Round:
    """Many photos in each of its runs, as its users have it."""
    environment = os.environ | {"VIPS_CONCURRENCY": "1"}
    before, began = os.times(), time.perf_counter()
    processes = []
    for number in range(AT_ONCE):
        options = ["-s", f"{WIDTH}x", "-o", f"{directory}/vipsthumbnail-{number}.webp[Q=80,strip,effort=2]"]
        processes.append(subprocess.Popen(["vipsthumbnail", *[photo] * (FILES // AT_ONCE), *options], env=environment))
    if any(each.wait() for each in processes):
        raise BenchError("vipsthumbnail failed; see above")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Round(FILES / (time.perf_counter() - began), spent / FILES)


def _sharp(directory: Path) -> Path:
    """A directory in which node finds npm's newest sharp."""
    if not shutil.which("npm"):
        raise BenchError("node and npm are not installed")
    home = directory / "sharp"
    home.mkdir()
    (home / "package.json").write_text("{}")
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "sharp"], cwd=home, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"npm cannot install it: {done.stderr.strip()[-300:]}")
    version = json.loads((home / "node_modules/sharp/package.json").read_text())["version"]
    say(f"sharp {version}")
    return home


# One decoder


def _one_decoder(photo: Path, tiny: Path) -> None:
    """What the jail costs to start: once for a warm decoder, then a fork for each image, which is most of what a tiny one takes."""
    decoders = Decoders(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            output = Path(name)

            def made(source: Path) -> float:
                began = time.perf_counter()
                asyncio.run(decoders.make(source, JPEG, output, ONE_WIDTH))
                return 1000 * (time.perf_counter() - began)

            cold = made(tiny)
            warm = statistics.median(made(tiny) for _ in range(20))
            for _ in range(5):
                made(photo)
    finally:
        decoders.close()
    say(f"the jail: {cold - warm:.0f} ms once for each decoder, then {warm:.1f} ms for an image of 64 x 64, the fork of its child included")
    verdict("memory of one decoder at 12 megapixels", decoders.peak_bytes / MIB, at_most=120, unit=" MiB")


def _photo(directory: Path, width: int, height: int, quality: int, grain: int) -> Path:
    path = directory / f"{width}x{height}.jpg"
    _run([sys.executable, "-m", "tests.bench.photos", "make", path, *map(str, (width, height, quality, grain))])
    return path


# Posters


def _posters(directory: Path) -> None:
    film = directory / "film.mp4"
    # Noise on a moving card: about 8 Mbit/s, as a camera's.
    source = "testsrc2=s=1920x1080:r=30:d=60"
    options = ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "30", "-g", "60", "-pix_fmt", "yuv420p"]
    _run([_FFMPEG(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *options, film])

    def bare(*widths: int) -> Round:
        """One ffmpeg command that makes the same files of the first frame."""
        split = "".join(f"[in{width}]" for width in widths)
        scaled = ";".join(f"[in{width}]scale={width}:-2[out{width}]" for width in widths)
        command = [_FFMPEG(), "-v", "error", "-y", "-threads", "1", "-i", film]
        command += ["-filter_complex", f"[0:v]split={len(widths)}{split};{scaled}"]
        for width in widths:
            webp = ["-frames:v", "1", "-quality", "80", "-compression_level", "2", directory / f"poster-{width}.webp"]
            command += ["-map", f"[out{width}]", *webp]
        began = time.perf_counter()
        for _ in range(FILMS_EACH):
            _run(command)
        return Round(FILMS_EACH / (time.perf_counter() - began))

    def jailed(*widths: int) -> Round:
        began = time.perf_counter()
        for _ in range(FILMS_EACH):
            with tempfile.TemporaryDirectory(dir=directory) as output:
                asyncio.run(making.make(film, "video/mp4", Path(output), Wishes(image_widths=widths)))
        return Round(FILMS_EACH / (time.perf_counter() - began))

    usual = Wishes().image_widths
    contestants = {
        "previews": partial(jailed, *usual),
        "bare ffmpeg": partial(bare, *usual),
        "one preview": partial(jailed, WIDTH),
        "bare ffmpeg, one": partial(bare, WIDTH),
    }
    found = interleave(contestants, ROUNDS)
    millis = {name: statistics.median(1000 / each.rate for each in rounds) for name, rounds in found.items()}
    say(f"a 1080p minute's poster in three sizes: {millis['previews']:.0f} ms; by one bare ffmpeg command: {millis['bare ffmpeg']:.0f} ms")
    verdict("time of a poster / of the bare command", millis["previews"] / millis["bare ffmpeg"], at_most=1.2)
    say(f"the smallest size alone: {millis['one preview']:.0f} ms; bare: {millis['bare ffmpeg, one']:.0f} ms.")


def _run(command: list[str | Path]) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        raise BenchError(f"{command[0]} failed; see above")


# What users feel


def _latency(server: Coffer, *photos: Path) -> None:
    """One photo at a time, on an idle server with a warm worker: from the first byte sent to the answer that says `ready`."""
    connection = Connection(server.port)
    for photo in photos:
        body, taken = photo.read_bytes(), []
        for number in range(SINGLES + 3):
            began = time.perf_counter()
            file_id = json.loads(connection.ask(server.upload("single", JPEG), body, f"{photo.stem}-{number}"))["id"]
            wait = Request("GET", f"/api/files/{file_id}?wait=preview", server.headers("single"))
            state = json.loads(connection.ask(wait))["preview_state"]
            if state != "ready":
                raise BenchError(f"a photo's preview is {state}")
            if number >= 3:  # what starts the decoders is reported above
                taken.append(1000 * (time.perf_counter() - began))
        what = f"{len(body) / 1e6:.1f} MB to three widths, upload to visible"
        say(f"{what}: median {statistics.median(taken):.0f} ms")
        verdict(f"{what}, p95", statistics.quantiles(taken, n=20)[-1], at_most=500, unit=" ms")
    server.erase("single")


def _flood(server: Coffer, body: bytes) -> None:
    """Eight users at once, with the worker at work beside them and without, by turns: one stalled flush is a hundredth."""
    without, beside = [], []
    spent = began = 0.0
    for _ in range(FLOODS):
        server.erase(*_users(USERS))
        with standing_still(server.worker_pid):
            without.append(_p99(_upload(server, body, USERS, FLOOD)))
            server.erase(*_users(USERS))
        spent, began = cpu_seconds(server.worker_pid), time.perf_counter()
        beside.append(_p99(_upload(server, body, USERS, FLOOD)))
    say(f"{FLOOD:,} photos of {len(body) / 1000:.0f} kB by {USERS} users")
    say(f"uploads' p99: {statistics.median(without):.0f} ms without the worker, {statistics.median(beside):.0f} ms with it")
    verdict("uploads' p99 with the worker / without", statistics.median(beside) / statistics.median(without), at_most=1.5)
    held: list[float] = []
    _drain(server, lambda: held.append(resident_bytes(server.worker_pid) / MIB), every_seconds=0.25)
    seconds = time.perf_counter() - began
    busy = (cpu_seconds(server.worker_pid) - spent) / seconds / min(AT_ONCE, os.cpu_count() or AT_ONCE)
    server.erase(*_users(USERS))
    say(f"all previews, of three widths, after {seconds:.0f} s: {FLOOD / seconds:.0f} photos/s")
    verdict("cores busy with previews, of those it may use", busy, at_least=0.8)
    # Decoders come and go with each photo; what stays would show between the middle and the end.
    half = held[len(held) // 2 :]
    third = max(1, len(half) // 3)
    say(f"worker and decoders: at most {max(held):.0f} MiB resident, shared pages counted for each")
    verdict("growth from the middle to the end", statistics.mean(half[-third:]) - statistics.mean(half[:third]), at_most=8, unit=" MiB")


def _p99(seconds: list[float]) -> float:
    return 1000 * statistics.quantiles(seconds, n=100)[-1]


def _users(count: int) -> list[str]:
    return [f"flood_{number}" for number in range(count)]


def _upload(server: Coffer, body: bytes, clients: int, uploads: int) -> list[float]:
    """Uploads by so many users at once; the seconds of each."""
    with _fork.Pool(clients) as pool:
        return [each for seconds in pool.map(partial(_client, server, body, uploads // clients), _users(clients)) for each in seconds]


def _client(server: Coffer, body: bytes, uploads: int, user: str) -> list[float]:
    connection, request, taken = Connection(server.port), server.upload(user, JPEG), []
    for number in range(uploads):
        began = time.perf_counter()
        connection.ask(request, body, f"{user}-{number}")
        taken.append(time.perf_counter() - began)
    return taken


def _drain(server: Coffer, look: Callable[[], None] = lambda: None, every_seconds: float = 0.02) -> None:
    """Waits until no file waits for its preview, all of which must be ready, and looks now and then. Seldom: looking costs time itself."""
    asyncio.run(_drained(server, look, every_seconds))


async def _drained(server: Coffer, look: Callable[[], None], every_seconds: float) -> None:
    connection = await asyncpg.connect(server.database_url)
    try:
        deadline = time.monotonic() + DRAIN_SECONDS
        while await connection.fetchval("select exists (select from user_files where preview_state = 'pending')"):
            if time.monotonic() > deadline:
                raise BenchError(f"the queue has not drained after {DRAIN_SECONDS} s")
            look()
            await asyncio.sleep(every_seconds)
        if failed := await connection.fetchval("select count(*) from user_files where preview_state <> 'ready'"):
            raise BenchError(f"{failed} photos have no preview")
    finally:
        await connection.close()
