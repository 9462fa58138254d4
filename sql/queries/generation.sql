-- Generation jobs and their outputs. {job} stands for the columns of server.ledger.models.Job, {output} for those of Output. Whoever locks
-- several rows locks reservations first, then the job, then the user.

-- name: create_job
-- Registers a job and reserves room for its outputs. Tells its id, or that of the job which the idempotency key made before.
select create_job_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) as id;

-- name: get_job
-- One job of one user.
select {job} from generation_jobs j where j.user_id = $1 and j.id = $2;

-- name: find_job_anywhere
-- One job, whosever it is.
select {job} from generation_jobs j where j.id = $1;

-- name: list_jobs
-- A user's jobs, newest first: $2 is how many to return, $3 how many to read for them at most. The last of those
-- is returned even if it does not match, to go on from.
select {job}, j.matches, j.place
  from (select j.*, m.matches, count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from generation_jobs j cross join lateral (select true {others} as matches) m
         where j.user_id = $1 {bounds}
        window reading as (order by j.created_at desc, j.id desc rows unbounded preceding)) j
 where j.found <= $2 and j.place <= $3 and (j.matches or j.place = $3)
 order by j.created_at desc, j.id desc;

-- name: get_outputs
-- The outputs of jobs.
select {output} from generation_outputs o where o.job_id = any ($1) order by o.job_id, o.output_index;

-- name: find_output
-- The output that a file is or is to be.
select {output} from generation_outputs o where o.file_id = $1;

-- name: cancel_job
-- Cancels a job; tells the state that it is in afterwards.
select cancel_job_v1($1, $2, $3) as state;

-- name: report_job
-- What a pipeline says of a job; tells what became of that.
select report_job_v1($1, $2, $3, $4, $5, $6, $7) as answer;

-- name: message_is_known
-- Whether a pipeline's message was acted upon.
select exists (select from generation_messages where sender = $1 and message_id = $2) as is_known;

-- name: purge_messages
-- Forgets messages of more than $1 seconds ago.
delete from generation_messages where received_at < clock_timestamp() - make_interval(secs => $1);

-- name: fetch_output
-- Has an output fetched from a URL; tells the state that it is in afterwards.
select fetch_output_v1($1, $2, $3) as state;

-- name: fail_output
-- Gives up an output.
select fail_output_v1($1, $2);

-- name: notify_job
-- Tells those who wait for a job.
select pg_notify('coffer_notice', 'job/' || $1::text);

-- name: set_remote_id
-- Notes what the pipeline calls a job that it has taken, once; the job runs from then on.
with taken as (
    update generation_jobs set remote_id = $2, state = 'running', started_at = coalesce(started_at, clock_timestamp())
     where id = $1 and remote_id is null and finished_at is null returning id
)
select pg_notify('coffer_notice', 'job/' || id) from taken;

-- name: derive_generation_jobs
-- Gives outputs that wait to be fetched or marked, and jobs that wait to be handed on or asked after ($1 are the pipelines that Coffer calls),
-- their place in the queue, where they have none. $2 are those of them that are to be asked after again and again. What a defect has failed is
-- left to expire. None while the store is a restored one that nobody has cleared. Tells how many were missing.
with waiting as (
    select 'fetch:' || o.file_id as key, 'fetch ' || o.file_id as payload from generation_outputs o where o.state = 'fetching'
    union all
    select 'mark:' || m.file_id, 'mark ' || m.file_id from generated_media m where m.marking = 'pending'
    union all
    select 'dispatch:' || j.id, 'dispatch ' || j.id
      from generation_jobs j
     where j.finished_at is null and j.pipeline is not null and j.expires_at > clock_timestamp()
       and ((j.pipeline = any ($1) and j.remote_id is null) or j.pipeline = any ($2))
       and exists (select from generation_outputs o where o.job_id = j.id and o.state = 'awaited')
), queued as (
    insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
    select 0, 'queued', 'generation', convert_to(w.payload, 'UTF8'), w.key from waiting w
     where not exists (select from pgqueuer q where q.dedupe_key = w.key and q.status in ('queued', 'picked', 'failed'))
       and not exists (select from upload_stops)
    on conflict do nothing
    returning 1
)
select count(*) from queued;

-- name: find_marking
-- What the output that a file is waits to be marked with.
select m.wanted_marks, m.model_used from generated_media m where m.file_id = $1 and m.marking = 'pending';

-- name: settle_marking
-- Ends the job of an output that waited to be marked, if it was the last one open; with a reason ($2) the marking is given up.
select settle_marking_v1($1, $2);

-- name: mark_content
-- Ends the reservation, then points the row of an output that waits to be marked ($12 are the marks) at the bytes that are, if it still has the
-- generation that the caller saw. The trigger leaves a tombstone for the old bytes. What was made of them is of the same picture and stays, but
-- for what they said of their making; on another volume ($8) it is made again.
with released as (
    delete from uploads where id = $4 and user_id = $1 returning id
), waiting as materialized (
    select m.id from generated_media m where m.file_id = $2 and m.marking = 'pending' for update
), replaced as (
    update user_files f
       set mime_type = $5, file_size = $6, sha256 = $7, volume_id = $8, file_path = $9, generation = $10, damaged_at = null,
           preview_state = case when f.preview_state is not null and f.volume_id <> $8 then 'pending' else f.preview_state end,
           content_changed_at = clock_timestamp(), updated_at = clock_timestamp()
      from (select count(*) from released) first (released)
     where first.released >= 0 and f.user_id = $1 and f.id = $2 and f.generation = $3 and f.deleted_at is null
       and exists (select from waiting)
    returning f.*
), marked as (
    update generated_media m set marking = 'marked', marking_reason = null, marks = $12 from waiting w, replaced r where m.id = w.id
), noted as (
    insert into events (user_id, type, file_id, payload)
    select user_id, 'file.replaced', id,
           jsonb_build_object('file_name', file_name, 'file_type', file_type, 'mime_type', mime_type, 'file_size', file_size,
                              'marks', to_jsonb($12::text[]))
      from replaced
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.replaced', r.user_id, r.id,
           jsonb_build_object('mime_type', r.mime_type, 'file_size', r.file_size, 'marks', to_jsonb($12::text[])), a.*
      from replaced r, actor_of_v1($11) a
), outdated as (
    delete from previews p using replaced r where p.file_id = r.id and (p.file_name = $13 or r.preview_state = 'pending')
)
select {file} from replaced;
