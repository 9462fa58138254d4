-- Previews: what the worker makes of stored files, and the jobs for it. {file} stands for the columns of server.ledger.models.File.

-- name: get_previews
-- What was derived from one file of one user.
select variant, file_name, mime_type, width, height, size_bytes from previews where user_id = $1 and file_id = $2 order by variant;

-- name: get_previews_of_many
-- What was derived from some files of one user; not what was made on demand.
select file_id, variant, file_name, mime_type, width, height, size_bytes
  from previews where user_id = $1 and file_id = any ($2) and not on_demand order by file_id, width, variant;

-- name: get_linked_preview
-- The file that a link names, as get_linked_files, and what is known of its preview of a name ($4). `used_lately`: within the last hour.
select {file}, preview_variant, preview_mime_type, preview_width, preview_height, preview_size_bytes, preview_on_demand, used_lately
  from user_files f
  left join lateral (select p.variant as preview_variant, p.mime_type as preview_mime_type, p.width as preview_width,
                            p.height as preview_height, p.size_bytes as preview_size_bytes, p.on_demand as preview_on_demand,
                            p.last_used_at > now() - interval '1 hour' as used_lately
                       from previews p where p.file_id = f.id and p.file_name = $4) found on true
 where f.id = $1 and f.generation = $2 and f.deleted_at is null
   and exists (select from user_storage u where u.user_id = f.user_id and u.link_epoch = $3 and u.erasing_at is null);

-- name: touch_preview
-- Remembers that a preview was used.
update previews set last_used_at = now() where file_id = $1 and file_name = $2;

-- name: forget_preview
-- A preview has a row, but its bytes are gone: it loses the row. Unless it was made on demand, all that its file has are made again.
-- Locks the file first, as all do.
with file as materialized (
    select id from user_files where id = $1 for no key update
), gone as (
    delete from previews p using file f where p.file_id = f.id and p.file_name = $2 returning p.on_demand
)
update user_files set preview_state = 'pending', preview_reason = null
 where id = $1 and preview_state = 'ready' and exists (select from gone where not on_demand);

-- name: request_variant
-- Asks the workers for a picture that is made on demand. It comes before the rest of anybody's import, but not before what others whom
-- nothing else was made for wait for, too. Asked for already, it changes nothing.
with job as (
    insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
    values (0, 'queued', 'preview', convert_to($1::uuid || ' ' || $2::text, 'UTF8'), 'variant:' || $1::uuid || ':' || $2::text)
    on conflict do nothing
    returning 1
)
select pg_notify('ch_pgqueuer', json_build_object('channel', 'ch_pgqueuer', 'operation', 'insert', 'sent_at', now(),
                                                  'table', 'pgqueuer', 'type', 'table_changed_event')::text) from job;

-- name: variant_is_requested
-- Whether somebody is still to make it.
select exists (select from pgqueuer where dedupe_key = 'variant:' || $1::uuid || ':' || $2::text and status in ('queued', 'picked')) as yes;

-- name: add_variant
-- Enters what was made on demand of a file with these bytes ($2), and stored on this volume ($9). Of what was made so for its user the least recently used goes, as much
-- as is over $8 bytes with the new one. Nothing is returned when the file has other bytes or another place by now; else a row for each that went, or an empty one.
-- Locks, in the order of all who change files and their previews: the file, its user, the previews; those of other files that somebody else
-- is at, because their file is deleted or their previews are made, are left to them.
with file as materialized (
    select id, user_id from user_files where id = $1 and sha256 = $2 and volume_id = $9 for share
), owner as materialized (
    select u.user_id from user_storage u where u.user_id = (select f.user_id from file f) for no key update
), made as (
    insert into previews as p (file_id, variant, user_id, file_name, mime_type, width, height, size_bytes, on_demand)
    select f.id, $3, f.user_id, $3, $4, $5, $6, $7, true from file f join owner o on o.user_id = f.user_id
    on conflict (file_id, variant) do update
       set mime_type = excluded.mime_type, width = excluded.width, height = excluded.height, size_bytes = excluded.size_bytes,
           last_used_at = excluded.last_used_at, created_at = excluded.created_at
), used as (
    select p.file_id, p.variant, sum(p.size_bytes) over (order by p.last_used_at desc, p.file_id, p.variant) as upto
      from previews p join owner o on o.user_id = p.user_id
     where p.on_demand and (p.file_id, p.variant) <> ($1, $3)
), beyond as materialized (
    select p.file_id, p.variant from used u join previews p on p.file_id = u.file_id and p.variant = u.variant
     where u.upto + $7::bigint > $8::bigint for update of p skip locked
), evicted as (
    delete from previews p using beyond b where p.file_id = b.file_id and p.variant = b.variant
    returning p.file_id, p.file_name
)
select e.file_id, e.file_name, o.volume_id, o.file_path
  from file f
  left join evicted e on true
  left join user_files o on o.id = e.file_id;

-- name: notify_preview
-- Tells those who wait for a preview.
select pg_notify('coffer_notice', $1);

-- name: begin_preview
-- Counts a try at the preview of a file that waits for it with the bytes ($2) that were looked at, and tells how many that makes. Nothing
-- when it does not wait.
update user_files set preview_tries = preview_tries + 1 where id = $1 and sha256 = $2 and preview_state = 'pending' returning preview_tries;

-- name: uncount_preview_try
-- Takes a try back whose failure was not the file's. One stays: making them has begun, so there may be bytes (remove_previews_v1).
update user_files set preview_tries = preview_tries - 1
 where id = $1 and sha256 = $2 and preview_state = 'pending' and preview_tries > 1 returning id;

-- name: renew_preview
-- Lets the preview of a file be made anew that has other bytes ($2) than those of which somebody has just stored previews.
update user_files set preview_state = 'pending', preview_reason = null, preview_tries = 0
 where id = $1 and sha256 <> $2 and preview_state <> 'pending' returning id;

-- name: finish_preview
-- Says what became of the preview of a file that still waits for it with the bytes ($2) that were looked at, where they were ($21), and tells
-- those who wait.
-- Returns nothing when it does not. The previews of before go, unless one of the same variant takes the place of each. There is an event of
-- it only where somebody is told of events: it would be one for each file.
with done as (
    update user_files
       set preview_state = $3, preview_reason = $4, width = $5, height = $6, resolution = $7, duration_seconds = $8, duration = $9,
           frame_rate = $10, video_codec = $11, audio_codec = $12, thumbhash = $13, average_color = $14
     where id = $1 and sha256 = $2 and volume_id = $21 and preview_state = 'pending'
    returning id, user_id
), outdated as (
    delete from previews p using done d where p.file_id = d.id and p.variant <> all ($15::text[])
), made as (
    insert into previews as p (file_id, variant, user_id, file_name, mime_type, width, height, size_bytes)
    select d.id, m.variant, d.user_id, m.file_name, m.mime_type, m.width, m.height, m.size_bytes
      from done d
     cross join unnest($15::text[], $16::text[], $17::text[], $18::integer[], $19::integer[], $20::bigint[])
                as m (variant, file_name, mime_type, width, height, size_bytes)
    on conflict (file_id, variant) do update
       set file_name = excluded.file_name, mime_type = excluded.mime_type, width = excluded.width, height = excluded.height,
           size_bytes = excluded.size_bytes, created_at = excluded.created_at
), noted as (
    insert into events (user_id, type, file_id, payload)
    select d.user_id, case when $3 = 'ready' then 'preview.ready' else 'preview.failed' end, d.id,
           jsonb_build_object('preview_state', $3::text, 'preview_reason', $4::text)
      from done d where exists (select from webhook_endpoints)
)
select id, pg_notify('coffer_notice', id || ' ' || user_id) from done;

-- name: derive_preview_jobs
-- Gives each user's first $1 waiting files their jobs, where they have none: those past the first 256 never had one, and a lost job is
-- nobody's loss. A failed job that is held is none. Tells how many were missing.
with recursive users (user_id) as (
    (select user_id from user_files where preview_state = 'pending' order by user_id limit 1)
    union all
    select (select f.user_id from user_files f where f.preview_state = 'pending' and f.user_id > u.user_id order by f.user_id limit 1)
      from users u where u.user_id is not null
), waiting as (
    select f.id, row_number() over (partition by f.user_id order by f.id) as place
      from users u
     cross join lateral (select id, user_id from user_files f
                          where f.user_id = u.user_id and f.preview_state = 'pending' order by f.id limit $1) f
), queued as (
    insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
    select 1 - w.place, 'queued', 'preview', convert_to(w.id::text, 'UTF8'), 'preview:' || w.id
      from waiting w
     where not exists (select from pgqueuer q where q.dedupe_key = 'preview:' || w.id and q.status in ('queued', 'picked'))
    on conflict do nothing
    returning 1
)
select count(*) from queued;

-- name: purge_job_log
-- Forgets some of what PgQueuer noted of jobs of more than a week ago, and held jobs of more than a month ago.
with old as (
    delete from pgqueuer_log where id in (
        select l.id from pgqueuer_log l where l.created < now() - interval '7 days' and l.aggregated order by l.created limit $1)
)
delete from pgqueuer where status = 'failed' and updated < now() - interval '30 days';

-- name: wake_worker
-- Tells the workers that there are jobs, in PgQueuer's words.
select pg_notify('ch_pgqueuer', json_build_object('channel', 'ch_pgqueuer', 'operation', 'insert', 'sent_at', now(),
                                                  'table', 'pgqueuer', 'type', 'table_changed_event')::text);

-- name: count_previews
-- How many files wait for their preview, with null for their type, and how many of each type have failed. Both from indexes of just these.
select null as file_type, count(*) as count from user_files where preview_state = 'pending'
union all
select file_type, count(*) from user_files where preview_state = 'failed' group by file_type;

-- name: add_preview_figures
-- Adds to what was counted: of each type and end, the files that took up to so many seconds (and more than the bound before), and their seconds.
insert into preview_figures as p (file_type, state, upto_seconds, files, seconds)
select n.file_type, n.state, n.upto_seconds, n.files, n.seconds
  from unnest($1::text[], $2::text[], $3::double precision[], $4::bigint[], $5::double precision[])
       as n (file_type, state, upto_seconds, files, seconds)
on conflict (file_type, state, upto_seconds) do update set files = p.files + excluded.files, seconds = p.seconds + excluded.seconds;

-- name: preview_figures
-- All that was counted: a few dozen rows.
select file_type, state, upto_seconds, files, seconds from preview_figures order by file_type, state, upto_seconds;

-- name: failed_previews
-- A page of the files whose preview failed, after an id.
select {file} from user_files where preview_state = 'failed' and id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') order by id limit $2;

-- name: retry_failed_previews
-- Lets failed previews wait again: those of some files ($1), or of all when that is null; $2 at once. Tells how many.
with again as (
    update user_files set preview_state = 'pending', preview_reason = null, preview_tries = 0
     where id in (select f.id from user_files f where f.preview_state = 'failed' and ($1::uuid[] is null or f.id = any ($1)) order by f.id limit $2)
    returning id
), released as (
    delete from pgqueuer q using again a where q.dedupe_key = 'preview:' || a.id and q.status = 'failed'
)
select count(*) from again;

-- name: rebuild_previews
-- Lets a page of the files after an id ($1) wait for their previews again, of one user ($2) or of all. Tells the last id of the page and
-- how many of it were changed.
with page as materialized (
    select id, file_type, preview_state from user_files
     where id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') and ($2::text is null or user_id = $2) order by id limit $3
), again as (
    update user_files f set preview_state = 'pending', preview_reason = null, preview_tries = 0
      from page p where f.id = p.id and f.id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') and p.file_type = any ($4) and p.preview_state is distinct from 'pending'
    returning f.id
)
select (select id from page order by id desc limit 1) as last, (select count(*) from again) as changed;
