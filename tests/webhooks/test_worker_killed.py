"""The worker is killed while it tells of events: none is lost, and those of a file stay in their order."""

import asyncio
import json
from pathlib import Path

import httpx
from standardwebhooks import Webhook

from tests.fetching.peer import Asked, Peer, Say, always, in_thread
from tests.samples import image
from tests.serving import ServerFactory, execute
from tests.waiting import until
from tests.working import working

OUTSIDE = "127.0.0.2"
NETWORK = f"{OUTSIDE}/32"


def test_killed_again_and_again_and_nothing_is_lost(start_server: ServerFactory, tmp_path: Path) -> None:
    async def unhurried(asked: Asked, say: Say) -> None:
        await asyncio.sleep(0.05)
        await always(200)(asked, say)

    server = start_server(COFFER_FETCH_PRIVATE_NETWORKS=NETWORK)
    with in_thread(Peer(unhurried, OUTSIDE)) as peer, server.client("ada") as ada, server.client() as admin:
        made = admin.post("/api/webhooks", json={"url": peer.url, "types": ["file.created", "file.replaced", "file.deleted"]})
        secret = made.json()["secret"]
        ids = []
        for seed in range(12):
            file_id = ada.post("/api/files/upload", content=image(200, seed)).json()["id"]
            ada.put(f"/api/files/{file_id}/content", content=image(300, seed)).raise_for_status()
            ada.delete(f"/api/files/{file_id}").raise_for_status()
            ids.append(file_id)
        for life in range(3):
            before = len(peer.asked)
            with working(server, tmp_path / f"worker-{life}.log", COFFER_FETCH_PRIVATE_NETWORKS=NETWORK) as worker:
                until(lambda before=before: len(peer.asked) >= before + 5)  # type: ignore[misc]
                worker.kill()
            # Half a minute later what it had in hand is due again.
            execute(server.database_url, "update webhook_deliveries set due_at = least(due_at, clock_timestamp())")
        with working(server, tmp_path / "last.log", COFFER_FETCH_PRIVATE_NETWORKS=NETWORK) as last:
            until(lambda: execute(server.database_url, "select count(*) as n from webhook_deliveries")[0]["n"] == 0)
            last.stop()
    told = httpx.get(f"{server.url}/metrics").text
    assert "\ncoffer_webhook_pending 0.0\n" in told and '\ncoffer_webhook_deliveries_total{result="told"}' in told
    heard: dict[str, list[str]] = {}
    for asked in peer.asked:
        event = Webhook(secret).verify(asked.body, asked.headers)
        types = heard.setdefault(event["data"]["file_id"], [])
        if event["type"] not in types:  # the first time that it is heard
            types.append(event["type"])
    assert heard == {file_id: ["file.created", "file.replaced", "file.deleted"] for file_id in ids}
    assert all("secret" not in json.loads(asked.body)["data"] for asked in peer.asked)
