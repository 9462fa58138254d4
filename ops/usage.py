"""`coffer usage`: sums up what users stored on each finished day (UTC), and tells a month's usage for invoices.

It changes derived rows alone, so it does not rehearse, and it needs no volume. Stopped or killed at any moment, it is put right by the next
run, which begins with the day before the newest that was summed of all users.
"""

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

import msgspec

from ops.tool import Desk
from server.commands.failures import CommandFailed, Exit
from server.commands.output import human_bytes, printable
from server.commands.users import unknown
from server.errors import NotFound
from server.ledger import Database, get_user, overview, usage_days
from server.ledger.usage_days import Usage

_PAGE = 5_000
_DAY = timedelta(days=1)
_HEADING = f"{'byte-hours':>23} {'average':>11} {'most':>11} {'added':>11} {'removed':>11} {'days':>5}  user"


async def run(desk: Desk) -> str:
    """Sums the finished days, then tells of --month."""
    month: date | None = desk.arguments.month
    user_id: str | None = desk.arguments.user
    today = await usage_days.today(desk.db)
    if user_id is not None and month is None:
        raise CommandFailed("say of which month: --month 2026-01", Exit.USAGE)
    if month is not None and month > today:
        raise CommandFailed(f"{month:%Y-%m} has not begun", Exit.USAGE)
    looked_at = await _sum(desk, today)
    if month is not None:
        looked_at += f"; {await _tell(desk, month, today, user_id):,} users in {month:%Y-%m}"
    return looked_at


async def _sum(desk: Desk, today: date) -> str:
    """The figures are those of the newest day, whichever days were to be summed."""
    first_day, first_id = await usage_days.first_day_to_sum(desk.db)
    days = [] if first_day is None else [first_day + number * _DAY for number in range((today - first_day).days)]
    users, byte_seconds = 0, Decimal(0)
    total = len(days) * (await overview.stored_totals(desk.db)).users
    with desk.progress("usage", total, " users") as bar:
        for day in days:
            users, byte_seconds, after = 0, Decimal(0), None
            first_id = await usage_days.first_change_of(desk.db, day, first_id)
            while True:
                await desk.lock.check()
                page = await usage_days.sum_day(desk.db, day, first_id, after, _PAGE)
                if page.last is None:
                    break
                after = page.last
                users += page.used
                byte_seconds += page.byte_seconds
                bar.update(page.users)
            await usage_days.note_summed(desk.db, day, first_id)
    desk.figures |= {"users": users, "byte_hours": _byte_hours(byte_seconds)}
    if not days:
        return "summed 0 days"
    desk.figures["newest_day_timestamp_seconds"] = datetime.combine(days[-1], time(), UTC).timestamp()
    return f"summed {len(days):,} days to {days[-1]}, of that day {users:,} users"


async def _tell(desk: Desk, month: date, today: date, user_id: str | None) -> int:
    """A line for each user who stored something on the finished days of a month. Returns how many there are."""
    end = min((month + 31 * _DAY).replace(day=1), today)
    seconds = (end - month).days * 86_400
    if not desk.arguments.json:
        print(_HEADING)
    count = 0
    async for usage in _used(desk.db, month, end, user_id):
        count += 1
        byte_hours, average_bytes = _byte_hours(usage.byte_seconds), round(usage.byte_seconds / seconds)
        if desk.arguments.json:
            line = {
                "month": f"{month:%Y-%m}",
                "user_id": usage.user_id,
                "byte_hours": byte_hours,
                "average_bytes": average_bytes,
                "most_bytes": usage.most_bytes,
                "added_bytes": usage.added_bytes,
                "removed_bytes": usage.removed_bytes,
                "days": usage.days,
            }
            print(msgspec.json.encode(line).decode())
        else:
            sizes = (average_bytes, usage.most_bytes, usage.added_bytes, usage.removed_bytes)
            columns = " ".join(f"{human_bytes(size):>11}" for size in sizes)
            print(f"{byte_hours:>23,} {columns} {usage.days:>5}  {printable(usage.user_id)}")
    return count


async def _used(db: Database, first: date, end: date, user_id: str | None) -> AsyncIterator[Usage]:
    """Of one user or, a page at a time, of all, in the order of their ids."""
    if user_id is not None:
        usage = await usage_days.usage_of_user(db, user_id, first, end)
        if usage.days:
            yield usage
        else:
            await _check_known(db, user_id)
        return
    after = None
    while page := await usage_days.page_of_usage(db, first, end, after, _PAGE):
        after = page[-1].user_id
        for usage in page:
            if usage.days:
                yield usage


async def _check_known(db: Database, user_id: str) -> None:
    try:
        await get_user(db, user_id)
    except NotFound:
        raise unknown(user_id) from None


def _byte_hours(byte_seconds: Decimal) -> int:
    return round(byte_seconds / 3_600)
