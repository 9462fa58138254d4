-- What `coffer audit` and `coffer scrub` remember from one run to the next, and how wrong counters are put right.

-- Set by the scrub when the stored bytes are not those of sha256: reads then answer `damaged`.
alter table user_files add column damaged_at timestamptz;
create index user_files_damaged on user_files (id) where damaged_at is not null;

-- Files without a row, as the audits saw them: only what two of them have seen is moved away.
create table audit_suspects (
    volume_id uuid not null,
    file_path text not null,
    size_bytes bigint not null,
    first_seen_at timestamptz not null,
    last_seen_at timestamptz not null,
    constraint audit_suspects_pkey primary key (volume_id, file_path)
);

-- How far the scrub has come on each volume, in the order of ids, which is that of uploading: what follows was verified the longest time
-- ago. No file's row is written for it.
create table volume_scrubs (
    volume_id uuid constraint volume_scrubs_pkey primary key,
    after_id uuid,
    round_started_at timestamptz not null default now(),
    last_round_ended_at timestamptz
);

-- A row is inserted to have a user's counters put right; the trigger says in it what they were and what they are.
create table counter_corrections (
    id bigint generated always as identity constraint counter_corrections_pkey primary key,
    user_id varchar(255) not null constraint counter_corrections_user references user_storage (user_id) on delete cascade,
    corrected_at timestamptz not null default now(),
    was jsonb,
    became jsonb
);
create index counter_corrections_by_user on counter_corrections (user_id);

create function correct_counters_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
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

create trigger correct_counters before insert on counter_corrections for each row execute function correct_counters_v1();
