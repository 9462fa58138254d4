-- What `coffer purge` tells and removes, but for files: sql/queries/lifecycle.sql and trash.sql.

-- name: count_overdue
-- What is beyond its time: reservations, resumable uploads over for $1 seconds, records older than $2 days, and events older than $3 days.
-- Null keeps them for ever.
select (select count(*) from uploads where expires_at < clock_timestamp()) as reservations,
       (select coalesce(sum(reserved_bytes), 0)::bigint from uploads where expires_at < clock_timestamp()) as reserved_bytes,
       (select count(*) from resumable_uploads where expires_at < clock_timestamp() - make_interval(secs => $1)) as resumable_uploads,
       (select count(*) from audit_log where at < now() - make_interval(days => $2)) as records,
       (select count(*) from events where created_at < now() - make_interval(days => $3)) as events;

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
