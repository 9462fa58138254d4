"""8: names that would like to be headers: every answer has one valid Content-Disposition (RFC 6266), and only headers that are ours."""

import re
from email.message import Message
from urllib.parse import unquote_to_bytes

import httpx

from tests.attack.names import KEPT
from tests.attack.target import BODY, Tally, Target
from tests.attack.wire import Answer, request

INJECTIONS = [
    *('a"b', 'a";x="b', 'a"; filename="evil.exe', "a\"; filename*=UTF-8''evil.exe", "a\\", 'a\\"b', "a;b", "a; attachment", "inline", "''"),
    *("UTF-8''evil.exe", "=?UTF-8?B?ZXZpbC5leGU=?=", "=?utf-8?q?evil=2Eexe?=", "%0d%0aSet-Cookie: a=b", "%22;%20x", "a%2Fb", "a%5Cb"),
    *("a,b", "a=b"),
    *("a'b", "a*b", "(a)", "<a>", "a@b", "a:b", "a/b/../c", "ä", "ä.png", "ä" * 200 + ".png", "a" * 500, "🌅" * 500, "\u202exe.gnp"),
    *("é\u0301", " "),
    *(" a", "a ", ".", "..", "a.", "\u2024exe", "\uff02", "\uff0f", "\u0130", "\u010d\u010a", "\u560d\u560a", "\u4e0d\u4e0a"),
    *("嘊嘍Set-Cookie:a=b",),
]
_HEADERS = {
    *("content-type", "content-disposition", "accept-ranges", "repr-digest", "etag", "last-modified", "cache-control", "content-length"),
    *("x-content-type-options", "content-security-policy", "cross-origin-resource-policy", "x-request-id", "date", "content-range"),
    *("referrer-policy", "ratelimit", "ratelimit-policy"),
}
# RFC 6266, section 4.1: a type, then parameters as tokens or quoted strings, and RFC 8187 for the extended one.
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = r'"(?:[\t !#-\[\]-~]|\\[\t -~])*"'
_EXTENDED = r"UTF-8'[A-Za-z-]*'(?:%[0-9A-Fa-f]{2}|[!#$&+\-.^_`|~0-9A-Za-z])+"
_DISPOSITION = re.compile(rf"(inline|attachment); filename=({_TOKEN}|{_QUOTED})(?:; filename\*=({_EXTENDED}))?")


def attack(target: Target, tally: Tally) -> str:
    client = target.user("disposer")
    file_id = target.upload(client)["id"]
    public = target.public_url(client, file_id)
    names = target.some([*INJECTIONS, *KEPT], 40)
    answers = 0
    for name in names:
        client.patch(f"/api/files/{file_id}", json={"file_name": name}).raise_for_status()
        for what, answer in _answers(target, client, file_id, public, name):
            answers += 1
            _check(tally, f"{name[:40]!r} {what}", answer, name, exact="link" not in what)
    client.close()
    return f"{len(names)} names in {answers:,} answers, one valid header each, none split"


def _answers(target: Target, client: httpx.Client, file_id: str, public: str, name: str) -> list[tuple[str, Answer]]:
    owner = target.headers_of("disposer")
    download = f"/api/files/{file_id}/download"
    links = [target.link(client, file_id), target.link(client, file_id, name=name, disposition="attachment")]
    return [
        ("for its owner", target.get(download, owner)),
        ("saved by its owner", target.get(f"{download}?disposition=attachment", owner)),
        ("in part", target.get(download, [*owner, ("Range", "bytes=0-9")])),
        ("asked for its head", target.wire.expect(request("HEAD", download, owner))),
        ("as a public file", target.get(public)),
        *((f"by link {number}", target.get(each)) for number, each in enumerate(links)),
    ]


def _check(tally: Tally, what: str, answer: Answer, name: str, *, exact: bool) -> None:
    tally.check(
        answer.status in {200, 206} and len(answer.body) in {0, 10, len(BODY)}, f"{what}: {answer.status}, {len(answer.body)} bytes"
    )
    lines = answer.head.split(b"\r\n")
    tally.check(all(b"\r" not in line and b"\n" not in line for line in lines), f"{what}: a bare CR or LF in the head")
    tally.check(all(0x20 <= byte < 0x7F for line in lines for byte in line), f"{what}: something else than printable ASCII in the head")
    strange = [each for each, _ in answer.headers if each not in _HEADERS]
    tally.check(not strange, f"{what}: headers that are not ours: {strange}")
    values = [value for each, value in answer.headers if each == "content-disposition"]
    match = _DISPOSITION.fullmatch(values[0]) if len(values) == 1 else None
    tally.check(match, f"{what}: not one valid Content-Disposition: {values}")
    if match is None:
        return
    plain, extended = match[2].strip('"'), match[3]
    tally.check(not set(plain) & set('"\\/%'), f"{what}: the plain name is {plain!r}")
    meant = unquote_to_bytes(extended.partition("''")[2]).decode() if extended else plain
    if exact:  # a link's name is shortened to fit its URL, and has no slashes
        tally.check(meant == name or (len(values[0]) > 1_900 and name.startswith(meant[:50])), f"{what}: means {meant[:80]!r}")
    # A second opinion, from a parser that knows nothing of ours.
    message = Message()
    message["Content-Disposition"] = values[0]
    parsed = message.get_params(header="content-disposition", unquote=True) or []
    keys = [key for key, _ in parsed]
    tally.check(keys[0] == match[1] and set(keys[1:]) == {"filename"} and len(keys) <= 3, f"{what}: the library reads {parsed}")
