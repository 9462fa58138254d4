"""What clients of tus depend on, against a running server (https://tus.io/protocols/resumable-upload, version 1.0.0)."""

import base64
import hashlib
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.auth import Scope
from tests.access.test_download_links import code
from tests.access.test_key_restrictions import new_key
from tests.access.test_trail import trail
from tests.access.test_upload_links import upload_link, usage
from tests.clamd import Clamd, clamd_running, infected
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, execute
from tests.tus.conftest import APP, MOST_UPLOADS
from tests.tus.speaking import ENDPOINT, PIECE, VERSION, create, delete, head, metadata, offset, patch, post, raw, upload_id
from tests.waiting import before_its_end, until

MISSING = f"{ENDPOINT}01900000-0000-7000-8000-000000000000"
BODY = image(300_000)
EXTENSIONS = {"creation", "creation-with-upload", "creation-defer-length", "termination", "expiration", "checksum", "concatenation"}


def names(header: str) -> set[str]:
    return {name.strip().lower() for name in header.split(",")}


def checksum(algorithm: str, body: bytes) -> str:
    digest = hashlib.new(algorithm, body, usedforsecurity=False).digest()
    return f"{algorithm} {base64.b64encode(digest).decode()}"


def content(client: httpx.Client, file_id: str) -> bytes:
    answer = client.get(f"/api/files/{file_id}/download")
    assert answer.status_code == 200, answer.text
    return answer.content


def file(client: httpx.Client, file_id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/api/files/{file_id}").json()
    return found


def expire(server: RunningServer, path: str) -> None:
    """Lets the upload's life end."""
    statement = "update resumable_uploads set expires_at = now() where id = $1"
    execute(server.database_url, statement, upload_id(path))
    execute(server.database_url, "update uploads set expires_at = now() where id = $1", upload_id(path))


@pytest.fixture(scope="module")
def clamd() -> Iterator[Clamd]:
    with clamd_running() as running:
        yield running


# What the server can do


@pytest.mark.parametrize("path", ["/api/tus", "/api/tus/", MISSING])
def test_options_tells_everything_to_anybody(nobody: httpx.Client, path: str) -> None:
    answer = nobody.options(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["tus-resumable"] == answer.headers["tus-version"] == "1.0.0"
    assert names(answer.headers["tus-extension"]) == EXTENSIONS
    assert names(answer.headers["tus-checksum-algorithm"]) == {"sha1", "sha256", "md5"}
    assert answer.headers["tus-max-size"] == str(6 * 2**20)
    assert names(answer.headers["allow"]) == {"post", "head", "patch", "delete", "options"}
    assert nobody.options(path, headers={"Tus-Resumable": "0.2.2"}).status_code == 200


@pytest.mark.parametrize("path", [ENDPOINT, MISSING])
@pytest.mark.parametrize("method", ["POST", "PATCH", "HEAD", "DELETE"])
def test_a_page_may_ask_and_read_everything(nobody: httpx.Client, path: str, method: str) -> None:
    asked = {"Origin": APP, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": "tus-resumable,upload-link"}
    preflight = nobody.options(path, headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == APP
    assert method.lower() in names(preflight.headers["access-control-allow-methods"])
    sent = {"tus-resumable", "upload-length", "upload-offset", "upload-metadata", "upload-defer-length", "upload-concat", "upload-checksum"}
    sent |= {"upload-link", "authorization", "content-type", "x-http-method-override", "x-request-id", "x-requested-with", "x-user-id"}
    assert sent <= names(preflight.headers["access-control-allow-headers"])
    answer = nobody.request(method, path, headers={"Origin": APP})
    assert answer.headers["access-control-allow-origin"] == APP
    read = {"tus-resumable", "upload-length", "upload-offset", "upload-metadata", "upload-defer-length", "upload-concat", "upload-expires"}
    read |= {"tus-version", "tus-extension", "tus-max-size", "tus-checksum-algorithm", "location", "coffer-file-id", "retry-after"}
    assert read <= names(answer.headers["access-control-expose-headers"])


# From the first request to the file


def test_an_upload_in_pieces(tus: RunningServer, user: httpx.Client) -> None:
    sent = metadata(filename="holiday.png", filetype="image/png")
    answer = post(user, len(BODY), Upload_Metadata=sent)
    assert (answer.status_code, answer.content) == (201, b"")
    assert (answer.headers["tus-resumable"], answer.headers["upload-offset"]) == ("1.0.0", "0")
    assert "coffer-file-id" not in answer.headers
    path = answer.headers["location"].removeprefix(tus.url)
    for begin, end in ((0, 1), (1, 100_000), (100_000, 100_000), (100_000, 299_999)):
        answer = patch(user, path, begin, BODY[begin:end])
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(end))
        assert "coffer-file-id" not in answer.headers and answer.headers["upload-expires"]
        answer = head(user, path)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        assert (answer.headers["upload-offset"], answer.headers["upload-length"]) == (str(end), str(len(BODY)))
        assert (answer.headers["upload-metadata"], answer.headers["tus-resumable"]) == (sent, "1.0.0")
        assert not {"upload-defer-length", "upload-concat", "coffer-file-id"} & answer.headers.keys()
        assert usage(user) == (0, len(BODY))
    answer = patch(user, path, 299_999, BODY[-1:])
    assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(len(BODY)))
    file_id = answer.headers["coffer-file-id"]
    assert content(user, file_id) == BODY and file(user, file_id)["file_name"] == "holiday.png"
    assert usage(user) == (len(BODY), 0)
    answer = head(user, path)
    assert (answer.headers["upload-offset"], answer.headers["coffer-file-id"]) == (str(len(BODY)), file_id)
    assert "upload-expires" not in answer.headers
    assert patch(user, path, len(BODY), b"x").status_code == 409


@pytest.mark.parametrize("size", [len(BODY), 1_000])
def test_creation_with_upload(user: httpx.Client, size: int) -> None:
    answer = post(user, size, content=BODY[:size])
    assert (answer.status_code, answer.headers["upload-offset"]) == (201, str(size))
    assert content(user, answer.headers["coffer-file-id"]) == BODY[:size]
    assert usage(user) == (size, 0)


def test_creation_with_a_part_of_the_upload(user: httpx.Client) -> None:
    answer = post(user, len(BODY), content=BODY[:1_000])
    assert (answer.status_code, answer.headers["upload-offset"]) == (201, "1000") and answer.headers["upload-expires"]
    answer = patch(user, answer.headers["location"], 1_000, BODY[1_000:])
    assert content(user, answer.headers["coffer-file-id"]) == BODY


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"nothing that we know", {}, 415),
        (BODY, {"Upload_Checksum": checksum("sha1", b"else")}, 460),
        (BODY + b"x", {}, 413),
        (BODY, {"Upload_Metadata": metadata(type="video")}, 415),
    ],
)
def test_a_creation_that_is_refused_leaves_nothing(user: httpx.Client, body: bytes, headers: dict[str, str], status: int) -> None:
    """Nobody was told its address, so nobody could give its quota back."""
    answer = post(user, min(len(body), len(BODY)), content=body, **headers)
    assert answer.status_code == status and "location" not in answer.headers
    assert usage(user) == (0, 0)


def test_a_creation_whose_client_goes_away_leaves_nothing(tus: RunningServer, user: httpx.Client, user_id: str) -> None:
    with socket.create_connection((tus.host, tus.port)) as connection:
        request = f"POST {ENDPOINT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {tus.api_key}\r\nX-User-Id: {user_id}\r\n"
        request += "".join(f"{name}: {value}\r\n" for name, value in PIECE.items())
        connection.sendall(f"{request}Upload-Length: {len(BODY)}\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY[:1_000])
        until(lambda: usage(user) == (0, len(BODY)))
    until(lambda: usage(user) == (0, 0))


def test_no_bytes_at_all_are_done_at_once(user: httpx.Client) -> None:
    """Whatever that means: no kind of file is empty."""
    for answer in (post(user, 0), post(user, 0, content=b"")):
        assert code(answer) == (415, "unsupported_type")
    assert usage(user) == (0, 0)


def test_an_empty_part_is_whole_at_once(user: httpx.Client) -> None:
    parts = [create(user, 0, Upload_Concat="partial"), create(user, len(BODY), content=BODY, Upload_Concat="partial")]
    answer = post(user, Upload_Concat="final;" + " ".join(parts))
    assert content(user, answer.headers["coffer-file-id"]) == BODY


def test_a_length_that_is_told_later(user: httpx.Client) -> None:
    path = create(user)
    answer = head(user, path)
    assert (answer.headers["upload-defer-length"], answer.headers["upload-offset"]) == ("1", "0")
    assert "upload-length" not in answer.headers and usage(user) == (0, 0)
    assert patch(user, path, 0, BODY[:1_000]).status_code == 204
    assert usage(user)[1] >= 1_000  # grows by steps
    assert code(patch(user, path, 1_000, BODY[1_000:2_000], Upload_Length="999")) == (400, "invalid_request")
    answer = patch(user, path, 1_000, BODY[1_000:2_000], Upload_Length=str(len(BODY)))
    assert (answer.status_code, usage(user)) == (204, (0, len(BODY)))
    answer = head(user, path)
    assert answer.headers["upload-length"] == str(len(BODY)) and "upload-defer-length" not in answer.headers
    assert code(patch(user, path, 2_000, BODY[2_000:], Upload_Length="2001")) == (400, "invalid_request")
    assert patch(user, path, 2_000, BODY[2_000:3_000], Upload_Length=str(len(BODY))).status_code == 204
    assert content(user, patch(user, path, 3_000, BODY[3_000:]).headers["coffer-file-id"]) == BODY
    assert usage(user) == (len(BODY), 0)


def test_a_length_that_is_told_at_the_very_end(user: httpx.Client) -> None:
    path = create(user, content=BODY)
    assert offset(user, path) == len(BODY)
    answer = patch(user, path, len(BODY), b"", Upload_Length=str(len(BODY)))
    assert content(user, answer.headers["coffer-file-id"]) == BODY


def test_a_finished_upload_is_recorded(tus: RunningServer, user: httpx.Client, user_id: str) -> None:
    path = create(user, 1_000, content=BODY[:500])
    assert not [each for each in trail(tus) if each["file_id"] == str(upload_id(path))]
    request_id = str(uuid4())
    patch(user, path, 500, BODY[500:1_000], X_Request_Id=request_id)
    (record,) = [each for each in trail(tus) if each["file_id"] == str(upload_id(path))]
    assert (record["action"], record["detail"]) == ("file.created", {"mime_type": "image/png", "file_size": 1_000})
    assert (record["actor_kind"], record["actor_id"], record["user_id"]) == ("api_key", tus.api_key.split("_")[1], user_id)
    assert record["request_id"] == request_id


def test_a_lost_connection_of_the_listener_interrupts_nobody(tus: RunningServer, user: httpx.Client, user_id: str) -> None:
    """What was missed meanwhile cannot have been a wish for this upload that is not told again."""
    path = create(user, len(BODY), content=BODY[:1])

    def listener() -> int | None:
        statement = "select pid from pg_stat_activity where application_name = 'coffer notices' and query ~* '^(listen|select)'"
        return next((row["pid"] for row in execute(tus.database_url, statement)), None)

    before = until(listener)
    with socket.create_connection((tus.host, tus.port)) as connection:
        request = f"PATCH {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {tus.api_key}\r\nX-User-Id: {user_id}\r\n"
        request += "".join(f"{name}: {value}\r\n" for name, value in PIECE.items())
        connection.sendall(f"{request}Upload-Offset: 1\r\nContent-Length: {len(BODY) - 1}\r\n\r\n".encode() + BODY[1:100_000])
        held = "select held_by from resumable_uploads where id = $1 and held_by is not null"
        until(lambda: execute(tus.database_url, held, upload_id(path)))
        execute(tus.database_url, "select pg_terminate_backend($1)", before)
        until(lambda: listener() not in (None, before))
        connection.sendall(BODY[100_000:])
        assert connection.makefile("rb").readline().split()[1] == b"204"
    assert usage(user) == (len(BODY), 0)


# Metadata


def test_metadata_becomes_the_files_fields(user: httpx.Client) -> None:
    sent = metadata(filename="słońce.png", filetype="text/html", type="image", package_name="p", tags="a, b", note="", album="2026")
    answer = post(user, 1_000, content=BODY[:1_000], Upload_Metadata=sent)
    found = file(user, answer.headers["coffer-file-id"])
    assert (found["file_name"], found["file_type"], found["mime_type"]) == ("słońce.png", "image", "image/png")
    assert (found["package_name"], found["tags"], found["metadata"]) == ("p", ["a", "b"], {"note": "", "album": "2026"})
    assert head(user, answer.headers["location"]).headers["upload-metadata"] == sent


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ("filename", None),
        ("a YQ==,,b", "Upload-Metadata"),
        ("\u00a0", "Upload-Metadata"),
        (metadata(k="\x00"), "metadata"),
        (metadata(filename="a\nb"), "name"),
        (metadata(tags="x" * 101), "tags"),
        (metadata(type="picture"), "type"),
        (metadata(package_name="\x7f"), "package_name"),
    ],
)
def test_metadata_that_is_refused(user: httpx.Client, sent: str, field: str | None) -> None:
    answer = user.post(ENDPOINT, headers=raw(VERSION | {"Upload-Length": "5", "Upload-Metadata": sent}))
    if field is None:
        assert answer.status_code == 201 and head(user, answer.headers["location"]).headers["upload-metadata"] == sent
    else:
        assert (code(answer), answer.json()["field"]) == ((400, "invalid_request"), field)


visible = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "Upload-Length": st.sampled_from(["0", "5", "-1", "9" * 30, "x", ""]) | visible,
            "Upload-Defer-Length": st.sampled_from(["1", "0", ""]),
            "Upload-Metadata": visible | st.sampled_from(["filename YQ==", "a AA==", "a 77+9"]),
            "Upload-Concat": st.sampled_from(["partial", f"final;{MISSING}", "final;http://[", "final;"]) | visible,
            "Upload-Checksum": visible | st.sampled_from(["sha1 YQ==", "crc32 YQ=="]),
            "Upload-Link": visible | st.sampled_from(["http://[", "/u/x"]),
            "X-HTTP-Method-Override": st.sampled_from(["PATCH", "head", "PUT", ""]) | visible,
            "Content-Type": st.sampled_from([PIECE["Content-Type"], "text/plain"]) | visible,
        },
    ),
    st.sampled_from([ENDPOINT, MISSING, ENDPOINT + "x", "/api/tus//"]),
)
def test_no_header_is_more_than_refused(tus: RunningServer, headers: dict[str, str], path: str) -> None:
    with tus.client("fuzzed") as client:
        answer = client.post(path, headers=raw(VERSION | {name: value.strip() for name, value in headers.items()}))
        assert answer.status_code < 500, answer.text
        if answer.status_code == 201:
            assert delete(client, answer.headers["location"]).status_code == 204


# Refusals


def test_a_wrong_offset(user: httpx.Client) -> None:
    path = create(user, len(BODY), content=BODY[:1_000])
    for wrong in (0, 999, 1_001, len(BODY)):
        answer = patch(user, path, wrong, BODY[wrong:])
        assert (code(answer), answer.json()["offset_bytes"]) == ((409, "offset_mismatch"), 1_000)
    for text in ("", "x", "-1", "1e3", "\u00b2"):
        answer = user.patch(path, headers=raw(PIECE | {"Upload-Offset": text}), content=b"x")
        assert (code(answer), answer.json()["field"]) == ((400, "invalid_request"), "Upload-Offset"), text
    assert user.patch(path, headers=PIECE, content=b"x").status_code == 400
    assert offset(user, path) == 1_000


@pytest.mark.parametrize("version", [None, "0.2.2", "1.0.0, 0.2.2", ""])
def test_another_version(user: httpx.Client, version: str | None) -> None:
    path = create(user, 1_000)
    sent = {} if version is None else {"Tus-Resumable": version}
    for method, target in (("POST", ENDPOINT), ("HEAD", path), ("PATCH", path), ("DELETE", path), ("PATCH", MISSING)):
        answer = user.request(method, target, headers=PIECE | {"Upload-Length": "5", "Upload-Offset": "0", "Tus-Resumable": ""} | sent)
        assert (answer.status_code, answer.headers["tus-version"]) == (412, "1.0.0"), method
    assert (offset(user, path), usage(user)) == (0, (0, 1_000))


@pytest.mark.parametrize("content_type", [None, "", "application/octet-stream", "image/png", PIECE["Content-Type"] + "; a=b"])
def test_another_content_type(user: httpx.Client, content_type: str | None) -> None:
    path = create(user, 1_000)
    sent = VERSION | {"Upload-Offset": "0", "Upload-Length": "1000"} | ({} if content_type is None else {"Content-Type": content_type})
    assert user.patch(path, headers=sent, content=BODY[:1_000]).status_code == 415
    if content_type is not None:
        assert user.post(ENDPOINT, headers=sent, content=BODY[:1_000]).status_code == 415
    assert (offset(user, path), usage(user)) == (0, (0, 1_000))


def test_a_creation_without_a_body_may_have_any_content_type(user: httpx.Client) -> None:
    """Browsers and their libraries send one unasked."""
    assert post(user, 5, Content_Type="text/plain").status_code == 201
    assert post(user, 5, Content_Type="application/json", Content_Length="0").status_code == 201


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "md5"])
def test_a_wrong_checksum_rolls_the_piece_back(user: httpx.Client, algorithm: str) -> None:
    body = video(3 * 2**20)
    path = create(user, len(body), content=body[:1_000], Upload_Checksum=checksum(algorithm, body[:1_000]))
    damaged = body[1_000:-1] + bytes([body[-1] ^ 1])
    for piece in (damaged, damaged[:500]):
        answer = patch(user, path, 1_000, piece, Upload_Checksum=checksum(algorithm, body[1_000:]))
        assert code(answer) == (460, "checksum_mismatch")
        assert offset(user, path) == 1_000
    assert code(patch(user, path, 1_000, b"x", Upload_Checksum="crc32 YQ==")) == (400, "invalid_request")
    answer = patch(user, path, 1_000, body[1_000:], Upload_Checksum=checksum(algorithm, body[1_000:]))
    assert content(user, answer.headers["coffer-file-id"]) == body


def test_more_than_declared(user: httpx.Client) -> None:
    path = create(user, 1_000)
    assert code(patch(user, path, 0, BODY[:1_001])) == (413, "file_too_large")
    at = offset(user, path)
    assert at <= 1_000
    assert content(user, patch(user, path, at, BODY[at:1_000]).headers["coffer-file-id"]) == BODY[:1_000]
    assert usage(user) == (1_000, 0)


def test_more_than_any_file_may_have(user: httpx.Client) -> None:
    answer = post(user, 6 * 2**20 + 1)
    assert (code(answer), answer.json()["limit_bytes"]) == ((413, "file_too_large"), 6 * 2**20)
    path = create(user)
    assert code(patch(user, path, 0, b"", Upload_Length=str(6 * 2**20 + 1))) == (413, "file_too_large")
    assert head(user, path).headers["upload-defer-length"] == "1"


def test_an_expired_upload_is_gone(tus: RunningServer, user: httpx.Client) -> None:
    path = create(user, 1_000, content=BODY[:500])
    expire(tus, path)
    assert head(user, path).status_code == 410
    assert code(patch(user, path, 500, BODY[500:1_000])) == code(delete(user, path)) == (410, "upload_expired")
    until(lambda: usage(user) == (0, 0))
    until(lambda: str(upload_id(path)) not in tus.incoming())
    assert head(user, path).status_code == 410


def test_the_expiry_moves_with_each_piece(tus: RunningServer, user: httpx.Client) -> None:
    path = create(user, 1_000)
    execute(tus.database_url, "update resumable_uploads set expires_at = now() + interval '1 minute' where id = $1", upload_id(path))

    def left(answer: httpx.Response) -> timedelta:
        return parsedate_to_datetime(answer.headers["upload-expires"]) - datetime.now(UTC)

    assert left(head(user, path)) <= timedelta(minutes=1)
    for answer in (patch(user, path, 0, BODY[:500]), head(user, path)):
        assert timedelta(hours=23) < left(answer) <= timedelta(days=1)


def test_what_was_ended_is_not_there(tus: RunningServer, user: httpx.Client) -> None:
    path = create(user, 1_000, content=BODY[:500])
    answer = delete(user, path)
    assert (answer.status_code, answer.content, answer.headers["tus-resumable"]) == (204, b"", "1.0.0")
    assert head(user, path).status_code == 404
    assert code(patch(user, path, 500, BODY[500:1_000])) == code(delete(user, path)) == (404, "not_found")
    assert usage(user) == (0, 0) and str(upload_id(path)) not in tus.incoming()


def test_ending_a_finished_upload_leaves_its_file(user: httpx.Client) -> None:
    answer = post(user, 1_000, content=BODY[:1_000])
    assert delete(user, answer.headers["location"]).status_code == 204
    assert head(user, answer.headers["location"]).status_code == 404
    assert content(user, answer.headers["coffer-file-id"]) == BODY[:1_000]
    assert usage(user) == (1_000, 0)


@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
def test_other_methods(user: httpx.Client, method: str) -> None:
    answer = user.request(method, create(user, 5), headers=VERSION)
    assert answer.status_code == 405 and "patch" in names(answer.headers["allow"])
    if method != "POST":
        answer = user.request(method, ENDPOINT, headers=VERSION)
        assert answer.status_code == 405 and "post" in names(answer.headers["allow"])


def test_a_method_within_a_post(user: httpx.Client) -> None:
    def override(method: str, path: str, **options: Any) -> httpx.Response:
        sent = PIECE | {"X-HTTP-Method-Override": method} | options.pop("headers", {})
        return user.post(path, headers=sent, **options)

    path = create(user, 1_000)
    answer = override("PATCH", path, headers={"Upload-Offset": "0"}, content=BODY[:500])
    assert (answer.status_code, answer.headers["upload-offset"]) == (204, "500")
    answer = override("HEAD", path)
    assert (answer.status_code, answer.headers["upload-offset"], answer.content) == (200, "500", b"")
    assert override("PUT", path).status_code == override("PATCH", ENDPOINT).status_code == 405
    assert override("DELETE", path).status_code == 204
    assert head(user, path).status_code == 404
    assert override("POST", ENDPOINT, headers={"Upload-Length": "5"}).status_code == 201


@pytest.mark.parametrize("name", ["Upload-Offset", "Upload-Length", "Upload-Checksum", "Upload-Metadata", "Tus-Resumable", "Content-Type"])
def test_a_header_that_comes_twice(user: httpx.Client, name: str) -> None:
    path = create(user, 1_000)
    sent = PIECE | {"Upload-Offset": "0", "Upload-Checksum": checksum("md5", b"x")}
    again = (name, sent.get(name, "1000"))
    for method, target in (("PATCH", path), ("POST", ENDPOINT)):
        answer = user.request(method, target, headers=[*({name: again[1]} | sent).items(), again], content=b"x")
        assert (code(answer), answer.json()["field"]) == ((400, "invalid_request"), name.lower())
    assert (offset(user, path), usage(user)) == (0, (0, 1_000))


# Whose it is


def test_nobody_gets_anything(nobody: httpx.Client, user: httpx.Client) -> None:
    path = create(user, 1_000)
    reader = {"Authorization": "Bearer nonsense", "X-User-Id": "ada"}
    for headers in ({}, reader):
        for method, target in (("POST", ENDPOINT), ("GET", ENDPOINT), *((each, path) for each in ("HEAD", "PATCH", "DELETE", "GET"))):
            for sent in (PIECE | {"Upload-Length": "5", "Upload-Offset": "0"}, {}, {"Upload-Offset": "x", "Upload-Metadata": ",,"}):
                assert nobody.request(method, target, headers=headers | sent).status_code == 401, (method, target)
    assert (offset(user, path), usage(user)) == (0, (0, 1_000))


def test_a_key_needs_the_right_to_write(tus: RunningServer, user: httpx.Client, user_id: str) -> None:
    path = create(user, 1_000)
    with tus.client(user_id, api_key=tus.new_key(Scope.FILES_READ)) as reader:
        assert code(post(reader, 5)) == code(patch(reader, path, 0, b"x")) == code(delete(reader, path)) == (403, "forbidden")
        assert head(reader, path).status_code == 403


def test_somebody_elses_upload_is_not_there(tus: RunningServer, user: httpx.Client) -> None:
    """The same answer as for one that never was, on every verb."""
    part = create(user, 500, content=BODY[:500], Upload_Concat="partial")
    done = httpx.URL(post(user, 1_000, content=BODY[:1_000]).headers["location"]).path
    for path in (create(user, 1_000, content=BODY[:500]), part, done):
        with tus.client("mallory") as other:
            capitals = ENDPOINT + str(upload_id(path)).upper()
            for send in (head, delete, lambda client, at: patch(client, at, 500, b"x"), lambda client, at: patch(client, at, 0, b"x")):
                answers = [send(other, target) for target in (path, MISSING, ENDPOINT + "x", f"{MISSING}/x", capitals)]
                assert [answer.status_code for answer in answers] == [404] * 5
                assert len({answer.headers.get("content-length") for answer in answers}) == 1
            assert code(post(other, Upload_Concat=f"final;{path}")) == (400, "invalid_request")
            assert usage(other) == (0, 0)
    assert offset(user, part) == 500


def test_a_key_for_some_kinds(tus: RunningServer, user_id: str) -> None:
    body = video(300_000)
    with tus.client(user_id, api_key=new_key(tus.database_url, kinds=["video"]).text) as films:
        path = create(films, len(BODY))
        answer = patch(films, path, 0, BODY[:100_000])
        assert code(answer) == (415, "unsupported_type") and {each.partition("/")[0] for each in answer.json()["allowed"]} == {"video"}
        assert head(films, path).status_code == 404  # it never could have been finished
        answer = post(films, len(body), content=body)
        assert answer.status_code == 201
        parts = [create(films, 1_000, content=BODY[:1_000], Upload_Concat="partial") for _ in "ab"]
        assert code(post(films, Upload_Concat="final;" + " ".join(parts))) == (415, "unsupported_type")
        assert usage(films) == (len(body), 0)


# Quota


def test_the_quota_is_held_from_the_start(tus: RunningServer, user: httpx.Client, user_id: str) -> None:
    tus.set_quota(user_id, 1_000)
    path = create(user, 600)
    answer = post(user, 401)
    assert (code(answer), answer.json()["used_bytes"], answer.json()["needed_bytes"]) == ((413, "quota_exceeded"), 600, 401)
    assert code(user.post("/api/files/upload", content=image(401))) == (413, "quota_exceeded")
    deferred = create(user)
    assert code(patch(user, deferred, 0, b"", Upload_Length="401")) == (413, "quota_exceeded")
    assert code(patch(user, deferred, 0, BODY[:401])) == (413, "quota_exceeded")
    assert usage(user)[0] == 0
    assert delete(user, deferred).status_code == delete(user, path).status_code == 204
    assert usage(user) == (0, 0)
    assert post(user, 1_000, content=BODY[:1_000]).status_code == 201
    assert usage(user) == (1_000, 0)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_type_is_refused_as_soon_as_its_bytes_are_there(user: httpx.Client, deferred: bool) -> None:
    path = create(user, None if deferred else 2_000_000)
    answer = patch(user, path, 0, b"plain text, of no use to anybody. " * 10_000)
    assert (answer.status_code, usage(user)) == (415, (0, 0))
    assert head(user, path).status_code == 404


def test_a_type_is_refused_at_the_end_too(tus: RunningServer, user: httpx.Client) -> None:
    path = create(user, 300_000, Upload_Metadata=metadata(type="audio"))
    assert patch(user, path, 0, video(300_000)[:299_999]).status_code == 204  # what follows may show that it is M4A
    assert code(patch(user, path, 299_999, b"x")) == (415, "type_mismatch")
    assert usage(user) == (0, 0) and str(upload_id(path)) not in tus.incoming()


def test_too_many_unfinished_uploads(user: httpx.Client) -> None:
    paths = [create(user, 1_000) for _ in range(MOST_UPLOADS)]
    answer = post(user, 1_000)
    assert (code(answer), answer.json()["limit"]) == ((429, "too_many_uploads"), MOST_UPLOADS)
    assert usage(user) == (0, 1_000 * MOST_UPLOADS)
    assert user.post("/api/files/upload", content=image(50)).status_code == 201
    assert patch(user, paths[0], 0, BODY[:1_000]).status_code == 204  # finished ones do not count
    assert delete(user, create(user, 5)).status_code == 204
    assert create(user, 5)


# Concatenation


def test_parts_become_one_file(tus: RunningServer, user: httpx.Client) -> None:
    tus.set_quota(user.headers["x-user-id"], len(BODY))
    cuts = [0, 1, 150_000, len(BODY)]
    parts = []
    for begin, end in pairwise(cuts):
        path = create(user, end - begin, Upload_Concat="partial")
        assert head(user, path).headers["upload-concat"] == "partial"
        answer = patch(user, path, 0, BODY[begin:end])
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(end - begin)) and "coffer-file-id" not in answer.headers
        parts.append(path)
    assert usage(user) == (0, len(BODY))
    addresses = " ".join([parts[0], *(tus.url + each for each in parts[1:])])

    def join() -> httpx.Response:
        return post(user, Upload_Concat=f"final;{addresses}", Upload_Metadata=metadata(name="a.png"))

    answer = join()
    assert (answer.status_code, answer.headers["upload-offset"]) == (201, str(len(BODY)))
    file_id, path = answer.headers["coffer-file-id"], answer.headers["location"]
    assert content(user, file_id) == BODY and file(user, file_id)["file_name"] == "a.png"
    assert usage(user) == (len(BODY), 0)
    again = join()
    assert (again.status_code, again.headers["coffer-file-id"], again.headers["location"]) == (201, file_id, path)
    assert usage(user) == (len(BODY), 0)
    answer = head(user, path)
    assert (answer.headers["upload-length"], answer.headers["upload-offset"]) == (str(len(BODY)), str(len(BODY)))
    assert answer.headers["upload-concat"] == f"final;{' '.join(parts)}"
    assert patch(user, path, len(BODY), b"x").status_code == patch(user, path, 0, b"x").status_code == 403
    assert not {str(upload_id(part)) for part in parts} & set(tus.incoming())


def test_parts_that_cannot_be_joined(user: httpx.Client) -> None:
    whole = create(user, 1_000, content=BODY[:1_000], Upload_Concat="partial")
    started = create(user, 1_000, content=BODY[:500], Upload_Concat="partial")
    deferred = create(user, content=BODY[:500], Upload_Concat="partial")
    no_part = create(user, 1_000, content=BODY[:500])
    for parts in ([whole, started], [whole, deferred], [whole, no_part], [whole, MISSING], [whole, whole], []):
        answer = post(user, Upload_Concat="final;" + " ".join(parts))
        assert (code(answer), answer.json()["field"]) == ((400, "invalid_request"), "Upload-Concat")
    assert code(post(user, 2_000, Upload_Concat=f"final;{whole}")) == (400, "invalid_request")
    assert usage(user)[0] == 0
    assert post(user, Upload_Concat=f"final;{whole}").headers["coffer-file-id"]


# Addresses


@pytest.mark.parametrize(
    ("environment", "headers", "expected"),
    [
        ({}, {}, "{url}"),
        ({}, {"Host": "media.example.com:8443"}, "http://media.example.com:8443"),
        ({}, {"Host": "media.example.com", "X-Forwarded-Proto": "https"}, "http://media.example.com"),
        (
            {"COFFER_TRUSTED_PROXIES": "127.0.0.1"},
            {"Host": "media.example.com", "X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.1"},
            "https://media.example.com",
        ),
        ({"COFFER_PUBLIC_URL": "https://media.example.com/store/"}, {"Host": "inside"}, "https://media.example.com/store"),
        ({"COFFER_TUS_ABSOLUTE_LOCATIONS": "no", "COFFER_PUBLIC_URL": "https://media.example.com"}, {}, ""),
    ],
)
def test_where_an_upload_is(start_server: ServerFactory, environment: dict[str, Any], headers: dict[str, str], expected: str) -> None:
    server = start_server(**environment)
    with server.client("ada") as ada:
        answer = post(ada, 1_000, Upload_Concat="partial", content=BODY[:1_000], **headers)
        location = answer.headers["location"]
        assert location.startswith(f"{expected.format(url=server.url)}{ENDPOINT}")
        assert post(ada, Upload_Concat=f"final;{location}").headers["coffer-file-id"]  # and that is what it is called


# Upload links


def linked(server: RunningServer, link: dict[str, Any]) -> httpx.Client:
    """Somebody who has nothing but that link."""
    return httpx.Client(base_url=server.url, headers={"Upload-Link": link["url"]})


def test_a_link_takes_one_upload(tus: RunningServer, user: httpx.Client, user_id: str) -> None:
    link = upload_link(user, package_name="p", tags=["a"], metadata={"k": 1})
    with linked(tus, link) as browser:
        assert usage(user) == (0, 400_000)
        path = create(browser, len(BODY), Upload_Metadata=metadata(filename="mine.png", tags="x", album="no"))
        assert upload_id(path) == upload_id(link["file_id"])
        assert code(post(browser, 5)) == (409, "link_used")
        assert patch(browser, path, 0, BODY[:1_000]).status_code == 204
        assert offset(browser, path) == offset(user, path) == 1_000
        answer = patch(browser, path, 1_000, BODY[1_000:])
        assert answer.headers["coffer-file-id"] == link["file_id"]
        for again in (post(browser, len(BODY)), httpx.put(tus.url + link["url"], content=BODY)):
            assert code(again) == (409, "link_used")
        assert offset(browser, path) == len(BODY)
    found = file(user, link["file_id"])
    assert (found["file_name"], found["package_name"], found["tags"], found["metadata"]) == ("mine.png", "p", ["a"], {"k": 1})
    assert content(user, link["file_id"]) == BODY and usage(user) == (len(BODY), 0)
    (record,) = [each for each in trail(tus) if each["file_id"] == link["file_id"] and each["action"] == "file.created"]
    assert (record["actor_kind"], record["actor_id"], record["user_id"]) == ("upload_link", link["file_id"], user_id)


@pytest.mark.parametrize("form", ["{path}", "{token}", "{url}{path}"])
def test_a_link_in_any_form(tus: RunningServer, user: httpx.Client, form: str) -> None:
    link = upload_link(user)
    text = form.format(path=link["url"], token=link["url"].rpartition("/")[2], url=tus.url)
    with linked(tus, {"url": text}) as browser:
        assert post(browser, len(BODY), content=BODY).headers["coffer-file-id"] == link["file_id"]


def test_a_link_whose_first_answer_was_lost(tus: RunningServer, user: httpx.Client) -> None:
    link = upload_link(user)
    with linked(tus, link) as browser:
        sent = metadata(filename="a.png")
        path = create(browser, len(BODY), Upload_Metadata=sent)
        assert create(browser, len(BODY), Upload_Metadata=sent) == path
        assert code(post(browser, len(BODY))) == code(post(browser, 5, Upload_Metadata=sent)) == (409, "link_used")
        patch(browser, path, 0, BODY[:1])
        assert code(post(browser, len(BODY), Upload_Metadata=sent)) == (409, "link_used")


def test_a_link_that_ends_while_its_upload_is_under_way(tus: RunningServer, user: httpx.Client) -> None:
    def begun(seconds: int) -> tuple[dict[str, Any], str] | None:
        link = upload_link(user, ttl_seconds=seconds)
        with linked(tus, link) as browser:
            answer = post(browser, len(BODY), content=BODY[:1_000])
        return (link, httpx.URL(answer.headers["location"]).path) if answer.status_code == 201 else None

    link, path = before_its_end(begun)
    with linked(tus, link) as browser, linked(tus, upload_link(user, ttl_seconds=1)) as late:
        until(lambda: code(post(late)) == (403, "link_expired"))  # until then it lacks a length
        until(lambda: code(post(browser, 5)) == (403, "link_expired"))
        assert offset(browser, path) == 1_000
        assert patch(browser, path, 1_000, BODY[1_000:]).headers["coffer-file-id"] == link["file_id"]


def test_a_link_is_good_for_its_own_upload_alone(tus: RunningServer, user: httpx.Client) -> None:
    link, mine = upload_link(user), create(user, 1_000)
    with linked(tus, link) as browser:
        for path in (mine, MISSING, f"{ENDPOINT}{link['file_id']}"):
            assert head(browser, path).status_code == 404
            assert code(patch(browser, path, 0, b"x")) == code(delete(browser, path)) == (404, "not_found")
        for concat in ("partial", f"final;{mine}"):
            assert code(post(browser, 5, Upload_Concat=concat)) == (400, "invalid_request")
        assert code(post(browser, 400_001)) == (413, "file_too_large")
        path = create(browser)
        assert code(patch(browser, path, 0, image(400_001))) == (413, "file_too_large")
        assert delete(browser, path).status_code == 204
        assert usage(user) == (0, 401_000)  # the link is as it was
        assert post(browser, len(BODY), content=BODY).status_code == 201
    assert usage(user) == (len(BODY), 1_000)


def test_a_link_for_some_types(tus: RunningServer, user: httpx.Client) -> None:
    with linked(tus, upload_link(user, types=["video"])) as browser:
        for _ in range(2):
            path = create(browser, len(BODY))
            assert code(patch(browser, path, 0, BODY)) == (415, "unsupported_type")
        assert post(browser, 5_000, content=video(5_000)).status_code == 201


def test_links_that_are_none(tus: RunningServer, user: httpx.Client, nobody: httpx.Client) -> None:
    url = upload_link(user)["url"]
    for text in ("", "/u/", "x", "http://[", url[:-1], url + "A", url.swapcase(), "\u00e9"):
        for method, path in (("POST", ENDPOINT), ("HEAD", MISSING), ("PATCH", MISSING), ("DELETE", MISSING)):
            answer = nobody.request(method, path, headers=raw(VERSION | {"Upload-Link": text}))
            assert answer.status_code == 403, text
    twice = [*VERSION.items(), ("Upload-Length", "5"), ("Upload-Link", url), ("Upload-Link", url)]
    assert code(nobody.post(ENDPOINT, headers=twice)) == (400, "invalid_request")
    assert "Upload-Link" not in tus.logged() and url.rpartition("/")[2] not in tus.logged()


# Scanning


def test_an_infected_upload_is_gone(start_server: ServerFactory, clamd: Clamd) -> None:
    body = infected(image(2_000_000))
    with (server := start_server(COFFER_CLAMD=clamd.unix)).client("ada") as ada:
        path = create(ada, len(body), content=body[:1_500_000])
        assert code(patch(ada, path, 1_500_000, body[1_500_000:])) == (422, "infected")
        assert head(ada, path).status_code == 404
        assert (usage(ada), server.incoming(), server.stored_paths()) == ((0, 0), [], [])
        assert post(ada, 2_000_000, content=image(2_000_000)).headers["coffer-file-id"]


def test_an_upload_waits_for_the_scanner(start_server: ServerFactory) -> None:
    """Its client has sent all of it and will not send it again: it is published when it asks."""
    with clamd_running() as clamd, (server := start_server(COFFER_CLAMD=clamd.unix)).client("ada") as ada:
        path = create(ada, len(BODY))
        clamd.stop()
        assert code(patch(ada, path, 0, BODY)) == (503, "scanner_unavailable")
        assert head(ada, path).status_code == 503
        assert usage(ada) == (0, len(BODY))
        clamd.start()
        answer = head(ada, path)
        assert (answer.status_code, answer.headers["upload-offset"]) == (200, str(len(BODY)))
        assert content(ada, answer.headers["coffer-file-id"]) == BODY
        assert server.incoming() == []
