"""Types come from the bytes: real files of every family, things dressed as something else, and noise."""

import struct
import subprocess
import timeit
import zipfile
from io import BytesIO
from pathlib import Path

import imageio_ffmpeg
import puremagic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.kinds import HEAD_BYTES, KINDS, KNOWN, TAIL_BYTES, FileType, detect

PICTURE = ("-map", "0:v", "-frames:v", "1")
VIDEO = ("-map", "0:v", "-pix_fmt", "yuv420p")
SOUND = ("-map", "1:a")
# file name: how ffmpeg makes it, and what it is
MADE_BY_FFMPEG: dict[str, tuple[tuple[str, ...], str]] = {
    "a.jpg": (PICTURE, "image/jpeg"),
    "a.png": (PICTURE, "image/png"),
    "a.webp": (PICTURE, "image/webp"),
    "a.gif": (PICTURE, "image/gif"),
    "a.avif": ((*PICTURE, "-c:v", "libaom-av1", "-still-picture", "1"), "image/avif"),
    "a.mp4": (VIDEO, "video/mp4"),
    "fragmented.mp4": ((*VIDEO, "-movflags", "frag_keyframe+empty_moov"), "video/mp4"),
    "both.mp4": ((*VIDEO, *SOUND), "video/mp4"),
    "itunes.m4v": ((*VIDEO, "-f", "ipod"), "video/mp4"),
    "a.mov": (VIDEO, "video/quicktime"),
    "a.webm": ((*VIDEO, "-c:v", "libvpx"), "video/webm"),
    "both.webm": ((*VIDEO, *SOUND, "-c:v", "libvpx", "-c:a", "libopus"), "video/webm"),
    "a.mkv": (VIDEO, "video/x-matroska"),
    "live.mkv": ((*VIDEO, "-f", "matroska", "-live", "1"), "video/x-matroska"),
    "a.3gp": ((*VIDEO, "-c:v", "mpeg4"), "video/3gpp"),
    "a.3g2": ((*VIDEO, "-c:v", "mpeg4"), "video/3gpp2"),
    "a.avi": (VIDEO, "video/x-msvideo"),
    "a.ogv": ((*VIDEO, "-c:v", "libtheora"), "video/ogg"),
    "a.mp3": (SOUND, "audio/mpeg"),
    "bare.mp3": ((*SOUND, "-id3v2_version", "0", "-write_xing", "0"), "audio/mpeg"),
    "slow.mp3": ((*SOUND, "-ar", "11025", "-b:a", "8k", "-id3v2_version", "0"), "audio/mpeg"),
    "a.m4a": ((*SOUND, "-c:a", "aac"), "audio/mp4"),
    "phone.mp4": ((*SOUND, "-c:a", "aac"), "audio/mp4"),
    "browser.mp4": ((*SOUND, "-c:a", "aac", "-movflags", "frag_keyframe+empty_moov"), "audio/mp4"),
    "a.aac": ((*SOUND, "-c:a", "aac"), "audio/aac"),
    "a.ogg": ((*SOUND, "-c:a", "libvorbis"), "audio/ogg"),
    "a.opus": ((*SOUND, "-c:a", "libopus"), "audio/ogg"),
    "flac.oga": ((*SOUND, "-f", "oga", "-c:a", "flac"), "audio/ogg"),
    "a.wav": (SOUND, "audio/wav"),
    "large.wav": ((*SOUND, "-rf64", "always"), "audio/wav"),
    "a.flac": (SOUND, "audio/flac"),
    "browser.weba": ((*SOUND, "-f", "webm", "-c:a", "libopus"), "audio/webm"),
    "a.mka": ((*SOUND, "-c:a", "libopus"), "audio/x-matroska"),
    "a.bmp": (PICTURE, ""),
    "a.ts": (VIDEO, ""),
    "a.mp2": ((*SOUND, "-c:a", "mp2"), ""),
    "a.flv": (VIDEO, "video/x-flv"),
    "a.tiff": (PICTURE, "image/tiff"),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of ffmpeg makes all samples. The tone is so long that an index at its end is out of the head's sight."""
    folder = tmp_path_factory.mktemp("samples")
    sources = ("-f", "lavfi", "-i", "testsrc=s=64x64:d=0.2:r=10", "-f", "lavfi", "-i", "sine=d=2")
    outputs = [part for name, (options, _) in MADE_BY_FFMPEG.items() for part in (*options, str(folder / name))]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *sources, *outputs], check=True, timeout=120)
    return folder


def mime(data: bytes) -> str | None:
    found = detect(data[:HEAD_BYTES], data[-TAIL_BYTES:])
    return found.mime_type if found else None


@pytest.mark.parametrize(("name", "expected"), [(name, mime_type) for name, (_, mime_type) in MADE_BY_FFMPEG.items()])
def test_real_files(made: Path, name: str, expected: str) -> None:
    data = (made / name).read_bytes()
    assert mime(data) == (expected or None)
    if expected in KNOWN:
        assert detect(data[:HEAD_BYTES], data[-TAIL_BYTES:]) is KNOWN[expected]


# What puremagic calls types that it does not tell apart, or names differently.
COUSINS = {
    "audio/mp4": {"video/mp4"},
    "audio/webm": {"video/webm"},
    "audio/x-matroska": {"video/x-matroska"},
    "audio/ogg": {"application/ogg"},
    "video/ogg": {"application/ogg"},
    "video/3gpp2": {"video/3gpp"},
    "audio/wav": {"audio/wave", "audio/x-wav"},
}


@pytest.mark.parametrize(("name", "expected"), [(name, mime_type) for name, (_, mime_type) in MADE_BY_FFMPEG.items() if mime_type in KNOWN])
def test_the_library_does_not_contradict_us(made: Path, name: str, expected: str) -> None:
    """Wherever puremagic knows anything of a file, one of its guesses is our type or that type's family."""
    try:
        guesses = {guess.mime_type for guess in puremagic.magic_string((made / name).read_bytes()[:HEAD_BYTES])} - {""}
    except puremagic.PureError:
        return
    assert not guesses or guesses & {expected, *COUSINS.get(expected, ())}


def boxed(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    return boxed(b"ftyp", major + bytes(4) + b"".join(compatible))


def element(name: int, content: bytes) -> bytes:
    """An EBML element, its size in eight bytes."""
    return name.to_bytes((name.bit_length() + 7) // 8) + ((1 << 56) | len(content)).to_bytes(8) + content


def webm(*track_types: int, private: bytes = b"") -> bytes:
    """The start of a WebM file: its header and its list of tracks, each with that much private data of its codec."""
    tracks = b"".join(element(0xAE, element(0x83, bytes([each])) + element(0x63A2, private)) for each in track_types)
    return element(0x1A45DFA3, element(0x4282, b"webm")) + element(0x18538067, element(0x1654AE6B, tracks) + bytes(100))


def zipped(names: dict[str, bytes]) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return out.getvalue()


def glb(document: bytes = b'{"asset":{"version":"2.0"}}') -> bytes:
    chunk = struct.pack("<I", len(document)) + b"JSON" + document
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunk)) + chunk


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (ftyp(b"heic", b"mif1", b"heic"), "image/heic"),
        (ftyp(b"mif1", b"mif1", b"heic"), "image/heic"),
        (ftyp(b"mif1", b"mif1", b"avif"), "image/avif"),
        (ftyp(b"msf1", b"msf1", b"hevc"), "image/heic"),
        (ftyp(b"mif1", b"mif1"), "image/heif"),
        (ftyp(b"3gp4", b"isom"), "video/3gpp"),
        (ftyp(b"XAVC", b"mp42", b"iso2"), "video/mp4"),
        (ftyp(b"crx ", b"isom"), "image/x-canon-cr3"),
        (ftyp(b"zzzz", b"yyyy"), None),
        (b"\0\0\0\x08wide\0\0\0\x10mdat" + bytes(8), "video/quicktime"),
        (boxed(b"moov", boxed(b"mvhd", bytes(100))), "video/quicktime"),
        (boxed(b"moov", b"<script>"), None),
        (glb(), "model/gltf-binary"),
        (b"glTF" + bytes(40), None),
        (zipped({"a.txt": b"x"}), "application/zip"),
        (zipped({}), "application/zip"),
        (b"{}", "application/json"),
        (b"[]", "application/json"),
        (b'\xef\xbb\xbf \r\n{"a": 1}\n', "application/json"),
        (b'[1, "\xc3\xa9"]', "application/json"),
        ('{"name":"' + "é" * HEAD_BYTES + '"}', "application/json"),
        ('[{"name":"' + "é" * HEAD_BYTES + '"}]', "application/json"),
        (b'{"a": "\xff"}', None),
        (b'{"a": "\0"}', None),
        (b'{"a": "\xc3', None),
        (b"{", None),
        (b"{ color: red }", None),
        (b"[section]\nkey=1", None),
        ('{"a":1}'.encode("utf-16"), None),
        (b'{"asset":{"version":"2.0"},"scenes":[]}', "model/gltf+json"),
        (b'{"scene": 0, "x": {"y": "}"}, "asset" : { "generator": "g", "version" : "2.0" } }', "model/gltf+json"),
        (b'{"layers": [{"asset": {"version": "2.0"}}]}', "application/json"),
        (b'{"note": "\\"asset\\":{", "asset": {"version": "9"}}', "application/json"),
        (b'[{"asset":{"version":"2.0"}}]', "application/json"),
        (b"", None),
        (b"\xff\xd8\xff", None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"fLaC", None),
        (b"RIFF\0\0\0\0WEBPnope", None),
        (b"ID3\x04\0\0\0\0\0\0", "audio/mpeg"),
        (b"ID3\x04\0\0\0\0\0\0fLaC\0\0\0\x22", "audio/flac"),
        (b"ID3 is a kind of tag", None),
        (b"\xff\xfb\x90\x64 and then no second frame" + bytes(9000), None),
        (b"\xff\xf1 not AAC either", None),
        (b"\x1a\x45\xdf\xa3\x88\x42\x82\x85other", None),
        (webm(2), "audio/webm"),
        (webm(2, 2), "audio/webm"),
        (webm(2, 1), "video/webm"),
        (webm(), "video/webm"),
        (webm(2, 1, private=bytes(HEAD_BYTES)), "video/webm"),  # the second track is out of sight
    ],
)
def test_made_by_hand(data: bytes | str, expected: str | None) -> None:
    assert mime(data.encode() if isinstance(data, str) else data) == expected


@pytest.mark.parametrize(
    ("data", "recognised"),
    [
        (b"<!DOCTYPE html><html><script>alert(1)</script>", "text/html"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', "image/svg+xml"),
        (b"  <html>", None),
        (b'<?xml version="1.0"?><MPD/>', "application/xml"),
        (b"%PDF-1.7\n", "application/pdf"),
        (b"#!/bin/sh\necho\n", None),
        (b"#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd\n", None),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", None),
        (b"P6\n1 1\n255\n\0\0\0", None),
        (b"II*\0" + bytes(60), "image/tiff"),
        (b"BM" + bytes(60), None),
        (b"\x7fELF\x02\x01\x01" + bytes(60), None),
        (b"MZ" + bytes(60), None),
        (b"\x1f\x8b\x08" + bytes(60), None),
        (b"push graphic-context\nviewbox 0 0 1 1\n", None),
        (b"%!PS-Adobe-3.0\n", "application/postscript"),
    ],
)
@pytest.mark.parametrize("costume", [b"", b"\xff\xd8\xff\xe0", b"PK\x05\x06" + bytes(18)])
def test_nothing_active_is_ever_stored(data: bytes, recognised: str | None, costume: bytes) -> None:
    """However it ends: the start decides, so `GIF89a` at the end of a page does not make it a picture."""
    found = detect(data + costume, data + costume)
    assert found is None or not found.kinds
    if recognised is not None and not costume:
        assert found is not None
        assert found.mime_type == recognised


def test_a_polyglot_is_what_its_start_says() -> None:
    page = b"<!DOCTYPE html><script>alert(1)</script>"
    assert mime(b"GIF89a" + bytes(7) + page) == "image/gif"
    assert mime(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + page + zipped({"a": b"b"})) == "image/png"
    assert mime(page + b"GIF89a") == "text/html"


def test_every_known_type_has_its_own_extension_and_a_kind() -> None:
    extensions = [each.extension for each in KNOWN.values()]
    assert len(set(extensions)) == len(extensions)
    assert all(
        each.extension.isalnum() and each.extension.islower() and each.kinds and set(each.kinds) <= set(KINDS) for each in KNOWN.values()
    )


STARTS = [
    *(b"\xff\xd8\xff", b"\x89PNG", b"RIFF\0\0\0\0", b"GIF8", b"\x1a\x45\xdf\xa3", b"OggS\0\2", b"fLaC", b"glTF", b"PK\x03\x04", b"ID3\3"),
    *(b"\xff\xfb\x90", b"\xff\xf1", b"{", b"[", b'{"asset":{', b"\0\0\0\x20ftyp", b"\0\0\0\x18ftypisom", b"\0\0\0\x08moov", b"<!DOCTYPE"),
]


@given(st.sampled_from(STARTS), st.binary(max_size=200), st.binary(max_size=100))
@example(b"\x1a\x45\xdf\xa3", b"\x01\0\0\0\0\0\0\0" * 900, b"moov")
@example(b"\x1a\x45\xdf\xa3", b"\xa0\x42\x82\x84webm" + b"\x18\x53\x80\x67\xff" * 1600, b"")
@example(b"\x1a\x45\xdf\xa3", b"\x84\xec\x01", b"")
@example(b'{"asset":{', b'"asset":{' * 900, b"")
@example(b'{"asset":{', b'"' + b"\\" * 8000, b"")
@example(b"\0\0\0\x10ftypisom\0\0\0\0", b"\0\0\0\x08free" * 1000, b"\xff\xff\xff\xffmoov")
def test_noise_never_raises(start: bytes, rest: bytes, tail: bytes) -> None:
    found = detect(start + rest, tail)
    assert found is None or isinstance(found, FileType)


@pytest.mark.parametrize(
    "head",
    [
        element(0x1A45DFA3, b"\xec\x80" * HEAD_BYTES),
        element(0x1A45DFA3, element(0x4282, b"webm")) + b"\x18\x53\x80\x67\xff" + b"\xae\x80" * HEAD_BYTES,
        element(0x1A45DFA3, element(0x4282, b"webm")) + b"\x18\x53\x80\x67\x80" * HEAD_BYTES,
        b'{"asset":{' + b'"asset":{' * 2000,
        b'{"a":"' + b"\\" * HEAD_BYTES,
        b"[" + b" " * 2 * HEAD_BYTES,
        b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x08free" * 1000,
        b"<" * HEAD_BYTES,
    ],
)
def test_hostile_bytes_cost_little(head: bytes) -> None:
    """A generous bound, so that it only fails when the work stops being linear: 50 ms where 1 is expected."""
    assert min(timeit.repeat(lambda: detect(head * 4, b"moovhdlr" * 20_000), number=1, repeat=3)) < 0.05
