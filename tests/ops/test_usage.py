"""`coffer usage` sums what users stored exactly, whatever its runs, commits and clocks were like."""

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest

from ops import cli, usage
from server.commands.failures import Exit
from server.errors import DatabaseUnavailable
from server.ledger import Database, usage_days
from server.ledger.usage_days import SummedPage
from server.vault import Vault
from tests.ops.conftest import Tool
from tests.quota.rows import add_user, add_volume, insert_file, insert_upload
from tests.serving import execute

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
FIRST = date(2026, 10, 28)
INSERT = """
insert into usage_ledger (user_id, changed_at, delta_bytes, total_bytes)
select * from unnest($1::text[], $2::timestamptz[], $3::bigint[], $4::bigint[])
"""
LISTED = "select user_id, day, byte_seconds, most_bytes, added_bytes, removed_bytes from usage_days where day < $1 order by 1, 2"


class Change(NamedTuple):
    """A line of a user's history."""

    user_id: str
    changed_at: datetime
    delta_bytes: int
    total_bytes: int


class Used(NamedTuple):
    """What a user used on one day."""

    byte_seconds: Fraction
    most_bytes: int
    added_bytes: int
    removed_bytes: int


Days = dict[tuple[str, date], Used]


def midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def integrated(changes: Iterable[Change], end: date) -> Days:
    """What is to be found of the days before `end`: each moment of each user has the total of the last change that counts by then."""
    days: Days = {}
    by_user: dict[str, list[Change]] = {}
    for change in changes:
        by_user.setdefault(change.user_id, []).append(change)
    for user_id, history in by_user.items():
        times = [max(each.changed_at for each in history[: number + 1]) for number in range(len(history))]
        day = times[0].date()
        while day < end:
            starts, ends = midnight(day), midnight(day + DAY)
            microseconds, totals = 0, []
            for change, since, until in zip(history, times, [*times[1:], datetime.max.replace(tzinfo=UTC)], strict=True):
                length = (min(until, ends) - max(since, starts)) // timedelta(microseconds=1)
                if length > 0 or starts <= since < ends:
                    totals.append(change.total_bytes)
                microseconds += max(0, length) * change.total_bytes
            deltas = [change.delta_bytes for change, since in zip(history, times, strict=True) if starts <= since < ends]
            if any(totals) or deltas:
                added, removed = sum(delta for delta in deltas if delta > 0), -sum(delta for delta in deltas if delta < 0)
                days[user_id, day] = Used(Fraction(microseconds, 10**6), max(totals), added, removed)
            day += DAY
    return days


@dataclass
class Store:
    """A database whose history is written here, and the day that it is there."""

    database_url: str
    today: date

    def insert(self, changes: Iterable[Change]) -> None:
        changes = list(changes)
        if not changes:
            return
        add = "insert into user_storage (user_id) select distinct unnest($1::text[]) on conflict do nothing"
        execute(self.database_url, add, [each.user_id for each in changes])
        execute(self.database_url, INSERT, *(list(column) for column in zip(*changes, strict=True)))

    def change(self, user_id: str, day: date, hours: float, delta_bytes: int, total_bytes: int) -> Change:
        """Inserts one."""
        change = Change(user_id, midnight(day) + hours * HOUR, delta_bytes, total_bytes)
        self.insert([change])
        return change

    def days(self) -> Days:
        """What was summed."""
        rows = execute(self.database_url, LISTED, date.max)
        return {(row["user_id"], row["day"]): Used(Fraction(row["byte_seconds"]), *list(row)[3:]) for row in rows}

    def execute(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        return execute(self.database_url, sql, *arguments)


@pytest.fixture
def store(database: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """It is ten days later, and two users make a page."""
    store = Store(database, FIRST + 10 * DAY)

    async def today(db: Database) -> date:
        return store.today

    monkeypatch.setattr(usage_days, "today", today)
    monkeypatch.setattr(usage, "_PAGE", 2)
    return store


def history(seed: int, days: int, set_back_at_most: timedelta) -> list[tuple[datetime, Change]]:
    """Changes of seven users in the order in which they are made, each with its true time; clocks are set while they are."""
    chance = random.Random(seed)
    totals: dict[str, int] = {}
    ahead = timedelta(0)
    made = []
    moments = [midnight(FIRST) + chance.randrange(days * 24 * 3600 * 10**6) * timedelta(microseconds=1) for _ in range(20 * days)]
    for true in sorted(moments + [midnight(each.date()) for each in chance.sample(moments, 3 * days)]):
        if chance.random() < 0.1:
            ahead = chance.choice([timedelta(0), timedelta(0), 7 * HOUR, -chance.random() * set_back_at_most])
        user_id = f"user {min(chance.randrange(7), chance.randrange(7))}"  # the last ones change nothing for days
        was = totals.get(user_id, 0)
        total = chance.choice([0, was // 3, was + chance.randrange(2**40)])
        if total != was:
            made.append((true, Change(user_id, true + ahead, total - was, total)))
        totals[user_id] = total
    return made


def test_a_day_that_can_be_reckoned_in_the_head(store: Store, tool: Tool) -> None:
    store.change("ada", FIRST, 6, 1_000, 1_000)
    store.change("ada", FIRST, 18, -400, 600)
    store.change("ada", FIRST + 2 * DAY, 0, 400, 1_000)  # at midnight
    store.change("ada", FIRST + 2 * DAY, 12, 2_000, 3_000)
    store.change("ada", FIRST + 2 * DAY, 11, -3_000, 0)  # by a clock that was set back
    store.change("bob", FIRST + 3 * DAY, 1 / 3_600_000_000, 7, 7)  # a microsecond after it
    store.today = FIRST + 5 * DAY
    told = tool("usage")
    assert (told.code, told.findings) == (Exit.OK, [])
    hour = 3_600
    assert store.days() == {
        ("ada", FIRST): (12 * hour * 1_000 + 6 * hour * 600, 1_000, 1_000, 400),
        ("ada", FIRST + DAY): (24 * hour * 600, 600, 0, 0),
        ("ada", FIRST + 2 * DAY): (12 * hour * 1_000, 3_000, 2_400, 3_000),
        ("bob", FIRST + 3 * DAY): (Fraction(24 * hour * 10**6 - 1, 10**6) * 7, 7, 7, 0),
        ("bob", FIRST + 4 * DAY): (24 * hour * 7, 7, 0, 0),
    }
    newest = midnight(FIRST + 4 * DAY).timestamp()
    assert {name: told.summary[name] for name in ("users", "byte_hours", "newest_day_timestamp_seconds")} == {
        "users": 1,
        "byte_hours": 24 * 7,
        "newest_day_timestamp_seconds": newest,
    }


@pytest.mark.parametrize("seed", range(6))
def test_all_days_at_once_are_exact_and_the_same_again(store: Store, tool: Tool, seed: int) -> None:
    changes = [change for _, change in history(seed, 9, 5 * DAY)]
    store.insert(changes)
    assert tool("usage").code == Exit.OK
    assert store.days() == integrated(changes, store.today)
    rows = store.execute("select *, xmin::text, ctid::text from usage_days order by user_id, day")
    for query in ("select 1", "delete from usage_summed"):  # the last two once more, then all of them
        store.execute(query)
        assert tool("usage").code == Exit.OK
        assert store.execute("select *, xmin::text, ctid::text from usage_days order by user_id, day") == rows  # nothing was written


@pytest.mark.parametrize("seed", range(6))
def test_day_after_day_is_exact(store: Store, tool: Tool, seed: int) -> None:
    """A clock that was set back by less than a day makes changes of days that have been summed once."""
    made = history(seed, 9, 23 * HOUR)
    for number in range(1, 11):
        store.today = FIRST + number * DAY
        since, until = midnight(store.today - DAY) + HOUR / 3, midnight(store.today) + HOUR / 3
        store.insert(change for true, change in made if (since <= true or number == 1) and true < until)
        if number not in (4, 5):  # the machine was off
            assert tool("usage").code == Exit.OK
    assert store.days() == integrated((change for _, change in made), store.today)


def test_what_was_committed_late_is_put_right_by_the_next_run(store: Store, tool: Tool) -> None:
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(store.database_url))
    store.today = FIRST + 2 * DAY
    early = store.change("ada", FIRST, 2, 10, 10)
    late = Change("ada", midnight(FIRST + DAY) + 23 * HOUR, 90, 100)
    transaction = connection.transaction()
    loop.run_until_complete(transaction.start())
    loop.run_until_complete(connection.execute(INSERT, *([each] for each in late)))
    other = store.change("bob", FIRST + DAY, 23.5, 5, 5)  # with a greater id
    assert tool("usage").code == Exit.OK
    assert store.days() == integrated([early, other], store.today)
    store.today += DAY
    loop.run_until_complete(transaction.commit())
    loop.run_until_complete(connection.close())
    loop.close()
    assert tool("usage").code == Exit.OK
    assert store.days() == integrated([early, late, other], store.today)


@pytest.mark.parametrize("pages", [0, 1, 5, 6, 9])
def test_a_run_that_was_killed_is_made_good(store: Store, tool: Tool, monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """A day of seven users is four pages, and one that is empty."""
    changes = [change for _, change in history(pages, 9, HOUR)]
    store.insert(changes)
    end, store.today = store.today, FIRST + 6 * DAY
    assert tool("usage").code == Exit.OK
    store.today = end
    sum_day, summed = usage_days.sum_day, 0

    async def until_killed(*arguments: Any) -> SummedPage:
        nonlocal summed
        if summed == pages:
            raise DatabaseUnavailable
        summed += 1
        return await sum_day(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(usage_days, "sum_day", until_killed)
        assert tool("usage").code == Exit.UNAVAILABLE
    assert tool("usage").code == Exit.OK
    assert store.days() == integrated(changes, end)


def test_whoever_has_lost_the_lock_writes_nothing(store: Store, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    store.change("ada", FIRST, 6, 10, 10)
    first_change_of = usage_days.first_change_of

    async def lose_the_lock(db: Database, day: date, not_before: int) -> int:
        ours = "application_name = 'coffer usage' and datname = current_database()"
        await db.read(f"select pg_terminate_backend(pid, 5000) from pg_stat_activity where {ours}")
        return await first_change_of(db, day, not_before)

    monkeypatch.setattr(usage_days, "first_change_of", lose_the_lock)
    assert tool("usage").code == Exit.UNAVAILABLE
    assert store.days() == {}


def test_what_was_put_right_by_hand_is_summed_anew(store: Store, tool: Tool) -> None:
    """Days that are empty now lose their rows."""
    store.change("ada", FIRST, 6, 10, 10)
    store.change("ada", FIRST + 7 * DAY, 6, -10, 0)
    assert tool("usage").code == Exit.OK
    assert len(store.days()) == 8
    store.execute("update usage_ledger set changed_at = $1 where total_bytes = 0", midnight(FIRST + DAY) + HOUR)
    store.execute("delete from usage_summed")
    assert tool("usage").code == Exit.OK
    assert [day for _, day in store.days()] == [FIRST, FIRST + DAY]


def test_a_clock_that_ran_ahead_is_not_believed(store: Store, tool: Tool) -> None:
    change = store.change("ada", FIRST, 6, 10, 10)
    end, store.today = store.today, FIRST + 20 * DAY
    assert tool("usage").code == Exit.OK
    store.execute("update usage_summed set summed_at = now() + interval '10 days' where day > $1", FIRST + 5 * DAY)
    store.today = end
    late = store.change("ada", FIRST + 6 * DAY, 6, 10, 20)
    assert tool("usage").code == Exit.OK
    assert {(user_id, day): used for (user_id, day), used in store.days().items() if day < end} == integrated([change, late], end)


def test_reservations_are_not_used_and_the_trash_is(store: Store, tool: Tool) -> None:
    async def fill() -> None:
        connection = await asyncpg.connect(store.database_url)
        await add_volume(connection)
        await add_user(connection, "ada", None)
        await insert_upload(connection, "ada", 1_000)
        file_id = await insert_file(connection, "ada", 10)
        await connection.execute("update user_files set deleted_at = now() where id = $1", file_id)
        await connection.close()

    asyncio.run(fill())
    store.execute("update usage_ledger set changed_at = $1", midnight(FIRST) + HOUR)
    assert tool("usage").code == Exit.OK
    assert [used.most_bytes for used in store.days().values()] == [10] * 10


def test_users_who_are_removed_by_hand_keep_what_was_summed(store: Store, tool: Tool) -> None:
    store.change("ada", FIRST, 6, 10, 10)
    store.change("bob", FIRST, 6, 10, 10)
    store.today = FIRST + 3 * DAY
    assert tool("usage").code == Exit.OK
    store.execute("delete from user_storage where user_id = 'ada'")
    store.today = FIRST + 9 * DAY
    told = tool("usage", "--month", f"{FIRST:%Y-%m}")
    assert [(each["user_id"], each["days"]) for each in told.findings] == [("ada", 3), ("bob", 4)]
    assert len(store.days()) == 3 + 9


def test_an_empty_store(database: str, tool: Tool) -> None:
    told = tool("usage")
    assert (told.code, told.findings, told.summary["users"], told.summary["byte_hours"]) == (Exit.OK, [], 0, 0)
    assert "newest_day_timestamp_seconds" not in told.summary
    execute(database, "insert into user_storage (user_id) values ('ada')")
    assert tool("usage", "--month", "2026-01").findings == []


def test_no_volume_is_looked_at(store: Store, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refresh(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Vault, "refresh", refresh)
    store.execute("insert into volumes (id, mount_path) values (gen_random_uuid(), '/nowhere')")
    store.change("ada", FIRST, 6, 10, 10)
    assert tool("usage").code == Exit.OK


def test_prometheus_is_told_of_the_newest_day(store: Store, tool: Tool, tmp_path: Path) -> None:
    store.change("ada", FIRST, 6, 1_000, 1_000)
    store.change("bob", FIRST, 6, 500, 500)
    assert tool("usage", "--metrics-file", str(tmp_path / "usage.prom"), "--month", f"{FIRST:%Y-%m}").code == Exit.OK
    lines = (tmp_path / "usage.prom").read_text().splitlines()
    newest = midnight(store.today - DAY).timestamp()
    for line in ("users 2.0", "byte_hours 36000.0", f"newest_day_timestamp_seconds {newest!r}", "exit_code 0.0"):
        name, value = line.split()
        assert [float(each.split()[1]) for each in lines if each.startswith(f"coffer_usage_{name} ")] == [float(value)]


# A month


@pytest.fixture
def billed(store: Store) -> list[Change]:
    """Seven users' history, from the last days of October to the 12th of November. Today is the 10th."""
    store.today = date(2026, 11, 10)
    changes = [change for _, change in history(7, 15, HOUR)]
    store.insert(changes)
    return changes


def month_of(changes: list[Change], first: date, end: date) -> list[dict[str, Any]]:
    """What is to be told of the days from one until before another."""
    used: dict[str, list[Used]] = {}
    for (user_id, day), each in sorted(integrated(changes, end).items()):
        if day >= first:
            used.setdefault(user_id, []).append(each)
    told = []
    for user_id, days in sorted(used.items()):
        byte_seconds = sum((each.byte_seconds for each in days), Fraction(0))
        line: dict[str, Any] = {"month": f"{first:%Y-%m}", "user_id": user_id}
        line |= {"byte_hours": round(byte_seconds / 3600), "average_bytes": round(byte_seconds / ((end - first).days * 86_400))}
        line |= {"most_bytes": max(each.most_bytes for each in days), "added_bytes": sum(each.added_bytes for each in days)}
        told.append(line | {"removed_bytes": sum(each.removed_bytes for each in days), "days": len(days)})
    return told


def test_a_month_is_told_user_by_user(store: Store, billed: list[Change], tool: Tool) -> None:
    told = tool("usage", "--month", "2026-10")
    assert told.findings == month_of(billed, date(2026, 10, 1), date(2026, 11, 1))
    assert len(told.findings) > 4 and told.code == Exit.OK  # several pages
    only = tool("usage", "--month", "2026-10", "--user", "user 3")
    assert only.findings == [each for each in told.findings if each["user_id"] == "user 3"] != []
    assert tool("usage", "--month", "2026-09").findings == []
    assert tool("usage").findings == []


def test_of_the_current_month_the_finished_days_count(store: Store, billed: list[Change], tool: Tool) -> None:
    told = tool("usage", "--month", "2026-11")
    assert told.findings == month_of(billed, date(2026, 11, 1), store.today) != []
    store.today = date(2026, 11, 1)  # none is finished
    assert tool("usage", "--month", "2026-11").findings == []
    store.today = date(2026, 12, 1)
    told = tool("usage", "--month", "2026-11")
    assert told.findings == month_of(billed, date(2026, 11, 1), store.today)


def test_a_user_without_usage_has_no_line_and_an_unknown_one_is_not_found(store: Store, billed: list[Change], tool: Tool) -> None:
    store.execute("insert into user_storage (user_id) values ('zoe')")
    told = tool("usage", "--month", "2026-11", "--user", "zoe")
    assert (told.code, told.findings) == (Exit.OK, [])
    told = tool("usage", "--month", "2026-11", "--user", "nobody")
    assert told.code == Exit.NOT_FOUND and "there is no user 'nobody'" in told.stderr


def test_people_get_a_table(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    store.change("ada", FIRST, 0, 1_536, 1_536)
    store.change("eve\u202e", FIRST, 0, 2**45, 2**45)
    assert cli.run(["usage", "--month", f"{FIRST:%Y-%m}"]) == Exit.OK
    heading, ada, eve, summary = capfd.readouterr().out.splitlines()
    assert heading.split() == ["byte-hours", "average", "most", "added", "removed", "days", "user"]
    average = f"{1_536 * 4 / 31:.0f} B"
    assert ada.split() == [f"{4 * 24 * 1_536:,}", *average.split(), "1.5", "KiB", "1.5", "KiB", "0", "B", "4", "ada"]
    assert eve.endswith("  eve\\u202e") and len({line.index(word) for line, word in ((heading, "user"), (ada, "ada"), (eve, "eve"))}) == 1
    assert summary.startswith("usage: summed 10 days to 2026-11-06, of that day 2 users; 2 users in 2026-10 in ")


@pytest.mark.parametrize(("wrong", "why"), [("--month 2026-12", "2026-12 has not begun"), ("--user ada", "say of which month")])
def test_what_cannot_be_told_is_refused(store: Store, tool: Tool, wrong: str, why: str) -> None:
    store.change("ada", FIRST, 0, 10, 10)
    told = tool("usage", *wrong.split())
    assert told.code == Exit.USAGE and why in told.stderr
    assert store.days() == {}
