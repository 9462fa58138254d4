-- What `coffer status`, `coffer top` and `coffer doctor` show. Each reads an index or a table that is small on a healthy server.

-- name: database_facts
-- PostgreSQL's version and the settings on which promises rest; its clock; and how many connections there may be and are.
select current_setting('server_version_num')::integer as version, current_setting('server_version') as version_text,
       current_setting('fsync') as fsync, current_setting('full_page_writes') as full_page_writes,
       current_setting('synchronous_commit') as synchronous_commit, current_setting('data_checksums') as data_checksums,
       current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer as connections_at_most,
       (select count(*) from pg_stat_activity where backend_type = 'client backend')::integer as connections,
       pg_database_size(current_database()) as size_bytes, clock_timestamp() as now;

-- name: stored_totals
-- How many users and files there are, and how many bytes, as the users' counters say.
select count(*) as users, coalesce(sum(file_count), 0)::bigint as files, coalesce(sum(total_bytes), 0)::bigint as total_bytes,
       coalesce(sum(reserved_bytes), 0)::bigint as reserved_bytes
  from user_storage;

-- name: count_damaged
-- Files whose bytes the scrub found wrong.
select count(*) as files from user_files where damaged_at is not null;

-- name: count_jobs
-- Jobs of the worker by their state; those that are done are not kept.
select status::text as state, count(*) as jobs, coalesce(extract(epoch from clock_timestamp() - min(created)), 0)::float8 as oldest_seconds
  from pgqueuer group by status;

-- name: uploads_under_way
-- Uploads that hold a quota, the latest first, at most $1; all uploads to disk are here, small ones are over too soon. Links and resumable
-- uploads that nobody is using wait.
select user_id, reserved_bytes, extract(epoch from clock_timestamp() - created_at)::float8 as age_seconds,
       case when is_resumable then 'resumable' when link is not null then 'link' else 'plain' end as way,
       (is_resumable or link is not null) and coalesce(claimed_until, '-infinity') < clock_timestamp() as waits, count(*) over () as all_uploads
  from uploads order by created_at desc limit $1;

-- name: has_backups
-- Whether this schema knows of backups.
select to_regclass('backups') is not null and to_regclass('drills') is not null as present;

-- name: last_backups
-- When the last good backup began, when one was tried last, and when one was last restored on trial, and whether that succeeded.
select (select max(started_at) from backups where state = 'done') as done_at, (select max(started_at) from backups) as tried_at,
       (select max(ended_at) from drills where passed) as proven_at,
       (select passed from drills order by ended_at desc limit 1) as last_drill_passed;

-- name: growth_by_volume
-- How many bytes the files of each volume's users have become more within the last $1, and the seconds in which they did: fewer than $1 where
-- there is no longer history, whose first change is its beginning and not counted. Of the latest $2 changes of all users, so that it costs the
-- same on any store; a user counts where they are now.
with latest as (select user_id, changed_at, delta_bytes from usage_ledger order by id desc limit $2),
     span as (select least($1::interval, now() - min(changed_at)) as length from latest)
select u.volume_id, sum(l.delta_bytes)::bigint as more_bytes, extract(epoch from span.length)::float8 as seconds
  from latest l join user_storage u using (user_id) cross join span
 where u.volume_id is not null and l.changed_at > now() - span.length
 group by u.volume_id, span.length;
