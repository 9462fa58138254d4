"""The pictures that scenes and projects carry of themselves."""

import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.previews import scenes
from server.previews.decoders import Decoders
from server.previews.making import Variant
from tests.previews.decoding import Studio
from tests.previews.pictures import difference, photo, png_that_claims, reduced_in_full

ZIP, GLB = "application/zip", "model/gltf-binary"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    decoders = Decoders(1)
    yield Studio(decoders, tmp_path_factory.mktemp("studio"))
    decoders.close()


@pytest.fixture(scope="module")
def png() -> bytes:
    return bytes(photo().pngsave_buffer())


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return written.getvalue()


def related(target: str, more: str = "") -> bytes:
    kind = "http://schemas.openxmlformats.org/package/2006/relationships/metadata/thumbnail"
    return f"""<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
        <Relationship Id="rId1" Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel" Target="/3D/3dmodel.model"/>
        <Relationship Target="{target}" Id="rId2" Type="{kind}" {more}/></Relationships>""".encode()


def glb(document: dict[str, object], binary: bytes) -> bytes:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def vrm(extensions: dict[str, object], binary: bytes, offset: int, length: int) -> bytes:
    document = {
        "asset": {"version": "2.0"},
        "extensions": extensions,
        "textures": [{}, {"source": 1}],
        "images": [{"uri": "a.png"}, {"bufferView": 1, "mimeType": "image/png"}],
        "bufferViews": [{"buffer": 0, "byteLength": 8}, {"buffer": 0, "byteOffset": offset, "byteLength": length}],
    }
    return glb(document, binary)


ZIPS = {
    "OpenDocument": lambda png: {"mimetype": b"application/vnd.oasis.opendocument.graphics", "Thumbnails/thumbnail.png": png},
    "OpenRaster": lambda png: {"mimetype": b"image/openraster", "Thumbnails/thumbnail.png": png, "mergedimage.png": b""},
    "Krita": lambda png: {"mimetype": b"application/x-krita", "maindoc.xml": b"", "preview.png": png},
    "Krita without the small one": lambda png: {"mimetype": b"application/x-krita", "mergedimage.png": png},
    "Sketch": lambda png: {"document.json": b"{}", "meta.json": b"{}", "previews/preview.png": png},
    "3MF": lambda png: {"[Content_Types].xml": b"", "_rels/.rels": related("/Metadata/thumbnail.png"), "Metadata/thumbnail.png": png},
    "Office": lambda png: {"[Content_Types].xml": b"", "_rels/.rels": related("docProps/a&amp;b.png"), "docProps/a&b.png": png},
}


@pytest.mark.parametrize("name", ZIPS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_that_define_one(studio: Studio, png: bytes, name: str, compression: int) -> None:
    content = archive(ZIPS[name](png), compression)
    found = studio.previews(content, ZIP)
    assert difference(found.image(), reduced_in_full(photo(), 320)) < 2
    assert (found.made.width, found.made.height) == (None, None)  # those of the picture are not the scene's
    assert found.made.thumbhash
    assert found.made.average_color
    made, _ = studio.variant(content, ZIP, Variant(width=100))
    assert (made.width, made.height) == (100, 67)


@pytest.mark.parametrize(
    "extensions",
    [{"VRMC_vrm": {"specVersion": "1.0", "meta": {"name": "a", "thumbnailImage": 1}}}, {"VRM": {"meta": {"title": "a", "texture": 1}}}],
)
def test_avatars_define_one(studio: Studio, png: bytes, extensions: dict[str, object]) -> None:
    found = studio.previews(vrm(extensions, b"12345678" + png, 8, len(png)), GLB)
    assert difference(found.image(), reduced_in_full(photo(), 320)) < 2


def test_other_pictures_than_png(studio: Studio) -> None:
    for picture in (photo().jpegsave_buffer(Q=95), photo().webpsave_buffer(Q=95)):
        content = archive(ZIPS["3MF"](bytes(picture)))
        assert difference(studio.previews(content, ZIP).image(), reduced_in_full(photo(), 320)) < 2


NONE: dict[str, tuple[str, bytes]] = {
    "a zip of anything": (ZIP, archive({"preview.png": b"\x89PNG", "Thumbnails/thumbnail.png": b"\x89PNG"})),
    "an empty zip": (ZIP, archive({})),
    "EPUB": (ZIP, archive({"mimetype": b"application/epub+zip", "Thumbnails/thumbnail.png": b"\x89PNG"})),
    "one outside": (
        ZIP,
        archive({"[Content_Types].xml": b"", "_rels/.rels": related("b.png", 'TargetMode="External"'), "b.png": b"\x89PNG\r\n\x1a\n"}),
    ),
    "a missing one": (ZIP, archive({"[Content_Types].xml": b"", "_rels/.rels": related("/etc/passwd")})),
    "one above the root": (ZIP, archive({"[Content_Types].xml": b"", "_rels/.rels": related("../../../etc/passwd")})),
    "SVG": (ZIP, archive(ZIPS["Krita"](b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"))),
    "a metafile": (ZIP, archive(ZIPS["3MF"](bytes.fromhex("d7cdc69a") + bytes(60)))),
    "bzip2": (ZIP, archive(ZIPS["Krita"](b"\x89PNG"), zipfile.ZIP_BZIP2)),
    "a scene": (GLB, glb({"asset": {"version": "2.0"}}, b"")),
    "a scene with images": (GLB, vrm({}, bytes(100), 0, 100)),
    "an avatar without": (GLB, vrm({"VRM": {"meta": {"texture": -1}}}, b"\x89PNG\r\n\x1a\n" + bytes(92), 0, 100)),
    "an avatar with one elsewhere": (GLB, vrm({"VRMC_vrm": {"meta": {"thumbnailImage": 0}}}, bytes(100), 0, 100)),
    "glTF 1": (GLB, struct.pack("<4sIIII", b"glTF", 1, 24, 4, 0) + b"{}  "),
}


@pytest.mark.parametrize("name", NONE)
def test_what_has_none_is_unsupported(studio: Studio, name: str) -> None:
    assert studio.refusal(NONE[name][1], NONE[name][0]) == "unsupported"


def overstated(content: bytes, entries: int) -> bytes:
    at = content.rindex(b"PK\5\6")
    return content[: at + 8] + struct.pack("<HH", entries, entries) + content[at + 12 :]


BAD: dict[str, tuple[str, bytes, str]] = {
    "no zip": (ZIP, b"PK\3\4" + bytes(100), "damaged"),
    "half a zip": (ZIP, archive(ZIPS["Krita"](b"\x89PNG"))[:60], "damaged"),
    "a zip without its start": (ZIP, archive(ZIPS["Krita"](b"\x89PNG"))[60:], "damaged"),
    "a picture that is none": (ZIP, archive(ZIPS["Krita"](b"\x89PNG\r\n\x1a\n" + bytes(100))), "damaged"),
    "too many entries": (ZIP, overstated(archive(ZIPS["Krita"](b"\x89PNG")), 30_000), "too_large"),
    "a picture that unpacks to too much": (ZIP, archive(ZIPS["Krita"](bytes(10 * 2**20))), "too_large"),
    "a kind that unpacks to too much": (ZIP, archive({"mimetype": bytes(2 * 2**20)}), "too_large"),
    "a huge stored picture": (ZIP, archive(ZIPS["Krita"](bytes(33 * 2**20)), zipfile.ZIP_STORED), "too_large"),
    "a picture of too many pixels": (ZIP, archive(ZIPS["Krita"](png_that_claims(50_000, 50_000)), zipfile.ZIP_STORED), "too_large"),
    "a view past the end": (GLB, vrm({"VRM": {"meta": {"texture": 1}}}, bytes(100), 50, 51), "damaged"),
    "a negative view": (GLB, vrm({"VRM": {"meta": {"texture": 1}}}, bytes(100), -50, 51), "damaged"),
    "an image that is none": (GLB, vrm({"VRMC_vrm": {"meta": {"thumbnailImage": 7}}}, bytes(100), 0, 1), "damaged"),
    "deep JSON": (GLB, struct.pack("<4sIII4s", b"glTF", 2, 0, 2_000_000, b"JSON") + b'{"x":' + b"[" * 2_000_000, "damaged"),
    "long JSON": (GLB, struct.pack("<4sIII4s", b"glTF", 2, 0, 2**26 + 1, b"JSON"), "too_large"),
    "nothing": (GLB, b"", "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_scenes_are_refused(studio: Studio, name: str) -> None:
    mime_type, content, reason = BAD[name]
    assert studio.refusal(content, mime_type) == reason


@pytest.mark.parametrize(("bit", "reason"), [(0x1, "unsupported"), (0x20, "damaged"), (0x40, "damaged")])
@pytest.mark.parametrize("headers", ["both", "local", "central"])
def test_what_is_encrypted_or_patched_is_not_guessed_at(studio: Studio, png: bytes, bit: int, reason: str, headers: str) -> None:
    """APPNOTE 4.4.4. Where the two headers contradict each other, nothing worse than a refusal or the picture comes of it."""
    content = bytearray(archive(ZIPS["Krita"](png)))
    local, central = content.index(b"preview.png") - 30, content.rindex(b"preview.png") - 46
    if headers != "central":
        content[local + 6] |= bit
    if headers != "local":
        content[central + 8] |= bit
    if headers == "local":
        assert difference(studio.previews(bytes(content), ZIP).image(), reduced_in_full(photo(), 320)) < 2
    else:
        assert studio.refusal(bytes(content), ZIP) == reason


def test_a_zip_says_one_size_and_holds_another(tmp_path: Path) -> None:
    """What is unpacked is bounded by what was said, whatever deflate would give."""
    content = archive(ZIPS["Krita"](bytes(64 * 2**20)))
    for at in (content.index(b"preview.png") - 30 + 22, content.rindex(b"preview.png") - 46 + 24):
        content = content[:at] + struct.pack("<I", 1000) + content[at + 4 :]
    (tmp_path / "zip").write_bytes(content)
    tracemalloc.start()
    with (tmp_path / "zip").open("rb") as file, pytest.raises(scenes.Refused, match="damaged"):
        scenes.embedded(file.fileno(), ZIP)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
