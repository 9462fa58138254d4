"""The end of users: certified, and of those whom nobody uses."""

import hashlib
import json
from pathlib import Path

import pytest

from server.commands.failures import Exit
from tests.retention.conftest import Coffer, store
from tests.samples import image
from tests.serving import RunningServer, execute
from tests.waiting import until


def expected_digest(ids: list[str]) -> str:
    """The SHA-256 of the files' SHA-256, in the order of their ids."""
    contents = {file_id: image(2_000, seed) for seed, file_id in enumerate(ids)}
    return hashlib.sha256(b"".join(hashlib.sha256(contents[file_id]).digest() for file_id in sorted(ids))).hexdigest()


def test_an_erasure_is_certified(server: RunningServer, coffer: Coffer, tmp_path: Path) -> None:
    ids = [store(server, "ada", seed=seed) for seed in range(3)]
    target = tmp_path / "certificate.json"
    assert coffer("user", "certificate", "ada").code == Exit.NOT_FOUND
    rehearsed = coffer("user", "delete", "ada", "--certificate", str(target))
    assert (rehearsed.code, target.exists(), len(server.stored_paths())) == (0, False, 3)
    done = coffer("user", "delete", "ada", "--for-real", "--certificate", str(target))
    assert (done.code, done.stdout, server.stored_paths()) == (0, "", [])
    certificate = json.loads(target.read_text())
    facts = {name: certificate[name] for name in ("user_id", "files", "bytes", "sha256_of_digests")}
    assert facts == {"user_id": "ada", "files": 3, "bytes": 6_000, "sha256_of_digests": expected_digest(ids)}
    assert certificate["requested_by"]["kind"] == certificate["erased_by"]["kind"] == "cli"
    assert certificate["requested_at"] <= certificate["erased_at"]
    assert json.loads(coffer("user", "certificate", "ada").stdout) == certificate
    # The trail, which nobody changes, says the same.
    with server.client() as admin:
        (record,) = admin.get("/api/audit", params={"user": "ada", "action": "user.erasing"}).json()["records"]
    assert (record["id"], record["detail"]["sha256_of_digests"]) == (certificate["records"][0], certificate["sha256_of_digests"])
    # A user of the same id who came later has a certificate of their own.
    with server.client("ada") as ada:  # the server may take ada for who she was once more
        until(lambda: ada.post("/api/files/upload", content=image(2_000, 7)).status_code == 201)
    refused = coffer("user", "delete", "ada", "--for-real", "--certificate", str(target))
    assert (refused.code, len(server.stored_paths())) == (Exit.REFUSED, 1)
    with server.client() as admin:
        assert admin.delete("/api/users/ada").status_code == 204
    later = json.loads(coffer("user", "certificate", "ada").stdout)
    assert (later["files"], later["requested_by"]["kind"]) == (1, "api_key")
    assert later["records"] != certificate["records"]


def test_an_erasure_that_was_interrupted_is_certified_whole(server: RunningServer, coffer: Coffer) -> None:
    ids = [store(server, "ada", seed=seed) for seed in range(3)]
    server.stop()
    actor = json.dumps({"kind": "cli", "id": "root"})
    execute(server.database_url, "select from begin_erasing_v1('ada', $1::jsonb, null, null, null)", actor)
    first = "select from delete_files_v3('ada', array(select id from user_files order by id limit 1), $1::jsonb, '{}')"
    execute(server.database_url, first, actor)
    assert coffer("user", "certificate", "ada").code == Exit.NOT_FOUND  # it has not ended
    certificate = json.loads(coffer("user", "delete", "ada", "--for-real").stdout)
    assert (certificate["files"], certificate["sha256_of_digests"]) == (3, expected_digest(ids))


def test_an_erased_users_usage_goes_with_them(server: RunningServer, coffer: Coffer) -> None:
    for user in ("ada", "bob"):
        store(server, user)
    execute(server.database_url, "update usage_ledger set changed_at = changed_at - interval '1 day'")
    assert coffer("usage").code == 0
    users = "select distinct user_id from usage_days order by user_id"
    assert [row["user_id"] for row in execute(server.database_url, users)] == ["ada", "bob"]
    assert coffer("user", "delete", "ada", "--for-real").code == 0
    assert [row["user_id"] for row in execute(server.database_url, users)] == ["bob"]


def age(server: RunningServer, user_id: str, days: int) -> None:
    sql = "update user_storage set updated_at = now() - make_interval(days => $2) where user_id = $1"
    execute(server.database_url, sql, user_id, days)


def test_users_whom_nobody_uses(server: RunningServer, coffer: Coffer) -> None:
    for user in ("gone", "held", "paying", "young", "storing", "uploading"):
        file_id = store(server, user)
        with server.client(user) as client:
            if user != "storing":
                client.delete(f"/api/files/{file_id}").raise_for_status()
            if user == "uploading":
                client.post("/api/uploads/links", json={"max_bytes": 100}).raise_for_status()
    server.set_quota("paying", 50 * 2**30)
    assert coffer("user", "hold", "held", "--reason", "x").code == 0
    for user in ("gone", "held", "paying", "storing", "uploading"):
        age(server, user, 400)
    age(server, "young", 300)

    def listed(*options: str) -> list[str]:
        done = coffer("user", "cleanup", "--unseen-days", "365", "--json", *options)
        assert done.code == 0, done.stderr
        return [json.loads(line)["user_id"] for line in done.stdout.splitlines()]

    assert listed() == ["gone"]
    assert listed("--any-quota") == ["gone", "paying"]
    assert listed("--for-real") == ["gone"]
    assert listed("--for-real") == []
    users = [row["user_id"] for row in execute(server.database_url, "select user_id from user_storage order by user_id")]
    assert users == ["held", "paying", "storing", "uploading", "young"]
    assert listed("--for-real", "--any-quota") == ["paying"]
    assert not (server.volume / "users" / "gone").exists()


@pytest.mark.parametrize("wrong", ["user cleanup", "user cleanup --unseen-days 0", "user cleanup --unseen-days x"])
def test_wrong_wishes_are_refused(coffer: Coffer, wrong: str) -> None:
    assert coffer(*wrong.split()).code == Exit.USAGE
