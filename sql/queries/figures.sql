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
