"""12, its part about the database and rights: a dump opens nothing, a key does what its scopes say, and a revoked one soon does nothing."""

import base64
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from ops.embedded_postgres import binaries_for
from server.auth import Scope, api_keys
from tests.attack.routes import ADMINS, APPS, UUIDS, Operation, content_of, operations_of
from tests.attack.target import MISSING, Tally, Target, errors_in
from tests.attack.wire import Answer, Wire, request
from tests.serving import RunningServer, execute
from tests.waiting import until

REVOKED_WITHIN_SECONDS = 5
PROCESSES = 2
MOST_CONNECTIONS = 200
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")


def attack(target: Target, tally: Tally) -> str:
    asked = _ask_with_wrong_scopes(target, tally)
    seconds = _revoke(target, tally)
    searched, size_bytes = _dump(target, tally)
    return (
        f"{asked:,} requests with wrong scopes: all 403; revoked after {seconds:.1f} s in {PROCESSES} processes; "
        f"{searched:,} secrets looked for in a dump of {size_bytes / 2**20:.1f} MiB: 0 found"
    )


def _needed(operation: Operation) -> Scope:
    """By the rule, not by what the server says: an admin's routes, an app's, links, what changes something, the rest."""
    if operation.path.startswith(ADMINS):
        return Scope.ADMIN
    if operation.path.startswith(APPS) and operation.method != "GET":
        return Scope.JOBS_WRITE
    links = ("/api/links", "/api/uploads/links", "/api/storage/{file_id}/url")
    signs = operation.path.endswith(("/link", "/revoke-links")) and not operation.path.startswith("/api/assets")
    changes_publicity = operation.path.endswith("/public") and operation.method != "GET"
    if operation.path.startswith(links) or signs or changes_publicity:
        return Scope.LINKS_WRITE
    return Scope.FILES_READ if operation.method in {"GET", "HEAD"} else Scope.FILES_WRITE


def _ask_with_wrong_scopes(target: Target, tally: Tally) -> int:
    """Every route with no scope, with each wrong one and with all but the right one; and, so that it means something, with that."""
    keys = {scopes: target.new_key(*scopes) for scopes in [(), *((each,) for each in Scope), *(_all_but(each) for each in Scope)]}
    asked = 0
    for operation in operations_of(target, tally):
        if not operation.path.startswith("/api/"):
            continue
        needed = _needed(operation)
        for scopes in [(), *((each,) for each in Scope if each is not needed), _all_but(needed)]:
            answer = _ask(target, operation, keys[scopes])
            asked += 1
            what = f"{operation.method} {operation.path} with {', '.join(scopes) or 'no scope'}"
            tally.check(answer.status == 403, f"{what}: {answer.status}")
            if operation.method != "HEAD":
                tally.check(answer.code == "forbidden" and f'"needed_scope":"{needed}"'.encode() in answer.body, f"{what}: {answer.body!r}")
        answer = _ask(target, operation, keys[needed,])
        tally.check(answer.status not in {401, 403, 500}, f"{operation.method} {operation.path} with {needed}: {answer.status}")
    return asked


def _all_but(scope: Scope) -> tuple[Scope, ...]:
    return tuple(each for each in Scope if each is not scope)


def _ask(target: Target, operation: Operation, key: str) -> Answer:
    path = operation.path
    for name in operation.parameters:
        path = path.replace(f"{{{name}}}", MISSING if name in UUIDS else "nobody-at-all")
    headers = [("Authorization", f"Bearer {key}"), ("X-User-Id", "scoped")]
    return target.wire.expect(request(operation.method, path, *content_of(operation.body, MISSING, headers)))


def _revoke(target: Target, tally: Tally) -> float:
    """How many seconds after its revocation the last of the processes took a key."""
    key = target.new_key(Scope.FILES_READ)
    with target.another_server(COFFER_PROCESSES=str(PROCESSES), COFFER_DATABASE_CONNECTIONS="5") as server, ExitStack() as stack:
        until(lambda: server.logged().count('"message":"started"') == PROCESSES)
        sent = request("GET", "/api/files", [("Authorization", f"Bearer {key}"), ("X-User-Id", "ada")])
        wires: list[Wire] = []

        def statuses() -> set[int]:
            return {wire.expect(sent).status for wire in wires}

        while len(_processes_reached(server)) < PROCESSES:  # the kernel deals connections out as it likes
            assert len(wires) < MOST_CONNECTIONS, "some process gets no connection"
            wires.append(stack.enter_context(closing(Wire(server.host, server.port))))
            tally.check(wires[-1].expect(sent).status == 200, "a good key is refused")
        tally.check(statuses() == {200}, "a good key is refused")
        execute(server.database_url, "update api_keys set revoked_at = now() where key_id = $1", key.split("_")[1])
        revoked_at = time.monotonic()
        while statuses() != {401} and time.monotonic() < revoked_at + REVOKED_WITHIN_SECONDS:
            pass
        seconds = time.monotonic() - revoked_at
        tally.check(statuses() == {401}, f"a key works {REVOKED_WITHIN_SECONDS} s after its revocation")
        tally.check(not (errors := errors_in(server.logged())), f"errors in the log: {errors[:1]}")
    return seconds


def _processes_reached(server: RunningServer) -> set[str]:
    """The server's processes that hold a connection of ours."""
    listening, established = f":{server.port:04X}", "01"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(listening) and row[3] == established}
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return {child for child in children if inodes & set(_open_files(child))}


def _open_files(process_id: str) -> Iterator[str]:
    for each in Path(f"/proc/{process_id}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            yield str(each.readlink())


def _dump(target: Target, tally: Tally) -> tuple[int, int]:
    """Looks for every secret so far, as text and as bytes. What is kept of a key instead is there, or this would be no dump."""
    command = [str(binaries_for(None) / "pg_dump"), f"--dbname={target.server.database_url}"]
    dump = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    for secret in target.secrets:
        shapes = {secret, secret.encode().hex(), base64.b64encode(secret.encode()).decode().rstrip("="), _decoded(secret).hex() or secret}
        tally.check(not any(shape in dump for shape in shapes), f"{secret[:12]}... is in the database")
        if (key := api_keys.parse(secret)) is not None:
            tally.check(all(kept in dump for kept in (key[0], key[1].hex())), f"the dump does not hold what is known of {key[0]}")
    return len(target.secrets), len(dump)


def _decoded(text: str) -> bytes:
    """The bytes that stand behind a text of base64url, or nothing."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) if _BASE64URL.fullmatch(text) and len(text) % 4 != 1 else b""
