"""What is signed in a link, and that nothing else is taken for one."""

import base64
import hashlib
import hmac
import string
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.delivery.links import Links, expiry, name_segment
from server.errors import LinkExpired, LinkInvalid
from tests.download.samples import a_file

KEY, OTHER = "k" * 40, "o" * 40
FILE_ID = UUID("01900000-0000-7000-8000-000000000001")
LATER = 4_000_000_000


def a_stored_file(**changes: Any) -> Any:
    return a_file(
        b"x" * 10,
        **{
            "id": FILE_ID,
            "file_path": f"users/ada/images/{FILE_ID}.3.png",
            "generation": 3,
            "mime_type": "image/png",
            "content_changed_at": datetime(2026, 1, 2, 3, 4, 5, 678, UTC),
            **changes,
        },
    )


def parts(path: str) -> tuple[str, str]:
    _, kind, token, segment = path.split("/")
    assert kind == "f"
    return token, segment


def test_a_link_says_what_the_row_says() -> None:
    file = a_stored_file(file_name="Grüße/aus 🌅.png")
    links = Links([KEY])
    token, segment = parts(links.download(file, 7, expires_at=LATER, disposition="attachment"))
    found = links.verify_download(token, segment)
    assert (found.id, found.generation, found.link_epoch, found.file_path) == (FILE_ID, 3, 7, file.file_path)
    assert (found.mime_type, found.file_size, found.sha256) == (file.mime_type, file.file_size, file.sha256)
    assert (found.disposition, found.file_name, found.expires_at) == ("attachment", "Grüße_aus 🌅.png", LATER)
    assert found.content_changed_at == datetime(2026, 1, 2, 3, 4, 5, 0, UTC)
    assert found.volume_prefix == file.volume_id.bytes[:4]


def test_the_bytes_of_a_link_are_as_documented() -> None:
    """A program in another language verifies them (server/decisions/0011), so they must not change unnoticed."""
    file = a_stored_file(volume_id=UUID("0a0b0c0d-0000-4000-8000-000000000001"), sha256=bytes(range(32)))
    path = Links([KEY]).download(file, 7, expires_at=LATER)
    token, segment = parts(path)
    payload, signature = token.split(".")
    assert base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)).hex() == (
        "0100ee6b28000a0b0c0d0000000300000007" + FILE_ID.hex + bytes(range(32)).hex() + "000000000000000a"
        "695735a5010003" + b"png".hex() + b"ada".hex()
    )  # fmt: skip
    # By hand, as the other program does it.
    derived = hmac.new(KEY.encode(), b"coffer.download.1", hashlib.sha256).digest()
    by_hand = hmac.new(derived, f"{payload}/{segment}".encode(), hashlib.sha256).digest()
    assert signature == base64.urlsafe_b64encode(by_hand).decode().rstrip("=")


def test_the_bytes_of_a_link_to_a_preview_are_as_documented() -> None:
    file = a_stored_file(volume_id=UUID("0a0b0c0d-0000-4000-8000-000000000001"), sha256=bytes(range(32)), file_name="Sonne.png")
    links = Links([KEY])
    token, segment = parts(links.download(file, 7, expires_at=LATER, preview="640x480-cover-q80.webp"))
    assert base64.urlsafe_b64decode(token.split(".")[0] + "==").hex() == (
        "0100ee6b28000a0b0c0d0000000300000007" + FILE_ID.hex + bytes(range(32)).hex() + "000000000000000a"
        "695735a5011603" + b"png".hex() + b"640x480-cover-q80.webp".hex() + b"ada".hex()
    )  # fmt: skip
    assert segment == "Sonne-640x480-cover-q80.webp"
    found = links.verify_download(token, segment)
    assert (found.preview, found.file_path, found.id, found.sha256) == ("640x480-cover-q80.webp", file.file_path, FILE_ID, file.sha256)
    assert links.verify_download(*parts(links.download(file, 7, expires_at=LATER))).preview is None


@pytest.mark.parametrize(
    "name", ["../x.webp", "a/b.webp", ".webp", "320", "A.webp", "a..webp", "a.webp\n", "a" * 33 + ".webp", "é.webp", "-a.webp"]
)
def test_a_link_to_a_preview_names_no_other_file(name: str) -> None:
    """Signed by us, so only a later version of us says this: an old server must not open anything that it does not know."""
    links = Links([KEY])
    token, segment = parts(links.download(a_stored_file(), 0, expires_at=LATER, preview="320.webp"))
    payload = base64.urlsafe_b64decode(token.split(".")[0] + "==")
    raw = name.encode()
    changed = payload[:79] + bytes([len(raw)]) + payload[80:84] + raw + payload[84 + len("320.webp") :]
    with pytest.raises(LinkInvalid):
        links.verify_download(signed(changed, b"coffer.download.1", f"/{segment}"), segment)


@pytest.mark.parametrize("preview", [None, "320.webp"])
def test_no_character_of_a_link_can_be_changed_added_or_removed(preview: str | None) -> None:
    links = Links([KEY])
    token, segment = parts(links.download(a_stored_file(file_name="a b.png"), 0, expires_at=LATER, preview=preview))
    whole = f"{token}/{segment}"
    alphabet = string.ascii_letters + string.digits + "-_.%/=+ \x00é"
    tried = 0
    for at in range(len(whole) + 1):
        mutations = {whole[:at] + whole[at + 1 :], whole[:at] + whole[at : at + 1] * 2 + whole[at + 1 :]}
        mutations |= {whole[:at] + each + whole[at + 1 :] for each in alphabet}
        mutations |= {whole[:at] + each + whole[at:] for each in alphabet}
        for mutation in mutations - {whole}:
            tried += 1
            changed_token, _, changed_segment = mutation.partition("/")
            with pytest.raises(LinkInvalid):
                links.verify_download(changed_token, changed_segment)
    assert tried > 20_000
    assert links.verify_download(token, segment).id == FILE_ID


@given(st.text(max_size=300), st.text(max_size=50))
@example("a.b", "")
@example("." + "A" * 43, "x")
@example("A." + "A" * 43, "x")
@example("A" * 600 + "." + "A" * 43, "x")
def test_nonsense_is_refused(token: str, segment: str) -> None:
    links = Links([KEY])
    with pytest.raises(LinkInvalid):
        links.verify_download(token, segment)
    with pytest.raises(LinkInvalid):
        links.verify_upload(token)


def signed(payload: bytes | bytearray, salt: bytes, segment: str = "") -> str:
    """A token that we would have signed, had we meant it."""
    text = base64.urlsafe_b64encode(payload).decode().rstrip("=")
    derived = hmac.new(KEY.encode(), salt, hashlib.sha256).digest()
    signature = hmac.new(derived, f"{text}{segment}".encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


@pytest.mark.parametrize(("at", "value"), [(0, 0), (0, 2), (1, 2), (1, 255), (78, 5), (78, 255), (79, 1), (80, 2), (80, 255)], ids=str)
def test_what_a_later_version_signs_is_refused(at: int, value: int) -> None:
    """Version, flags, directory, lengths of the names, each as nobody writes it today: an old server must not guess."""
    links = Links([KEY])
    token, segment = parts(links.download(a_stored_file(), 0, expires_at=LATER))
    payload = bytearray(base64.urlsafe_b64decode(token.split(".")[0] + "=="))
    assert links.verify_download(signed(payload, b"coffer.download.1", f"/{segment}"), segment).id == FILE_ID
    payload[at] = value
    with pytest.raises(LinkInvalid):
        links.verify_download(signed(payload, b"coffer.download.1", f"/{segment}"), segment)
    for shorter in (b"", payload[:10], payload[:83]):
        with pytest.raises(LinkInvalid):
            links.verify_download(signed(shorter, b"coffer.download.1", f"/{segment}"), segment)
    for upload in (bytes(22), b"\x02" + bytes(21), b"\x01" + bytes(20), b"\x01\x01" + bytes(20)):
        with pytest.raises((LinkInvalid, LinkExpired)):
            links.verify_upload(signed(upload, b"coffer.upload.1"))


def test_keys_rotate() -> None:
    file = a_stored_file()
    token, segment = parts(Links([OTHER]).download(file, 0, expires_at=LATER))
    assert Links([KEY, OTHER]).verify_download(token, segment).id == FILE_ID
    with pytest.raises(LinkInvalid):
        Links([KEY]).verify_download(token, segment)
    assert Links([KEY, OTHER]).download(file, 0, expires_at=LATER) == Links([KEY]).download(file, 0, expires_at=LATER)  # the first signs


def test_a_link_for_one_purpose_is_none_for_another() -> None:
    links = Links([KEY])
    token = links.upload(FILE_ID, expires_at=LATER).removeprefix("/u/")
    assert links.verify_upload(token) == FILE_ID
    with pytest.raises(LinkInvalid):
        links.verify_download(token, "")
    download_token, segment = parts(links.download(a_stored_file(), 0, expires_at=LATER))
    with pytest.raises(LinkInvalid):
        links.verify_upload(download_token)
    with pytest.raises(LinkInvalid):
        links.verify_upload(f"{download_token}/{segment}")


def test_past_its_end_it_has_expired() -> None:
    links = Links([KEY])
    with pytest.raises(LinkExpired):
        links.verify_download(*parts(links.download(a_stored_file(), 0, expires_at=1_000)))
    with pytest.raises(LinkExpired):
        links.verify_upload(links.upload(FILE_ID, expires_at=1_000).removeprefix("/u/"))


@given(st.integers(1, 10**7), st.integers(1, 10**5), st.floats(1, 3e9))
def test_an_expiry_is_shared_within_a_window(ttl: int, window: int, now: float) -> None:
    ends = expiry(ttl, window, now)
    assert ttl <= ends - int(now) < ttl + max(1, min(window, ttl // 2))
    assert ends % max(1, min(window, ttl // 2)) == 0


@given(st.text(min_size=1, max_size=500))
@example("..")
@example(".")
@example("🌅" * 500 + ".png")
@example("a/../b\\c%2f.png")
@example("\ud800")
def test_any_name_makes_a_segment_that_clients_leave_alone(name: str) -> None:
    segment = name_segment(name)
    assert 0 < len(segment) <= 255 and segment.isascii()
    assert set(segment) <= set(string.ascii_letters + string.digits + "-._~%")
    assert segment not in {".", ".."} and "/" not in unquote(segment)
