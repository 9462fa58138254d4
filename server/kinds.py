"""What a file is, by its bytes alone, and which kinds of media accept it.

The client's file name and Content-Type never take part. Acceptance is decided by the short, strict table below;
the `puremagic` library only names what is being refused, because it costs 0.2 to 0.3 ms a file and cannot tell
several of our types apart (`server/decisions/0004-types-from-bytes.md`).

Only the start of the bytes speaks: a file that begins as a PNG and ends as a zip is a PNG, and is served as one with
`nosniff`. Detection proves the type, not that the file is whole or decodes; decoding belongs to the jailed previews.
"""

import codecs
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import puremagic

from server.errors import InvalidRequest, KindRequired, TypeMismatch, UnsupportedType
from server.settings import SettingError, Settings

KINDS = ("video", "image", "scene", "project", "audio")

DIRECTORIES: Mapping[str, str] = {"video": "videos", "image": "images", "scene": "scenes", "project": "projects", "audio": "audio"}
"""The directory below a user's own that holds each kind."""

PREVIEWED = frozenset(KINDS)
"""The kinds of which previews are made: of scenes and projects where the file carries a picture of itself."""

HEAD_BYTES = 8192
"""How much of a file's start `detect` looks at: room for two frames of AAC (the largest is 4,608 bytes with 6 channels)."""

TAIL_BYTES = 65_536
"""How much of a file's end helps: the index of a short sound recording in a generic MP4, which phones write last."""


@dataclass(frozen=True, slots=True)
class FileType:
    """A type of file. `extension` ends the stored name; `kinds` that can hold it: none means it is only recognised."""

    mime_type: str
    extension: str
    kinds: tuple[str, ...]


JPEG = FileType("image/jpeg", "jpg", ("image",))
PNG = FileType("image/png", "png", ("image",))
WEBP = FileType("image/webp", "webp", ("image",))
GIF = FileType("image/gif", "gif", ("image",))
AVIF = FileType("image/avif", "avif", ("image",))
HEIC = FileType("image/heic", "heic", ("image",))
HEIF = FileType("image/heif", "heif", ("image",))
MP4 = FileType("video/mp4", "mp4", ("video",))
QUICKTIME = FileType("video/quicktime", "mov", ("video",))
WEBM = FileType("video/webm", "webm", ("video",))
MATROSKA = FileType("video/x-matroska", "mkv", ("video",))
THREEGPP = FileType("video/3gpp", "3gp", ("video",))
THREEGPP2 = FileType("video/3gpp2", "3g2", ("video",))
AVI = FileType("video/x-msvideo", "avi", ("video",))
OGG_VIDEO = FileType("video/ogg", "ogv", ("video",))
MP3 = FileType("audio/mpeg", "mp3", ("audio",))
M4A = FileType("audio/mp4", "m4a", ("audio",))
OGG = FileType("audio/ogg", "ogg", ("audio",))
WAV = FileType("audio/wav", "wav", ("audio",))
FLAC = FileType("audio/flac", "flac", ("audio",))
AAC = FileType("audio/aac", "aac", ("audio",))
WEBM_AUDIO = FileType("audio/webm", "weba", ("audio",))
MATROSKA_AUDIO = FileType("audio/x-matroska", "mka", ("audio",))
GLTF = FileType("model/gltf+json", "gltf", ("scene",))
GLB = FileType("model/gltf-binary", "glb", ("scene",))
JSON = FileType("application/json", "json", ("scene", "project"))
ZIP = FileType("application/zip", "zip", ("scene", "project"))

KNOWN: Mapping[str, FileType] = {
    each.mime_type: each
    for each in (
        *(JPEG, PNG, WEBP, GIF, AVIF, HEIC, HEIF),
        *(MP4, QUICKTIME, WEBM, MATROSKA, THREEGPP, THREEGPP2, AVI, OGG_VIDEO),
        *(MP3, M4A, OGG, WAV, FLAC, AAC, WEBM_AUDIO, MATROSKA_AUDIO),
        *(GLTF, GLB, JSON, ZIP),
    )
}
"""Every type that can be stored, by MIME type."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """The MIME types that each kind accepts on this server."""

    by_kind: Mapping[str, frozenset[str]]

    @classmethod
    def from_settings(cls, settings: Settings) -> "Allowed":
        """Reads the `types_*` settings, where empty means all. A MIME type the kind cannot hold raises `SettingError`."""
        by_kind = {}
        for kind in KINDS:
            known = frozenset(each.mime_type for each in KNOWN.values() if kind in each.kinds)
            wanted = frozenset(getattr(settings, f"types_{kind}"))
            if strange := sorted(wanted - known):
                raise SettingError(f"COFFER_TYPES_{kind.upper()}: {strange[0]} is not one of {', '.join(sorted(known))}")
            by_kind[kind] = wanted or known
        return cls(by_kind)

    def only(self, kinds: Collection[str] | None) -> "Allowed":
        """What is left of it when only these kinds may be stored; None is all."""
        if kinds is None:
            return self
        return Allowed({kind: types if kind in kinds else frozenset() for kind, types in self.by_kind.items()})


def resolve(allowed: Allowed, detected: FileType | None, declared_kind: str | None) -> str:
    """The kind under which bytes of the type `detected` are stored.

    Raises `InvalidRequest` for a declared kind that does not exist, `UnsupportedType` when no kind accepts the
    bytes, `TypeMismatch` when another kind than the declared one does, and `KindRequired` when several accept them
    and none was declared.
    """
    if declared_kind is not None and declared_kind not in KINDS:
        raise InvalidRequest(field="type", reason=f"must be one of {', '.join(KINDS)}")
    fitting = [kind for kind in detected.kinds if detected.mime_type in allowed.by_kind[kind]] if detected else []
    if detected is None or not fitting:
        asked = KINDS if declared_kind is None else (declared_kind,)
        accepted = sorted(frozenset[str]().union(*(allowed.by_kind[kind] for kind in asked)))
        raise UnsupportedType(detected=detected.mime_type if detected else None, allowed=accepted)
    if declared_kind is not None:
        if declared_kind not in fitting:
            raise TypeMismatch(declared=declared_kind, detected=detected.mime_type)
        return declared_kind
    if len(fitting) > 1:
        raise KindRequired(choices=fitting)
    return fitting[0]


def detect(head: bytes, tail: bytes = b"") -> FileType | None:
    """The type of a file that starts with `head` (at least `HEAD_BYTES` of it, or all of a shorter file).

    `tail`, the last `TAIL_BYTES` or less, is optional and only refines. A type with no kinds is recognised but not
    stored. None is unknown. Never raises; time and memory are bounded by `HEAD_BYTES` and `TAIL_BYTES`.
    """
    head = head[:HEAD_BYTES]
    if head.startswith(b"\xff\xd8\xff"):  # first, because photographs are most of what is uploaded
        return JPEG if b"\xc0" <= head[3:4] < b"\xff" else None
    return _storable(head, tail[-TAIL_BYTES:]) or _recognised(head)


def _storable(head: bytes, tail: bytes) -> FileType | None:
    start = head[:4]
    if start == b"\x89PNG":
        return PNG if head[4:16] == b"\r\n\x1a\n\0\0\0\rIHDR" else None
    if head[4:8] in {b"ftyp", b"moov", b"wide"}:
        return _iso_media(head, tail)
    if start in {b"RIFF", b"RF64", b"BW64"}:
        return _riff(head)
    if start == b"GIF8":
        return GIF if head[4:6] in {b"7a", b"9a"} and len(head) >= 13 else None
    if start == b"\x1a\x45\xdf\xa3":
        return _ebml(head)
    if start == b"OggS":
        return _ogg(head)
    if start == b"fLaC":
        return FLAC if head[4:5] in {b"\0", b"\x80"} and head[5:8] == b"\0\0\x22" else None
    if start == b"glTF":
        return GLB if _is_glb(head) else None
    if start in {b"PK\x03\x04", b"PK\x05\x06"}:
        return ZIP if len(head) >= (30 if start == b"PK\x03\x04" else 22) else None
    if start[:3] == b"ID3":
        return _tagged_audio(head)
    if start[:1] == b"\xff":
        return _audio_frames(head, 0)
    return _json(head)


def _recognised(head: bytes) -> FileType | None:
    """What a refused file looks like, for the message alone: the library's best guess when it is more than a coincidence."""
    if not head:
        return None
    try:
        guesses = puremagic.magic_string(head)
    except puremagic.PureError:
        return None
    for guess in guesses:
        # A match of less than four bytes is noise. A type we do store got here because its bytes broke our rule for it.
        if guess.confidence >= 0.4 and guess.mime_type:
            return None if guess.mime_type in KNOWN else FileType(guess.mime_type, "", ())
    return None


# ISO base media files (ISO/IEC 14496-12): MP4, QuickTime, 3GPP, AVIF, HEIF. The brand in the first box tells them apart.

_BRANDS: Mapping[bytes, FileType] = {
    b"qt  ": QUICKTIME,
    **dict.fromkeys((b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B "), M4A),
    **dict.fromkeys((b"M4V ", b"M4VH", b"M4VP", b"F4V ", b"f4v ", b"MSNV", b"dash", b"mmp4"), MP4),
    **dict.fromkeys((b"isom", *(b"iso%d" % n for n in range(2, 10)), b"mp41", b"mp42", b"avc1"), MP4),
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), HEIC),
    **dict.fromkeys((b"mif1", b"msf1"), HEIF),
    b"crx ": FileType("image/x-canon-cr3", "", ()),  # a camera's raw file, which also claims to be `isom`
}
_HANDLER = re.compile(rb"hdlr.{8}(vide|soun)", re.DOTALL)


def _iso_media(head: bytes, tail: bytes) -> FileType | None:
    if head[4:8] != b"ftyp":  # QuickTime from before the `ftyp` box
        old = head[4:8] == b"moov" and head[12:16] in {b"mvhd", b"cmov"}
        return QUICKTIME if old or (head[:8] == b"\0\0\0\x08wide" and head[12:16] == b"mdat") else None
    size = int.from_bytes(head[:4])
    if not 16 <= size <= 1024 or size % 4 or len(head) < 16:
        return None
    major = head[8:12]
    others = {head[at : at + 4] for at in range(16, size, 4)}
    if major in {b"mif1", b"msf1"}:
        return next((_BRANDS[brand] for brand in (b"avif", b"avis", b"heic", b"heix", b"hevc") if brand in others), HEIF)
    if major.startswith(b"3g"):
        return THREEGPP2 if major.startswith(b"3g2") else THREEGPP
    found = _BRANDS.get(major)
    if found is None and any(_BRANDS.get(brand) is MP4 for brand in others):
        found = MP4
    return M4A if found is MP4 and _mp4_is_sound_only(head, size, tail) else found


def _mp4_is_sound_only(head: bytes, at: int, tail: bytes) -> bool:
    """Whether a whole `moov` box, in sight at either end, lists sound and no pictures. Unseen means no."""
    moov = b""
    for _ in range(16):
        size = int.from_bytes(head[at : at + 4])
        if head[at + 4 : at + 8] == b"moov":
            moov = head[at : at + size] if at + size <= len(head) else b""
        if size < 8 or at + size > len(head):
            break
        at += size
    if not moov and (at := tail.rfind(b"moov") - 4) >= 0:
        size = int.from_bytes(tail[at : at + 4])
        moov = tail[at : at + size] if at + size <= len(tail) else b""
    return set(_HANDLER.findall(moov)) == {b"soun"}


# EBML (RFC 8794): WebM and Matroska. The DocType tells them apart, the tracks tell sound from pictures.

_SEGMENT, _TRACKS, _TRACK_ENTRY, _TRACK_TYPE, _DOC_TYPE = 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0x4282


def _ebml(head: bytes) -> FileType | None:
    header = next(_elements(head, 0, len(head)), None)
    if header is None:
        return None
    _, at, end = header
    doc_type = next((head[a:b].rstrip(b"\0") for name, a, b in _elements(head, at, end) if name == _DOC_TYPE), b"")
    if doc_type not in {b"webm", b"matroska"}:
        return None
    sound_only = _track_types(head, end) == {b"\x02"}
    if doc_type == b"webm":
        return WEBM_AUDIO if sound_only else WEBM
    return MATROSKA_AUDIO if sound_only else MATROSKA


def _track_types(head: bytes, at: int) -> set[bytes]:
    """The types of all tracks (1 is video, 2 is audio), or nothing when the list of tracks is not wholly in sight."""
    types: set[bytes] = set()
    for segment, a, b in _elements(head, at, len(head)):
        for tracks, c, d in _elements(head, a, b) if segment == _SEGMENT else ():
            if tracks == _TRACKS and d < len(head):
                for _, e, f in _elements(head, c, d):
                    types.update(head[g:h] for name, g, h in _elements(head, e, f) if name == _TRACK_TYPE)
                return types
    return types


def _elements(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The id, start and end of each element's content, the ends clipped to `end`."""
    while at < end and data[at]:
        id_length = 9 - data[at].bit_length()
        size_at = at + id_length
        if id_length > 4 or size_at >= end or not data[size_at]:
            return
        size_length = 9 - data[size_at].bit_length()
        start = size_at + size_length
        if start > end:
            return
        size = int.from_bytes(data[size_at:start]) - (1 << 7 * size_length)
        unknown = size == (1 << 7 * size_length) - 1  # a live recording: the element lasts until its parent ends
        at = end if unknown else start + size
        yield int.from_bytes(data[size_at - id_length : size_at]), start, min(at, end)


# The smaller families


def _riff(head: bytes) -> FileType | None:
    form, chunk = head[8:12], head[12:16]
    if form == b"WAVE":
        return WAV
    if head[:4] != b"RIFF":
        return None
    if form == b"WEBP":
        return WEBP if chunk in {b"VP8 ", b"VP8L", b"VP8X"} else None
    return AVI if form == b"AVI " and chunk == b"LIST" else None


def _ogg(head: bytes) -> FileType | None:
    """By the codec in the first page; a `fishead` page is only an index, so there the next pages are asked."""
    if len(head) < 28 or head[4] != 0 or not head[5] & 2:
        return None
    codec = head[27 + head[26] :][:8]
    if codec == b"fishead\0":
        if b"\x80theora" in head:
            return OGG_VIDEO
        return OGG if b"\x01vorbis" in head or b"OpusHead" in head else None
    if codec.startswith((b"\x80theora", b"BBCD\0")):
        return OGG_VIDEO
    return OGG if codec.startswith((b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")) else None


def _is_glb(head: bytes) -> bool:
    version, length = int.from_bytes(head[4:8], "little"), int.from_bytes(head[8:12], "little")
    return (version == 1 and length >= 20) or (version == 2 and length >= 20 and head[16:20] == b"JSON")


def _tagged_audio(head: bytes) -> FileType | None:
    """Bytes that start with an ID3v2 tag: what follows it decides, and MP3 when that is out of sight."""
    size = head[6:10]
    if len(head) < 10 or head[3] not in {2, 3, 4} or any(byte & 0x80 for byte in size):
        return None
    after = 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    if head[after : after + 4] == b"fLaC":
        return FLAC
    return _audio_frames(head, after) or MP3


_MPEG1_KBIT = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KBIT = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_MPEG1_HZ = (44_100, 48_000, 32_000)


def _audio_frames(head: bytes, at: int) -> FileType | None:
    """MP3 or AAC (ADTS) by two frames in a row, or one that is the whole file: 12 bits alone would match noise."""
    for found, length_of in ((MP3, _mp3_frame_bytes), (AAC, _adts_frame_bytes)):
        length = length_of(head, at)
        if length and (len(head) == at + length or length_of(head, at + length)):
            return found
    return None


def _mp3_frame_bytes(head: bytes, at: int) -> int:
    """The length of the MPEG audio layer III frame at `at`, or 0 if there is none (ISO/IEC 11172-3 and 13818-3)."""
    if len(head) < at + 4 or head[at] != 0xFF:
        return 0
    version, layer = head[at + 1] >> 3 & 3, head[at + 1] >> 1 & 3  # versions: 0 is 2.5, 2 is 2, 3 is 1
    bit_rate, sample_rate, padding = head[at + 2] >> 4, head[at + 2] >> 2 & 3, head[at + 2] >> 1 & 1
    if head[at + 1] < 0xE0 or version == 1 or layer != 1 or bit_rate in {0, 15} or sample_rate == 3:
        return 0
    if version == 3:
        return 144_000 * _MPEG1_KBIT[bit_rate] // _MPEG1_HZ[sample_rate] + padding
    return 72_000 * _MPEG2_KBIT[bit_rate] // (_MPEG1_HZ[sample_rate] >> (1 if version == 2 else 2)) + padding


def _adts_frame_bytes(head: bytes, at: int) -> int:
    """The length of the ADTS frame at `at`, or 0 if there is none (ISO/IEC 13818-7)."""
    if len(head) < at + 7 or head[at] != 0xFF or head[at + 1] & 0xF6 != 0xF0 or head[at + 2] >> 2 & 15 > 12:
        return 0
    length = (head[at + 3] & 3) << 11 | head[at + 4] << 3 | head[at + 5] >> 5
    return length if length > 7 else 0


# Text

_JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?[ \t\r\n]*(?:\{[ \t\r\n]*["}]|\[[ \t\r\n]*[\]{\["0-9tfn-])')
_NOT_TEXT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_GLTF_ASSET = re.compile(rb'"asset"\s*:\s*\{[^{}]*"version"\s*:\s*"[12]\.')
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _json(head: bytes) -> FileType | None:
    """JSON by its first tokens and by being UTF-8 text; the rest is not parsed here, whoever reads the file will."""
    if not _JSON_START.match(head) or _NOT_TEXT.search(head):
        return None
    try:
        codecs.utf_8_decode(head, "strict", len(head) < HEAD_BYTES)  # a full head may end inside a character
    except UnicodeDecodeError:
        return None
    asset = _GLTF_ASSET.search(head)
    if asset:
        outside = _STRING.sub(b"", head[: asset.start()])
        depth = sum(map(outside.count, (b"{", b"["))) - sum(map(outside.count, (b"}", b"]")))
        if depth == 1 and outside.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return GLTF
    return JSON
