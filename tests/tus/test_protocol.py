"""What tus writes into headers: read as the specification has it, and never anything but `InvalidRequest` for the rest."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.fields import METADATA_BYTES
from server.kinds import KINDS
from server.tus import protocol
from server.tus.protocol import PREFIX

ONE, TWO = "01900000-0000-7000-8000-000000000001", "01900000-0000-7000-8000-000000000002"

# What a header can hold: an HTTP server hands on any byte but CR, LF and NUL, as latin-1.
headers = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=300)
keys = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=","), min_size=1, max_size=20)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
fronts = st.sampled_from(["", PREFIX + "/", f"https://h{PREFIX}/", f"//h/x{PREFIX}/", "http://[", PREFIX])
names = st.sampled_from([ONE, TWO, "", "x", ONE + "/", ONE.upper(), "\xa0", f"{{{ONE}}}", ONE[:-1] + "\u00b2"])
addresses = st.tuples(fronts, names).map("".join)
algorithms = st.sampled_from(["sha1", "sha256", "md5", "sha512", ""])
digests = st.binary(max_size=40).map(base64.b64encode).map(bytes.decode)


def base64_of(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def written(pairs: Mapping[str, str]) -> str:
    return ",".join(f"{key} {base64_of(value)}" for key, value in pairs.items())


def read(reader: Callable[..., Any], *arguments: Any) -> Any:
    """What is read, or None where it is refused, as the only way to refuse it."""
    try:
        return reader(*arguments)
    except InvalidRequest:
        return None


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", {}),
        ("   ", {}),
        ("filename d29ybGQucG5n", {"filename": "world.png"}),
        ("filename d29ybGQucG5n,is_confidential", {"filename": "world.png", "is_confidential": ""}),
        ("a YQ==, b YmI=", {"a": "a", "b": "bb"}),
        ("a ,b ", {"a": "", "b": ""}),
        ("n c8WCb8WEY2U=", {"n": "słońce"}),
        ("KEY YQ==,key Yg==", {"KEY": "a", "key": "b"}),
    ],
)
def test_metadata(text: str, pairs: dict[str, str]) -> None:
    assert protocol.metadata(text) == pairs


@pytest.mark.parametrize(
    "text",
    [
        *(",", "a,", ",a", "a YQ==,,b", "a YQ==,a Yg=="),  # no key, or twice
        *("a YQ", "a YQ=", "a  YQ==", "a YQ== ==", "a YQ==x", "a Y\u00e9==", "a YQ-_", "a\tYQ=="),  # not base64, as RFC 4648 has it
        *("a gA==", "a 7aCA"),  # not UTF-8; half of a surrogate pair
        *("\u00e9 YQ==", "\xa0", "\x85", "\x7f YQ==", "a\x1f YQ=="),  # a key that is not visible ASCII
        "a " + "A" * 20_000,
    ],
)
def test_metadata_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        protocol.metadata(text)
    assert refused.value.field == "Upload-Metadata"


@given(st.dictionaries(keys, texts, max_size=10))
def test_metadata_comes_back(pairs: dict[str, str]) -> None:
    assert protocol.metadata(written(pairs)) == pairs


@given(headers | st.lists(st.sampled_from(["a", " ", ",", "YQ==", "=", "\xa0", "\x85", "\t", "filename"])).map("".join))
def test_any_metadata_is_read_or_refused(text: str) -> None:
    if read(protocol.metadata, text) is not None:
        assert text.isascii()  # or HEAD could not tell it word for word


@given(
    st.dictionaries(
        keys | st.sampled_from(["filename", "name", "fileName", "filetype", "type", "package_name", "tags"]),
        texts | st.sampled_from(["", "\x00", "image", "image/png", "application/octet-stream", "a,b", "x" * 600]),
        max_size=8,
    )
)
@example({"k": "\x00"})
@example({"type": "image/\x00"})
@example({"k": "\x7f" * METADATA_BYTES})
def test_details_are_clean_or_refused(pairs: dict[str, str]) -> None:
    details = read(protocol.details, pairs)
    if details is not None:
        assert details.kind is None or details.kind in KINDS
        named = {"filename", "name", "fileName", "filetype", "type", "package_name", "tags"}
        assert details.metadata == {key: value for key, value in pairs.items() if key not in named}
        assert "\x00" not in f"{details.file_name}{details.package_name}{details.tags}{details.metadata}"


def test_details() -> None:
    details = protocol.details(
        {"filename": "a.mp4", "filetype": "video/mp4", "type": "video", "package_name": "p", "tags": "x, y", "album": "2026", "empty": ""}
    )
    assert (details.file_name, details.kind, details.package_name, details.tags) == ("a.mp4", "video", "p", ["x", "y"])
    assert details.metadata == {"album": "2026", "empty": ""}
    nothing = protocol.details({})
    assert (nothing.file_name, nothing.kind, nothing.package_name, nothing.tags, nothing.metadata) == (None, None, None, [], {})


@pytest.mark.parametrize(
    ("pairs", "name"),
    [
        ({"filename": "a", "name": "b", "fileName": "c"}, "a"),
        ({"filename": "", "name": "b", "fileName": "c"}, "b"),
        ({"name": "", "fileName": "c"}, "c"),
        ({"name": ""}, None),
    ],
)
def test_the_name(pairs: dict[str, str], name: str | None) -> None:
    assert protocol.details(pairs).file_name == name


def test_a_mime_type_is_no_kind() -> None:
    """Uppy sends one under this name."""
    assert protocol.details({"type": "image/png"}).kind is None and protocol.details({"type": ""}).kind is None
    with pytest.raises(InvalidRequest) as refused:
        protocol.details({"type": "picture"})
    assert refused.value.field == "type"


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "md5"])
def test_checksum(algorithm: str) -> None:
    digest = hashlib.new(algorithm, b"hello", usedforsecurity=False).digest()
    checksum = protocol.checksum(f"{algorithm} {base64_of(digest)}")
    assert checksum is not None and checksum.digest == digest
    hasher = checksum.hasher()
    assert not checksum.matches(hasher)
    hasher.update(b"hello")
    assert checksum.matches(hasher)


@pytest.mark.parametrize(
    "text",
    [
        *("", "sha1", "sha1 ", "crc32 YQ==", f"SHA1 {base64_of(bytes(20))}", f"sha1  {base64_of(bytes(20))}"),
        *(
            f"sha1 {base64_of(bytes(19))}",
            f"sha256 {base64_of(bytes(20))}",
            f"sha1 {base64_of(bytes(20))} x",
            f"sha1,{base64_of(bytes(20))}",
        ),
    ],
)
def test_a_checksum_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        protocol.checksum(text)
    assert refused.value.field == "Upload-Checksum"


@given(st.none() | headers | st.tuples(algorithms, st.sampled_from([" ", "", "  ", ","]), digests).map("".join))
def test_any_checksum_is_read_or_refused(text: str | None) -> None:
    found = read(protocol.checksum, text)
    if found is not None:
        assert text == f"{found.algorithm} {base64_of(found.digest)}" and len(found.digest) == found.hasher().digest_size


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"final;{PREFIX}/{ONE}", [ONE]),
        (f"final;{PREFIX}/{TWO} {PREFIX}/{ONE}", [TWO, ONE]),
        (f"final; {PREFIX}/{TWO}  {PREFIX}/{ONE} ", [TWO, ONE]),
        (f"final;https://h:8443{PREFIX}/{ONE} http://h/behind/a/proxy{PREFIX}/{TWO}", [ONE, TWO]),
    ],
)
def test_concat(text: str, parts: list[str]) -> None:
    assert protocol.concat(text) == protocol.Concat([UUID(part) for part in parts])


def test_concat_of_a_part_and_of_none() -> None:
    assert protocol.concat("partial") == protocol.Concat(None)
    assert protocol.concat(None) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "final", "final;", "final; ", "partial;", "PARTIAL", "Final;" + ONE, f"final;{ONE}", f"final;/other/{ONE}"),
        *(f"final;{PREFIX}/{ONE} {PREFIX}/{ONE}", f"final;{PREFIX}/{ONE} {PREFIX}/x", f"final;{PREFIX}/{ONE}/", f"final;{PREFIX}/{ONE}?a"),
        *("final;http://[", f"final;{PREFIX}/{ONE},{PREFIX}/{TWO}", f"partial;{PREFIX}/{ONE}", f"final;{PREFIX}/{{{ONE}}}"),
        f"final;{PREFIX}/{ONE} https://h{PREFIX}/{ONE}",
        "final;" + " ".join(f"{PREFIX}/{UUID(int=n)}" for n in range(1_001)),
    ],
)
def test_concat_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        protocol.concat(text)
    assert refused.value.field == "Upload-Concat"


@given(st.none() | headers | st.lists(addresses, max_size=5).map(lambda each: "final;" + " ".join(each)) | headers.map("final;".__add__))
def test_any_concat_is_read_or_refused(text: str | None) -> None:
    found = read(protocol.concat, text)
    if found is not None and found.parts is not None:
        assert text is not None
        assert [address.rpartition("/")[2] for address in text.removeprefix("final;").split()] == list(map(str, found.parts))
        assert protocol.concat("final;" + " ".join(f"{PREFIX}/{part}" for part in found.parts)) == found


@given(headers | st.sampled_from([ONE, ONE.upper(), ONE + "/", ONE + "0", ONE.replace("-", ""), ""]))
def test_any_address(name: str) -> None:
    found = protocol.upload_id(f"{PREFIX}/{name}")
    assert (found is None and name != ONE) or str(found) == name
    assert protocol.upload_id(name) is None


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("007", 7), ("9" * 18, 10**18 - 1), (None, None)])
def test_whole(text: str | None, value: int | None) -> None:
    assert protocol.whole(text, "Upload-Offset") == value


@given(headers | st.integers().map(str))
@example("-1")
@example("+1")
@example("1_0")
@example("\u00b2")
@example("9" * 19)
@example("")
@example(" 1")
def test_any_number_is_read_or_refused(text: str) -> None:
    value = read(protocol.whole, text, "Upload-Offset")
    assert (value is not None) == (text.isascii() and text.isdigit() and len(text) <= 18)  # every one fits PostgreSQL's bigint
    assert value is None or value == int(text)


@pytest.mark.parametrize(
    ("sent", "value"),
    [({"upload-length": "0"}, 0), ({"upload-length": "5"}, 5), ({"upload-defer-length": "1"}, None)],
)
def test_length(sent: dict[str, str], value: int | None) -> None:
    assert protocol.length(sent) == value


@given(st.dictionaries(st.sampled_from(["upload-length", "upload-defer-length"]), headers | st.sampled_from(["0", "1", "5", ""])))
@example({})
@example({"upload-defer-length": "1", "upload-length": "5"})
@example({"upload-defer-length": "2"})
def test_any_length_is_read_or_refused(sent: dict[str, str]) -> None:
    missing = object()
    try:
        value: object = protocol.length(sent)
    except InvalidRequest:
        value = missing
    if sent == {"upload-defer-length": "1"}:
        assert value is None
    elif sent.keys() == {"upload-length"} and sent["upload-length"].isascii() and sent["upload-length"].isdigit():
        assert value == int(sent["upload-length"]) or len(sent["upload-length"]) > 18
    else:
        assert value is missing
