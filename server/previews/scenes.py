"""The pictures that scenes and projects carry of themselves, where their format says where: `embedded`. For the jailed child of `images`.

- zip containers: OpenDocument and OpenRaster (`Thumbnails/thumbnail.png`), Krita (`preview.png`), Sketch (`previews/preview.png`), and
  those of the Open Packaging Conventions, 3MF and Office among them (the package's relationship "thumbnail", ECMA-376 part 2);
- binary glTF: VRM avatars, which are its only users to define one (`VRMC_vrm` 1.0: meta.thumbnailImage; `VRM` 0.x: meta.texture).
"""

import errno
import os
import re
import struct
import zipfile
import zlib
from html import unescape
from posixpath import normpath
from typing import IO, Annotated

import msgspec

SCENES = frozenset({"application/zip", "model/gltf-binary"})
"""The types that may carry one. A glTF in JSON and plain JSON have no place for it."""

_MOST_ENTRIES = 20_000
_LONGEST_DIRECTORY_BYTES = 8 * 2**20
_LONGEST_PICTURE_BYTES = 32 * 2**20
_LONGEST_TEXT_BYTES = 2**20
_LONGEST_JSON_BYTES = 64 * 2**20
_HIGHEST_RATIO = 200  # of what deflate makes of it; pictures are hardly deflated at all

_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError),
    *(struct.error, msgspec.DecodeError, RecursionError, ValueError),
)

_RELATIONSHIP = re.compile(rb"<(?:\w+:)?Relationship\s([^<>]*)>")
_ATTRIBUTE = re.compile(rb"""(\w+)\s*=\s*["']([^"'<]*)["']""")
_THUMBNAIL = b"http://schemas.openxmlformats.org/package/2006/relationships/metadata/thumbnail"

# Names of entries are in this one; its table is loaded when it is first used, and in the jail that is too late.
"".encode("cp437")


class Refused(Exception):
    """There is no picture to be had. The message is the reason, as in `Unmakeable`."""


def embedded(source_fd: int, mime_type: str) -> bytes:
    """The picture's bytes, whatever they are. Raises `Refused`: unsupported (there is none), damaged or too_large."""
    with open(source_fd, "rb", closefd=False) as source:
        try:
            return _of_glb(source) if mime_type == "model/gltf-binary" else _of_zip(source)
        except _DAMAGED as problem:
            raise Refused("damaged") from problem
        except OSError as problem:
            if problem.errno != errno.EINVAL:  # a place before the file's start
                raise
            raise Refused("damaged") from problem


# Zip


def _of_zip(source: IO[bytes]) -> bytes:
    _check_directory(source)
    with zipfile.ZipFile(source) as archive:
        picture = _zip_picture(archive)
        if picture is None:
            raise Refused("unsupported")
        return _entry(archive, picture, _LONGEST_PICTURE_BYTES)


def _check_directory(source: IO[bytes]) -> None:
    """Before Python's reader makes objects of all its entries, by the record at the zip's end. Zip64 is larger than what we look at."""
    source.seek(max(0, source.seek(0, os.SEEK_END) - 65_557))
    tail = source.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise Refused("damaged")
    entries, size_bytes = struct.unpack_from("<10xHI", tail, at)
    if entries > _MOST_ENTRIES or size_bytes > _LONGEST_DIRECTORY_BYTES:
        raise Refused("too_large")


def _zip_picture(archive: zipfile.ZipFile) -> str | None:
    """The name of the entry that holds it."""
    names = set(archive.namelist())
    if "mimetype" in names:
        kind = _entry(archive, "mimetype", _LONGEST_TEXT_BYTES).strip()
        if kind == b"application/x-krita":
            candidates = ["preview.png", "mergedimage.png"]
        elif kind == b"image/openraster" or kind.startswith(b"application/vnd.oasis.opendocument."):
            candidates = ["Thumbnails/thumbnail.png"]
        else:
            candidates = []
    elif "[Content_Types].xml" in names and "_rels/.rels" in names:
        candidates = _related(_entry(archive, "_rels/.rels", _LONGEST_TEXT_BYTES))
    elif {"document.json", "meta.json"} <= names:
        candidates = ["previews/preview.png"]
    else:
        candidates = []
    return next((name for name in candidates if name in names), None)


def _related(relationships: bytes) -> list[str]:
    """The targets of the type "thumbnail". Found as text: nothing of XML that needs a parser can be meant here."""
    found = []
    for relationship in _RELATIONSHIP.findall(relationships):
        attributes = dict(_ATTRIBUTE.findall(relationship))
        if attributes.get(b"Type") == _THUMBNAIL and attributes.get(b"TargetMode", b"Internal") == b"Internal":
            found.append(normpath("/" + unescape(attributes.get(b"Target", b"").decode())).lstrip("/"))
    return found


def _entry(archive: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    entry = archive.getinfo(name)
    if entry.flag_bits & 1 or entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise Refused("unsupported")
    if entry.file_size > most_bytes or entry.file_size > _HIGHEST_RATIO * entry.compress_size + 1024:
        raise Refused("too_large")
    with archive.open(entry) as content:
        return content.read(entry.file_size)  # with that number it unpacks no more, whatever there is


# glTF, of which only what leads to the picture is looked at


_Number = Annotated[int, msgspec.Meta(ge=0)]


class _Meta(msgspec.Struct, rename="camel"):
    thumbnail_image: _Number | None = None
    texture: int | None = None  # 0.x writes -1 for none


class _Vrm(msgspec.Struct):
    meta: _Meta = msgspec.field(default_factory=_Meta)


class _Extensions(msgspec.Struct):
    vrm_1: _Vrm | None = msgspec.field(name="VRMC_vrm", default=None)
    vrm_0: _Vrm | None = msgspec.field(name="VRM", default=None)


class _Texture(msgspec.Struct):
    source: _Number | None = None


class _Image(msgspec.Struct, rename="camel"):
    buffer_view: _Number | None = None


class _View(msgspec.Struct, rename="camel"):
    byte_length: _Number
    buffer: _Number = 0
    byte_offset: _Number = 0


class _Gltf(msgspec.Struct, rename="camel"):
    extensions: _Extensions = msgspec.field(default_factory=_Extensions)
    textures: list[_Texture] = []
    images: list[_Image] = []
    buffer_views: list[_View] = []


def _of_glb(source: IO[bytes]) -> bytes:
    """From the binary chunk, which follows that of JSON (glTF 2.0, 4.4)."""
    magic, version, _, json_bytes, json_kind = struct.unpack("<4sIII4s", source.read(20))
    if magic != b"glTF" or version != 2 or json_kind != b"JSON":
        raise Refused("unsupported")
    if json_bytes > _LONGEST_JSON_BYTES:
        raise Refused("too_large")
    view = _view(msgspec.json.decode(source.read(json_bytes), type=_Gltf))
    binary_bytes, binary_kind = struct.unpack("<I4s", source.read(8))
    if binary_kind != b"BIN\0" or view.buffer or view.byte_offset + view.byte_length > binary_bytes:
        raise Refused("damaged")
    if view.byte_length > _LONGEST_PICTURE_BYTES:
        raise Refused("too_large")
    source.seek(view.byte_offset, os.SEEK_CUR)
    return source.read(view.byte_length)


def _view(gltf: _Gltf) -> _View:
    image = gltf.extensions.vrm_1.meta.thumbnail_image if gltf.extensions.vrm_1 else None
    texture = gltf.extensions.vrm_0.meta.texture if gltf.extensions.vrm_0 else None
    try:
        if image is None and texture is not None and texture >= 0:
            image = gltf.textures[texture].source
        view = None if image is None else gltf.images[image].buffer_view
        if view is None:
            raise Refused("unsupported")
        return gltf.buffer_views[view]
    except IndexError as problem:
        raise Refused("damaged") from problem
