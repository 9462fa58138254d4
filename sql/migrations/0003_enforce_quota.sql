-- Quota: no way in, direct SQL included, makes total_bytes + reserved_bytes exceed max_bytes.
--
-- SQLSTATEs of our own: CF001 quota exceeded (DETAIL is JSON: used_bytes, limit_bytes, needed_bytes), CF002 TRUNCATE refused,
-- CF003 the user is being erased, CF004 a counter was changed by hand.

create function charge_usage_v1(p_user_id varchar, p_total bigint, p_reserved bigint, p_files bigint, p_admits boolean) returns void
language plpgsql as $$
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

create function user_files_inserted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function user_files_deleted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function user_files_updated_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function uploads_inserted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function uploads_deleted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function uploads_updated_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create function refuse_truncate_v1() returns trigger
language plpgsql as $$
-- Invariant: rows leave only by DELETE, which gives quota back and leaves tombstones.
-- Fires: before TRUNCATE, once per statement. Locks: none beyond TRUNCATE's own. Cost: none.
-- Why not Python: only psql truncates.
begin
    raise exception 'TRUNCATE of % is refused', tg_table_name
        using errcode = 'CF002', hint = 'Use DELETE: it gives quota back and remembers the stored files to remove.';
end
$$;

create function refuse_counter_change_v1() returns trigger
language plpgsql as $$
-- Invariant: the counters are what the triggers made them.
-- Fires: before each row that a statement outside any trigger would change in user_storage_by_type or in the counters of user_storage.
-- Locks: none. Cost: the WHEN clauses, under a microsecond.
-- Why not Python: only psql writes here.
begin
    raise exception 'counters of % are kept by triggers', tg_table_name
        using errcode = 'CF004', hint = 'Change user_files or uploads instead; max_bytes and tier may be set by hand.';
end
$$;

create trigger quota_inserted after insert on user_files
    referencing new table as new_rows for each statement execute function user_files_inserted_v1();
create trigger quota_deleted after delete on user_files
    referencing old table as old_rows for each statement execute function user_files_deleted_v1();
create trigger quota_updated after update on user_files
    referencing old table as old_rows new table as new_rows for each statement execute function user_files_updated_v1();

create trigger quota_inserted after insert on uploads
    referencing new table as new_rows for each statement execute function uploads_inserted_v1();
create trigger quota_deleted after delete on uploads
    referencing old table as old_rows for each statement execute function uploads_deleted_v1();
create trigger quota_updated after update on uploads
    referencing old table as old_rows new table as new_rows for each statement execute function uploads_updated_v1();

create trigger refuse_truncate before truncate on user_files for each statement execute function refuse_truncate_v1();
create trigger refuse_truncate before truncate on uploads for each statement execute function refuse_truncate_v1();
create trigger refuse_truncate before truncate on user_storage for each statement execute function refuse_truncate_v1();
create trigger refuse_truncate before truncate on user_storage_by_type for each statement execute function refuse_truncate_v1();

create trigger refuse_counter_insert before insert on user_storage for each row
    when (new.total_bytes <> 0 or new.reserved_bytes <> 0 or new.file_count <> 0 or new.credit_bytes <> 0)
    execute function refuse_counter_change_v1();
create trigger refuse_counter_change before update on user_storage for each row
    when (pg_trigger_depth() = 0
          and (old.total_bytes <> new.total_bytes or old.reserved_bytes <> new.reserved_bytes or old.file_count <> new.file_count
               or old.credit_xid is distinct from new.credit_xid or old.credit_bytes <> new.credit_bytes))
    execute function refuse_counter_change_v1();
create trigger refuse_counter_change before insert or update or delete on user_storage_by_type for each row
    when (pg_trigger_depth() = 0) execute function refuse_counter_change_v1();
