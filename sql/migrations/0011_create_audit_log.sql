-- The audit trail: who did what to which file and when. A record is written by the statement that makes the change, so neither exists
-- without the other (server/decisions/0012). No foreign keys: the trail outlives what it tells of.
create table audit_log (
    -- Never the time of a transaction's begin: records are in the order of (at, id), nearly that of the commits.
    at timestamptz not null default clock_timestamp(),
    id bigint generated always as identity,
    action text not null constraint audit_log_action_plain check (action ~ '^[a-z_]{1,32}\.[a-z_]{1,32}$'),
    -- Whose credentials: the id of an API key, the subject of a user token, the id of an upload link, an account of the machine. Null: Coffer.
    actor_kind text not null constraint audit_log_actor_kind_known
        check (actor_kind in ('api_key', 'user_token', 'download_link', 'upload_link', 'public_link', 'cli', 'system')),
    actor_id text,
    acting_user_id varchar(255),
    -- Whom and what it was done to.
    user_id varchar(255),
    file_id uuid,
    address inet,
    request_id text,
    -- Sizes, types, names of fields. Never a name, a value, a key, a token or a link.
    detail jsonb not null default '{}' constraint audit_log_detail_small check (octet_length(detail::text) <= 8192),
    constraint audit_log_pkey primary key (at, id)
);
create index audit_log_by_user on audit_log (user_id, at, id);
create index audit_log_by_file on audit_log (file_id, at, id) where file_id is not null;
create index audit_log_by_actor on audit_log (actor_id, at, id) where actor_id is not null;

create function actor_of_v1(p_actor jsonb)
returns table (actor_kind text, actor_id text, acting_user_id text, address inet, request_id text)
language sql immutable parallel safe as $$
-- The columns that an actor fills, from the JSON of server/actor.py. PostgreSQL puts the body into the query that calls it.
select p_actor ->> 'kind', p_actor ->> 'id', p_actor ->> 'user_id', (p_actor ->> 'address')::inet, p_actor ->> 'request_id'
$$;

create function keep_audit_log_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create trigger keep_updated before update on audit_log for each row execute function keep_audit_log_v1();
create trigger keep_deleted after delete on audit_log referencing old table as old_rows
    for each statement execute function keep_audit_log_v1();
create trigger keep_truncated before truncate on audit_log for each statement execute function keep_audit_log_v1();

create function delete_files_v2(p_user_id text, p_ids uuid[], p_actor jsonb)
returns table (file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
language plpgsql set search_path = public, pg_temp as $$
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

create function open_upload_v2(
    p_id uuid, p_user_id text, p_volume_id uuid, p_reserved_bytes bigint, p_idempotency_key text, p_lease_seconds double precision, p_link jsonb,
    p_most integer, p_actor jsonb
) returns void
language plpgsql set search_path = public, pg_temp as $$
-- Opens a reservation as open_upload_v1 does, and records an upload link.
begin
    perform open_upload_v1(p_id, p_user_id, p_volume_id, p_reserved_bytes, p_idempotency_key, p_lease_seconds, p_link, p_most);
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'upload_link.created', u.user_id, u.id, jsonb_build_object('max_bytes', u.reserved_bytes, 'expires_at', u.expires_at), a.*
      from uploads u, actor_of_v1(p_actor) a where u.id = p_id and u.link is not null;
end
$$;
