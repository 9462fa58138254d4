-- Backups, what proves them, and the stop that a restored store stands under. server/decisions/0021 says why it is enough.

-- One row for each backup that was begun. While `holds_until` is ahead, no stored file's bytes are removed: the dump may name it. Who removes
-- bytes asks for it in a statement of its own, after the commit that made them nobody's.
create table backups (
    id uuid constraint backups_pkey primary key,
    way text not null constraint backups_way_known check (way in ('restic', 'tar')),
    state text not null constraint backups_state_known check (state in ('running', 'done', 'failed')),
    started_at timestamptz not null default clock_timestamp(),
    ended_at timestamptz,
    holds_until timestamptz,
    -- What the dump shows: every row as of this moment.
    snapshot_at timestamptz,
    file_count bigint,
    total_bytes bigint,
    error text
);
create index backups_holding on backups (holds_until) where holds_until is not null;
create index backups_by_start on backups (started_at);

-- One row for each backup that was tried by restoring it to scratch.
create table drills (
    id bigint generated always as identity constraint drills_pkey primary key,
    -- No foreign key: what is drilled may have been made before this database was restored.
    backup_id uuid not null,
    snapshot_at timestamptz not null,
    passed boolean not null,
    is_full boolean not null,
    files_checked bigint not null,
    bytes_checked bigint not null,
    duration_seconds double precision not null,
    error text,
    ended_at timestamptz not null default clock_timestamp()
);
create index drills_by_end on drills (ended_at);

-- Taken out of its place already, and kept in withheld/ for a backup.
alter table tombstones add is_withheld boolean not null default false;

-- While a row is here, nothing new is stored: the store was restored, and nobody has said yet that it is the one that counts.
create table upload_stops (
    id bigint generated always as identity constraint upload_stops_pkey primary key,
    reason text not null,
    created_at timestamptz not null default now()
);

create function refuse_while_stopped_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create trigger refuse_while_stopped before insert on uploads
    for each statement execute function refuse_while_stopped_v1();
create trigger refuse_while_stopped before insert on user_files
    for each statement execute function refuse_while_stopped_v1();
create trigger refuse_change_while_stopped before update of sha256 on user_files
    for each statement execute function refuse_while_stopped_v1();
