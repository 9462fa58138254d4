"""`coffer purge` and lifecycle rules: what is beyond its time goes, and nothing else, and a rehearsal changes nothing."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from ops import cli
from server import ledger
from server.commands.failures import Exit
from server.ledger import Database
from server.settings import Settings
from tests.ops.conftest import drifted, path_of
from tests.retention.conftest import Coffer, Done, store
from tests.samples import image, video
from tests.serving import RunningServer, ServerFactory, execute


def age(server: RunningServer, file_id: str, days: int) -> None:
    """Makes a file's bytes so old."""
    execute(
        server.database_url, "update user_files set content_changed_at = now() - make_interval(days => $2) where id = $1", file_id, days
    )


def add_rule(coffer: Coffer, *arguments: str, **environment: str) -> int:
    done = coffer("lifecycle", "add", *arguments, "--json", **environment)
    assert done.code == 0, done.stderr
    rule: dict[str, Any] = json.loads(done.stdout)
    return int(rule["id"])


def told(done: Done) -> list[tuple[str, str, int | None]]:
    """Kind, state and count of each finding."""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [(each["kind"], each["state"], each.get("count")) for each in lines if "summary" not in each]


def files_of(server: RunningServer, user_id: str) -> set[str]:
    with server.client(user_id) as client:
        return {file["id"] for file in client.get("/api/files").json()["files"]}


def test_rules_find_their_files(server: RunningServer, coffer: Coffer) -> None:
    fields: dict[str, dict[str, Any]] = {
        "generated": {"package_name": "generator"},
        "tagged": {"tags": "draft"},
        "of an origin": {"metadata": '{"origin": "/renders", "n": 1}'},
        "of another origin": {"metadata": '{"origin": "/uploads"}'},
        "plain": {},
        "favourite": {"package_name": "generator"},
        "young": {"package_name": "generator"},
        "bob's": {"package_name": "generator"},
    }
    ids = {
        what: store(server, "bob" if what == "bob's" else "ada", seed=seed, **given) for seed, (what, given) in enumerate(fields.items())
    }
    with server.client("ada") as ada:
        ids["video"] = ada.post("/api/files/upload", content=video(2_000), params={"name": "a.mp4"}).json()["id"]
        ada.post(f"/api/files/{ids['favourite']}/favorite", json={"is_favorite": True}).raise_for_status()
    for what, file_id in ids.items():
        age(server, file_id, 89 if what == "young" else 91)
    rules = {
        add_rule(coffer, "delete", "--after-days", "90", "--package-name", "generator", "--user", "ada", "--type", "image"): "generated",
        add_rule(coffer, "delete", "--after-days", "30", "--tag", "draft"): "tagged",
        add_rule(coffer, "delete", "--after-days", "30", "--metadata", "origin=/renders"): "of an origin",
        add_rule(coffer, "delete", "--after-days", "30", "--mime", "video/mp4"): "video",
    }
    add_rule(coffer, "delete", "--after-days", "3650", "--everything")
    rehearsed = coffer("purge", "--json")
    assert (rehearsed.code, told(rehearsed)) == (0, [("rule", "removable", 1)] * 4)
    findings = [json.loads(line) for line in rehearsed.stdout.splitlines()][:-1]
    assert {each["rule_id"]: each["size_bytes"] for each in findings} == dict.fromkeys(rules, 2_000)
    assert json.loads(rehearsed.stdout.splitlines()[-1])["summary"]["files"] == 4
    assert files_of(server, "ada") | files_of(server, "bob") == set(ids.values())
    done = coffer("purge", "--for-real", "--json")
    assert (done.code, told(done)) == (0, [("rule", "removed", 1)] * 4)
    assert files_of(server, "ada") | files_of(server, "bob") == {file_id for what, file_id in ids.items() if what not in rules.values()}
    assert len(server.stored_paths()) == len(ids) - len(rules)
    assert told(coffer("purge", "--json")) == []
    assert drifted(server.database_url) == []
    with server.client() as admin:
        (record,) = admin.get("/api/audit", params={"file": ids["tagged"], "action": "file.deleted"}).json()["records"]
    tagged = next(rule for rule, what in rules.items() if what == "tagged")
    assert (record["actor_kind"], record["detail"]["rule"]) == ("cli", tagged)
    assert coffer("lifecycle", "remove", str(tagged)).code == 0
    assert coffer("lifecycle", "remove", str(tagged)).code == Exit.NOT_FOUND
    assert str(tagged) not in [line.split()[0] for line in coffer("lifecycle", "list").stdout.splitlines()]


def test_replacing_the_bytes_begins_anew(server: RunningServer, coffer: Coffer) -> None:
    file_id = store(server, "ada")
    age(server, file_id, 100)
    add_rule(coffer, "delete", "--after-days", "90", "--type", "image")
    with server.client("ada") as ada:
        ada.put(f"/api/files/{file_id}/content", content=image(500, 5)).raise_for_status()
    assert told(coffer("purge", "--json")) == []


def test_favourites_go_where_the_rule_says_so(server: RunningServer, coffer: Coffer) -> None:
    file_id = store(server, "ada")
    with server.client("ada") as ada:
        ada.post(f"/api/files/{file_id}/favorite").raise_for_status()
    age(server, file_id, 2)
    add_rule(coffer, "delete", "--after-days", "1", "--user", "ada", "--favorites-too")
    assert told(coffer("purge", "--for-real", "--json")) == [("rule", "removed", 1)]


def test_a_legal_hold_wins(start_server: ServerFactory, coffer: Coffer) -> None:
    server = start_server(COFFER_TRASH_DAYS="30")
    kept, trashed, other = store(server, "ada", seed=1), store(server, "ada", seed=2), store(server, "bob", seed=3)
    with server.client("ada") as ada:
        ada.delete(f"/api/files/{trashed}").raise_for_status()
    execute(server.database_url, "update user_files set deleted_at = now() - interval '31 days' where deleted_at is not null")
    for file_id in (kept, other):
        age(server, file_id, 10)
    add_rule(coffer, "delete", "--after-days", "5", "--type", "image")
    coffer("user", "hold", "ada", "--reason", "x")
    for option, state in (((), "removable"), (("--for-real",), "removed")):
        done = coffer("purge", "--json", *option, COFFER_TRASH_DAYS="30")
        assert done.code == 0
        assert told(done) == [("rule", state, 1), ("held", "waiting", 1), ("held", "waiting", 1)]
    assert (files_of(server, "ada"), files_of(server, "bob")) == ({kept}, set())
    coffer("user", "release", "ada")
    coffer("purge", "--for-real", COFFER_TRASH_DAYS="30")
    assert server.stored_paths() == []


def test_to_the_trash_and_out_of_it(start_server: ServerFactory, coffer: Coffer) -> None:
    server = start_server(COFFER_TRASH_DAYS="30")
    file_id, by_hand = store(server, "ada", seed=1), store(server, "ada", seed=2)
    age(server, file_id, 100)
    refused = coffer("lifecycle", "add", "trash", "--after-days", "90", "--type", "image")
    assert (refused.code, "COFFER_TRASH_DAYS" in refused.stderr) == (Exit.USAGE, True)
    rule = add_rule(coffer, "trash", "--after-days", "90", "--type", "image", COFFER_TRASH_DAYS="30")
    off = coffer("purge", "--for-real", "--json")
    assert (off.code, told(off)) == (Exit.FOUND, [("rule", "look", None)])
    assert files_of(server, "ada") == {file_id, by_hand}
    old_path = path_of(server, file_id)
    assert told(coffer("purge", "--for-real", "--json", COFFER_TRASH_DAYS="30")) == [("rule", "removed", 1)]
    assert not old_path.exists() and path_of(server, file_id).exists()
    with server.client("ada") as ada:
        ada.delete(f"/api/files/{by_hand}").raise_for_status()
        assert [file["id"] for file in ada.get("/api/trash").json()["files"]] == [by_hand, file_id]
    assert told(coffer("purge", "--for-real", "--json", COFFER_TRASH_DAYS="30")) == []
    execute(server.database_url, "update user_files set deleted_at = now() - interval '30 days 1 minute' where id = $1", file_id)
    assert told(coffer("purge", "--for-real", "--json")) == [("rule", "look", None)]  # without a time, the trash is left alone
    coffer("lifecycle", "remove", str(rule))
    assert told(coffer("purge", "--json", COFFER_TRASH_DAYS="30")) == [("trash", "removable", 1)]
    assert told(coffer("purge", "--for-real", "--json", COFFER_TRASH_DAYS="30")) == [("trash", "removed", 1)]
    with server.client("ada") as ada:
        assert [file["id"] for file in ada.get("/api/trash").json()["files"]] == [by_hand]
    assert [path.name.split(".")[0] for path in server.stored_paths()] == [by_hand]
    with server.client() as admin:
        actions = [(each["action"], each["detail"]) for each in admin.get("/api/audit", params={"file": file_id}).json()["records"]]
    assert actions[0][1]["trash_days"] == 30 and actions[1][0] == "file.trashed" and actions[1][1]["rule"] == rule


def test_many_go_in_batches(server: RunningServer, coffer: Coffer, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops import purge  # noqa: PLC0415 - only its bounds are changed

    monkeypatch.setattr(purge, "_PAGE", 3)
    monkeypatch.setattr(purge, "_AT_ONCE", 2)
    for user in ("ada", "bob"):
        for seed in range(5):
            age(server, store(server, user, seed=seed, size_bytes=200), 10)
    young = store(server, "ada", seed=9, size_bytes=200)
    add_rule(coffer, "delete", "--after-days", "5", "--type", "image")
    assert told(coffer("purge", "--for-real", "--json")) == [("rule", "removed", 10)]
    assert (files_of(server, "ada"), files_of(server, "bob")) == ({young}, set())


@pytest.mark.anyio
@pytest.mark.parametrize("change", ["favourite", "restored", "untagged"])
async def test_what_was_changed_since_it_was_looked_at_stays(server: RunningServer, change: str) -> None:
    file_id = await asyncio.to_thread(store, server, "ada", tags="draft")
    settings = Settings(database_url=server.database_url)
    db = Database(settings)
    await db.open()
    try:
        await asyncio.to_thread(age, server, file_id, 10)
        sql = "update user_files set deleted_at = now() - interval '10 days'"
        await asyncio.to_thread(execute, server.database_url, sql)
        (trashed,) = await ledger.page_of_old_trash(db, 5, None, 10)
        rule = await ledger.add_rule(
            db,
            action="delete",
            after_days=1,
            user_id=None,
            file_type=None,
            mime_type=None,
            tag="draft",
            package_name=None,
            metadata=None,
            includes_favorites=False,
        )
        (seen,) = (await ledger.page_of_ruled(db, None, 10, with_trash=True)).files
        assert await ledger.page_of_old_trash(db, 5, None, 10) == []  # the rule's
        assert seen.id == trashed.id
        match change:
            case "favourite":
                await asyncio.to_thread(execute, server.database_url, "update user_files set is_favorite = true")
            case "untagged":
                await asyncio.to_thread(execute, server.database_url, "update user_files set tags = '{}'")
            case "restored":
                await ledger.restore_file(db, "ada", seen.id)
                assert await ledger.delete_old_trash(db, "ada", [seen.id], 5) == []
        assert await ledger.delete_ruled(db, "ada", [seen.id], rule.id) == []
    finally:
        await db.close()


def test_what_is_beyond_its_time(database_url: str, server: RunningServer, coffer: Coffer) -> None:
    store(server, "ada")
    with server.client("ada") as ada:
        created = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
        for _ in range(3):
            assert ada.post("/api/tus/", headers=created).status_code == 201
    server.stop()
    execute(database_url, "update uploads set expires_at = now() - interval '8 days'")
    execute(database_url, "update resumable_uploads set expires_at = now() - interval '8 days'")
    execute(database_url, "insert into audit_log (at, action, actor_kind) values (now() - interval '401 days', 'a.b', 'cli')")
    execute(database_url, "update events set created_at = now() - interval '91 days' where id = (select min(id) from events)")
    execute(database_url, "insert into events (user_id, type) values ('ada', 'x')")
    expected = [("reservation", 3), ("resumable_upload", 3), ("record", 1), ("event", 1)]
    assert told(coffer("purge", "--json")) == [(kind, "removable", count) for kind, count in expected]
    assert told(coffer("purge", "--for-real", "--json")) == [(kind, "removed", count) for kind, count in expected]
    assert told(coffer("purge", "--json")) == []
    assert [row["type"] for row in execute(database_url, "select type from events")] == ["x"]
    assert execute(database_url, "select reserved_bytes from user_storage")[0]["reserved_bytes"] == 0
    assert server.incoming() == []
    assert execute(database_url, "select from audit_log where action = 'a.b'") == []
    execute(database_url, "update events set created_at = now() - interval '9999 days'")
    assert told(coffer("purge", "--json", COFFER_EVENTS_DAYS="0")) == []


def test_jobs_that_ended_long_ago(database_url: str, server: RunningServer, coffer: Coffer, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops import purge  # noqa: PLC0415 - only its bounds are changed

    monkeypatch.setattr(purge, "_JOBS_AT_ONCE", 2)
    secret = "whsec_" + "bmV3" * 8
    callback = {"url": "https://app.example.com/", "secret": secret}
    with server.client("ada") as ada, server.client("bob") as bob:

        def end(client: httpx.Client, **wish: Any) -> str:
            made = client.post("/api/generate", json={"outputs": [{"max_bytes": 10_000}], **wish}).json()
            client.post(f"/api/generate/{made['job_id']}/cancel").raise_for_status()
            return str(made["job_id"])

        made = ada.post("/api/generate", json={"outputs": [{"max_bytes": 10_000}], "prompt": "a pier"}).json()
        assert ada.put(made["uploads"][0]["url"], content=image(2_000)).status_code == 201
        store(server, "bob")
        gone = [made["job_id"], end(ada), end(ada), end(ada, callback=callback)]
        due, of_bob, young = end(ada, callback=callback), end(bob), end(ada)
        opened = ada.post("/api/generate", json={"outputs": [{"max_bytes": 10_000}]}).json()["job_id"]
        execute(database_url, "update generation_jobs set callback_state = 'failed' where id = $1", gone[3])
        execute(database_url, "update webhook_deliveries set state = 'dead' where endpoint_id = $1", gone[3])
        old = "update generation_jobs set finished_at = now() - interval '91 days' where id = any ($1)"
        execute(database_url, old, [*gone, due, of_bob])
        execute(database_url, "update generation_jobs set finished_at = now() - interval '89 days' where id = $1", young)
        execute(database_url, "update generation_jobs set created_at = now() - interval '91 days' where id = $1", opened)
        coffer("user", "hold", "bob", "--reason", "x")
        assert told(coffer("purge", "--json")) == [("job", "removable", 4)]
        assert told(coffer("purge", "--for-real", "--json", COFFER_JOBS_DAYS="0")) == []
        assert told(coffer("purge", "--for-real", "--json")) == [("job", "removed", 4)]
        assert told(coffer("purge", "--json")) == []
        left = {str(row["id"]) for row in execute(database_url, "select id from generation_jobs")}
        assert left == {due, of_bob, young, opened}
        assert {str(row["endpoint_id"]) for row in execute(database_url, "select endpoint_id from webhook_deliveries")} == {due}
        assert execute(database_url, "select from generation_outputs where job_id = any ($1)", gone) == []
        (remembered,) = ada.get("/api/media").json()["media"]
        assert (remembered["job_id"], remembered["prompt_used"]) == (made["job_id"], "a pier")
        assert ada.get(f"/api/generate/status/{made['job_id']}").status_code == 404
        assert ada.get(f"/api/files/{remembered['file_id']}/download").content == image(2_000)


def test_the_quarantine(server: RunningServer, coffer: Coffer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * 5_000)
    quarantine = server.volume / "quarantine"
    for name in ("2026-01-01T000000Z", "2099-01-01T000000Z", "somebody's"):
        directory = quarantine / name / "users" / "ada" / "images"
        directory.mkdir(parents=True)
        (directory / f"{uuid4()}.1.png").write_bytes(b"x" * 100)
        (directory / "link").symlink_to(outside)
    rehearsed = coffer("purge", "--json")
    assert (rehearsed.code, told(rehearsed)) == (Exit.FOUND, [("quarantine", "removable", 2), ("strange", "look", None)])
    assert len(list(quarantine.iterdir())) == 3
    assert told(coffer("purge", "--for-real", "--json", COFFER_QUARANTINE_DAYS="0")) == []
    assert told(coffer("purge", "--for-real", "--json")) == [("quarantine", "removed", 2), ("strange", "look", None)]
    assert sorted(path.name for path in quarantine.iterdir()) == ["2099-01-01T000000Z", "somebody's"]
    assert outside.read_bytes() == b"x" * 5_000


def test_the_quarantine_of_a_held_user_stays_and_that_of_an_erased_one_goes(server: RunningServer, coffer: Coffer) -> None:
    for user_id in ("ada", "bob", "päul"):
        store(server, user_id)
    directories = [path.name for path in (server.volume / "users").iterdir()]
    date = server.volume / "quarantine" / "2026-01-01T000000Z"
    for name in directories:
        (date / "users" / name / "images").mkdir(parents=True)
        (date / "users" / name / "images" / f"{uuid4()}.1.png").write_bytes(b"x" * 100)
    coffer("user", "hold", "päul", "--reason", "x")
    (of_paul,) = set(directories) - {"ada", "bob"}
    assert coffer("user", "delete", "bob", "--for-real").code == 0
    assert sorted(path.name for path in (date / "users").iterdir()) == sorted(["ada", of_paul])
    assert told(coffer("purge", "--json")) == [("quarantine", "removable", 1), ("held", "waiting", 1)]
    for _ in range(2):
        done = coffer("purge", "--for-real", "--json")
        assert ("held", "waiting", 1) in told(done)
        assert [path.name for path in (date / "users").iterdir()] == [of_paul]
        assert len(list((date / "users" / of_paul / "images").iterdir())) == 1
    coffer("user", "release", "päul")
    assert told(coffer("purge", "--for-real", "--json")) == [("quarantine", "removed", 1)]
    assert not date.exists()


def test_what_came_out_of_the_trash_is_not_put_back_by_the_next_purge(start_server: ServerFactory, coffer: Coffer) -> None:
    server = start_server(COFFER_TRASH_DAYS="30")
    file_id = store(server, "ada")
    age(server, file_id, 100)
    add_rule(coffer, "trash", "--after-days", "90", "--type", "image", COFFER_TRASH_DAYS="30")
    assert told(coffer("purge", "--for-real", "--json", COFFER_TRASH_DAYS="30")) == [("rule", "removed", 1)]
    with server.client("ada") as ada:
        assert ada.post(f"/api/files/{file_id}/restore").status_code == 200
    for option in ((), ("--for-real",)):
        assert told(coffer("purge", "--json", *option, COFFER_TRASH_DAYS="30")) == []
    assert files_of(server, "ada") == {file_id}
    execute(server.database_url, "update user_files set restored_at = now() - interval '91 days'")
    assert told(coffer("purge", "--for-real", "--json", COFFER_TRASH_DAYS="30")) == [("rule", "removed", 1)]


def test_a_rehearsal_counts_what_is_then_removed(start_server: ServerFactory, coffer: Coffer) -> None:
    """A file that a rule deletes, and whose time in the trash is over, counts once."""
    server = start_server(COFFER_TRASH_DAYS="30")
    both, trashed, ruled, plain = (store(server, "ada", seed=seed) for seed in range(4))
    with server.client("ada") as ada:
        for file_id in (both, trashed):
            ada.delete(f"/api/files/{file_id}").raise_for_status()
    execute(server.database_url, "update user_files set deleted_at = now() - interval '31 days' where deleted_at is not null")
    for file_id in (both, ruled):
        age(server, file_id, 100)
    age(server, plain, 50)
    add_rule(coffer, "delete", "--after-days", "90", "--type", "image")
    add_rule(coffer, "trash", "--after-days", "40", "--type", "image", COFFER_TRASH_DAYS="30")
    rehearsed = coffer("purge", "--json", COFFER_TRASH_DAYS="30")
    done = coffer("purge", "--for-real", "--json", COFFER_TRASH_DAYS="30")
    assert told(rehearsed) == [(kind, "removable", count) for kind, _, count in told(done)]
    assert told(done) == [("rule", "removed", 2), ("rule", "removed", 1), ("trash", "removed", 1)]
    sums = [{name: json.loads(each.stdout.splitlines()[-1])["summary"][name] for name in ("files", "bytes")} for each in (rehearsed, done)]
    assert sums[0] == sums[1] == {"files": 4, "bytes": 8_000}
    assert files_of(server, "ada") == set()


@pytest.mark.parametrize(
    "wrong",
    [
        "lifecycle add delete --type image",
        "lifecycle add delete --after-days 0 --type image",
        "lifecycle add delete --after-days 9999999 --type image",
        "lifecycle add delete --after-days 90",
        "lifecycle add burn --after-days 90 --type image",
        "lifecycle add delete --after-days 90 --metadata origin",
        "lifecycle remove first",
        "purge --older-than 3",
    ],
)
def test_wrong_wishes_are_refused(coffer: Coffer, wrong: str) -> None:
    assert coffer(*wrong.split()).code == Exit.USAGE
    assert cli.run(["lifecycle", "list"]) == 0
