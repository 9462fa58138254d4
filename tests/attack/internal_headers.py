"""15: headers that only a proxy or the server itself may set, and requests that two readers would take for different ones."""

import re

import msgspec

from tests.attack.target import BODY, MISSING, Tally, Target
from tests.attack.wire import Wire, request
from tests.waiting import until

EVIL = "evil.example"
ELSEWHERE = "203.0.113.9"
# A request that is not complete has no answer to wait for. Being too impatient can only miss something: the log is what is judged.
_PATIENCE_SECONDS = 0.5
IGNORED: list[tuple[str, str]] = [
    *(("X-Accel-Redirect", "/etc/passwd"), ("X-Accel-Redirect", "/internal/users/ada"), ("X-Accel-Buffering", "yes")),
    *(("X-Accel-Limit-Rate", "1"),),
    *(("X-Accel-Mapping", "/=/"), ("X-Sendfile", "/etc/passwd"), ("X-Sendfile-Type", "X-Accel-Redirect")),
    *(("X-Lighttpd-Send-File", "/etc/passwd"),),
    *(("X-Original-URL", "/api/users"), ("X-Rewrite-URL", "/api/users"), ("X-Original-URI", "/api/users"), ("X-Original-Method", "DELETE")),
    *(("X-HTTP-Method-Override", "DELETE"), ("X-HTTP-Method", "DELETE"), ("X-Method-Override", "DELETE"), ("_method", "DELETE")),
    *(("X-Forwarded-For", ELSEWHERE), ("X-Forwarded-Host", EVIL), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Prefix", "/evil")),
    *(("X-Forwarded-Server", EVIL), ("X-Forwarded-Port", "1"), ("X-Forwarded-User", "ada"), ("Forwarded", f"for={ELSEWHERE};host={EVIL}")),
    *(("X-Real-IP", ELSEWHERE), ("True-Client-IP", ELSEWHERE), ("CF-Connecting-IP", ELSEWHERE), ("Client-IP", ELSEWHERE)),
    *(("Via", "1.1 x"),),
    *(("X-Remote-User", "ada"), ("Remote-User", "ada"), ("X-User", "ada"), ("X-Authenticated-User", "ada"), ("X_User_Id", "ada")),
    *(("X-User_Id", "ada"),),
    *(("X-Api-Key", "x"), ("Proxy-Authorization", "Basic YTph"), ("Cookie", "user_id=ada; session=x"), ("X-Scopes", "admin")),
    *(("X-Owner", "ada"),),
    *(("X-Coffer-User", "ada"), ("X-Coffer-Internal", "1"), ("X-Coffer-Verified", "1"), ("X-Internal", "1"), ("Front-End-Https", "on")),
    *(("Origin", f"http://{EVIL}"),),
    *(("X-Request-Id", "a b"), ("X-Request-Id", "x" * 65), ("Expect", "nothing"), ("Max-Forwards", "0")),
    *(("Upgrade-Insecure-Requests", "1"), ("Proxy", EVIL)),
    *(("Accept-Encoding", "gzip"), ("TE", "trailers"), ("Destination", "/x"), ("Depth", "infinity"), ("Overwrite", "T")),
    *(("Accept", "text/html"),),
]


def attack(target: Target, tally: Tally) -> str:
    file = target.upload(target.ada, name="adas-canary.png")
    his = target.upload(target.bob)
    link = target.link(target.bob, his["id"])
    before = target.listed(target.ada)
    _send_internal_headers(target, tally, file["id"], link, his["id"])
    _send_headers_twice(target, tally, file["id"])
    headers = tally.tried
    _name_other_targets(target, tally, link, his["id"])
    targets = tally.tried - headers
    _make_two_of_one(target, tally, file["id"])
    tally.check(target.listed(target.ada) == before, "ada's files are not what they were")
    smuggled = tally.tried - headers - targets
    return f"{headers:,} answers unmoved by {len(IGNORED)} headers, {targets} targets, {smuggled} ambiguous requests: 0 read as another"


def _send_internal_headers(target: Target, tally: Tally, file_id: str, link: str, his_id: str) -> None:
    bob, powerless = target.headers_of("bob"), [("Authorization", f"Bearer {target.new_key()}"), ("X-User-Id", "bob")]
    requests: list[tuple[str, str, list[tuple[str, str]]]] = [
        ("GET", link, []),
        ("HEAD", link, []),
        ("GET", f"/api/files/{his_id}/download", bob),
        ("GET", f"/api/files/{his_id}", bob),
        ("GET", f"/api/files/{file_id}", bob),
        ("GET", f"/api/files/{file_id}/download", bob),
        ("GET", f"/api/files/{file_id}/download", []),
        ("GET", "/api/users", powerless),
        ("GET", f"/p/{'A' * 22}", []),
        ("GET", "/health/live", []),
        ("POST", f"/api/files/{his_id}/link", bob),
    ]
    for method, path, credentials in requests:
        plain = target.wire.expect(request(method, path, credentials)).comparable()
        for header in target.some(IGNORED, 20):
            # Litestar reads no Accept; a browser's wish for HTML must not change what an API answers either.
            answer = target.wire.expect(request(method, path, [*credentials, header]))
            tally.check(
                _lasting(answer.comparable()) == _lasting(plain),
                f"{method} {path[:40]} with {header}: {answer.status} {answer.body[:100]!r}",
            )
            strange = [name for name, _ in answer.headers if name.startswith(("x-accel", "x-sendfile", "set-cookie", "access-control"))]
            tally.check(not strange, f"{method} {path[:40]} with {header}: answered with {strange}")
    for header in (("X-User-Id", "ada"), ("X-User-Id", "\u00ff"), ("Authorization", f"Bearer {target.server.api_key}")):
        tally.check(target.get(link, [header]).body == BODY, f"a link's holder with {header[0]} gets something else")
    for header in (("X-User-Id", "ada"), ("X-Forwarded-User", "ada"), ("Cookie", "x=y")):
        tally.refused(target.get(f"/api/files/{file_id}", [header]), f"nobody with {header}", {(401, "unauthenticated")})
    target.get("/health/live", [header for header in IGNORED if ELSEWHERE in header[1]])
    # The log names whoever really was at the other end, and the id it gives a request is one that it can print.
    lines = [msgspec.json.decode(line) for line in target.server.logged().splitlines() if '"client":' in line]
    usable = re.compile(r"[A-Za-z0-9._-]{1,64}")
    wrong = [each for each in lines if each["client"] != "127.0.0.1" or not usable.fullmatch(each["request_id"])]
    tally.check(lines and not wrong, f"the log believes what it was told: {wrong[:1]}")


def _lasting(answer: tuple[int, tuple[tuple[str, str], ...], bytes]) -> tuple[int, tuple[tuple[str, str], ...], bytes]:
    """Without what counts down with the clock."""
    status, headers, body = answer
    headers = tuple((name, re.sub("max-age=[0-9]+", "max-age=*", value)) for name, value in headers)
    return status, headers, re.sub(rb'"url":"[^"]*"|"expires_at":"[^"]*"', b"*", body)


def _send_headers_twice(target: Target, tally: Tally, file_id: str) -> None:
    """Two readers could pick different ones."""
    bob, ada = target.headers_of("bob"), target.headers_of("ada")
    key = bob[0]
    for what, headers, expected in (
        ("bob and ada", [*bob, ada[1]], (400, "invalid_request")),
        ("ada and bob", [*ada, bob[1]], (400, "invalid_request")),
        ("ada twice", [*ada, ada[1]], (400, "invalid_request")),
        ("two ids in one", [key, ("X-User-Id", "bob, ada")], (404, "not_found")),
        ("two keys", [key, key, bob[1]], (401, "unauthenticated")),
        ("a key and nonsense", [key, ("Authorization", "Bearer x"), bob[1]], (401, "unauthenticated")),
        ("two keys in one", [("Authorization", f"{key[1]}, {key[1]}"), bob[1]], (401, "unauthenticated")),
    ):
        for path in (f"/api/files/{file_id}", f"/api/files/{file_id}/download"):
            tally.refused(target.get(path, headers), what, {expected})
    twice = request("GET", f"/api/files/{file_id}", bob).replace(b"Host: coffer.test\r\n", b"Host: a\r\nHost: b\r\n")
    tally.check(target.wire.expect(twice).status in {400, 404}, "two hosts")


def _name_other_targets(target: Target, tally: Tally, link: str, his_id: str) -> None:
    """Other hosts and other forms of a target change nothing, and nothing that is answered is made of them."""
    bob = target.headers_of("bob")
    own = target.get(f"/api/files/{his_id}", bob).comparable()
    for host in (EVIL, f"{EVIL}:80@x", "127.0.0.1:1", "", "a b", "[::1]", "localhost/../", f"{EVIL}\t", "x" * 1_000):
        sent = request("GET", f"/api/files/{his_id}", bob).replace(b"coffer.test", host.encode())
        answer = target.wire.expect(sent)
        tally.check(answer.status == 400 or answer.comparable() == own, f"Host {host[:30]!r}: {answer.status}")
        made = target.wire.expect(request("POST", f"/api/files/{his_id}/link", bob).replace(b"coffer.test", host.encode()))
        tally.check(
            made.status == 400 or msgspec.json.decode(made.body)["url"].startswith("/f/"),
            f"Host {host[:30]!r} is in the link {made.body!r}",
        )
    for scheme in ("http", "https", "ftp", "file", "gopher"):
        answer = target.get(f"{scheme}://{EVIL}/api/files/{his_id}", bob)
        tally.check(answer.status == 400 or answer.comparable() == own, f"{scheme}://{EVIL}: {answer.status}")
        tally.check(target.get(f"{scheme}://{EVIL}{link}").status in {200, 400}, f"{scheme}://{EVIL} with a link")
    for method, form in (
        ("OPTIONS", "*"),
        ("CONNECT", f"{EVIL}:443"),
        ("GET", f"{EVIL}:443"),
        ("GET", f"//{EVIL}/x"),
        ("GET", "x"),
        ("GET", "\\\\x"),
    ):
        answer = target.wire.expect(request(method, form, bob))
        tally.check(answer.status in {400, 404, 405}, f"{method} {form}: {answer.status}")
        target.wire.close()
    for path in (
        "/api/../etc/passwd",
        "/../../etc/passwd",
        "/api/files/..%2f..%2fetc",
        "//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/f/../api/users",
    ):
        answer = target.get(path, bob)
        tally.check(answer.status in {403, 404} and b"root:" not in answer.body, f"{path}: {answer.status}")
    for path in ("/api//files", "/api/./files", "/API/files", "/api/files;x", "/api/files%00", "/api/files%2f", "/api/files/../users"):
        answer = target.get(path)
        tally.check(answer.status in {400, 401, 404}, f"{path} for nobody: {answer.status}")


def _make_two_of_one(target: Target, tally: Tally, file_id: str) -> None:
    """Requests whose end two readers would see at different places. The one hidden inside must never be read as a request."""
    credentials = f"Authorization: Bearer {target.server.api_key}\r\nX-User-Id: ada\r\n"
    for number, (framing, body) in enumerate(target.some(_framings(), 20)):
        hidden = f"DELETE /api/files/{file_id} HTTP/1.1\r\nHost: x\r\n{credentials}X-Request-Id: smuggled-{number}\r\n\r\n".encode()
        wire = Wire(target.server.host, target.server.port, _PATIENCE_SECONDS)
        head = f"POST /api/files/{MISSING}/favorite HTTP/1.1\r\nHost: x\r\n{credentials}Content-Type: application/json\r\n".encode()
        sent = head + framing.replace(b"{length}", str(len(hidden)).encode()) + b"\r\n\r\n" + body.replace(b"{hidden}", hidden)
        try:
            answer = wire.ask(sent)
        except TimeoutError:  # it waits for the rest of what it takes for one body
            answer = None
        rest = wire.rest()
        tally.check(answer is None or answer.status >= 400, f"{framing!r}: {answer}")
        tally.check(b"HTTP/1.1 2" not in rest, f"{framing!r}: answered twice, {rest[:100]!r}")
        wire.close()
    # Everything above has been answered and logged before this is.
    marker = "smuggling-is-over"
    target.get("/health/live", [("X-Request-Id", marker)])
    until(lambda: marker in target.server.logged())
    smuggled = sorted(set(re.findall(r'"request_id":"(smuggled-[0-9]+)"', target.server.logged())))
    tally.check(not smuggled, f"read as requests: {smuggled}")


def _framings() -> list[tuple[bytes, bytes]]:
    """Header lines that say where the body ends, in more than one way or in none, and a body that hides a request."""
    chunked = b"0\r\n\r\n{hidden}"
    plain = b"{hidden}"
    length, encoding = b"Content-Length: {length}", b"Transfer-Encoding: chunked"
    return [
        (length + b"\r\n" + encoding, chunked),
        (encoding + b"\r\n" + length, chunked),
        (encoding + b"\r\nContent-Length: 0", chunked),
        (b"Content-Length: 0\r\n" + length, plain),
        (length + b"\r\nContent-Length: 0", plain),
        (b"Content-Length: 0, {length}", plain),
        (b"Content-Length: {length}, {length}", plain),
        (b"Content-Length: +{length}", plain),
        (b"Content-Length: -{length}", plain),
        (b"Content-Length: 0x{length}", plain),
        (b"Content-Length: {length}.0", plain),
        (b"Content-Length: 1 {length}", plain),
        (b"Content-Length: 99999999999999999999", plain),
        (b"Content-Length:\x0b0", plain),
        (b"Content-Length : 0", plain),
        (b"Content-Length\t: 0", plain),
        (b" Content-Length: 0", plain),
        (b"Content-Length: 0\r\n Content-Length: {length}", plain),
        (b"Content-Length: \r\n {length}", plain),
        (b"Content_Length: 0\r\n" + encoding + b", identity", chunked),
        (b"Transfer-Encoding: identity, chunked\r\nContent-Length: 5", chunked),
        (b"Transfer-Encoding: chunked, chunked", b"0\r\n\r\n0\r\n\r\n{hidden}"),
        (b"Transfer-Encoding: xchunked\r\nContent-Length: 5", chunked),
        (b"Transfer-Encoding: chunkedx", chunked),
        (b"Transfer-Encoding : chunked", chunked),
        (b"Transfer-Encoding:\x0bchunked", chunked),
        (b"Transfer-Encoding: \x00chunked", chunked),
        (b"Transfer-Encoding: identity", chunked),
        (b"Transfer-Encoding: gzip\r\nContent-Length: 5", chunked),
        (b'Transfer-Encoding: "chunked"', chunked),
        (b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", chunked),
        (b"X: y\r\n\tTransfer-Encoding: chunked\r\nContent-Length: 5", chunked),
        (b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: 5", chunked),
        (b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 5", chunked),
        (b"X\0: y\r\nContent-Length: 0", plain),
        (b"X: \0\r\nContent-Length: 0", plain),
        (encoding, b"-1\r\n{hidden}"),
        (encoding, b"0x0\r\n\r\n{hidden}"),
        (encoding, b"+0\r\n\r\n{hidden}"),
        (encoding, b"g\r\n\r\n{hidden}"),
        (encoding, b"\r\n\r\n{hidden}"),
        (encoding, b"10000000000000000\r\n\r\n{hidden}"),
        (encoding, b"ffffffffffffffff\r\n{hidden}"),
        (encoding, b"00000000000000001\r\nab\r\n0\r\n\r\n{hidden}"),
        (encoding, b"1\r\nab0\r\n\r\n{hidden}"),
        (encoding, b"1\n{0\n\n{hidden}"),
        (encoding, b"0;a\nb\r\n\r\n{hidden}"),
        (encoding, b"0\r\nX: y\n{hidden}"),
        (encoding, b"0\r\n{hidden}"),
    ]
