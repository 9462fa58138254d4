"""`python -m tests.edge.make_vectors` writes vectors.json: links, good and bad in every way, and whether a verifier must take them.

Always the same. The verdicts follow from how each was made, not from either verifier: `served` where a file is there for it, `passed` where
the edge must leave it to the server. `test_vectors.py` asks both verifiers.
"""

import base64
import hashlib
import hmac
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from server.delivery.links import Links
from tests.download.samples import a_file

VECTORS = Path(__file__).parent / "vectors.json"
KEYS = ("k" * 40, "o" * 40)
DROPPED_KEY = "d" * 40
VOLUME = UUID("0a0b0c0d-0000-4000-8000-000000000001")
BODY = b"x" * 10
LATER, LONG_AGO = 4_000_000_000, 1_000_000_000
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
BAD_PREVIEWS = (
    *("../x.webp", "a/b.webp", ".webp", "A.webp", "a..webp", "a.b.webp", "a.webp\n", "a\n.webp", "a" * 33 + ".webp", "-a.webp", "_a.webp"),
    *("320", "webp", "a.", "a.webpwebpweb", "a\0.webp", "a.WEBP"),
)
_FIXED = 81


class Vector(NamedTuple):
    """`served`: both take it. `refused`: neither does. `server`: the server takes it, and the edge leaves it to the server."""

    path: str
    verdict: str
    why: str


def a_link(number: int, **changes: Any) -> tuple[Any, str]:
    """A file, and a good link to it by the first key."""
    wish = {name: changes.pop(name) for name in ("expires_at", "disposition", "name", "preview", "key", "epoch") if name in changes}
    file_id = UUID(int=0x01900000_0000_7000_8000_000000000000 + number)
    user, kind, extension = changes.pop("user", "ada"), changes.pop("kind", "images"), changes.pop("extension", "png")
    generation = changes.pop("generation", 1)
    file = a_file(
        BODY,
        id=file_id,
        volume_id=changes.pop("volume_id", VOLUME),
        generation=generation,
        file_path=f"users/{user}/{kind}/{file_id}.{generation}.{extension}",
        content_changed_at=datetime(2026, 1, 2, 3, 4, 5, 678, UTC),
        **{"file_name": "a photo (2).png", **changes},
    )
    links = Links([wish.pop("key", KEYS[0])])
    return file, links.download(file, wish.pop("epoch", 0), **{"expires_at": LATER, **wish})


def signed(payload: bytes, segment: str, key: str = KEYS[0], salt: bytes = b"coffer.download.1") -> str:
    """A link that nobody meant, with a good signature."""
    text = base64.urlsafe_b64encode(payload).decode().rstrip("=")
    derived = hmac.new(key.encode(), salt, hashlib.sha256).digest()
    signature = hmac.new(derived, f"{text}/{segment}".encode(), hashlib.sha256).digest()
    return f"/f/{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}/{segment}"


def payload_of(path: str) -> bytearray:
    return bytearray(base64.urlsafe_b64decode(path.split("/")[2].split(".", maxsplit=1)[0] + "=="))


def good() -> Iterator[Vector]:
    users = ("ada", "user_2abcdefghijklmnopqrstuvwxyz", "a" * 128, "~" + "0f" * 32, "A-_9")
    kinds = (("videos", "mp4"), ("images", "jpg"), ("scenes", "glb"), ("projects", "zip"), ("audio", "3gp"))
    names = (
        "a.png",
        "Grüße 🌅.png",
        "100%.png",
        "..",
        "a/b\\c.png",
        "x" * 400,
        "é" * 90,
        "a?b#c&d=e.png",
        '"quoted"',
        "\x01\x7f.png",
        "%2e%2e%2f",
    )
    for number, user in enumerate(users):
        for generation in (1, 2, 999_999_999):
            yield Vector(a_link(number, user=user, generation=generation)[1], "served", "a user and a generation")
    for number, (kind, extension) in enumerate(kinds):
        for disposition in ("inline", "attachment"):
            link = a_link(100 + number, kind=kind, extension=extension, disposition=disposition)[1]
            yield Vector(link, "served", "a type and a disposition")
    for number, name in enumerate(names):
        yield Vector(a_link(200 + number, name=name)[1], "served", "a name")
    for number, key in enumerate(KEYS):
        yield Vector(a_link(300 + number, key=key)[1], "served", "a key")
    for number, preview in enumerate(("320.webp", "storyboard.vtt", "640x480-cover-q80.avif", "clip.mp4", "a" * 32 + ".json")):
        yield Vector(a_link(400 + number, preview=preview)[1], "served", "a preview")
    yield Vector(a_link(500, expires_at=2**32 - 1)[1], "served", "the latest end")


def left_to_the_server() -> Iterator[Vector]:
    yield Vector(a_link(600, preview="640x480-cover-q80.auto")[1], "server", "a preview to be negotiated")
    yield Vector(a_link(601, preview="320.xyz")[1], "server", "a preview of an unknown type")
    yield Vector(a_link(602, epoch=1)[1], "server", "an epoch that is not the user's")
    yield Vector(a_link(603, user="revoked", epoch=4)[1], "server", "an epoch before the user's")
    yield Vector(a_link(604, volume_id=UUID(int=7))[1], "server", "a volume that is not here")
    yield Vector(a_link(605)[1] + "?", "server", "an empty query")
    yield Vector(a_link(606, user="nobody")[1], "server", "a file that is gone")
    yield Vector(a_link(607, user="shorter")[1], "server", "a file of another length")
    yield Vector(a_link(608, user="linked")[1], "server", "a symbolic link")
    yield Vector(a_link(609, user="linked-directory")[1], "server", "a symbolic link on the way")
    yield Vector(a_link(610, user="pipe")[1], "server", "a pipe")
    yield Vector(a_link(611, user="directory")[1], "server", "a directory")
    yield Vector(a_link(612, user="no-original", preview="320.webp")[1], "server", "a preview whose original is gone")
    yield Vector(a_link(613, user="no-preview", preview="320.webp")[1], "server", "a preview that is gone")
    for user in (
        "..",
        ".",
        "a/../b",
        "a/b",
        "../../etc",
        "~",
        "~" + "0F" * 32,
        "~" + "0f" * 31,
        "a" * 129,
        "-a",
        "_a",
        "a\0b",
        "a%2fb",
        "a?b",
        "a#b",
        "a\n",
    ):
        payload = payload_of(a_link(620, user="ada")[1])[:-3] + user.encode()
        yield Vector(signed(bytes(payload), "x.png"), "server", f"a user's directory that none has: {user!r}")
    payload = payload_of(a_link(621)[1])
    payload[10:14] = (10**9).to_bytes(4, "big")
    yield Vector(signed(bytes(payload), "x.png"), "server", "a generation that no name has")
    for name in (
        "a b",
        "a;b",
        "a!b",
        'a"b',
        "a:b",
        "a//b",
        "a%",
        "a%zz",
        "a%4",
        "a%f0%9f",
        "%ff",
        "%ed%a0%80",
        "%c0%ae",
        "x" * 256,
        "a'b",
        "%e9",
    ):
        yield Vector(signed(bytes(payload_of(a_link(630)[1])), name), "server", f"a name that we do not write so: {name!r}")


def bad() -> Iterator[Vector]:
    path = a_link(0)[1]
    payload = payload_of(path)
    yield Vector(a_link(0, expires_at=LONG_AGO)[1], "refused", "expired")
    yield Vector(a_link(0, key=DROPPED_KEY)[1], "refused", "a key that was dropped")
    yield Vector(signed(bytes(payload), "x.png", salt=b"coffer.upload.1"), "refused", "signed for uploads")
    for at, value in (
        (0, 0),
        (0, 2),
        (0, 255),
        (1, 2),
        (1, 3),
        (1, 255),
        (78, 5),
        (78, 255),
        (80, 0),
        (80, 2),
        (80, 4),
        (80, 255),
        (79, 255),
    ):
        changed = bytearray(payload)
        changed[at] = value
        yield Vector(signed(bytes(changed), "x.png"), "refused", f"byte {at} of the payload is {value}")
    for length in (0, 1, 10, _FIXED - 1, _FIXED, _FIXED + 3):
        yield Vector(signed(bytes(payload[:length]), "x.png"), "refused", f"only {length} bytes of payload")
    for preview in BAD_PREVIEWS:
        raw = preview.encode()
        changed = payload[:79] + bytes([len(raw)]) + payload[80:84] + raw + payload[84:]
        yield Vector(signed(bytes(changed), "x.png"), "refused", f"a preview of no such name: {preview!r}")
    yield from _mutated(path)
    yield from _mutated(a_link(400, preview="320.webp")[1])
    token, name = path.removeprefix("/f/").split("/")
    for changed_path in (
        *(
            f"/f//{token}/{name}",
            f"/f/{token}//{name}",
            f"//f/{token}/{name}",
            f"/f/{token}/{name}/",
            f"/f/{token}/./{name}",
            f"/f/./{token}/{name}",
        ),
        *(
            f"/f/x/../{token}/{name}",
            f"/f/{token}/x/../{name}",
            f"/f%2f{token}/{name}",
            f"/f/{token}%2f{name}",
            f"/f/{token}/%2e%2e/{name}",
        ),
        *(
            f"/%66/{token}/{name}",
            f"/F/{token}/{name}",
            f"/f/{token}",
            f"/f/{token}/",
            "/f/",
            "/f",
            "/f/.",
            f"/f/.{'A' * 43}/x",
            f"/f/A.{'A' * 43}/x",
        ),
        *(f"/f/{token}/{name}?x=1", f"/f/{token}?/{name}", f"/f/{token}/{name}%00", f"/f/{token}/{name}%3f", f"/f/{token}%2e/{name}"),
        *(
            f"/f/{'A' * 600}.{'A' * 43}/x",
            f"/f/{'A' * 7000}/x",
            f"/f/{token}/{'A' * 6000}",
            f"/f/../users/ada/images/{name}",
            f"/f../{token}/{name}",
        ),
        *(f"/f/{token}={name}", f"/f/{token}./{name}", f"/f/{token}=/{name}", f"/f/..%2f..%2fetc%2fpasswd/{name}", f"/f/{token}\\{name}"),
    ):
        yield Vector(changed_path, "refused", "another path")
    shown = random.Random(7)
    for _ in range(300):
        text = "".join(shown.choices(ALPHABET + "./%", k=shown.randrange(1, 200)))
        yield Vector(f"/f/{text}", "refused", "noise")


def _mutated(path: str) -> Iterator[Vector]:
    """Each character changed, doubled, removed, and one put before it; chosen at random from what may stand in a URL."""
    whole = path.removeprefix("/f/")
    chooser = random.Random(path)
    for at in range(len(whole)):
        for _ in range(4):
            other = chooser.choice([each for each in ALPHABET + ".~%!$&'()*+,;=:@" if each != whole[at]])
            yield Vector(f"/f/{whole[:at]}{other}{whole[at + 1 :]}", "refused", f"character {at} changed")
        other = chooser.choice(ALPHABET)
        yield Vector(f"/f/{whole[:at]}{other}{whole[at:]}", "refused", f"a character put before {at}")
        yield Vector(f"/f/{whole[:at]}{whole[at + 1 :]}", "refused", f"character {at} removed")


def vectors() -> list[Vector]:
    return [*good(), *left_to_the_server(), *bad()]


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(each, ensure_ascii=True) for each in vectors())
    VECTORS.write_text(f"[\n{lines}\n]\n")
