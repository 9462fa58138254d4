-- What `coffer purge` tells and removes, but for files: sql/queries/lifecycle.sql and trash.sql.

-- name: count_overdue
-- What is beyond its time: reservations, resumable uploads over for $1 seconds, records older than $2 days, events older than $3 days, and
-- jobs that ended $4 days ago. Null keeps them for ever.
select (select count(*) from uploads where expires_at < clock_timestamp()) as reservations,
       (select coalesce(sum(reserved_bytes), 0)::bigint from uploads where expires_at < clock_timestamp()) as reserved_bytes,
       (select count(*) from resumable_uploads where expires_at < clock_timestamp() - make_interval(secs => $1)) as resumable_uploads,
       (select count(*) from audit_log where at < now() - make_interval(days => $2)) as records,
       (select count(*) from events where created_at < now() - make_interval(days => $3)) as events,
       (select count(*) from generation_jobs j join user_storage u using (user_id)
         where j.finished_at < now() - make_interval(days => $4) and j.callback_state is distinct from 'due' and u.held_at is null) as jobs;

-- name: held_users
-- Users whom a legal hold keeps.
select user_id from user_storage where held_at is not null;

-- name: purge_events
-- Deletes those of the $2 oldest events that are older than $1 days, and tells how many. What is still to be told to an endpoint stays.
with oldest as materialized (
    select e.id, e.created_at from events e
     where not exists (select from webhook_deliveries d where d.event_id = e.id and d.state = 'pending')
     order by e.id limit $2
), gone as (
    delete from events e using oldest o where e.id = o.id and o.created_at < now() - make_interval(days => $1) returning 1
)
select count(*) from gone;

-- name: purge_jobs
-- Deletes up to $2 of the jobs that ended $1 days ago, the oldest first, with their outputs (by cascade) and callbacks, and tells how many.
-- What is stored has its own memory of how it was made. A job whose callback is still to be told stays, and so does a held user's.
with old as materialized (
    select j.id from generation_jobs j join user_storage u using (user_id)
     where j.finished_at < now() - make_interval(days => $1) and j.callback_state is distinct from 'due' and u.held_at is null
     order by j.finished_at, j.id limit $2
), letters as (
    delete from webhook_deliveries where endpoint_id = any (array(select id from old)) and state = 'dead'
), gone as (
    delete from generation_jobs where id = any (array(select id from old)) returning 1
)
select count(*) from gone;
