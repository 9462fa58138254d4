"""5: signed links with any byte changed, added, repeated or removed, used for something else, or past their end."""

import base64
import hashlib
import hmac
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from tests.attack.target import BODY, MISSING, Tally, Target
from tests.attack.wire import Answer, request
from tests.samples import image
from tests.waiting import until

BASE64URL = string.ascii_letters + string.digits + "-_"
# Not here: `?` alone at the end, as an empty query is none, and a space there, as one or two spaces end a request's target.
OTHERS = "~.%+=/!*'();:@&$,[]{}|^`\"<>\\ #\x00\t\r\n\x7f\xe9"
INVALID = {(403, "link_invalid")}
# What changes the route or the request line itself may be refused by those who read these.
ELSEWHERE = INVALID | {(404, "not_found"), (405, "method_not_allowed"), (400, "http_error")}


def attack(target: Target, tally: Tally) -> str:
    file, other = target.upload(target.ada, name="Sonne 🌅.png"), target.upload(target.ada, image(5_000, seed=1))
    his = target.upload(target.bob)
    rows, stored = [_lasting(each) for each in (*target.listed(target.ada), *target.listed(target.bob))], target.server.stored_files()
    upload_url, upload_id = target.upload_link(target.ada)
    listed = target.ada.get("/api/files", params={"links": "1", "name": "Sonne"}).json()["files"][0]["link"]["url"]
    attachment = target.link(target.ada, file["id"], disposition="attachment", name="x.png")
    urls = [
        target.link(target.ada, file["id"]),
        attachment,
        listed,
        target.link(target.bob, his["id"], ttl_seconds=600),
        target.public_url(target.ada, other["id"]),
        upload_url,
    ]
    mutations = _change_every_byte(target, tally, urls)
    before_misuses = tally.tried
    _exchange_parts(target, tally, urls, upload_url)
    _use_for_something_else(target, tally, urls, upload_url)
    misuses = tally.tried - before_misuses
    _outlive(target, tally)
    # Nothing of this touched a byte, and what was not changed still opens.
    for url in urls[:-1]:
        answer = target.get(url)
        tally.check((answer.status, len(answer.body)) == (200, 5_000 if url.startswith("/p/") else len(BODY)), f"{url} is refused itself")
    tally.check(rows == [_lasting(each) for each in (*target.listed(target.ada), *target.listed(target.bob))], "rows have changed")
    tally.check(stored == target.server.stored_files(), "stored bytes have changed")
    tally.check(target.nobody.put(upload_url, content=BODY).status_code == 201, "the upload link is refused itself")
    tally.check(target.ada.get(f"/api/files/{upload_id}/download").content == BODY, "the upload link brought other bytes")
    return f"{mutations:,} mutations of {len(urls)} links and {misuses:,} misuses refused, 0 accepted; all end with their file"


def _lasting(file: dict[str, Any]) -> dict[str, Any]:
    """A file's fields without those that this attack changes itself."""
    return {name: value for name, value in file.items() if name not in {"updated_at", "is_public"}}


def _change_every_byte(target: Target, tally: Tally, urls: list[str]) -> int:
    mutations = 0
    for number, url in enumerate(urls):
        method = "PUT" if url.startswith("/u/") else "GET"
        expected = {(404, "not_found")} if url.startswith("/p/") else INVALID
        # All of one download and of the upload link; some of the others, which are signed alike.
        inside = list(dict.fromkeys(_inside(url)))
        most = target.many(len(inside) if number in {0, 5} else 1_500, 150)
        if len(inside) > most:
            inside = list(dict.fromkeys([*_respelled(url), *target.random.sample(inside, most)]))
        answers = target.wire.expect_all([request(method, _raw(each)) for each in inside])
        standard = None
        for mutation, answer in zip(inside, answers, strict=True):
            visible = mutation.isascii() and mutation.isprintable() and " " not in mutation
            tally.refused(answer, mutation, expected if visible and not set("#/?") & set(mutation[3:]) - set(url[3:]) else ELSEWHERE)
            if (answer.status, answer.code) in expected:  # and all of these refusals are one and the same
                standard = standard or answer.comparable()
                tally.check(answer.comparable() == standard, f"{mutation!r}: refused with another answer")
        # A public URL is not signed and has no query to be changed; an upload link takes a name in its own, and nothing else.
        around = [each for each in _around(url) if each != url and not (url.startswith("/p/") and each.startswith(f"{url}?"))]
        elsewhere = ELSEWHERE | expected | ({(400, "invalid_request")} if method == "PUT" else set())
        around = target.some(around, 40)
        mutations += len(inside) + len(around)
        for mutation in around:
            tally.refused(target.wire.expect(request(method, _raw(mutation))), mutation, elsewhere)
    return mutations


def _raw(text: str) -> bytes:
    return text.encode("latin-1")


def _inside(url: str) -> Iterator[str]:
    """Every substitution, deletion, repetition, swap, truncation and respelling of a single character after the prefix, and insertions."""
    for at in range(3, len(url)):
        before, this, after = url[:at], url[at], url[at + 1 :]
        for each in BASE64URL + OTHERS:
            if each != this:
                yield before + each + after
        yield before + after
        yield before + this + url[at:]
        yield f"{before}%{ord(this):02X}{after}"
        yield f"{before}%{ord(this):02x}{after}"
        yield f"{before}%25{ord(this):02X}{after}"
        yield before
        yield from (before + each + url[at:] for each in "A_.%/~")
        if at + 1 < len(url) and url[at + 1] != this:
            yield before + url[at + 1] + this + url[at + 2 :]
    yield from (url + each for each in BASE64URL + OTHERS if each != " ")
    swapped = url[:3] + url[3:].swapcase()
    yield from (swapped, url[:3] + url[3:].upper(), url[:3] + url[3:].lower(), url + url[3:], url[:3] + url[:2:-1])


def _respelled(url: str) -> Iterator[str]:
    """Other last characters of the base64 parts: some of them decode to the very same bytes, as those have spare bits."""
    token = url.split("/")[2]
    for part in token.split("."):
        at = url.index(part) + len(part) - 1
        yield from (url[:at] + each + url[at + 1 :] for each in BASE64URL if each != url[at])


def _around(url: str) -> Iterator[str]:
    """The same with something before, after or between."""
    rest = url[3:]
    token, _, name = rest.partition("/")
    yield from (
        f"{url}{each}" for each in ("?x=1", "?disposition=attachment", "?=", "??", "/.", "/..", "//", "/x", ";x=1", "#x", "%00", "%20")
    )
    yield from (f"{url[:3]}{each}{rest}" for each in ("/", "./", "x/../", "%2e%2e/", ".%2f", "x/", "?", "#", ";"))
    yield from (url[:2].upper() + "/" + rest, "/" + url, f"/x/..{url}", f"/.{url}", f"/%{ord(url[1]):x}/{rest}", url[:2] + "%2f" + rest)
    yield from (f"/f/{rest}", f"/p/{rest}", f"/p/{token}", f"/u/{token}", f"/f/{token}/x", f"/f/{token}/", f"/f/{token}")
    if name:
        decoded = unquote(name).encode().decode("latin-1")
        yield from (f"/f/{token}/{name}/{name}", f"/f/{token}//{name}", f"/f/{name}/{token}", f"/f/{token}.{name}", f"/f/{token}/{decoded}")
    for pad in ("=", "==", "A", "AA", "."):
        payload, dot, signature = token.partition(".")
        yield f"{url[:3]}{payload}{pad}{dot}{signature}/{name}"
        yield f"{url[:3]}{payload}{dot}{signature}{pad}/{name}"


def _exchange_parts(target: Target, tally: Tally, urls: list[str], upload_url: str) -> None:
    """Parts of good links put together, and signatures by those who have not got the key."""
    signed = [url.split("/", 3)[2:] for url in urls if url.startswith("/f/")]
    made = []
    for one, name in signed:
        payload, _, signature = one.partition(".")
        for two, other_name in signed:
            other_payload, _, other_signature = two.partition(".")
            made += [f"{payload}.{other_signature}/{name}", f"{other_payload}.{signature}/{name}", f"{one}/{other_name}"]
        made += [
            f"{each}/{name}" for each in (f"{payload}.", f".{signature}", payload, ".", f"{signature}.{payload}", f"{one}.{signature}")
        ]
        for changed in _rewritten(payload):
            made += [f"{changed}.{signature}/{name}"]
            for key in (b"", b"coffer", b"coffer.download.1", b"key", bytes(32), payload.encode()):
                derived = hmac.digest(key, b"coffer.download.1", "sha256")
                for secret in (key, derived):
                    for digest in ("sha1", "sha256", "sha512"):
                        made.append(f"{changed}.{_text(hmac.digest(secret, f'{changed}/{name}'.encode(), digest))}/{name}")
                made.append(f"{changed}.{_text(hashlib.sha256(key + changed.encode()).digest())}/{name}")
    own = {url[3:] for url in urls}
    made = [each for each in dict.fromkeys(made) if each not in own]
    for each, answer in zip(made, target.wire.expect_all([request("GET", f"/f/{each}") for each in made]), strict=True):
        tally.refused(answer, each, INVALID)
    download_token = signed[0][0]
    payload, _, signature = upload_url.removeprefix("/u/").partition(".")
    crossed = [f"/u/{download_token}", f"/u/{download_token.split('.')[0]}.{signature}", f"/u/{payload}.{download_token.split('.')[1]}"]
    for url in (*crossed, *(f"/u/{each}.{signature}" for each in _rewritten(payload))):
        tally.refused(target.wire.expect(request("PUT", url)), url, INVALID)
    for url in (f"/f/{payload}.{signature}/x", f"/f/{payload}.{signature}/", f"/f/{payload}.{signature}/file.png"):
        tally.refused(target.get(url), url, INVALID)


def _rewritten(payload: str) -> Iterator[str]:
    """The payload with each of its bytes another: version, flags, expiry, generation, epoch, ids, digest, variant."""
    packed = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    for at in range(len(packed)):
        yield _text(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _use_for_something_else(target: Target, tally: Tally, urls: list[str], upload_url: str) -> None:
    """Other methods, and the token in place of other credentials."""
    for url in urls:
        own = {"PUT"} if url == upload_url else {"GET", "HEAD"}
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "PROPFIND", "TRACE", "QUERY", "get", "FOO"):
            if method not in own:
                answer = target.wire.expect(request(method, url))
                tally.check(answer.status in {400, 405}, f"{method} {url}: {answer.status}")
        told = target.wire.expect(request("OPTIONS", url))  # the methods of the route, whatever the token
        tally.check((told.status, told.body, told.header("etag")) == (204, b"", None), f"OPTIONS {url}: {told.head!r}")
        token = url.split("/")[2]
        for authorization in (f"Bearer {token}", f"Bearer {url}", f"Link {token}", token):
            for path in ("/api/files", f"/api/files/{MISSING}/download", "/api/storage/usage", "/api/users"):
                answer = target.get(path, [("Authorization", authorization), ("X-User-Id", "ada")])
                tally.refused(answer, f"{authorization[:20]}... at {path}", {(401, "unauthenticated")})


def _outlive(target: Target, tally: Tally) -> None:
    """After its end, after the file was deleted or replaced, after links were revoked: refused, each kind always alike."""
    missing = _answers_to_dead_links(target, tally)
    standard = {answer.comparable() for answer in missing}
    tally.check(len(standard) == 1, "deleted, replaced and revoked links are told apart")
    short = [target.link(target.ada, target.upload(target.ada)["id"], ttl_seconds=1) for _ in range(2)]
    upload, _ = target.upload_link(target.ada, ttl_seconds=1)
    until(lambda: all(target.get(url).status != 200 for url in short))
    until(lambda: target.wire.expect(request("PUT", upload)).code == "link_expired")
    for method, url in (*(("GET", each) for each in short), ("PUT", upload)):
        tally.refused(target.wire.expect(request(method, url)), url, {(403, "link_expired")})
    for file in target.listed(target.ada)[:2]:
        target.ada.delete(f"/api/files/{file['id']}")


def _answers_to_dead_links(target: Target, tally: Tally) -> list[Answer]:
    carol = target.user("carol")
    files = [target.upload(carol, image(3_000, seed=number))["id"] for number in range(4)]
    links = [target.link(carol, each) for each in files]
    public = target.public_url(carol, files[0])
    for url in (*links, public):
        tally.check(target.get(url).status == 200, f"{url} is not good to begin with")
    carol.post(f"/api/files/{files[0]}/revoke-links").raise_for_status()
    carol.put(f"/api/files/{files[0]}/public", json={"is_public": False}).raise_for_status()
    carol.delete(f"/api/files/{files[1]}").raise_for_status()
    carol.put(f"/api/files/{files[2]}/content", content=image(3_000, seed=9)).raise_for_status()
    dead = [links[0], links[1], links[2], public]
    answers = [target.get(url) for url in dead]
    tally.check(target.get(links[3]).status == 200, "revoking one file's links ended another's")
    carol.post("/api/links/revoke").raise_for_status()
    fresh = target.link(carol, files[3])
    answers.append(target.get(links[3]))
    erased_upload, _ = target.upload_link(carol)
    with target.server.client() as admin:
        admin.delete("/api/users/carol").raise_for_status()
    answers.append(target.get(fresh))
    tally.refused(target.wire.expect(request("PUT", erased_upload)), erased_upload, {(403, "link_expired"), (409, "link_used")})
    for url, answer in zip((*dead, links[3], fresh), answers, strict=True):
        tally.refused(answer, url, {(404, "not_found")})
    carol.close()
    return answers
