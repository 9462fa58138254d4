"""The admin routes of webhooks. What is sent is tested in tests/webhooks."""

import json

import pytest

from server.auth import Scope
from tests.serving import RunningServer, execute

URL = "https://app.example.com/hooks"
MISSING = "01900000-0000-7000-8000-000000000000"


def test_an_endpoint_from_its_making_to_its_end(api: RunningServer) -> None:
    with api.client() as admin:
        made = admin.post("/api/webhooks", json={"url": URL, "types": ["file.created"], "description": "the app"})
        assert made.status_code == 201, made.text
        webhook = made.json()
        assert webhook["secret"].startswith("whsec_") and (webhook["url"], webhook["types"]) == (URL, ["file.created"])
        with api.client("webhooks-ada") as ada:
            assert ada.post("/api/files/upload", content=b'{"asset":{"version":"2.0"},"scenes":[]}', params={"type": "scene"}).is_success
        shown = admin.get(f"/api/webhooks/{webhook['id']}").json()
        assert (shown["pending"], shown["dead"], shown["last_sent_at"], "secret" in shown) == (1, 0, None, False)
        assert shown in admin.get("/api/webhooks").json()["webhooks"]
        rotated = admin.post(f"/api/webhooks/{webhook['id']}/rotate-secret", json={}).json()
        assert rotated["secret"].startswith("whsec_") and rotated["secret"] != webhook["secret"]
        execute(api.database_url, "update webhook_deliveries set state = 'dead', last_failure = 'timeout'")
        page = admin.get(f"/api/webhooks/{webhook['id']}/dead-letters", params={"limit": 1}).json()
        (letter,) = page["dead_letters"]
        assert (letter["type"], letter["last_failure"], letter["data"]["user_id"]) == ("file.created", "timeout", "webhooks-ada")
        last = admin.get(f"/api/webhooks/{webhook['id']}/dead-letters", params={"limit": 1, "cursor": page["next_cursor"]}).json()
        assert last == {"dead_letters": [], "next_cursor": None}
        assert admin.post(f"/api/webhooks/{webhook['id']}/redeliver", json={"ids": [letter["id"] + 1]}).json() == {"redelivered": 0}
        assert admin.post(f"/api/webhooks/{webhook['id']}/redeliver", json={}).json() == {"redelivered": 1}
        assert admin.delete(f"/api/webhooks/{webhook['id']}").status_code == 204
        assert admin.delete(f"/api/webhooks/{webhook['id']}").status_code == 404
        trail = [record["action"] for record in admin.get("/api/audit", params={"limit": 10}).json()["records"]]
    told = [action for action in trail if action.startswith("webhook.")]
    assert told == ["webhook.deleted", "webhook.redelivered", "webhook.secret_rotated", "webhook.created"]
    assert webhook["secret"] not in api.logged()


def test_callbacks_that_were_given_up(api: RunningServer) -> None:
    callback = {"url": URL, "secret": "whsec_" + "bmV3" * 8}
    jobs = []
    with api.client("callbacks-ada") as ada, api.client() as admin:
        for _ in range(3):
            made = ada.post("/api/generate", json={"outputs": [{"max_bytes": 1}], "callback": callback}).json()
            ada.post(f"/api/generate/{made['job_id']}/cancel").raise_for_status()
            jobs.append(made["job_id"])
        execute(api.database_url, "update webhook_deliveries set state = 'dead' where endpoint_id = any ($1)", jobs)
        execute(api.database_url, "update generation_jobs set callback_state = 'failed' where id = any ($1)", jobs)
        first = admin.get("/api/webhooks/callbacks/dead-letters", params={"limit": 2}).json()
        second = admin.get("/api/webhooks/callbacks/dead-letters", params={"limit": 2, "cursor": first["next_cursor"]}).json()
        letters = first["dead_letters"] + second["dead_letters"]
        assert [each["data"]["job_id"] for each in letters] == jobs and second["next_cursor"] is None
        assert (letters[0]["type"], letters[0]["data"]["user_id"]) == ("job.cancelled", "callbacks-ada")
        assert admin.post("/api/webhooks/callbacks/redeliver", json={"ids": [letters[1]["id"]]}).json() == {"redelivered": 1}
        assert [ada.get(f"/api/generate/status/{each}").json()["callback_state"] for each in jobs] == ["failed", "due", "failed"]
        assert admin.post("/api/webhooks/callbacks/redeliver", json={}).json() == {"redelivered": 2}
        (record, _) = admin.get("/api/audit", params={"action": "webhook.redelivered", "limit": 2}).json()["records"]
        assert record["detail"] == {"callbacks": 2}
        assert admin.get("/api/webhooks/callbacks/dead-letters", params={"cursor": "x"}).status_code == 400
        assert "whsec" not in str(first)


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({"url": "http://app.example.com/"}, "url_refused", None),
        ({"url": "https://127.0.0.1/"}, "url_refused", None),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "url_refused", None),
        ({"url": "https://0x7f.1/"}, "url_refused", None),
        ({"url": "https://key:secret@app.example.com/"}, "url_refused", None),
        ({"url": URL, "types": ["file.seen"]}, "invalid_request", "types"),
        ({"url": URL, "types": []}, "invalid_request", "types"),
        ({"url": URL, "description": "a" * 501}, "invalid_request", "description"),
        ({"url": URL, "secret": "whsec_mine"}, "invalid_request", "body"),
        ({"url": 7}, "invalid_request", "url"),
        ({}, "invalid_request", "body"),
    ],
)
def test_what_is_refused(api: RunningServer, body: object, code: str, field: str | None) -> None:
    with api.client() as admin:
        answer = admin.post("/api/webhooks", json=body)
        assert (answer.status_code, answer.json()["code"], answer.json().get("field")) == (400, code, field), answer.text


@pytest.mark.parametrize("cursor", ["x", "-1", "9" * 20, "٣"])
def test_cursors_that_are_none(api: RunningServer, cursor: str) -> None:
    with api.client() as admin:
        answer = admin.get(f"/api/webhooks/{MISSING}/dead-letters", params={"cursor": cursor})
        assert answer.status_code in (400, 404)
        made = admin.post("/api/webhooks", json={"url": URL}).json()
        answer = admin.get(f"/api/webhooks/{made['id']}/dead-letters", params={"cursor": cursor})
        assert (answer.status_code, answer.json()["field"]) == (400, "cursor")
        admin.delete(f"/api/webhooks/{made['id']}")


def test_a_missing_endpoint_is_told_so(api: RunningServer) -> None:
    with api.client() as admin:
        for method, path, body in (
            ("GET", "", None),
            ("DELETE", "", None),
            ("GET", "/dead-letters", None),
            ("POST", "/rotate-secret", {}),
            ("POST", "/redeliver", {}),
        ):
            answer = admin.request(method, f"/api/webhooks/{MISSING}{path}", json=body)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path


def test_there_are_at_most_twenty(api: RunningServer) -> None:
    with api.client() as admin:
        made = [admin.post("/api/webhooks", json={"url": f"{URL}/{number}"}).json() for number in range(20)]
        answer = admin.post("/api/webhooks", json={"url": URL})
        assert (answer.status_code, answer.json()["field"]) == (400, "url")
        for each in made:
            admin.delete(f"/api/webhooks/{each['id']}")


def test_only_admins_see_them(api: RunningServer) -> None:
    others = api.new_key(*(scope for scope in Scope if scope is not Scope.ADMIN))
    with api.client("ada", api_key=others) as client:
        for answer in (
            client.get("/api/webhooks"),
            client.post("/api/webhooks", json={"url": URL}),
            client.delete(f"/api/webhooks/{MISSING}"),
        ):
            assert (answer.status_code, json.loads(answer.text)["needed_scope"]) == (403, "admin")
