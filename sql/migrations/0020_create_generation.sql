-- Generation: jobs that a pipeline elsewhere works on, their outputs, and the memory of how each piece of media was made.
--
-- An output is a file that is still to come. Its id is that of its reservation in `uploads`, which is an upload link's, and of the file. So
-- by whichever way the bytes come, there is one file for each output, and its quota is given back exactly once: with that row.
-- SQLSTATE of its own: CF007 a job or an output that has ended was changed.

create table generation_jobs (
    id uuid constraint generation_jobs_pkey primary key,
    user_id varchar(255) not null constraint generation_jobs_owner references user_storage on delete cascade,
    -- Null: whoever holds the job's secret works on it.
    pipeline varchar(64) constraint generation_jobs_pipeline_plain check (pipeline ~ '^[a-z0-9][a-z0-9_-]*$'),
    entity_type varchar(64),
    entity_id varchar(255),
    project_id varchar(255),
    media_types text[] not null,
    model_used varchar(255),
    prompt_used text constraint generation_jobs_prompt_used_bounded check (char_length(prompt_used) <= 20000),
    generation_params jsonb not null default '{}' constraint generation_jobs_params_are_object check (jsonb_typeof(generation_params) = 'object'),
    reference_ids uuid[] not null default '{}',
    -- The media that this job makes anew.
    parent_id uuid,
    output_count integer not null constraint generation_jobs_output_count_bounded check (output_count between 1 and 100),
    state text not null default 'queued' constraint generation_jobs_state_known
        check (state in ('queued', 'running', 'completed', 'partly_completed', 'failed', 'cancelled', 'expired')),
    progress_percent integer not null default 0 constraint generation_jobs_progress_is_percent check (progress_percent between 0 and 100),
    credits_used numeric constraint generation_jobs_credits_not_negative check (credits_used >= 0),
    -- Why it failed, in the pipeline's words.
    error text constraint generation_jobs_error_bounded check (char_length(error) <= 2000),
    -- What the pipeline calls it, where Coffer asks after it.
    remote_id varchar(512),
    -- Whom the app has told of this job's end, besides the endpoints that hear all, and what that is signed with: by the app, which keeps it
    -- from the pipeline. The secret goes when it has served.
    callback_url text constraint generation_jobs_callback_url_bounded check (char_length(callback_url) <= 4096),
    callback_secret text,
    callback_state text constraint generation_jobs_callback_state_known check (callback_state in ('waiting', 'due', 'told', 'failed')),
    idempotency_key varchar(255),
    created_at timestamptz not null default clock_timestamp(),
    started_at timestamptz,
    finished_at timestamptz,
    expires_at timestamptz not null,
    constraint generation_jobs_callback_is_whole check ((callback_url is null) = (callback_state is null)),
    constraint generation_jobs_ended_have_an_end check ((finished_at is null) = (state in ('queued', 'running'))),
    constraint generation_jobs_entity_is_whole check ((entity_type is null) = (entity_id is null))
);
create index generation_jobs_by_user on generation_jobs (user_id, created_at, id);
create index generation_jobs_by_entity on generation_jobs (user_id, entity_type, entity_id, created_at, id) where entity_id is not null;
create unique index generation_jobs_idempotency_key on generation_jobs (user_id, idempotency_key) where idempotency_key is not null;
-- Jobs that an adapter is to hand on or to ask after.
create index generation_jobs_open on generation_jobs (id) where finished_at is null and pipeline is not null;

create index generation_jobs_callback on generation_jobs (id) where callback_state = 'due';

-- `awaited` and `fetching` (from `url`) are open, `stored` and `failed` final; `reason` tells why it failed.
create table generation_outputs (
    job_id uuid not null constraint generation_outputs_job references generation_jobs on delete cascade,
    output_index integer not null constraint generation_outputs_index_not_negative check (output_index >= 0),
    file_id uuid not null,
    media_type text not null,
    max_bytes bigint not null constraint generation_outputs_max_bytes_positive check (max_bytes > 0),
    state text not null default 'awaited' constraint generation_outputs_state_known check (state in ('awaited', 'fetching', 'stored', 'failed')),
    reason varchar(64),
    url text constraint generation_outputs_url_bounded check (char_length(url) <= 4096),
    settled_at timestamptz,
    constraint generation_outputs_pkey primary key (job_id, output_index),
    constraint generation_outputs_fetching_has_url check (state <> 'fetching' or url is not null)
);
create unique index generation_outputs_file on generation_outputs (file_id);
create index generation_outputs_fetching on generation_outputs (file_id) where state = 'fetching';

-- The reservation of a job's output.
alter table uploads add job_id uuid;
create index uploads_of_job on uploads (job_id) where job_id is not null;

-- How media was made. For a stored file, `id` is the file's. Private to the user: nothing here is ever part of a link, an event or a log.
-- `root_id` is the first of a line of regenerations, so that all variants are one range of an index. The widest index row is that by
-- entity: (255 + 64 + 255) * 4 + 32 = 2,328 bytes, under PostgreSQL's limit of 2,704.
create table generated_media (
    id uuid constraint generated_media_pkey primary key,
    user_id varchar(255) not null constraint generated_media_owner references user_storage on delete cascade,
    file_id uuid,
    job_id uuid,
    output_index integer,
    entity_type varchar(64),
    entity_id varchar(255),
    project_id varchar(255),
    media_type text not null,
    source_type text not null constraint generated_media_source_type_known
        check (source_type in ('generated', 'linked', 'replaced', 'uploaded')),
    model_used varchar(255),
    prompt_used text,
    generation_params jsonb not null default '{}',
    credits_used numeric,
    original_url text,
    is_accessible boolean not null default true,
    last_checked_at timestamptz,
    reference_ids uuid[] not null default '{}',
    parent_id uuid,
    root_id uuid not null,
    is_primary boolean not null default false,
    created_at timestamptz not null default clock_timestamp(),
    prompt_words tsvector not null generated always as (to_tsvector('simple', coalesce(prompt_used, ''))) stored,
    constraint generated_media_entity_is_whole check ((entity_type is null) = (entity_id is null)),
    constraint generated_media_primary_has_entity check (not is_primary or entity_id is not null)
);
create unique index generated_media_file on generated_media (file_id) where file_id is not null;
create index generated_media_by_user on generated_media (user_id, created_at, id);
create index generated_media_by_entity on generated_media (user_id, entity_type, entity_id, created_at, id) where entity_id is not null;
create index generated_media_by_project on generated_media (user_id, project_id, created_at, id) where project_id is not null;
create index generated_media_by_model on generated_media (user_id, model_used, created_at, id) where model_used is not null;
create index generated_media_by_job on generated_media (job_id) where job_id is not null;
create index generated_media_by_root on generated_media (root_id, created_at, id);
create unique index generated_media_primary on generated_media (user_id, entity_type, entity_id) where is_primary;

-- Messages of pipelines that were acted upon, so that a replay does nothing. Kept longer than a signature is good for.
create table generation_messages (
    sender text not null,
    message_id text not null constraint generation_messages_id_bounded check (char_length(message_id) <= 255),
    received_at timestamptz not null default clock_timestamp(),
    constraint generation_messages_pkey primary key (sender, message_id)
);
create index generation_messages_received on generation_messages (received_at);

-- Pipelines are actors, too.
alter table audit_log drop constraint audit_log_actor_kind_known;
alter table audit_log add constraint audit_log_actor_kind_known
    check (actor_kind in ('api_key', 'user_token', 'download_link', 'upload_link', 'public_link', 'pipeline', 'cli', 'system')) not valid;

create function keep_job_order_v1() returns trigger
language plpgsql as $$
-- Invariant: queued comes before running, and each before one end, which is final; an output's end is final, too.
-- Fires: before each row of an UPDATE of generation_jobs or generation_outputs that changes the state. Locks: none. Cost: a microsecond.
-- Why not Python: a late message, a cancellation and an upload's end come at the same moment, in several processes.
begin
    if (tg_table_name = 'generation_jobs' and (old.state = 'queued' or (old.state = 'running' and new.state <> 'queued')))
       or (tg_table_name = 'generation_outputs' and old.state in ('awaited', 'fetching')) then
        return new;
    end if;
    raise exception 'a row of % is % and does not become %', tg_table_name, old.state, new.state
        using errcode = 'CF007', hint = 'What has ended stays so; begin another job.';
end
$$;

create trigger keep_order before update on generation_jobs for each row
    when (old.state is distinct from new.state) execute function keep_job_order_v1();
create trigger keep_order before update on generation_outputs for each row
    when (old.state is distinct from new.state) execute function keep_job_order_v1();

create function raise_event_v1(p_user_id text, p_type text, p_file_id uuid, p_payload jsonb) returns bigint
language sql set search_path = public, pg_temp as $$
-- Appends an event where no statement of a file's does: of a job (payload with `job_id`). Returns its id. Call it in the transaction of what
-- happened. Nothing secret may stand in the payload: it leaves the house. Nothing for a user who is gone or going: the lock, which the quota
-- triggers take too, keeps an erasure from beginning before the event is there for it to find.
insert into events (user_id, type, file_id, payload)
select u.user_id, p_type, p_file_id, p_payload from user_storage u where u.user_id = p_user_id and u.erasing_at is null for no key update
returning id;
$$;

create function raise_job_event_v1(p_job_id uuid) returns void
language plpgsql set search_path = public, pg_temp as $$
-- Tells the app that a job has ended, in the transaction that ended it: its endpoints by the event, and whom the job names besides. Without
-- prompt, URLs and secrets. Locks: the job's row, then the user's.
declare
    told_event bigint;
begin
    select raise_event_v1(
               j.user_id,
               case when j.state in ('completed', 'partly_completed') then 'job.completed' when j.state = 'cancelled' then 'job.cancelled' else 'job.failed' end,
               null,
               jsonb_build_object(
                   'job_id', j.id, 'state', j.state, 'entity_type', j.entity_type, 'entity_id', j.entity_id, 'project_id', j.project_id,
                   'file_ids', (select coalesce(jsonb_agg(o.file_id order by o.output_index), '[]')
                                  from generation_outputs o where o.job_id = j.id and o.state = 'stored')))
      into told_event
      from generation_jobs j where j.id = p_job_id and j.finished_at is not null;
    update generation_jobs set callback_state = 'due' where id = p_job_id and callback_state = 'waiting' and told_event is not null;
    if found then -- A delivery to it is one for an endpoint with the job's id: server/ledger/webhooks.py knows them both.
        insert into webhook_deliveries (endpoint_id, event_id, order_key) values (p_job_id, told_event, p_job_id::text);
    end if;
end
$$;

create function settle_job_v1(p_job_id uuid) returns void
language plpgsql set search_path = public, pg_temp as $$
-- Ends a job none of whose outputs is open any more, and counts its progress.
-- Locks: the job's row first, so that of two last outputs the second one's count sees the first.
declare
    job generation_jobs;
    open_outputs integer;
    stored_outputs integer;
    expired_outputs integer;
begin
    select * into job from generation_jobs where id = p_job_id for no key update;
    if not found or job.finished_at is not null then
        return;
    end if;
    select count(*) filter (where o.state in ('awaited', 'fetching')), count(*) filter (where o.state = 'stored'),
           count(*) filter (where o.reason = 'expired')
      into open_outputs, stored_outputs, expired_outputs
      from generation_outputs o where o.job_id = p_job_id;
    update generation_jobs
       set state = case when open_outputs > 0 then case when stored_outputs > 0 then 'running' else state end
                        when stored_outputs = output_count then 'completed'
                        when stored_outputs > 0 then 'partly_completed'
                        when expired_outputs = output_count then 'expired'
                        else 'failed' end,
           progress_percent = case when stored_outputs = output_count then 100
                                   else greatest(progress_percent, 100 * stored_outputs / output_count) end,
           started_at = case when stored_outputs > 0 then coalesce(started_at, clock_timestamp()) else started_at end,
           finished_at = case when open_outputs = 0 then clock_timestamp() end
     where id = p_job_id;
    if open_outputs = 0 then
        perform raise_job_event_v1(p_job_id);
    end if;
end
$$;

create function output_ended_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant: an output is settled by the very transaction that ends its reservation: stored if its file is there, failed if not. A stored
--   one is remembered in generated_media.
-- Fires: after each row of a DELETE from uploads that is a job's; the WHEN clause costs other uploads nothing.
-- Locks: the job's row, after the upload's and before the user's. Whoever changes a job locks in this order.
-- Cost: about 200 microseconds for an output; none for other uploads.
-- Why not Python: links, tus, webhooks, fetches, expiry, cancellation and psql all end reservations.
declare
    has_come constant boolean := exists (select from user_files f where f.id = old.id);
begin
    perform from generation_jobs where id = old.job_id for no key update;
    update generation_outputs
       set state = case when has_come then 'stored' else 'failed' end,
           reason = case when has_come then null when old.expires_at <= clock_timestamp() then 'expired' else 'closed' end,
           settled_at = clock_timestamp()
     where file_id = old.id and state in ('awaited', 'fetching');
    if found then
        insert into generated_media (id, user_id, file_id, job_id, output_index, entity_type, entity_id, project_id, media_type, source_type,
                                     model_used, prompt_used, generation_params, credits_used, original_url, reference_ids, parent_id, root_id)
        select f.id, f.user_id, f.id, j.id, o.output_index, j.entity_type, j.entity_id, j.project_id, f.file_type, 'generated',
               j.model_used, j.prompt_used, j.generation_params, j.credits_used / j.output_count, o.url, j.reference_ids, j.parent_id,
               coalesce((select p.root_id from generated_media p where p.id = j.parent_id), f.id)
          from generation_outputs o join generation_jobs j on j.id = o.job_id join user_files f on f.id = o.file_id
         where o.file_id = old.id and o.state = 'stored';
        perform settle_job_v1(old.job_id);
    end if;
    return null;
end
$$;

create trigger settle_output after delete on uploads for each row
    when (old.job_id is not null) execute function output_ended_v1();

create function forget_media_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant: what is remembered of a file goes with it, prompt and all.
-- Fires: after each DELETE from user_files, once per statement. Locks: the rows it deletes. Cost: a probe for each file.
-- Why not Python: cascades and psql delete files, too.
begin
    delete from generated_media m using old_rows o where m.file_id = o.id;
    return null;
end
$$;

create trigger forget_media after delete on user_files
    referencing old table as old_rows for each statement execute function forget_media_v1();

create function create_job_v1(
    p_id uuid, p_user_id text, p_volume_id uuid, p_job jsonb, p_file_ids uuid[], p_outputs jsonb, p_links jsonb, p_ttl_seconds double precision,
    p_lease_seconds double precision, p_idempotency_key text, p_most_links integer, p_actor jsonb
) returns uuid
language plpgsql set search_path = public, pg_temp as $$
-- Registers a job and reserves room for all of its outputs, in one transaction: both or neither. Returns its id, or that of the job which
-- the idempotency key has made before.
-- Locks: the user's row, by the quota triggers. `p_most_links` limits the user's upload links, with these.
declare
    known uuid;
begin
    insert into generation_jobs (id, user_id, pipeline, entity_type, entity_id, project_id, media_types, model_used, prompt_used, generation_params,
                                 reference_ids, parent_id, callback_url, callback_secret, callback_state, output_count, idempotency_key,
                                 expires_at)
    select p_id, p_user_id, r.pipeline, r.entity_type, r.entity_id, r.project_id, r.media_types, r.model_used, r.prompt_used, r.generation_params,
           r.reference_ids, r.parent_id, r.callback_url, r.callback_secret, case when r.callback_url is not null then 'waiting' end,
           cardinality(p_file_ids), p_idempotency_key, clock_timestamp() + make_interval(secs => p_ttl_seconds)
      from jsonb_populate_record(null::generation_jobs, p_job) r
    on conflict (user_id, idempotency_key) where idempotency_key is not null do nothing;
    if not found then
        select id into known from generation_jobs where user_id = p_user_id and idempotency_key = p_idempotency_key;
        return known;
    end if;
    insert into generation_outputs (job_id, output_index, file_id, media_type, max_bytes)
    select p_id, o.place - 1, p_file_ids[o.place], o.output ->> 'media_type', (o.output ->> 'max_bytes')::bigint
      from jsonb_array_elements(p_outputs) with ordinality o (output, place);
    insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at, link, job_id)
    select p_file_ids[o.place], p_user_id, p_volume_id, (o.output ->> 'max_bytes')::bigint,
           clock_timestamp() + make_interval(secs => p_ttl_seconds + p_lease_seconds), p_links -> (o.place - 1)::integer, p_id
      from jsonb_array_elements(p_outputs) with ordinality o (output, place);
    perform limit_uploads_v1(p_user_id, null, p_most_links);
    insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
    select 0, 'queued', 'generation', convert_to('dispatch ' || p_id, 'UTF8'), 'dispatch:' || p_id
     where (p_job ->> 'dispatched')::boolean
    on conflict do nothing;
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'job.created', p_user_id, null,
           jsonb_build_object('job_id', p_id, 'outputs', cardinality(p_file_ids),
                              'max_bytes', (select sum((o ->> 'max_bytes')::bigint) from jsonb_array_elements(p_outputs) o)), a.*
      from actor_of_v1(p_actor) a;
    return p_id;
end
$$;

create function give_up_outputs_v1(p_job_id uuid, p_reason text, p_in_use boolean) returns void
language plpgsql set search_path = public, pg_temp as $$
-- Gives up those outputs of a job that nothing has come of, and their reservations. One that somebody is sending at this moment only with
-- `p_in_use`: it then stores nothing. What is being fetched counts as in use.
-- Locks: the uploads in the order of their ids, then the job.
declare
    given_up uuid[];
begin
    select array_agg(l.id) into given_up
      from (select u.id from uploads u where u.job_id = p_job_id
               and (p_in_use or ((u.claimed_until is null or u.claimed_until < clock_timestamp())
                                 and not exists (select from generation_outputs o where o.file_id = u.id and o.state = 'fetching')))
             order by u.id for update) l;
    perform from generation_jobs where id = p_job_id for no key update;
    update generation_outputs set state = 'failed', reason = p_reason, settled_at = clock_timestamp()
     where file_id = any (given_up) and state in ('awaited', 'fetching');
    delete from uploads where id = any (given_up);
end
$$;

create function cancel_job_v1(p_user_id text, p_job_id uuid, p_actor jsonb) returns text
language plpgsql set search_path = public, pg_temp as $$
-- Cancels a job that has not ended. Returns the state that it is in afterwards; null when there is no such job of the user. What is stored
-- stays.
declare
    job generation_jobs;
begin
    perform from uploads where job_id = p_job_id and user_id = p_user_id order by id for update;
    select * into job from generation_jobs where id = p_job_id and user_id = p_user_id for no key update;
    if not found or job.finished_at is not null then
        return job.state;
    end if;
    update generation_jobs set state = 'cancelled', finished_at = clock_timestamp() where id = p_job_id;
    perform give_up_outputs_v1(p_job_id, 'cancelled', true);
    perform raise_job_event_v1(p_job_id);
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'job.cancelled', p_user_id, null, jsonb_build_object('job_id', p_job_id), a.* from actor_of_v1(p_actor) a;
    perform pg_notify('coffer_notice', 'job/' || p_job_id);
    return 'cancelled';
end
$$;

create function report_job_v1(
    p_job_id uuid, p_sender text, p_message_id text, p_outcome text, p_progress_percent integer, p_credits_used numeric, p_error text
) returns text
language plpgsql set search_path = public, pg_temp as $$
-- What a pipeline says of a job: `p_outcome` is `running`, `completed` or `failed`; null leaves the state. Once for each message, whose id
-- is null where it is Coffer that asked. Returns `accepted`, `repeated`, or `late` when the job was given up. Progress never goes back.
declare
    job generation_jobs;
begin
    if p_message_id is not null then
        insert into generation_messages (sender, message_id) values (p_sender, p_message_id) on conflict do nothing;
        if not found then
            return 'repeated';
        end if;
    end if;
    perform from uploads where job_id = p_job_id order by id for update;
    select * into job from generation_jobs where id = p_job_id for no key update;
    if not found or job.state in ('failed', 'cancelled', 'expired') or (job.finished_at is null and job.expires_at <= clock_timestamp()) then
        return 'late';
    end if;
    if job.finished_at is not null then -- The last output has ended it: what is left to say is what it cost.
        p_outcome := null;
        p_progress_percent := null;
        p_error := null;
    end if;
    update generation_jobs
       set state = case when p_outcome is not null then 'running' else state end,
           started_at = case when p_outcome is not null then coalesce(started_at, clock_timestamp()) else started_at end,
           progress_percent = greatest(progress_percent, coalesce(p_progress_percent, 0)),
           credits_used = coalesce(p_credits_used, credits_used),
           error = coalesce(p_error, error)
     where id = p_job_id;
    if p_credits_used is not null then
        update generated_media set credits_used = p_credits_used / job.output_count where job_id = p_job_id;
    end if;
    if p_outcome in ('completed', 'failed') then
        perform give_up_outputs_v1(p_job_id, case p_outcome when 'failed' then 'failed' else 'not_delivered' end, false);
        perform settle_job_v1(p_job_id);
    end if;
    perform pg_notify('coffer_notice', 'job/' || p_job_id);
    return 'accepted';
end
$$;

create function fetch_output_v1(p_job_id uuid, p_output_index integer, p_url text) returns text
language plpgsql set search_path = public, pg_temp as $$
-- Notes where an output is to be fetched from, and has the worker do it. Returns the state of the output; null when there is none. Only the
-- first URL counts.
declare
    output generation_outputs;
begin
    update generation_outputs o set state = 'fetching', url = p_url
      from generation_jobs j
     where o.job_id = p_job_id and o.output_index = p_output_index and o.state = 'awaited'
       and j.id = o.job_id and j.finished_at is null and j.expires_at > clock_timestamp()
    returning o.* into output;
    if found then
        insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
        values (0, 'queued', 'generation', convert_to('fetch ' || output.file_id, 'UTF8'), 'fetch:' || output.file_id)
        on conflict do nothing;
        return 'fetching';
    end if;
    return (select state from generation_outputs where job_id = p_job_id and output_index = p_output_index);
end
$$;

create function fail_output_v1(p_file_id uuid, p_reason text) returns void
language plpgsql set search_path = public, pg_temp as $$
-- An output that will not come. One that is settled stays so.
declare
    job uuid;
begin
    perform from uploads where id = p_file_id for update;
    select job_id into job from generation_outputs where file_id = p_file_id;
    perform from generation_jobs where id = job for no key update;
    update generation_outputs set state = 'failed', reason = p_reason, settled_at = clock_timestamp()
     where file_id = p_file_id and state in ('awaited', 'fetching');
    delete from uploads where id = p_file_id and job_id is not null;
    perform settle_job_v1(job);
    perform pg_notify('coffer_notice', 'job/' || job);
end
$$;
