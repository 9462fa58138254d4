"""17: requests generated from the OpenAPI description, and noise for every parser of what clients send: no 500, no crash."""

import base64
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from server import fields
from server.api.multipart import FormReader
from server.api.users import decoded
from server.auth import api_keys
from server.delivery import Links
from server.delivery.conditions import evaluate, http_date, range_applies
from server.delivery.headers import content_disposition, etag
from server.delivery.links import name_segment
from server.delivery.ranges import requested_range
from server.errors import CofferError
from server.kinds import detect
from tests.attack.target import MISSING, Tally, Target
from tests.attack.wire import request
from tests.serving import DEFAULTS

CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
_LAST_CHANGE = datetime(2026, 1, 1, tzinfo=UTC)


def attack(target: Target, tally: Tally) -> str:
    # Without thoroughness, tests/api/test_schema.py does as much beside this.
    generated = _generate(target, tally) if target.thorough else "no requests"
    parsed = _fuzz_parsers(target, tally)
    target.wire.close()  # the server may have, meanwhile
    sent = _send_noise(target, tally)
    return f"{generated} by schemathesis, {sent:,} of noise, {parsed:,} texts for {len(_parsers())} parsers: 0 answered 500, 0 crashes"


def _generate(target: Target, tally: Tally) -> str:
    """One run of the generator with ids and links that exist, so that more than refusals are met."""
    client = target.user("generated")
    file_id = target.upload(client)["id"]
    token, name = target.link(client, file_id).removeprefix("/f/").split("/")
    public_id = target.public_url(client, file_id).removeprefix("/p/")
    directory = target.scratch / "schemathesis"
    directory.mkdir(exist_ok=True)
    (directory / "schemathesis.toml").write_text(
        f"""
        headers = {{ Authorization = "Bearer {target.server.api_key}", X-User-Id = "generated" }}
        [[operations]]
        include-path-regex = "file_id"
        include-method = ["GET", "PUT", "POST", "HEAD", "PATCH"]
        parameters = {{ "path.file_id" = "{file_id}" }}
        [[operations]]
        include-path-regex = "^/f/"
        parameters = {{ "path.token" = "{token}", "path.name" = "{name}" }}
        [[operations]]
        include-path-regex = "^/p/"
        parameters = {{ "path.public_id" = "{public_id}" }}
        [[operations]]
        include-path = "/api/generate/events/{{job_id}}"
        enabled = false  # it does not end
        [[operations]]
        include-path = "/api/files/{{file_id}}/provenance"
        enabled = false  # it waits for a worker, and there is none
        """
    )
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        "schemathesis.toml",
        "run",
    ]
    options = ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "30", "--seed", "2", "--no-shrink"]
    # One user may be erased in the course of it: whatever it finds there is part of the attack.
    with target.another_server(COFFER_PREVIEW_WAIT_SECONDS="0") as server:  # no worker runs that could be waited for
        command.append(f"{server.url}/schema/openapi.json")
        ran = subprocess.run([*command, *options], cwd=directory, check=False, capture_output=True, text=True, timeout=400)
    tally.check(ran.returncode == 0, f"schemathesis: {ran.stdout[-3_000:]} {ran.stderr[-1_000:]}")
    client.close()
    found = re.search(r"([0-9]+) generated", ran.stdout)
    tally.check(found, f"schemathesis says nothing of what it generated: {ran.stdout[-1_000:]}")
    return f"{int(found[1]):,} requests" if found else "no requests"


def _parsers() -> dict[str, Callable[[str], Any]]:
    """Everything in the server that reads a text of the client's, by what may be said to it. Only our own errors may come out."""
    links = Links([DEFAULTS["COFFER_LINK_KEYS"]])

    def form(text: str) -> None:
        reader = FormReader("multipart/form-data; boundary=b")
        reader.feed(b'--b\r\nContent-Disposition: form-data; name="file"; ' + text.encode("latin-1", "replace"))
        reader.close()

    def conditions(text: str) -> None:
        for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since"):
            evaluate("GET", {name: text}, etag(bytes(32)), _LAST_CHANGE)

    def signed(text: str) -> None:
        """What only we can sign: an old or a later version of us may have."""
        payload = base64.urlsafe_b64encode(text.encode("latin-1", "replace")).decode().rstrip("=")
        signature = links._downloads[0].get_signature(f"{payload}/x".encode()).decode()
        links.verify_download(f"{payload}.{signature}", "x")

    return {
        "Range": lambda text: requested_range(_header(text), 1_000),
        "If-Range": lambda text: range_applies(_header(text), etag(bytes(32)), _LAST_CHANGE, date_is_strong=True),
        "conditions": lambda text: conditions(_header(text)),
        "dates": lambda text: http_date(_header(text)),
        "a download token": lambda text: links.verify_download(*(text.split("/", 1) if "/" in text else (text, text))),
        "an upload token": links.verify_upload,
        "a signed payload": signed,
        "an API key": lambda text: api_keys.parse(_header(text)),
        "a user's segment": lambda text: decoded(_header(text)),
        "a form": form,
        "a form's type": lambda text: FormReader(f"multipart/form-data; {_header(text)}"),
        "metadata": fields.parse_metadata,
        "tags": fields.parse_tags,
        "a name": fields.clean_name,
        "a name for a header": lambda text: content_disposition("inline", text).encode("ascii"),
        "a name for a link": lambda text: name_segment(text).encode("ascii"),
        "bytes": lambda text: detect(text.encode("latin-1", "replace")),
    }


_BITS = [
    *("bytes=", "0-", "-1", ",", "W/", '"', '"a"', "*", "Mon, 01 Jan 2026 00:00:00 GMT", "=", ":", ";", "filename=", "filename*="),
    *("UTF-8''", "%", "%2e"),
    *("boundary=", "b", "--b", "--b--", "\r\n", "\r\n\r\n", "{", "}", '{"a":', "[", "1e999", "\\ud800", "\0", "\ud800", "é", "🌅", "/"),
    *(".", "-", "_"),
    *("A" * 43, "AQ", "cof_", "a" * 16, "9" * 50, "٣", "\x89PNG", "RIFF", "\xff\xfb", "ID3", "OggS", "\x1aE\xdf\xa3", "\0\0\0\x14ftyp"),
    *("glTF", "PK\x03\x04"),
]


def _fuzz_parsers(target: Target, tally: Tally) -> int:
    return sum(_fuzz(tally, what, parse, target.many(1_000, 60)) for what, parse in _parsers().items())


def _fuzz(tally: Tally, what: str, parse: Callable[[str], Any], most: int) -> int:
    """Returns how many texts the parser was given."""
    told = 0
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it tells of every character that it does not like

    @seed(1)
    @settings(max_examples=most, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(st.text(max_size=200), st.lists(st.sampled_from(_BITS), max_size=12).map("".join), st.binary(max_size=120).map(_latin))
    )
    def try_text(text: str) -> None:
        nonlocal told
        told += 1
        try:
            parse(text)
        except CofferError:
            pass
        except Exception as problem:  # noqa: BLE001 - each is a breach
            tally.check(False, f"{what}: {text!r} raised {problem!r}")

    try_text()
    return told


def _header(text: str) -> str:
    """As a header's value comes from the wire: every octet a character."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


def _latin(raw: bytes) -> str:
    return raw.decode("latin-1")


def _send_noise(target: Target, tally: Tally) -> int:
    """The same bits in every place of a request, to the routes that are not Litestar's; what is no HTTP is refused as such."""
    client = target.user("noisy")
    link = target.link(client, target.upload(client)["id"])
    owner = target.headers_of("noisy")
    names = [
        "Range",
        "If-Range",
        "If-None-Match",
        "If-Match",
        "If-Modified-Since",
        "Content-Digest",
        "Content-MD5",
        "Content-Type",
        "Idempotency-Key",
    ]
    names += [
        "Content-Encoding",
        "Authorization",
        "X-User-Id",
        "X-Request-Id",
        "Accept",
        "Cookie",
        "Expect",
        "Transfer-Encoding",
        "Content-Length",
    ]
    requests = []
    for _ in range(target.many(1_200, 60)):
        noise = (
            "".join(target.random.choices(_BITS, k=target.random.randint(1, 6))).encode("utf-8", "replace").decode().replace("\r\n", " ")
        )
        header = (target.random.choice(names), noise)
        target_noise = (
            "".join(f"%{byte:02x}" for byte in noise.encode()) if target.random.random() < 0.5 else "".join(noise.split()).replace("\0", "")
        )
        requests += [
            request("GET", link, [header]),
            request("GET", f"/f/{target_noise}", [header]),
            request("GET", f"/api/files/{MISSING}/download?disposition={target_noise}", [*owner, header]),
            request("POST", f"/api/files/upload?name={target_noise}", [*owner, header], b"{}"),
            request("GET", f"/api/files?cursor={target_noise}", [*owner]),
            request("GET", f"/api/users/{target_noise}", owner[:1]),
            request("PUT", f"/u/{target_noise}", [], b"{}"),
        ]
    for each in requests:
        answer = target.wire.ask(each)
        tally.check(answer is not None and answer.status < 500, f"{each[:300]!r}: {answer.status if answer else 'no answer'}")
        if answer is not None and answer.status >= 400 and not each.startswith(b"HEAD"):
            tally.check(answer.code and msgspec.json.decode(answer.body)["status"] == answer.status, f"{each[:300]!r}: no problem+json")
        if answer is not None and any(line in each for line in (b"Transfer-Encoding", b"Content-Length", b"Expect")):
            target.wire.close()  # what of it was taken for a body is not to be known
    client.close()
    return len(requests)
