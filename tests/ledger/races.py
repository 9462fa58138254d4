"""Two connections whose order is known, without sleeping: one waits in PostgreSQL until we see that it waits."""

import asyncpg

from tests.waiting import eventually

# Not pg_stat_activity: a transaction of the observer's would go on seeing it as it was at first. Waits for a row's last writer have no
# database of their own, so a session is known by another lock that it holds.
_WAITING = """
select count(distinct waiting.pid)
  from pg_locks waiting join pg_locks held on held.pid = waiting.pid
 where not waiting.granted and held.database = (select oid from pg_database where datname = current_database())
"""


async def waiting_for_lock(observer: asyncpg.Connection, count: int = 1) -> None:
    """Returns once `count` other sessions of the observer's database wait for a lock."""
    await eventually(lambda: observer.fetchval(_WAITING), lambda waiting: waiting >= count)
