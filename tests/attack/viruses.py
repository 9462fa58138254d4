"""16: files with a virus, a scanner that is down or hangs, and files that it does not take: refused in every way in, and never served."""

import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx

from tests.access.ways_in import WAYS_IN
from tests.attack.target import Tally, Target
from tests.clamd import EICAR, MARKER, FalseClamd, clamd_running, infected, silent
from tests.samples import image
from tests.serving import RunningServer

SMALL, LARGE = 5_000, 2 * 2**20 + 5  # waits in memory; goes to the disk
LIMIT_BYTES = 2_500_000
AT_ONCE = 8
INFECTED, TOO_LARGE, AWAY = (422, "infected"), (422, "not_scannable"), (503, "scanner_unavailable")


def attack(target: Target, tally: Tally) -> str:
    with target.user("virologist") as unscanned, clamd_running() as clamd:
        # What came before there was a scanner: the user's own file, and one with a virus that must not multiply.
        clean, virus = target.upload(unscanned, image(SMALL, seed=1)), target.upload(unscanned, infected(image(SMALL, seed=2), EICAR))
        with (
            target.another_server(COFFER_CLAMD=clamd.unix, COFFER_CLAMD_MAX_BYTES=str(LIMIT_BYTES)) as server,
            server.client("virologist", timeout=60) as client,
        ):
            _check_that_clean_files_are_stored(tally, client)
            with _unchanged(tally, client, server):
                viruses = _bring_viruses(target, tally, client, clean, virus)
                large = _bring(tally, client, [infected(image(LIMIT_BYTES + 1), EICAR)], clean, None, TOO_LARGE)
            clamd.stop()
            with _unchanged(tally, client, server):
                down = _bring(tally, client, target.some(_bodies(), 1), clean, virus, AWAY)
                tally.check(client.get("/health/ready").json()["scanner"] == {"ok": False}, "nobody is told that the scanner is down")
            clamd.start()
            _check_that_clean_files_are_stored(tally, client)
        hanging = _hang(target, tally, clean, virus)
        unscanned.delete(f"/api/files/{virus['id']}").raise_for_status()
        served = _look_through_what_is_served(target, tally, unscanned)
    return (
        f"{viruses} files with a virus, {large} too large, {down} while clamd was down, {hanging} while it hung, "
        f"by {len(WAYS_IN) + 2} ways in: 0 stored, 0 in {served} downloads"
    )


def _bodies() -> list[bytes]:
    """With a virus or without: nothing is stored that nobody has looked at."""
    return [image(SMALL, seed=3), infected(image(SMALL), EICAR), infected(image(LARGE), EICAR)]


def _check_that_clean_files_are_stored(tally: Tally, client: httpx.Client) -> None:
    """Or the refusals would mean nothing."""
    for way_in in WAYS_IN:
        answer = way_in(client, image(SMALL, seed=4))
        tally.check(answer.status_code == 201, f"a clean file by {way_in.__name__}: {answer.text}")
        client.delete(f"/api/files/{answer.json()['id']}").raise_for_status()


def _bring_viruses(target: Target, tally: Tally, client: httpx.Client, clean: dict[str, Any], virus: dict[str, Any]) -> int:
    bodies = [infected(image(size), mark) for size in (SMALL, LARGE) for mark in (EICAR, MARKER)]
    # At the very end, and across the pieces in which bodies come and are shown to clamd.
    bodies += [image(SMALL) + EICAR, *(image(at - 30) + EICAR + image(1_000) for at in (65_536, 2**20, LARGE))]
    tried = _bring(tally, client, target.some(bodies, 2), clean, virus, INFECTED)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scene.json", b"{}")
        archive.writestr("eicar.com", EICAR * 3)
    for body in (packed.getvalue(), packed.getvalue() + bytes(LARGE)):
        tally.check(EICAR not in body, "the archive is none")
        _check(tally, client.post("/api/files/upload?type=project", content=body), "an archive", INFECTED)
    return tried + 2


def _bring(
    tally: Tally, client: httpx.Client, bodies: list[bytes], clean: dict[str, Any], virus: dict[str, Any] | None, expected: tuple[int, str]
) -> int:
    """Each body in every way in, in place of the clean file, and a copy of the one with a virus. Returns how many that were."""
    content = f"/api/files/{clean['id']}/content"
    tries = [(f"{len(body):,} bytes by {way_in.__name__}", partial(way_in, client, body)) for body in bodies for way_in in WAYS_IN]
    tries += [(f"{len(body):,} bytes in place of others", partial(client.put, content, content=body)) for body in bodies]
    if virus is not None:
        tries.append(("a copy", partial(client.post, f"/api/files/{virus['id']}/copy")))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = [(what, pool.submit(bring)) for what, bring in tries]
    for what, answer in answers:
        _check(tally, answer.result(), what, expected)
    return len(tries)


def _check(tally: Tally, answer: httpx.Response, what: str, expected: tuple[int, str]) -> None:
    told = answer.status_code, answer.json().get("code", "")
    tally.check(told == expected, f"{what}: {told}, not {expected}")


def _hang(target: Target, tally: Tally, clean: dict[str, Any], virus: dict[str, Any]) -> int:
    """clamd takes everything and says nothing. Returns how many files it was shown."""
    hanging = FalseClamd(silent)
    try:
        environment = {"COFFER_CLAMD_TIMEOUT_SECONDS": "1", "COFFER_CLAMD_SCANS_AT_ONCE": str(AT_ONCE)}
        with (
            target.another_server(COFFER_CLAMD=hanging.address, **environment) as server,
            server.client("virologist", timeout=60) as client,
            _unchanged(tally, client, server),
        ):
            return _bring(tally, client, target.some(_bodies(), 1), clean, virus, AWAY)
    finally:
        hanging.close()


@contextmanager
def _unchanged(tally: Tally, client: httpx.Client, server: RunningServer) -> Iterator[None]:
    """The user has the same files, bytes and quota afterwards, and the volume nothing more."""

    def state() -> tuple[object, ...]:
        files, usage = client.get("/api/files", params={"limit": "200"}).json(), client.get("/api/storage/usage").json()
        return files, usage, sorted(server.stored_paths()), server.stored_files(), server.incoming()

    before = state()
    yield
    tally.check(state() == before, "something of what was refused is left")


def _look_through_what_is_served(target: Target, tally: Tally, client: httpx.Client) -> int:
    """Every byte of every file of the user's, as its owner and as a link's holder gets it. Returns how often that was."""
    bodies = []
    for file in target.listed(client):
        bodies.append(client.get(f"/api/files/{file['id']}/download").content)
        bodies.append(target.nobody.get(target.link(client, file["id"])).content)
    tally.check(bodies, "nothing is served at all")
    tally.check(not any(mark in body for body in bodies for mark in (EICAR, MARKER)), "a virus is served")
    return len(bodies)
