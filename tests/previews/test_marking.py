"""Marks in files: stated, signed, and not a pixel changed; and what is no such file is left alone."""

import asyncio
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pyvips

from server.generation.credentials import Credentials
from server.previews.decoders import MARKER_COMMAND, Broken, Decoders, Sign, _sign_once
from server.previews.marks import MOST_GROWTH_BYTES, Mark
from server.previews.models import Unmakeable
from server.previews.statements import NAME
from server.previews.xmp import GENERATED
from tests.previews.issuing import issue
from tests.previews.media import TEST_CARD, ffmpeg, record
from tests.previews.pictures import photo

OTHER = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{}</rdf:RDF></x:xmpmeta>'
KEPT = '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:source="kept"/>'


@pytest.fixture(scope="module")
def marker() -> Iterator[Decoders]:
    decoders = Decoders(1, MARKER_COMMAND)
    yield decoders
    decoders.close()


@pytest.fixture(scope="module")
def credentials() -> Credentials:
    return Credentials(*issue("Coffer's owner"))


class Marking:
    """Marks files one after another, and reads what they say then."""

    def __init__(self, marker: Decoders, reader: Decoders, credentials: Credentials, directory: Path) -> None:
        self._marker, self._reader, self._credentials = marker, reader, credentials
        self._directory = directory
        self._files = 0

    def mark(self, content: bytes, mime_type: str, kind: Any, *, sign: Sign | None = None, **changes: Any) -> bytes:
        self._files += 1
        source, target = self._directory / f"{self._files}", self._directory / f"{self._files}-marked"
        source.write_bytes(content)
        mark = Mark(
            kind=kind,
            most_bytes=len(content) + MOST_GROWTH_BYTES,
            model="a-model",
            certificates=self._credentials.certificates if kind == "c2pa" else "",
        )
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            mark = msgspec.structs.replace(mark, **changes)
            asyncio.run(self._marker.mark(source, mime_type, fd, mark, sign or self._credentials.sign))
        finally:
            os.close(fd)
            source.unlink()
            made = target.read_bytes()
            target.unlink()
        return made

    def said(self, content: bytes, mime_type: str) -> dict[str, Any]:
        self._files += 1
        source, output = self._directory / f"{self._files}", self._directory / f"{self._files}-said"
        source.write_bytes(content)
        output.mkdir()
        asyncio.run(self._reader.read_statements(source, mime_type, output))
        found: dict[str, Any] = msgspec.json.decode((output / NAME).read_bytes())
        return found


@pytest.fixture
def marking(marker: Decoders, reader: Decoders, credentials: Credentials, tmp_path: Path) -> Marking:
    return Marking(marker, reader, credentials, tmp_path)


def with_alpha() -> pyvips.Image:
    return photo().bandjoin(128).copy(interpretation="srgb")


def with_xmp(image: pyvips.Image, text: str) -> pyvips.Image:
    image = image.copy()
    image.set_type(pyvips.GValue.blob_type, "xmp-data", text.encode())
    return image


def with_exif() -> pyvips.Image:
    image = photo().copy()
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Artist", "Ada")
    return image


PICTURES: dict[str, tuple[str, Callable[[], Any]]] = {
    "jpeg": ("image/jpeg", lambda: photo().jpegsave_buffer()),
    "jpeg, progressive": ("image/jpeg", lambda: photo().jpegsave_buffer(interlace=True)),
    "jpeg, exif": ("image/jpeg", lambda: with_exif().jpegsave_buffer()),
    "jpeg, xmp": ("image/jpeg", lambda: with_xmp(photo(), OTHER.format(KEPT)).jpegsave_buffer()),
    "png": ("image/png", lambda: photo().pngsave_buffer()),
    "png, interlaced": ("image/png", lambda: photo().pngsave_buffer(interlace=True)),
    "png, xmp": ("image/png", lambda: with_xmp(photo(), OTHER.format(KEPT)).pngsave_buffer()),
    "webp": ("image/webp", lambda: photo().webpsave_buffer()),
    "webp, alpha": ("image/webp", lambda: with_alpha().webpsave_buffer()),
    "webp, lossless": ("image/webp", lambda: photo().webpsave_buffer(lossless=True)),
    "webp, lossless, alpha": ("image/webp", lambda: with_alpha().webpsave_buffer(lossless=True)),
    "webp, xmp": ("image/webp", lambda: with_xmp(photo(), OTHER.format(KEPT)).webpsave_buffer()),
}


def pixels(content: bytes) -> tuple[Any, ...]:
    image = pyvips.Image.new_from_buffer(content, "", n=-1) if content[:4] == b"RIFF" else pyvips.Image.new_from_buffer(content, "")
    return image.width, image.height, image.bands, image.write_to_memory()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_it_and_stays_the_same(marking: Marking, name: str) -> None:
    mime_type, make = PICTURES[name]
    content = bytes(make())
    stated = marking.mark(content, mime_type, "iptc")
    assert marking.said(stated, mime_type) == {"digital_source_type": GENERATED, "content_credentials": None}
    assert pixels(stated) == pixels(content)
    assert 0 < len(stated) - len(content) < 1_000
    assert chunks_agree(stated)
    xmp = pyvips.Image.new_from_buffer(stated, "").get("xmp-data")
    assert (b"kept" in xmp, xmp.count(GENERATED.encode())) == ("xmp" in name, 1)
    both = marking.mark(stated, mime_type, "c2pa")
    said = marking.said(both, mime_type)
    assert (said["digital_source_type"], said["content_credentials"]["validation_state"]) == (GENERATED, "Valid")
    (action,) = said["content_credentials"]["manifests"][said["content_credentials"]["active_manifest"]]["assertions"][0]["data"]["actions"]
    assert action == {"action": "c2pa.created", "digitalSourceType": GENERATED, "softwareAgent": {"name": "a-model"}}
    assert pixels(both) == pixels(content)


def chunks_agree(content: bytes) -> bool:
    """Whether all chunks of a PNG have the right sums; other files have none."""
    at = 8
    while content.startswith(b"\x89PNG") and at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if zlib.crc32(content[at + 4 : at + 8 + length]) != int.from_bytes(content[at + 8 + length : at + 12 + length], "big"):
            return False
        at += 12 + length
    return True


def test_what_webp_must_not_lose(marking: Marking) -> None:
    """Whether there is alpha stands in the header that a simple file is given, and how long the whole is in the first one."""
    for name, has_alpha in (("webp", False), ("webp, alpha", True), ("webp, lossless", False), ("webp, lossless, alpha", True)):
        made = marking.mark(bytes(PICTURES[name][1]()), "image/webp", "iptc")
        assert (made[12:16], bool(made[20] & 0x10), made[20] & 0x04) == (b"VP8X", has_alpha, 0x04), name
        assert int.from_bytes(made[4:8], "little") == len(made) - 8
        assert (int.from_bytes(made[24:27], "little") + 1, int.from_bytes(made[27:30], "little") + 1) == (photo().width, photo().height)


@pytest.mark.parametrize(
    "flags", [(), ("-movflags", "faststart"), ("-movflags", "frag_keyframe+empty_moov")], ids=["plain", "fast", "fragments"]
)
def test_a_film_says_it_and_stays_the_same(marking: Marking, tmp_path: Path, flags: tuple[str, ...]) -> None:
    film = record(tmp_path / "a.mp4", TEST_CARD, "-c:v", "libx264", "-pix_fmt", "yuv420p", *flags).read_bytes()
    stated = marking.mark(film, "video/mp4", "iptc")
    assert marking.said(stated, "video/mp4") == {"digital_source_type": GENERATED, "content_credentials": None}
    if "mfra" in film[-4096:].decode("latin-1"):
        assert stated.endswith(film[film.rindex(b"mfra") - 4 :])
    else:
        assert stated.startswith(film)
    both = marking.mark(stated, "video/mp4", "c2pa")
    said = marking.said(both, "video/mp4")
    assert (said["digital_source_type"], said["content_credentials"]["validation_state"]) == (GENERATED, "Valid")
    assert frames(tmp_path / "b.mp4", both) == frames(tmp_path / "c.mp4", film)


def test_what_a_long_film_says_stands_at_its_end(marking: Marking, tmp_path: Path) -> None:
    film = record(tmp_path / "a.mp4", TEST_CARD, "-c:v", "libx264").read_bytes() + struct.pack(">I4s", 5 * 2**20, b"free")
    film += bytes(5 * 2**20 - 8)
    both = marking.mark(marking.mark(film, "video/mp4", "iptc"), "video/mp4", "c2pa")
    said = marking.said(both, "video/mp4")
    assert (said["digital_source_type"], said["content_credentials"]["validation_state"]) == (GENERATED, "Valid")


def frames(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    ffmpeg("-i", path, "-f", "framemd5", path.with_suffix(".md5"))
    return path.with_suffix(".md5").read_text()


@pytest.mark.parametrize("mime_type", ["image/gif", "image/avif"])
def test_other_pictures_are_signed(marking: Marking, mime_type: str) -> None:
    content = bytes(photo().gifsave_buffer() if mime_type == "image/gif" else photo().heifsave_buffer(compression="av1"))
    made = marking.mark(content, mime_type, "c2pa")
    assert marking.said(made, mime_type)["content_credentials"]["validation_state"] == "Valid"
    assert pixels(made) == pixels(content)


def jpeg() -> bytes:
    return bytes(photo().jpegsave_buffer())


def png() -> bytes:
    return bytes(photo().pngsave_buffer())


def small_png() -> bytes:
    return bytes(photo(60, 40).pngsave_buffer())


def webp() -> bytes:
    return bytes(photo().webpsave_buffer())


def full_segment() -> bytes:
    packet = OTHER.format(KEPT).encode()
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + packet + b" " * (65_500 - len(packet))
    return b"\xff\xd8\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + jpeg()[2:]


def iend_far_away() -> bytes:
    """Half a million chunks."""
    empty = struct.pack(">I4sI", 0, b"vpAg", zlib.crc32(b"vpAg"))
    whole = png()
    return whole[:33] + empty * 500_000 + whole[33:]


BAD: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "cut in the first segment": ("image/jpeg", lambda: jpeg()[:12], "damaged"),
    "no scan": ("image/jpeg", lambda: jpeg()[: jpeg().index(b"\xff\xda")], "damaged"),
    "a segment beyond the end": ("image/jpeg", lambda: b"\xff\xd8\xff\xe2\xff\xff" + bytes(1000), "damaged"),
    "a segment of no length": ("image/jpeg", lambda: b"\xff\xd8\xff\xe2\0\0" + jpeg()[2:], "damaged"),
    "no room in the packet's segment": ("image/jpeg", full_segment, "unsupported"),
    "a packet that is none": ("image/jpeg", lambda: bytes(with_xmp(photo(), "</rdf:RDF></rdf:RDF>").jpegsave_buffer()), "unsupported"),
    "a png cut short": ("image/png", lambda: png()[:-12], "damaged"),
    "a giant chunk": ("image/png", lambda: png()[:33] + b"\xff\xff\xff\xffiTXt" + png()[33:], "damaged"),
    "too many chunks": ("image/png", iend_far_away, "damaged"),
    "a webp cut short": ("image/webp", lambda: webp()[:-2], "damaged"),
    "a webp of nothing": ("image/webp", lambda: b"RIFF\x04\0\0\0WEBP", "damaged"),
    "a webp that begins with something else": ("image/webp", lambda: b"RIFF\x10\0\0\0WEBPABCD\x04\0\0\0efgh", "damaged"),
    "boxes beyond the end": ("video/mp4", lambda: b"\0\0\0\x10ftypisom\0\0\0\0\x7f\xff\xff\xffmdat" + bytes(500), "damaged"),
    "a box of no length": ("video/mp4", lambda: b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x04mdat" + bytes(500), "damaged"),
    "a box without an end": ("video/mp4", lambda: b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\0mdat" + bytes(500), "unsupported"),
    "a box longer than any file": ("video/mp4", lambda: b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x01mdat" + b"\xff" * 8 + bytes(500), "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_such_file_is_left_alone(marking: Marking, name: str) -> None:
    mime_type, make, reason = BAD[name]
    with pytest.raises(Unmakeable) as refused:
        marking.mark(make(), mime_type, "iptc")
    assert refused.value.reason == reason


@pytest.mark.parametrize("mime_type", ["image/jpeg", "image/png", "image/webp", "video/mp4"])
@pytest.mark.parametrize("kind", ["iptc", "c2pa"])
def test_mutations_end_in_a_file_or_a_reason(marking: Marking, tmp_path: Path, mime_type: str, kind: str) -> None:
    """And never end the decoder. What IPTC adds is all that it changes."""
    film = record(tmp_path / "a.mp4", "color=red:s=64x64:d=1", "-c:v", "libx264").read_bytes()
    contents: dict[str, Callable[[], bytes]] = {"image/jpeg": jpeg, "image/png": small_png, "image/webp": webp, "video/mp4": lambda: film}
    content = contents[mime_type]()
    reasons = set()
    for seed in range(50):
        chosen = random.Random(seed)
        mutated = bytearray(content)
        for _ in range(chosen.choice((1, 3, 30))):
            mutated[chosen.randrange(min(len(mutated), chosen.choice((64, 1_000, 10**9))))] = chosen.choice(
                (0, 1, 0x7F, 0xFF, chosen.randrange(256))
            )
        if chosen.random() < 0.3:
            del mutated[chosen.randrange(len(mutated)) :]
        try:
            made = marking.mark(bytes(mutated), mime_type, kind)
        except Unmakeable as refused:
            reasons.add(refused.reason)
        else:
            assert len(made) > len(mutated)
            if kind == "iptc" and mime_type != "image/webp":
                before = next((at for at, (one, other) in enumerate(zip(made, mutated, strict=False)) if one != other), len(mutated))
                assert made.endswith(mutated[before:])
    assert reasons <= {"damaged", "unsupported", "too_large", "too_slow"}


def test_the_key_signs_once_and_only_claims(marking: Marking, credentials: Credentials) -> None:
    asked: list[bytes] = []

    def sign(claim: bytes) -> bytes:
        asked.append(claim)
        return credentials.sign(claim)

    made = marking.mark(jpeg(), "image/jpeg", "c2pa", sign=sign)
    assert marking.said(made, "image/jpeg")["content_credentials"]["validation_state"] == "Valid"
    assert len(asked) == 1
    assert asked[0].startswith(b"\x84jSignature1")


@pytest.mark.parametrize("message", [b"anything", b"\x84jSignature1" + bytes(70_000), b""])
def test_nothing_else_is_signed(message: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if message:
            theirs.send(message)
        else:
            theirs.shutdown(socket.SHUT_WR)
        _sign_once(ours, lambda _: pytest.fail("signed"))
        assert theirs.recv(100) == b""


def test_one_who_asks_twice_is_answered_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for _ in range(2):
            theirs.send(b"\x84jSignature1...")
        _sign_once(ours, lambda _: b"signature")
        assert (theirs.recv(100), theirs.recv(100)) == (b"signature", b"")


def test_without_a_signature_there_is_no_mark(marking: Marking, credentials: Credentials) -> None:
    def die(_claim: bytes) -> bytes:
        raise OSError("no key")

    with pytest.raises(Unmakeable):
        marking.mark(jpeg(), "image/jpeg", "c2pa", sign=die)
    # Another's signature is no signature: libc2pa looks at it before it lets go of the file.
    other = Credentials(*issue("somebody else"))
    with pytest.raises(Unmakeable):
        marking.mark(jpeg(), "image/jpeg", "c2pa", sign=other.sign)
    assert marking.mark(jpeg(), "image/jpeg", "c2pa")


def test_a_file_does_not_grow_past_its_bound(marking: Marking) -> None:
    with pytest.raises((Unmakeable, Broken)):
        marking.mark(jpeg(), "image/jpeg", "iptc", most_bytes=1_000)
    assert marking.mark(jpeg(), "image/jpeg", "iptc")
