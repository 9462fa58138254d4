"""What files say of their making: Content Credentials and the IPTC's source type, read in a jail, kept, and told as they are."""

import asyncio
import io
import random
import socket
from pathlib import Path
from typing import Any

import c2pa
import msgspec
import pytest
import pyvips

from server.previews.decoders import Decoders
from server.previews.statements import NAME
from tests.previews.conftest import RealWorkerFactory
from tests.previews.issuing import issue
from tests.previews.media import TEST_CARD, record
from tests.previews.pictures import photo
from tests.previews.test_gallery import upload
from tests.serving import RunningServer, execute

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ACTIONS = {"actions": [{"action": "c2pa.created", "digitalSourceType": GENERATED}]}
MANIFEST = {"claim_generator_info": [{"name": "a-model", "version": "1"}], "assertions": [{"label": "c2pa.actions.v2", "data": ACTIONS}]}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"{attribute}>{element}</rdf:Description>'
    "</rdf:RDF></x:xmpmeta>"
)
FORMS = {
    "attribute": XMP.format(attribute=f' Iptc4xmpExt:DigitalSourceType="{GENERATED}"', element=""),
    "element": XMP.format(attribute="", element=f"<Iptc4xmpExt:DigitalSourceType>{GENERATED}</Iptc4xmpExt:DigitalSourceType>"),
    "resource": XMP.format(attribute="", element=f'<Iptc4xmpExt:DigitalSourceType rdf:resource="{GENERATED}"/>'),
}


@pytest.fixture(scope="module")
def signer() -> c2pa.Signer:
    chain, key = issue("GPU")
    return c2pa.Signer.from_info(c2pa.C2paSignerInfo(b"es256", chain.encode(), key.encode(), None))


def signed(signer: c2pa.Signer, mime_type: str, content: bytes) -> bytes:
    """As a generator with Content Credentials hands it over."""
    actions = {"actions": [{"action": "c2pa.created", "digitalSourceType": GENERATED}]}
    manifest = {
        "claim_generator_info": [{"name": "a-model", "version": "1"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": actions}],
    }
    made = io.BytesIO()
    with c2pa.Builder(manifest) as builder:
        builder.sign(signer, mime_type, io.BytesIO(content), made)
    return made.getvalue()


def statements(reader: Decoders, directory: Path, content: bytes, mime_type: str) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    (directory / "source").write_bytes(content)
    output = directory / "output"
    output.mkdir()
    made = asyncio.run(reader.read_statements(directory / "source", mime_type, output))
    assert [path.name for path in output.iterdir()] == [NAME] == [made.name]
    found: dict[str, Any] = msgspec.json.decode((output / NAME).read_bytes())
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_source_type_is_found_in_xmp(reader: Decoders, tmp_path: Path, form: str) -> None:
    image = photo(64, 48).copy()
    image.set_type(pyvips.GValue.blob_type, "xmp-data", FORMS[form].encode())
    for number, (content, mime_type) in enumerate(((image.jpegsave_buffer(), "image/jpeg"), (image.webpsave_buffer(), "image/webp"))):
        assert statements(reader, tmp_path / str(number), bytes(content), mime_type) == {
            "digital_source_type": GENERATED,
            "content_credentials": None,
        }


@pytest.mark.parametrize("mime_type", ["image/jpeg", "image/png", "image/webp"])
def test_content_credentials_are_read_and_verified(reader: Decoders, signer: c2pa.Signer, tmp_path: Path, mime_type: str) -> None:
    plain = {"image/jpeg": photo().jpegsave_buffer, "image/png": photo().pngsave_buffer, "image/webp": photo().webpsave_buffer}[mime_type]()
    content = signed(signer, mime_type, bytes(plain))
    told = statements(reader, tmp_path / "good", content, mime_type)["content_credentials"]
    active = told["manifests"][told["active_manifest"]]
    assert active["claim_generator_info"][0]["name"] == "a-model"
    assert active["assertions"][0]["data"]["actions"][0]["digitalSourceType"] == GENERATED
    assert told["validation_state"] == "Valid"
    # One pixel's byte is changed, near the end, where no manifest stands.
    tampered = bytearray(content)
    at = len(tampered) - 3_000 if mime_type != "image/png" else content.rindex(b"IDAT") + 1_000
    tampered[at] ^= 1
    assert statements(reader, tmp_path / "bad", bytes(tampered), mime_type)["content_credentials"]["validation_state"] == "Invalid"


@pytest.mark.parametrize(
    ("content", "mime_type"),
    [(b"\xff\xd8\xff" + bytes(500), "image/jpeg"), (b"no image", "image/png"), (b"PK\x03\x04" + bytes(99), "application/zip")],
)
def test_a_file_without_either_says_nothing(reader: Decoders, tmp_path: Path, content: bytes, mime_type: str) -> None:
    told = statements(reader, tmp_path / "x", content, mime_type)
    assert told["digital_source_type"] is None
    assert told["content_credentials"] is None or set(told["content_credentials"]) == {"error"}


def test_it_is_read_once_and_told_to_the_owner(
    server: RunningServer, start_real_worker: RealWorkerFactory, signer: c2pa.Signer, tmp_path: Path
) -> None:
    start_real_worker()
    film = record(tmp_path / "a.mp4", TEST_CARD, "-c:v", "libx264", "-pix_fmt", "yuv420p").read_bytes()
    with server.client("ada", timeout=60) as ada, server.client("bob") as bob:
        image = upload(ada, signed(signer, "image/jpeg", bytes(photo().jpegsave_buffer())), "a.jpg")
        moving = upload(ada, signed(signer, "video/mp4", film), "a.mp4")
        for file_id in (image, moving, image):
            told = ada.get(f"/api/files/{file_id}/provenance")
            assert told.status_code == 200, told.text
            assert told.json()["content_credentials"]["validation_state"] == "Valid"
        assert bob.get(f"/api/files/{image}/provenance").status_code == 404
        kept = execute(server.database_url, "select count(*) as n from previews where file_name = $1", NAME)
        assert kept[0]["n"] == 2
        # The bytes that are stored are those that came, and other bytes say something else.
        ada.put(f"/api/files/{image}/content", content=bytes(photo().jpegsave_buffer())).raise_for_status()
        assert ada.get(f"/api/files/{image}/provenance").json() == {"digital_source_type": None, "content_credentials": None}
        # What is kept gets lost: it is read again.
        (path,) = (server.volume / "users").glob(f"ada/previews/{moving}/{NAME}")
        path.unlink()
        assert ada.get(f"/api/files/{moving}/provenance").json()["content_credentials"]["validation_state"] == "Valid"


def test_nothing_is_fetched(reader: Decoders, signer: c2pa.Signer, tmp_path: Path) -> None:
    """A manifest may lie elsewhere, where somebody waits to be asked for it."""
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        made = io.BytesIO()
        with c2pa.Builder(MANIFEST) as builder:
            builder.set_no_embed()
            builder.set_remote_url(f"http://127.0.0.1:{elsewhere.getsockname()[1]}/manifest.c2pa")
            builder.sign(signer, "image/jpeg", io.BytesIO(bytes(photo().jpegsave_buffer())), made)
        told = statements(reader, tmp_path / "remote", made.getvalue(), "image/jpeg")["content_credentials"]
        assert set(told) == {"error"}
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def hostile(content: bytes, manifest: tuple[int, int], seed: int) -> bytes:
    """A file whose manifest store, from and to those bytes, is not what it was: bits, lengths, whole boxes repeated, cut or nested."""
    chosen = random.Random(seed)
    store = bytearray(content[manifest[0] : manifest[1]])
    boxes = [
        at - 4 for at in range(4, len(store) - 4) if bytes(store[at : at + 4]) in {b"jumb", b"jumd", b"cbor", b"json", b"bidb", b"c2sh"}
    ]
    for _ in range(chosen.choice((1, 1, 2, 5))):
        at = chosen.choice(boxes)
        match chosen.randrange(6):
            case 0:
                store[chosen.randrange(len(store))] = chosen.randrange(256)
            case 1:
                length = chosen.choice((0, 1, 7, 8, 9, 0x7FFFFFFF, 0xFFFFFFFF, len(store) * 2))
                store[at : at + 4] = length.to_bytes(4, "big")
            case 2:
                store[at : at + 8] = store[at + 4 : at + 8] * 2
            case 3:  # within itself, as deep as there is room for
                inner = store[at : at + 40]
                store[at : at + 800] = inner * 20
            case 4:  # CBOR of a length that no memory has (RFC 8949)
                store[at + 8 : at + 17] = (
                    chosen.choice((b"\x5b", b"\x7b", b"\x9b", b"\xbb")) + chosen.choice((b"\x7f", b"\0")) + b"\xff" * 7
                )
            case _:  # CBOR in CBOR in CBOR
                store[at + 8 : at + 708] = chosen.choice((b"\x81", b"\xa1", b"\xd9\xd9\xf7", b"\x9f")) * 700
    return (
        content[: manifest[0]] + bytes(store[: manifest[1] - manifest[0]]).ljust(manifest[1] - manifest[0], b"\0") + content[manifest[1] :]
    )


@pytest.mark.parametrize("mime_type", ["image/png", "video/mp4"])
def test_hostile_manifests_end_in_an_answer(reader: Decoders, signer: c2pa.Signer, tmp_path: Path, mime_type: str) -> None:
    """Of these containers libc2pa reads a manifest in one piece, whatever its sum."""
    if mime_type == "video/mp4":
        content = signed(signer, mime_type, record(tmp_path / "a.mp4", "color=red:s=64x64:d=1", "-c:v", "libx264").read_bytes())
        at = content.index(bytes.fromhex("d8fec3d61b0e483c92975828877ec481")) + 16
        manifest = at, at + 12_000
    else:
        content = signed(signer, mime_type, bytes(photo(60, 40).pngsave_buffer()))
        at = content.index(b"caBX") + 4
        manifest = at, at + int.from_bytes(content[at - 8 : at - 4], "big")
    assert statements(reader, tmp_path / "good", content, mime_type)["content_credentials"]["validation_state"] == "Valid"
    ends = set()
    for seed in range(100):
        told = statements(reader, tmp_path / str(seed), hostile(content, manifest, seed), mime_type)["content_credentials"]
        ends.add("none" if told is None else "error" if "error" in told else told["validation_state"])
    assert {"error", "Invalid"} & ends
