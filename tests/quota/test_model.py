"""The quota against a model of it: whatever statements come, in whatever order, the ledger says what the model says.

The short form takes some seconds; COFFER_TEST_MODEL_STEPS=10000 asks for that many steps (FAULTS 10).
"""

import asyncio
import itertools
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from server import ledger
from server.errors import QuotaExceeded, UserErasing
from server.ledger import Database
from server.settings import Settings
from tests.quota.rows import SHA256, VOLUME, Connection, add_volume, drift, new_file, path_of, replacement

STEPS = int(os.environ.get("COFFER_TEST_MODEL_STEPS", "3000"))
STEPS_PER_EXAMPLE = 40

USERS = st.integers(0, 2)
SIZES = st.integers(0, 120)
SOME = st.lists(st.integers(0, 30), max_size=4)
TYPES = st.sampled_from([("image", "image/png"), ("image", "image/jpeg"), ("video", "video/mp4")])
LIMITS = st.one_of(st.none(), st.integers(0, 400))


@dataclass
class Model:
    """What should be stored. Users are numbers; sizes are bytes."""

    limits: dict[int, int | None] = field(default_factory=dict)
    erasing: set[int] = field(default_factory=set)
    files: dict[UUID, tuple[int, int]] = field(default_factory=dict)
    uploads: dict[UUID, tuple[int, int]] = field(default_factory=dict)

    def used(self, user: int) -> int:
        return sum(size for owner, size in [*self.files.values(), *self.uploads.values()] if owner == user)

    def admits(self, growth: "Counter[int]", arrivals: "Counter[int]") -> bool:
        """Whether one statement may add these bytes and rows to users."""
        for user in growth.keys() | arrivals.keys():
            limit = self.limits[user]
            if user in self.erasing and (growth[user] > 0 or arrivals[user] > 0):
                return False
            if growth[user] > 0 and limit is not None and self.used(user) + growth[user] > limit:
                return False
        return True


class Quota(RuleBasedStateMachine):
    loop: asyncio.AbstractEventLoop
    sql: Connection
    db: Database
    numbers = itertools.count()

    @initialize()
    def start(self) -> None:
        self.number = next(self.numbers)
        self.model = Model()
        for user in range(3):
            self.add_user(user, 200)

    # What the rules are made of

    def name(self, user: int) -> str:
        return f"{self.number}-{user}"

    def run(self, statement: str, *arguments: Any) -> bool:
        """Runs one statement; False when it was refused as the quota refuses."""
        try:
            self.loop.run_until_complete(self.sql.execute(statement, *arguments))
        except asyncpg.PostgresError as problem:
            assert problem.sqlstate in {"CF001", "CF003"}, problem
            return False
        return True

    def call(self, awaitable: Any) -> bool:
        """The same through the ledger's functions."""
        try:
            self.loop.run_until_complete(awaitable)
        except (QuotaExceeded, UserErasing):
            return False
        return True

    def add_user(self, user: int, limit: int | None) -> None:
        assert self.run("insert into user_storage (user_id, max_bytes) values ($1, $2)", self.name(user), limit)
        self.model.limits[user] = limit

    def picked(self, from_: dict[UUID, tuple[int, int]], some: list[int]) -> list[UUID]:
        ids = list(from_)
        return list(dict.fromkeys(ids[number % len(ids)] for number in some)) if ids else []

    # Files

    @rule(rows=st.lists(st.tuples(USERS, SIZES, TYPES), min_size=1, max_size=4))
    def insert_files(self, rows: list[tuple[int, int, tuple[str, str]]]) -> None:
        growth: Counter[int] = Counter()
        for user, size, _ in rows:
            growth[user] += size
        expected = self.model.admits(growth, Counter(user for user, _, _ in rows))
        ids = [uuid4() for _ in rows]
        done = self.run(
            """
            insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, tags)
            select id, user_id, 'a b', file_type, mime_type, file_size, $6, $7, '/' || id || '.1.', array[mime_type]
              from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[]) r (id, user_id, file_type, mime_type, file_size)
            """,
            ids,
            [self.name(user) for user, _, _ in rows],
            [kind for _, _, (kind, _) in rows],
            [mime for _, _, (_, mime) in rows],
            [size for _, size, _ in rows],
            SHA256,
            VOLUME,
        )
        assert done is expected
        if done:
            self.model.files |= {file_id: (user, size) for file_id, (user, size, _) in zip(ids, rows, strict=True)}

    @rule(some=SOME, user=st.one_of(st.none(), USERS), size=st.one_of(st.none(), SIZES), kind=st.one_of(st.none(), TYPES))
    def update_files(self, some: list[int], user: int | None, size: int | None, kind: tuple[str, str] | None) -> None:
        """Resizes, moves and retypes several files of several users in one statement."""
        ids = self.picked(self.model.files, some)
        after = {
            file_id: (owner if user is None else user, was if size is None else size)
            for file_id, (owner, was) in self.model.files.items()
            if file_id in ids
        }
        growth: Counter[int] = Counter()
        arrivals: Counter[int] = Counter()
        for file_id, (owner, now) in after.items():
            was_owner, was = self.model.files[file_id]
            growth[owner] += now
            arrivals[owner] += 1
            growth[was_owner] -= was
            arrivals[was_owner] -= 1
        expected = self.model.admits(growth, arrivals)
        done = self.run(
            """
            update user_files set user_id = coalesce($2, user_id), file_size = coalesce($3, file_size),
                   file_type = coalesce($4, file_type), mime_type = coalesce($5, mime_type) where id = any ($1)
            """,
            ids,
            None if user is None else self.name(user),
            size,
            kind and kind[0],
            kind and kind[1],
        )
        assert done is expected
        if done:
            self.model.files |= after

    @rule(some=SOME, directly=st.booleans())
    def delete_files(self, some: list[int], directly: bool) -> None:
        ids = self.picked(self.model.files, some)
        if directly:
            assert self.run("delete from user_files where id = any ($1)", ids)
        elif ids:
            owner = self.model.files[ids[0]][0]
            ids = [file_id for file_id in ids if self.model.files[file_id][0] == owner]
            assert self.call(ledger.delete_files(self.db, self.name(owner), ids))
        for file_id in ids:
            del self.model.files[file_id]

    @precondition(lambda self: self.model.files)
    @rule(which=st.integers(0, 30), size=SIZES)
    def replace_content(self, which: int, size: int) -> None:
        (file_id,) = self.picked(self.model.files, [which])
        user, was = self.model.files[file_id]
        generation = self.loop.run_until_complete(self.sql.fetchval("select generation from user_files where id = $1", file_id))
        expected = self.model.admits(Counter({user: size - was}), Counter())
        new = replacement(file_id, size, generation + 1)
        replacing = ledger.replace_content(self.db, user_id=self.name(user), file_id=file_id, expected_generation=generation, new=new)
        assert self.call(replacing) is expected
        if expected:
            self.model.files[file_id] = (user, size)

    # Reservations

    @rule(user=USERS, size=SIZES)
    def reserve(self, user: int, size: int) -> None:
        upload_id = uuid4()
        expected = self.model.admits(Counter({user: size}), Counter({user: 1}))
        reserving = ledger.open_reservation(
            self.db,
            upload_id=upload_id,
            user_id=self.name(user),
            volume_id=VOLUME,
            reserved_bytes=size,
            idempotency_key=None,
            lease_seconds=9,
        )
        assert self.call(reserving) is expected
        if expected:
            self.model.uploads[upload_id] = (user, size)

    @rule(some=SOME, size=SIZES, user=st.one_of(st.none(), USERS))
    def update_uploads(self, some: list[int], size: int, user: int | None) -> None:
        ids = self.picked(self.model.uploads, some)
        after = {upload_id: (self.model.uploads[upload_id][0] if user is None else user, size) for upload_id in ids}
        growth: Counter[int] = Counter()
        for upload_id, (owner, now) in after.items():
            was_owner, was = self.model.uploads[upload_id]
            growth[owner] += now
            growth[was_owner] -= was
        expected = self.model.admits(growth, Counter())
        done = self.run(
            "update uploads set reserved_bytes = $2, user_id = coalesce($3, user_id) where id = any ($1)",
            ids,
            size,
            None if user is None else self.name(user),
        )
        assert done is expected
        if done:
            self.model.uploads |= after

    @rule(some=SOME)
    def release(self, some: list[int]) -> None:
        ids = self.picked(self.model.uploads, some)
        assert self.run("delete from uploads where id = any ($1)", ids)
        for upload_id in ids:
            del self.model.uploads[upload_id]

    @precondition(lambda self: self.model.uploads)
    @rule(which=st.integers(0, 30), excess=st.integers(-20, 20))
    def publish(self, which: int, excess: int) -> None:
        """What a reservation holds may always be published; what goes beyond it needs room."""
        (upload_id,) = self.picked(self.model.uploads, [which])
        user, reserved = self.model.uploads[upload_id]
        size = max(0, reserved + excess)
        room = size <= reserved or self.model.admits(Counter({user: size - reserved}), Counter())
        expected = room and user not in self.model.erasing
        assert self.call(ledger.publish_file(self.db, new_file(self.name(user), size, id=upload_id))) is expected
        if expected:
            del self.model.uploads[upload_id]
            self.model.files[upload_id] = (user, size)

    # Users

    @rule(user=USERS, limit=LIMITS)
    def set_quota(self, user: int, limit: int | None) -> None:
        assert self.call(ledger.set_quota(self.db, self.name(user), limit))
        self.model.limits[user] = limit

    @rule(user=USERS)
    def begin_erasing(self, user: int) -> None:
        assert self.call(ledger.begin_erasing(self.db, self.name(user)))
        self.model.erasing.add(user)

    @rule(user=USERS, limit=LIMITS)
    def remove_user_with_everything(self, user: int, limit: int | None) -> None:
        assert self.run("delete from user_storage where user_id = $1", self.name(user))
        assert self.run("delete from usage_ledger where user_id = $1", self.name(user))
        self.model.files = {file_id: row for file_id, row in self.model.files.items() if row[0] != user}
        self.model.uploads = {upload_id: row for upload_id, row in self.model.uploads.items() if row[0] != user}
        self.model.erasing.discard(user)
        self.add_user(user, limit)

    # What must change nothing

    @rule(user=USERS)
    def roll_back_everything(self, user: int) -> None:
        async def change() -> None:
            transaction = self.sql.transaction()
            await transaction.start()
            await self.sql.execute("delete from uploads")
            await self.sql.execute("update user_storage set max_bytes = null, erasing_at = null")
            await self.sql.execute(
                "insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path) "
                "values ($1, $2, 'n', 'image', 'image/png', 5, $3, $4, $5)",
                (file_id := uuid4()),
                self.name(user),
                SHA256,
                VOLUME,
                path_of(file_id),
            )
            await self.sql.execute("update user_files set file_size = file_size + 1")
            await self.sql.execute("delete from user_files")
            await transaction.rollback()

        self.loop.run_until_complete(change())

    @rule(
        statement=st.sampled_from(
            [
                "truncate user_storage cascade",
                "truncate user_files",
                "update user_storage set total_bytes = 0, file_count = 1, reserved_bytes = 9",
                "update user_files set file_size = -1 where file_size >= 0",
                "update uploads set reserved_bytes = -1 where reserved_bytes >= 0",
            ]
        )
    )
    def refused_always(self, statement: str) -> None:
        try:
            outcome = self.loop.run_until_complete(self.sql.execute(statement))
        except asyncpg.PostgresError as problem:
            assert problem.sqlstate in {"CF002", "CF004", "23514"}, problem
        else:
            assert outcome == "UPDATE 0"

    @invariant()
    def ledger_says_what_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        query = "select user_id, total_bytes, reserved_bytes, file_count from user_storage where user_id like $1"
        rows = self.loop.run_until_complete(self.sql.fetch(query, f"{self.number}-%"))
        said = {row["user_id"]: (row["total_bytes"], row["reserved_bytes"], row["file_count"]) for row in rows}
        expected = {}
        for user in self.model.limits:
            sizes = [size for owner, size in self.model.files.values() if owner == user]
            held = [size for owner, size in self.model.uploads.values() if owner == user]
            expected[self.name(user)] = (sum(sizes), sum(held), len(sizes))
        assert said == expected
        assert self.loop.run_until_complete(drift(self.sql)) == []

    def teardown(self) -> None:
        self.loop.run_until_complete(self.sql.execute("delete from user_storage"))
        self.loop.run_until_complete(self.sql.execute("delete from usage_ledger"))


def test_the_ledger_agrees_with_the_model(database_url: str) -> None:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        connection: Connection = runner.run(asyncpg.connect(database_url))
        runner.run(add_volume(connection))
        db = Database(Settings(database_url=database_url))
        runner.run(db.open())

        class OnThisDatabase(Quota):
            pass

        OnThisDatabase.loop, OnThisDatabase.sql, OnThisDatabase.db = loop, connection, db
        try:
            run_state_machine_as_test(
                OnThisDatabase,
                settings=settings(
                    max_examples=max(1, STEPS // STEPS_PER_EXAMPLE),
                    stateful_step_count=STEPS_PER_EXAMPLE,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(db.close())
            runner.run(connection.close())
