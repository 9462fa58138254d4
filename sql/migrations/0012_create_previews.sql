-- Previews: what is known of a file's picture, the files derived from it, and the queue of those still to be made.

-- `preview_state` null: nothing is derived from such a file. What is derived describes the bytes, so replacing them clears it.
alter table user_files
    add preview_state text constraint user_files_preview_state_known check (preview_state in ('pending', 'ready', 'failed', 'unsupported')),
    add preview_reason text,
    -- Begun, of these bytes; counted before the decoder sees them, so that whoever it takes along with it cannot forget.
    add preview_tries smallint not null default 0,
    add thumbhash bytea constraint user_files_thumbhash_small check (octet_length(thumbhash) <= 64),
    add average_color text constraint user_files_average_color_hexadecimal check (average_color ~ '^#[0-9a-f]{6}$'),
    add frame_rate double precision constraint user_files_frame_rate_positive check (frame_rate > 0),
    add video_codec text,
    add audio_codec text;

-- Ids begin with their time, so this is each user's backlog in the order of the uploads.
create index user_files_preview_pending on user_files (user_id, id) where preview_state = 'pending';
create index user_files_preview_failed on user_files (id) where preview_state = 'failed';

-- One row per derived file, which lies in the previews/ of its user under `file_name`, on the volume of the file. No foreign key: the
-- triggers below remove a file's rows, once per statement.
create table previews (
    file_id uuid not null,
    variant text not null constraint previews_variant_plain check (variant ~ '^[a-z0-9][a-z0-9._-]{0,31}$'),
    user_id varchar(255) not null,
    file_name text not null,
    mime_type varchar(127) not null,
    width integer constraint previews_width_positive check (width > 0),
    height integer constraint previews_height_positive check (height > 0),
    size_bytes bigint not null constraint previews_size_bytes_not_negative check (size_bytes >= 0),
    on_demand boolean not null default false,
    last_used_at timestamptz not null default now(),
    created_at timestamptz not null default now(),
    constraint previews_pkey primary key (file_id, variant)
);

-- What was made on demand is a cache: the least recently used of a user's gives way.
create index previews_on_demand on previews (user_id, last_used_at) where on_demand;

-- What the workers did, for the metrics: files by how it ended and how long it took. The workers add to it every second; one that is killed
-- takes a second's with it.
create table preview_figures (
    file_type text not null,
    state text not null,
    upto_seconds double precision not null,
    files bigint not null,
    seconds double precision not null,
    constraint preview_figures_pkey primary key (file_type, state, upto_seconds)
);

-- Bytes of previews, kept by triggers. The quota counts them only where quota_rules says so.
alter table user_storage
    add preview_bytes bigint not null default 0 constraint user_storage_preview_bytes_not_negative check (preview_bytes >= 0);

create trigger refuse_preview_bytes_insert before insert on user_storage for each row
    when (new.preview_bytes <> 0) execute function refuse_counter_change_v1();
create trigger refuse_preview_bytes_change before update on user_storage for each row
    when (pg_trigger_depth() = 0 and old.preview_bytes <> new.preview_bytes) execute function refuse_counter_change_v1();

-- One row: what the servers' settings say that the triggers must know. The servers keep it (server/ledger/users.py).
create table quota_rules (
    counts_previews boolean not null,
    is_only_row boolean not null default true constraint quota_rules_one_row primary key check (is_only_row)
);
insert into quota_rules (counts_previews) values (false);

create function refuse_beyond_previews_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create trigger refuse_beyond_previews before update on user_storage for each row
    when (new.preview_bytes > 0
          and new.total_bytes + new.reserved_bytes > old.total_bytes + old.reserved_bytes
          and new.total_bytes + new.reserved_bytes + new.preview_bytes > new.max_bytes)
    execute function refuse_beyond_previews_v1();

-- PgQueuer 1.6's tables, as `pgqueuer install` makes them but for its trigger. That one would notify from inside each upload's commit, and
-- PostgreSQL lets only one transaction at a time commit with a notification: uploads would sync their commits one after the other. Who
-- has published wakes the worker afterwards (server/ledger/previews.py).
create type pgqueuer_status as enum ('queued', 'picked', 'successful', 'exception', 'canceled', 'deleted', 'failed');

create table pgqueuer (
    id bigserial not null primary key,
    priority integer not null,
    queue_manager_id uuid,
    created timestamp with time zone not null default now(),
    updated timestamp with time zone not null default now(),
    heartbeat timestamp with time zone not null default now(),
    execute_after timestamp with time zone not null default now(),
    status pgqueuer_status not null,
    entrypoint text not null,
    dedupe_key text,
    payload bytea,
    headers jsonb,
    attempts integer not null default 0,
    slot bigint
);

create table pgqueuer_log (
    id bigint generated by default as identity not null primary key,
    created timestamp with time zone not null default now(),
    job_id bigint not null,
    status pgqueuer_status not null,
    priority integer not null,
    entrypoint text not null,
    traceback jsonb,
    aggregated boolean default false
);

create table pgqueuer_schedules (
    id bigserial not null primary key,
    expression text not null,
    entrypoint text not null,
    heartbeat timestamp with time zone not null default now(),
    created timestamp with time zone not null default now(),
    updated timestamp with time zone not null default now(),
    next_run timestamp with time zone not null default now(),
    last_run timestamp with time zone,
    status pgqueuer_status default 'queued'::pgqueuer_status,
    unique (expression, entrypoint)
);

create table pgqueuer_statistics (
    id bigserial not null primary key,
    created timestamp with time zone not null default date_trunc('sec'::text, now()),
    count bigint not null,
    priority integer not null,
    status pgqueuer_status not null,
    entrypoint text not null
);

create index pgqueuer_ep_ea_idx on pgqueuer using btree (entrypoint, execute_after) where (status = 'queued'::pgqueuer_status);

create index pgqueuer_ep_prio_id_idx on pgqueuer using btree (entrypoint, priority desc, id) where (status = 'queued'::pgqueuer_status);

create index pgqueuer_log_created on pgqueuer_log using btree (created);

create index pgqueuer_log_job_id_status on pgqueuer_log using btree (job_id, created desc);

create index pgqueuer_log_not_aggregated on pgqueuer_log using btree ((1)) where (not aggregated);

create index pgqueuer_log_status on pgqueuer_log using btree (status);

create index pgqueuer_picked_heartbeat_idx on pgqueuer using btree (heartbeat) where (status = 'picked'::pgqueuer_status);

create unique index pgqueuer_picked_slot_idx on pgqueuer using btree (entrypoint, slot) where ((status = 'picked'::pgqueuer_status) and (slot is not null));

create index pgqueuer_priority_id_id1_idx on pgqueuer using btree (priority, id desc) include (id) where (status = 'queued'::pgqueuer_status);

create index pgqueuer_queue_manager_id_idx on pgqueuer using btree (queue_manager_id) where (queue_manager_id is not null);

create unique index pgqueuer_statistics_unique_count on pgqueuer_statistics using btree (priority, date_trunc('sec'::text, timezone('UTC'::text, created)), status, entrypoint);

create unique index pgqueuer_unique_dedupe_key on pgqueuer using btree (dedupe_key) where ((status = any (array['queued'::pgqueuer_status, 'picked'::pgqueuer_status])) and (dedupe_key is not null));

create index pgqueuer_updated_id_id1_idx on pgqueuer using btree (updated, id desc) include (id) where (status = 'picked'::pgqueuer_status);

-- Ours: held jobs, to be released or forgotten, without a look at all that wait.
create index pgqueuer_failed on pgqueuer (dedupe_key) where (status = 'failed'::pgqueuer_status);

create function enqueue_previews_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function remove_previews_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function charge_previews_v1(p_user_id varchar, p_bytes bigint) returns void
language sql set search_path = public, pg_temp as $$
-- Invariant: preview_bytes is the sum of the sizes of the user's previews. Called by the triggers of previews, in the order of user_id.
-- Locks: the user's row. Cost: one HOT update.
-- Why not Python: cascades and psql remove previews too.
update user_storage set preview_bytes = preview_bytes + p_bytes where user_id = p_user_id and p_bytes <> 0;
$$;

create function previews_inserted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant, locks, cost and reason: as charge_previews_v1. Fires: after each INSERT into previews, once per statement.
begin
    perform charge_previews_v1(d.user_id, d.bytes)
       from (select n.user_id, sum(n.size_bytes)::bigint as bytes from new_rows n group by n.user_id order by n.user_id) d;
    return null;
end
$$;

create function previews_deleted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant, locks, cost and reason: as charge_previews_v1. Fires: after each DELETE from previews, once per statement.
begin
    perform charge_previews_v1(d.user_id, -d.bytes)
       from (select o.user_id, sum(o.size_bytes)::bigint as bytes from old_rows o group by o.user_id order by o.user_id) d;
    return null;
end
$$;

create function previews_updated_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create trigger enqueue_previews after insert on user_files
    referencing new table as new_rows for each statement execute function enqueue_previews_v1();
create trigger remove_previews after delete on user_files
    referencing old table as old_rows for each statement execute function remove_previews_v1();

create trigger count_inserted after insert on previews
    referencing new table as new_rows for each statement execute function previews_inserted_v1();
create trigger count_deleted after delete on previews
    referencing old table as old_rows for each statement execute function previews_deleted_v1();
create trigger count_updated after update on previews
    referencing old table as old_rows new table as new_rows for each statement execute function previews_updated_v1();
create trigger refuse_truncate before truncate on previews for each statement execute function refuse_truncate_v1();
