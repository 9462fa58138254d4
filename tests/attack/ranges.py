"""14: Range headers by the thousand, overlapping, huge and garbled: one range by RFC 9110 or the whole file, in bounded work and memory."""

import re
import socket
import time
from contextlib import ExitStack

from tests.attack.target import Tally, Target
from tests.attack.wire import Answer, request
from tests.samples import image
from tests.waiting import until

SIZE = 10_000
LARGE = 5 * 2**20
STALLED = 32
# A stalled client holds two reads of 256 KiB, and what the socket has not taken: 13 to 60 MiB were seen. A copy of the file each: 160 MiB.
MOST_MEANWHILE_BYTES = 128 * 2**20
# From the first half of the times that they all come and go to the second. If each left one read behind, it would be 48 MiB and more.
MOST_GROWTH_BYTES = 40 * 2**20

_PIECES = [
    *("bytes=", "bytes", "BYTES=", "items=", "=", "-", "--", ",", ", ", " ", "\t", ";", "*", "/", "0", "1", "9", "00", "5", "99", "9999"),
    *("10000", "10001"),
    *("-1", "0-0", "0-", "-0", "9999-", "10000-", "1-0", "5-9", "0-9999", "0-99999999999999999999", "18446744073709551615"),
    *("9223372036854775808",),
    *("1e3", "0x10", "+1", "1.5", "\u0661", "²", "a", "bytes=0-1", "%30", '"', "\x80"),
]


def attack(target: Target, tally: Tally) -> str:
    client = target.user("ranger")
    body, large = image(SIZE, seed=3), image(LARGE, seed=4)
    small_url = target.link(client, target.upload(client, body)["id"])
    large_id = target.upload(client, large)["id"]
    large_url = target.link(client, large_id)
    fuzzed = _fuzz(target, tally, small_url, body)
    before = target.resident_bytes()
    seconds = _abuse(target, tally, large_url, large)
    half = target.many(12, 6)
    rounds = [_stall(target, tally, large_url) for _ in range(2 * half)]
    meanwhile = max(each for each, _ in rounds) - before
    # The allocator keeps now more and now less for the next time; what is left behind each time shows in the least of several.
    growth = min(after for _, after in rounds[half:]) - min(after for _, after in rounds[:half])
    tally.check(meanwhile < MOST_MEANWHILE_BYTES, f"{STALLED} stalled clients take {meanwhile / 2**20:.0f} MiB")
    tally.check(growth < MOST_GROWTH_BYTES, f"memory has grown by {growth / 2**20:.0f} MiB after {len(rounds)} times")
    client.close()
    return (
        f"{fuzzed:,} headers as RFC 9110 has them; 1,000 ranges take {seconds:.2f} of a plain download's time; "
        f"{STALLED} stalled clients {meanwhile / 2**20:+.0f} MiB, and {growth / 2**20:+.0f} MiB after {len(rounds)} times"
    )


def meant(value: str, size: int) -> tuple[int, int] | int:
    """What a Range header means by RFC 9110, section 14: the first and last byte of a 206, or 200 or 416. Written from the RFC alone.

    A server may ignore several ranges and units it does not know; this one does.
    """
    unit, equals, rest = value.partition("=")
    if not equals or unit.lower() != "bytes":
        return 200
    wanted = [each for part in rest.split(",") if (each := part.strip(" \t"))]
    if len(wanted) != 1:
        return 200
    first, dash, last = wanted[0].partition("-")
    if not dash or not re.fullmatch("[0-9]*", first) or not re.fullmatch("[0-9]*", last) or not first + last:
        return 200
    if len(first) > 40 or len(last) > 40:
        return 200
    if not first:
        return (max(0, size - int(last)), size - 1) if int(last) else 416
    if last and int(last) < int(first):
        return 200
    return (int(first), min(int(last), size - 1) if last else size - 1) if int(first) < size else 416


def _fuzz(target: Target, tally: Tally, url: str, body: bytes) -> int:
    values = [
        f"bytes={first}{dash}{last}"
        for first in ("", "0", "1", "9999", "10000", "007")
        for dash in "-\u2013"
        for last in ("", "0", "9", "9999", "99999")
    ]
    values += ["".join(target.random.choices(_PIECES, k=target.random.randint(1, 6))) for _ in range(target.many(4_000, 100))]
    values += ["bytes=" + "".join(target.random.choices(_PIECES, k=target.random.randint(1, 3))) for _ in range(target.many(4_000, 100))]
    values = list(dict.fromkeys(each.strip(" \t") for each in values))
    answers = target.wire.expect_all([request("GET", url, [("Range", each)]) for each in values])
    for value, answer in zip(values, answers, strict=True):
        # The bytes on the wire are UTF-8, of which a server sees octets.
        _check(tally, value, answer, body, meant(value.encode().decode("latin-1"), len(body)))
    return len(values)


def _check(tally: Tally, what: str, answer: Answer, body: bytes, expected: tuple[int, int] | int) -> None:
    given = answer.header("content-range")
    if isinstance(expected, tuple):
        first, last = expected
        right = (answer.status, given, answer.body) == (206, f"bytes {first}-{last}/{len(body)}", body[first : last + 1])
    elif expected == 416:
        right = (answer.status, answer.code, given) == (416, "range_not_satisfiable", f"bytes */{len(body)}")
    else:
        right = (answer.status, given, answer.body) == (200, None, body)
    tally.check(right, f"Range: {what[:80]!r} gave {answer.status} {given} with {len(answer.body):,} bytes, meant is {expected}")


def _abuse(target: Target, tally: Tally, url: str, body: bytes) -> float:
    """Headers that ask for as much work as they can. Returns how long the worst takes in terms of a plain download."""
    thousand = ",".join(f"{n}-{n}" for n in range(0, 2_000, 2))
    abuses: dict[str, list[tuple[str, str]]] = {
        "1,000 ranges": [("Range", f"bytes={thousand}")],
        "1,000 overlapping ranges": [("Range", "bytes=" + ",".join(f"{n}-" for n in range(1_000)))],
        "1,000 times the whole file": [("Range", "bytes=" + ",".join(["0-"] * 1_000))],
        "1,000 suffixes": [("Range", "bytes=" + ",".join(f"-{n}" for n in range(1, 1_001)))],
        "1,000 Range headers": [("Range", "bytes=0-0")] * 1_000,
        "commas alone": [("Range", "bytes=" + "," * 30_000)],
        "commas and a letter": [("Range", "bytes=" + ", " * 15_000 + "x")],
        "blanks and a letter": [("Range", "bytes=" + " \t" * 15_000 + "x")],
        "a number of 30,000 digits": [("Range", f"bytes=0-{'9' * 30_000}")],
        "two numbers of 15,000 digits": [("Range", f"bytes={'1' * 15_000}-{'9' * 15_000}")],
        "dashes": [("Range", "bytes=" + "-" * 30_000)],
        "10,000 ETags": [("If-None-Match", ", ".join(['"a"'] * 6_000)), ("Range", "bytes=0-0")],
        "unclosed ETags": [("If-None-Match", '"' * 15_000 + "x" * 10_000)],
        "a long If-Range": [("If-Range", '"' + "a" * 30_000 + '"'), ("Range", "bytes=0-0")],
        "a long date": [("If-Modified-Since", "Mon, " + " " * 30_000), ("If-Range", " " * 20_000 + "x"), ("Range", "bytes=0-0")],
    }
    plain = min(_timed(target, url, [])[1] for _ in range(5))
    worst = 0.0
    for what, headers in target.some(abuses.items(), 6):
        answer, seconds = min((_timed(target, url, headers) for _ in range(target.many(5, 2))), key=lambda each: each[1])
        whole = answer.status == 200 and answer.body == body
        tally.check(whole or (answer.status, answer.body) == (206, body[:1]), f"{what}: {answer.status} with {len(answer.body):,} bytes")
        tally.check(len(answer.head) < 4_096, f"{what}: a head of {len(answer.head):,} bytes")
        if what == "1,000 ranges":
            worst = seconds / plain
    return worst


def _timed(target: Target, url: str, headers: list[tuple[str, str]]) -> tuple[Answer, float]:
    began = time.perf_counter()
    return target.wire.expect(request("GET", url, headers)), time.perf_counter() - began


def _stall(target: Target, tally: Tally, url: str) -> tuple[int, int]:
    """Clients who ask for 1,000 ranges of a large file and read nothing, while another is served.

    Returns the memory of the server while they are there, and once the last of them has gone.
    """
    sent = request("GET", url, [("Range", "bytes=" + ",".join(["0-"] * 1_000))])
    with ExitStack() as stack:
        stalled = [stack.enter_context(socket.create_connection((target.server.host, target.server.port), 20)) for _ in range(STALLED)]
        for each in stalled:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            each.sendall(sent)
        for each in stalled:
            tally.check(each.recv(12) == b"HTTP/1.1 200", "a stalled client was not even answered")
        tally.check(target.get(url, [("Range", "bytes=0-0")]).status == 206, "nobody else is served meanwhile")
        meanwhile = target.resident_bytes()
    until(lambda: re.search(r"^coffer_http_requests_in_flight 1\.0$", target.nobody.get("/metrics").text, re.MULTILINE))  # that one
    return meanwhile, target.resident_bytes()
