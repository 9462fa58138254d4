-- Usage by days, for invoices. A day is one of UTC, of 86,400 seconds. A change counts from its time on, or from that of the latest of the
-- user's changes before it, where a clock was set back between them: changes are in the order of their ids, which the lock on the user's row makes
-- that of their commits.

-- name: utc_today
-- The day that it is, by the clock that dates the changes.
select (now() at time zone 'UTC')::date as day;

-- name: first_day_to_sum
-- The day before the newest one summed: what was not committed yet when a day was summed, or not summed when a run was killed, is put right by
-- summing both again. When none was, that of the first change, which takes reading all of them. Null: there is no change. `first_id` is as in
-- usage_summed.
select coalesce(n.day - 1, (select (min(l.changed_at) at time zone 'UTC')::date from usage_ledger l)) as day,
       coalesce((select s.first_id from usage_summed s where s.day = n.day - 1 and s.summed_at <= now()), 0) as first_id
  from (select max(day) as day from usage_summed where summed_at <= now()) n;

-- name: first_change_of
-- The smallest id of a change of a day ($2) or a later one; $1 is one that is not greater, and the answer when there is none. Reads the changes
-- between.
select coalesce((select l.id from usage_ledger l where l.id >= $1 and l.changed_at >= $2::date::timestamp at time zone 'UTC' order by l.id limit 1),
                $1) as id;

-- name: begin_usage_page
-- To the end of the transaction, an erasure waits. $1 is the key of the lock. The statement that sums follows it, so that its snapshot shows who
-- is being erased, and takes no lock on users.
select pg_advisory_xact_lock_shared($1);

-- name: sum_usage_day
-- Sums a day ($1) of the $4 users after one ($3), whose changes from that day on have no smaller id than $2; writes what differs. Of each user
-- no more is read than the changes of the day, one before and one after them, and those that a clock has put behind them. `began` and `ended`
-- are the first change of the day and the first one after it; were their user compared by `=`, PostgreSQL might look for them among all users'
-- changes, in the order of ids. Users who were removed by hand, or are being erased, are left out.
with page as materialized (
    select user_id from user_storage where user_id > $3 and erasing_at is null order by user_id limit $4
), bounds as materialized (
    select $1::date::timestamp at time zone 'UTC' as starts, ($1::date + 1)::timestamp at time zone 'UTC' as ends
), summed as materialized (
    select p.user_id,
           coalesce(before.total_bytes, 0) * 86400::numeric + coalesce(c.byte_seconds, 0) as byte_seconds,
           -- A change at the very start of the day leaves what was before it no moment of the day.
           greatest(c.most_bytes, case when c.first_at is distinct from b.starts then coalesce(before.total_bytes, 0) end) as most_bytes,
           coalesce(c.added_bytes, 0) as added_bytes, coalesce(c.removed_bytes, 0) as removed_bytes
      from page p
     cross join bounds b
      left join lateral (select l.id from usage_ledger l
                          where (l.user_id, l.id) >= (p.user_id, $2) and l.user_id <= p.user_id and l.changed_at >= b.starts
                          order by l.user_id, l.id limit 1) began on true
      left join lateral (select l.id from usage_ledger l
                          where (l.user_id, l.id) >= (p.user_id, began.id) and l.user_id <= p.user_id and l.changed_at >= b.ends
                          order by l.user_id, l.id limit 1) ended on true
      left join lateral (select l.total_bytes from usage_ledger l
                          where (l.user_id, l.id) < (p.user_id, coalesce(began.id, 9223372036854775807)) and l.user_id >= p.user_id
                          order by l.user_id desc, l.id desc limit 1) before on true
     cross join lateral (
           select sum((t.total_bytes - t.was_bytes) * extract(epoch from b.ends - t.at)) as byte_seconds, min(t.at) as first_at,
                  max(t.total_bytes) as most_bytes, sum(greatest(t.delta_bytes, 0))::bigint as added_bytes,
                  sum(greatest(-t.delta_bytes, 0))::bigint as removed_bytes
             from (select l.total_bytes, l.delta_bytes, max(l.changed_at) over changes as at,
                          lag(l.total_bytes, 1, coalesce(before.total_bytes, 0)) over changes as was_bytes
                     from usage_ledger l
                    where l.user_id = p.user_id and l.id >= began.id and l.id < coalesce(ended.id, 9223372036854775807)
                   window changes as (order by l.id rows unbounded preceding)) t) c
), used as materialized (
    select * from summed where most_bytes > 0 or added_bytes > 0 or removed_bytes > 0
), written as (
    insert into usage_days as d (user_id, day, byte_seconds, most_bytes, added_bytes, removed_bytes)
    select u.user_id, $1, u.byte_seconds, u.most_bytes, u.added_bytes, u.removed_bytes from used u
    on conflict (user_id, day) do update
       set byte_seconds = excluded.byte_seconds, most_bytes = excluded.most_bytes,
           added_bytes = excluded.added_bytes, removed_bytes = excluded.removed_bytes
     where (d.byte_seconds, d.most_bytes, d.added_bytes, d.removed_bytes)
           is distinct from (excluded.byte_seconds, excluded.most_bytes, excluded.added_bytes, excluded.removed_bytes)
), dropped as (
    -- What an earlier run has written, and is not so: the ledger was put right by hand.
    delete from usage_days
     where day = $1
       and user_id = any (array(select s.user_id from summed s where s.most_bytes = 0 and s.added_bytes = 0 and s.removed_bytes = 0))
)
select (select max(p.user_id) from page p) as last, (select count(*) from page) as users, count(*) as used,
       coalesce(sum(u.byte_seconds), 0) as byte_seconds
  from used u;

-- name: note_usage_summed
-- A day ($1) has been summed, of all users. $2 is its `first_id`.
insert into usage_summed (day, first_id, summed_at) values ($1, $2, now())
on conflict (day) do update set first_id = excluded.first_id, summed_at = excluded.summed_at;

-- name: await_usage_pages
-- Returns when no page is being summed that may not have seen yet who is being erased. $1 is the key of the lock.
select pg_advisory_xact_lock($1);

-- name: page_of_usage
-- Usage from a day ($3) until before another ($4), of the $2 users after one ($1) of whom there is any of any day. One after the other is looked
-- up: to group all rows would read those of all other days.
with recursive users (user_id, place) as (
    (select d.user_id, 1 from usage_days d where d.user_id > $1 order by d.user_id limit 1)
    union all
    select (select d.user_id from usage_days d where d.user_id > u.user_id order by d.user_id limit 1), u.place + 1
      from users u where u.user_id is not null and u.place < $2
)
select u.user_id, m.*
  from users u
 cross join lateral (select {sums} from usage_days d where d.user_id = u.user_id and d.day >= $3 and d.day < $4) m
 where u.user_id is not null
 order by u.user_id;

-- name: usage_of_user
-- The same of one user.
select $1::text as user_id, {sums} from usage_days d where d.user_id = $1::text and d.day >= $2 and d.day < $3;
