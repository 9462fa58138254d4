-- The database that the files of sql/migrations add up to, to be read. Do not edit it: change the database by a new migration, then
-- write this file anew with `python -m tests.ledger.write_schema`. A test fails while the two differ.

-- Functions come before the tables that they name.
SET check_function_bodies = false;

CREATE TYPE public.pgqueuer_status AS ENUM (
    'queued',
    'picked',
    'successful',
    'exception',
    'canceled',
    'deleted',
    'failed'
);

CREATE FUNCTION public.actor_of_v1(p_actor jsonb) RETURNS TABLE(actor_kind text, actor_id text, acting_user_id text, address inet, request_id text)
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
-- The columns that an actor fills, from the JSON of server/actor.py. PostgreSQL puts the body into the query that calls it.
select p_actor ->> 'kind', p_actor ->> 'id', p_actor ->> 'user_id', (p_actor ->> 'address')::inet, p_actor ->> 'request_id'
$$;

CREATE TABLE public.user_storage (
    user_id character varying(255) NOT NULL,
    tier text DEFAULT 'standard'::text NOT NULL,
    max_bytes bigint DEFAULT '10737418240'::bigint,
    total_bytes bigint DEFAULT 0 NOT NULL,
    reserved_bytes bigint DEFAULT 0 NOT NULL,
    file_count bigint DEFAULT 0 NOT NULL,
    credit_xid xid8,
    credit_bytes bigint DEFAULT 0 NOT NULL,
    volume_id uuid,
    erasing_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    link_epoch integer DEFAULT 0 NOT NULL,
    preview_bytes bigint DEFAULT 0 NOT NULL,
    moving_since timestamp with time zone,
    held_at timestamp with time zone,
    hold_reason text,
    warned_percent smallint DEFAULT 0 NOT NULL,
    CONSTRAINT user_storage_credit_bytes_not_negative CHECK ((credit_bytes >= 0)),
    CONSTRAINT user_storage_file_count_not_negative CHECK ((file_count >= 0)),
    CONSTRAINT user_storage_hold_has_reason CHECK (((held_at IS NULL) = (hold_reason IS NULL))),
    CONSTRAINT user_storage_link_epoch_not_negative CHECK ((link_epoch >= 0)),
    CONSTRAINT user_storage_max_bytes_not_negative CHECK ((max_bytes >= 0)),
    CONSTRAINT user_storage_preview_bytes_not_negative CHECK ((preview_bytes >= 0)),
    CONSTRAINT user_storage_reserved_bytes_not_negative CHECK ((reserved_bytes >= 0)),
    CONSTRAINT user_storage_total_bytes_not_negative CHECK ((total_bytes >= 0)),
    CONSTRAINT user_storage_user_id_printable CHECK (((user_id)::text ~ '^[^\x01-\x1f\x7f]+$'::text))
)
WITH (fillfactor='70');

CREATE FUNCTION public.begin_erasing_v1(p_user_id text, p_actor jsonb, p_unseen_days integer, p_default_max_bytes bigint, p_any_quota boolean) RETURNS SETOF public.user_storage
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Marks a user as being erased, and records once what there was to erase: files, bytes, and the SHA-256 of the files' SHA-256 in the order of
-- their ids, of which a certificate is made. With `p_unseen_days`, only a user who has stored nothing and whose row nobody has changed for so
-- long; and who has the default quota and tier, unless any quota will do. Returns nothing when there is no such user.
-- A function, because what is summed must be what is there once the mark keeps everything new out: a statement after the one that locks.
-- Locks: the user's row. Cost: reads every row of the user; a second for a million files.
declare
    marked user_storage;
    found_files bigint;
    found_bytes bigint;
    found_digest text;
begin
    update user_storage u set erasing_at = now(), updated_at = clock_timestamp()
     where u.user_id = p_user_id and u.erasing_at is null
       and (p_unseen_days is null
            or (u.file_count = 0 and u.reserved_bytes = 0 and u.held_at is null and u.updated_at < now() - make_interval(days => p_unseen_days)
                and (p_any_quota or (u.max_bytes is not distinct from p_default_max_bytes and u.tier = 'standard'))))
    returning * into marked;
    if found then
        select count(*), coalesce(sum(f.file_size), 0)::bigint,
               encode(sha256(coalesce(string_agg(f.sha256, ''::bytea order by f.id), ''::bytea)), 'hex')
          into found_files, found_bytes, found_digest
          from user_files f where f.user_id = p_user_id;
        insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
        select 'user.erasing', p_user_id, null,
               jsonb_build_object('file_count', found_files, 'total_bytes', found_bytes, 'sha256_of_digests', found_digest), a.*
          from actor_of_v1(p_actor) a;
        return next marked;
    elsif p_unseen_days is null then
        return query select * from user_storage u where u.user_id = p_user_id and u.erasing_at is not null;
    end if;
end
$$;

CREATE FUNCTION public.cancel_job_v1(p_user_id text, p_job_id uuid, p_actor jsonb) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
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

CREATE FUNCTION public.charge_previews_v1(p_user_id character varying, p_bytes bigint) RETURNS void
    LANGUAGE sql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: preview_bytes is the sum of the sizes of the user's previews. Called by the triggers of previews, in the order of user_id.
-- Locks: the user's row. Cost: one HOT update.
-- Why not Python: cascades and psql remove previews too.
update user_storage set preview_bytes = preview_bytes + p_bytes where user_id = p_user_id and p_bytes <> 0;
$$;

CREATE FUNCTION public.charge_usage_v1(p_user_id character varying, p_total bigint, p_reserved bigint, p_files bigint, p_admits boolean) RETURNS void
    LANGUAGE plpgsql
    AS $$
-- Invariant: total_bytes + reserved_bytes grows past max_bytes by no path; total_bytes is the sum of the user's file sizes.
-- Called by: every quota trigger of user_files and uploads, once per user of a statement, in the order of user_id. Their search_path
--   holds here too; setting it once more would cost a fifth of this function.
-- Locks: the user's row of user_storage, FOR NO KEY UPDATE, to the end of the transaction. Nothing that this function or its
--   callers lock afterwards is locked by anyone who does not hold that row.
-- Cost: one HOT update, and one insert into usage_ledger when total_bytes changes; about 50 microseconds.
-- Why not Python: two servers, or a server and a sysadmin's psql, would read the same total and both find room.
--
-- The deltas are applied, never re-summed: a sum does not see what a concurrent transaction has inserted.
-- What a transaction releases from reservations becomes credit that only a file in the same transaction can use. So an upload
-- publishes the bytes that it holds even after max_bytes was lowered, and no transaction grows a user who has no room.
declare
    this_transaction constant xid8 := pg_current_xact_id();
    total_after bigint;
    owner user_storage;
begin
    for attempt in 1..2 loop
        update user_storage u
           set total_bytes = u.total_bytes + p_total,
               reserved_bytes = u.reserved_bytes + p_reserved,
               file_count = u.file_count + p_files,
               credit_xid = this_transaction,
               credit_bytes = greatest(
                   0, case when u.credit_xid = this_transaction then u.credit_bytes else 0 end - least(p_reserved, 0) - greatest(p_total, 0)
               ),
               updated_at = clock_timestamp()
         where u.user_id = p_user_id
           and (u.erasing_at is null or not p_admits)
           and (p_total + p_reserved <= 0
                or u.max_bytes is null
                or u.total_bytes + u.reserved_bytes + p_total + p_reserved <= u.max_bytes
                or (p_reserved = 0 and u.credit_xid = this_transaction and p_total <= u.credit_bytes))
        returning u.total_bytes into total_after;
        if found then
            if p_total <> 0 then
                insert into usage_ledger (user_id, changed_at, delta_bytes, total_bytes)
                values (p_user_id, clock_timestamp(), p_total, total_after);
            end if;
            return;
        end if;
        -- Lock the row, so that the second attempt is refused for the figures that we report, or succeeds.
        select * into owner from user_storage where user_id = p_user_id for no key update;
        if not found then
            return; -- The user's row is being deleted and takes its files and uploads with it: nothing is left to count.
        end if;
    end loop;
    if owner.erasing_at is not null and p_admits then
        raise exception 'user % is being erased', p_user_id
            using errcode = 'CF003', hint = 'Wait until the user is gone; a new upload then starts a new user.';
    end if;
    raise exception 'quota of user % exceeded', p_user_id
        using errcode = 'CF001',
              detail = json_build_object(
                  'used_bytes', owner.total_bytes + owner.reserved_bytes,
                  'limit_bytes', owner.max_bytes,
                  'needed_bytes', p_total + p_reserved
              )::text,
              hint = 'Delete files, or raise user_storage.max_bytes (null is unlimited).';
end
$$;

CREATE FUNCTION public.claim_link_v1(p_id uuid, p_lease_seconds double precision, p_most_uploads integer) RETURNS TABLE(user_id text, reserved_bytes bigint, link jsonb)
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Takes an upload link's reservation for one upload, until its lease ends, and counts that. Nothing when it is gone or in use.
#variable_conflict use_column
declare
    claimed uploads;
begin
    update uploads
       set claimed_until = clock_timestamp() + make_interval(secs => p_lease_seconds)
     where id = p_id and link is not null and expires_at > clock_timestamp() and (claimed_until is null or claimed_until < clock_timestamp())
    returning * into claimed;
    if found then
        perform limit_uploads_v1(claimed.user_id, p_most_uploads, null);
        return query select claimed.user_id::text, claimed.reserved_bytes, claimed.link;
    end if;
end
$$;

CREATE FUNCTION public.correct_counters_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: as charge_usage_v1: afterwards the user's counters are the sums, and the last total of the history is total_bytes.
-- Fires: before each INSERT into counter_corrections, which the audit makes for a user whose counters are not the sums.
-- Locks: the user's row, FOR NO KEY UPDATE, first, as all who count do. Whoever has inserted a file and not yet counted it waits for that lock,
--   and its file is not in our sum; whoever has counted has committed before us, and its file is: each statement here sees what was
--   committed when it began.
-- Cost: reads every row of the user; seconds for a million files, in which the user's uploads wait to commit.
-- Why not Python: the counters may be changed by triggers alone (refuse_counter_change_v1).
declare
    owner user_storage;
    history bigint;
begin
    select * into owner from user_storage where user_id = new.user_id for no key update;
    if not found then
        return null;
    end if;
    -- In three steps, so that refuse_beyond_previews_v1 does not take a correction for an upload.
    update user_storage set preview_bytes = 0 where user_id = new.user_id;
    update user_storage u
       set total_bytes = f.bytes, file_count = f.files, reserved_bytes = r.bytes, updated_at = clock_timestamp()
      from (select coalesce(sum(file_size), 0)::bigint as bytes, count(*) as files from user_files where user_id = new.user_id) f,
           (select coalesce(sum(reserved_bytes), 0)::bigint as bytes from uploads where user_id = new.user_id) r
     where u.user_id = new.user_id;
    update user_storage u
       set preview_bytes = p.bytes
      from (select coalesce(sum(v.size_bytes), 0)::bigint as bytes
              from user_files o join previews v on v.file_id = o.id where o.user_id = new.user_id) p
     where u.user_id = new.user_id
    returning jsonb_build_object('total_bytes', u.total_bytes, 'file_count', u.file_count, 'reserved_bytes', u.reserved_bytes,
                                 'preview_bytes', u.preview_bytes) into new.became;
    new.was := jsonb_build_object('total_bytes', owner.total_bytes, 'file_count', owner.file_count, 'reserved_bytes', owner.reserved_bytes,
                                  'preview_bytes', owner.preview_bytes);
    delete from user_storage_by_type where user_id = new.user_id;
    insert into user_storage_by_type (user_id, file_type, mime_type, file_count, total_bytes)
    select user_id, file_type, mime_type, count(*), sum(file_size) from user_files where user_id = new.user_id group by 1, 2, 3;
    select l.total_bytes into history from usage_ledger l where l.user_id = new.user_id order by l.id desc limit 1;
    insert into usage_ledger (user_id, changed_at, delta_bytes, total_bytes)
    select new.user_id, clock_timestamp(), (new.became ->> 'total_bytes')::bigint - coalesce(history, 0), (new.became ->> 'total_bytes')::bigint
     where (new.became ->> 'total_bytes')::bigint <> coalesce(history, 0);
    return new;
end
$$;

CREATE FUNCTION public.create_job_v1(p_id uuid, p_user_id text, p_volume_id uuid, p_job jsonb, p_file_ids uuid[], p_outputs jsonb, p_links jsonb, p_ttl_seconds double precision, p_lease_seconds double precision, p_idempotency_key text, p_most_links integer, p_actor jsonb) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
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

CREATE FUNCTION public.create_resumable_upload_v1(p_id uuid, p_user_id text, p_volume_id uuid, p_length_bytes bigint, p_reserved_bytes bigint, p_upload_metadata text, p_details jsonb, p_kinds text[], p_is_partial boolean, p_lifetime_seconds double precision, p_most integer) RETURNS timestamp with time zone
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Reserves quota for a resumable upload and remembers it; tells when it expires. `p_most` limits the user's unfinished ones; they do not
-- count as uploads under way, which somebody is sending at this moment.
-- A function, because the count must come after the insert's triggers, which lock the user's row: of two that would each be the last one,
-- the second sees the first.
declare
    expires constant timestamptz := clock_timestamp() + make_interval(secs => p_lifetime_seconds);
    unfinished bigint;
begin
    insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at, is_resumable)
    values (p_id, p_user_id, p_volume_id, p_reserved_bytes, expires, true);
    insert into resumable_uploads (id, user_id, volume_id, incoming_name, length_bytes, upload_metadata, details, kinds, is_partial, expires_at)
    values (p_id, p_user_id, p_volume_id, p_id, p_length_bytes, p_upload_metadata, p_details, p_kinds, p_is_partial, expires);
    select count(*) into unfinished from uploads u
     where u.user_id = p_user_id and u.is_resumable and u.expires_at > clock_timestamp();
    if unfinished > p_most then
        raise exception 'user % has % unfinished resumable uploads', p_user_id, unfinished - 1
            using errcode = 'CF005', detail = p_most::text, hint = 'Finish or delete some of them.';
    end if;
    return expires;
end
$$;

CREATE FUNCTION public.delete_files_v1(p_user_id text, p_ids uuid[]) RETURNS TABLE(file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Deletes those of the user's files, appends an event for each, and returns the tombstone that the trigger left for each.
-- A function, because the rows that a trigger inserts are invisible to the statement that fired it.
-- Locks: the files' rows in the order of their ids, so that two overlapping deletions wait for each other instead of deadlocking;
--   then what user_files_deleted_v1 locks.
#variable_conflict use_column
declare
    deleted_ids uuid[];
    deleted_generations integer[];
begin
    with locked as materialized (
        select f.id from user_files f where f.user_id = p_user_id and f.id = any (p_ids) order by f.id for update
    ), gone as (
        delete from user_files f using locked l where f.id = l.id returning f.id, f.generation, f.file_type, f.file_size
    ), noted as (
        insert into events (user_id, type, file_id, payload)
        select p_user_id, 'file.deleted', g.id, jsonb_build_object('file_type', g.file_type, 'file_size', g.file_size) from gone g
    )
    select array_agg(g.id), array_agg(g.generation) into deleted_ids, deleted_generations from gone g;
    return query
        select t.file_id, t.id, t.volume_id, t.file_path
          from unnest(deleted_ids, deleted_generations) g (id, generation)
          join tombstones t on t.file_id = g.id and t.generation = g.generation;
end
$$;

CREATE FUNCTION public.delete_files_v2(p_user_id text, p_ids uuid[], p_actor jsonb) RETURNS TABLE(file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Deletes those of the user's files, appends an event and a record for each, and returns the tombstone that the trigger left for each.
-- A function, because the rows that a trigger inserts are invisible to the statement that fired it.
-- Locks: the files' rows in the order of their ids, so that two overlapping deletions wait for each other instead of deadlocking;
--   then what user_files_deleted_v1 locks.
#variable_conflict use_column
declare
    deleted_ids uuid[];
    deleted_generations integer[];
begin
    with locked as materialized (
        select f.id from user_files f where f.user_id = p_user_id and f.id = any (p_ids) order by f.id for update
    ), gone as (
        delete from user_files f using locked l where f.id = l.id returning f.id, f.generation, f.file_type, f.file_size
    ), noted as (
        insert into events (user_id, type, file_id, payload)
        select p_user_id, 'file.deleted', g.id, jsonb_build_object('file_type', g.file_type, 'file_size', g.file_size) from gone g
    ), recorded as (
        insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
        select 'file.deleted', p_user_id, g.id, jsonb_build_object('file_type', g.file_type, 'file_size', g.file_size), a.*
          from gone g, actor_of_v1(p_actor) a
    )
    select array_agg(g.id), array_agg(g.generation) into deleted_ids, deleted_generations from gone g;
    return query
        select t.file_id, t.id, t.volume_id, t.file_path
          from unnest(deleted_ids, deleted_generations) g (id, generation)
          join tombstones t on t.file_id = g.id and t.generation = g.generation;
end
$$;

CREATE FUNCTION public.delete_files_v3(p_user_id text, p_ids uuid[], p_actor jsonb, p_why jsonb) RETURNS TABLE(file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- As delete_files_v2; the records tell `p_why` too, an object. Who calls it for some files of a condition locks those first, in the order
-- of their ids, and so has them looked at once more.
#variable_conflict use_column
declare
    deleted_ids uuid[];
    deleted_generations integer[];
begin
    with locked as materialized (
        select f.id from user_files f where f.user_id = p_user_id and f.id = any (p_ids) order by f.id for update
    ), gone as (
        delete from user_files f using locked l where f.id = l.id returning f.id, f.generation, f.file_type, f.file_size
    ), noted as (
        insert into events (user_id, type, file_id, payload)
        select p_user_id, 'file.deleted', g.id, jsonb_build_object('file_type', g.file_type, 'file_size', g.file_size) from gone g
    ), recorded as (
        insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
        select 'file.deleted', p_user_id, g.id, jsonb_build_object('file_type', g.file_type, 'file_size', g.file_size) || p_why, a.*
          from gone g, actor_of_v1(p_actor) a
    )
    select array_agg(g.id), array_agg(g.generation) into deleted_ids, deleted_generations from gone g;
    return query
        select t.file_id, t.id, t.volume_id, t.file_path
          from unnest(deleted_ids, deleted_generations) g (id, generation)
          join tombstones t on t.file_id = g.id and t.generation = g.generation;
end
$$;

CREATE FUNCTION public.enqueue_previews_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a file that waits for its preview has a job, or its user has 256 that wait already; then the worker derives the job from the
--   row when its turn has come. So no import, however large, makes the queue long.
-- Fires: after each INSERT or COPY into user_files, once per statement.
-- Order: a user's n-th waiting file has the priority -n. So users take turns, and the first upload of an idle one precedes all others.
-- Locks: none but those of the new jobs. Cost: about 50 microseconds for one file.
-- Why not Python: the job must be there if and only if the row is, by whatever way it came.
begin
    with news as materialized (
        select n.id, n.user_id, row_number() over (partition by n.user_id order by n.id desc) as from_newest
          from new_rows n where n.preview_state = 'pending'
    ), backlogs as materialized (
        select u.user_id, b.files
          from (select distinct n.user_id from news n) u
         cross join lateral (select count(*) as files
                               from (select from user_files f where f.user_id = u.user_id and f.preview_state = 'pending' limit 256) w) b
    )
    insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
    select n.from_newest - b.files, 'queued', 'preview', convert_to(n.id::text, 'UTF8'), 'preview:' || n.id
      from news n join backlogs b on b.user_id = n.user_id
     where b.files < 256
    on conflict do nothing;
    return null;
end
$$;

CREATE FUNCTION public.fail_output_v1(p_file_id uuid, p_reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
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

CREATE FUNCTION public.fan_out_events_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: an event and its deliveries are committed together or not at all.
-- Fires: after each INSERT into events, once per statement. Events of one file are in the order of their ids, because whoever appends one
--   has the file's row locked until its commit; so are the deliveries.
-- Locks: none but those of the new rows. Cost: about 10 microseconds without endpoints; one insert for each endpoint that wants the event.
-- Why not Python: a server that dies after its commit would tell nobody.
begin
    if exists (select from webhook_endpoints) then
        insert into webhook_deliveries (endpoint_id, event_id, order_key)
        select w.id, n.id, coalesce(n.file_id::text, n.payload ->> 'job_id', 'user ' || n.user_id)
          from new_rows n join webhook_endpoints w on w.types is null or n.type = any (w.types)
         order by n.id;
    end if;
    return null;
end
$$;

CREATE FUNCTION public.fetch_output_v1(p_job_id uuid, p_output_index integer, p_url text) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
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

CREATE FUNCTION public.forget_media_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: what is remembered of a file goes with it, prompt and all.
-- Fires: after each DELETE from user_files, once per statement. Locks: the rows it deletes. Cost: a probe for each file.
-- Why not Python: cascades and psql delete files, too.
begin
    delete from generated_media m using old_rows o where m.file_id = o.id;
    return null;
end
$$;

CREATE FUNCTION public.give_up_outputs_v1(p_job_id uuid, p_reason text, p_in_use boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
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

CREATE FUNCTION public.join_resumable_uploads_v1(p_id uuid, p_user_id text, p_parts uuid[], p_upload_metadata text, p_details jsonb, p_kinds text[], p_lifetime_seconds double precision) RETURNS timestamp with time zone
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Makes one upload of whole partial ones and gives it their reservations, in one transaction: nothing is charged twice, and nobody else
-- takes the quota in between. Null unless every part is there, whole, unjoined and held by nobody.
-- Locks: the parts in the order of their ids, then what the quota triggers lock.
declare
    expires constant timestamptz := clock_timestamp() + make_interval(secs => p_lifetime_seconds);
    whole bigint;
    total bigint;
    volume uuid;
begin
    with locked as materialized (
        select r.id, r.length_bytes, r.volume_id from resumable_uploads r
         where r.id = any (p_parts) and r.user_id = p_user_id and r.is_partial and r.joined_as is null
           and r.offset_bytes = r.length_bytes and r.expires_at > clock_timestamp()
           and (r.held_by is null or r.held_until < clock_timestamp())
         order by r.id for update
    )
    select count(*), coalesce(sum(l.length_bytes), 0), (array_agg(l.volume_id order by l.id))[1] into whole, total, volume from locked l;
    if whole = 0 or whole <> cardinality(p_parts) then
        return null;
    end if;
    delete from uploads where id = any (p_parts);
    insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at, is_resumable) values (p_id, p_user_id, volume, total, expires, true);
    insert into resumable_uploads (id, user_id, volume_id, incoming_name, length_bytes, upload_metadata, details, kinds, parts, expires_at)
    values (p_id, p_user_id, volume, p_id, total, p_upload_metadata, p_details, p_kinds, p_parts, expires);
    update resumable_uploads set joined_as = p_id, expires_at = expires where id = any (p_parts);
    return expires;
end
$$;

CREATE FUNCTION public.keep_audit_log_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a record stays as written, and leaves only with all older ones, at an age of 30 days or more. The one change that is let
--   through takes the client's address out of the records of a user who is being erased.
-- Fires: before each row of an UPDATE; after each DELETE, once per statement; before TRUNCATE.
-- Locks: none. Cost: one index probe per statement that deletes, one per row that is changed; none for an insert.
-- Why not Python: it is Python, and whoever made it do so, that the trail must be kept from. It keeps it from every statement, not from
--   the table's owner, who can drop the trigger: README, "The audit trail".
declare
    kept audit_log;
    youngest timestamptz;
begin
    if tg_op = 'UPDATE' then
        kept := old;
        kept.address := null;
        if new is not distinct from kept
           and exists (select from user_storage u where u.user_id = old.user_id and u.erasing_at is not null) then
            return new;
        end if;
    elsif tg_op = 'DELETE' then
        select max(o.at) into youngest from old_rows o;
        if youngest is null
           or (youngest < now() - interval '30 days' and not exists (select from audit_log a where a.at < youngest)) then
            return null;
        end if;
    end if;
    raise exception '% of audit_log is refused', tg_op
        using errcode = 'CF006', hint = 'Records leave by age alone, oldest first: see COFFER_AUDIT_LOG_DAYS.';
end
$$;

CREATE FUNCTION public.keep_job_order_v1() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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

CREATE TABLE public.lifecycle_rules (
    id bigint NOT NULL,
    action text NOT NULL,
    after_days integer NOT NULL,
    user_id character varying(255),
    file_type text,
    mime_type character varying(127),
    tag character varying(255),
    package_name character varying(255),
    metadata jsonb,
    includes_favorites boolean DEFAULT false NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT lifecycle_rules_action_known CHECK ((action = ANY (ARRAY['delete'::text, 'trash'::text]))),
    CONSTRAINT lifecycle_rules_after_days_positive CHECK ((after_days > 0)),
    CONSTRAINT lifecycle_rules_file_type_known CHECK ((file_type = ANY (ARRAY['video'::text, 'image'::text, 'scene'::text, 'project'::text, 'audio'::text]))),
    CONSTRAINT lifecycle_rules_metadata_is_object CHECK ((jsonb_typeof(metadata) = 'object'::text))
);

CREATE TABLE public.user_files (
    id uuid NOT NULL,
    user_id character varying(255) NOT NULL,
    file_name character varying(500) NOT NULL,
    file_type text NOT NULL,
    mime_type character varying(127) NOT NULL,
    file_size bigint NOT NULL,
    sha256 bytea NOT NULL,
    volume_id uuid NOT NULL,
    file_path text NOT NULL,
    generation integer DEFAULT 1 NOT NULL,
    thumbnail_path text,
    resolution text,
    width integer,
    height integer,
    duration text,
    duration_seconds double precision,
    package_name character varying(255),
    tags text[] DEFAULT '{}'::text[] NOT NULL,
    is_favorite boolean DEFAULT false NOT NULL,
    metadata jsonb DEFAULT '{}'::jsonb NOT NULL,
    idempotency_key character varying(255),
    upload_date timestamp with time zone DEFAULT now() NOT NULL,
    content_changed_at timestamp with time zone DEFAULT now() NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    name_key text GENERATED ALWAYS AS ("left"(lower((file_name)::text), 100)) STORED NOT NULL COLLATE pg_catalog."C",
    public_id text,
    preview_state text,
    preview_reason text,
    preview_tries smallint DEFAULT 0 NOT NULL,
    thumbhash bytea,
    average_color text,
    frame_rate double precision,
    video_codec text,
    audio_codec text,
    damaged_at timestamp with time zone,
    deleted_at timestamp with time zone,
    restored_at timestamp with time zone,
    CONSTRAINT user_files_average_color_hexadecimal CHECK ((average_color ~ '^#[0-9a-f]{6}$'::text)),
    CONSTRAINT user_files_duration_seconds_not_negative CHECK ((duration_seconds >= (0)::double precision)),
    CONSTRAINT user_files_file_name_not_empty CHECK (((file_name)::text <> ''::text)),
    CONSTRAINT user_files_file_size_not_negative CHECK ((file_size >= 0)),
    CONSTRAINT user_files_file_type_known CHECK ((file_type = ANY (ARRAY['video'::text, 'image'::text, 'scene'::text, 'project'::text, 'audio'::text]))),
    CONSTRAINT user_files_frame_rate_positive CHECK ((frame_rate > (0)::double precision)),
    CONSTRAINT user_files_generation_positive CHECK ((generation > 0)),
    CONSTRAINT user_files_height_positive CHECK ((height > 0)),
    CONSTRAINT user_files_metadata_is_object CHECK ((jsonb_typeof(metadata) = 'object'::text)),
    CONSTRAINT user_files_mime_type_plain CHECK (((mime_type)::text ~ '^[a-z0-9.+-]+/[a-z0-9.+_-]+$'::text)),
    CONSTRAINT user_files_path_names_the_row CHECK ((POSITION(((((('/'::text || id) || '.'::text) || generation) || '.'::text)) IN (file_path)) > 0)),
    CONSTRAINT user_files_preview_state_known CHECK ((preview_state = ANY (ARRAY['pending'::text, 'ready'::text, 'failed'::text, 'unsupported'::text]))),
    CONSTRAINT user_files_public_id_is_random CHECK ((public_id ~ '^[A-Za-z0-9_-]{22}$'::text)),
    CONSTRAINT user_files_sha256_is_32_bytes CHECK ((octet_length(sha256) = 32)),
    CONSTRAINT user_files_thumbhash_small CHECK ((octet_length(thumbhash) <= 64)),
    CONSTRAINT user_files_width_positive CHECK ((width > 0))
);

CREATE FUNCTION public.lifecycle_applies_v1(p_rule public.lifecycle_rules, p_file public.user_files) RETURNS boolean
    LANGUAGE sql STABLE
    AS $$
-- Whether a rule is about a file by now. The age is that of its bytes: whoever replaces them, or takes them out of the trash, begins anew.
select greatest(p_file.content_changed_at, p_file.restored_at) < now() - make_interval(days => p_rule.after_days)
       and (p_rule.action = 'delete' or p_file.deleted_at is null)
       and (p_rule.includes_favorites or not p_file.is_favorite)
       and (p_rule.user_id is null or p_file.user_id = p_rule.user_id)
       and (p_rule.file_type is null or p_file.file_type = p_rule.file_type)
       and (p_rule.mime_type is null or p_file.mime_type = p_rule.mime_type)
       and (p_rule.tag is null or p_rule.tag = any (p_file.tags))
       and (p_rule.package_name is null or p_file.package_name = p_rule.package_name)
       and (p_rule.metadata is null or p_file.metadata @> p_rule.metadata)
$$;

CREATE FUNCTION public.limit_uploads_v1(p_user_id text, p_most_uploads integer, p_most_links integer) RETURNS void
    LANGUAGE plpgsql
    AS $$
-- Invariant: who calls this in the transaction that opens or claims an upload never leaves the user with more of them than the limits.
-- Called by: open_upload_v1, claim_link_v1, when the row that is to be counted is there. A null limit is none.
-- Locks: the user's row of user_storage, FOR NO KEY UPDATE, to the end of the transaction, after the upload's, as the quota triggers do.
--   So two that would each be the last one wait for each other, and the count, a statement of its own, sees what the first one did.
-- Cost: one probe, and as many entries of one index as the user has uploads, which the limits bound; about 30 microseconds
--   for 10, 300 for 1,000.
-- Why not Python: two servers would count the same rows and both find room.
--
-- A reservation whose lease has run out is nobody's upload, even if housekeeping has not come round yet. A resumable upload has a limit of
-- its own (create_resumable_upload_v1): nobody may be sending it at this moment.
declare
    found_uploads integer;
    found_links integer;
begin
    if p_most_uploads is null and p_most_links is null then
        return;
    end if;
    perform from user_storage where user_id = p_user_id for no key update;
    select count(*) filter (where (u.link is null or u.claimed_until > clock_timestamp()) and not u.is_resumable),
           count(*) filter (where u.link is not null)
      into found_uploads, found_links
      from uploads u where u.user_id = p_user_id and u.expires_at > clock_timestamp();
    if found_uploads > p_most_uploads then
        raise exception 'user % has too many uploads under way', p_user_id
            using errcode = 'CF005', detail = p_most_uploads::text, hint = 'Wait until one ends, or raise the limit.';
    end if;
    if found_links > p_most_links then
        raise exception 'user % has too many upload links', p_user_id
            using errcode = 'CF005', detail = p_most_links::text, hint = 'Use or give up one of them, or raise the limit.';
    end if;
end
$$;

CREATE FUNCTION public.name_suffixes_v1(p_name text) RETURNS SETOF text
    LANGUAGE sql IMMUTABLE ROWS 4 PARALLEL SAFE
    AS $$
-- What a name is found by: its lower-cased words from each of the first eight on, joined by spaces, 64 characters at most (which bounds
-- the index row). ASCII punctuation, spaces and the ideographic space separate words; everything else belongs to one, whatever the
-- database's locale says about letters. No search_path of its own, so that PostgreSQL puts the body into the query that calls it.
select distinct left(array_to_string(w.words[i:], ' '), 64)
  from (select array_remove(regexp_split_to_array(lower(p_name), '[\x01-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3000]+'), '')) w (words),
       generate_series(1, least(8, cardinality(w.words))) i
$$;

CREATE FUNCTION public.open_upload_v1(p_id uuid, p_user_id text, p_volume_id uuid, p_reserved_bytes bigint, p_idempotency_key text, p_lease_seconds double precision, p_link jsonb, p_most integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Opens a reservation, and counts it against `p_most` of its sort: uploads, or upload links.
-- A function, because the count must come after the insert's triggers, which lock the user's row, and no part of a statement does.
begin
    insert into uploads (id, user_id, volume_id, reserved_bytes, idempotency_key, expires_at, link)
    values (p_id, p_user_id, p_volume_id, p_reserved_bytes, p_idempotency_key, clock_timestamp() + make_interval(secs => p_lease_seconds), p_link);
    perform limit_uploads_v1(p_user_id, case when p_link is null then p_most end, case when p_link is not null then p_most end);
end
$$;

CREATE FUNCTION public.open_upload_v2(p_id uuid, p_user_id text, p_volume_id uuid, p_reserved_bytes bigint, p_idempotency_key text, p_lease_seconds double precision, p_link jsonb, p_most integer, p_actor jsonb) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Opens a reservation as open_upload_v1 does, and records an upload link.
begin
    perform open_upload_v1(p_id, p_user_id, p_volume_id, p_reserved_bytes, p_idempotency_key, p_lease_seconds, p_link, p_most);
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'upload_link.created', u.user_id, u.id, jsonb_build_object('max_bytes', u.reserved_bytes, 'expires_at', u.expires_at), a.*
      from uploads u, actor_of_v1(p_actor) a where u.id = p_id and u.link is not null;
end
$$;

CREATE FUNCTION public.output_ended_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: an output is settled by the very transaction that ends its reservation: stored if its file is there, failed if not. A stored
--   one is remembered in generated_media, and queued to be marked if it is to be.
-- Fires: after each row of a DELETE from uploads that is a job's; the WHEN clause costs other uploads nothing.
-- Locks: the job's row, after the upload's and before the user's. Whoever changes a job locks in this order.
-- Cost: about 200 microseconds for an output; none for other uploads.
-- Why not Python: links, tus, webhooks, fetches, expiry, cancellation and psql all end reservations.
declare
    has_come constant boolean := exists (select from user_files f where f.id = old.id);
    wanted constant text[] := array(select jsonb_array_elements_text(coalesce(old.link -> 'marks', '[]')));
begin
    perform from generation_jobs where id = old.job_id for no key update;
    update generation_outputs
       set state = case when has_come then 'stored' else 'failed' end,
           reason = case when has_come then null when old.expires_at <= clock_timestamp() then 'expired' else 'closed' end,
           settled_at = clock_timestamp()
     where file_id = old.id and state in ('awaited', 'fetching');
    if found then
        insert into generated_media (id, user_id, file_id, job_id, output_index, entity_type, entity_id, project_id, media_type, source_type,
                                     model_used, prompt_used, generation_params, credits_used, original_url, reference_ids, parent_id, root_id,
                                     wanted_marks, marking)
        select f.id, f.user_id, f.id, j.id, o.output_index, j.entity_type, j.entity_id, j.project_id, f.file_type, 'generated',
               j.model_used, j.prompt_used, j.generation_params, j.credits_used / j.output_count, o.url, j.reference_ids, j.parent_id,
               coalesce((select p.root_id from generated_media p where p.id = j.parent_id), f.id),
               wanted, case when wanted <> '{}' then 'pending' end
          from generation_outputs o join generation_jobs j on j.id = o.job_id join user_files f on f.id = o.file_id
         where o.file_id = old.id and o.state = 'stored';
        insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
        select 0, 'queued', 'generation', convert_to('mark ' || old.id, 'UTF8'), 'mark:' || old.id where has_come and wanted <> '{}'
        on conflict do nothing;
        perform settle_job_v1(old.job_id);
    end if;
    return null;
end
$$;

CREATE FUNCTION public.previews_deleted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant, locks, cost and reason: as charge_previews_v1. Fires: after each DELETE from previews, once per statement.
begin
    perform charge_previews_v1(d.user_id, -d.bytes)
       from (select o.user_id, sum(o.size_bytes)::bigint as bytes from old_rows o group by o.user_id order by o.user_id) d;
    return null;
end
$$;

CREATE FUNCTION public.previews_inserted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant, locks, cost and reason: as charge_previews_v1. Fires: after each INSERT into previews, once per statement.
begin
    perform charge_previews_v1(d.user_id, d.bytes)
       from (select n.user_id, sum(n.size_bytes)::bigint as bytes from new_rows n group by n.user_id order by n.user_id) d;
    return null;
end
$$;

CREATE FUNCTION public.previews_updated_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant, locks, cost and reason: as charge_previews_v1. Fires: after each UPDATE of previews, once per statement.
begin
    perform charge_previews_v1(d.user_id, d.bytes)
       from (select m.user_id, sum(m.bytes)::bigint as bytes
               from (select n.user_id, n.size_bytes as bytes from new_rows n
                     union all
                     select o.user_id, -o.size_bytes from old_rows o) m
              group by m.user_id order by m.user_id) d;
    return null;
end
$$;

CREATE FUNCTION public.raise_event_v1(p_user_id text, p_type text, p_file_id uuid, p_payload jsonb) RETURNS bigint
    LANGUAGE sql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Appends an event where no statement of a file's does: of a job (payload with `job_id`). Returns its id. Call it in the transaction of what
-- happened. Nothing secret may stand in the payload: it leaves the house. Nothing for a user who is gone or going: the lock, which the quota
-- triggers take too, keeps an erasure from beginning before the event is there for it to find.
insert into events (user_id, type, file_id, payload)
select u.user_id, p_type, p_file_id, p_payload from user_storage u where u.user_id = p_user_id and u.erasing_at is null for no key update
returning id;
$$;

CREATE FUNCTION public.raise_job_event_v1(p_job_id uuid) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
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

CREATE FUNCTION public.refuse_beyond_previews_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: where previews count, total_bytes + reserved_bytes grows by no path to more than max_bytes - preview_bytes. Previews
--   themselves are never refused: they may take a user past max_bytes, and then there is no room but that which is held already.
-- Fires: before each change of a row of user_storage that charge_usage_v1 has admitted, and that would not fit with the previews.
-- Locks: the row, which its update has locked: no preview is counted meanwhile. Cost: its WHEN clause, under a microsecond; for a user
--   whose previews would not fit, a look at a table of one row.
-- Why not Python: see charge_usage_v1.
begin
    if not (select r.counts_previews from quota_rules r)
       or (old.credit_xid = pg_current_xact_id() and new.reserved_bytes = old.reserved_bytes
           and new.total_bytes - old.total_bytes <= old.credit_bytes) then
        return new; -- As in charge_usage_v1, an upload publishes the bytes that it held.
    end if;
    raise exception 'quota of user % exceeded', new.user_id
        using errcode = 'CF001',
              detail = json_build_object(
                  'used_bytes', old.total_bytes + old.reserved_bytes + old.preview_bytes,
                  'limit_bytes', old.max_bytes,
                  'needed_bytes', new.total_bytes + new.reserved_bytes - old.total_bytes - old.reserved_bytes
              )::text,
              hint = 'Previews count. Delete files, or raise user_storage.max_bytes (null is unlimited).';
end
$$;

CREATE FUNCTION public.refuse_counter_change_v1() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
-- Invariant: the counters are what the triggers made them.
-- Fires: before each row that a statement outside any trigger would change in user_storage_by_type or in the counters of user_storage.
-- Locks: none. Cost: the WHEN clauses, under a microsecond.
-- Why not Python: only psql writes here.
begin
    raise exception 'counters of % are kept by triggers', tg_table_name
        using errcode = 'CF004', hint = 'Change user_files or uploads instead; max_bytes and tier may be set by hand.';
end
$$;

CREATE FUNCTION public.refuse_held_change_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: while a user is held, their files keep their bytes and their owner, and stay out of the trash.
-- Fires: before each row of an UPDATE of user_files that would change that, by its WHEN clause.
-- Locks: the user's row, FOR KEY SHARE: who sets a hold locks it FOR UPDATE, and waits for us, or we see it. Nobody who counts waits for
--   that lock, nor does it wait for them, so the order of the rows does not matter.
-- Cost: the WHEN clause, under a microsecond; one index probe where it holds.
-- Why not Python: see refuse_held_delete_v1.
declare
    held timestamptz;
begin
    select u.held_at into held from user_storage u where u.user_id = old.user_id for key share;
    if held is not null then
        raise exception 'a legal hold keeps this file'
            using errcode = 'CF010', hint = 'Nothing was changed. `coffer user release` ends the hold.';
    end if;
    return new;
end
$$;

CREATE FUNCTION public.refuse_held_delete_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: while a user is held, no file of theirs goes, by whatever way.
-- Fires: after each DELETE from user_files, once per statement, after the quota trigger (triggers fire by name).
-- Locks: none. The quota trigger holds the users' rows: who sets a hold waits for us, or we see it. A user whose row is being deleted is
--   none any more, and was not held (refuse_held_erasing_v1).
-- Cost: one index probe per user.
-- Why not Python: a sysadmin's DELETE and a forgotten way in do not pass through it.
begin
    if exists (select from user_storage u where u.user_id in (select o.user_id from old_rows o) and u.held_at is not null) then
        raise exception 'a legal hold keeps these files'
            using errcode = 'CF010', hint = 'Nothing was deleted. `coffer user release` ends the hold.';
    end if;
    return null;
end
$$;

CREATE FUNCTION public.refuse_held_erasing_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: no user is held and being erased. What came first stands.
-- Fires: before a user's row goes that is held, and before an UPDATE after which both would be so. Locks: none but the row's own.
-- Cost: the WHEN clauses, under a microsecond. Why not Python: see refuse_held_delete_v1.
begin
    if tg_op = 'UPDATE' and old.held_at is null then
        raise exception 'user % is being erased', old.user_id
            using errcode = 'CF003', hint = 'A hold comes too late: the user''s files are going, or gone.';
    end if;
    raise exception 'a legal hold keeps user %', old.user_id
        using errcode = 'CF010', hint = 'Nothing was erased. `coffer user release` ends the hold.';
end
$$;

CREATE FUNCTION public.refuse_truncate_v1() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
-- Invariant: rows leave only by DELETE, which gives quota back and leaves tombstones.
-- Fires: before TRUNCATE, once per statement. Locks: none beyond TRUNCATE's own. Cost: none.
-- Why not Python: only psql truncates.
begin
    raise exception 'TRUNCATE of % is refused', tg_table_name
        using errcode = 'CF002', hint = 'Use DELETE: it gives quota back and remembers the stored files to remove.';
end
$$;

CREATE FUNCTION public.refuse_while_stopped_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: while there is a row in upload_stops, no upload is opened and no file gets new bytes, by whatever server.
-- Fires: before INSERT into uploads or user_files and before UPDATE OF sha256 of user_files, once per statement.
-- Locks: none. A statement that began before the stop was committed may still pass.
-- Cost: a look at an empty table, about 5 microseconds.
-- Why not Python: a server that was not told would go on storing into what may be given up for another copy.
begin
    if exists (select from upload_stops) then
        raise exception 'this store takes no uploads'
            using errcode = 'CF017', hint = 'It was restored. When it is the one that counts: coffer restore clear';
    end if;
    return null;
end
$$;

CREATE FUNCTION public.remember_asset_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: the memory of making says of linked media what is known of the asset with its id: where it lives, whether it can be reached,
--   and which file it was imported as. With that file it is forgotten, and with the asset where it never became a file.
-- Fires: after each row of an INSERT or a DELETE, and of an UPDATE that changes one of these. Locks: the media's row, after the asset's.
-- Cost: about 100 microseconds; none where a worker only takes an asset in hand.
-- Why not Python: a look, an import, a replacement and a deletion come from several processes.
begin
    if tg_op = 'DELETE' then
        delete from generated_media where id = old.id and file_id is null;
        return null;
    end if;
    insert into generated_media as m (id, user_id, file_id, entity_type, entity_id, project_id, media_type, source_type, original_url,
                                      is_accessible, last_checked_at, root_id, created_at)
    values (new.id, new.user_id, new.file_id, new.entity_type, new.entity_id, new.project_id, new.media_type,
            case when new.version > 1 then 'replaced' else 'linked' end, new.url, new.state <> 'unreachable', new.last_checked_at, new.id,
            new.created_at)
    on conflict (id) do update
       set file_id = excluded.file_id, source_type = excluded.source_type, original_url = excluded.original_url,
           is_accessible = excluded.is_accessible, last_checked_at = excluded.last_checked_at;
    return null;
end
$$;

CREATE FUNCTION public.remove_previews_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a deleted file leaves no preview, neither row nor job nor bytes: a tombstone names the directory that they lie in, as soon
--   as making them has begun, for a worker may have died between the bytes and the rows; and replacing a file clears only the rows and tries.
-- Fires: after each DELETE from user_files, once per statement, after the quota trigger (triggers fire by name).
-- Locks: the users' rows, which the quota trigger has locked already. Cost: three index probes per file.
-- Why not Python: see user_files_deleted_v1.
begin
    delete from pgqueuer q using old_rows o
     where q.dedupe_key = 'preview:' || o.id and q.status = 'queued' and o.preview_state = 'pending';
    -- With the generation of the file itself: whoever deletes it buries both together.
    with gone as (
        delete from previews p using old_rows o where p.file_id = o.id returning p.file_id
    )
    insert into tombstones (volume_id, file_path, file_id, generation)
    select o.volume_id, substring(o.file_path from '^users/[^/]+') || '/previews/' || o.id, o.id, o.generation
      from old_rows o where o.preview_tries > 0 or o.generation > 1 or o.id in (select g.file_id from gone g);
    return null;
end
$$;

CREATE FUNCTION public.report_job_v1(p_job_id uuid, p_sender text, p_message_id text, p_outcome text, p_progress_percent integer, p_credits_used numeric, p_error text) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
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

CREATE FUNCTION public.search_key_v1(p_search text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
-- What the suffixes of matching names begin with.
select left(array_to_string(array_remove(
    regexp_split_to_array(lower(p_search), '[\x01-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3000]+'), ''), ' '), 64)
$$;

CREATE FUNCTION public.settle_job_v1(p_job_id uuid) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Ends a job none of whose outputs is open any more, and counts its progress. One that is stored and waits to be marked is open.
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
    select count(*) filter (where o.state in ('awaited', 'fetching')
                               or exists (select from generated_media m where m.file_id = o.file_id and m.marking = 'pending')),
           count(*) filter (where o.state = 'stored'),
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

CREATE FUNCTION public.settle_marking_v1(p_file_id uuid, p_reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Ends the job of an output that waited to be marked, if it was the last one open. With a reason it is given up first: the bytes stay as they
-- came.
-- Locks: the job's row first, as all do.
declare
    job constant uuid := (select job_id from generation_outputs where file_id = p_file_id);
begin
    perform from generation_jobs where id = job for no key update;
    update generated_media set marking = 'unmarked', marking_reason = p_reason
     where file_id = p_file_id and marking = 'pending' and p_reason is not null;
    perform settle_job_v1(job);
    perform pg_notify('coffer_notice', 'job/' || job);
end
$$;

CREATE FUNCTION public.trash_files_v1(p_user_id text, p_volume_id uuid, p_ids uuid[], p_generations integer[], p_new_generations integer[], p_new_paths text[], p_rule bigint, p_actor jsonb) RETURNS TABLE(file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Moves those of the user's files on a volume to the trash that still have the generation in the same place, to the names in the same place,
-- under which their bytes lie there already; with `p_rule`, those that this rule is about. Appends an event and a record for each. Returns each with
-- the tombstone of its old name, which is null where the name stayed, because there were no bytes to be named.
-- A function, because the rows that a trigger inserts are invisible to the statement that fired it. Locks: as delete_files_v3.
-- Links end with the name, the public URL and the idempotency key here: none of them comes back when the file does.
#variable_conflict use_column
declare
    moved_ids uuid[];
    moved_generations integer[];
begin
    with wanted as materialized (
        select w.* from unnest(p_ids, p_generations, p_new_generations, p_new_paths) w (id, generation, new_generation, new_path)
    ), locked as materialized (
        -- Not a join with what is wanted: it would read all files in the order of their ids rather than sort some.
        select f.id from user_files f
         where f.id = any (p_ids) and f.generation = p_generations[array_position(p_ids, f.id)]
           and f.user_id = p_user_id and f.volume_id = p_volume_id and f.deleted_at is null
           and (p_rule is null or exists (select from lifecycle_rules r where r.id = p_rule and lifecycle_applies_v1(r, f)))
         order by f.id for update of f
    ), moved as (
        update user_files f
           set deleted_at = now(), generation = w.new_generation, file_path = w.new_path, public_id = null, idempotency_key = null,
               updated_at = clock_timestamp()
          from locked l join wanted w on w.id = l.id
         where f.id = l.id
        returning f.id, w.generation, f.file_type, f.file_size
    ), noted as (
        insert into events (user_id, type, file_id, payload)
        select p_user_id, 'file.trashed', m.id, jsonb_build_object('file_type', m.file_type, 'file_size', m.file_size) from moved m
    ), recorded as (
        insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
        select 'file.trashed', p_user_id, m.id,
               jsonb_build_object('file_type', m.file_type, 'file_size', m.file_size)
               || case when p_rule is null then '{}'::jsonb else jsonb_build_object('rule', p_rule) end, a.*
          from moved m, actor_of_v1(p_actor) a
    )
    select array_agg(m.id), array_agg(m.generation) into moved_ids, moved_generations from moved m;
    return query
        select g.id, t.id, t.volume_id, t.file_path
          from unnest(moved_ids, moved_generations) g (id, generation)
          left join tombstones t on t.file_id = g.id and t.generation = g.generation;
end
$$;

CREATE FUNCTION public.uploads_deleted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a reservation gives back exactly what it holds, exactly once.
-- Fires: after each DELETE from uploads, once per statement.
-- Locks: the users' rows, in the order of user_id.
-- Cost: charge_usage_v1 per user.
-- Why not Python: expiry, publishing, cascades and psql all end reservations, at the same moment.
declare
    each record;
begin
    for each in
        select o.user_id, sum(o.reserved_bytes)::bigint as bytes from old_rows o group by o.user_id order by o.user_id
    loop
        perform charge_usage_v1(each.user_id, 0, -each.bytes, 0, false);
    end loop;
    return null;
end
$$;

CREATE FUNCTION public.uploads_inserted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a reservation is admitted only where total_bytes + reserved_bytes leaves room for it.
-- Fires: after each INSERT into uploads, once per statement.
-- Locks: the users' rows, in the order of user_id.
-- Cost: charge_usage_v1 per user.
-- Why not Python: see charge_usage_v1.
declare
    each record;
begin
    for each in
        select n.user_id, sum(n.reserved_bytes)::bigint as bytes from new_rows n group by n.user_id order by n.user_id
    loop
        perform charge_usage_v1(each.user_id, 0, each.bytes, 0, true);
    end loop;
    return null;
end
$$;

CREATE FUNCTION public.uploads_updated_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a reservation that grows is admitted like a new one; one that shrinks or moves to another user takes its bytes along.
-- Fires: after each UPDATE of uploads, once per statement; the renewal of a lease changes nothing counted.
-- Locks: the users' rows, in the order of user_id; none for a renewal.
-- Cost: charge_usage_v1 per user.
-- Why not Python: see charge_usage_v1.
declare
    each record;
begin
    for each in
        select d.user_id, sum(d.bytes)::bigint as bytes
          from (select n.user_id, n.reserved_bytes as bytes from new_rows n
                union all
                select o.user_id, -o.reserved_bytes from old_rows o) d
         group by d.user_id having sum(d.bytes) <> 0
         order by d.user_id
    loop
        perform charge_usage_v1(each.user_id, 0, each.bytes, 0, each.bytes > 0);
    end loop;
    return null;
end
$$;

CREATE FUNCTION public.user_files_deleted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a deleted row gives its quota back exactly once and leaves a tombstone, so that its bytes are removed even if
--   the process dies now, and even if the row went by psql or by a cascade.
-- Fires: after each DELETE from user_files, once per statement.
-- Locks: as user_files_inserted_v1.
-- Cost: charge_usage_v1 per user, one update per type, one insert per file.
-- Why not Python: a sysadmin's DELETE and a cascade do not pass through it.
declare
    each record;
begin
    for each in
        select o.user_id, sum(o.file_size)::bigint as bytes, count(*) as files from old_rows o group by o.user_id order by o.user_id
    loop
        perform charge_usage_v1(each.user_id, -each.bytes, 0, -each.files, false);
    end loop;
    update user_storage_by_type t
       set file_count = t.file_count - gone.files, total_bytes = t.total_bytes - gone.bytes
      from (select o.user_id, o.file_type, o.mime_type, count(*) as files, sum(o.file_size) as bytes
              from old_rows o group by o.user_id, o.file_type, o.mime_type) gone
     where t.user_id = gone.user_id and t.file_type = gone.file_type and t.mime_type = gone.mime_type;
    insert into tombstones (volume_id, file_path, file_id, generation)
    select o.volume_id, o.file_path, o.id, o.generation from old_rows o;
    return null;
end
$$;

CREATE FUNCTION public.user_files_index_deleted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant, locks and reason: as user_files_index_inserted_v1.
-- Fires: after each DELETE from user_files, once per statement. Cost: one index probe per tag and per word.
begin
    delete from user_file_tags d
     using (select distinct o.user_id, t.tag, o.upload_date, o.id from old_rows o, unnest(o.tags) t (tag)) gone
     where d.user_id = gone.user_id and d.tag = gone.tag and d.upload_date = gone.upload_date and d.file_id = gone.id;
    delete from user_file_words d
     using (select o.user_id, w.suffix, o.id from old_rows o, name_suffixes_v1(o.file_name) w (suffix)) gone
     where d.user_id = gone.user_id and d.suffix_key = gone.suffix and d.file_id = gone.id;
    return null;
end
$$;

CREATE FUNCTION public.user_files_index_inserted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: user_file_tags and user_file_words hold exactly what the rows of user_files say.
-- Fires: after each INSERT or COPY into user_files, once per statement, after the quota trigger (triggers fire by name).
-- Locks: the new rows only. Cost: per tag four index entries, per word two writes; about 65 microseconds for a name of four words.
-- Why not Python: lists must stay true after direct SQL.
begin
    insert into user_file_tags (user_id, tag, upload_date, name_key, file_size, file_id)
    select distinct n.user_id, t.tag, n.upload_date, n.name_key, n.file_size, n.id from new_rows n, unnest(n.tags) t (tag);
    insert into user_file_words (user_id, suffix_key, file_id)
    select n.user_id, w.suffix, n.id from new_rows n, name_suffixes_v1(n.file_name) w (suffix);
    return null;
end
$$;

CREATE FUNCTION public.user_files_index_updated_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant, locks and reason: as user_files_index_inserted_v1.
-- Fires: after each UPDATE of user_files, once per statement. Cost: about 20 microseconds when nothing indexed changes.
begin
    if exists (
        select from old_rows o full join new_rows n using (id)
         where (o.user_id, o.tags, o.upload_date, o.name_key, o.file_size)
               is distinct from (n.user_id, n.tags, n.upload_date, n.name_key, n.file_size)
    ) then
        delete from user_file_tags d
         using (select o.user_id, t.tag, o.upload_date, o.name_key, o.file_size, o.id from old_rows o, unnest(o.tags) t (tag)
                except
                select n.user_id, t.tag, n.upload_date, n.name_key, n.file_size, n.id from new_rows n, unnest(n.tags) t (tag)) gone
         where d.user_id = gone.user_id and d.tag = gone.tag and d.upload_date = gone.upload_date and d.file_id = gone.id;
        insert into user_file_tags (user_id, tag, upload_date, name_key, file_size, file_id)
        select n.user_id, t.tag, n.upload_date, n.name_key, n.file_size, n.id from new_rows n, unnest(n.tags) t (tag)
        except
        select o.user_id, t.tag, o.upload_date, o.name_key, o.file_size, o.id from old_rows o, unnest(o.tags) t (tag);
    end if;
    if exists (
        select from old_rows o full join new_rows n using (id) where (o.user_id, o.file_name) is distinct from (n.user_id, n.file_name)
    ) then
        delete from user_file_words d
         using (select o.user_id, w.suffix, o.id from old_rows o, name_suffixes_v1(o.file_name) w (suffix)
                except
                select n.user_id, w.suffix, n.id from new_rows n, name_suffixes_v1(n.file_name) w (suffix)) gone
         where d.user_id = gone.user_id and d.suffix_key = gone.suffix and d.file_id = gone.id;
        insert into user_file_words (user_id, suffix_key, file_id)
        select n.user_id, w.suffix, n.id from new_rows n, name_suffixes_v1(n.file_name) w (suffix)
        except
        select o.user_id, w.suffix, o.id from old_rows o, name_suffixes_v1(o.file_name) w (suffix);
    end if;
    return null;
end
$$;

CREATE FUNCTION public.user_files_inserted_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a file is admitted within quota, and counted once: in user_storage, in user_storage_by_type, in usage_ledger.
-- Fires: after each INSERT or COPY into user_files, once per statement.
-- Locks: the users' rows, in the order of user_id; then their rows of user_storage_by_type, which nobody else locks first.
-- Cost: charge_usage_v1 per user and one upsert per type; about 110 microseconds for one file.
-- Why not Python: see charge_usage_v1.
declare
    each record;
begin
    for each in
        select n.user_id, sum(n.file_size)::bigint as bytes, count(*) as files from new_rows n group by n.user_id order by n.user_id
    loop
        perform charge_usage_v1(each.user_id, each.bytes, 0, each.files, true);
    end loop;
    insert into user_storage_by_type as t (user_id, file_type, mime_type, file_count, total_bytes)
    select n.user_id, n.file_type, n.mime_type, count(*), sum(n.file_size) from new_rows n group by n.user_id, n.file_type, n.mime_type
    on conflict (user_id, file_type, mime_type)
    do update set file_count = t.file_count + excluded.file_count, total_bytes = t.total_bytes + excluded.total_bytes;
    return null;
end
$$;

CREATE FUNCTION public.user_files_updated_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: a change of size, owner or type moves exactly that difference; a path that no row names any more gets a tombstone.
-- Fires: after each UPDATE of user_files, once per statement. (PostgreSQL allows no column list beside transition tables.)
-- Locks: as user_files_inserted_v1; none when no size, owner, type or path changes.
-- Cost: about 40 microseconds when nothing counted changes; else as an insert and a delete.
-- Why not Python: see charge_usage_v1.
declare
    each record;
begin
    if not exists (
        select from old_rows o full join new_rows n using (id)
         where (o.user_id, o.file_size, o.file_type, o.mime_type, o.volume_id, o.file_path)
               is distinct from (n.user_id, n.file_size, n.file_type, n.mime_type, n.volume_id, n.file_path)
    ) then
        return null;
    end if;
    for each in
        select d.user_id, sum(d.bytes)::bigint as bytes, sum(d.files)::bigint as files
          from (select n.user_id, n.file_size as bytes, 1 as files from new_rows n
                union all
                select o.user_id, -o.file_size, -1 from old_rows o) d
         group by d.user_id having sum(d.bytes) <> 0 or sum(d.files) <> 0
         order by d.user_id
    loop
        perform charge_usage_v1(each.user_id, each.bytes, 0, each.files, each.bytes > 0 or each.files > 0);
    end loop;
    insert into user_storage_by_type (user_id, file_type, mime_type, file_count, total_bytes)
    select distinct n.user_id, n.file_type, n.mime_type, 0, 0 from new_rows n
    on conflict (user_id, file_type, mime_type) do nothing;
    update user_storage_by_type t
       set file_count = t.file_count + d.files, total_bytes = t.total_bytes + d.bytes
      from (select m.user_id, m.file_type, m.mime_type, sum(m.bytes) as bytes, sum(m.files) as files
              from (select n.user_id, n.file_type, n.mime_type, n.file_size as bytes, 1 as files from new_rows n
                    union all
                    select o.user_id, o.file_type, o.mime_type, -o.file_size, -1 from old_rows o) m
             group by m.user_id, m.file_type, m.mime_type having sum(m.bytes) <> 0 or sum(m.files) <> 0) d
     where t.user_id = d.user_id and t.file_type = d.file_type and t.mime_type = d.mime_type;
    insert into tombstones (volume_id, file_path, file_id, generation)
    select o.volume_id, o.file_path, o.id, o.generation from old_rows o
     where not exists (select from new_rows n where n.volume_id = o.volume_id and n.file_path = o.file_path);
    return null;
end
$$;

CREATE FUNCTION public.warn_of_quota_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    AS $$
-- Invariant: warned_percent is the highest of 80, 90 and 100 that the user's use has reached, or had reached and is less than ten
--   percentage points below now. So a user who deletes and uploads around a mark is warned once.
-- Fires: before each UPDATE of a user's row in which that may change; all others pay for the comparison in the trigger's WHEN alone,
--   less than a microsecond. Users' rows change with every file, quota and preview, whoever changes them.
-- Locks: none beyond the row that is being updated. Cost: 30 microseconds, at a crossing; the event is undone with what caused it.
-- Why not Python: files come and go by many doors, processes and psql; only here none is missed, and none is told of that was undone.
declare
    used bigint := new.total_bytes;
    level smallint := 0;
begin
    if new.preview_bytes > 0 and coalesce((select r.counts_previews from quota_rules r), true) then
        used := used + new.preview_bytes;
    end if;
    if new.max_bytes is not null and used > 0 then
        level := case
            when used >= new.max_bytes or (new.warned_percent >= 100 and used >= new.max_bytes * 0.90::float8) then 100
            when used >= new.max_bytes * 0.90::float8 or (new.warned_percent >= 90 and used >= new.max_bytes * 0.80::float8) then 90
            when used >= new.max_bytes * 0.80::float8 or (new.warned_percent >= 80 and used >= new.max_bytes * 0.70::float8) then 80
            else 0
        end;
    end if;
    if level > new.warned_percent and new.erasing_at is null then
        insert into events (user_id, type, payload)
        values (new.user_id, 'quota.warning', jsonb_build_object('percent', level, 'used_bytes', used, 'limit_bytes', new.max_bytes));
    end if;
    new.warned_percent := level;
    return new;
end
$$;

CREATE TABLE public.api_keys (
    key_id text NOT NULL,
    name text NOT NULL,
    secret_sha256 bytea NOT NULL,
    scopes text[] NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    last_used_at timestamp with time zone,
    user_ids text[],
    kinds text[],
    networks cidr[],
    CONSTRAINT api_keys_admins_see_all CHECK (((NOT ('admin'::text = ANY (scopes))) OR ((user_ids IS NULL) AND (kinds IS NULL)))),
    CONSTRAINT api_keys_kinds_known CHECK (((kinds <@ ARRAY['video'::text, 'image'::text, 'scene'::text, 'project'::text, 'audio'::text]) AND (cardinality(kinds) > 0))),
    CONSTRAINT api_keys_networks_not_empty CHECK ((cardinality(networks) > 0)),
    CONSTRAINT api_keys_secret_sha256_is_32_bytes CHECK ((octet_length(secret_sha256) = 32)),
    CONSTRAINT api_keys_user_ids_not_empty CHECK ((cardinality(user_ids) > 0))
);

CREATE TABLE public.audit_log (
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    id bigint NOT NULL,
    action text NOT NULL,
    actor_kind text NOT NULL,
    actor_id text,
    acting_user_id character varying(255),
    user_id character varying(255),
    file_id uuid,
    address inet,
    request_id text,
    detail jsonb DEFAULT '{}'::jsonb NOT NULL,
    CONSTRAINT audit_log_action_plain CHECK ((action ~ '^[a-z_]{1,32}\.[a-z_]{1,32}$'::text)),
    CONSTRAINT audit_log_detail_small CHECK ((octet_length((detail)::text) <= 8192))
);

ALTER TABLE public.audit_log ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.audit_log_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.audit_suspects (
    volume_id uuid NOT NULL,
    file_path text NOT NULL,
    size_bytes bigint NOT NULL,
    first_seen_at timestamp with time zone NOT NULL,
    last_seen_at timestamp with time zone NOT NULL
);

CREATE TABLE public.backups (
    id uuid NOT NULL,
    way text NOT NULL,
    state text NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    ended_at timestamp with time zone,
    holds_until timestamp with time zone,
    snapshot_at timestamp with time zone,
    file_count bigint,
    total_bytes bigint,
    error text,
    CONSTRAINT backups_state_known CHECK ((state = ANY (ARRAY['running'::text, 'done'::text, 'failed'::text]))),
    CONSTRAINT backups_way_known CHECK ((way = ANY (ARRAY['restic'::text, 'tar'::text])))
);

CREATE TABLE public.counter_corrections (
    id bigint NOT NULL,
    user_id character varying(255) NOT NULL,
    corrected_at timestamp with time zone DEFAULT now() NOT NULL,
    was jsonb,
    became jsonb
);

ALTER TABLE public.counter_corrections ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.counter_corrections_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.drills (
    id bigint NOT NULL,
    backup_id uuid NOT NULL,
    snapshot_at timestamp with time zone NOT NULL,
    passed boolean NOT NULL,
    is_full boolean NOT NULL,
    files_checked bigint NOT NULL,
    bytes_checked bigint NOT NULL,
    duration_seconds double precision NOT NULL,
    error text,
    ended_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

ALTER TABLE public.drills ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.drills_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.events (
    id bigint NOT NULL,
    user_id character varying(255) NOT NULL,
    type text NOT NULL,
    file_id uuid,
    payload jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE public.events ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.events_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.generated_media (
    id uuid NOT NULL,
    user_id character varying(255) NOT NULL,
    file_id uuid,
    job_id uuid,
    output_index integer,
    entity_type character varying(64),
    entity_id character varying(255),
    project_id character varying(255),
    media_type text NOT NULL,
    source_type text NOT NULL,
    model_used character varying(255),
    prompt_used text,
    generation_params jsonb DEFAULT '{}'::jsonb NOT NULL,
    credits_used numeric,
    original_url text,
    is_accessible boolean DEFAULT true NOT NULL,
    last_checked_at timestamp with time zone,
    reference_ids uuid[] DEFAULT '{}'::uuid[] NOT NULL,
    parent_id uuid,
    root_id uuid NOT NULL,
    is_primary boolean DEFAULT false NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    prompt_words tsvector GENERATED ALWAYS AS (to_tsvector('simple'::regconfig, COALESCE(prompt_used, ''::text))) STORED NOT NULL,
    wanted_marks text[] DEFAULT '{}'::text[] NOT NULL,
    marks text[] DEFAULT '{}'::text[] NOT NULL,
    marking text,
    marking_reason character varying(64),
    CONSTRAINT generated_media_entity_is_whole CHECK (((entity_type IS NULL) = (entity_id IS NULL))),
    CONSTRAINT generated_media_marking_known CHECK ((marking = ANY (ARRAY['pending'::text, 'marked'::text, 'unmarked'::text]))),
    CONSTRAINT generated_media_primary_has_entity CHECK (((NOT is_primary) OR (entity_id IS NOT NULL))),
    CONSTRAINT generated_media_source_type_known CHECK ((source_type = ANY (ARRAY['generated'::text, 'linked'::text, 'replaced'::text, 'uploaded'::text])))
);

CREATE TABLE public.generation_jobs (
    id uuid NOT NULL,
    user_id character varying(255) NOT NULL,
    pipeline character varying(64),
    entity_type character varying(64),
    entity_id character varying(255),
    project_id character varying(255),
    media_types text[] NOT NULL,
    model_used character varying(255),
    prompt_used text,
    generation_params jsonb DEFAULT '{}'::jsonb NOT NULL,
    reference_ids uuid[] DEFAULT '{}'::uuid[] NOT NULL,
    parent_id uuid,
    output_count integer NOT NULL,
    state text DEFAULT 'queued'::text NOT NULL,
    progress_percent integer DEFAULT 0 NOT NULL,
    credits_used numeric,
    error text,
    remote_id character varying(512),
    callback_url text,
    callback_secret text,
    callback_state text,
    idempotency_key character varying(255),
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    expires_at timestamp with time zone NOT NULL,
    CONSTRAINT generation_jobs_callback_is_whole CHECK (((callback_url IS NULL) = (callback_state IS NULL))),
    CONSTRAINT generation_jobs_callback_state_known CHECK ((callback_state = ANY (ARRAY['waiting'::text, 'due'::text, 'told'::text, 'failed'::text]))),
    CONSTRAINT generation_jobs_callback_url_bounded CHECK ((char_length(callback_url) <= 4096)),
    CONSTRAINT generation_jobs_credits_not_negative CHECK ((credits_used >= (0)::numeric)),
    CONSTRAINT generation_jobs_ended_have_an_end CHECK (((finished_at IS NULL) = (state = ANY (ARRAY['queued'::text, 'running'::text])))),
    CONSTRAINT generation_jobs_entity_is_whole CHECK (((entity_type IS NULL) = (entity_id IS NULL))),
    CONSTRAINT generation_jobs_error_bounded CHECK ((char_length(error) <= 2000)),
    CONSTRAINT generation_jobs_output_count_bounded CHECK (((output_count >= 1) AND (output_count <= 100))),
    CONSTRAINT generation_jobs_params_are_object CHECK ((jsonb_typeof(generation_params) = 'object'::text)),
    CONSTRAINT generation_jobs_pipeline_plain CHECK (((pipeline)::text ~ '^[a-z0-9][a-z0-9_-]*$'::text)),
    CONSTRAINT generation_jobs_progress_is_percent CHECK (((progress_percent >= 0) AND (progress_percent <= 100))),
    CONSTRAINT generation_jobs_prompt_used_bounded CHECK ((char_length(prompt_used) <= 20000)),
    CONSTRAINT generation_jobs_state_known CHECK ((state = ANY (ARRAY['queued'::text, 'running'::text, 'completed'::text, 'partly_completed'::text, 'failed'::text, 'cancelled'::text, 'expired'::text])))
);

CREATE TABLE public.generation_messages (
    sender text NOT NULL,
    message_id text NOT NULL,
    received_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT generation_messages_id_bounded CHECK ((char_length(message_id) <= 255))
);

CREATE TABLE public.generation_outputs (
    job_id uuid NOT NULL,
    output_index integer NOT NULL,
    file_id uuid NOT NULL,
    media_type text NOT NULL,
    max_bytes bigint NOT NULL,
    state text DEFAULT 'awaited'::text NOT NULL,
    reason character varying(64),
    url text,
    settled_at timestamp with time zone,
    CONSTRAINT generation_outputs_fetching_has_url CHECK (((state <> 'fetching'::text) OR (url IS NOT NULL))),
    CONSTRAINT generation_outputs_index_not_negative CHECK ((output_index >= 0)),
    CONSTRAINT generation_outputs_max_bytes_positive CHECK ((max_bytes > 0)),
    CONSTRAINT generation_outputs_state_known CHECK ((state = ANY (ARRAY['awaited'::text, 'fetching'::text, 'stored'::text, 'failed'::text]))),
    CONSTRAINT generation_outputs_url_bounded CHECK ((char_length(url) <= 4096))
);

ALTER TABLE public.lifecycle_rules ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.lifecycle_rules_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.linked_assets (
    id uuid NOT NULL,
    user_id character varying(255) NOT NULL,
    url text NOT NULL,
    fetch_url text NOT NULL,
    version integer DEFAULT 1 NOT NULL,
    details jsonb NOT NULL,
    media_type text,
    entity_type character varying(64),
    entity_id character varying(255),
    project_id character varying(255),
    state text DEFAULT 'unchecked'::text NOT NULL,
    reason text,
    mime_type text,
    size_bytes bigint,
    failures integer DEFAULT 0 NOT NULL,
    last_checked_at timestamp with time zone,
    last_reachable_at timestamp with time zone,
    check_at timestamp with time zone DEFAULT clock_timestamp(),
    import_state text,
    import_reason text,
    import_actor jsonb,
    import_kinds text[],
    import_at timestamp with time zone,
    file_id uuid,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    updated_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT linked_assets_entity_has_media_type CHECK (((entity_id IS NULL) OR (media_type IS NOT NULL))),
    CONSTRAINT linked_assets_entity_is_whole CHECK (((entity_type IS NULL) = (entity_id IS NULL))),
    CONSTRAINT linked_assets_import_state_known CHECK ((import_state = ANY (ARRAY['pending'::text, 'done'::text, 'failed'::text]))),
    CONSTRAINT linked_assets_state_known CHECK ((state = ANY (ARRAY['unchecked'::text, 'reachable'::text, 'unreachable'::text])))
);

CREATE TABLE public.pgqueuer (
    id bigint NOT NULL,
    priority integer NOT NULL,
    queue_manager_id uuid,
    created timestamp with time zone DEFAULT now() NOT NULL,
    updated timestamp with time zone DEFAULT now() NOT NULL,
    heartbeat timestamp with time zone DEFAULT now() NOT NULL,
    execute_after timestamp with time zone DEFAULT now() NOT NULL,
    status public.pgqueuer_status NOT NULL,
    entrypoint text NOT NULL,
    dedupe_key text,
    payload bytea,
    headers jsonb,
    attempts integer DEFAULT 0 NOT NULL,
    slot bigint
);

CREATE SEQUENCE public.pgqueuer_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

ALTER SEQUENCE public.pgqueuer_id_seq OWNED BY public.pgqueuer.id;

CREATE TABLE public.pgqueuer_log (
    id bigint NOT NULL,
    created timestamp with time zone DEFAULT now() NOT NULL,
    job_id bigint NOT NULL,
    status public.pgqueuer_status NOT NULL,
    priority integer NOT NULL,
    entrypoint text NOT NULL,
    traceback jsonb,
    aggregated boolean DEFAULT false
);

ALTER TABLE public.pgqueuer_log ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME public.pgqueuer_log_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.pgqueuer_schedules (
    id bigint NOT NULL,
    expression text NOT NULL,
    entrypoint text NOT NULL,
    heartbeat timestamp with time zone DEFAULT now() NOT NULL,
    created timestamp with time zone DEFAULT now() NOT NULL,
    updated timestamp with time zone DEFAULT now() NOT NULL,
    next_run timestamp with time zone DEFAULT now() NOT NULL,
    last_run timestamp with time zone,
    status public.pgqueuer_status DEFAULT 'queued'::public.pgqueuer_status
);

CREATE SEQUENCE public.pgqueuer_schedules_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

ALTER SEQUENCE public.pgqueuer_schedules_id_seq OWNED BY public.pgqueuer_schedules.id;

CREATE TABLE public.pgqueuer_statistics (
    id bigint NOT NULL,
    created timestamp with time zone DEFAULT date_trunc('sec'::text, now()) NOT NULL,
    count bigint NOT NULL,
    priority integer NOT NULL,
    status public.pgqueuer_status NOT NULL,
    entrypoint text NOT NULL
);

CREATE SEQUENCE public.pgqueuer_statistics_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

ALTER SEQUENCE public.pgqueuer_statistics_id_seq OWNED BY public.pgqueuer_statistics.id;

CREATE TABLE public.preview_figures (
    file_type text NOT NULL,
    state text NOT NULL,
    upto_seconds double precision NOT NULL,
    files bigint NOT NULL,
    seconds double precision NOT NULL
);

CREATE TABLE public.previews (
    file_id uuid NOT NULL,
    variant text NOT NULL,
    user_id character varying(255) NOT NULL,
    file_name text NOT NULL,
    mime_type character varying(127) NOT NULL,
    width integer,
    height integer,
    size_bytes bigint NOT NULL,
    on_demand boolean DEFAULT false NOT NULL,
    last_used_at timestamp with time zone DEFAULT now() NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT previews_height_positive CHECK ((height > 0)),
    CONSTRAINT previews_size_bytes_not_negative CHECK ((size_bytes >= 0)),
    CONSTRAINT previews_variant_plain CHECK ((variant ~ '^[a-z0-9][a-z0-9._-]{0,31}$'::text)),
    CONSTRAINT previews_width_positive CHECK ((width > 0))
);

CREATE TABLE public.quota_rules (
    counts_previews boolean NOT NULL,
    is_only_row boolean DEFAULT true NOT NULL,
    CONSTRAINT quota_rules_is_only_row_check CHECK (is_only_row)
);

CREATE TABLE public.resumable_uploads (
    id uuid NOT NULL,
    user_id character varying(255) NOT NULL,
    volume_id uuid NOT NULL,
    incoming_name uuid NOT NULL,
    length_bytes bigint,
    offset_bytes bigint DEFAULT 0 NOT NULL,
    upload_metadata text NOT NULL,
    details jsonb NOT NULL,
    kinds text[],
    is_partial boolean DEFAULT false NOT NULL,
    parts uuid[],
    joined_as uuid,
    link jsonb,
    held_by uuid,
    held_until timestamp with time zone,
    fence bigint DEFAULT 0 NOT NULL,
    boot_id text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    CONSTRAINT resumable_uploads_length_bytes_not_negative CHECK ((length_bytes >= 0)),
    CONSTRAINT resumable_uploads_offset_bytes_within CHECK (((offset_bytes >= 0) AND (offset_bytes <= length_bytes)))
);

CREATE TABLE public.sheets (
    id uuid NOT NULL,
    user_id character varying(255) NOT NULL,
    digest bytea NOT NULL,
    pictures uuid[] NOT NULL,
    sheet jsonb NOT NULL,
    details jsonb NOT NULL,
    actor jsonb,
    problem jsonb,
    requested_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT sheets_digest_sha256 CHECK ((octet_length(digest) = 32))
);

CREATE TABLE public.tombstones (
    id bigint NOT NULL,
    volume_id uuid NOT NULL,
    file_path text NOT NULL,
    file_id uuid NOT NULL,
    generation integer NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    is_withheld boolean DEFAULT false NOT NULL
);

ALTER TABLE public.tombstones ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.tombstones_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.upload_stops (
    id bigint NOT NULL,
    reason text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE public.upload_stops ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.upload_stops_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.uploads (
    id uuid NOT NULL,
    user_id character varying(255) NOT NULL,
    volume_id uuid NOT NULL,
    reserved_bytes bigint NOT NULL,
    idempotency_key character varying(255),
    expires_at timestamp with time zone NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    link jsonb,
    claimed_until timestamp with time zone,
    is_resumable boolean DEFAULT false NOT NULL,
    job_id uuid,
    CONSTRAINT uploads_reserved_bytes_not_negative CHECK ((reserved_bytes >= 0))
);

CREATE TABLE public.usage_days (
    user_id character varying(255) NOT NULL,
    day date NOT NULL,
    byte_seconds numeric NOT NULL,
    most_bytes bigint NOT NULL,
    added_bytes bigint NOT NULL,
    removed_bytes bigint NOT NULL,
    CONSTRAINT usage_days_added_bytes_not_negative CHECK ((added_bytes >= 0)),
    CONSTRAINT usage_days_byte_seconds_not_negative CHECK ((byte_seconds >= (0)::numeric)),
    CONSTRAINT usage_days_most_bytes_not_negative CHECK ((most_bytes >= 0)),
    CONSTRAINT usage_days_removed_bytes_not_negative CHECK ((removed_bytes >= 0)),
    CONSTRAINT usage_days_within_most CHECK ((byte_seconds <= ((most_bytes)::numeric * (86400)::numeric)))
);

CREATE TABLE public.usage_ledger (
    id bigint NOT NULL,
    user_id character varying(255) NOT NULL,
    changed_at timestamp with time zone NOT NULL,
    delta_bytes bigint NOT NULL,
    total_bytes bigint NOT NULL
);

ALTER TABLE public.usage_ledger ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.usage_ledger_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.usage_summed (
    day date NOT NULL,
    first_id bigint NOT NULL,
    summed_at timestamp with time zone NOT NULL
);

CREATE TABLE public.user_file_tags (
    user_id character varying(255) NOT NULL,
    tag character varying(255) NOT NULL,
    upload_date timestamp with time zone NOT NULL,
    name_key text NOT NULL COLLATE pg_catalog."C",
    file_size bigint NOT NULL,
    file_id uuid NOT NULL
);

CREATE TABLE public.user_file_words (
    user_id character varying(255) NOT NULL,
    suffix_key text NOT NULL COLLATE pg_catalog."C",
    file_id uuid NOT NULL
);

CREATE TABLE public.user_storage_by_type (
    user_id character varying(255) NOT NULL,
    file_type text NOT NULL,
    mime_type text NOT NULL,
    file_count bigint NOT NULL,
    total_bytes bigint NOT NULL,
    CONSTRAINT user_storage_by_type_file_count_not_negative CHECK ((file_count >= 0)),
    CONSTRAINT user_storage_by_type_total_bytes_not_negative CHECK ((total_bytes >= 0))
)
WITH (fillfactor='70');

CREATE TABLE public.volume_scrubs (
    volume_id uuid NOT NULL,
    after_id uuid,
    round_started_at timestamp with time zone DEFAULT now() NOT NULL,
    last_round_ended_at timestamp with time zone
);

CREATE TABLE public.volumes (
    id uuid NOT NULL,
    mount_path text NOT NULL,
    state text DEFAULT 'open'::text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    draining_since timestamp with time zone,
    reserved_for character varying(255),
    CONSTRAINT volumes_mount_path_absolute CHECK ((mount_path ~~ '/%'::text)),
    CONSTRAINT volumes_state_known CHECK ((state = ANY (ARRAY['open'::text, 'read_only'::text])))
);

CREATE TABLE public.webhook_deliveries (
    id bigint NOT NULL,
    endpoint_id uuid NOT NULL,
    event_id bigint NOT NULL,
    order_key text NOT NULL,
    state text DEFAULT 'pending'::text NOT NULL,
    tries integer DEFAULT 0 NOT NULL,
    due_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    give_up_at timestamp with time zone DEFAULT (clock_timestamp() + '3 days'::interval) NOT NULL,
    last_failure text,
    CONSTRAINT webhook_deliveries_state_known CHECK ((state = ANY (ARRAY['pending'::text, 'dead'::text])))
);

ALTER TABLE public.webhook_deliveries ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.webhook_deliveries_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.webhook_endpoints (
    id uuid NOT NULL,
    url text NOT NULL,
    types text[],
    description text NOT NULL,
    secret text NOT NULL,
    old_secret text,
    old_secret_until timestamp with time zone,
    last_sent_at timestamp with time zone,
    last_failed_at timestamp with time zone,
    last_failure text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT webhook_endpoints_types_not_empty CHECK ((cardinality(types) > 0))
);

CREATE TABLE public.work_counts (
    work text NOT NULL,
    result text NOT NULL,
    count bigint NOT NULL
);

ALTER TABLE ONLY public.pgqueuer ALTER COLUMN id SET DEFAULT nextval('public.pgqueuer_id_seq'::regclass);

ALTER TABLE ONLY public.pgqueuer_schedules ALTER COLUMN id SET DEFAULT nextval('public.pgqueuer_schedules_id_seq'::regclass);

ALTER TABLE ONLY public.pgqueuer_statistics ALTER COLUMN id SET DEFAULT nextval('public.pgqueuer_statistics_id_seq'::regclass);

ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (key_id);

ALTER TABLE public.audit_log
    ADD CONSTRAINT audit_log_actor_kind_known CHECK ((actor_kind = ANY (ARRAY['api_key'::text, 'user_token'::text, 'download_link'::text, 'upload_link'::text, 'public_link'::text, 'pipeline'::text, 'cli'::text, 'system'::text]))) NOT VALID;

ALTER TABLE ONLY public.audit_log
    ADD CONSTRAINT audit_log_pkey PRIMARY KEY (at, id);

ALTER TABLE ONLY public.audit_suspects
    ADD CONSTRAINT audit_suspects_pkey PRIMARY KEY (volume_id, file_path);

ALTER TABLE ONLY public.backups
    ADD CONSTRAINT backups_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.counter_corrections
    ADD CONSTRAINT counter_corrections_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.drills
    ADD CONSTRAINT drills_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.generated_media
    ADD CONSTRAINT generated_media_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.generation_jobs
    ADD CONSTRAINT generation_jobs_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.generation_messages
    ADD CONSTRAINT generation_messages_pkey PRIMARY KEY (sender, message_id);

ALTER TABLE ONLY public.generation_outputs
    ADD CONSTRAINT generation_outputs_pkey PRIMARY KEY (job_id, output_index);

ALTER TABLE ONLY public.lifecycle_rules
    ADD CONSTRAINT lifecycle_rules_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.linked_assets
    ADD CONSTRAINT linked_assets_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.pgqueuer_log
    ADD CONSTRAINT pgqueuer_log_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.pgqueuer
    ADD CONSTRAINT pgqueuer_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.pgqueuer_schedules
    ADD CONSTRAINT pgqueuer_schedules_expression_entrypoint_key UNIQUE (expression, entrypoint);

ALTER TABLE ONLY public.pgqueuer_schedules
    ADD CONSTRAINT pgqueuer_schedules_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.pgqueuer_statistics
    ADD CONSTRAINT pgqueuer_statistics_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.preview_figures
    ADD CONSTRAINT preview_figures_pkey PRIMARY KEY (file_type, state, upto_seconds);

ALTER TABLE ONLY public.previews
    ADD CONSTRAINT previews_pkey PRIMARY KEY (file_id, variant);

ALTER TABLE ONLY public.quota_rules
    ADD CONSTRAINT quota_rules_one_row PRIMARY KEY (is_only_row);

ALTER TABLE ONLY public.resumable_uploads
    ADD CONSTRAINT resumable_uploads_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.sheets
    ADD CONSTRAINT sheets_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.sheets
    ADD CONSTRAINT sheets_wish UNIQUE (user_id, digest);

ALTER TABLE ONLY public.tombstones
    ADD CONSTRAINT tombstones_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.upload_stops
    ADD CONSTRAINT upload_stops_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.uploads
    ADD CONSTRAINT uploads_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.usage_days
    ADD CONSTRAINT usage_days_pkey PRIMARY KEY (user_id, day);

ALTER TABLE ONLY public.usage_ledger
    ADD CONSTRAINT usage_ledger_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.usage_summed
    ADD CONSTRAINT usage_summed_pkey PRIMARY KEY (day);

ALTER TABLE ONLY public.user_file_tags
    ADD CONSTRAINT user_file_tags_pkey PRIMARY KEY (user_id, tag, upload_date, file_id);

ALTER TABLE ONLY public.user_file_words
    ADD CONSTRAINT user_file_words_pkey PRIMARY KEY (user_id, suffix_key, file_id);

ALTER TABLE ONLY public.user_files
    ADD CONSTRAINT user_files_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.user_storage_by_type
    ADD CONSTRAINT user_storage_by_type_pkey PRIMARY KEY (user_id, file_type, mime_type);

ALTER TABLE ONLY public.user_storage
    ADD CONSTRAINT user_storage_pkey PRIMARY KEY (user_id);

ALTER TABLE ONLY public.volume_scrubs
    ADD CONSTRAINT volume_scrubs_pkey PRIMARY KEY (volume_id);

ALTER TABLE ONLY public.volumes
    ADD CONSTRAINT volumes_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.webhook_endpoints
    ADD CONSTRAINT webhook_endpoints_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.work_counts
    ADD CONSTRAINT work_counts_pkey PRIMARY KEY (work, result);

CREATE INDEX audit_log_by_actor ON public.audit_log USING btree (actor_id, at, id) WHERE (actor_id IS NOT NULL);

CREATE INDEX audit_log_by_file ON public.audit_log USING btree (file_id, at, id) WHERE (file_id IS NOT NULL);

CREATE INDEX audit_log_by_user ON public.audit_log USING btree (user_id, at, id);

CREATE INDEX backups_by_start ON public.backups USING btree (started_at);

CREATE INDEX backups_holding ON public.backups USING btree (holds_until) WHERE (holds_until IS NOT NULL);

CREATE INDEX counter_corrections_by_user ON public.counter_corrections USING btree (user_id);

CREATE INDEX drills_by_end ON public.drills USING btree (ended_at);

CREATE INDEX events_by_user ON public.events USING btree (user_id, id);

CREATE INDEX generated_media_by_entity ON public.generated_media USING btree (user_id, entity_type, entity_id, created_at, id) WHERE (entity_id IS NOT NULL);

CREATE INDEX generated_media_by_job ON public.generated_media USING btree (job_id) WHERE (job_id IS NOT NULL);

CREATE INDEX generated_media_by_model ON public.generated_media USING btree (user_id, model_used, created_at, id) WHERE (model_used IS NOT NULL);

CREATE INDEX generated_media_by_project ON public.generated_media USING btree (user_id, project_id, created_at, id) WHERE (project_id IS NOT NULL);

CREATE INDEX generated_media_by_root ON public.generated_media USING btree (root_id, created_at, id);

CREATE INDEX generated_media_by_user ON public.generated_media USING btree (user_id, created_at, id);

CREATE UNIQUE INDEX generated_media_file ON public.generated_media USING btree (file_id) WHERE (file_id IS NOT NULL);

CREATE UNIQUE INDEX generated_media_primary ON public.generated_media USING btree (user_id, entity_type, entity_id) WHERE is_primary;

CREATE INDEX generated_media_to_mark ON public.generated_media USING btree (file_id) WHERE (marking = 'pending'::text);

CREATE INDEX generation_jobs_by_entity ON public.generation_jobs USING btree (user_id, entity_type, entity_id, created_at, id) WHERE (entity_id IS NOT NULL);

CREATE INDEX generation_jobs_by_user ON public.generation_jobs USING btree (user_id, created_at, id);

CREATE INDEX generation_jobs_callback ON public.generation_jobs USING btree (id) WHERE (callback_state = 'due'::text);

CREATE INDEX generation_jobs_callback_failed ON public.generation_jobs USING btree (id) WHERE ((callback_state = 'failed'::text) AND (callback_secret IS NOT NULL));

CREATE INDEX generation_jobs_ended ON public.generation_jobs USING btree (finished_at, id) WHERE (finished_at IS NOT NULL);

CREATE UNIQUE INDEX generation_jobs_idempotency_key ON public.generation_jobs USING btree (user_id, idempotency_key) WHERE (idempotency_key IS NOT NULL);

CREATE INDEX generation_jobs_open ON public.generation_jobs USING btree (id) WHERE ((finished_at IS NULL) AND (pipeline IS NOT NULL));

CREATE INDEX generation_jobs_unfinished ON public.generation_jobs USING btree (created_at) WHERE (finished_at IS NULL);

CREATE INDEX generation_messages_received ON public.generation_messages USING btree (received_at);

CREATE INDEX generation_outputs_fetching ON public.generation_outputs USING btree (file_id) WHERE (state = 'fetching'::text);

CREATE UNIQUE INDEX generation_outputs_file ON public.generation_outputs USING btree (file_id);

CREATE INDEX linked_assets_by_user ON public.linked_assets USING btree (user_id, id);

CREATE INDEX linked_assets_check ON public.linked_assets USING btree (check_at) WHERE (check_at IS NOT NULL);

CREATE INDEX linked_assets_import ON public.linked_assets USING btree (import_at) WHERE (import_state = 'pending'::text);

CREATE INDEX pgqueuer_ep_ea_idx ON public.pgqueuer USING btree (entrypoint, execute_after) WHERE (status = 'queued'::public.pgqueuer_status);

CREATE INDEX pgqueuer_ep_prio_id_idx ON public.pgqueuer USING btree (entrypoint, priority DESC, id) WHERE (status = 'queued'::public.pgqueuer_status);

CREATE INDEX pgqueuer_failed ON public.pgqueuer USING btree (dedupe_key) WHERE (status = 'failed'::public.pgqueuer_status);

CREATE INDEX pgqueuer_log_created ON public.pgqueuer_log USING btree (created);

CREATE INDEX pgqueuer_log_job_id_status ON public.pgqueuer_log USING btree (job_id, created DESC);

CREATE INDEX pgqueuer_log_not_aggregated ON public.pgqueuer_log USING btree ((1)) WHERE (NOT aggregated);

CREATE INDEX pgqueuer_log_status ON public.pgqueuer_log USING btree (status);

CREATE INDEX pgqueuer_picked_heartbeat_idx ON public.pgqueuer USING btree (heartbeat) WHERE (status = 'picked'::public.pgqueuer_status);

CREATE UNIQUE INDEX pgqueuer_picked_slot_idx ON public.pgqueuer USING btree (entrypoint, slot) WHERE ((status = 'picked'::public.pgqueuer_status) AND (slot IS NOT NULL));

CREATE INDEX pgqueuer_priority_id_id1_idx ON public.pgqueuer USING btree (priority, id DESC) INCLUDE (id) WHERE (status = 'queued'::public.pgqueuer_status);

CREATE INDEX pgqueuer_queue_manager_id_idx ON public.pgqueuer USING btree (queue_manager_id) WHERE (queue_manager_id IS NOT NULL);

CREATE UNIQUE INDEX pgqueuer_statistics_unique_count ON public.pgqueuer_statistics USING btree (priority, date_trunc('sec'::text, timezone('UTC'::text, created)), status, entrypoint);

CREATE UNIQUE INDEX pgqueuer_unique_dedupe_key ON public.pgqueuer USING btree (dedupe_key) WHERE ((status = ANY (ARRAY['queued'::public.pgqueuer_status, 'picked'::public.pgqueuer_status])) AND (dedupe_key IS NOT NULL));

CREATE INDEX pgqueuer_updated_id_id1_idx ON public.pgqueuer USING btree (updated, id DESC) INCLUDE (id) WHERE (status = 'picked'::public.pgqueuer_status);

CREATE INDEX previews_on_demand ON public.previews USING btree (user_id, last_used_at) WHERE on_demand;

CREATE INDEX resumable_uploads_expires ON public.resumable_uploads USING btree (expires_at);

CREATE INDEX resumable_uploads_incoming ON public.resumable_uploads USING btree (incoming_name);

CREATE INDEX resumable_uploads_joined ON public.resumable_uploads USING btree (joined_as) WHERE (joined_as IS NOT NULL);

CREATE INDEX resumable_uploads_parts ON public.resumable_uploads USING btree ((parts[1])) WHERE (parts IS NOT NULL);

CREATE INDEX resumable_uploads_user ON public.resumable_uploads USING btree (user_id);

CREATE INDEX sheets_old ON public.sheets USING btree (requested_at);

CREATE INDEX tombstones_by_file ON public.tombstones USING btree (file_id, generation);

CREATE INDEX uploads_expires_at ON public.uploads USING btree (expires_at);

CREATE UNIQUE INDEX uploads_idempotency_key ON public.uploads USING btree (user_id, idempotency_key);

CREATE INDEX uploads_of_job ON public.uploads USING btree (job_id) WHERE (job_id IS NOT NULL);

CREATE INDEX usage_ledger_by_user ON public.usage_ledger USING btree (user_id, id);

CREATE INDEX user_file_tags_name ON public.user_file_tags USING btree (user_id, tag, name_key, file_id);

CREATE INDEX user_file_tags_size ON public.user_file_tags USING btree (user_id, tag, file_size, file_id);

CREATE INDEX user_files_created ON public.user_files USING btree (user_id, upload_date, id);

CREATE INDEX user_files_damaged ON public.user_files USING btree (id) WHERE (damaged_at IS NOT NULL);

CREATE INDEX user_files_favorite_created ON public.user_files USING btree ((
CASE
    WHEN is_favorite THEN user_id
    ELSE NULL::character varying
END), upload_date, id) WHERE is_favorite;

CREATE INDEX user_files_favorite_name ON public.user_files USING btree ((
CASE
    WHEN is_favorite THEN user_id
    ELSE NULL::character varying
END), name_key, id) WHERE is_favorite;

CREATE INDEX user_files_favorite_size ON public.user_files USING btree ((
CASE
    WHEN is_favorite THEN user_id
    ELSE NULL::character varying
END), file_size, id) WHERE is_favorite;

CREATE UNIQUE INDEX user_files_idempotency_key ON public.user_files USING btree (user_id, idempotency_key) WHERE (idempotency_key IS NOT NULL);

CREATE INDEX user_files_name ON public.user_files USING btree (user_id, name_key, id);

CREATE INDEX user_files_package_created ON public.user_files USING btree (((((user_id)::text || ''::text) || (package_name)::text)), upload_date, id) WHERE (package_name IS NOT NULL);

CREATE INDEX user_files_package_name ON public.user_files USING btree (((((user_id)::text || ''::text) || (package_name)::text)), name_key, id) WHERE (package_name IS NOT NULL);

CREATE INDEX user_files_package_size ON public.user_files USING btree (((((user_id)::text || ''::text) || (package_name)::text)), file_size, id) WHERE (package_name IS NOT NULL);

CREATE INDEX user_files_preview_failed ON public.user_files USING btree (id) WHERE (preview_state = 'failed'::text);

CREATE INDEX user_files_preview_pending ON public.user_files USING btree (user_id, id) WHERE (preview_state = 'pending'::text);

CREATE UNIQUE INDEX user_files_public_id ON public.user_files USING btree (public_id) WHERE (public_id IS NOT NULL);

CREATE INDEX user_files_size ON public.user_files USING btree (user_id, file_size, id);

CREATE INDEX user_files_trash ON public.user_files USING btree (user_id, deleted_at, id) WHERE (deleted_at IS NOT NULL);

CREATE INDEX user_files_trash_age ON public.user_files USING btree (deleted_at, id) WHERE (deleted_at IS NOT NULL);

CREATE INDEX user_files_trash_kind ON public.user_files USING btree ((((file_type || ':'::text) || (user_id)::text)), deleted_at, id) WHERE (deleted_at IS NOT NULL);

CREATE INDEX user_files_type_created ON public.user_files USING btree ((((((file_type || ':'::text) || (mime_type)::text) || ':'::text) || (user_id)::text)), upload_date, id);

CREATE INDEX user_files_type_name ON public.user_files USING btree ((((((file_type || ':'::text) || (mime_type)::text) || ':'::text) || (user_id)::text)), name_key, id);

CREATE INDEX user_files_type_size ON public.user_files USING btree ((((((file_type || ':'::text) || (mime_type)::text) || ':'::text) || (user_id)::text)), file_size, id);

CREATE INDEX user_storage_erasing ON public.user_storage USING btree (user_id) WHERE (erasing_at IS NOT NULL);

CREATE INDEX user_storage_link_epoch ON public.user_storage USING btree (user_id) WHERE (link_epoch > 0);

CREATE INDEX user_storage_moving ON public.user_storage USING btree (user_id) WHERE (moving_since IS NOT NULL);

CREATE INDEX user_storage_warned ON public.user_storage USING btree (warned_percent) WHERE (warned_percent > 0);

CREATE UNIQUE INDEX volumes_reserved_for ON public.volumes USING btree (reserved_for) WHERE (reserved_for IS NOT NULL);

CREATE INDEX webhook_deliveries_dead ON public.webhook_deliveries USING btree (endpoint_id, id) WHERE (state = 'dead'::text);

CREATE INDEX webhook_deliveries_dead_callbacks ON public.webhook_deliveries USING btree (id) WHERE ((state = 'dead'::text) AND (order_key = (endpoint_id)::text));

CREATE INDEX webhook_deliveries_due ON public.webhook_deliveries USING btree (endpoint_id, due_at, id) WHERE (state = 'pending'::text);

CREATE INDEX webhook_deliveries_event ON public.webhook_deliveries USING btree (event_id);

CREATE INDEX webhook_deliveries_order ON public.webhook_deliveries USING btree (endpoint_id, order_key, id) WHERE (state = 'pending'::text);

CREATE TRIGGER correct_counters BEFORE INSERT ON public.counter_corrections FOR EACH ROW EXECUTE FUNCTION public.correct_counters_v1();

CREATE TRIGGER count_deleted AFTER DELETE ON public.previews REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.previews_deleted_v1();

CREATE TRIGGER count_inserted AFTER INSERT ON public.previews REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.previews_inserted_v1();

CREATE TRIGGER count_updated AFTER UPDATE ON public.previews REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.previews_updated_v1();

CREATE TRIGGER enqueue_previews AFTER INSERT ON public.user_files REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.enqueue_previews_v1();

CREATE TRIGGER fan_out AFTER INSERT ON public.events REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.fan_out_events_v1();

CREATE TRIGGER forget_media AFTER DELETE ON public.user_files REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.forget_media_v1();

CREATE TRIGGER keep_deleted AFTER DELETE ON public.audit_log REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.keep_audit_log_v1();

CREATE TRIGGER keep_order BEFORE UPDATE ON public.generation_jobs FOR EACH ROW WHEN ((old.state IS DISTINCT FROM new.state)) EXECUTE FUNCTION public.keep_job_order_v1();

CREATE TRIGGER keep_order BEFORE UPDATE ON public.generation_outputs FOR EACH ROW WHEN ((old.state IS DISTINCT FROM new.state)) EXECUTE FUNCTION public.keep_job_order_v1();

CREATE TRIGGER keep_truncated BEFORE TRUNCATE ON public.audit_log FOR EACH STATEMENT EXECUTE FUNCTION public.keep_audit_log_v1();

CREATE TRIGGER keep_updated BEFORE UPDATE ON public.audit_log FOR EACH ROW EXECUTE FUNCTION public.keep_audit_log_v1();

CREATE TRIGGER quota_deleted AFTER DELETE ON public.uploads REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.uploads_deleted_v1();

CREATE TRIGGER quota_deleted AFTER DELETE ON public.user_files REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.user_files_deleted_v1();

CREATE TRIGGER quota_inserted AFTER INSERT ON public.uploads REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.uploads_inserted_v1();

CREATE TRIGGER quota_inserted AFTER INSERT ON public.user_files REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.user_files_inserted_v1();

CREATE TRIGGER quota_updated AFTER UPDATE ON public.uploads REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.uploads_updated_v1();

CREATE TRIGGER quota_updated AFTER UPDATE ON public.user_files REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.user_files_updated_v1();

CREATE TRIGGER refuse_beyond_previews BEFORE UPDATE ON public.user_storage FOR EACH ROW WHEN (((new.preview_bytes > 0) AND ((new.total_bytes + new.reserved_bytes) > (old.total_bytes + old.reserved_bytes)) AND (((new.total_bytes + new.reserved_bytes) + new.preview_bytes) > new.max_bytes))) EXECUTE FUNCTION public.refuse_beyond_previews_v1();

CREATE TRIGGER refuse_change_while_stopped BEFORE UPDATE OF sha256 ON public.user_files FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_while_stopped_v1();

CREATE TRIGGER refuse_counter_change BEFORE UPDATE ON public.user_storage FOR EACH ROW WHEN (((pg_trigger_depth() = 0) AND ((old.total_bytes <> new.total_bytes) OR (old.reserved_bytes <> new.reserved_bytes) OR (old.file_count <> new.file_count) OR (old.credit_xid IS DISTINCT FROM new.credit_xid) OR (old.credit_bytes <> new.credit_bytes)))) EXECUTE FUNCTION public.refuse_counter_change_v1();

CREATE TRIGGER refuse_counter_change BEFORE INSERT OR DELETE OR UPDATE ON public.user_storage_by_type FOR EACH ROW WHEN ((pg_trigger_depth() = 0)) EXECUTE FUNCTION public.refuse_counter_change_v1();

CREATE TRIGGER refuse_counter_insert BEFORE INSERT ON public.user_storage FOR EACH ROW WHEN (((new.total_bytes <> 0) OR (new.reserved_bytes <> 0) OR (new.file_count <> 0) OR (new.credit_bytes <> 0))) EXECUTE FUNCTION public.refuse_counter_change_v1();

CREATE TRIGGER refuse_held AFTER DELETE ON public.user_files REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_held_delete_v1();

CREATE TRIGGER refuse_held_change BEFORE UPDATE ON public.user_files FOR EACH ROW WHEN (((old.sha256 <> new.sha256) OR ((old.user_id)::text <> (new.user_id)::text) OR ((old.deleted_at IS NULL) AND (new.deleted_at IS NOT NULL)))) EXECUTE FUNCTION public.refuse_held_change_v1();

CREATE TRIGGER refuse_held_delete BEFORE DELETE ON public.user_storage FOR EACH ROW WHEN ((old.held_at IS NOT NULL)) EXECUTE FUNCTION public.refuse_held_erasing_v1();

CREATE TRIGGER refuse_held_erasing BEFORE UPDATE ON public.user_storage FOR EACH ROW WHEN (((new.held_at IS NOT NULL) AND (new.erasing_at IS NOT NULL) AND ((old.held_at IS NULL) OR (old.erasing_at IS NULL)))) EXECUTE FUNCTION public.refuse_held_erasing_v1();

CREATE TRIGGER refuse_preview_bytes_change BEFORE UPDATE ON public.user_storage FOR EACH ROW WHEN (((pg_trigger_depth() = 0) AND (old.preview_bytes <> new.preview_bytes))) EXECUTE FUNCTION public.refuse_counter_change_v1();

CREATE TRIGGER refuse_preview_bytes_insert BEFORE INSERT ON public.user_storage FOR EACH ROW WHEN ((new.preview_bytes <> 0)) EXECUTE FUNCTION public.refuse_counter_change_v1();

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.previews FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_truncate_v1();

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.uploads FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_truncate_v1();

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.user_files FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_truncate_v1();

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.user_storage FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_truncate_v1();

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.user_storage_by_type FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_truncate_v1();

CREATE TRIGGER refuse_while_stopped BEFORE INSERT ON public.uploads FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_while_stopped_v1();

CREATE TRIGGER refuse_while_stopped BEFORE INSERT ON public.user_files FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_while_stopped_v1();

CREATE TRIGGER remember_added AFTER INSERT ON public.linked_assets FOR EACH ROW WHEN ((new.media_type IS NOT NULL)) EXECUTE FUNCTION public.remember_asset_v1();

CREATE TRIGGER remember_changed AFTER UPDATE ON public.linked_assets FOR EACH ROW WHEN (((new.media_type IS NOT NULL) AND ((old.version <> new.version) OR (old.state <> new.state) OR (old.last_checked_at IS DISTINCT FROM new.last_checked_at) OR (old.file_id IS DISTINCT FROM new.file_id)))) EXECUTE FUNCTION public.remember_asset_v1();

CREATE TRIGGER remember_deleted AFTER DELETE ON public.linked_assets FOR EACH ROW WHEN ((old.media_type IS NOT NULL)) EXECUTE FUNCTION public.remember_asset_v1();

CREATE TRIGGER remove_previews AFTER DELETE ON public.user_files REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.remove_previews_v1();

CREATE TRIGGER search_deleted AFTER DELETE ON public.user_files REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION public.user_files_index_deleted_v1();

CREATE TRIGGER search_inserted AFTER INSERT ON public.user_files REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.user_files_index_inserted_v1();

CREATE TRIGGER search_updated AFTER UPDATE ON public.user_files REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION public.user_files_index_updated_v1();

CREATE TRIGGER settle_output AFTER DELETE ON public.uploads FOR EACH ROW WHEN ((old.job_id IS NOT NULL)) EXECUTE FUNCTION public.output_ended_v1();

CREATE TRIGGER warn_of_quota BEFORE UPDATE ON public.user_storage FOR EACH ROW WHEN ((((new.warned_percent < 80) AND (((new.total_bytes + new.preview_bytes))::double precision >= ((new.max_bytes)::double precision * (0.80)::double precision))) OR ((new.warned_percent < 90) AND (((new.total_bytes + new.preview_bytes))::double precision >= ((new.max_bytes)::double precision * (0.90)::double precision))) OR ((new.warned_percent < 100) AND ((new.total_bytes + new.preview_bytes) >= new.max_bytes)) OR ((new.warned_percent > 0) AND ((new.max_bytes IS NULL) OR ((new.total_bytes)::double precision < ((new.max_bytes)::double precision * (((new.warned_percent - 10))::double precision / (100.0)::double precision))))))) EXECUTE FUNCTION public.warn_of_quota_v1();

ALTER TABLE ONLY public.counter_corrections
    ADD CONSTRAINT counter_corrections_user FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.generated_media
    ADD CONSTRAINT generated_media_owner FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.generation_jobs
    ADD CONSTRAINT generation_jobs_owner FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.generation_outputs
    ADD CONSTRAINT generation_outputs_job FOREIGN KEY (job_id) REFERENCES public.generation_jobs(id) ON DELETE CASCADE;

ALTER TABLE ONLY public.linked_assets
    ADD CONSTRAINT linked_assets_owner FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.resumable_uploads
    ADD CONSTRAINT resumable_uploads_user_fkey FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.sheets
    ADD CONSTRAINT sheets_owner FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.uploads
    ADD CONSTRAINT uploads_owner FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.uploads
    ADD CONSTRAINT uploads_volume FOREIGN KEY (volume_id) REFERENCES public.volumes(id);

ALTER TABLE ONLY public.user_files
    ADD CONSTRAINT user_files_owner FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.user_files
    ADD CONSTRAINT user_files_volume FOREIGN KEY (volume_id) REFERENCES public.volumes(id);

ALTER TABLE ONLY public.user_storage_by_type
    ADD CONSTRAINT user_storage_by_type_owner FOREIGN KEY (user_id) REFERENCES public.user_storage(user_id) ON DELETE CASCADE;

ALTER TABLE ONLY public.user_storage
    ADD CONSTRAINT user_storage_volume FOREIGN KEY (volume_id) REFERENCES public.volumes(id);

ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_event FOREIGN KEY (event_id) REFERENCES public.events(id) ON DELETE CASCADE;
