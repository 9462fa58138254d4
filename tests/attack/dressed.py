"""1: bytes of one type, named and declared as another: refused, or stored as what they are."""

import io
import struct
import zipfile
import zlib
from typing import Any

import httpx

from server.kinds import KNOWN
from tests.attack.target import Tally, Target
from tests.samples import PNG_START

MARK = b"<script>alert(1)</script>"
JPEG_START = bytes.fromhex("ffd8ffe000104a46494600010100000100010000")
MP4_START = bytes.fromhex("0000001c6674797069736f6d0000020069736f6d69736f326d703431")
REFUSED = {"unsupported_type", "type_mismatch", "kind_required"}


def attack(target: Target, tally: Tally) -> str:
    client = target.user("dresser")
    refused = stored = 0
    samples = dict(target.some(never_stored().items(), 25)) | dict(target.some(_stored_as_they_are().items(), 6))
    for what, (body, truth) in samples.items():
        for how, answer in _ways_in(target, client, body):
            if answer.is_success:
                stored += 1
                _check_stored(tally, client, f"{what}, {how}", answer.json(), truth, body)
            else:
                refused += 1
                code = answer.json().get("code")
                tally.check(
                    answer.status_code in {400, 415} and code in REFUSED, f"{what}, {how}: {answer.status_code} {answer.text[:200]}"
                )
                tally.check(truth is None or "kind" in how, f"{what}, {how}: refused with {code}, though it may be stored as {truth}")
    paths = target.server.stored_paths()
    strange = [path.name for path in paths if path.suffix[1:] not in {each.extension for each in KNOWN.values()}]
    tally.check(not strange, f"stored under an ending that no type has: {strange}")
    tally.check(not target.server.incoming(), "refused bytes are left in incoming/")
    client.close()
    return f"{len(samples)} disguises in 5 ways: {refused} refused, {stored} stored as what they are, none as its disguise"


def _ways_in(target: Target, client: httpx.Client, body: bytes) -> list[tuple[str, httpx.Response]]:
    declared = {"Content-Type": "image/jpeg"}
    raw = client.post("/api/files/upload", params={"name": "photo.jpg"}, content=body, headers=declared)
    form = client.post("/api/files/upload", files={"file": ("photo.jpg", body, "image/jpeg")})
    kind = client.post("/api/files/upload", params={"name": "photo.jpg", "type": "image"}, content=body, headers=declared)
    url, upload_id = target.upload_link(client, types=["image/jpeg"], file_name="photo.jpg", type="image", max_bytes=max(1, len(body)))
    link = target.nobody.put(url, content=body, headers=declared)
    if link.status_code != 201:
        client.delete(f"/api/uploads/links/{upload_id}").raise_for_status()
    photo = client.post("/api/files/upload", params={"name": "photo.jpg"}, content=JPEG_START + bytes(100)).json()["id"]
    replacing = client.put(f"/api/files/{photo}/content", content=body, headers=declared)
    return [("raw", raw), ("form", form), ("declared kind", kind), ("link of that kind", link), ("replacing, another kind", replacing)]


def _check_stored(tally: Tally, client: httpx.Client, what: str, file: dict[str, Any], truth: str | None, body: bytes) -> None:
    """The type is the true one everywhere that it is told, and the bytes are those that were sent."""
    tally.check(file["mime_type"] == truth, f"{what}: stored as {file['mime_type']}, being {truth}")
    answer = client.get(f"/api/files/{file['id']}/download")
    tally.check(answer.headers["content-type"] == file["mime_type"], f"{what}: served as {answer.headers['content-type']}")
    tally.check(answer.headers["x-content-type-options"] == "nosniff", f"{what}: without nosniff")
    tally.check(answer.content == body, f"{what}: other bytes came back")


def never_stored() -> dict[str, tuple[bytes, str | None]]:
    """What no kind accepts, whatever it is called."""
    elf = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 62, 1) + bytes(40)
    bodies = {
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "SVG with a declaration": b'<?xml version="1.0"?>\n<!DOCTYPE svg><svg onload="alert(1)"/>',
        "SVG in UTF-16": '<svg onload="alert(1)"/>'.encode("utf-16"),
        "SVG, compressed": zlib.compress(b"<svg/>", wbits=31),
        "PPM": b"P6\n1 1\n255\n\0\0\0",
        "PGM": b"P2\n1 1\n255\n0\n",
        "PFM": b"PF\n1 1\n-1.0\n" + bytes(12),
        "PAM": b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nENDHDR\n\0\0\0",
        "FITS": b"SIMPLE  =                    T".ljust(2_880),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "NetCDF": b"CDF\x01" + bytes(100),
        "NIfTI": struct.pack("<i", 348) + bytes(340) + b"n+1\0" + bytes(8),
        "Analyze": struct.pack("<i", 348) + bytes(344),
        "DICOM": bytes(128) + b"DICM\x02\0\0\0UL\x04\0" + bytes(40),
        "MATLAB": b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM",
        "OpenEXR": b"\x76\x2f\x31\x01\x02\0\0\0" + bytes(60),
        "Radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n" + bytes(4),
        "TIFF": b"II*\0\x08\0\0\0" + bytes(60),
        "BigTIFF": b"MM\0+\0\x08\0\0" + bytes(60),
        "VIPS": b"\xb6\xa6\xf2\x08" + bytes(64),
        "OpenSlide's MIRAX": b"[GENERAL]\r\nSLIDE_VERSION = 1.9\r\n",
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
        "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40),
        "BMP": b"BM" + bytes(60),
        "ICO": b"\0\0\x01\0\x01\0" + bytes(60),
        "Photoshop": b"8BPS\0\x01" + bytes(60),
        "XCF": b"gimp xcf v001\0" + bytes(60),
        "ImageMagick's MVG": b"push graphic-context\nimage over 0,0 0,0 'label:@/etc/passwd'\npop graphic-context\n",
        "ImageMagick's MSL": b'<?xml version="1.0"?><image><read filename="/etc/passwd"/></image>',
        "PostScript": b"%!PS-Adobe-3.0\n(/etc/passwd) (r) file\n",
        "PDF": b"%PDF-1.7\n1 0 obj<</S/JavaScript/JS(app.alert(1))>>endobj\n",
        "a shell script": b"#!/bin/sh\nid\n",
        "PHP": b"<?php system($_GET[0]); ?>",
        "JavaScript": b"alert(1)//",
        "JSP": b"<%@ page import='java.io.*' %>",
        "HTML": b"<!DOCTYPE html>" + MARK,
        "HTML after blanks": b"\xef\xbb\xbf \r\n\t<!-- --><html>" + MARK,
        "XHTML": b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></html>',
        "XSLT": b'<?xml-stylesheet type="text/xsl" href="#"?><x/>',
        "XML with an entity": b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
        "an HLS playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "a concat playlist": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "a DASH manifest": b'<?xml version="1.0"?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>',
        "ELF": elf,
        "EXE": b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + bytes(40),
        "Java class": b"\xca\xfe\xba\xbe\0\0\0\x34" + bytes(40),
        "WebAssembly": b"\0asm\x01\0\0\0",
        "gzip bomb": zlib.compress(bytes(10**6), wbits=31),
        "RAR": b"Rar!\x1a\x07\x01\0" + bytes(40),
        "7z": b"7z\xbc\xaf\x27\x1c\0\x04" + bytes(40),
        "tar": b"../../etc/passwd".ljust(257, b"\0") + b"ustar\x0000" + bytes(247),
        "SQLite": b"SQLite format 3\0" + bytes(84),
        "pickle": b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
        "plain text": b"just text\n",
        "nothing": b"",
        "noise": bytes(range(256)),
        "HTML that ends as a GIF": MARK + b"GIF89a",
        "PDF that ends as a JPEG": b"%PDF-1.4\n" + JPEG_START,
        "a script that ends as a PNG": b"#!/bin/sh\n" + PNG_START,
        "HTML that ends as a zip": b"<html>" + MARK + _zip({"a": b"b"}),
        "a JPEG after a blank": b"\n" + JPEG_START,
        "half a JPEG's start": b"\xff\xd8\xff",
        "a JPEG's start with HTML for its marker": b"\xff\xd8" + MARK,
        "RIFF that is no WebP": b"RIFF\x40\0\0\0RDIB" + bytes(60),
        "a PNG's signature with another chunk": b"\x89PNG\r\n\x1a\n\0\0\0\x0dCgBI" + bytes(40),
    }
    return {what: (body, None) for what, body in bodies.items()}


def _stored_as_they_are() -> dict[str, tuple[bytes, str | None]]:
    """What is stored under its true type, given by its start, with something else behind."""
    archive = _zip({"a.class": b"\xca\xfe\xba\xbe", "../../etc/passwd": b"x"})
    gif = b"GIF89a\x01\0\x01\0\0\0\0"
    return {
        "PNG": (PNG_START + bytes(60), "image/png"),
        "PNG with HTML": (PNG_START + MARK, "image/png"),
        "GIF with HTML": (gif + MARK, "image/gif"),
        "GIF that is JavaScript": (b"GIF89a/*\x01\0\x01\0\0\0\0*/=1;alert(1)//", "image/gif"),
        "GIFAR": (gif + archive, "image/gif"),
        "WebP with PHP": (b"RIFF\x40\0\0\0WEBPVP8 " + b"<?php system($_GET[0]); ?>".ljust(60), "image/webp"),
        "MP4 with HTML": (MP4_START + MARK, "video/mp4"),
        "MP4 that is a playlist": (MP4_START + b"\0\0\0\x30moov#EXTM3U\nfile:///etc/passwd".ljust(100), "video/mp4"),
        "FLAC with a script": (b"fLaC\0\0\0\x22" + bytes(34) + b"\n#!/bin/sh\n", "audio/flac"),
        "JPEG with PHP": (JPEG_START + b"<?php system($_GET[0]); ?>", "image/jpeg"),
        "JPEG with a zip": (JPEG_START + archive, "image/jpeg"),
        "JPEG's start with HTML": (JPEG_START + MARK, "image/jpeg"),
    }


def _zip(names: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return out.getvalue()
