"""2: playlists and references dressed as films, naming a canary and a listener: nobody is called, and nothing but the file is shown."""

import socket
import struct

from tests.attack.previewing import plant, stored, worker_beside
from tests.attack.target import Tally, Target
from tests.previews.media import TEST_CARD, color_at, is_near, record
from tests.previews.test_media_attacks import DISGUISES, H264, Outside, playlists, referring, with_subtitles

SETTLE_SECONDS = 80
FILMS = ("video/mp4", "video/x-msvideo")


def attack(target: Target, tally: Tally) -> str:
    directory = target.scratch / "playlists"
    directory.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener, target.user("projectionist") as client:
        listener.setblocking(False)
        outside = Outside(listener, record(directory / "canary.ts", "color=magenta:s=320x180:d=2", *H264))
        refused, shown = {}, {}
        for name, text in target.some(playlists(outside).items(), 2):
            for mime_type in FILMS:
                for how, body in (("alone", text), ("after a film's start", DISGUISES[mime_type] + b"\n" + text)):
                    refused[plant(target, client, mime_type, body)] = f"{name} as {mime_type}, {how}"
        honest = record(directory / "honest.mp4", "color=magenta:s=320x180:d=2", *H264, "-movflags", "-faststart")
        refused[stored(client, referring(honest.read_bytes(), honest), "dref")] = "an MP4 whose pictures are in another file"
        film = record(directory / "a.avi", TEST_CARD, "-c:v", "mpeg4").read_bytes()
        for name, text in target.some(playlists(outside).items(), 1):
            payload = b"GAB2\0\x02\0" + struct.pack("<I", 2) + b"s\0" + struct.pack("<HI", 4, len(text)) + text
            shown[stored(client, with_subtitles(film, payload), name)] = f"an AVI with {name} for subtitles"
        with worker_beside(target) as worker:
            tally.check(worker.settle("projectionist", SETTLE_SECONDS), f"{worker.pending('projectionist')} previews are not settled")
            found = worker.found("projectionist")
            worker.stop(tally)
        calls = outside.calls()
    tally.check(calls == 0, f"{calls} connections to the listener")
    for file_id, what in refused.items():
        state, reason, files = found[file_id]
        tally.check(state in {"failed", "unsupported"} and reason != "error" and not files, f"{what}: {state} {reason}, {files} files")
    for file_id, what in shown.items():
        tally.check(found[file_id].state == "ready", f"{what}: {found[file_id]}")
    pictures = list((target.server.volume / "users").glob("projectionist/previews/*/*.webp"))
    tally.check(len(pictures) >= len(shown), "the films that may be shown have no pictures")
    # All of them are of the test card: its first bar is red where the canary is magenta.
    for picture in pictures:
        if "storyboard" not in picture.name:
            tally.check(not is_near(color_at(picture, 0.5, 0.5), (255, 0, 255)), f"the canary is in {picture}")
    followed = f"{len(refused)} playlists refused, {len(shown)} as subtitles not followed"
    return f"{followed}: {calls} connections, no canary in {len(pictures)} pictures"
