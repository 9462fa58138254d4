-- What /metrics tells of the rows.

-- name: store_figures
-- One row: sums over all users, which reads their whole table, and from indexes of just these what is damaged, overdue or near its quota.
-- Connections of workers are seen where they have the server's role, or where that role may read all statistics.
select u.users, u.file_count, u.total_bytes, u.reserved_bytes, u.limit_bytes, u.unlimited_users,
       u.warned_80, u.warned_90, u.warned_100,
       (select count(*) from user_files where damaged_at is not null) as damaged_files,
       (select greatest(0, extract(epoch from now() - min(expires_at)))::float8 from uploads) as reservation_overdue_seconds,
       greatest(0, extract(epoch from now() - (select created_at from tombstones order by id limit 1)))::float8 as tombstone_age_seconds,
       (select count(*) from pg_stat_activity where datname = current_database() and application_name = $1) as worker_connections
  from (select count(*) as users,
               coalesce(sum(file_count), 0)::bigint as file_count,
               coalesce(sum(total_bytes), 0)::float8 as total_bytes,
               coalesce(sum(reserved_bytes), 0)::float8 as reserved_bytes,
               coalesce(sum(max_bytes), 0)::float8 as limit_bytes,
               count(*) filter (where max_bytes is null) as unlimited_users,
               count(*) filter (where warned_percent = 80) as warned_80,
               count(*) filter (where warned_percent = 90) as warned_90,
               count(*) filter (where warned_percent = 100) as warned_100
          from user_storage) u;

-- name: work_figures
-- One row: generation jobs that are open by state; how many ended within the last hour by state, and their outputs; what waits to be fetched
-- or told, of that $1 at most, and since when. A delivery that is sent again begins anew.
with ended as materialized (
    select j.id, j.state from generation_jobs j where j.finished_at > now() - interval '1 hour'
)
select (select coalesce(jsonb_object_agg(o.state, o.count), '{}')
          from (select j.state, count(*) from generation_jobs j where j.finished_at is null group by j.state) o) as open_jobs,
       (select coalesce(jsonb_object_agg(e.state, e.count), '{}') from (select state, count(*) from ended group by state) e) as ended_jobs,
       (select coalesce(jsonb_object_agg(o.state, o.count), '{}')
          from (select o.state, count(*) from ended e join generation_outputs o on o.job_id = e.id and o.reason is distinct from 'cancelled'
                 group by o.state) o) as ended_outputs,
       (select coalesce(greatest(0, extract(epoch from now() - min(j.created_at))), 0)::float8
          from generation_jobs j where j.finished_at is null and j.state = 'queued') as oldest_queued_seconds,
       (select count(*) from (select from generation_outputs where state = 'fetching' limit $1) f) as fetching_outputs,
       p.pending_deliveries, p.oldest_delivery_seconds,
       (select count(*) from (select from webhook_deliveries where state = 'dead' limit $1) d) as dead_letters
  from (select count(*) as pending_deliveries,
               coalesce(greatest(0, extract(epoch from now() + interval '3 days' - min(d.give_up_at))), 0)::float8 as oldest_delivery_seconds
          from (select give_up_at from webhook_deliveries where state = 'pending' limit $1) d) p;

-- name: add_work_counts
-- Adds to what was counted of works ($1) with their results ($2).
insert into work_counts as c (work, result, count) select n.work, n.result, n.count from unnest($1::text[], $2::text[], $3::bigint[]) as n (work, result, count)
on conflict (work, result) do update set count = c.count + excluded.count;

-- name: work_counts
-- All that was counted: a dozen rows.
select work, result, count from work_counts order by work, result;
