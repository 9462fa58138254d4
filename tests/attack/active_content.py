"""7: stored bytes that would like to run in a browser: never shown as a page, and sandboxed if they were."""

import html
import struct
import zipfile
from io import BytesIO
from typing import Any

import httpx

from server.kinds import HEAD_BYTES, KNOWN, detect
from tests.attack.chromium import Browser, Witness
from tests.attack.target import Tally, Target
from tests.samples import PNG_START
from tests.serving import execute
from tests.waiting import until

# How another site's page may take a URL in. A browser decides what each may run by type, nosniff and the sandbox.
EMBEDDINGS = {
    "iframe": '<iframe src="{url}"></iframe>',
    "object": '<object data="{url}"></object>',
    "typed object": '<object data="{url}" type="text/html"></object>',
    "embed": '<embed src="{url}">',
    "typed embed": '<embed src="{url}" type="text/html">',
    "frame": '<iframe srcdoc="&lt;iframe src={url}&gt;&lt;/iframe&gt;"></iframe>',
    "image": '<img src="{url}">',
    "script": '<script src="{url}"></script>',
    "module": '<script type="module" src="{url}"></script>',
    "style": '<link rel="stylesheet" href="{url}">',
    "video": '<video src="{url}"></video>',
}
# Those in which the control, served by somebody careless, must run.
RUNNING_PAGES = {"iframe", "object", "embed", "frame"}
ACTIVE_TYPES = ["text/html", "application/xhtml+xml", "image/svg+xml", "text/xml", "application/pdf", "text/javascript"]
_FTYP = b"\0\0\0\x14ftyp%b\0\0\0\0%b"


def attack(target: Target, tally: Tally) -> str:
    client = target.user("activist")
    _refuse_uploads(tally, client)
    types = target.some(KNOWN, 4)
    with Witness(target.server.host, target.server.port) as witness, Browser(target.scratch / "chromium") as browser:
        controls = _check_that_scripts_would_be_seen(target, tally, witness, browser)
        opened = 0
        for mime_type in types:
            opened += _open_stored(target, tally, witness, browser, client, mime_type)
        for mime_type in target.some(ACTIVE_TYPES, 2):
            opened += _open_forged_row(target, tally, witness, browser, client, mime_type)
        # What was opened before this has long run if it ever would.
        browser.open(witness.serve("text/html", _page(witness, "the end")))
        until(lambda: "the-end" in witness.hits)
        ran = sorted(each for each in witness.hits if not each.startswith("control-") and each != "the-end")
        tally.check(not ran, f"scripts ran: {ran}")
        version = browser.version
    client.close()
    return (
        f"{len(types)} types and {len(ACTIVE_TYPES)} forged rows opened {opened} times in {version}: 0 scripts ran, {controls} controls did"
    )


def _hit(witness: Witness, name: str) -> str:
    return f"new Image().src='{witness.url}/hit/{name.replace(' ', '-').replace('/', '-')}'"


def _page(witness: Witness, name: str) -> bytes:
    """A page that tells the witness as soon as it runs, in as many ways as there are."""
    hit = _hit(witness, name)
    return (
        f'<!DOCTYPE html><html><body onload="{hit}"><script>{hit}</script><svg onload="{hit}"></svg><img src=x: onerror="{hit}">'.encode()
    )


def _svg(witness: Witness, name: str) -> bytes:
    """A picture with a script, well-formed for every reader of XML."""
    return f'<svg xmlns="http://www.w3.org/2000/svg"><script>{_hit(witness, name)}</script></svg>'.encode()


def _refuse_uploads(tally: Tally, client: httpx.Client) -> None:
    """What is a page or a script by its start is not stored at all."""
    for body in (
        b"<!DOCTYPE html><script>alert(1)</script>",
        b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></html>',
        b"%PDF-1.7\n1 0 obj<</S/JavaScript/JS(app.alert(1))>>endobj\n",
        b"alert(1)",
    ):
        answer = client.post("/api/files/upload", content=body, headers={"Content-Type": "image/png"})
        tally.check((answer.status_code, answer.json()["code"]) == (415, "unsupported_type"), f"{body[:30]!r}: {answer.text}")


def _check_that_scripts_would_be_seen(target: Target, tally: Tally, witness: Witness, browser: Browser) -> int:
    """The same bytes, served by somebody careless, do run: each type's as a page, and in each embedding that can run one."""
    controls = 0
    for mime_type in target.some(KNOWN, 4):
        name = f"control {mime_type}"
        browser.open(witness.serve("text/html", _polyglot(witness, mime_type, name)))
        controls += _seen(tally, witness, name)
    for embedding in RUNNING_PAGES:
        name = f"control {embedding}"
        _embed(witness, browser, witness.serve("text/html", _polyglot(witness, "image/png", name)), [embedding])
        controls += _seen(tally, witness, name)
    for mime_type in ("text/javascript", "text/plain"):
        name = f"control script as {mime_type}"
        _embed(witness, browser, witness.serve(mime_type, _polyglot(witness, "image/gif", name)), ["script"])
        controls += _seen(tally, witness, name)
    browser.open(witness.serve("image/svg+xml", _svg(witness, "control svg")))
    return controls + _seen(tally, witness, "control svg")


def _seen(tally: Tally, witness: Witness, name: str) -> int:
    hit = name.replace(" ", "-").replace("/", "-")
    until(lambda: hit in witness.hits)
    tally.check(True, name)
    return 1


def _embed(witness: Witness, browser: Browser, url: str, embeddings: list[str]) -> None:
    """Another site's page that takes the URL in."""
    page = "<!DOCTYPE html><body>" + "".join(EMBEDDINGS[each].format(url=html.escape(url)) for each in embeddings)
    browser.open(witness.serve("text/html", page.encode()))


def _open_stored(target: Target, tally: Tally, witness: Witness, browser: Browser, client: httpx.Client, mime_type: str) -> int:
    """A file of this type with a page inside, opened by its link, its attachment link and its public URL, alone and embedded."""
    kind = KNOWN[mime_type].kinds[0]
    body = _polyglot(witness, mime_type, f"stored {mime_type}")
    file = target.upload(client, body, type=kind, name="page.html")
    tally.check(file["mime_type"] == mime_type, f"what should be {mime_type} is stored as {file['mime_type']}")
    return _open_everywhere(target, tally, witness, browser, client, file)


def _open_forged_row(target: Target, tally: Tally, witness: Witness, browser: Browser, client: httpx.Client, mime_type: str) -> int:
    """The second line: a row changed by hand that says it is a page, over bytes on the disk that are one."""
    make = _svg if mime_type.endswith("xml") else _page
    page = make(witness, f"forged {mime_type}").ljust(2_000)
    file = target.upload(client, PNG_START.ljust(len(page)), name="page.html")
    row = execute(
        target.server.database_url, "update user_files set mime_type = $2 where id = $1 returning file_path", file["id"], mime_type
    )
    (target.server.volume / row[0]["file_path"]).write_bytes(page)
    opened = _open_everywhere(target, tally, witness, browser, client, file | {"mime_type": mime_type})
    client.delete(f"/api/files/{file['id']}").raise_for_status()
    return opened


def _open_everywhere(target: Target, tally: Tally, witness: Witness, browser: Browser, client: httpx.Client, file: dict[str, Any]) -> int:
    mime_type = file["mime_type"]
    shown = mime_type in KNOWN and mime_type.startswith(("image/", "video/", "audio/"))
    inline, saved = target.link(client, file["id"]), target.link(client, file["id"], disposition="attachment", name="page.html")
    public = target.public_url(client, file["id"])
    for path in (inline, saved, public):
        answer = target.get(path)
        policy = answer.header("content-security-policy") or ""
        tally.check(answer.header("x-content-type-options") == "nosniff", f"{mime_type} at {path[:3]}: without nosniff")
        tally.check(policy.startswith("sandbox;") and "allow-" not in policy and "default-src 'none'" in policy, f"{mime_type}: {policy}")
        disposition = (answer.header("content-disposition") or "").partition(";")[0]
        wanted = "inline" if shown and path != saved else "attachment"
        tally.check(disposition == wanted, f"{mime_type} at {path[:3]}: {disposition}")
        error = browser.open(target.server.url + path)
        # What is inline and unknown to this browser is saved too.
        tally.check(error or wanted == "inline", f"{mime_type} at {path[:3]}: shown in the browser")
    browser.open(witness.relayed(inline))  # the sandbox alone
    for path in (target.server.url + inline, witness.relayed(inline)):
        _embed(witness, browser, path, list(EMBEDDINGS))
    return 4 + 2 * len(EMBEDDINGS)


def _polyglot(witness: Witness, mime_type: str, name: str) -> bytes:
    """Bytes of this type by their start, that are a page too, and where the type allows it a script."""
    page = _page(witness, name)
    script = f"/*\0\0\0\0*/=1;{_hit(witness, name)}//".encode()
    match mime_type:
        case "image/jpeg":
            start = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
        case "image/png":
            start = PNG_START
        case "image/gif":
            start = b"GIF89a" + script
        case "image/webp":
            start = b"RIFF" + script[:4].ljust(4) + b"WEBPVP8 "
        case "audio/wav":
            start = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + bytes(12)
        case "video/x-msvideo":
            start = b"RIFF\0\0\0\0AVI LIST" + bytes(8)
        case "image/avif" | "image/heic" | "image/heif" | "video/mp4" | "video/quicktime" | "video/3gpp" | "video/3gpp2" | "audio/mp4":
            brands = {
                "image/heif": b"mif1",
                "video/mp4": b"isom",
                "video/quicktime": b"qt  ",
                "video/3gpp": b"3gp4",
                "video/3gpp2": b"3g2a",
            }
            brand = brands.get(mime_type) or {"image/avif": b"avif", "image/heic": b"heic", "audio/mp4": b"M4A "}[mime_type]
            start = _FTYP % (brand, brand)
        case "video/webm" | "audio/webm" | "video/x-matroska" | "audio/x-matroska":
            start = _ebml(b"webm" if mime_type.endswith("webm") else b"matroska", 2 if mime_type.startswith("audio") else 1)
        case "video/ogg" | "audio/ogg":
            codec = b"\x80theora\3\2\1" if mime_type == "video/ogg" else b"\1vorbis\0\0\0\0"
            start = b"OggS\0\2" + bytes(20) + bytes([1, 30]) + codec.ljust(30, b"\0")
        case "audio/mpeg":
            start = b"ID3\4\0\0\0\0\0\0"
        case "audio/flac":
            start = b"fLaC\0\0\0\x22" + bytes(34)
        case "audio/aac":
            frame = b"\xff\xf1\x50\x80\1\0\xfc".ljust(8, b"\0")
            start = frame * 2
        case "model/gltf+json" | "application/json":
            asset = '"asset": {"version": "2.0"}, ' if "gltf" in mime_type else ""
            text = page.decode().replace('"', "")  # attributes and the script keep their meaning without double quotes
            return f'{{{asset}"a": "{text}"}}'.encode()
        case "model/gltf-binary":
            document = b'{"asset":{"version":"2.0"}}' + page
            return b"glTF" + struct.pack("<II", 2, 20 + len(document)) + struct.pack("<I", len(document)) + b"JSON" + document
        case "application/zip":
            out = BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                archive.writestr("page.html", page)
            return out.getvalue() + page
        case _:
            raise AssertionError(f"nobody knows how to put a page into {mime_type}")
    body = start + page
    found = detect(body[:HEAD_BYTES], body[-HEAD_BYTES:])
    assert found is not None and found.mime_type == mime_type, f"the sample of {mime_type} is taken for {found}"
    return body


def _ebml(doc_type: bytes, track_type: int) -> bytes:
    def element(name: int, content: bytes) -> bytes:
        return name.to_bytes((name.bit_length() + 7) // 8) + ((1 << 56) | len(content)).to_bytes(8) + content

    tracks = element(0x1654AE6B, element(0xAE, element(0x83, bytes([track_type]))))
    return element(0x1A45DFA3, element(0x4282, doc_type)) + element(0x18538067, tracks + bytes(20))
