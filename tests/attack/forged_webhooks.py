"""11: messages of pipelines that were changed, are old, are replayed or signed with another secret: refused, or without effect."""

import random
import time
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any

import msgspec
from standardwebhooks import Webhook

from tests.attack.target import BODY, Tally, Target


def attack(target: Target, tally: Tally) -> str:
    client = target.user("generating")
    job, other = (client.post("/api/generate", json={"outputs": [{"max_bytes": 100_000}] * 2}).json() for _ in range(2))
    data = {"job_id": job["job_id"], "outputs": [{"index": 0, "base64": b64encode(BODY).decode()}]}
    body = msgspec.json.encode({"type": "job.progress", "data": data})
    good = _signed(job["webhook"]["secret"], body, time.time())
    forged = _forged(job, other, body, good, target.many(400, 40))
    for what, url, content, headers in forged:
        answer = target.nobody.post(url, content=content, headers=headers)
        tally.check(answer.status_code in {400, 401}, f"{what}: {answer.status_code} {answer.text[:200]}")
    found = client.get(f"/api/generate/status/{job['job_id']}").json()
    tally.check((found["state"], found["progress_percent"]) == ("queued", 0), f"a forged message had an effect: {found}")
    accepted = target.nobody.post(job["webhook"]["url"], content=body, headers=good).json()
    tally.check(accepted["status"] == "accepted", f"a good message is refused: {accepted}")
    before = target.listed(client), client.get(f"/api/generate/status/{job['job_id']}").json()
    for _ in range(20):
        replayed = target.nobody.post(job["webhook"]["url"], content=body, headers=good)
        tally.check(replayed.json().get("status") == "repeated", f"a replay: {replayed.text}")
    after = target.listed(client), client.get(f"/api/generate/status/{job['job_id']}").json()
    for each in (before, after):
        each[1].pop("processing_seconds")  # it goes on by itself
    tally.check(before == after, "a replay had an effect")
    client.close()
    return f"{len(forged):,} forged messages refused, 20 replays without effect"


def _forged(
    job: dict[str, Any], other: dict[str, Any], body: bytes, good: dict[str, str], mutations: int
) -> list[tuple[str, str, bytes, dict[str, str]]]:
    url, secret, now = job["webhook"]["url"], job["webhook"]["secret"], time.time()
    found = [
        ("old", url, body, _signed(secret, body, now - 310)),
        ("from the future", url, body, _signed(secret, body, now + 330)),
        ("with another job's secret", url, body, _signed(other["webhook"]["secret"], body, now)),
        ("for another job", other["webhook"]["url"], body, good),
        ("about another job", other["webhook"]["url"], body, _signed(other["webhook"]["secret"], body, now)),
        ("of no pipeline", "/api/generate/webhook?pipeline=nobody", body, good),
        ("with another id", url, body, {**good, "webhook-id": "msg_2"}),
        ("with another time", url, body, {**good, "webhook-timestamp": str(int(good["webhook-timestamp"]) + 1)}),
        ("with the secret itself", url, body, {**good, "webhook-signature": f"v1,{secret.removeprefix('whsec_')}"}),
        *((f"without {name}", url, body, {each: value for each, value in good.items() if each != name}) for name in good),
    ]
    dice = random.Random(11)
    for _ in range(mutations):
        at = dice.randrange(len(body))
        changed = bytes([body[at] ^ (1 << dice.randrange(8))])
        found.append((f"byte {at} changed", url, body[:at] + changed + body[at + 1 :], good))
        signature = good["webhook-signature"]
        at = dice.randrange(3, len(signature) - 2)
        forged = signature[:at] + ("A" if signature[at] != "A" else "B") + signature[at + 1 :]
        found.append((f"character {at} of the signature changed", url, body, {**good, "webhook-signature": forged}))
    return found


def _signed(secret: str, body: bytes, at: float) -> dict[str, str]:
    moment = datetime.fromtimestamp(int(at), UTC)
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at)),
        "webhook-signature": Webhook(secret).sign("msg_1", moment, body.decode()),
    }
