-- Backups: what is under way, what it holds back, and how each ended.

-- name: begin_backup
-- A backup begins, and bytes stay until $3 seconds from now. Whoever else is said to be running has died: the caller holds the tool's lock.
with ended as (
    update backups set state = 'failed', ended_at = clock_timestamp(), holds_until = null, error = 'it ended without a word'
     where state = 'running'
), forgotten as (
    delete from backups where started_at < clock_timestamp() - interval '400 days'
)
insert into backups (id, way, state, holds_until) values ($1, $2, 'running', clock_timestamp() + make_interval(secs => $3));

-- name: renew_hold
-- Bytes stay for $2 more seconds; nothing is returned when they were free to go within $3 seconds from now, or had been.
update backups set holds_until = clock_timestamp() + make_interval(secs => $2)
 where id = $1 and state = 'running' and holds_until > clock_timestamp() + make_interval(secs => $3) returning id;

-- name: release_hold
-- Bytes may go; nothing is returned when they were free to go within $2 seconds from now, or had been.
update backups set holds_until = null
 where id = $1 and state = 'running' and holds_until > clock_timestamp() + make_interval(secs => $2) returning id;

-- name: unlinks_are_held
-- Whether a backup needs the bytes of files whose rows are gone.
select exists (select from backups where holds_until > clock_timestamp()) as yes;

-- name: finish_backup
-- A backup is whole.
update backups set state = 'done', ended_at = clock_timestamp(), holds_until = null, snapshot_at = $2, file_count = $3, total_bytes = $4
 where id = $1 and state = 'running' returning id;

-- name: fail_backup
-- A backup has failed.
update backups set state = 'failed', ended_at = clock_timestamp(), holds_until = null, error = left($2, 2000)
 where id = $1 and state = 'running' returning id;

-- name: record_drill
-- A backup has been restored to scratch, and was found good ($3) or not.
insert into drills (backup_id, snapshot_at, passed, is_full, files_checked, bytes_checked, duration_seconds, error)
values ($1, $2, $3, $4, $5, $6, $7, left($8, 2000));

-- name: backup_facts
-- What monitoring asks: the state of the last backup, what the last good one shows, and the newest that a drill has restored.
select (select b.state from backups b order by b.started_at desc limit 1) as last_state,
       (select b.error from backups b order by b.started_at desc limit 1) as last_error,
       (select max(b.snapshot_at) from backups b where b.state = 'done') as last_good_at,
       (select d.passed from drills d order by d.ended_at desc limit 1) as last_drill_passed,
       (select max(d.ended_at) from drills d where d.passed) as last_proof_at,
       (select max(d.snapshot_at) from drills d where d.passed) as proven_at,
       exists (select from upload_stops) as uploads_are_stopped;

-- name: count_dumped
-- What a dump of the same snapshot shows: files and bytes of each volume; the volume of files without one is none.
select f.volume_id, count(*) as files, sum(f.file_size)::bigint as bytes from user_files f group by f.volume_id;

-- name: stop_uploads
-- Nothing new is stored from now on.
insert into upload_stops (reason) values ($1);

-- name: clear_upload_stops
-- Uploads are taken again. Tells why they were not.
delete from upload_stops returning reason, created_at;

-- name: list_upload_stops
-- Why nothing new is stored.
select reason, created_at from upload_stops order by id;
