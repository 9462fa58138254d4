"""Legal holds: nothing of a held user's goes, by whatever way, and nobody is both held and erased."""

import asyncio
import json

import asyncpg
import pytest

from server import ledger
from server.actor import actor_json
from server.commands.failures import Exit
from server.errors import LegalHold, NotFound, UserErasing
from server.ledger import Database, statements
from tests.ledger.races import waiting_for_lock
from tests.quota.rows import add_user, add_volume, insert_file, replacement, used
from tests.retention.conftest import Coffer, store
from tests.samples import image
from tests.serving import RunningServer, ServerFactory


def test_over_http(start_server: ServerFactory, coffer: Coffer) -> None:
    server = start_server(COFFER_TRASH_DAYS="30")
    kept, trashed = store(server, "ada", seed=1), store(server, "ada", seed=2)
    with server.client("ada") as ada:
        assert ada.delete(f"/api/files/{trashed}").status_code == 204
        before = set(server.stored_paths())
        held = coffer("user", "hold", "ada", "--reason", "case 7/26", "--json")
        assert (held.code, json.loads(held.stdout)["hold_reason"]) == (0, "case 7/26")
        for method, path, body in (
            ("DELETE", f"/api/files/{kept}", None),
            ("DELETE", f"/api/files/{kept}?permanent=true", None),
            ("POST", "/api/files/delete", {"ids": [kept]}),
            ("POST", "/api/files/delete", {"ids": [kept], "permanent": True}),
            ("DELETE", f"/api/trash/{trashed}", None),
            ("DELETE", "/api/users/ada", None),
        ):
            answer = ada.request(method, path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (409, "legal_hold"), (method, path, answer.text)
        for size in (2_000, 1_500_000):  # the first shares a transaction, the second holds a reservation
            answer = ada.put(f"/api/files/{kept}/content", content=image(size, 9))
            assert (answer.status_code, answer.json()["code"]) == (409, "legal_hold")
        assert set(server.stored_paths()) == before
        assert ada.get("/api/users/ada").json()["held_at"] is not None
        # Everything else goes on.
        assert ada.get(f"/api/files/{kept}/download").content == image(2_000, 1)
        assert ada.patch(f"/api/files/{kept}", json={"file_name": "b.png"}).status_code == 200
        assert ada.post(f"/api/files/{kept}/revoke-links").status_code == 200
        assert ada.post(f"/api/files/{trashed}/restore").status_code == 200
        more = store(server, "ada", seed=3)
        assert ada.delete(f"/api/files/{more}").status_code == 409
        assert "case 7/26" in coffer("user", "show", "ada").stderr
        refused = coffer("user", "delete", "ada", "--for-real")
        assert (refused.code, "case 7/26" in refused.stderr) == (Exit.REFUSED, True)
        assert coffer("user", "release", "ada").code == 0
        assert ada.delete(f"/api/files/{kept}", params={"permanent": "true"}).status_code == 204
    assert coffer("user", "hold", "nobody", "--reason", "x").code == Exit.NOT_FOUND
    assert coffer("user", "release", "nobody").code == Exit.NOT_FOUND
    assert coffer("user", "hold", "ada").code == Exit.USAGE
    with server.client() as admin:
        records = admin.get("/api/audit", params={"user": "ada"}).json()["records"]
    assert [(each["action"], each["detail"]) for each in records if each["action"].startswith("user.") and each["actor_kind"] == "cli"] == [
        ("user.released", {}),
        ("user.held", {"reason": "case 7/26"}),
    ]


@pytest.mark.anyio
async def test_the_database_itself_refuses(db: Database, connection: asyncpg.Connection) -> None:
    await add_volume(connection)
    for user in ("ada", "bob"):
        await add_user(connection, user, None)
    file_id, his = await insert_file(connection, "ada", 10), await insert_file(connection, "bob", 20)
    await ledger.hold_user(db, "ada", "a reason")
    for statement in (
        "delete from user_files",
        "delete from user_files where user_id = 'ada'",
        "delete from user_storage where user_id = 'ada'",
        "update user_files set deleted_at = now() where user_id = 'ada'",
        "update user_files set sha256 = sha256(''), file_path = '/' || id || '.2.', generation = 2 where user_id = 'ada'",
        "update user_files set user_id = 'bob'",
        "update user_storage set erasing_at = now()",
        "select from delete_files_v3('ada', (select array_agg(id) from user_files), '{\"kind\": \"cli\"}', '{}')",
        "select from delete_files_v2('ada', (select array_agg(id) from user_files), '{\"kind\": \"cli\"}')",
    ):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await connection.execute(statement)
        assert refused.value.sqlstate == "CF010", statement
    with pytest.raises(LegalHold):
        await ledger.begin_erasing(db, "ada")
    with pytest.raises(LegalHold):
        await ledger.replace_content(db, user_id="ada", file_id=file_id, expected_generation=1, new=_other_bytes(file_id))
    assert await used(connection, "ada") == (10, 0, 1)
    await ledger.delete_files(db, "bob", [his])
    await connection.execute("update user_files set file_name = 'x.png', is_favorite = true")
    await ledger.release_user(db, "ada")
    await ledger.release_user(db, "ada")
    await ledger.delete_files(db, "ada", [file_id])
    await ledger.begin_erasing(db, "ada")
    with pytest.raises(UserErasing):
        await ledger.hold_user(db, "ada", "too late")
    with pytest.raises(NotFound):
        await ledger.hold_user(db, "nobody", "x")


@pytest.mark.anyio
async def test_a_deletion_and_a_hold_at_the_same_moment(db: Database, connection: asyncpg.Connection, database_url: str) -> None:
    """Whoever comes second sees what the first did: no file goes after its user was held."""
    await add_volume(connection)
    await add_user(connection, "ada", None)
    volume_id = await connection.fetchval("select id from volumes")
    first, second = await insert_file(connection, "ada", 10), await insert_file(connection, "ada", 20)
    other = await asyncpg.connect(database_url)
    try:
        # A deletion under way, a hold that comes during it: it waits, and then keeps what is left.
        deleting = connection.transaction()
        await deleting.start()
        await connection.execute("delete from user_files where id = $1", first)
        holding = asyncio.create_task(ledger.hold_user(db, "ada", "x"))
        await waiting_for_lock(other)
        await deleting.commit()
        await holding
        assert await used(other, "ada") == (20, 0, 1)
        await ledger.release_user(db, "ada")
        # The same of bytes that are being replaced.
        replacing = connection.transaction()
        await replacing.start()
        await connection.execute("update user_files set sha256 = sha256(sha256) where id = $1", second)
        holding = asyncio.create_task(ledger.hold_user(db, "ada", "x"))
        await waiting_for_lock(other)
        await replacing.commit()
        await holding
        await ledger.release_user(db, "ada")
        # A hold under way, a deletion, a move and a replacement that come during it: they wait, and are refused.
        for attempt in (
            lambda: ledger.delete_files(db, "ada", [second]),
            lambda: ledger.trash_files(
                db,
                "ada",
                volume_id,
                [ledger.MovedToTrash(id=second, old_generation=1, generation=1, file_path=f"users/someone/images/{second}.1.png")],
            ),
            lambda: ledger.replace_content(db, user_id="ada", file_id=second, expected_generation=1, new=_other_bytes(second)),
        ):
            holding_it = connection.transaction()
            await holding_it.start()
            await connection.execute(statements.statement("hold_user", user="user_id"), "ada", "x", actor_json())
            trying = asyncio.create_task(attempt())
            await waiting_for_lock(other)
            await holding_it.commit()
            with pytest.raises(LegalHold):
                await trying
            assert await used(other, "ada") == (20, 0, 1)
            await ledger.release_user(db, "ada")
    finally:
        await other.close()


def _other_bytes(file_id: object) -> ledger.ReplacedContent:
    new = replacement(file_id, 20, 2)  # type: ignore[arg-type]
    return ledger.ReplacedContent(**{name: getattr(new, name) for name in new.__struct_fields__} | {"sha256": bytes([1] * 32)})


def test_a_held_user_is_listed(server: RunningServer, coffer: Coffer) -> None:
    store(server, "ada")
    coffer("user", "hold", "ada", "--reason", "x")
    assert json.loads(coffer("user", "list", "--json").stdout)["held_at"] is not None
