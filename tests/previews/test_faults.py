"""What goes wrong around the worker: whatever it is, the original stays, every file ends with its preview or a reason, and nothing is left
of what was deleted.
"""

from pathlib import Path
from uuid import UUID

from tests.previews.conftest import WorkerFactory
from tests.previews.test_queue import coffer, previews_of, states, upload
from tests.samples import PNG_START, image
from tests.serving import RunningServer, execute
from tests.waiting import until

DEADLY = PNG_START + b"deadly"


def tries(server: RunningServer, file_id: str) -> int:
    rows = execute(server.database_url, "select preview_tries from user_files where id = $1", UUID(file_id))
    return int(rows[0]["preview_tries"])


def begun(server: RunningServer, file_id: str) -> None:
    until(lambda: tries(server, file_id) == 1)


def test_a_file_that_kills_the_worker_kills_three(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        deadly = upload(client, DEADLY)
        workers = [start_worker()]
        good = upload(client, image(5_000))

        def settled() -> bool:
            if workers[-1].is_dead:
                workers.append(start_worker())
            return states(server) == {"failed": 1, "ready": 1}

        until(settled)
        assert sum(worker.is_dead for worker in workers) == 3
        file = client.get(f"/api/files/{deadly}").json()
        assert (file["preview_state"], file["preview_reason"]) == ("failed", "crashed")
        assert client.get(f"/api/files/{deadly}/download").content == DEADLY
        assert len(previews_of(server, "ada", good)) == 2
        assert deadly in coffer(server, "previews", "list-failed", "--json").stdout
        coffer(server, "previews", "retry", deadly).check_returncode()
        until(lambda: workers[-1].is_dead)  # what an admin asks for is tried anew


def test_a_variant_that_kills_workers_ends_when_nobody_waits_for_it(server: RunningServer, start_worker: WorkerFactory) -> None:
    """Nobody counts its tries: what its job says is when it was asked for."""
    workers = [start_worker()]
    with server.client("ada", timeout=40) as client:
        file_id = upload(client, PNG_START + b"no survivors")
        assert client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()["preview_state"] == "ready"
        job = "insert into pgqueuer (priority, status, entrypoint, payload) values (0, 'queued', 'preview', convert_to($1, 'UTF8'))"
        execute(server.database_url, job, f"{file_id} 240x-contain-q80.webp")
        for _ in range(2):
            until(lambda: workers[-1].is_dead)
            workers.append(start_worker())
        until(lambda: workers[-1].is_dead)
        execute(server.database_url, "update pgqueuer set created = now() - interval '11 minutes'")
        workers.append(start_worker())
        until(lambda: execute(server.database_url, "select from pgqueuer") == [])
        assert not workers[-1].is_dead


def test_a_worker_stopped_and_then_killed_over_and_over_leaves_nothing_crashed(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        file_id = upload(client, image(5_000))
        for count in (1, 2, 2, 2):
            worker = start_worker(100.0)
            until(lambda: tries(server, file_id) == count)  # noqa: B023 - until calls it before the next round
            worker.ask_to_stop()
            until(lambda: tries(server, file_id) == 1)
            worker.kill()
        start_worker()
        until(lambda: states(server) == {"ready": 1})


def test_a_worker_that_hangs_loses_its_job_and_does_no_harm_when_it_goes_on(server: RunningServer, start_worker: WorkerFactory) -> None:
    """Its previews are of bytes that were replaced meanwhile, and it stores them over those that another worker has made since."""
    hanging = start_worker(0.3)
    with server.client("ada", timeout=40) as client:
        file_id = upload(client, image(5_000, 1))
        begun(server, file_id)
        hanging.pause()
        client.put(f"/api/files/{file_id}/content", content=image(6_000, 2)).raise_for_status()
        other = start_worker()
        assert client.get(f"/api/files/{file_id}", params={"wait": "preview"}).json()["preview_state"] == "ready"
        other.stop()
        hanging.go_on()
        hanging.stop()
        start_worker()
        until(lambda: states(server) == {"ready": 1})
        assert {path.read_bytes() for path in previews_of(server, "ada", file_id)} == {image(6_000, 2)[:1000]}


def test_two_workers_share_the_work(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        for seed in range(60):
            upload(client, image(2_000, seed))
    workers = [start_worker(0.02) for _ in range(2)]
    until(lambda: states(server) == {"ready": 60})
    for worker in workers:
        worker.stop()
    assert [row[0] for row in execute(server.database_url, "select distinct preview_tries from user_files")] == [1]
    assert len(execute(server.database_url, "select from pgqueuer_log where status = 'successful'")) == 60


def test_a_stop_finishes_what_has_begun_and_begins_nothing(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        ids = [upload(client, image(2_000, seed)) for seed in range(4)]
        worker = start_worker(1.0)
        until(lambda: sum(tries(server, file_id) for file_id in ids) == 2)
        worker.stop()
    assert states(server) == {"ready": 2, "pending": 2}
    assert sorted(tries(server, file_id) for file_id in ids) == [0, 0, 1, 1]
    start_worker()
    until(lambda: states(server) == {"ready": 4})


def test_a_database_that_cuts_everybody_off_is_waited_for(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        for seed in range(40):
            upload(client, image(2_000, seed))
    start_worker(0.05)
    for done in (5, 15):
        until(lambda: states(server).get("ready", 0) >= done)  # noqa: B023 - until calls it before the next round
        execute(
            server.database_url,
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()",
        )
    until(lambda: states(server) == {"ready": 40})


def test_without_its_volume_a_file_waits(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        file_id = upload(client, image(5_000))
    away = server.volume.rename(server.volume.with_name("away"))
    start_worker()
    until(lambda: execute(server.database_url, "select from pgqueuer where attempts >= 3"))
    assert states(server) == {"pending": 1}
    assert tries(server, file_id) == 0
    assert execute(server.database_url, "select from pgqueuer where status = 'failed'") == []
    away.rename(server.volume)
    until(lambda: states(server) == {"ready": 1})


def test_on_a_read_only_volume_a_file_waits(server: RunningServer, start_worker: WorkerFactory) -> None:
    with server.client("ada") as client:
        file_id = upload(client, image(5_000))
    execute(server.database_url, "update volumes set state = 'read_only'")
    start_worker()
    until(lambda: execute(server.database_url, "select from pgqueuer where attempts >= 1"))
    assert (states(server), tries(server, file_id)) == ({"pending": 1}, 0)
    execute(server.database_url, "update volumes set state = 'open'")
    until(lambda: states(server) == {"ready": 1})


def test_a_file_deleted_while_its_preview_is_made_leaves_none(server: RunningServer, start_worker: WorkerFactory) -> None:
    worker = start_worker(0.5)
    with server.client("ada") as client:
        file_id = upload(client, image(5_000))
        begun(server, file_id)
        assert client.delete(f"/api/files/{file_id}").status_code == 204
    server.settle()
    worker.stop()
    assert previews_left(server) == []
    assert execute(server.database_url, "select from previews") == []


def test_a_user_erased_while_previews_are_made_leaves_none(server: RunningServer, start_worker: WorkerFactory) -> None:
    worker = start_worker(0.5)
    with server.client("ada") as client, server.client() as admin:
        ids = [upload(client, image(5_000, seed)) for seed in range(6)]
        begun(server, ids[0])
        assert admin.delete("/api/users/ada").status_code in {202, 204}
    until(lambda: execute(server.database_url, "select from user_storage") == [])
    worker.stop()
    assert server.stored_paths() == []
    assert previews_left(server) == []
    assert execute(server.database_url, "select from previews") == []


def previews_left(server: RunningServer) -> list[Path]:
    return [path for path in (server.volume / "users").glob("*/previews/**/*") if path.is_file()]
