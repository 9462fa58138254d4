"""6: file names and user ids that would like to be paths or control characters: kept as metadata, or refused; never part of a path."""

import os
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import quote

import httpx
import msgspec

from server.fields import NAME_CHARACTERS, USER_ID_CHARACTERS
from tests.attack.target import BODY, Tally, Target
from tests.attack.wire import Answer, request

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "Ångström é"), unicodedata.normalize("NFD", "Ångström é")

KEPT = [
    *("..", ".", "...", "../../etc/passwd", "/etc/passwd", "..\\..\\windows\\win.ini", "C:\\boot.ini", "\\\\host\\share", "~", "~root"),
    *("a/b", "a\\b"),
    *("%2e%2e%2f", "%2e", "..%2f..", "%00", "%0d%0aX-A: b", "%", "%zz", "%25", "+", "a+b", "a b", "&x=1", "?x=1", "#x", ";", "a;b"),
    *("a=b", "{id}"),
    *("-", "--", "-rf", "--help", "-x.png", "| id", "`id`", "$(id)", "$HOME", "'; drop table user_files; --", '" or 1=1', "*", "[a-z]"),
    *("CON", "con.png", "NUL", "PRN.txt", "AUX", "COM1", "LPT1", ".coffer-volume", "incoming", "users", "quarantine", ".htaccess"),
    *(".git", "lost+found"),
    *("A", "a", "ADA", "Ada", "aDa", "file.PNG", "FILE.png", COMPOSED, DECOMPOSED, "ﬁ", "fi", "K", "\u212a", "ß", "SS", "\u0131", "i", "İ"),
    *("\u202egnp.exe", "\u2066x\u2069", "\u200b", "\u200d", "\ufeffx", "a\u0301" * 20, "\u00ad", "\u3000", "\U000e0041", "\ufffd"),
    *("\uffff", "\U0010ffff"),
    *("🌅", "🌅" * 63, "\U0001f469\u200d\U0001f467\u200d\U0001f466", "שלום", "مرحبا", "日本語", "٠١٢", "a" * 255, "ä" * 255, "🌅" * 255),
    *("..png", ".png", "png.", "x.png.", "x. "),
    *("a" * 250 + ".png",),
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "{{7*7}}", "${7*7}", "=cmd|' /C calc'!A0", "null", "None"),
    *("undefined", "0", "true"),
]
TOO_LONG_FOR_A_USER = ["a" * (USER_ID_CHARACTERS + 1), "a" * 300, "🌅" * 300]
REFUSED = [
    *("\0", "a\0.png", "a\r\nX-Injected: 1", "\r", "\n", "a\tb", "\x1b[31m", "\x7f", "\x85", "\x9b", "a\u2028b", "a\u2029b"),
    *("a" * (NAME_CHARACTERS + 1), "🌅" * 5_000),
]
NOT_TEXT = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xae\xc0\xae\xc0\xaf", b"\xf5\x80\x80\x80", b"a\xe9b"]

_PATHS = re.compile(
    r"\.coffer-volume|incoming|quarantine|users|users/(?:[A-Za-z0-9][A-Za-z0-9_-]{0,127}|~[0-9a-f]{64})"
    r"(?:/(?:videos|images|scenes|projects|audio)(?:/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\.[0-9]+\.[a-z0-9]{1,10})?"
    r"|/previews(?:/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:/[a-z0-9][a-z0-9_-]{0,31}\.[a-z0-9]{1,10})?)?)?"
)


def attack(target: Target, tally: Tally) -> str:
    outside = _outside(target)
    names = target.some(KEPT, 25)
    client = target.user("namer")
    file_id = target.upload(client)["id"]
    for name in names:
        _keep_name(target, tally, client, file_id, name)
    for name in (*REFUSED, *(each.decode("utf-8", "surrogateescape") for each in NOT_TEXT), ""):
        _refuse_name(target, tally, client, file_id, name)
    user_ids = [each for each in names if len(each) <= USER_ID_CHARACTERS]
    _keep_users_apart(target, tally, user_ids)
    for user_id in (*REFUSED, *TOO_LONG_FOR_A_USER):
        _refuse_user(target, tally, user_id.encode())
    for raw in (*NOT_TEXT, b""):
        _refuse_user(target, tally, raw)
    paths = _walk(target, tally)
    tally.check(_outside(target) == outside, "something was written beside the volume")
    client.close()
    refused = len(REFUSED) + len(NOT_TEXT)
    return f"{len(names)} names and {len(user_ids)} user ids kept as they are, {refused} refused; {paths} paths, all of the layout"


def _outside(target: Target) -> list[str]:
    """What lies around the volume."""
    return sorted(path.name for path in target.server.volume.parent.iterdir())


def _keep_name(target: Target, tally: Tally, client: httpx.Client, file_id: str, name: str) -> None:
    shown = name if len(name) < 40 else f"{name[:40]}..."
    by_query = client.post("/api/files/upload", content=BODY, params={"name": name})
    tally.check(by_query.status_code == 201 and by_query.json()["file_name"] == name, f"{shown!r} uploaded: {by_query.text[:200]}")
    by_form = client.post("/api/files/upload", files={"file": ("x.png", BODY)}, data={"name": name})
    tally.check(by_form.status_code == 201 and by_form.json()["file_name"] == name, f"{shown!r} in a form: {by_form.text[:200]}")
    renamed = client.patch(f"/api/files/{file_id}", json={"file_name": name})
    tally.check(renamed.status_code == 200 and renamed.json()["file_name"] == name, f"{shown!r} as a new name: {renamed.text[:200]}")
    tally.check(client.get(f"/api/files/{file_id}").json()["file_name"] == name, f"{shown!r} is read as another name")
    for link in (target.link(client, file_id), target.link(client, file_id, name=name)):
        tally.check(target.get(link).body == BODY, f"{shown!r}: its link {link} does not open")
    url, _ = target.upload_link(client, file_name=name)
    by_link = target.nobody.put(url, content=BODY)
    tally.check(by_link.status_code == 201 and by_link.json()["file_name"] == name, f"{shown!r} by a link: {by_link.text[:200]}")
    for each in (by_query, by_form, by_link):
        client.delete(f"/api/files/{each.json()['id']}")


def _refuse_name(target: Target, tally: Tally, client: httpx.Client, file_id: str, name: str) -> None:
    shown = name if len(name) < 40 else f"{name[:40]}..."
    raw = name.encode("utf-8", "surrogateescape")
    escaped = "".join(f"\\u{unit:04x}" for unit in _utf16(name))
    sent: list[tuple[str, Callable[[], Answer]]] = [
        ("uploaded", lambda: _ask(target, "POST", f"/api/files/upload?name={quote(raw, safe='')}", BODY, "image/png")),
        ("as a new name", lambda: _ask(target, "PATCH", f"/api/files/{file_id}", b'{"file_name":"%b"}' % escaped.encode())),
        ("for a link", lambda: _ask(target, "POST", f"/api/files/{file_id}/link", b'{"name":"%b"}' % escaped.encode())),
        ("for an upload link", lambda: _ask(target, "POST", "/api/uploads/links", b'{"max_bytes":1,"file_name":"%b"}' % escaped.encode())),
        ("as a tag", lambda: _ask(target, "PUT", f"/api/files/{file_id}/tags", b'{"tags":["%b"]}' % escaped.encode())),
        ("as a new name in raw bytes", lambda: _ask(target, "PATCH", f"/api/files/{file_id}", b'{"file_name":"%b"}' % raw)),
    ]
    for how, ask in sent:
        tally.refused(ask(), f"{shown!r} {how}", {(400, "invalid_request")})


def _utf16(text: str) -> list[int]:
    raw = text.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(raw[at : at + 2]) for at in range(0, len(raw), 2)]


def _ask(target: Target, method: str, path: str, body: bytes, content_type: str = "application/json") -> Answer:
    return target.wire.expect(request(method, path, [*target.headers_of("namer"), ("Content-Type", content_type)], body))


def _keep_users_apart(target: Target, tally: Tally, user_ids: list[str]) -> None:
    """Every id is a user of its own, however alike they look: each sees its own file alone."""
    files: dict[str, str] = {}
    for user_id in user_ids:
        if user_id != user_id.strip(" \t"):
            continue  # HTTP itself takes blanks off a header's ends
        with target.user(user_id) as client:
            answer = client.post("/api/files/upload", content=BODY, params={"name": "mine.png"})
            tally.check(answer.status_code == 201 and answer.json()["user_id"] == user_id, f"user {user_id[:40]!r}: {answer.text[:200]}")
            files[user_id] = answer.json().get("id", "")
    directories = len(list((target.server.volume / "users").iterdir()))
    tally.check(directories >= len(files), f"{len(files)} users share {directories} directories")
    for user_id, file_id in files.items():
        with target.user(user_id) as client:
            own = {each["id"] for each in target.listed(client)}
        others = own & (set(files.values()) - {file_id})
        tally.check(file_id in own and not others, f"user {user_id[:40]!r} sees {len(own)} files, {len(others)} of others")
        # By hand, as clients take the segments . and .. away.
        shown = target.get(f"/api/users/{quote(user_id, safe='')}", [("Authorization", f"Bearer {target.server.api_key}")])
        seen = msgspec.json.decode(shown.body).get("user_id")
        tally.check(shown.status == 200 and seen == user_id, f"user {user_id[:40]!r} shown: {shown.body[:200]!r}")


def _refuse_user(target: Target, tally: Tally, raw: bytes) -> None:
    """In the path of an admin's request, and in the header where HTTP lets it through."""
    admin = [("Authorization", f"Bearer {target.server.api_key}")]
    for method, path, body in (("GET", "", b""), ("PUT", "/quota", b'{"max_bytes":1}'), ("DELETE", "", b"")):
        sent = request(method, f"/api/users/{quote(raw, safe='')}{path}", admin, body)
        answer = target.wire.expect(sent)
        if raw:
            tally.refused(answer, f"{method} user {raw[:40]!r}", {(400, "invalid_request")})
    line = b"Authorization: Bearer %b\r\nX-User-Id: %b" % (target.server.api_key.encode(), raw)
    answer = target.wire.expect(b"GET /api/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%b\r\n\r\n" % line)
    if raw.strip(b"\r\n\t ") == raw and b"\r\n" not in raw:
        tally.refused(answer, f"X-User-Id {raw[:40]!r}", {(400, "invalid_request"), (400, "http_error")})
    tally.check(answer.header("x-injected") is None, f"X-User-Id {raw[:40]!r} came back as a header")


def _walk(target: Target, tally: Tally) -> int:
    """Every path below the volume has the layout's form, and none leads out of it."""
    paths = 0
    for directory, directories, files in os.walk(target.server.volume):
        for each in (*directories, *files):
            path = os.path.relpath(os.path.join(directory, each), target.server.volume)  # noqa: PTH118 - names that are no text, if any
            paths += 1
            tally.check(_PATHS.fullmatch(path), f"the volume holds {path!r}")
            tally.check(not os.path.islink(os.path.join(directory, each)), f"{path!r} is a symbolic link")  # noqa: PTH114, PTH118
    return paths
