"""Marks files as made by AI: `python -m server.previews.marking <descriptor>`, a decoder as `images` is one.

Beside the file it is given another that it writes, and a socket. A manifest's signature is asked for through that, since the key is not in
here: whoever takes this process over by a file can have one signature, of a manifest for a file of the same user's.
"""

import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import c2pa

from server.previews import xmp
from server.previews.images import Answer, Job, serve
from server.previews.marks import Mark

_LONGEST_SIGNATURE = 512
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}


def mark(fds: Sequence[int], job: Job) -> Answer:
    """Writes the marked file; the answer is empty, or the reason why it cannot be."""
    (mime_type,), (source_fd, target_fd, signing_fd), wanted = job.mime_types, fds, job.mark
    if wanted is None:
        raise ValueError("nothing to mark with")
    with open(source_fd, "rb", closefd=False) as source, open(target_fd, "r+b", closefd=False) as target:
        try:
            if wanted.kind == "iptc":
                xmp.write(source, xmp.edits_of(source, mime_type), target)
            else:
                _sign(source, target, mime_type, wanted, signing_fd)
        except xmp.NoRoom:
            return Answer(reason="unsupported")
        except (xmp.Damaged, c2pa.C2paError) as problem:
            return Answer(reason="damaged", detail=str(problem)[:500])
    return Answer()


def _sign(source: BinaryIO, target: BinaryIO, mime_type: str, wanted: Mark, signing_fd: int) -> None:
    def signature(claim: bytes) -> bytes:
        os.write(signing_fd, claim)
        return os.read(signing_fd, _LONGEST_SIGNATURE)

    created: dict[str, Any] = {"action": "c2pa.created", "digitalSourceType": xmp.GENERATED}
    if wanted.model:
        created["softwareAgent"] = {"name": wanted.model}
    manifest = {
        "claim_generator_info": [{"name": "Coffer"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }
    signer = c2pa.Signer.from_callback(signature, c2pa.C2paSigningAlg.ES256, wanted.certificates)
    with c2pa.Builder(manifest, context=c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))) as builder:
        builder.sign(signer, mime_type, source, target)


if __name__ == "__main__":
    serve(mark, may_write_code=True)
