"""12, its part about logs: no key, token or signature in any log line, metric or answer that tells of a failure."""

import itertools
import re
from urllib.parse import quote

from tests.attack.target import BODY, Tally, Target
from tests.attack.wire import request
from tests.waiting import until

HEADERS = ["Authorization", "X-Request-Id", "X-User-Id", "Referer", "Cookie", "Range", "If-None-Match", "Idempotency-Key", "Content-Digest"]
# Secrets are long and of these characters alone: so the words of the log that are not are not looked through thousands of times.
_WORD = re.compile(r"[A-Za-z0-9_.!-]{16,}")
_REQUEST_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def attack(target: Target, tally: Tally) -> str:
    file_id = target.upload(target.ada)["id"]
    key, link, public = target.new_key(), target.link(target.ada, file_id), target.public_url(target.ada, file_id)
    upload, _ = target.upload_link(target.ada)
    secrets = [key, key[:-1] + "!", target.token("ada"), link, link.split("/")[2], public, upload, upload.split("/")[2]]
    failures = []
    for secret in secrets:
        escaped = quote(secret, safe="")
        paths = [secret if secret.startswith("/") else f"/{secret}", f"/{escaped}", f"/api/files?cursor={secret}", f"/api/files?{secret}=1"]
        for path, method in itertools.product(paths, ("GET", "PUT", "FOO")):
            failures.append(target.wire.expect(request(method, path)))
            target.wire.close()
        # A user's id is any text, and is logged: so only what has the shape of a key is known to be none there.
        owned = [f"/api/users/{escaped}"] if secret.startswith("cof_") else []
        owned += [f"/api/files/{escaped}/download", f"/api/files/{escaped}", f"/api/files?cursor={escaped}"]
        failures += [target.get(path, target.headers_of("ada")) for path in owned]
        for name in HEADERS:
            failures.append(target.wire.expect(request("POST", "/api/files/upload", [(name, secret)], b"x")))
            failures.append(target.get("/api/files", [(name, f"Bearer {secret}")]))
    failures += [target.wire.expect(request("PUT", upload, body=body)) for body in (b"no such type", BODY, BODY)]
    marker = "everything-is-logged"
    target.get("/health/live", [("X-Request-Id", marker)])
    until(lambda: marker in target.server.logged())
    logged = target.logged()
    told = "".join(f"{answer.head.decode()}{answer.body.decode()}" for answer in failures if answer.status >= 400)
    for place, text in (("the log", logged), ("the metrics", target.nobody.get("/metrics").text), ("an answer that refuses", told)):
        words = "\n".join(word for word in set(_WORD.findall(text)) if not _REQUEST_ID.fullmatch(word))
        for secret in target.secrets | target.public_ids:
            tally.check(secret not in words, f"{secret[:12]}... is in {place}: {_around(text, secret)}")
    where = f"{len(logged) / 2**20:.1f} MiB of log, {len(failures)} answers and the metrics"
    return f"{len(target.secrets):,} secrets looked for in {where}: 0 found"


def _around(text: str, secret: str) -> str:
    at = text.find(secret)
    return text[max(0, at - 200) : at].rpartition("\n")[2] if at >= 0 else ""
