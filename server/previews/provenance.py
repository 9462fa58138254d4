"""What a file says of how it was made, in its own bytes: `python -m server.previews.provenance <descriptor>`, a decoder as `images` is one.

Two standards: manifests of Content Credentials (C2PA 2.x), which libc2pa reads and whose signatures and hashes it verifies, and the
digital source type of the IPTC (Photo Metadata 2023.1, in XMP), for which the first and the last bytes are searched.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import c2pa
import msgspec

from server.previews.images import Answer, Job, serve
from server.previews.models import Made, MadeFile
from server.previews.statements import MIME_TYPES, NAME, Statements

_SEARCHED_BYTES = 4 * 2**20  # XMP stands in the first segments of JPEG
_SEARCHED_END_BYTES = 2**18  # and at the end of WebP and MP4; what encoders put between the two of a longer PNG is not found
_LONGEST_MANIFESTS = 4 * 2**20
_SOURCE_TYPE = re.compile(
    rb"DigitalSourceType\s*(?:=\s*[\"']|>\s*|\s+rdf:resource\s*=\s*[\"'])\s*(https?://cv\.iptc\.org/newscodes/digitalsourcetype/[A-Za-z]{1,64})"
)
_SETTINGS = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}  # the jail has no network


def read(image_fds: Sequence[int], job: Job) -> Answer:
    """One file's `Statements`, as JSON."""
    (mime_type,), (fd,) = job.mime_types, image_fds
    with open(fd, "rb", closefd=False) as file:
        found = _SOURCE_TYPE.search(file.read(_SEARCHED_BYTES))
        if found is None and (size_bytes := os.fstat(fd).st_size) > _SEARCHED_BYTES:
            file.seek(max(_SEARCHED_BYTES, size_bytes - _SEARCHED_END_BYTES))
            found = _SOURCE_TYPE.search(file.read(_SEARCHED_END_BYTES))
        os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file:
        content_credentials = _manifests(mime_type, file)
    said = Statements(digital_source_type=found[1].decode() if found else None, content_credentials=content_credentials)
    made = MadeFile(variant=NAME, name=NAME, mime_type="application/json")
    return Answer(made=Made(files=[made]), contents=[msgspec.json.encode(said)])


def _manifests(mime_type: str, file: Any) -> dict[str, Any] | None:
    if mime_type not in MIME_TYPES:
        return None
    try:
        reader = c2pa.Reader.try_create(mime_type, file, context=c2pa.Context(c2pa.Settings.from_dict(_SETTINGS)))
    except c2pa.C2paError as problem:
        return {"error": str(problem)[:500]}
    if reader is None:
        return None
    with reader:
        text = reader.json()
    if len(text) > _LONGEST_MANIFESTS:
        return {"error": "too long"}
    said: dict[str, Any] = msgspec.json.decode(text)
    return said


if __name__ == "__main__":
    serve(read, may_write_code=True)
