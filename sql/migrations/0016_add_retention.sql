-- What leaves, and what must not: the trash, lifecycle rules, legal holds, and what an erasure can be certified by.

-- Since when a file is in the trash. It still counts, and keeps its bytes under a name that no link knows.
alter table user_files add column deleted_at timestamptz;
-- When it last came out of the trash. For lifecycle rules it is as young as that: else the rule that moved it there would do so again.
alter table user_files add column restored_at timestamptz;
create index user_files_trash on user_files (user_id, deleted_at, id) where deleted_at is not null;
create index user_files_trash_age on user_files (deleted_at, id) where deleted_at is not null;

-- Since when, and why, nothing of the user's may go.
alter table user_storage add column held_at timestamptz, add column hold_reason text;
alter table user_storage add constraint user_storage_hold_has_reason check ((held_at is null) = (hold_reason is null));

-- What goes by itself. Null is no condition. `coffer purge` applies them; nothing else does.
create table lifecycle_rules (
    id bigint generated always as identity constraint lifecycle_rules_pkey primary key,
    action text not null constraint lifecycle_rules_action_known check (action in ('delete', 'trash')),
    after_days integer not null constraint lifecycle_rules_after_days_positive check (after_days > 0),
    user_id varchar(255),
    file_type text constraint lifecycle_rules_file_type_known check (file_type in ('video', 'image', 'scene', 'project', 'audio')),
    mime_type varchar(127),
    tag varchar(255),
    package_name varchar(255),
    metadata jsonb constraint lifecycle_rules_metadata_is_object check (jsonb_typeof(metadata) = 'object'),
    includes_favorites boolean not null default false,
    created_at timestamptz not null default now()
);

create function lifecycle_applies_v1(p_rule lifecycle_rules, p_file user_files) returns boolean
language sql stable as $$
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

create function delete_files_v3(p_user_id text, p_ids uuid[], p_actor jsonb, p_why jsonb)
returns table (file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
language plpgsql set search_path = public, pg_temp as $$
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

create function trash_files_v1(
    p_user_id text, p_volume_id uuid, p_ids uuid[], p_generations integer[], p_new_generations integer[], p_new_paths text[], p_rule bigint,
    p_actor jsonb
) returns table (file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
language plpgsql set search_path = public, pg_temp as $$
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

-- Legal hold

create function refuse_held_delete_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function refuse_held_change_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function refuse_held_erasing_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create trigger refuse_held after delete on user_files
    referencing old table as old_rows for each statement execute function refuse_held_delete_v1();
create trigger refuse_held_change before update on user_files for each row
    when (old.sha256 <> new.sha256 or old.user_id <> new.user_id or (old.deleted_at is null and new.deleted_at is not null))
    execute function refuse_held_change_v1();
create trigger refuse_held_delete before delete on user_storage for each row
    when (old.held_at is not null) execute function refuse_held_erasing_v1();
create trigger refuse_held_erasing before update on user_storage for each row
    when (new.held_at is not null and new.erasing_at is not null and (old.held_at is null or old.erasing_at is null))
    execute function refuse_held_erasing_v1();

-- Erasure

create function begin_erasing_v1(p_user_id text, p_actor jsonb, p_unseen_days integer, p_default_max_bytes bigint, p_any_quota boolean)
returns setof user_storage
language plpgsql set search_path = public, pg_temp as $$
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
